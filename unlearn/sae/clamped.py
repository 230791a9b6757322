"""A model with clamps in it: the same model, with hooks on the layers whose output they change.

To everything else it is an ordinary model: it is scored through its head, packed, and writes with
or without a key-value cache. The clamps are a module of the model, so that its hash and the keys of
stored results tell clamped models apart; :func:`remove` takes it out without a trace.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unlearn.activations import check_layer
from unlearn.errors import UserError
from unlearn.head import plain
from unlearn.sae.clamp import Clamp
from unlearn.sae.spared import first_positions, spared
from unlearn.thinning import decoder_layers

NAME = "sae_clamp"
"""Under this name a model holds its clamps, and its configuration says what they are."""


@dataclass
class _Call:
    """What the hooks of one model share: the positions of this call that are left alone."""

    spared: Tensor | None = None


class ClampedLayer(nn.Module):
    """One clamp, as a hook on its layer; its weights keep their precision whatever the model's."""

    def __init__(self, clamp: Clamp, call: _Call) -> None:
        super().__init__()
        self.about, self.call = clamp.about(), call
        for name, tensor in clamp.tensors().items():
            self.register_buffer(name, tensor.detach().clone())

    @property
    def clamp(self) -> Clamp:
        """Give the clamp with its weights where they are now."""
        return Clamp.rebuilt(self.about, dict(self.named_buffers()))

    def changed(self, _layer: Any, _inputs: Any, output: Any) -> Any:
        """Change what leaves a layer: a tensor (transformers 5) or a tuple that begins with one."""
        if isinstance(output, tuple):
            return (self._changed(output[0]), *output[1:])
        return self._changed(output)

    def _changed(self, hidden: Tensor) -> Tensor:
        alone = self.call.spared
        assert alone is not None
        return torch.where(alone[..., None].to(hidden.device), hidden, self.clamp(hidden))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ClampedLayer":
        """Follow the model to a device, not into its precision: thresholds are sensitive."""
        for name, tensor in self.named_buffers():
            setattr(self, name, tensor.to(fn(tensor[:0]).device))
        return self


class Clamps(nn.Module):
    """All clamps of a model, with what its tokenizer puts in front of a text."""

    def __init__(self, clamps: Sequence[Clamp], front: Sequence[int]) -> None:
        super().__init__()
        self.front, self.call = tuple(front), _Call()
        self.layers = nn.ModuleList(ClampedLayer(one, self.call) for one in clamps)
        self.handles: list[Any] = []

    @property
    def clamps(self) -> list[Clamp]:
        """Give the clamps, lowest layer first."""
        return [one.clamp for one in self._layers]

    @property
    def _layers(self) -> list[ClampedLayer]:
        return [one for one in self.layers if isinstance(one, ClampedLayer)]

    def hook(self, model: Any) -> None:
        """Put the hooks on a model's decoder and layers."""
        found, decoder = decoder_layers(model), model.get_decoder()
        assert found is not None
        self.signature = inspect.signature(decoder.forward)
        self.handles.append(decoder.register_forward_pre_hook(self._called, with_kwargs=True))
        for one in self._layers:
            layer = found[1][one.about["layer"]]
            self.handles.append(layer.register_forward_hook(one.changed))

    def _called(self, _decoder: Any, args: Any, kwargs: Any) -> None:
        """Note which positions of this call are left alone."""
        given = self.signature.bind_partial(*args, **kwargs).arguments
        named = {**given.pop("kwargs", {}), **given}
        ids, cache = named.get("input_ids"), named.get("past_key_values")
        if ids is None:
            raise UserError(
                "a clamped model was given embeddings, so its first tokens are not known",
                "give input_ids",
            )
        past = 0 if cache is None else int(cache.get_seq_length())
        first = first_positions(ids, named.get("position_ids"), named.get("attention_mask"), past)
        self.call.spared = spared(ids, first, self.front)


def install(model: Any, clamps: Sequence[Clamp], front: Sequence[int] = ()) -> Any:
    """Put clamps into a model, in place; with none the model stays as it is.

    ``front``: ids that the tokenizer puts before a text, which are left alone as the first position
    of every row is.

    Raises:
        UserError: a layer or width that the model does not have, two clamps at one layer, or there
            are clamps already.
    """
    inner = plain(model)
    _check(inner, clamps)
    if not clamps:
        return model
    device = inner.get_input_embeddings().weight.device
    ordered = sorted(clamps, key=lambda one: one.layer)
    module = Clamps(ordered, front).to(device)
    module.hook(inner)
    setattr(inner, NAME, module)
    inner.config.composition = {NAME: [one.about() for one in ordered], "front": list(front)}
    inner.save_pretrained = _refuse_saving
    return model


def remove(model: Any) -> Any:
    """Take all clamps out of a model: it answers as before, bit for bit."""
    inner = plain(model)
    if module := found(inner):
        for handle in module.handles:
            handle.remove()
        delattr(inner, NAME)
        del inner.config.composition
        del inner.save_pretrained
    return model


def found(model: Any) -> Clamps | None:
    """Give the clamps in a model; None when there are none."""
    module = getattr(plain(model), NAME, None)
    return module if isinstance(module, Clamps) else None


@contextmanager
def clamped(model: Any, clamps: Sequence[Clamp], front: Sequence[int] = ()) -> Iterator[Any]:
    """Let a model answer with clamps inside the block."""
    install(model, clamps, front)
    try:
        yield model
    finally:
        remove(model)


def _check(model: Any, clamps: Sequence[Clamp]) -> None:
    if found(model):
        raise UserError("the model has clamps already", "take them out first")
    layers = [one.layer for one in clamps]
    if twice := [layer for layer in layers if layers.count(layer) > 1]:
        raise UserError(f"two clamps are at layer {twice[0]}", "give one dictionary per layer")
    width = model.config.get_text_config().hidden_size
    for one in clamps:
        check_layer(model, one.layer)
        if one.directions.shape[1] != width:
            raise UserError(
                f"a clamp of width {one.directions.shape[1]} given, the model's is {width}",
                "give a dictionary of this model",
            )


def _refuse_saving(*_args: Any, **_how: Any) -> None:
    """Refuse: the folder would load, elsewhere, as the model without its clamps."""
    message = "save it with unlearn.sae.artefact.save_composed"
    raise TypeError(f"a model with clamps is not one set of weights: {message}")
