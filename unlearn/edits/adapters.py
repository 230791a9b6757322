"""What adapters add to the weights below them: s·BA, which is exactly of low rank."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unlearn.curvature.adapters import Adapter, adapter_of
from unlearn.curvature.factors import accumulated
from unlearn.curvature.layers import Tracked
from unlearn.edits.low_rank import Factors, LowRank
from unlearn.edits.update import stored_change
from unlearn.head import plain


@torch.no_grad()
def added_below(model: Any, layers: Sequence[Tracked]) -> dict[str, Any] | None:
    """Give what the adapters add to the weights below them, and what merging leaves of it there.

    ``weights`` are :class:`Factors` sB and A by name of the weight in the plain model, in its
    layout; ``changed_share`` and ``rounding`` as :func:`stored_change` has them. None when the
    layers are no adapters'.
    """
    found = [adapter_of(plain(model), layer.name) for layer in layers]
    adapters = {f"{one[0]}.weight": one[1] for one in found if one is not None}
    if not adapters:
        return None
    added = LowRank({name: _factors(one) for name, one in adapters.items()})
    start = _Lazy(adapters, lambda name: adapters[name].base)
    merged = _Lazy(adapters, lambda name: _merged(adapters[name].base, added[name]))
    return {"weights": added, **stored_change(start, merged, added)}


def _factors(adapter: Adapter) -> Factors:
    dtype = accumulated(adapter.up.weight.dtype)
    up, down = (one.weight.detach().to(dtype) for one in (adapter.up, adapter.down))
    if adapter.transposed:
        return Factors(down.t().clone(), adapter.scale * up.t())
    return Factors(adapter.scale * up, down.clone())


def _merged(base: Tensor, added: Tensor) -> Tensor:
    """Give what PEFT makes of a weight when adapters are merged: added in fp32, rounded once."""
    return (base.to(added) + added).to(base.dtype)


@dataclass(frozen=True)
class _Lazy(Mapping[str, Tensor]):
    """Weights that are made when they are read: all of them at once may not fit."""

    names: Mapping[str, Any]
    make: Callable[[str], Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
