"""The shuffle buffer between the model and the dictionary: neighbours in a text come apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

Vectors = Float[Tensor, "_ width"]


@dataclass
class ShuffleBuffer:
    """Holds about ``capacity`` vectors in a random order, and is filled again when half are left.

    ``fill`` is asked for at least so many more vectors.
    """

    capacity: int
    fill: Callable[[int], Sequence[Vectors]]
    seed: int = 0
    vectors: Vectors | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.seed)

    def take(self, number: int) -> Vectors:
        """Give ``number`` vectors, which leave the buffer."""
        left = 0 if self.vectors is None else len(self.vectors)
        if left < max(number, self.capacity // 2):
            self._refill(max(number, self.capacity) - left)
        assert self.vectors is not None
        taken, self.vectors = self.vectors[-number:], self.vectors[:-number]
        return taken

    def _refill(self, number: int) -> None:
        rest = [] if self.vectors is None else [self.vectors]
        held = torch.cat([*rest, *self.fill(number)])
        order = torch.randperm(len(held), generator=self.generator)
        self.vectors = held[order.to(held.device)]

    def state(self) -> dict[str, Tensor]:
        """Give all that the next vectors depend on, besides what ``fill`` reads."""
        assert self.vectors is not None
        return {"vectors": self.vectors.contiguous(), "generator": self.generator.get_state()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        self.vectors = state["vectors"]
        self.generator.set_state(state["generator"].cpu())
