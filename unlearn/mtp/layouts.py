"""Which blocks of masks a step of decoding carries: drafts for the prefixes that may come true.

A step checks q drafted tokens, so the verified text may end at any of q + 1 places. Only a block
anchored where it does end gives drafts for the next step. What is written never depends on this.
"""

from typing import Literal, Protocol, runtime_checkable

from unlearn.errors import unknown
from unlearn.mtp.layout import Block

LayoutName = Literal["linear", "quadratic", "budget"]
LAYOUTS = ("linear", "quadratic", "budget")


@runtime_checkable
class Layout(Protocol):
    """Chooses blocks, and is told how many drafts were right."""

    def blocks(self, drafted: int) -> tuple[Block, ...]:
        """Give blocks (place, masks) for a step with so many drafts; place 0 is before them all."""
        ...

    def saw(self, drafted: int, accepted: int) -> None:
        """Learn from a step."""
        ...


class Linear:
    """One block, after the last draft: drafts come of it only when all of them were right.

    Samragh et al. 2025, section 2.4.1. At most 2k + 1 tokens a step.
    """

    def __init__(self, k: int) -> None:
        self.k = k

    def blocks(self, drafted: int) -> tuple[Block, ...]:
        return ((drafted, self.k),)

    def saw(self, drafted: int, accepted: int) -> None:
        pass


class Quadratic(Linear):
    """A block after every ordinary token: k drafts whatever is accepted, (k + 1)^2 tokens a step.

    The paper puts blocks after drafts only, k^2 masks, which leaves none where the first draft is
    wrong; its own promise of k drafts at every step needs this one more.
    """

    def blocks(self, drafted: int) -> tuple[Block, ...]:
        return tuple((place, self.k) for place in range(drafted + 1))


class Budget:
    """The ``masks`` masks a step that are likeliest to be used, from what was accepted so far.

    Mask j of the block at place g is worth P(the text ends at g) P(at least j drafts are right),
    both from means that forget; the most valuable are carried. Not of the paper.
    """

    KEEP = 0.95
    BEGIN = (1.5, 2.0)
    """As if so many drafts had been right, of so many, at each place."""

    def __init__(self, k: int, masks: int | None = None) -> None:
        self.k, self.masks = k, masks or 2 * k
        self.counts = [self.BEGIN] * k

    @property
    def right(self) -> list[float]:
        """Give the chance that draft j is right when those before it are, j from 0."""
        return [right / checked for right, checked in self.counts]

    def blocks(self, drafted: int) -> tuple[Block, ...]:
        reached, ends, right = 1.0, [], self.right
        for chance in right[:drafted]:
            ends.append(reached * (1 - chance))
            reached *= chance
        ends.append(reached)
        worth, used = [], 1.0
        for j in range(self.k):
            used *= right[j]
            worth += [(-end * used, place, j) for place, end in enumerate(ends)]
        lengths = [0] * (drafted + 1)
        for _, place, j in sorted(worth)[: self.masks]:
            lengths[place] = max(lengths[place], j + 1)
        return tuple((place, length) for place, length in enumerate(lengths) if length)

    def saw(self, drafted: int, accepted: int) -> None:
        for j in range(min(accepted + 1, drafted)):
            right, checked = self.counts[j]
            self.counts[j] = (self.KEEP * right + (j < accepted), self.KEEP * checked + 1)


def layout_named(name: str, k: int, masks: int | None = None) -> Layout:
    """Make a layout; ``masks`` is the size of a ``budget``, 2k by default.

    Raises:
        UserError: no such layout.
    """
    if name == "linear":
        return Linear(k)
    if name == "quadratic":
        return Quadratic(k)
    if name == "budget":
        return Budget(k, masks)
    raise unknown("layout", name, LAYOUTS)
