"""Key-value caches: one that is cut back after every step without copies, one that is only read."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from unlearn.errors import UserError

KINDS = {
    "DynamicSlidingWindowLayer": "sliding-window attention",
    "LinearAttentionLayer": "linear attention",
    "LinearAttentionAndFullAttentionLayer": "linear attention",
    "DynamicIndexedLayer": "sparse indexed attention",
}
"""What layers do that cannot be cut back, by the caches that they ask for."""


def require_croppable(model: Any) -> None:
    """Refuse a model whose cache cannot be cut back to any earlier token.

    Raises:
        UserError: a layer attends otherwise than to all earlier tokens.
    """
    name = type(model).__name__
    try:
        layers = DynamicCache(config=model.config).layers
    except (KeyError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"{name} has no key-value cache that is known: {error}", HINT) from error
    for place, layer in enumerate(layers):
        if type(layer) is not DynamicLayer:
            kind = type(layer).__name__
            what = KINDS.get(kind, f"a cache of kind {kind}")
            raise UserError(
                f"{name} has {what} in layer {place}: its cache cannot be cut back to an earlier "
                "token",
                HINT,
            )


HINT = "mask-token prediction needs full attention in every layer; plain decoding works"


class PreallocatedLayer(DynamicLayer):
    """Keys and values [batch, head, token, width] in a buffer that is written to and cut in place.

    A plain layer copies everything at every step. The buffer doubles when it is full.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.length = room, 0
        self._store: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, and give all there are: views of the buffer."""
        new = key_states.shape[-2]
        if self._store is None or self.length + new > self.room:
            self._grow(key_states, value_states, self.length + new)
        assert self._store is not None
        for store, states in zip(self._store, (key_states, value_states), strict=True):
            store[..., self.length : self.length + new, :] = states
        self.length += new
        self._show()
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the number is given as transformers gives it, below 0."""
        if tokens_to_remove > 0:
            raise ValueError("give the number of tokens to remove as a negative number")
        self.length += tokens_to_remove
        self._show()

    def get_seq_length(self) -> int:
        """Give the tokens held."""
        return self.length

    def _show(self) -> None:
        assert self._store is not None
        self.keys, self.values = (one.narrow(-2, 0, self.length) for one in self._store)

    def _grow(self, keys: Tensor, values: Tensor, least: int) -> None:
        room = max(self.room, least, 2 * self.length)
        fresh = []
        for states, old in zip((keys, values), self._store or (None, None), strict=True):
            made = states.new_empty(*states.shape[:-2], room, states.shape[-1])
            if old is not None:
                made[..., : self.length, :] = old[..., : self.length, :]
            fresh.append(made)
        self.room, self._store, self.is_initialized = room, (fresh[0], fresh[1]), True
        self.dtype, self.device = keys.dtype, keys.device


def preallocated(model: Any, room: int) -> Cache:
    """Make an empty cache for a model, with room for so many tokens."""
    number = len(DynamicCache(config=model.config).layers)
    return Cache(layers=[PreallocatedLayer(room) for _ in range(number)])


class ReadOnlyLayer(DynamicLayer):
    """Keys and values of a text that was read before; what comes after is not kept.

    So a backward pass that computes activations again reads what the forward pass read.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Give what is held with the new behind it."""
        keys = torch.cat([self.keys, key_states], -2)
        return keys, torch.cat([self.values, value_states], -2)


def frozen(cache: Any) -> Cache:
    """Give a cache that can only be read, of what another holds."""
    return Cache(layers=[ReadOnlyLayer(one.keys, one.values) for one in cache.layers])
