"""Taps: what goes into linear layers, and the gradient at what comes out, heard in one place.

The forward pass of each tracked layer is replaced by a function whose backward pass is handed both
input and output gradient. It fires once per use, whether or not activations are computed again in
the backward pass; a hook on the input would then fire twice. No gradient of a weight is computed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from unlearn.curvature.layers import Tracked
from unlearn.forward import replaced
from unlearn.thinning import is_recomputed

Heard = Callable[[Tracked, Tensor, Tensor], None]
"""Told (layer, input [..., in], gradient at the output [..., out]) in the backward pass."""


class _Tapped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, heard: Any
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.heard = heard
        return linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        inputs, weight = ctx.saved_tensors
        ctx.heard(inputs, grad)
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None, None, None


@contextmanager
def tapped(model: Any, layers: Sequence[Tracked], heard: Heard) -> Iterator[None]:
    """Let ``heard`` be told of every tracked layer in the backward passes inside the block.

    Inside it, no weight takes a gradient, and a backward pass ends at the lowest of the layers.
    Dropout is off. Layers that the model computes again in the backward pass stay so.
    """
    anchor = torch.zeros((), requires_grad=True)
    with ExitStack() as stack:
        stack.enter_context(_without_weight_gradients(model))
        stack.enter_context(_dropout_off(model))
        for layer in layers:
            stack.enter_context(replaced(layer.module, _forward(layer, heard, anchor)))
        yield


@contextmanager
def tapped_inputs(
    layers: Sequence[Tracked], heard: Callable[[Tracked, Tensor], None]
) -> Iterator[None]:
    """Let ``heard`` be told (layer, input) in the forward passes inside the block."""
    with ExitStack() as stack:
        for layer in layers:

            def hear(module: Any, inputs: Any, layer: Tracked = layer) -> None:
                heard(layer, inputs[0])

            stack.callback(layer.module.register_forward_pre_hook(hear).remove)
        yield


def _forward(layer: Tracked, heard: Heard, anchor: Tensor) -> Callable[[Tensor], Tensor]:
    """Give the tapped forward pass; for the sake of ``anchor`` its output takes a gradient."""

    def hear(inputs: Tensor, grad: Tensor) -> None:
        heard(layer, inputs, grad)

    def forward(inputs: Tensor) -> Tensor:
        out: Tensor = _Tapped.apply(inputs, layer.weight, layer.module.bias, anchor, hear)
        return out

    return forward


@contextmanager
def _without_weight_gradients(model: Any) -> Iterator[None]:
    """Let no weight take a gradient; where layers are recomputed the embedded tokens take one.

    (The reentrant way of it passes a gradient on only when its inputs take one.)
    """
    trained = [one for one in model.parameters() if one.requires_grad]
    handles = []
    if is_recomputed(model):
        embedding: nn.Module = model.get_input_embeddings()
        handles = [
            embedding.register_forward_hook(lambda module, inputs, out: out.requires_grad_())
        ]
    for one in trained:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for one in trained:
            one.requires_grad_(True)


@contextmanager
def _dropout_off(model: Any) -> Iterator[None]:
    """Put all modules in evaluation mode, but those alone which decide to recompute their layer."""
    before = {module: module.training for module in model.modules()}
    for module in before:
        module.training = bool(getattr(module, "gradient_checkpointing", False))
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
