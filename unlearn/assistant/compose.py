"""A base model and an assistant beside it, as one causal language model.

Both read the same tokens; their hidden states are laid next to each other, and the vocabulary head
turns them into one set of logits by one of the :mod:`unlearn.assistant.rules`. To everything else
this is an ordinary model: it is scored through its head in chunks, it is packed, it writes with
transformers' ``generate`` or any other loop over a key-value cache.

**Scoring or writing.** Some rules differ between the two. ``forward(writing=...)`` says which it
is; left out, a call that keeps keys and values (``use_cache=True``) is writing, and any other one
is scoring. ``generate`` always says ``writing=True``.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from unlearn.assistant.rules import RULES, asks, settings
from unlearn.head import VocabularyHead, plain

AFTER_THE_HEAD = ("logit_scale", "logits_scaling", "final_logit_softcapping")
"""What a configuration says is done to logits; here each model's own head does it."""


class Decoders(nn.Module):
    """The models side by side, without their heads: ``base``, ``assistant`` and perhaps ``start``.

    All keys and values lie in one cache, the base's layers first: whatever is done to it (rows that
    leave, beams that change places) reaches every model. ``alone``: only the assistant runs.
    """

    def __init__(self, base: Any, assistant: Any, start: Any | None = None) -> None:
        super().__init__()
        self.base = base
        self.assistant = assistant
        self.start = start
        self.alone = False

    @property
    def models(self) -> list[Any]:
        """List all models, in the order of their hidden states."""
        return [model for model in (self.base, self.assistant, self.start) if model is not None]

    @property
    def depths(self) -> list[int]:
        """Give the number of layers of each model."""
        return [model.config.get_text_config().num_hidden_layers for model in self.models]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **arguments: Any,
    ) -> BaseModelOutputWithPast:
        """Give the hidden states of all models, one after the other in the last dimension."""
        caches = self._caches(past_key_values)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = _positions(attention_mask, input_ids.shape[1])
        hidden = [
            model.get_decoder()(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=bool(use_cache),
                **arguments,
            ).last_hidden_state
            for model, cache in zip(self.models, caches, strict=True)
            if not self.alone or model is self.assistant
        ]
        return BaseModelOutputWithPast(torch.cat(hidden, dim=-1), past_key_values)

    def _caches(self, cache: Cache | None) -> Iterator[Cache | None]:
        """Give each model its own layers of the one cache."""
        if cache is not None:
            missing = sum(self.depths) - len(cache.layers)
            cache.layers.extend(DynamicLayer() for _ in range(missing))
        first = 0
        for depth in self.depths:
            yield None if cache is None else Cache(layers=cache.layers[first : first + depth])
            first += depth


def _positions(attention_mask: Tensor, length: int) -> Tensor:
    """Count real tokens: padding on the left moves no token away from its place."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -length:]


class CombinedHead(nn.Module):
    """The vocabulary heads of the models and the rule that makes one set of logits of theirs.

    The heads belong to the models: this module holds no weights of its own.
    """

    def __init__(self, decoders: Decoders, rule: str, hyper: Mapping[str, float]) -> None:
        super().__init__()
        found = [VocabularyHead.of(model) for model in decoders.models]
        assert all(head is not None for head in found)  # build.require_head
        self.heads = tuple(head for head in found if head is not None)
        self.rule = rule
        self.hyper = dict(hyper)
        self.alone = False

    @property
    def weight(self) -> Tensor:
        """Give the base's head: its rows are the vocabulary."""
        weight: Tensor = self.heads[0].linear.weight  # type: ignore[assignment]
        return weight

    def forward(self, hidden: Tensor, writing: bool = False) -> Tensor:
        """Give logits in fp32 (fp64 for fp64 models) of hidden states [*positions, widths]."""
        if self.alone:
            return self.heads[1].logits(hidden)
        parts = hidden.chunk(len(self.heads), dim=-1)  # the models are equally wide
        logits = [head.logits(part) for head, part in zip(self.heads, parts, strict=True)]
        named = {"writing": writing} if asks(self.rule, "writing") else {}
        return RULES[self.rule](*logits, **self.hyper, **named)


class AssistedForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose logits are those of a base, changed by an assistant.

    Build it with :func:`unlearn.assistant.build.assisted` or load it with
    :func:`unlearn.assistant.artefact.load_composed`. It cannot become one set of weights: the
    combination is not linear.
    """

    config: Any
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    writes_as_it_scores = False
    """Whether the likeliest token while scoring is the one that greedy writing chooses."""

    def __init__(
        self, base: Any, assistant: Any, start: Any | None, rule: str, hyper: Mapping[str, float]
    ) -> None:
        decoders, hyper = Decoders(base, assistant, start), settings(rule, hyper)
        super().__init__(_config(base, decoders.depths, {"combine": rule, **hyper}))
        self.decoder = decoders
        self.head = CombinedHead(decoders, rule, hyper)
        self.generation_config = copy.deepcopy(base.generation_config)
        self.writes_as_it_scores = not asks(rule, "writing") or hyper["weight"] == 0
        self.train(base.training)

    @property
    def alone(self) -> bool:
        """Whether the assistant alone answers, as while it is trained on its own logits."""
        return self.decoder.alone

    @alone.setter
    def alone(self, value: bool) -> None:
        self.decoder.alone = self.head.alone = value

    def get_input_embeddings(self) -> nn.Module:
        """Give the embeddings of the base, which the assistant shares."""
        return self.decoder.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Give the combined head."""
        return self.head

    def set_attn_implementation(self, attn_implementation: Any, **how: Any) -> None:
        """Set it in all models."""
        for model in self.decoder.models:
            model.set_attn_implementation(attn_implementation, **how)
        implementation = self.decoder.base.config._attn_implementation
        self.config._attn_implementation_internal = implementation

    def forward(  # noqa: PLR0913 - what callers of a causal language model give
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        labels: Tensor | None = None,
        writing: bool | None = None,
        **arguments: Any,
    ) -> CausalLMOutputWithPast:
        """Give the combined logits; see the module for ``writing``."""
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        said = self.decoder(
            input_ids, attention_mask, position_ids, past_key_values, use_cache, **arguments
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = said.last_hidden_state[:, kept]
        chosen = bool(use_cache) if writing is None else writing
        # without the keyword when scoring: a scorer that reads the head takes hidden states alone
        logits = self.head(hidden, writing=True) if chosen else self.head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.head.weight.shape[0])
        return CausalLMOutputWithPast(loss, logits, said.past_key_values)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Say that the next token is about to be chosen."""
        return super().prepare_inputs_for_generation(input_ids, **kwargs) | {"writing": True}

    def save_pretrained(self, save_directory: Any, **how: Any) -> None:
        """Refuse: only base and assistant together mean something.

        Raises:
            TypeError: always.
        """
        message = "save it with unlearn.assistant.artefact.save_composed"
        raise TypeError(f"a base with an assistant is not one set of weights: {message}")


@contextmanager
def together(model: Any) -> Iterator[Any]:
    """Let base and assistant answer together inside the block, also while the latter is trained."""
    inner = plain(model)
    alone, inner.alone = inner.alone, False
    try:
        yield model
    finally:
        inner.alone = alone


def _config(base: Any, depths: list[int], composition: dict[str, Any]) -> Any:
    """Describe the composition by the base's configuration: vocabulary, positions, layers to cache.

    What the combination depends on is part of it, so that stored results tell two of them apart.
    """
    config = copy.deepcopy(base.config)
    text = config.get_text_config()
    text.num_hidden_layers = sum(depths)
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = [kind for depth in depths for kind in kinds[:depth]]
    for name in AFTER_THE_HEAD:
        if getattr(text, name, None) is not None:
            setattr(text, name, None)
    config.architectures = [AssistedForCausalLM.__name__]
    config.composition = {**composition, "depths": depths}
    return config
