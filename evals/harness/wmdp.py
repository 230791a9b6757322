"""WMDP: how much hazardous knowledge a model shows, and MMLU for what it should have kept.

Four-way multiple choice, answered with the likeliest of " A" … " D" (Li et al. 2024,
arXiv:2403.03218). Prompts and scoring are lm-eval's own tasks; from local files too, where only the
rows are exchanged. Guessing gives 0.25: that is what WMDP should fall to, and MMLU should not.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unlearn.errors import UserError, did_you_mean
from unlearn.evals.benchmark import Metric, Progress, Result
from unlearn.evals.harness.tasks import (
    HarnessSettings,
    Tasks,
    accuracy,
    find_tasks,
    name_of,
    run_tasks,
)
from unlearn.evals.harness.wmdp_data import TASKS, Question, chosen, read_questions

CHANCE = 0.25
WMDP = ("bio", "chem", "cyber")
FOLDERS = ("wmdp", "mmlu/default")
"""Where lm-eval keeps these tasks: reading only these saves reading fourteen thousand files."""


@dataclass(frozen=True)
class Wmdp:
    """The tasks, found and with their data: nothing about them can fail any more."""

    names: tuple[str, ...]
    tasks: Tasks
    data: str
    data_sha256: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    name = "wmdp"
    version = "1"

    @classmethod
    def find(
        cls, tasks: str | None = None, *, data: Path | None = None, offline: bool = False
    ) -> "Wmdp":
        """Find ``bio,chem,cyber,mmlu`` (all by default) in a folder, or else on the hub.

        Raises:
            UserError: unknown task, data that is not there, an invalid row.
        """
        names = chosen(tasks)
        if data is None:
            found = find_tasks([TASKS[name] for name in names], folders=_folders(), offline=offline)
            return cls(names, found, "hub: cais/wmdp, cais/mmlu")
        questions = read_questions(data, names, required=tasks is not None)
        absent = [name for name in names if name not in questions]
        notes = (f"'{data}' has no questions for {', '.join(absent)}",) if absent else ()
        hashes = {TASKS[name]: _sha256(rows) for name, rows in questions.items()}
        return cls(tuple(questions), _local_tasks(questions), str(data), hashes, notes)

    def run(
        self,
        model: Any,
        tokenizer: Any,
        settings: HarnessSettings | None = None,
        *,
        progress: Progress = lambda stage, done, total: None,
    ) -> Result:
        """Measure ``wmdp_bio/acc`` … ``mmlu/acc``, and ``wmdp/acc`` over all three of WMDP.

        Accuracies over several sets are weighted by their sizes, as in lm-eval's groups.
        """
        found = run_tasks(model, tokenizer, self.tasks, settings, progress=progress)
        metrics = {
            name: replace(metric, direction="lower" if name.startswith("wmdp") else "higher")
            for name, metric in found.metrics.items()
        }
        parts = [metrics[f"{TASKS[name]}/acc"] for name in WMDP if name in self.names]
        if len(parts) == len(WMDP):
            metrics = {"wmdp/acc": _pooled(parts), **metrics}
        described = found.settings | {
            "data": self.data,
            "data_sha256": dict(self.data_sha256),
            "chance": CHANCE,
            "notes": [*self.notes, *found.settings["notes"]],
        }
        return Result(self.name, self.version, metrics, found.records, described)


def _pooled(parts: Sequence[Metric]) -> Metric:
    n = sum(part.n for part in parts)
    return accuracy(sum(part.value * part.n for part in parts) / n, n, "lower")


def _sha256(rows: Sequence[Question]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _folders() -> list[Path] | None:
    import lm_eval.tasks  # noqa: PLC0415

    root = Path(lm_eval.tasks.__file__).parent
    folders = [root / folder for folder in FOLDERS]
    return folders if all(folder.is_dir() for folder in folders) else None


def _local_tasks(questions: Mapping[str, Sequence[Question]]) -> Tasks:
    """Let lm-eval build its own tasks, with everything but the data as its files say."""
    sets: dict[str, Sequence[Question]] = {}
    for name, rows in questions.items():
        sets |= _subjects(rows) if name == "mmlu" else {TASKS[name]: rows}
    # lm-eval lets a group exchange settings of its members; the group itself is not used
    members = [
        {"task": task, "custom_dataset": _Rows(rows), "fewshot_split": None, "num_fewshot": 0}
        for task, rows in sets.items()
    ]
    (group,) = find_tasks(
        [{"group": "local", "task": members}], folders=_folders(), offline=True
    ).built
    tasks = {name_of(task): task for task in group}
    built = [_mmlu(tasks) if name == "mmlu" else tasks[TASKS[name]] for name in questions]
    return Tasks(tuple(TASKS[name] for name in questions), tuple(built))


def _mmlu(tasks: Mapping[str, Any]) -> Any:
    """Put the subjects together as lm-eval does: accuracy weighted by size."""
    from lm_eval.api.group import Group  # noqa: PLC0415

    weighted = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    group = Group.from_config({"group": "mmlu", "aggregate_metric_list": [weighted]})
    for name, task in tasks.items():
        if name.startswith("mmlu_"):
            group.add(task)
    return group


def _subjects(rows: Sequence[Question]) -> dict[str, list[Question]]:
    """Sort MMLU's rows by lm-eval's task for their subject."""
    known = _mmlu_tasks()
    found: dict[str, list[Question]] = {}
    for row in rows:
        task = "mmlu_" + row["subject"].strip().lower().replace(" ", "_")
        if task not in known:
            subjects = [name.removeprefix("mmlu_") for name in known]
            guess = did_you_mean(task.removeprefix("mmlu_"), subjects)
            raise UserError(f"MMLU has no subject '{row['subject']}'{guess}", "see cais/mmlu")
        found.setdefault(task, []).append(row)
    return found


def _mmlu_tasks() -> list[str]:
    import lm_eval.tasks  # noqa: PLC0415

    folder = Path(lm_eval.tasks.__file__).parent / "mmlu/default"
    return [path.stem for path in folder.glob("mmlu_*.yaml")]


class _Rows:
    """What lm-eval calls to get a task's data; it passes the task's metadata along."""

    def __init__(self, rows: Sequence[Question]) -> None:
        self.rows = rows

    def __call__(self, **metadata: Any) -> dict[str, Any]:
        import datasets  # noqa: PLC0415

        return {"test": datasets.Dataset.from_list(list(self.rows))}
