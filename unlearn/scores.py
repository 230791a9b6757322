"""What a model says about a batch of sequences: how probable is each labelled token.

One forward pass of the body serves all rows; only labelled positions reach the vocabulary head, in
chunks. Everything downstream (objectives, metrics, detectors) is a function of :class:`Scores`.
"""

import inspect
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from unlearn.forward import read_head, read_layout
from unlearn.head import (
    TokenReadings,
    VocabularyHead,
    plain,
    read_logits,
    same_log_probs,
    upcast,
    vocabulary_statistics,
)
from unlearn.prefixes import TokenTree
from unlearn.thinning import Thinning, last_feed_forward

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
    there only when asked for: ``logits``, or ``labelled`` (the logits at labelled positions alone,
    row by row; :attr:`distributions` gives them from either); ``correct`` (the label is the
    likeliest token); ``mean`` and ``variance`` of the log-probability of a token drawn from the
    model itself, and ``top``, that of the likeliest token (``statistics``, without gradient, 0
    where not labelled).

    What the rows themselves say travels along: ``next_tokens[i, t]`` is token t+1 (-100 where there
    is none, or where only labels were given and it is not labelled), and ``important`` marks
    labelled tokens that the data's ``important`` column names (None: no such column).
    """

    log_probs: Float[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]
    attended: Bool[Tensor, "batch seq"]
    logits: Float[Tensor, "batch seq vocab"] | None = None
    correct: Bool[Tensor, "batch seq"] | None = None
    mean: Float[Tensor, "batch seq"] | None = None
    variance: Float[Tensor, "batch seq"] | None = None
    top: Float[Tensor, "batch seq"] | None = None
    labelled: Float[Tensor, "label vocab"] | None = None
    next_tokens: Int[Tensor, "batch seq"] | None = None
    important: Bool[Tensor, "batch seq"] | None = None

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
        scores = cls(log_probs, mask, attended, logits, hits, next_tokens=_shifted(labels))
        if not statistics:
            return scores
        found = vars(vocabulary_statistics(logits.detach()))
        return replace(scores, **{name: v.masked_fill(~mask, 0.0) for name, v in found.items()})

    @classmethod
    def from_log_probs(
        cls, log_probs: Float[Tensor, "batch seq"], batch: Mapping[str, Tensor]
    ) -> "Scores":
        """Build scores from stored token log-probs, for instance those of a cached reference."""
        mask, attended = label_mask(batch["labels"]), batch["attention_mask"].bool()
        return cls(log_probs, mask, attended, **_of_rows(batch))

    @property
    def sequence(self) -> Float[Tensor, " batch"]:
        """Give log p(labelled tokens) of each row: a sum over tokens, in nats."""
        return self.log_probs.sum(-1)

    @property
    def num_tokens(self) -> Int[Tensor, " batch"]:
        """Give the number of labelled tokens of each row."""
        return self.mask.sum(-1)

    @property
    def distributions(self) -> Float[Tensor, "label vocab"]:
        """Give the logits at labelled positions, row by row; they must have been asked for."""
        if self.labelled is not None:
            return self.labelled
        assert self.logits is not None
        return self.logits[self.mask]

    def laid_out(self, values: Float[Tensor, " label"]) -> Float[Tensor, "batch seq"]:
        """Put one value per labelled position in its place; 0 elsewhere."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)

    def detach(self) -> "Scores":
        """Give the same scores without gradient and without logits."""
        return replace(self, log_probs=self.log_probs.detach(), logits=None, labelled=None)


@dataclass(frozen=True)
class Scorer:
    """How to obtain :class:`Scores` from a model: through its head in chunks, or from full logits.

    ``head`` is None for a model whose logits we cannot reproduce; then full logits are used.
    ``last_block`` is the part of the last layer that may skip positions which are not read.
    """

    head: VocabularyHead | None
    last_block: nn.Module | None = None

    @classmethod
    def for_model(cls, model: Any, *, check: bool = True) -> "Scorer":
        """Find the head and compare it with the model's own logits on two rows.

        When they differ, warn and fall back to full logits: right, but memory-hungry. Without
        ``check`` the head is taken as it is, and no layer skips positions.
        """
        head = VocabularyHead.of(model)
        if head is None or "logits_to_keep" not in _forward_parameters(model):
            reason = "it has no vocabulary head that can be called apart"
        elif not check:
            return cls(head)
        elif found := _checked(head, model):
            return found
        else:
            reason = "its logits are not those of its vocabulary head (an unknown transformation)"
        name = type(plain(model)).__name__
        warnings.warn(f"{name}: full logits are used, because {reason}", stacklevel=2)
        return cls(None)

    def __call__(
        self, model: Any, batch: Mapping[str, Tensor], *, want: Collection[str] = ()
    ) -> Scores:
        """Score one right-padded batch.

        ``want``: ``logits``, ``labelled`` (logits at labelled positions), ``correct``,
        ``statistics``.
        """
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
        sizes = [len(batch["input_ids"]) for batch in batches.values()]

        def parts(whole: Tensor) -> dict[str, Tensor]:
            rows = zip(batches, whole.split(sizes), widths, strict=True)
            return {name: part[:, :width] for name, part, width in rows}

        if self.head is None:
            found = {
                name: {"logits": part} for name, part in parts(_full_logits(model, joined)).items()
            }
        else:
            attention, _ = join_streams([batch["attention_mask"] for batch in batches.values()], 0)

            def read(head: VocabularyHead, hidden: Tensor) -> dict[str, dict[str, Tensor]]:
                return {
                    name: _read(head, part, batches[name]["labels"], want.get(name, ()))
                    for name, part in parts(hidden).items()
                }

            thinning = self._thinning(batches, want)
            found = read_head(model, self.head, read, joined, attention.bool(), thinning)
        return {
            name: _laid_out(found[name], batch, want.get(name, ()))
            for name, batch in batches.items()
        }

    def _thinning(
        self,
        batches: Mapping[str, Mapping[str, Tensor]],
        want: Mapping[str, Collection[str]],
    ) -> Thinning | None:
        if self.last_block is None or any("logits" in want.get(name, ()) for name in batches):
            return None
        labels, _ = join_streams([batch["labels"] for batch in batches.values()], IGNORE)
        return Thinning(self.last_block, label_mask(labels))

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

        def read(head: VocabularyHead, hidden: Tensor) -> dict[str, Tensor]:
            return _said(head.read(hidden[0, predicting], targets, want=want))

        return TokenReadings(**read_layout(model, self.head, read, tree.ids, tree))


