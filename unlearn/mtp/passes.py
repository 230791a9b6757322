"""The two passes of training: the frozen text once, then the masks alone, over what it left.

An ordinary token never sees a mask or the LoRA, so nothing of the first pass needs a gradient: its
keys, values and hidden states are constants of the second. The gradients are those of one pass
over text and masks together, for the memory of the masks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from unlearn.errors import UserError
from unlearn.models import recomputed
from unlearn.mtp.cache import frozen, preallocated
from unlearn.mtp.layout import IGNORED, Blocks
from unlearn.mtp.losses import (
    cross_entropy,
    latent_consistency,
    likeliest,
    own_previous,
    soft_cross_entropy,
)
from unlearn.mtp.predictor import MaskPredictor
from unlearn.mtp.settings import TrainSettings

READS = "_can_checkpoint_with_cache"
"""What a layer of transformers says that does not write to the cache."""


@dataclass(frozen=True)
class Sums:
    """Sums over the masks of a sequence: of the three losses, and of drafts that were right."""

    base: Float[Tensor, ""]
    sampler: Float[Tensor, ""]
    lcm: Float[Tensor, ""]
    right: Int[Tensor, ""]


@dataclass(frozen=True)
class Text:
    """A text that the frozen model has read: hidden states after the final norm, and a cache."""

    ids: Int[Tensor, " token"]
    hidden: Float[Tensor, "token width"]
    cache: Any


@torch.no_grad()
def read_text(predictor: MaskPredictor, ids: Int[Tensor, " token"]) -> Text:
    """Read a text with the frozen model; what it gives can only be read."""
    cache = preallocated(predictor.model, len(ids))
    positions = torch.arange(len(ids), device=ids.device)
    hidden = predictor.read(predictor.embed(ids), positions, None, cache)
    return Text(ids, hidden, frozen(cache))


def read_masks(
    predictor: MaskPredictor, blocks: Blocks, cache: Any
) -> Float[Tensor, "anchor k width"]:
    """Read the masks of all blocks after a text; the gate must be open for all of them."""
    number = len(blocks.anchors)
    masks = predictor.masks[: blocks.k].to(predictor.dtype).repeat(number, 1)
    hidden = predictor.read(masks, blocks.positions.flatten(), blocks.visible(), cache)
    return hidden.view(number, blocks.k, -1)


def losses_of(
    predictor: MaskPredictor,
    settings: TrainSettings,
    text: Text,
    blocks: Blocks,
    ntp: Int[Tensor, " ntp"],
) -> Sums:
    """Read the masks on a text and give their losses; the gate must be open for all of them.

    ``ntp``: positions of the text at which the sampler is trained too.
    """
    hidden = read_masks(predictor, blocks, text.cache)
    head, sampler, teaching = predictor.head, predictor.sampler, Teaching(predictor, settings)
    previous = blocks.previous
    if settings.previous == "own" and sampler is not None:
        previous = own_previous(predictor, hidden, previous[:, 0])
    pairs = blocks.pairs.flatten()
    states, before = hidden.flatten(0, 1)[pairs], previous.flatten()[pairs]
    labels = blocks.labels.flatten()[pairs]
    anchors = text.hidden[blocks.counterpart.flatten()[pairs]]
    base = sampled = lcm = states.new_zeros((), dtype=torch.float32)
    last = states
    if settings.base_weight:
        base = teaching.loss(states, anchors, labels)
    if sampler is not None and settings.sampler_weight:
        last = sampler(predictor.embed(before), states)
        sampled = teaching.loss(last, anchors, labels)
        if len(ntp):
            states = text.hidden[ntp]
            sampled = sampled + teaching.loss(
                sampler(predictor.embed(text.ids[ntp]), states), states, text.ids[ntp + 1]
            )
    if settings.lcm_weight:
        lcm = latent_consistency(hidden.flatten(0, 1)[pairs], anchors, settings.lcm_reduction).sum()
    right = (likeliest(head, last) == likeliest(head, anchors)).sum()
    return Sums(base, sampled, lcm, right)


@dataclass(frozen=True)
class Teaching:
    """What hidden states are to say: a label, the base's choice, or all that the base says."""

    predictor: MaskPredictor
    settings: TrainSettings

    def loss(
        self,
        hidden: Float[Tensor, "mask width"],
        anchors: Float[Tensor, "mask width"],
        labels: Int[Tensor, " mask"],
    ) -> Float[Tensor, ""]:
        """Give the summed cross-entropy, in nats."""
        head = self.predictor.head
        if self.settings.labels == "soft":
            return soft_cross_entropy(head, hidden, anchors).sum()
        if self.settings.labels == "self":
            labels = likeliest(head, anchors)
        return cross_entropy(head, hidden, labels).sum()


def learnt(labels: Int[Tensor, " token"]) -> Int[Tensor, " position"]:
    """Give the ordinary positions whose next token is to be learnt."""
    return (labels[1:] != IGNORED).nonzero()[:, 0]


@contextmanager
def recomputing(predictor: MaskPredictor, *, on: bool) -> Iterator[None]:
    """Compute activations again in backward passes inside the block, with the cache they had.

    Only layers in training mode do so, hence they are put into it (what is inside them is not:
    no dropout). transformers would take the cache away from them, and with it the text, unless
    they say that they only read it.

    Raises:
        UserError: this version of transformers, or this model, cannot do so.
    """
    layers = [
        one for one in predictor.model.modules() if isinstance(one, GradientCheckpointingLayer)
    ]
    if not on:
        yield
        return
    if not layers or not hasattr(GradientCheckpointingLayer, READS):
        name = type(predictor.model).__name__
        message = f"activations of {name} cannot be computed again with a cache in use"
        raise UserError(message, "update transformers, or leave gradient_checkpointing out")
    modes = [one.training for one in layers]
    with recomputed(predictor.model):
        for layer in layers:
            layer.training = True
            setattr(layer, READS, True)
        try:
            yield
        finally:
            for layer, mode in zip(layers, modes, strict=True):
                layer.training = mode
                delattr(layer, READS)
