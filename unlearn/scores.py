"""What a model says about a batch of sequences: how probable is each labelled token.

One forward pass of the body serves all rows; only labelled positions reach the vocabulary head, in
chunks. Everything downstream (objectives, metrics, detectors) is a function of :class:`Scores`.
"""

import inspect
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from unlearn.head import (
    TokenReadings,
    VocabularyHead,
    agrees_with_model,
    plain,
    upcast,
    vocabulary_statistics,
)
from unlearn.packing import Packing, is_packable, layout_forward, packed_forward
from unlearn.prefixes import TokenTree

IGNORE = -100


def label_mask(labels: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Mark position t when token t+1 is labelled; the last position predicts nothing."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORE
    return mask


@dataclass(frozen=True)
class Scores:
    """Log-probability of every labelled token, laid out by predicting position.

    ``log_probs[i, t]`` is log p(token t+1 | tokens 0..t) in nats, in fp32 (fp64 for fp64 models),
    and 0 where ``mask`` is false. ``attended`` marks real (not padding) positions. The rest is
    there only when asked for: ``logits``; ``correct`` (the label is the likeliest token); ``mean``
    and ``variance`` of the log-probability of a token drawn from the model itself (``statistics``,
    without gradient, 0 where not labelled).
    """

    log_probs: Float[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]
    attended: Bool[Tensor, "batch seq"]
    logits: Float[Tensor, "batch seq vocab"] | None = None
    correct: Bool[Tensor, "batch seq"] | None = None
    mean: Float[Tensor, "batch seq"] | None = None
    variance: Float[Tensor, "batch seq"] | None = None

    @classmethod
    def from_logits(
        cls,
        logits: Float[Tensor, "batch seq vocab"],
        labels: Int[Tensor, "batch seq"],
        attention_mask: Tensor | None = None,
        *,
        statistics: bool = False,
    ) -> "Scores":
        """Build scores from full logits and unshifted labels (-100 = not labelled)."""
        logits = upcast(logits)
        mask = label_mask(labels)
        targets = labels[:, 1:].clamp_min(0)
        chosen = logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
        log_probs = pad(chosen, (0, 1)).masked_fill(~mask, 0.0)
        hits = pad(logits[:, :-1].argmax(-1) == targets, (0, 1)) & mask
        attended = torch.ones_like(mask) if attention_mask is None else attention_mask.bool()
        scores = cls(log_probs, mask, attended, logits, hits)
        if not statistics:
            return scores
        mean, variance = vocabulary_statistics(logits.detach())
        return replace(
            scores,
            mean=mean.masked_fill(~mask, 0.0),
            variance=variance.masked_fill(~mask, 0.0),
        )

    @classmethod
    def from_log_probs(
        cls, log_probs: Float[Tensor, "batch seq"], batch: Mapping[str, Tensor]
    ) -> "Scores":
        """Build scores from stored token log-probs, for instance those of a cached reference."""
        return cls(log_probs, label_mask(batch["labels"]), batch["attention_mask"].bool())

    @property
    def sequence(self) -> Float[Tensor, " batch"]:
        """Give log p(labelled tokens) of each row: a sum over tokens, in nats."""
        return self.log_probs.sum(-1)

    @property
    def num_tokens(self) -> Int[Tensor, " batch"]:
        """Give the number of labelled tokens of each row."""
        return self.mask.sum(-1)

    def detach(self) -> "Scores":
        """Give the same scores without gradient and without logits."""
        return replace(self, log_probs=self.log_probs.detach(), logits=None)


@dataclass(frozen=True)
class Scorer:
    """How to obtain :class:`Scores` from a model: through its head in chunks, or from full logits.

    ``head`` is None for a model whose logits we cannot reproduce; then full logits are used.
    """

    head: VocabularyHead | None

    @classmethod
    def for_model(cls, model: Any, *, check: bool = True) -> "Scorer":
        """Find the head and compare it with the model's own logits on two rows.

        When they differ, warn and fall back to full logits: right, but memory-hungry.
        """
        head = VocabularyHead.of(model)
        if head is None or "logits_to_keep" not in _forward_parameters(model):
            reason = "it has no vocabulary head that can be called apart"
        elif check and not _self_check(head, model):
            reason = "its logits are not those of its vocabulary head (an unknown transformation)"
        else:
            return cls(head)
        name = type(plain(model)).__name__
        warnings.warn(f"{name}: full logits are used, because {reason}", stacklevel=2)
        return cls(None)

    def __call__(
        self, model: Any, batch: Mapping[str, Tensor], *, want: Collection[str] = ()
    ) -> Scores:
        """Score one right-padded batch; ``want``: ``logits``, ``correct``, ``statistics``."""
        return self.streams(model, {"": batch}, want={"": want})[""]

    def streams(
        self,
        model: Any,
        batches: Mapping[str, Mapping[str, Tensor]],
        *,
        want: Mapping[str, Collection[str]],
    ) -> dict[str, Scores]:
        """Score several streams in one forward pass, then split."""
        joined, widths = join_streams([batch["input_ids"] for batch in batches.values()], 0)
        if self.head is None:
            parts = _full_logits(model, joined)
        else:
            attention, _ = join_streams([batch["attention_mask"] for batch in batches.values()], 0)
            parts = hidden_states(model, joined, attention.bool())
        rows = parts.split([len(batch["input_ids"]) for batch in batches.values()])
        return {
            name: self._stream(part[:, :width], batch, want.get(name, ()))
            for (name, batch), part, width in zip(batches.items(), rows, widths, strict=True)
        }

    @torch.no_grad()
    def tree(
        self,
        model: Any,
        tree: TokenTree,
        predicting: Int[Tensor, " reading"],
        targets: Int[Tensor, " reading"],
        *,
        want: Collection[str] = (),
    ) -> TokenReadings:
        """Read target tokens from the tree's tokens that stand before them, without gradient.

        Only inside :func:`unlearn.packing.packable`, and only with a head.
        """
        assert self.head is not None
        with _leaving(plain(model).get_decoder()) as found:
            layout_forward(model, tree.ids, tree, logits_to_keep=1)
        return self.head.read(found[0][0, predicting], targets, want=want)

    def _stream(self, part: Tensor, batch: Mapping[str, Tensor], want: Collection[str]) -> Scores:
        labels, attention = batch["labels"], batch["attention_mask"]
        if self.head is None or "logits" in want:
            logits = part if self.head is None else self.head.logits(part)
            full = Scores.from_logits(logits, labels, attention, statistics="statistics" in want)
            return full if "logits" in want else replace(full, logits=None)
        mask = label_mask(labels)
        readings = self.head.read(part[mask], labels.roll(-1, 1)[mask], want=want)
        found = {
            name: torch.zeros_like(mask, dtype=values.dtype).masked_scatter(mask, values)
            for name, values in vars(readings).items()
            if values is not None
        }
        return Scores(mask=mask, attended=attention.bool(), **found)


def join_streams(tensors: list[Tensor], fill: int) -> tuple[Tensor, list[int]]:
    """Stack right-padded tensors of different width."""
    widths = [tensor.shape[1] for tensor in tensors]
    longest = max(widths)
    padded = [pad(tensor, (0, longest - tensor.shape[1]), value=fill) for tensor in tensors]
    return torch.cat(padded), widths


def hidden_states(model: Any, input_ids: Tensor, attended: Tensor, module: Any = None) -> Tensor:
    """Give the hidden states [batch, seq, width] that leave a module, else the whole body.

    The wrapped model itself is called, so that engines see the forward pass they hook into. With
    right padding and causal attention no attention mask is needed: padding comes after every real
    position and cannot be seen from it. Inside :func:`unlearn.packing.packable` padding is left out
    altogether.
    """
    with _leaving(module or plain(model).get_decoder()) as found:
        if is_packable(plain(model)) and not attended.all():
            packing = Packing.of(attended)
            packed_forward(model, input_ids, packing, logits_to_keep=1)
            return packing.unpack(found[0])
        model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
        return found[0]


@contextmanager
def _leaving(module: Any) -> Iterator[list[Tensor]]:
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


def _full_logits(model: Any, input_ids: Tensor) -> Tensor:
    return upcast(model(input_ids=input_ids, use_cache=False).logits)


def _forward_parameters(model: Any) -> Collection[str]:
    return inspect.signature(plain(model).forward).parameters


@torch.no_grad()
def _self_check(head: VocabularyHead, model: Any) -> bool:
    base = plain(model)
    device = base.get_input_embeddings().weight.device
    size = min(head.vocabulary, base.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(size, (2, 12), generator=generator).to(device)
    training = model.training
    model.eval()
    try:
        hidden = hidden_states(model, probe, torch.ones_like(probe, dtype=torch.bool))
        return agrees_with_model(head, model, hidden, _full_logits(model, probe))
    finally:
        model.train(training)
