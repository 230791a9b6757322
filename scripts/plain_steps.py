"""The losses of a step as research code computes them: what ``bench_objectives.py`` compares with.

Every stream goes through the model by itself, padded to its longest row, and gives full logits, as
it does in the code that came with the papers and in open-unlearning. Where that code averages in
another way than we do (RMU over prompts and padding too), the mean is ours, so that both steps have
one value to agree on. ``reference`` is a deep copy of the whole model at its start. In one way this
is kinder than that code: there the model computes its own loss beside each of these.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

Batches = Mapping[str, Mapping[str, Tensor]]
PlainLoss = Callable[[Any, Any, Batches], Tensor]
"""The loss of a model, given its frozen copy and the rows of every stream."""


def npo(model: Any, reference: Any, batches: Batches, *, beta: float) -> Tensor:
    """Zhang et al. 2024, with NLL on the retain rows; the frozen copy reads the forget rows."""
    policy = _token_nll(model, batches["forget"]).sum(-1)
    with torch.no_grad():
        frozen = _token_nll(reference, batches["forget"]).sum(-1)
    forget = -2 / beta * logsigmoid(beta * (policy - frozen)).mean()
    return forget + _nll(model, batches["retain"])


def grad_diff(model: Any, reference: Any, batches: Batches) -> Tensor:
    """Ascent on the forget rows, descent on the retain rows; nothing asks the frozen copy."""
    return _nll(model, batches["retain"]) - _nll(model, batches["forget"])


def satimp(
    model: Any, reference: Any, batches: Batches, *, beta1: float, beta2: float, retain: float
) -> Tensor:
    """Yang et al. 2025, token by token; nothing asks the frozen copy."""
    losses = _token_nll(model, batches["forget"])
    known = (-losses).exp().detach()
    weighted = known**beta1 * (1 - known).clamp_min(0) ** beta2 * losses
    forget = -weighted.sum() / (batches["forget"]["labels"][:, 1:] != -100).sum()
    return forget + retain * _nll(model, batches["retain"])


def rmu(
    model: Any, reference: Any, batches: Batches, *, layer: int, steering: float, retain: float
) -> Tensor:
    """Li et al. 2024: a hook keeps what leaves the layer; the whole model runs three times."""
    width = model.config.hidden_size
    vector = torch.rand(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    control = (vector / vector.norm()).to(model.dtype) * steering
    pushed = _activations(model, batches["forget"], layer)
    held = _activations(model, batches["retain"], layer)
    with torch.no_grad():
        frozen = _activations(reference, batches["retain"], layer)
    forget = _labelled_mean((pushed - control).square().mean(-1), batches["forget"])
    return forget + retain * _labelled_mean((held - frozen).square().mean(-1), batches["retain"])


def _nll(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**_inputs(batch), labels=batch["labels"]).loss


def _token_nll(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Give minus the log-probability of every next token, 0 where it is not labelled."""
    logits = model(**_inputs(batch)).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view_as(labels)


def _activations(model: Any, batch: Mapping[str, Tensor], layer: int) -> Tensor:
    with _kept(model.model.layers[layer]) as found:
        model(**_inputs(batch))
    return found[0]


@contextmanager
def _kept(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def _labelled_mean(values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return values[batch["labels"] != -100].mean()
