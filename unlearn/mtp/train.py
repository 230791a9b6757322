"""Training a mask predictor on texts, from the first step to the measured result."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from unlearn.data.encode import Example
from unlearn.errors import Interrupted, RunFailed, UserError
from unlearn.kept import Kept
from unlearn.mtp.layout import eligible
from unlearn.mtp.learner import Learner, Told
from unlearn.mtp.predictor import MaskPredictor, frozen_model
from unlearn.mtp.settings import TrainSettings
from unlearn.ranks import Ranks

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Trained:
    """A trained predictor, and its figures on rows it has not seen."""

    predictor: MaskPredictor
    metrics: Mapping[str, float]


@dataclass
class Training:
    """A training under way; ``checkpoint`` is the file it goes on from, None to keep none.

    ``stop`` is asked after every step; once it says so on any rank, all save and stop.
    """

    predictor: MaskPredictor
    examples: Sequence[Example]
    settings: TrainSettings
    checkpoint: Path | None = None
    identity: Mapping[str, Any] | None = None
    emit: Emit = lambda event: None
    stop: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        """Leave out sequences too short for a mask, and keep some back.

        Raises:
            UserError: none is left.
        """
        self.ranks = Ranks.world()
        usable = [place for place, one in enumerate(self.examples) if _is_long_enough(one)]
        held = min(self.settings.held_out, len(usable) // 10)
        order = _order(len(usable), self.settings.seed, -1)
        self.held_out = [usable[place] for place in sorted(order[:held])]
        self.rows = [usable[place] for place in sorted(order[held:])]
        if not self.rows:
            raise UserError(
                "no row has three tokens in a row, of which the last two are to be learnt",
                "give longer texts",
            )
        self.learner = Learner(self.predictor, self.settings, self.ranks)
        digest = hashlib.sha256(json.dumps([one.hashed() for one in self.examples]).encode())
        self.names = {
            **self.settings.identity(),
            "rows": digest.hexdigest(),
            **(self.identity or {}),
        }

    def run(self, *, until: int | None = None) -> Told:
        """Train from the last checkpoint to the end; ``until`` stops early, after that step.

        Gives what the last step told.

        Raises:
            Interrupted: a stop was asked for; the last step is saved.
        """
        self._resume()
        steps, told = self.settings.steps, Told(0.0, 0.0, 0.0, 0.0, 0)
        with frozen_model(self.predictor.model):
            while self.learner.step < min(steps, until or steps):
                told = self.learner.learn(self._batch(self.learner.step))
                self._tell(told)
                step = self.learner.step
                stopping = self.ranks.any(self.stop())
                if stopping or (step % self.settings.save_steps == 0 and step < steps):
                    self.save()
                if stopping:
                    raise Interrupted(f"stopped on request after step {step}")
        return told

    def measure(self) -> dict[str, float]:
        """Measure on the rows held out; nothing where there are none."""
        rows = [(row, self.examples[row]) for row in self.held_out]
        return asdict(self.learner.measure(rows)) if rows else {}

    def _batch(self, step: int) -> list[tuple[int, Example]]:
        """Give the sequences of a step: a pure function of the seed."""
        size, number = self.settings.batch, len(self.rows)
        found = []
        for place in range(step * size, (step + 1) * size):
            order = _order(number, self.settings.seed, place // number)
            row = self.rows[order[place % number]]
            found.append((row, self.examples[row]))
        return found

    def _tell(self, told: Told) -> None:
        if not all(math.isfinite(value) for value in (told.base, told.sampler, told.lcm)):
            where = f"step {self.learner.step}"
            raise RunFailed(f"the loss is not finite at {where}", "lower lr")
        named = {f"mtp/{name}": value for name, value in asdict(told).items()}
        step = {"step": self.learner.step, "of": self.settings.steps}
        self.emit({"event": "learnt", **step, **named})

    def save(self) -> None:
        """Write all that the next steps depend on."""
        if self.checkpoint is None:
            return
        tensors, about = self.learner.state()
        kept = _kept(self.checkpoint)
        self.ranks.first(lambda: kept.write(tensors, about, self.names))

    def _resume(self) -> None:
        found = self.checkpoint and _kept(self.checkpoint).read(self.names)
        begun = int(self.ranks.add(torch.tensor([int(bool(found))])))
        if begun not in (0, self.ranks.size):
            raise UserError(
                f"'{self.checkpoint}' is seen by {begun} of {self.ranks.size} processes",
                "put --out on a disk that all of them share",
            )
        if found:
            self.learner.load(*found)
            self.emit({"event": "resumed", "step": self.learner.step})


def train_predictor(
    model: Any,
    examples: Sequence[Example],
    settings: TrainSettings,
    *,
    checkpoint: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    emit: Emit = lambda event: None,
) -> Trained:
    """Train a mask predictor beside a frozen model on tokenised rows.

    The same seed gives the same predictor, whether the training was interrupted or not (bit for bit
    on a CPU), and within rounding for any number of ranks. All ranks must call this alike.

    Raises:
        UserError: a model that this cannot be exact for, rows too short, a checkpoint of another
            training.
    """
    predictor = MaskPredictor(model, settings.shape, seed=settings.seed)
    training = Training(predictor, examples, settings, checkpoint, identity, emit)
    training.run()
    return Trained(predictor, training.measure())


def _is_long_enough(example: Example) -> bool:
    return len(eligible(torch.tensor(example.labels))) > 0


def _order(number: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch + 1) % 2**63)
    found: list[int] = torch.randperm(number, generator=generator).tolist()
    return found


def _kept(path: Path) -> Kept:
    return Kept(path, "unlearn-mtp-training-1", "training of a mask predictor")
