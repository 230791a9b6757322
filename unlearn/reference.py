"""What the frozen starting model says: computed once and stored, or asked live.

The forget and retain sets are finite and fixed, so the reference's token log-probabilities are
computed before training and kept on disk under a hash of weights and tokenised rows; no second
model stays in memory. Objectives over whole distributions ask live: with adapters switched off, or
with a frozen copy.
"""

import contextlib
import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from unlearn.activations import Activations, read_layer
from unlearn.data.collate import batches_by_length, pad
from unlearn.data.encode import Example
from unlearn.ranks import Ranks
from unlearn.runs import write_atomic
from unlearn.scores import Scorer, Scores, label_mask
from unlearn.scoring import evaluation_mode, scored

LAYOUT = 1
"""Raise when the meaning of the stored numbers changes."""

NORM_TOKENS = 2048
"""Padded tokens in one forward pass of :func:`mean_token_norm`."""

Progress = Callable[[int, int], None]


def score_rows(
    scorer: Scorer,
    model: Any,
    examples: Sequence[Example],
    *,
    pad_id: int = 0,
    batch_tokens: int = 8192,
    progress: Progress = lambda done, total: None,
) -> list[Tensor]:
    """Give each row's token log-probs (nats), [seq], 0 where not labelled, in fp32 on the CPU."""
    found: list[Tensor] = [torch.empty(0)] * len(examples)
    done = 0
    for places, scores in scored(
        model, examples, scorer=scorer, pad_id=pad_id, batch_tokens=batch_tokens
    ):
        for place, log_probs, mask in zip(places, scores.log_probs, scores.mask, strict=True):
            labelled = label_mask(torch.tensor([examples[place].labels]))[0]
            row = torch.zeros(len(labelled), dtype=log_probs.dtype)
            found[place] = row.masked_scatter(labelled, log_probs[mask])
        done += len(places)
        progress(done, len(examples))
    return found


def cache_key(weights_hash: str, examples: Sequence[Example], architecture: str) -> str:
    """Hash everything the numbers depend on: layout, weights, tokens, labels and architecture.

    ``architecture`` says what the weights alone do not: rotary base, scalings, precision.
    """
    rows = json.dumps([[example.input_ids, example.labels] for example in examples])
    parts = (str(LAYOUT), weights_hash, architecture, rows)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def stored_rows(
    scorer: Scorer,
    model: Any,
    examples: Sequence[Example],
    *,
    weights_hash: str,
    folder: Path,
    **scoring: Any,
) -> list[Tensor]:
    """Read these rows from the cache folder, or score them (:func:`score_rows`) and store.

    A damaged cache file is computed again; a folder that cannot be written costs only a warning.
    """
    key = cache_key(weights_hash, examples, f"{model.dtype} {model.config.to_json_string()}")
    path = folder / "reference" / f"{key}.safetensors"
    lengths = [len(example.input_ids) for example in examples]
    values = torch.empty(0)
    with contextlib.suppress(OSError, SafetensorError, KeyError):
        values = load_file(path)["log_probs"]
    if Ranks.of(model).all(len(values) == sum(lengths)):  # scoring takes all ranks, or none
        return list(values.split(lengths))
    rows = score_rows(scorer, model, examples, **scoring)
    try:
        write_atomic(path, save({"log_probs": torch.cat(rows)}))
    except OSError as error:
        warnings.warn(f"the reference is not kept for the next run: {error}", stacklevel=2)
    return rows


@torch.no_grad()
def mean_token_norm(model: Any, examples: Sequence[Example], layer: int) -> float:
    """Give the mean length of what leaves a layer at the labelled tokens of these rows.

    The mean runs over all labelled tokens, so it does not depend on how rows are batched.
    """
    total, count = 0.0, 0
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for group in batches_by_length([len(one.input_ids) for one in examples], NORM_TOKENS):
            padded = pad([examples[place] for place in group], 0)
            batch = {name: part.to(device) for name, part in padded.items()}
            read = read_layer(model, {"": batch}, layer)[""]
            total += float(read.hidden.norm(dim=-1)[read.mask].double().sum())
            count += int(read.mask.sum())
    return total / count


@dataclass(frozen=True)
class LiveReference:
    """A frozen model asked at every step: a copy, or None for adapters switched off."""

    scorer: Scorer
    model: Any | None

    @classmethod
    def of(cls, model: Any, *, share: bool = True) -> "LiveReference":
        """Use the adapters' off switch where there is one, otherwise copy what is trained.

        Frozen weights are not copied, unless ``share`` is off: ZeRO 3 is about to split them.
        """
        if hasattr(model, "disable_adapter"):
            return cls(Scorer.for_model(model, check=False), None)
        shared = {id(p): p for p in model.parameters() if share and not p.requires_grad}
        frozen = copy.deepcopy(model, shared).eval().requires_grad_(False)
        return cls(Scorer.for_model(frozen, check=False), frozen)

    @torch.no_grad()
    def streams(
        self,
        policy: Any,
        batches: Mapping[str, Mapping[str, Tensor]],
        want: Mapping[str, Collection[str]],
        *,
        layer: int | None = None,
    ) -> Mapping[str, Scores | Activations]:
        """Read these streams under the frozen weights; ``policy`` is the model being trained.

        Scores, or with ``layer`` what leaves that layer.
        """
        with contextlib.nullcontext() if self.model is not None else _adapters_off(policy):
            model = self.model or policy
            if layer is not None:
                return read_layer(model, batches, layer)
            return self.scorer.streams(model, batches, want=want)


@contextlib.contextmanager
def _adapters_off(policy: Any) -> Any:
    adapter = policy
    while not hasattr(adapter, "disable_adapter"):
        adapter = adapter.module
    training = policy.training
    policy.eval()
    try:
        with adapter.disable_adapter():
            yield
    finally:
        policy.train(training)
