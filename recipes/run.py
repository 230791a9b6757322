"""The pipeline: a validated recipe becomes a run folder with a model, numbers and a report.

prepare (no weights) -> folder -> benchmark retain model -> load -> benchmark before -> reference ->
train (benchmarks on the way) -> save -> benchmark after -> report. Every stage leaves a file, so
that a resumed run skips what is done.
"""

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import set_seed

from unlearn import checkpoints, models, monitors
from unlearn.errors import UserError
from unlearn.evals.answers import Evaluator
from unlearn.evals.benchmark import Result
from unlearn.evals.report.write import strict, write_report
from unlearn.ranks import Ranks
from unlearn.recipes import outcome
from unlearn.recipes.files import dump
from unlearn.recipes.fitting import require_memory
from unlearn.recipes.identity import training_identity
from unlearn.recipes.inputs import absolute
from unlearn.recipes.plan import plan_run, require_disk
from unlearn.recipes.prepare import Prepared, prepare, sibling
from unlearn.recipes.results import put_together, stored_results
from unlearn.recipes.schema import Recipe
from unlearn.recipes.selection import Selection, check_rule
from unlearn.recipes.selectors import check_choice, select
from unlearn.recipes.stages import after_first, train_first
from unlearn.recipes.subset import Selected, trained_on, trained_part
from unlearn.recipes.train import measure_start, train, whole_model
from unlearn.runs import RunFolder, command_line, staged, versions, write_atomic, write_json

Emit = Callable[[dict[str, Any]], None]


def run(
    recipe: Recipe, *, emit: Emit = lambda event: None, offline: bool = False
) -> dict[str, Any]:
    """Run a recipe in a new folder and give its results, the content of ``results.json``.

    Raises:
        UserError: a mistake in the input, before any long work. No folder is left behind.
        RunFailed: the work failed. The folder can be resumed.
        Interrupted: stopped by SIGINT or SIGTERM. The folder can be resumed.
    """
    prepared, ranks = prepare(recipe, offline=offline), Ranks.world()
    check_choice(prepared)
    folder = RunFolder(Path(str(recipe.out)))
    with _held(folder, ranks, new=prepared):
        if ranks.rank > 0:
            return _start(prepared, folder, emit)
        with _removed_unless_begun(folder):
            return _start(prepared, folder, emit)


def _start(prepared: Prepared, folder: RunFolder, emit: Emit) -> dict[str, Any]:
    ranks = Ranks.world()
    manifest = ranks.first(lambda: _manifest(prepared))

    def write() -> None:
        write_atomic(folder.recipe, dump(absolute(prepared.recipe)))
        write_json(folder.manifest, manifest)

    ranks.first(write)
    return _Run(prepared, folder, manifest, emit).execute()


