"""The assistant: the lower layers of the base with adapters on them, and nothing copied."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from unlearn import models
from unlearn.activations import cut_after
from unlearn.assistant.compose import AssistedForCausalLM
from unlearn.assistant.rules import RULES, asks
from unlearn.errors import UserError, unknown
from unlearn.head import VocabularyHead, plain


@dataclass(frozen=True)
class Assistant:
    """How an assistant is built and combined with its base.

    ``layers`` counts the base's lowest decoder layers (None: all). ``combine`` names one of the
    :data:`~unlearn.assistant.rules.RULES`, ``hyper`` holds what it takes.
    """

    layers: int | None = 8
    combine: str = "subtract"
    hyper: Mapping[str, float] = field(default_factory=dict)


def assisted(base: Any, assistant: Assistant, lora: models.Lora) -> Any:
    """Put an assistant beside a base: a composition whose only trainable weights are adapters.

    The assistant is the base's first layers with its embedding, final norm and head. All of these
    are the base's own tensors, frozen; adapters go onto every linear layer of the layers, or onto
    those that ``lora.targets`` names, and not onto the head.
    Source: Ji et al. 2024, ULD, arXiv:2406.08607, section 4 (8 layers, rank 32).

    Raises:
        UserError: more layers than the base has, an unknown rule, or a base that cannot be cut.
    """
    composed = compose(base, assistant)
    targets = _targets(composed.decoder.assistant, lora)
    names = tuple(f"decoder.assistant.{name}" for name in targets)
    return models.add_lora(composed, models.Lora(lora.rank, lora.alpha, lora.dropout, names))


def compose(base: Any, assistant: Assistant) -> AssistedForCausalLM:
    """Put the base's own lower layers beside it, without adapters yet; freezes the base."""
    if assistant.combine not in RULES:
        raise unknown("rule", assistant.combine, RULES)
    require_head(base)
    base.requires_grad_(False)
    part = lower_part(base, assistant.layers)
    start = lower_part(base, assistant.layers) if asks(assistant.combine, "start") else None
    return AssistedForCausalLM(base, part, start, assistant.combine, assistant.hyper)


def lower_part(base: Any, layers: int | None) -> Any:
    """Give a model of the first layers; its weights are those of the base, not copies.

    Raises:
        UserError: the base has fewer layers, or they are not found.
    """
    depth = base.config.get_text_config().num_hidden_layers
    count = depth if layers is None else layers
    if not 1 <= count <= depth:
        raise UserError(
            f"assistant.layers={count} given, but the model has {depth} layers",
            f"give 1 to {depth}; a quarter of them is usual",
        )
    shared = {id(tensor): tensor for tensor in base.parameters()}
    with cut_after(base, count - 1):
        part = copy.deepcopy(base, shared)
    text = part.config.get_text_config()
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    return part


def require_head(base: Any) -> None:
    """Refuse a model that cannot be put beside another one.

    Raises:
        UserError: it has adapters, is itself a composition, or its head cannot be found.
    """
    if base is not plain(base) or getattr(base, "peft_config", None):
        raise UserError(
            "an assistant needs a plain base, and this one has adapters",
            "merge them first: model.merge_and_unload(), then save_pretrained",
        )
    if isinstance(base, AssistedForCausalLM):
        raise UserError("an assistant needs a plain base, and this one has an assistant already")
    if VocabularyHead.of(base) is None:
        raise UserError(f"{type(base).__name__} has no vocabulary head that can be called apart")


def _targets(part: Any, lora: models.Lora) -> list[str]:
    """Name the linear layers of the assistant that get adapters."""
    head = part.get_output_embeddings()
    linear = {
        name: module
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    if lora.targets == "all-linear":
        return list(linear)
    wanted = [lora.targets] if isinstance(lora.targets, str) else list(lora.targets)
    for name in wanted:
        if not any(f".{found}".endswith(f".{name}") for found in linear):
            leaves = sorted({found.rsplit(".", 1)[-1] for found in linear})
            raise unknown("LoRA target of the assistant:", name, leaves)
    return [n for n in linear if any(f".{n}".endswith(f".{name}") for name in wanted)]
