"""Changing what leaves a decoder layer while a model runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from unlearn.activations import check_layer
from unlearn.ranks import whole
from unlearn.thinning import decoder_layers

Change = Callable[[Tensor], Tensor]


@contextmanager
def spliced(model: Any, layer: int, change: Change) -> Iterator[None]:
    """Put ``change`` of the hidden states [batch, seq, width] in their place inside the block.

    Layers give a tensor (transformers 5) or a tuple that begins with one; both stay what they are.
    """
    model = whole(model)
    check_layer(model, layer)
    found = decoder_layers(model)
    assert found is not None

    def replace(_module: Any, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = found[1][layer].register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
