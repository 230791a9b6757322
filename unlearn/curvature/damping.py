"""Damping: what is added to the curvature before it is inverted."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator

DampingKind = Literal["factored", "relative", "absolute"]


@dataclass(frozen=True)
class Damping:
    """How λ is set.

    ``factored``: with π² = mean(A)/mean(G), means over the diagonals, and λ = c·mean(A)·mean(G),
    A + π√λ·I and G + (√λ/π)·I are inverted (Martens & Grosse 2015, arXiv:1503.05671, section 6.3).
    ``relative``: λ = c times the mean eigenvalue of the layer. ``absolute``: λ = c.
    Curvature that is no Kronecker product (``ekfac``, ``diag``, ``act``) takes ``factored`` as
    ``relative``.

    ``trim`` leaves so many of the largest eigenvalues of A and of G (of H itself where it is no
    product) out of these means: where a few tokens have huge activations, one direction holds most
    of the trace, and a share of the plain mean would drown the others. Ours.
    """

    kind: DampingKind
    c: float
    trim: int = 0

    @classmethod
    def parse(cls, text: str, trim: int = 0) -> "Damping":
        """Read ``KIND:C``, for instance ``factored:1e-3``.

        Raises:
            ValueError: not such a text, or C is not above 0.
        """
        kind, _, number = text.partition(":")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if kind not in get_args(DampingKind) or not 0 < value < math.inf:
            raise ValueError(
                f"'{text}' given; must be KIND:C with C above 0, for instance factored:1e-3, "
                "relative:0.1 or absolute:1e-8"
            )
        return cls(kind, value, trim)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.kind}:{self.c:g}"

    def amount(self, mean_eigenvalue: float) -> float:
        """Give λ for a layer whose eigenvalues have this mean."""
        return self.c if self.kind == "absolute" else self.c * mean_eigenvalue


def _checked(text: str) -> str:
    Damping.parse(text)
    return text


DampingText = Annotated[str, AfterValidator(_checked)]
"""``KIND:C``; see :class:`Damping`."""


def factored(inputs: float, outputs: float, c: float) -> tuple[float, float]:
    """Give what is added to A and to G, from the means of their diagonals.

    π√λ = √c·mean(A) and √λ/π = √c·mean(G).
    """
    return math.sqrt(c) * inputs, math.sqrt(c) * outputs
