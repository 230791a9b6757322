"""Which process works out which matrix: the owner computes, the others are given the result."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import TypeVar

from torch import Tensor

from unlearn.curvature.blocks import Blocks
from unlearn.ranks import Ranks

K = TypeVar("K")


def owners(costs: Mapping[K, float], size: int) -> dict[K, int]:
    """Deal out work to ``size`` processes, largest first, always to the one with the least so far.

    Costs of factorisations grow with the cube of the matrices.
    """
    loads = [0.0] * size
    dealt = {}
    for name, cost in sorted(costs.items(), key=lambda item: -item[1]):
        rank = loads.index(min(loads))
        loads[rank] += cost
        dealt[name] = rank
    return dealt


def cube(widths: Sequence[int]) -> float:
    """Give the cost of factorising blocks of these widths, up to a constant."""
    return float(sum(width**3 for width in widths))


def bases(
    factors: MutableMapping[str, Blocks], work: Callable[[Tensor], Tensor], ranks: Ranks
) -> dict[str, Blocks]:
    """Give a matrix of the same shape for every block of every factor, each made by its owner.

    ``factors`` is emptied on the way: each gives its memory back once its matrix is made.
    """
    dealt = owners({name: cube(one.widths) for name, one in factors.items()}, ranks.size)

    def one(name: str, part: Tensor) -> Tensor:
        mine = dealt[name] == ranks.rank
        return ranks.from_rank(work(part) if mine else part.new_empty(part.shape), dealt[name])

    return {
        name: Blocks(tuple(one(name, part) for part in factors.pop(name).parts)) for name in dealt
    }
