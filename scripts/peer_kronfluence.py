"""Kronfluence 1.0.1 as its users call it: what ``bench_curvature.py`` is set against.

Factors come from :class:`kronfluence.analyzer.Analyzer`, which writes all of them to a folder and
reads them back for the next step. It has no call for "the preconditioned gradient of these rows":
:meth:`Peer.step` does what its query aggregation does before it goes on to training rows.

Its numbers are sums over other counts than ours. With the positions that take part as its mask, A
is divided by as many positions as ours; G is too, where ours is divided by labelled tokens; the
eigenvalues are divided by rows. :class:`Scales` turns one into the other.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.computer import factor_computer
from kronfluence.module.tracked_module import ModuleMode, TrackedModule
from kronfluence.module.utils import (
    finalize_all_iterations,
    prepare_modules,
    set_factors,
    set_mode,
    update_factor_args,
    update_score_args,
)
from kronfluence.task import Task
from kronfluence.utils.constants import ACCUMULATED_PRECONDITIONED_GRADIENT_NAME
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor
from torch.nn.functional import cross_entropy

from unlearn.curvature.factors import Counts
from unlearn.curvature.passes import Batch
from unlearn.data.collate import pad
from unlearn.data.encode import Example

FACTORS = "all"
FILE_CALLS = [
    f"{verb}_{what}"
    for verb in ("save", "load")
    for what in ("covariance_matrices", "eigendecomposition", "lambda_matrices")
]
"""The functions of kronfluence's factor computer that write and read files."""


@dataclass(frozen=True)
class Scales:
    """What kronfluence's means are multiplied by to give ours."""

    outputs: float
    eigenvalues: float

    @classmethod
    def of(cls, counts: Counts) -> "Scales":
        return cls(counts.tokens / counts.labels, counts.rows / counts.labels)


class SummedLoss(Task):  # type: ignore[misc]
    """The negative log-likelihood of labelled tokens, summed, by full logits."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)

    def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
        assert not sample, "labels that are drawn cannot be compared"
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        return cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")

    def compute_measurement(self, batch: Any, model: Any) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.names

    def get_attention_mask(self, batch: Any) -> Tensor:
        return batch["taking_part"]


class Peer:
    """One model and the folder its factors are written to; every method is one phase."""

    def __init__(
        self, model: Any, names: Sequence[str], folder: Path, *, strategy: str, batch: int
    ) -> None:
        task = SummedLoss(names)
        self.model, self.batch = prepare_model(model, task), batch
        self.args = FactorArguments(strategy, use_empirical_fisher=True)
        self.analyzer = Analyzer(
            "bench", self.model, task, cpu=True, disable_tqdm=True, output_dir=str(folder)
        )
        self.analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=_collated))
        self.file_seconds = 0.0

    def factors(self, rows: Sequence[Example]) -> None:
        """Fit A and G."""
        self._fit(self.analyzer.fit_covariance_matrices, rows)

    def eigen(self) -> None:
        """Decompose them: for both strategies."""
        with self._files_timed():
            self.analyzer.perform_eigendecomposition(
                FACTORS, factor_args=self.args, overwrite_output_dir=True
            )

    def spectrum(self, rows: Sequence[Example]) -> None:
        """Fit Λ."""
        self._fit(self.analyzer.fit_lambda_matrices, rows)

    def _fit(self, fit: Callable[..., None], rows: Sequence[Example]) -> None:
        with self._files_timed():
            fit(FACTORS, list(rows), per_device_batch_size=self.batch, factor_args=self.args,
                overwrite_output_dir=True)  # fmt: skip

    def step(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        """Read the factors; give (H + λI)⁻¹g per weight, λ a tenth of the mean eigenvalue.

        g is the gradient of the summed loss of these rows.
        """
        model, names = self.model, self.analyzer.task.names
        with self._files_timed():
            found = self._timed(self.analyzer.load_all_factors)(FACTORS)
        update_factor_args(model, self.args)
        update_score_args(model, ScoreArguments(damping_factor=None))
        set_mode(model, ModuleMode.GRADIENT_AGGREGATION, names, release_memory=True)
        for name, factors in found.items():
            set_factors(model, name, factors, clone=True)
        prepare_modules(model, names, self.analyzer.state.device)
        for start in range(0, len(rows), self.batch):
            batch = _collated(rows[start : start + self.batch])
            self.analyzer.task.compute_measurement(batch, model).backward()
        set_mode(model, ModuleMode.PRECONDITION_GRADIENT, names, release_memory=False)
        finalize_all_iterations(model, names)
        steps = {
            one.name: one.storage[ACCUMULATED_PRECONDITIONED_GRADIENT_NAME][0]
            for one in model.modules()
            if isinstance(one, TrackedModule)
        }
        set_mode(model, ModuleMode.DEFAULT, release_memory=True)
        return steps

    def found(self) -> dict[str, Mapping[str, Tensor]]:
        """Read what was fitted, sums and counts."""
        found = dict(self.analyzer.load_covariance_matrices(FACTORS))
        found |= self.analyzer.load_eigendecomposition(FACTORS)
        return found | (self.analyzer.load_lambda_matrices(FACTORS) or {})

    @contextmanager
    def _files_timed(self) -> Iterator[None]:
        """Add the time that files take to ``file_seconds``."""
        before = {name: getattr(factor_computer, name) for name in FILE_CALLS}
        for name, call in before.items():
            setattr(factor_computer, name, self._timed(call))
        try:
            yield
        finally:
            for name, call in before.items():
                setattr(factor_computer, name, call)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **named)
            finally:
                self.file_seconds += time.perf_counter() - start

        return timed


def _collated(rows: Sequence[Example]) -> dict[str, Tensor]:
    batch = pad(rows, 0)
    return batch | {"taking_part": Batch.of(batch, range(len(rows))).taking_part}
