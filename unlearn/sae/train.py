"""Training a dictionary on what leaves a layer, from the first batch to the measured result."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unlearn.errors import Interrupted, RunFailed, UserError
from unlearn.kept import Kept
from unlearn.ranks import Ranks
from unlearn.sae.corpus import Corpus
from unlearn.sae.dictionary import OF_BATCH, Dictionary
from unlearn.sae.hook import Hook
from unlearn.sae.learner import Learner, Told
from unlearn.sae.measure import fidelity, held_out_activations, recovery
from unlearn.sae.settings import TrainSettings
from unlearn.sae.stream import Activations, Stream, scale_of

Emit = Callable[[dict[str, Any]], None]
Stop = Callable[[], bool]


@dataclass(frozen=True)
class Trained:
    """A trained dictionary of plain activations, and its figures on rows it has not seen."""

    dictionary: Dictionary
    metrics: Mapping[str, float | None]


@dataclass
class Training:
    """A training under way; ``checkpoint`` is the file it goes on from, None to keep none.

    ``stop`` is asked after every step; where it says yes on some rank, all save and stop.
    """

    source: Activations
    settings: TrainSettings
    checkpoint: Path | None = None
    identity: Mapping[str, Any] | None = None
    emit: Emit = lambda event: None
    stop: Stop = lambda: False

    def __post_init__(self) -> None:
        how = self.settings
        self.ranks = Ranks.of(self.source.model)
        rows, self.held_out = self.source.corpus.split(how.held_out, how.seed)
        self.stream = Stream.over(
            self.source, rows, seed=how.seed, capacity=how.buffer, tokens=how.model_tokens
        )
        self.learner = Learner(how, self.source.width, self.ranks, self.source.device)
        self.scale = 1.0
        self.names = {
            **how.identity(),
            "rows": _sha256(self.source.corpus),
            **(self.identity or {}),
        }

    def run(self, *, until: int | None = None) -> Trained:
        """Train from the last checkpoint to the end; ``until`` stops early, after that step.

        Raises:
            Interrupted: a stop was asked for; the last step is saved.
        """
        self._resume()
        steps = self.settings.steps
        while self.learner.step < min(steps, until or steps):
            self.step()
            step = self.learner.step
            stopping = self.ranks.any(self.stop())
            if stopping or (step % self.settings.save_steps == 0 and step < steps):
                self.save()
            if stopping:
                raise Interrupted(f"stopped on request after step {step}")
            if step % self.settings.eval_steps == 0 and step < steps:
                self.emit({"event": "measured", "step": step, **self._figures(self.folded())})
        found = self.folded()
        metrics = self._figures(found)
        about: dict[str, Any] = {
            "trained_as": self.settings.kind,
            "settings": asdict(self.settings),
        }
        about |= {"metrics": metrics, "steps": self.learner.step}
        return Trained(replace(found, about=about), metrics)

    def step(self) -> None:
        """Take the next batch of activations and learn from it."""
        whole = self.stream.take(self.settings.batch)
        if self.learner.step == 0:
            self.scale = scale_of(whole)
            self.learner.begin(whole * self.scale)
        own = whole.tensor_split(self.ranks.size)[self.ranks.rank]
        self._tell(self.learner.learn(own * self.scale, len(whole)))

    def _tell(self, told: Told) -> None:
        if not math.isfinite(told.error):
            where = f"step {self.learner.step}"
            raise RunFailed(f"the loss is not finite at {where}", "lower lr, or sparsity")
        named = {f"sae/{name}": value for name, value in asdict(told).items()}
        step = {"step": self.learner.step, "of": self.settings.steps}
        self.emit({"event": "learnt", **step, **named})

    def folded(self) -> Dictionary:
        """Give the dictionary so far, of plain activations."""
        found = self.learner.dictionary().folded(self.scale)
        return replace(found, hook=Hook(self.settings.layer))

    def _figures(self, found: Dictionary) -> dict[str, float | None]:
        """Measure on the rows held out; nothing while single tokens cannot be read yet."""
        if found.kind in OF_BATCH:
            return {}
        source, tokens = self.source, self.settings.model_tokens
        parts = held_out_activations(source, self.held_out, tokens)
        told: dict[str, float | None] = asdict(fidelity(found, parts, self.ranks))
        told["dead_in_training"] = float(self.learner.dead.double().mean())
        return told | recovery(source, self.held_out, found, tokens).as_json()

    def save(self) -> None:
        """Write all that the next steps depend on, the shuffled vectors too."""
        if self.checkpoint is None:
            return
        learnt, values = self.learner.state()
        read, place = self.stream.state()
        tensors = {f"learner.{n}": one for n, one in learnt.items()}
        tensors |= {f"stream.{n}": one for n, one in read.items()}
        about = {"learner": values, "stream": place, "scale": self.scale}
        kept = _kept(self.checkpoint)
        self.ranks.first(lambda: kept.write(tensors, about, self.names))

    def _resume(self) -> None:
        found = self.checkpoint and _kept(self.checkpoint).read(self.names)
        begun = self.ranks.add(torch.tensor([int(bool(found))]))
        if int(begun) not in (0, self.ranks.size):
            raise UserError(
                f"'{self.checkpoint}' is seen by {int(begun)} of {self.ranks.size} processes",
                "put --out on a disk that all of them share",
            )
        if not found:
            return
        tensors, about = found
        self.learner.load(_under("learner.", tensors), about["learner"])
        self.stream.load(_under("stream.", tensors), about["stream"])
        self.scale = about["scale"]
        self.emit({"event": "resumed", "step": self.learner.step})


def train_dictionary(
    model: Any,
    corpus: Corpus,
    settings: TrainSettings,
    *,
    pad_id: int = 0,
    checkpoint: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    emit: Emit = lambda event: None,
) -> Trained:
    """Train a dictionary of what leaves a layer of a model on a text.

    The same seed gives the same dictionary, whether the training was interrupted or not (bit for
    bit on a CPU), and within rounding for any number of ranks. All ranks must call this alike.
    :class:`Training` can be asked to stop, too.

    Raises:
        UserError: no such layer, too little text, activations that are no numbers, a checkpoint of
            another training.
    """
    source = Activations(model, corpus, settings.layer, pad_id)
    return Training(source, settings, checkpoint, identity, emit).run()


def _kept(path: Path) -> Kept:
    return Kept(path, "unlearn-sae-training-1", "training of a dictionary")


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): one for n, one in tensors.items() if n.startswith(prefix)}


def _sha256(corpus: Corpus) -> str:
    digest = hashlib.sha256(corpus.ids.tobytes())
    digest.update(corpus.starts.tobytes())
    return digest.hexdigest()
