"""What of a model decides how much memory it takes, read off it without any weights.

The model is built on the meta device, where tensors have shapes but no memory. What a backward pass
keeps is counted there, tensor by tensor, in a forward pass: so it is right for every architecture,
for adapters and for frozen weights.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import AutoModelForCausalLM as CausalModel

from unlearn import models
from unlearn.activations import cut_after
from unlearn.head import plain
from unlearn.kinds import load_config
from unlearn.recipes.outcome import to_train
from unlearn.recipes.prepare import Prepared
from unlearn.recipes.train import choose_trained

PROBE_TOKENS = 64
"""Tokens of the forward pass that is counted; what is kept grows in proportion to them."""
COUNTED = "unlearn_counted"
EAGER = 8
"""Bytes that attention which is not fused keeps per pair of tokens: softmax in fp32, and copies."""
QUANTIZED = 0.55
"""Bytes per weight in nf4: half a byte, and its scales."""


@dataclass(frozen=True)
class Footprint:
    """Sizes of one model and of what is trained of it, in bytes unless they are counts.

    ``layer`` is the largest decoder layer, ``ends`` all weights outside of the layers (embeddings
    and head), ``head`` the head's own weights where they are trained. ``kept`` and ``checkpointed``
    are what the backward pass keeps per token, without and with gradient checkpointing, of a pass
    through the whole model (None) or up to a layer. On top come in each layer: ``packed`` per token
    where rows are laid end to end (``packs``: attention's output, twice), ``matrix`` per token and
    per token of its row where attention is not fused.
    """

    parameters: int
    trainable: int
    weights: float
    trained: int
    layer: int
    ends: int
    head: int
    layers: int
    vocabulary: int
    kept: Mapping[int | None, float]
    checkpointed: Mapping[int | None, float]
    packed: int
    packs: bool
    matrix: int

    @classmethod
    def of_trained(
        cls, model: Any, *, quantized: bool = False, read_layers: Collection[int] = ()
    ) -> "Footprint":
        """Do the same where an assistant is trained alone: only its part of the model is run."""
        inner = plain(model)
        if not getattr(inner, "alone", False):
            return cls.of(model, quantized=quantized, read_layers=read_layers)
        size, whole = cls.of(inner.decoder.assistant), list(model.parameters())
        return replace(size, parameters=_count(whole), weights=_bytes(whole))

    @classmethod
    def of(
        cls, model: Any, *, quantized: bool = False, read_layers: Collection[int] = ()
    ) -> "Footprint":
        """Read the sizes off a model on the meta device; terms read some of its layers."""
        config = plain(model).config.get_text_config()
        trained = [p for p in model.parameters() if p.requires_grad]
        frozen = [p for p in model.parameters() if not p.requires_grad]
        head = plain(model).get_output_embeddings()
        head = head.weight if head is not None and hasattr(head, "weight") else None
        layers = [_bytes(layer.parameters()) for layer in _layers(model)]
        at_rest = QUANTIZED * _count(frozen) if quantized else _bytes(frozen)
        return cls(
            parameters=_count(model.parameters()),
            trainable=_count(trained),
            weights=at_rest + _bytes(trained),
            trained=_bytes(trained),
            layer=max(layers, default=0),
            ends=_bytes(model.parameters()) - sum(layers),
            head=_bytes([head]) if head is not None and head.requires_grad else 0,
            layers=config.num_hidden_layers,
            vocabulary=config.vocab_size,
            kept=_kept(model, read_layers, checkpointing=False),
            checkpointed=_kept(model, read_layers, checkpointing=True),
            packed=_attended(config) * model.dtype.itemsize,
            packs=_packs(config),
            matrix=EAGER * config.num_attention_heads if _is_eager(config) else 0,
        )


def meta_model(prepared: Prepared) -> Any:
    """Build the model, with its adapters, without memory for weights."""
    source = prepared.source
    config = load_config(source)
    with torch.device("meta"):
        model = CausalModel.from_config(
            config,
            dtype=models.resolve_dtype(source.dtype),
            trust_remote_code=source.trust_remote_code,
        )
        choose_trained(prepared, model)
        return to_train(prepared, model)


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _layers(model: Any) -> list[nn.Module]:
    depth = plain(model).config.get_text_config().num_hidden_layers
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    return list(next(lists, []))


def _attended(config: Any) -> int:
    heads = config.num_attention_heads
    return int(heads * (getattr(config, "head_dim", None) or config.hidden_size // heads))


def _packs(config: Any) -> bool:
    """Tell whether the trainer will pack rows, as far as the configuration shows it."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return config._attn_implementation == "sdpa" and kinds == {"full_attention"}


def _is_eager(config: Any) -> bool:
    return bool(config._attn_implementation == "eager")


def _kept(
    model: Any, read_layers: Collection[int], *, checkpointing: bool
) -> dict[int | None, float]:
    found: dict[int | None, float] = {None: _kept_per_token(model, checkpointing=checkpointing)}
    for layer in read_layers:
        with cut_after(model, layer):
            found[layer] = _kept_per_token(model, checkpointing=checkpointing)
    return found


def _kept_per_token(model: Any, *, checkpointing: bool) -> float:
    """Count the bytes that the decoder's backward pass would keep for each token."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other takes its address
        return tensor

    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device="meta")
    decoder = plain(model).get_decoder()
    try:
        with (
            _counted(plain(model), checkpointing=checkpointing),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return _published(plain(model), checkpointing=checkpointing)
    return sum(storage.nbytes() for storage in kept.values()) / PROBE_TOKENS


def _published(model: Any, *, checkpointing: bool) -> float:
    """Give the published count, for models that cannot be called without weights.

    Korthikanti et al. 2022 (arXiv:2205.05198): per token and layer 17 hidden-sized values, when
    fused attention keeps no matrix; with checkpointing one.
    """
    config = model.config.get_text_config()
    values = 1 if checkpointing else 17
    return float(values * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize)


@contextmanager
def _counted(model: Any, *, checkpointing: bool) -> Iterator[None]:
    """Let this model be called on the meta device, in training mode, as it will be trained."""
    AttentionInterface.register(COUNTED, _attention)
    AttentionMaskInterface.register(COUNTED, lambda *arguments, **named: None)
    before, training = model.config._attn_implementation, model.training
    model.set_attn_implementation(COUNTED)
    model.train()
    try:
        with models.recomputed(model, on=checkpointing):
            yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)


class _Attention(torch.autograd.Function):
    """Keeps what fused attention keeps: queries, keys, values and the output. Computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, tokens, _ = query.shape
        output = query.new_empty(rows, tokens, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError("counted, never computed")


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **arguments: Any
) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value), None
