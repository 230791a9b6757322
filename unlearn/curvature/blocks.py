"""Symmetric matrices of one axis of a weight, as one block or as several along the diagonal."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

TILED_FROM = {"cpu": 512}
TILED_ELSEWHERE = 4096
"""Matrices of this size and more have only the lower half of their tiles computed, on a CPU and on
other devices: 0.6 of the work, in products that must still be large enough for the device."""
TILES = 4
STRIP = 512
"""Rows that are mirrored at once."""


@dataclass(frozen=True)
class Blocks:
    """A block-diagonal matrix: square blocks of contiguous entries.

    Axes above ``max_factor_dim`` are cut into equal parts, and what is between the parts is taken
    to be 0 (Grosse et al. 2023, arXiv:2308.03296, appendix).
    """

    parts: tuple[Tensor, ...]

    @classmethod
    def zeros(cls, size: int, limit: int, *, dtype: torch.dtype, device: object) -> "Blocks":
        """Make room for the blocks of an axis."""
        widths = block_widths(size, limit)
        return cls(tuple(torch.zeros(n, n, dtype=dtype, device=device) for n in widths))  # type: ignore[call-overload]

    @property
    def widths(self) -> list[int]:
        return [len(part) for part in self.parts]

    @property
    def size(self) -> int:
        return sum(self.widths)

    def trace(self) -> float:
        return float(sum(part.diagonal().double().sum() for part in self.parts))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Blocks":
        return Blocks(tuple(change(part) for part in self.parts))

    def after(self, rows: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
        """Give rows times this matrix."""
        pieces = zip(rows.split(self.widths, -1), self.parts, strict=True)
        return torch.cat([piece @ part for piece, part in pieces], -1)

    def dense(self) -> Float[Tensor, "size size"]:
        return torch.block_diag(*self.parts)

    def add_rows(self, rows: Float[Tensor, "token size"]) -> None:
        """Add Σ x xᵀ in the precision of the blocks; of wide ones the lower triangle alone."""
        for piece, part in zip(rows.split(self.widths, -1), self.parts, strict=True):
            _add_gram(part, piece)

    def finished(self, count: int) -> "Blocks":
        """Make these sums the mean over ``count`` units, symmetric, in their own memory."""
        return self.mapped(lambda part: _mirror(part).div_(max(count, 1)))


def block_widths(size: int, limit: int) -> list[int]:
    """Cut an axis into the fewest parts within the limit, as equal as can be."""
    number = -(-size // limit)
    edges = [size * place // number for place in range(number + 1)]
    return [end - start for start, end in pairwise(edges)]


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """Add XᵀX; bf16 on CUDA is multiplied as it is and summed in fp32, elsewhere converted."""
    if _multiplies_mixed(total, rows):
        _tiles(total, _add_mixed, rows.contiguous())
        return
    _tiles(total, lambda out, a, b: out.addmm_(a, b), rows.to(total.dtype))


def _multiplies_mixed(total: Tensor, rows: Tensor) -> bool:
    half = rows.dtype == torch.bfloat16 and total.dtype == torch.float32
    return half and total.is_cuda and hasattr(torch.ops.aten.addmm, "dtype")


def _add_mixed(total: Tensor, a: Tensor, b: Tensor) -> None:
    total.copy_(torch.addmm(total, a, b, out_dtype=torch.float32))


def _tiles(total: Tensor, add: Callable[[Tensor, Tensor, Tensor], object], rows: Tensor) -> None:
    size = len(total)
    if size < TILED_FROM.get(total.device.type, TILED_ELSEWHERE):
        add(total, rows.t(), rows)
        return
    for start, end in pairwise(size * place // TILES for place in range(TILES + 1)):
        add(total[start:end, :end], rows[:, start:end].t(), rows[:, :end])


def _mirror(total: Tensor) -> Tensor:
    """Put the lower triangle in the place of the upper: of small blocks it is nearly the same."""
    for start in range(0, len(total), STRIP):
        end = start + STRIP
        tile = total[start:end, start:end]
        tile.copy_(tile.tril() + tile.tril(-1).t())
        total[start:end, end:] = total[end:, start:end].t()
    return total
