"""Forward passes read from inside: what an engine wraps around a model sees an ordinary call.

DDP, FSDP2 and ZeRO 3 hook into the call of the wrapped model and of its modules: there they gather
split weights and prepare the backward pass. So everything that uses weights is computed within
these calls: the vocabulary head is read where the model applies it, and what was read is what the
wrapped model returns.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from unlearn.head import VocabularyHead, plain
from unlearn.packing import Layout, Packing, is_packable, layout_forward, packed_forward
from unlearn.thinning import Thinning, is_recomputed

Read = Callable[[VocabularyHead, Float[Tensor, "batch seq width"]], Any]
"""Reads hidden states through the head; gives tensors, or dictionaries of them."""


class _HeadRead(Exception):
    """Ends a forward pass once the head has been read: what comes after it is not needed."""

    def __init__(self, said: Any) -> None:
        super().__init__()
        self.said = said


def read_head(
    model: Any,
    head: VocabularyHead,
    read: Read,
    input_ids: Int[Tensor, "batch seq"],
    attended: Tensor,
    thinning: Thinning | None = None,
) -> Any:
    """Give what ``read`` makes of the hidden states [batch, seq, width] that reach the head.

    With right padding and causal attention no attention mask is needed: padding comes after every
    real position and cannot be seen from it. Inside :func:`unlearn.packing.packable` padding is
    left out altogether. With ``thinning`` only its positions mean anything: see
    :mod:`unlearn.thinning`.
    """
    packing = Packing.of(attended) if _has_padding(model, attended) else None
    with _thinned(model, thinning, packing):
        if packing is None:
            return _reading(model, head, read)(input_ids=input_ids, use_cache=False)
        call = _reading(model, head, lambda inside, packed: read(inside, packing.unpack(packed)))
        return packed_forward(call, input_ids, packing)


def _thinned(
    model: Any, thinning: Thinning | None, packing: Packing | None
) -> AbstractContextManager[None]:
    """Skip what is not read in the last layer, where there is anything to read and to skip."""
    if thinning is None or not thinning.read.any() or is_recomputed(plain(model)):
        return nullcontext()
    return replaced(thinning.block, thinning.forward(packing))


def read_layout(
    model: Any, head: VocabularyHead, read: Read, tokens: Int[Tensor, "1 token"], layout: Layout
) -> Any:
    """Do the same for tokens that stand and attend as a layout says."""
    return layout_forward(_reading(model, head, read), tokens, layout)


def hidden_states(
    model: Any, input_ids: Int[Tensor, "batch seq"], attended: Tensor, module: nn.Module
) -> Float[Tensor, "batch seq width"]:
    """Give the hidden states that leave a module; see :func:`read_head` for padding."""

    def work(forward: Callable[[], Any]) -> Tensor:
        with _leaving(module) as found:
            forward()
        return found[0]

    call = partial(_from_inside, model, work)
    if _has_padding(model, attended):
        packing = Packing.of(attended)
        return packing.unpack(packed_forward(call, input_ids, packing, logits_to_keep=1))
    return call(input_ids=input_ids, use_cache=False, logits_to_keep=1)


def _has_padding(model: Any, attended: Tensor) -> bool:
    """Tell whether there is padding to be left out; a batch of nothing but padding stays."""
    return is_packable(plain(model)) and bool(attended.any()) and not bool(attended.all())


def _reading(model: Any, head: VocabularyHead, read: Read) -> Callable[..., Any]:
    """Give a call of the model that returns what ``read`` makes of the head's input."""

    def stop(module: nn.Module, inputs: Any, said: Any) -> None:
        raise _HeadRead(said)

    def work(forward: Callable[[], Any]) -> Any:
        linear = head.linear
        inside = head.calling(linear.forward)
        # our hook is the last one: an engine's have seen, and perhaps replaced, what is read
        handle = linear.register_forward_hook(stop)
        try:
            with replaced(linear, lambda hidden: read(inside, hidden)):
                forward()
        except _HeadRead as reached:
            return reached.said
        finally:
            handle.remove()
        raise AssertionError("the model did not call its vocabulary head")

    return partial(_from_inside, model, work)


def _from_inside(model: Any, work: Callable[[Callable[[], Any]], Any], **inputs: Any) -> Any:
    """Call the wrapped model; at its core do ``work``, given the core's own forward pass."""
    core = plain(model)
    forward = core.forward
    with replaced(core, lambda *args, **named: work(lambda: forward(*args, **named))):
        return model(**inputs)


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another ``forward`` inside the block; its hooks stay."""
    before = module.__dict__.get("forward")  # an instance's own, as Accelerate sets it
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def _leaving(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the hidden states that leave a module in the forward passes inside the block."""
    found: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        if isinstance(output, tuple):
            output = output[0]
        found.append(output if isinstance(output, Tensor) else output.last_hidden_state)

    handle = module.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()
