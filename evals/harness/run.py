"""``unlearn eval lm-eval`` and ``unlearn eval wmdp`` as a function: check, load, measure, write."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from unlearn import models
from unlearn.evals.benchmark import Progress, Result, as_results, told
from unlearn.evals.harness.tasks import HarnessSettings
from unlearn.evals.report.write import strict, write_report
from unlearn.monitors import peak_memory_bytes
from unlearn.runs import command_line, versions, write_json

Emit = Callable[[dict[str, Any]], None]


class Ready(Protocol):
    """Tasks that have their data."""

    def run(
        self, model: Any, tokenizer: Any, settings: HarnessSettings, *, progress: Progress
    ) -> Result: ...


@dataclass(frozen=True)
class Evaluation:
    """What was found about a model, and where the numbers come from."""

    result: Result
    provenance: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Give one object: what ``--json`` prints."""
        return told(self.result, self.provenance["model"], self.provenance)

    def to_results(self, folder: Path) -> dict[str, Any]:
        """Give the same as ``results.json`` has it: what the report reads."""
        return as_results(self.to_json(), folder)

    def write(self, folder: Path) -> None:
        """Write every file of an evaluation; ``results.json`` last."""
        results = strict(self.to_results(folder))
        evaluation, summary = to_lm_eval_logs(self.result)
        write_json(folder / "RUN.json", {k: results[k] for k in ("provenance", "settings")})
        write_json(folder / "LMEval_EVAL.json", evaluation)
        write_json(folder / "LMEval_SUMMARY.json", summary)
        write_report(folder, results)
        write_json(folder / "results.json", results)


def measure(
    source: models.ModelSource,
    find: Callable[[], Ready],
    settings: HarnessSettings,
    *,
    emit: Emit = lambda event: None,
) -> Evaluation:
    """Find the tasks, load the model and run them; weights are loaded last.

    Raises:
        UserError: whatever is wrong with model, settings, tasks or data.
    """
    started = time.monotonic()
    models.check_source(source)
    tokenizer = models.load_tokenizer(source)
    settings.check(tokenizer)
    tasks = find()
    emit({"event": "stage", "stage": "load", "name": source.path})
    model = models.load_model(source)
    emit({"event": "stage", "stage": "benchmark", "name": source.path})

    def progress(stage: str, done: int, total: int) -> None:
        emit({"event": "progress", "what": stage, "done": done, "total": total})

    result = tasks.run(model, tokenizer, settings, progress=progress)
    return Evaluation(result, _provenance(source, model, result, started))


def to_lm_eval_logs(result: Result) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give the contents of open-unlearning's ``LMEval_EVAL.json`` and ``LMEval_SUMMARY.json``.

    The first holds lm-eval's samples by task, the second every value and its standard error.
    """
    samples: dict[str, list[Any]] = {name: [] for name in result.settings["tasks"]}
    for record in result.records:
        sample = {key: value for key, value in record.items() if key not in ("split", "row")}
        samples.setdefault(record["split"], []).append(sample)
    summary: dict[str, float] = {}
    for name, metric in result.metrics.items():
        found = metric.to_dict()
        values = {name: found["value"], f"{name}_stderr": found["standard_error"]}
        summary |= {key: value for key, value in values.items() if value is not None}
    # documents may hold dates or images, which JSON does not know
    plain = json.loads(json.dumps(strict(samples), default=str))
    return plain, dict(sorted(summary.items()))


def _provenance(
    source: models.ModelSource, model: Any, result: Result, started: float
) -> dict[str, Any]:
    first = next(model.parameters())
    return {
        "command": command_line(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": source.path,
        "revision": source.revision,
        "weights_sha256": models.weights_hash(model),
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": str(first.device),
        "data": result.settings["data"],
        "seeds": result.settings["seeds"],
        "seconds": round(time.monotonic() - started, 2),
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": versions() | {"lm_eval": metadata.version("lm-eval")},
    }
