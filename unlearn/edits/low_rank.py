"""Changes of matrices as two thin factors: a fraction of the size, and not quite the same."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """A matrix as ``left @ right``; each carries the square roots of the singular values."""

    left: Float[Tensor, "rows rank"]
    right: Float[Tensor, "rank columns"]

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix."""
        return torch.Size((self.left.shape[0], self.right.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        """Type of both factors."""
        return self.left.dtype

    def times(self, scale: float) -> Float[Tensor, "rows columns"]:
        """Give the matrix, times ``scale``."""
        return (scale * self.left) @ self.right

    def scaled(self, scale: float) -> "Factors":
        """Give factors of the matrix times ``scale``; their product is exactly ``times(scale)``."""
        return Factors(scale * self.left, self.right)


class LowRank(Mapping[str, Tensor]):
    """Changes by name of the weight, as tensors; those kept as factors are multiplied when read."""

    def __init__(self, kept: Mapping[str, Tensor | Factors]) -> None:
        self.kept = kept

    def __getitem__(self, name: str) -> Tensor:
        found = self.kept[name]
        return found.times(1.0) if isinstance(found, Factors) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


@torch.no_grad()
def truncated(changes: Mapping[str, Tensor], rank: int) -> tuple[LowRank, float]:
    """Keep the ``rank`` largest singular values of each matrix; give ‖Δ − Δ'‖ / ‖Δ‖ over all.

    Nearest in the plain Frobenius norm (Eckart and Young 1936), every entry of a weight alike.
    Weighing them by the curvature, which tells the directions that matter to the outputs, would ask
    for its factors; that is not done here. What has other than two dimensions, and matrices that
    factors would not make smaller, stay whole. Factors of this rank or less stay as they are.
    Singular values that are zero are not kept.
    """
    kept: dict[str, Tensor | Factors] = {}
    lost = whole = 0.0
    given = changes.kept if isinstance(changes, LowRank) else changes
    for name, change in changes.items():
        whole += _square(change)
        factors = given[name]
        if isinstance(factors, Factors) and factors.left.shape[1] <= rank:
            kept[name] = factors
            continue
        if change.ndim != 2 or rank * sum(change.shape) >= change.numel():
            kept[name] = change
            continue
        found = _cut(change, rank)
        lost += _square(change - found.times(1.0))
        kept[name] = found
    return LowRank(kept), (lost / whole) ** 0.5 if whole else 0.0


def _cut(change: Float[Tensor, "rows columns"], rank: int) -> Factors:
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    number = max(1, min(rank, int((values > 0).sum())))
    roots = values[:number].sqrt()
    return Factors(left[:, :number] * roots, roots[:, None] * right[:number])


def _square(values: Tensor) -> float:
    return float(values.double().square().sum())
