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
from unlearn.mtp.predictor import MaskPredictor, context_of, frozen_model
from unlearn.mtp.settings import TrainSettings, require_share
from unlearn.mtp.storage import not_finite
from unlearn.ranks import Ranks
from unlearn.runs import open_tensors

Emit = Callable[[dict[str, Any]], None]
FORM, WHAT = "unlearn-mtp-training-1", "training of a mask predictor"
HELD_OUT = 16
"""Rows kept to measure on where the settings do not say, at most a tenth of all."""


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
            UserError: none is left, or they do not fit the settings or the model.
        """
        self.ranks = Ranks.world()
        require_share(self.settings, self.ranks.size)
        usable = [place for place, one in enumerate(self.examples) if _is_long_enough(one)]
        if usable:
            _require_fit(self.predictor, [self.examples[place] for place in usable])
        held = _held_out(self.settings, len(usable))
        order = _order(len(usable), self.settings.seed, -1)
        self.held_out = [usable[place] for place in sorted(order[:held])]
        self.rows = [usable[place] for place in sorted(order[held:])]
        if not self.rows:
            raise UserError(
                "no row has three tokens in a row, of which the last two are to be learnt",
                "give longer texts",
            )
        self.learner = Learner(self.predictor, self.settings, self.ranks)
        self.names = names_of(self.settings, self.examples) | dict(self.identity or {})

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
        self._require_sound()
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
        self._require_sound()
        tensors, about = self.learner.state()
        kept = _kept(self.checkpoint)
        self.ranks.first(lambda: kept.write(tensors, about, self.names))

    def _require_sound(self) -> None:
        if odd := not_finite(self.predictor.trained()):
            raise RunFailed(f"{odd} is not finite after step {self.learner.step}", "lower lr")

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


def names_of(settings: TrainSettings, examples: Sequence[Example]) -> dict[str, Any]:
    """Give all that a training on such rows depends on, but the model."""
    digest = hashlib.sha256(json.dumps([one.hashed() for one in examples]).encode())
    return {**settings.identity(), "rows": digest.hexdigest()}


def require_same_training(checkpoint: Path, names: Mapping[str, Any]) -> None:
    """Refuse to go on from the checkpoint of a training with others of these names; writes nothing.

    Raises:
        UserError: says what differs.
    """
    if not checkpoint.is_file():
        return
    folder = checkpoint.parent
    how = f"`unlearn resume {folder}` goes on with it; for this one choose another --out"
    with open_tensors(checkpoint, FORM, WHAT, "choose another --out") as (_, about):
        stored = json.loads(about["identity"])
    told = [_other(key, stored.get(key), ours) for key, ours in names.items()
            if stored.get(key) != ours]  # fmt: skip
    if told:
        raise UserError(f"'{folder}' holds an interrupted training with {', '.join(told)}", how)


def _other(key: str, theirs: Any, ours: Any) -> str:
    named = {"rows": "other texts", "model": "another model"}
    return named.get(key, f"{key}={theirs}, not {ours}")


def _held_out(settings: TrainSettings, rows: int) -> int:
    """Give how many of the rows are kept to measure on.

    Raises:
        UserError: all of them.
    """
    if settings.held_out is None:
        return min(HELD_OUT, rows // 10)
    if rows and settings.held_out >= rows:
        most = f"give held_out={rows - 1} or less" if rows > 1 else "leave held_out out"
        raise UserError(
            f"held_out={settings.held_out} given, but there are {rows} texts to learn from, of "
            "which one at least is trained on",
            f"{most}, or more texts",
        )
    return settings.held_out


def _require_fit(predictor: MaskPredictor, examples: Sequence[Example]) -> None:
    """Refuse texts beyond the model's last position, and masks beyond all texts.

    Raises:
        UserError: as said.
    """
    longest, most = max(len(one.input_ids) for one in examples), context_of(predictor.model)
    if longest > most:
        raise UserError(
            f"a text has {longest} tokens, but the model's context is {most}",
            f"set max_length to {most} or less",
        )
    if predictor.shape.k > longest - 2:
        raise UserError(
            f"k={predictor.shape.k} masks, but the longest text has {longest} tokens: after the "
            f"first and its next, {longest - 2} are left to foretell",
            f"set k to {longest - 2} or less, or give longer texts",
        )


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
    return Kept(path, FORM, WHAT)
