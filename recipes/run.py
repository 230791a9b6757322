"""The pipeline: a validated recipe becomes a run folder with a model, numbers and a report.

prepare (no weights) -> folder -> load -> benchmark before -> reference -> train -> save ->
benchmark after -> report. Every stage leaves a file, so that a resumed run skips what is done.
"""

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import set_seed

from unlearn import models, monitors
from unlearn.errors import UserError
from unlearn.evals.benchmark import ForgetRetain, Split
from unlearn.evals.report import write_report
from unlearn.evals.side_by_side import side_by_side
from unlearn.recipes.files import dump
from unlearn.recipes.prepare import Prepared, prepare
from unlearn.recipes.schema import Recipe
from unlearn.recipes.train import train
from unlearn.runs import RunFolder, command_line, staged, versions, write_atomic, write_json

Emit = Callable[[dict[str, Any]], None]


def run(
    recipe: Recipe, *, emit: Emit = lambda event: None, offline: bool = False
) -> dict[str, Any]:
    """Run a recipe in a new folder and give its results, the content of ``results.json``.

    Raises:
        UserError: a mistake in the input, before any long work.
        RunFailed: the work failed. The folder can be resumed.
        Interrupted: stopped by SIGINT or SIGTERM. The folder can be resumed.
    """
    prepared = prepare(recipe, offline=offline)
    folder = RunFolder.create(Path(str(recipe.out)))
    write_atomic(folder.recipe, dump(recipe))
    manifest = {
        "command": command_line(),
        "model": recipe.model.path,
        "started": _now(),
        "seed": recipe.seed,
        "versions": versions(),
        "template": prepared.template.fingerprint(),
        **{name: stream.provenance() for name, stream in prepared.streams.items()},
    }
    write_json(folder.manifest, manifest)
    return _Run(prepared, folder, manifest, emit).execute()


def resume(
    recipe: Recipe,
    folder: RunFolder,
    *,
    emit: Emit = lambda event: None,
    offline: bool = False,
) -> dict[str, Any]:
    """Continue a stopped run from its newest complete checkpoint; a complete run is left alone.

    Raises:
        UserError: the data are not what the run was started with.
    """
    if folder.results.is_file():
        return dict(json.loads(folder.results.read_text()))
    prepared = prepare(recipe, offline=offline)
    manifest = json.loads(folder.manifest.read_text())
    for name, stream in prepared.streams.items():
        if manifest[name]["sha256"] != stream.sha256():
            message = f"the {name} set '{stream.source}' has changed since the run was started"
            raise UserError(message, "restore the file, or start a new run")
    return _Run(prepared, folder, manifest, emit).execute()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class _Run:
    """One run in progress: what is known, where it is written, who listens."""

    prepared: Prepared
    folder: RunFolder
    manifest: dict[str, Any]
    listener: Emit

    def emit(self, event: dict[str, Any]) -> None:
        if event["event"] != "progress":
            self.folder.append_event(event)
        self.listener(event)

    def execute(self) -> dict[str, Any]:
        recipe, stop = self.prepared.recipe, monitors.StopRequest()
        with self.folder.locked(), stop.listening():
            set_seed(recipe.seed)
            if not self.folder.model.is_dir():
                self._unlearn(stop)
            found = {
                "before": self._stored("before"),
                "after": self.benchmark("after", str(self.folder.model)),
            }
            if recipe.model.retain_model:
                found["retain_model"] = self.benchmark("retain_model", recipe.model.retain_model)
            return self._finish(found)

    def _unlearn(self, stop: monitors.StopRequest) -> None:
        self.emit({"event": "stage", "stage": "load"})
        model = models.load_model(self.prepared.source)
        self.manifest["model_sha256"] = models.weights_hash(model)
        self.manifest["device"] = str(model.device)
        write_json(self.folder.manifest, self.manifest)
        self.benchmark("before", model)
        model, summary = train(
            self.prepared,
            model,
            self.folder.checkpoints,
            weights_hash=self.manifest["model_sha256"],
            stop=stop,
            emit=self.emit,
            on_step=lambda model, step: self.benchmark(f"step-{step}", model),
        )
        self.manifest["training"] = summary
        write_json(self.folder.manifest, self.manifest)
        self.emit({"event": "stage", "stage": "save"})
        with staged(self.folder.model) as staging:
            models.save_model(model, self.prepared.tokenizer, staging, self.folder.adapter)
        del model
        gc.collect()

    def benchmark(self, name: str, model: Any) -> dict[str, Any]:
        """Measure a model (or the one in a folder) once; a stored result is not measured again."""
        if self.folder.evaluation(name).is_file():
            return self._stored(name)
        self.emit({"event": "stage", "stage": "benchmark", "name": name})
        model = models.load_model(model) if isinstance(model, str) else model

        def progress(what: str, done: int, total: int) -> None:
            self.listener({"event": "progress", "what": what, "done": done, "total": total})

        result = self._benchmark().run(model, self.prepared.tokenizer, progress=progress)
        write_json(self.folder.evaluation(name), result.to_dict())
        self.emit({"event": "metrics", "name": name, "metrics": result.values()})
        return self._stored(name)

    def _benchmark(self) -> ForgetRetain:
        evals = self.prepared.recipe.evals
        splits = {
            name: Split(stream.rows, stream.examples, self.prepared.template)
            for name, stream in self.prepared.streams.items()
        }
        return ForgetRetain(
            **splits,
            max_rows=evals.max_rows,
            generate=evals.generate,
            max_new_tokens=evals.max_new_tokens,
            batch_tokens=evals.batch_tokens,
        )

    def _stored(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.folder.evaluation(name).read_text()))

    def _finish(self, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
        folder, recipe = self.folder, self.prepared.recipe
        manifest = self.manifest | {"finished": _now()}
        results = {
            "run": str(folder.path),
            "status": "complete",
            "method": recipe.method,
            "model": str(folder.model),
            "recipe": str(folder.recipe),
            "report": str(folder.path / "report.html"),
            "metrics": {
                name: {key: metric["value"] for key, metric in result["metrics"].items()}
                for name, result in found.items()
            },
            "details": {name: result["metrics"] for name, result in found.items()},
            "examples": side_by_side(found),
            "training": manifest.pop("training") | {"curve": self._curve()},
            "provenance": manifest,
        }
        write_report(folder.path, results)
        write_json(folder.manifest, self.manifest)
        write_json(folder.results, results)
        return results

    def _curve(self) -> list[dict[str, Any]]:
        """Give one entry per step; after a kill, steps that were done again count once."""
        steps = {event["step"]: event for event in self.folder.events("step")}
        dropped = ("event", "time", "of", "memory_bytes")
        return [
            {key: value for key, value in steps[step].items() if key not in dropped}
            for step in sorted(steps)
        ]
