"""Streams that go through the model one after another: less memory, the same gradient.

Losses of single streams need nothing for that. A loss of two streams, such as DPO's, is a function
of log-probabilities alone: a first pass without gradient finds its slope in each of them, and then
every stream goes back by itself along its slopes. That is exact, and costs one more forward pass.
Source of the idea: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under
Memory Limited Setup", arXiv:2101.06983, where the log-probabilities are embeddings.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unlearn.objectives import Said
from unlearn.scores import Scores
from unlearn.terms import Reads

Slopes = dict[Reads, Tensor]
"""Of each stream, the derivative of the loss in every log-probability."""


def slopes_of(
    loss: Callable[[Mapping[Reads, Said]], Tensor], policy: Mapping[Reads, Scores]
) -> tuple[Tensor, Slopes]:
    """Give a loss and its slopes at what a model says; nothing goes back into the model."""
    leaves = {
        at: replace(scores, log_probs=scores.log_probs.detach().requires_grad_())
        for at, scores in policy.items()
    }
    value = loss(leaves)
    inputs = [leaf.log_probs for leaf in leaves.values()]
    found = torch.autograd.grad(value, inputs, materialize_grads=True)
    return value.detach(), dict(zip(leaves, found, strict=True))


def along(policy: Mapping[Reads, Any], slopes: Mapping[Reads, Tensor]) -> Tensor:
    """Give a number with the gradient of the loss that has these slopes."""
    return torch.stack([(policy[at].log_probs * slopes[at]).sum() for at in policy]).sum()


@contextmanager
def same_dice_later() -> Iterator[None]:
    """Leave the random numbers as they were: what is drawn inside is drawn again after it."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield


@contextmanager
def more_to_come(accelerator: Any, model: Any, deepspeed: bool) -> Iterator[None]:
    """Keep gradients on this process: another pass of the same micro-batch follows."""
    state = accelerator.gradient_state
    if not state.sync_gradients:  # so it is between micro-batches of one step
        yield
        return
    state._set_sync_gradients(False)
    try:
        with nullcontext() if deepspeed else accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(True)
