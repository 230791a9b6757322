"""Sharing work between the processes of one launch, and giving all of them the whole result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from unlearn.engines import is_sharded

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work; alone when there is one.

    Every method but the properties must be called by all ranks alike.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"

    @classmethod
    def of(cls, model: Any) -> "Ranks":
        """Give the ranks of the launch, each of which holds the whole model.

        Where an engine splits the weights between the ranks (FSDP2, ZeRO 3), a forward pass needs
        all of them at once: nothing is shared, every rank does the same work in step.
        """
        return cls() if is_sharded(model) else cls.world()

    @classmethod
    def world(cls) -> "Ranks":
        """Give all ranks of the launch, whatever they hold."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        on_cpu = "gloo" in str(distributed.get_backend())
        device = "cpu" if on_cpu else f"cuda:{torch.cuda.current_device()}"
        return cls(distributed.get_rank(), distributed.get_world_size(), device)

    def first(self, work: Callable[[], T]) -> T:
        """Let rank 0 do this; the others wait, get what it got, and fail when it fails.

        What it gives must be plain data: it travels pickled between our own processes.
        """
        if self.size == 1:
            return work()
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told = [work(), None]
            except Exception as error:
                told = [None, error]
        distributed.broadcast_object_list(told, 0, device=torch.device(self.device))
        if told[1] is not None:
            raise told[1]
        value: T = told[0]
        return value

    def gather(self, values: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Give the [row, size] values of all ranks, by rank; ``sizes`` names them, 0 for none."""
        if self.size == 1:
            return [values]
        padded = values.new_zeros(len(values), max(sizes), device=self.device)
        padded[:, : values.shape[1]] = values
        found = [torch.empty_like(padded) for _ in range(self.size)]
        distributed.all_gather(found, padded)
        device = values.device
        return [part[:, :size].to(device) for part, size in zip(found, sizes, strict=False)]

    def add(self, values: Tensor) -> Tensor:
        """Give the sum over ranks."""
        if self.size == 1:
            return values
        total = values.to(self.device)
        distributed.all_reduce(total)
        return total.to(values.device)

    def from_rank(self, values: Tensor, owner: int) -> Tensor:
        """Give what rank ``owner`` holds; the others give a tensor of the same shape and type."""
        if self.size == 1:
            return values
        sent = values.contiguous().to(self.device)
        distributed.broadcast(sent, owner)
        return sent.to(values.device)

    def all(self, flag: bool) -> bool:
        """Tell whether the flag is set on every rank."""
        return int(self.add(torch.tensor([int(flag)]))) == self.size

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set on some rank."""
        return int(self.add(torch.tensor([int(flag)]))) > 0

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.any(False)

    def share(self, parts: Sequence[bytes | None]) -> list[bytes | None]:
        """Give rank 0's parts to all ranks; each names as many, None where there is nothing."""
        if self.size == 1:
            return list(parts)
        lengths = torch.tensor([-1 if part is None else len(part) for part in parts])
        lengths = lengths.to(self.device)
        distributed.broadcast(lengths, 0)
        sizes = lengths.tolist()
        blob = torch.zeros(sum(max(0, size) for size in sizes), dtype=torch.uint8)
        if self.rank == 0 and len(blob):
            joined = bytearray(b"".join(part for part in parts if part is not None))
            blob = torch.frombuffer(joined, dtype=torch.uint8)
        blob = blob.to(self.device)
        distributed.broadcast(blob, 0)
        pieces = iter(blob.cpu().split([size for size in sizes if size >= 0]))
        return [None if size < 0 else next(pieces).numpy().tobytes() for size in sizes]


def whole(model: Any) -> Any:
    """Give the model inside DDP, whose forward pass would wait for the other ranks."""
    return model.module if isinstance(model, DistributedDataParallel) else model