def _read(
    head: VocabularyHead, hidden: Tensor, labels: Tensor, want: Collection[str]
) -> dict[str, Tensor]:
    """Read one stream's hidden states: full logits if asked for, else labelled positions alone."""
    if "logits" in want:
        return {"logits": head.logits(hidden)}
    mask = label_mask(labels)
    targets = labels.roll(-1, 1)[mask]
    if "labelled" in want:
        logits = head.logits(hidden[mask])
        return read_logits(logits, targets, want) | {"labelled": logits}
    return _said(head.read(hidden[mask], targets, want=want))


def _said(readings: TokenReadings) -> dict[str, Tensor]:
    return {name: values for name, values in vars(readings).items() if values is not None}


def _laid_out(
    found: Mapping[str, Tensor], batch: Mapping[str, Tensor], want: Collection[str]
) -> Scores:
    labels, attention = batch["labels"], batch["attention_mask"]
    if "logits" in found:
        statistics = "statistics" in want
        full = Scores.from_logits(found["logits"], labels, attention, statistics=statistics)
        full = replace(full, **_of_rows(batch))
        if "labelled" in want:
            full = replace(full, labelled=full.distributions)
        return full if "logits" in want else replace(full, logits=None)
    mask = label_mask(labels)
    columns = {
        name: torch.zeros_like(mask, dtype=values.dtype).masked_scatter(mask, values)
        for name, values in found.items()
        if name != "labelled"
    }
    kept = {name: found[name] for name in ("labelled",) if name in found}
    return Scores(mask=mask, attended=attention.bool(), **columns, **kept, **_of_rows(batch))


def _of_rows(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give what the rows themselves say, laid out by predicting position."""
    real = batch["attention_mask"].bool()
    found = {"next_tokens": _shifted(batch["input_ids"].masked_fill(~real, IGNORE))}
    if "important" in batch:
        found["important"] = pad(batch["important"][:, 1:], (0, 1)) & label_mask(batch["labels"])
    return found


def _shifted(tokens: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    return pad(tokens[:, 1:], (0, 1), value=IGNORE)


def join_streams(tensors: list[Tensor], fill: int) -> tuple[Tensor, list[int]]:
    """Stack right-padded tensors of different width."""
    widths = [tensor.shape[1] for tensor in tensors]
    longest = max(widths)
    padded = [pad(tensor, (0, longest - tensor.shape[1]), value=fill) for tensor in tensors]
    return torch.cat(padded), widths


def _full_logits(model: Any, input_ids: Tensor) -> Tensor:
    return upcast(model(input_ids=input_ids, use_cache=False).logits)


def _forward_parameters(model: Any) -> Collection[str]:
    return inspect.signature(plain(model).forward).parameters


@torch.no_grad()
def _checked(head: VocabularyHead, model: Any) -> Scorer | None:
    """Give the scorer whose logits are the model's own, skipping positions where that holds too."""
    base = plain(model)
    device = base.get_input_embeddings().weight.device
    size = min(head.vocabulary, base.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(size, (2, 12), generator=generator).to(device)
    training = model.training
    model.eval()
    try:
        every = torch.ones_like(probe, dtype=torch.bool)
        theirs = _full_logits(model, probe)

        def same(read: Tensor, thinning: Thinning | None = None) -> bool:
            ours = read_head(model, head, VocabularyHead.logits, probe, every, thinning)
            return same_log_probs(ours[read], theirs[read], base)

        if not same(every):
            return None
        block, third = last_feed_forward(model), torch.arange(12, device=device) % 3 == 1
        skips = block is not None and same(every & third, Thinning(block, every & third))
        return Scorer(head, block if skips else None)
    finally:
        model.train(training)