def resume(
    recipe: Recipe,
    folder: RunFolder,
    *,
    emit: Emit = lambda event: None,
    offline: bool = False,
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """Continue a stopped run from its newest usable checkpoint, or from the one named.

    A complete run is left alone.

    Raises:
        UserError: model, data or recipe are not what the run was started with, or there are
            checkpoints but none can be used.
    """
    if folder.results.is_file():
        return stored_results(folder)
    prepared, ranks = prepare(recipe, offline=offline), Ranks.world()
    with _held(folder, ranks):
        if not folder.manifest.is_file():  # stopped between its first two files
            ranks.first(lambda: write_json(folder.manifest, _manifest(prepared)))
        manifest = json.loads(folder.manifest.read_text())
        for name, stream in prepared.streams.items():
            if manifest[name]["sha256"] != stream.sha256():
                message = f"the {name} set '{stream.source}' has changed since the run was started"
                raise UserError(message, "restore the file, or start a new run")
        return _Run(prepared, folder, manifest, emit, checkpoint).execute()


@contextmanager
def _held(folder: RunFolder, ranks: Ranks, *, new: Prepared | None = None) -> Iterator[None]:
    """Let rank 0 hold the folder against other writers, and make it for a new run that fits."""
    with ExitStack() as stack:

        def hold() -> None:
            if new:
                planned = plan_run(new)
                require_memory(planned)
                require_disk(planned)
                RunFolder.create(folder.path)
            stack.enter_context(folder.locked())
            if new and folder.recipe.exists():  # another process was quicker
                RunFolder.create(folder.path)

        ranks.first(hold)
        yield


@contextmanager
def _removed_unless_begun(folder: RunFolder) -> Iterator[None]:
    """Take a new run folder away again when it holds nothing that could be continued."""
    try:
        yield
    except BaseException as error:
        mistake = isinstance(error, UserError)
        if not (folder.evaluation("before") if mistake else folder.manifest).is_file():
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def _manifest(prepared: Prepared) -> dict[str, Any]:
    recipe = prepared.recipe
    return {
        "command": command_line(),
        "model": recipe.model.path,
        "started": _now(),
        "seed": recipe.seed,
        "versions": versions(),
        "template": prepared.template.fingerprint(),
        **{name: stream.provenance() for name, stream in prepared.streams.items()},
        **_own_losses(prepared),
    }


def _own_losses(prepared: Prepared) -> dict[str, Any]:
    """Name the files that losses come from, with their hashes; nothing when there are none."""
    stages = [stage for stage in (prepared.first, prepared) if stage]
    terms = [pair for s in stages for pair in zip(s.recipe.terms, s.terms, strict=True)]
    found = {one.objective: term.objective.sha256 for one, term in terms if term.objective.sha256}
    return {"losses": found} if found else {}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class _Run:
    """One run in progress: what is known, where it is written, who listens."""

    prepared: Prepared
    folder: RunFolder
    manifest: dict[str, Any]
    listener: Emit
    checkpoint: str | None = None

    @property
    def ranks(self) -> Ranks:
        return Ranks.world()

    def emit(self, event: dict[str, Any]) -> None:
        if self.ranks.rank > 0:
            return
        if event["event"] != "progress":
            self.folder.append_event(event)
        self.listener(event)

    def write(self, path: Path, value: Any) -> None:
        """Let rank 0 write a file that the others may read afterwards."""
        self.ranks.first(lambda: write_json(path, value))

    def execute(self) -> dict[str, Any]:
        recipe, stop = self.prepared.recipe, monitors.StopRequest()
        with stop.listening():
            set_seed(recipe.seed)
            if recipe.model.retain_model:  # first: the others are compared with it
                self.benchmark("retain_model", recipe.model.retain_model)
            if not self.folder.model.is_dir():
                self._unlearn(stop)
            found = {
                "before": self._stored("before"),
                "after": self.benchmark("after", str(self.folder.model)),
            }
            if recipe.model.retain_model:
                found["retain_model"] = self._stored("retain_model")
            return self._finish(found)

    def _unlearn(self, stop: monitors.StopRequest) -> None:
        self.emit({"event": "stage", "stage": "load"})
        model = models.load_model(self.prepared.source)
        weights = models.weights_hash(model)
        if self.manifest.setdefault("model_sha256", weights) != weights:
            message = f"the model '{self.prepared.source.path}' has changed since the run began"
            raise UserError(message, "restore it, or start a new run")
        Evaluator(model, self.prepared.tokenizer).check_finite(
            name=f"'{self.prepared.source.path}'"
        )
        self.manifest["device"] = str(model.device)
        self.manifest["processes"] = self.ranks.size
        known = replace(self.prepared, measured=self.manifest.get("measured", {}))
        self.prepared = measure_start(known, model)
        if self.prepared.measured:
            self.manifest["measured"] = self.prepared.measured
        self.write(self.folder.manifest, self.manifest)
        if self.prepared.recipe.data.select:
            self._choose(model)
        if self.checkpoint:
            self._go_back(self.checkpoint)
        outcome.require_ready(self.prepared, model, weights)
        before = self.benchmark("before", model)
        if rule := self.prepared.recipe.evals.select_best:
            check_rule(rule, before["metrics"])
        model, summary = self._change(model, stop)
        self.manifest["training"] = summary
        if self.selection:
            self._measure_step(model, summary["steps"])
        self._save(model)
        self.ranks.first(lambda: self.folder.edit_steps.unlink(missing_ok=True))
        del model
        gc.collect()

    def _change(self, model: Any, stop: monitors.StopRequest) -> tuple[Any, dict[str, Any]]:
        """Train the model, or apply an edit that trains nothing."""
        if not self.prepared.recipe.trains:
            start = self.manifest["model_sha256"]
            return outcome.edited(
                self.prepared, model, self.emit, weights_hash=start, folder=self.folder
            )
        start, before = self.manifest["model_sha256"], 0
        emit: Emit = self.emit
        if self.prepared.recipe.first:
            model, before = self._train_first(model, stop)
            start, emit = models.weights_hash(model), after_first(emit, before)
        model, summary = train(
            self.prepared,
            model,
            self.folder,
            weights_hash=start,
            stop=stop,
            emit=emit,
            on_step=lambda model, step: self._measure_step(model, before + step),
        )
        return model, summary | {"steps": before + summary["steps"]}

    def _train_first(self, model: Any, stop: monitors.StopRequest) -> tuple[Any, int]:
        """Train what comes first, or find it done; give its model and how many steps it took."""
        model, summary = train_first(
            self.prepared,
            model,
            self.folder,
            weights_hash=self.manifest["model_sha256"],
            stop=stop,
            emit=self.emit,
        )
        self.manifest["first"], steps = summary, int(summary["steps"])
        self.write(self.folder.manifest, self.manifest)
        if self.prepared.recipe.evals.every:
            self._measure_step(model, steps)
        return model, steps

    def _choose(self, model: Any) -> None:
        """Train on a part of the forget set from here on; a run chooses once."""
        place, weights = self.folder.selection, self.manifest["model_sha256"]
        if not place.is_file():
            found = select(self.prepared, model, weights_hash=weights, emit=self.emit)
            self.ranks.first(lambda: found.write(place))
        chosen = Selected.read(place)
        self.prepared = trained_on(self.prepared, chosen)
        self.manifest["selection"] = chosen.summary() | trained_part(self.prepared)
        self.write(self.folder.manifest, self.manifest)

    def _go_back(self, name: str) -> None:
        identity = training_identity(self.prepared, self.manifest["model_sha256"])
        self.ranks.first(lambda: checkpoints.go_back(self.folder.checkpoints, name, identity))

    def _save(self, model: Any) -> None:
        """Save the trained weights, or those of the best step; one process writes."""
        self.emit({"event": "stage", "stage": "save"})
        model = whole_model(self.prepared, model)
        self.ranks.first(lambda: self._write_model(model))

    def _write_model(self, model: Any) -> None:
        if self.selection:
            self.manifest["selected"] = self.selection.restore(model)
        write_json(self.folder.manifest, self.manifest)
        with staged(self.folder.model) as staging:
            outcome.save(self.prepared, model, staging, self.folder.adapter)

    @property
    def selection(self) -> Selection | None:
        rule = self.prepared.recipe.evals.select_best
        return Selection(rule, self.folder.best) if rule else None

    def _measure_step(self, model: Any, step: int) -> None:
        """Measure on the way, and keep the weights when they are the best so far."""
        stored = self.benchmark(f"step-{step}", model)
        if self.selection:
            self.selection.consider(model, step, stored["metrics"])

    def benchmark(self, name: str, model: Any) -> dict[str, Any]:
        """Measure a model (or the one in a folder) once; a stored result is not measured again."""
        if self.folder.evaluation(name).is_file():
            return self._stored(name)
        self.emit({"event": "stage", "stage": "benchmark", "name": name})
        if isinstance(model, str):
            model = models.load_model(sibling(self.prepared.source, model))

        def progress(what: str, done: int, total: int) -> None:
            self.listener({"event": "progress", "what": what, "done": done, "total": total})

        measures, tokenizer = self.prepared.measures, self.prepared.tokenizer
        before = self._found("before")
        result = measures.run(
            model,
            tokenizer,
            progress=progress,
            retain=self._found("retain_model"),
            target=before.values() if before else None,
            weights_hash=self._weights_hash(name, model),
        )
        if name == "retain_model":
            result = measures.as_retain_model(result)
        self.write(self.folder.evaluation(name), strict(result.to_dict()))
        self.emit({"event": "metrics", "name": name, "metrics": result.values()})
        return self._stored(name)

    def _weights_hash(self, name: str, model: Any) -> str | None:
        """Identify the models that other runs measure too; None for those of this run alone."""
        if name == "before":
            return str(self.manifest["model_sha256"])
        return models.weights_hash(model) if name == "retain_model" else None

    def _found(self, name: str) -> Result | None:
        stored = self.folder.evaluation(name).is_file()
        return Result.from_dict(self._stored(name)) if stored else None

    def _stored(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.folder.evaluation(name).read_text()))

    def _finish(self, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
        def write() -> None:
            manifest = self.manifest | {"finished": _now()}
            results = put_together(self.folder, self.prepared.recipe.method, manifest, found)
            write_report(self.folder.path, results)
            write_json(self.folder.results, results)

        self.ranks.first(write)
        return stored_results(self.folder)
