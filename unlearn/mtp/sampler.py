"""The sampler head: a mask's hidden state, told which token came just before it."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unlearn.errors import UserError
from unlearn.mtp.settings import SamplerKind


class SamplerHead(nn.Module):
    """``MLP([E(previous); z])``, read by the model's own unembedding (Samragh et al. 2025, 2.3).

    Two blocks of Linear, SiLU and LayerNorm, 2d to d to d.

    ``paper``: the blocks' output takes the place of the hidden state. The last gain is set so that
    it begins with the size that hidden states have (``root_mean_square``), which the paper leaves
    open. ``residual``, not of the paper: ``z + Linear(first block)``, whose last map begins at 0,
    so that the head begins as the base's own.
    """

    def __init__(self, width: int, kind: SamplerKind, *, root_mean_square: float = 1.0) -> None:
        super().__init__()
        self.residual = kind == "residual"
        self.first = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.LayerNorm(width))
        self.second: nn.Module
        if self.residual:
            self.second = nn.Linear(width, width)
            nn.init.zeros_(self.second.weight)
            nn.init.zeros_(self.second.bias)
        else:
            norm = nn.LayerNorm(width)
            nn.init.constant_(norm.weight, root_mean_square)
            self.second = nn.Sequential(nn.Linear(width, width), nn.SiLU(), norm)

    def forward(
        self, previous: Float[Tensor, "*position width"], hidden: Float[Tensor, "*position width"]
    ) -> Float[Tensor, "*position width"]:
        """Give the hidden state that the unembedding reads, from E(previous) and a mask's own.

        It computes in the precision of its weights (fp32 while they are trained).
        """
        given = torch.cat([previous, hidden], -1).to(self.dtype)
        out = self.second(self.first(given)).to(hidden.dtype)
        return hidden + out if self.residual else out

    @property
    def dtype(self) -> torch.dtype:
        """Give the precision of the weights."""
        weight = self.first[0].weight
        assert isinstance(weight, Tensor)
        return weight.dtype


def build_sampler(width: int, kind: SamplerKind, seed: int, size: float) -> SamplerHead | None:
    """Draw a sampler head; None where the base's head reads the masks alone.

    Raises:
        UserError: no such kind.
    """
    if kind == "none":
        return None
    if kind not in ("residual", "paper"):
        raise UserError(f"sampler '{kind}' given", "one of residual, paper, none")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SamplerHead(width, kind, root_mean_square=size)
