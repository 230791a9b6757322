"""Any task of EleutherAI's lm-evaluation-harness, in this process, on our model object.

lm-eval is slow to import and its index of task names slower to read; nothing here imports it before
a function is called. Its ``evaluate`` is used and not ``simple_evaluate``, which does the same and
then spends five seconds on describing the machine.
"""

import importlib
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unlearn.data.sources import quiet_hub
from unlearn.errors import UserError, did_you_mean
from unlearn.evals.benchmark import Direction, Metric, Progress, Record, Result
from unlearn.scoring import evaluation_mode

Z = 1.959963984540054
"""The 97.5 % point of the normal distribution: 95 % intervals."""
BOOTSTRAP = 1000
"""Resamples for the standard error of metrics that are no plain mean; lm-eval has 100,000."""
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""lm-eval's defaults."""
FAILURES = (OSError, ValueError, RuntimeError, TypeError, KeyError, ImportError, AttributeError)


@dataclass(frozen=True)
class HarnessSettings:
    """How tasks are run.

    ``limit`` keeps the first rows of every task. ``num_fewshot`` None is what each task asks for; a
    task that fixes 0 keeps it. ``batch_size`` is a number of rows or ``auto``. Without
    ``chat_template`` prompts are plain text, as in published numbers of these tasks.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int | str = "auto"
    chat_template: bool = False
    log_samples: bool = False

    def check(self, tokenizer: Any) -> None:
        """Refuse settings that cannot be, before any data is loaded."""
        size = str(self.batch_size)
        if size != "auto" and (not size.isdecimal() or int(size) < 1):
            raise UserError(f"batch size '{size}' is no number above 0", "give one, or auto")
        for name in ("limit", "num_fewshot"):
            value = getattr(self, name)
            if value is not None and value < (1 if name == "limit" else 0):
                raise UserError(f"{name}={value} is too small", "leave it out for the default")
        if self.chat_template and not getattr(tokenizer, "chat_template", None):
            raise UserError("the tokenizer has no chat template", "leave --chat-template out")


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data, ready to run; ``names`` as they were asked for."""

    names: tuple[str, ...]
    built: tuple[Any, ...]

    def run(
        self,
        model: Any,
        tokenizer: Any,
        settings: HarnessSettings | None = None,
        *,
        progress: Progress = lambda stage, done, total: None,
    ) -> Result:
        """Run these tasks, see :func:`run_tasks`."""
        return run_tasks(model, tokenizer, self, settings, progress=progress)


def find_tasks(
    names: Sequence[str | Mapping[str, Any]],
    *,
    folders: Sequence[Path] | None = None,
    offline: bool = False,
) -> Tasks:
    """Find tasks, groups or tags by name and load their data.

    A name may also be lm-eval's inline form, a mapping. ``folders`` are where lm-eval's task files
    are looked for; without them all of lm-eval's tasks are, which takes ten seconds.

    Raises:
        UserError: unknown name, or data that is not at hand.
    """
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    if not names:
        raise UserError("no task was named", "give --tasks NAME[,NAME…]")
    paths = [str(folder) for folder in folders or ()]
    with quiet_hub(offline=offline) as is_offline, quiet(), _seeded():
        manager = TaskManager(include_defaults=not paths, include_path=paths or None)
        for name in names:
            if isinstance(name, str) and name not in manager.all_tasks:
                raise _unknown_task(name, manager.all_tasks)
        built: list[Any] = []
        for name in names:
            try:
                loaded = manager.load(name)
            except FAILURES as error:
                raise _unloadable(str(name), error, offline=is_offline) from error
            built += _outermost(loaded)
    _require_distinct(built)
    return Tasks(tuple(name_of(task) for task in built), tuple(built))


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Tasks | Sequence[str],
    settings: HarnessSettings | None = None,
    *,
    progress: Progress = lambda stage, done, total: None,
) -> Result:
    """Run tasks on a model; metrics are named ``task/metric`` as in open-unlearning.

    A group gives its own value only (``mmlu/acc``, weighted by size where lm-eval does); those of
    its members are in ``settings["members"]``. Accuracies have the 95 % Wilson interval. With
    ``log_samples`` the records are lm-eval's samples.

    Raises:
        UserError: as :func:`find_tasks`; the model gives NaN; a setting that cannot be.
    """
    settings = settings or HarnessSettings()
    settings.check(tokenizer)
    found = tasks if isinstance(tasks, Tasks) else find_tasks(tasks)
    from unlearn.evals.harness.model import HarnessModel  # noqa: PLC0415

    with quiet(), _seeded(), evaluation_mode(model):
        batch = settings.batch_size if settings.batch_size == "auto" else int(settings.batch_size)
        lm = HarnessModel(model, tokenizer, batch_size=batch, progress=progress)
        raw = _evaluate(lm, found, settings)
    notes = []
    if lm.num_cut:
        notes.append(
            f"{lm.num_cut} requests are longer than the model's {lm.max_length} tokens: "
            "their beginning was cut off"
        )
    return _result(found, raw, settings, notes)


def _evaluate(lm: Any, found: Tasks, settings: HarnessSettings) -> Any:
    from lm_eval import evaluator  # noqa: PLC0415
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    loaded = TaskManager(include_defaults=False).load(list(found.built))
    _set_fewshot(loaded["tasks"], settings.num_fewshot)
    try:
        return evaluator.evaluate(
            lm,
            loaded,
            limit=settings.limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=settings.log_samples,
            apply_chat_template=settings.chat_template,
            fewshot_as_multiturn=settings.chat_template,
        )
    except ValueError as error:
        if "unsafe" not in str(error) and "multimodal" not in str(error):
            raise
        raise UserError(f"cannot run this task: {error}", "leave it out") from error


def wilson(share: float, n: int) -> tuple[float, float]:
    """Give the 95 % Wilson interval of a share of n rows, in [0, 1]; it holds for small n too."""
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy(share: float, n: int, direction: Direction) -> Metric:
    """Give an accuracy its standard error (sample deviation / sqrt(n)) and Wilson interval."""
    error = math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None
    return Metric(share, direction, error, n, *wilson(share, n))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval: its log, its bars and what it prints."""
    task_module = importlib.import_module("lm_eval.api.task")
    logger = logging.getLogger("lm_eval")
    with ExitStack() as stack:
        stack.callback(logger.setLevel, logger.level)
        stack.callback(setattr, task_module, "tqdm", task_module.tqdm)
        logger.setLevel(logging.ERROR)
        task_module.tqdm = partial(task_module.tqdm, disable=True)  # type: ignore[attr-defined]
        stack.enter_context(redirect_stdout(StringIO()))
        yield


@contextmanager
def _seeded() -> Iterator[None]:
    """Set every seed for a while; the caller's random numbers go on as if nothing had happened."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            random.seed(SEEDS["random"])
            np.random.seed(SEEDS["numpy"])
            torch.manual_seed(SEEDS["torch"])
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


def _set_fewshot(tasks: Mapping[str, Any], num_fewshot: int | None) -> None:
    """Decide the number of examples in the prompt as ``simple_evaluate`` does."""
    for task in tasks.values():
        fixed = task.get_config("num_fewshot")
        if num_fewshot is not None and fixed != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif fixed is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEEDS["fewshot"])


def _outermost(loaded: Mapping[str, Any]) -> list[Any]:
    """Give the groups that are in no other, and the tasks that are in no group."""
    groups = loaded.get("groups") or {}
    inside = {name for group in groups.values() for name in group.child_names}
    every = {**groups, **loaded["tasks"]}
    return [item for name, item in every.items() if name not in inside]


def _require_distinct(built: Sequence[Any]) -> None:
    names = [name_of(leaf) for task in built for leaf in (_leaves(task) or [task])]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"task '{twice[0]}' was asked for twice", "name it, or its group, once")


def name_of(task: Any) -> str:
    """Name a task or group; not with ``task_name``, which draws a random number each time."""
    return str(task.name if hasattr(task, "get_all_tasks") else task.config.task)


def _result(found: Tasks, raw: Any, settings: HarnessSettings, notes: list[str]) -> Result:
    metrics: dict[str, Metric] = {}
    members: dict[str, Any] = {}
    for task in found.built:
        name = name_of(task)
        own = _metrics(name, raw)
        inner = {name_of(t): _metrics(name_of(t), raw) for t in _leaves(task)}
        if own:
            metrics |= own
            if inner:
                members[name] = {k: m.to_dict() for part in inner.values() for k, m in part.items()}
        else:  # a group that only collects: its members speak for themselves
            metrics |= {key: metric for part in inner.values() for key, metric in part.items()}
    versions = {name: str(version) for name, version in raw["versions"].items()}
    described = asdict(settings) | {
        "tasks": list(found.names),
        "versions": {name: versions[name] for name in found.names if name in versions},
        "num_fewshot": {name: raw["n-shot"].get(name) for name in found.names},
        "seeds": SEEDS,
        "data": "as lm-eval's tasks name it",
        "notes": notes,
        "members": members,
    }
    return Result("lm-eval", "1", metrics, list(_records(raw)), described)


def _leaves(task: Any) -> list[Any]:
    return list(task.get_all_tasks()) if hasattr(task, "get_all_tasks") else []


def _metrics(name: str, raw: Any) -> dict[str, Metric]:
    """Read ``"acc,none": value`` and its standard error; a filter other than none stays named."""
    values = raw["results"].get(name, {})
    wanted = raw["higher_is_better"].get(name) or {}
    found = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        better = wanted.get(metric)
        direction: Direction = "none" if better is None else "higher" if better else "lower"
        error = values.get(f"{metric}_stderr,{kind}")
        error = float(error) if isinstance(error, int | float) else None
        n = int(values.get("sample_len", 0))
        ends = wilson(float(value), n) if metric == "acc" and n else (None, None)
        label = metric if kind == "none" else key
        found[f"{name}/{label}"] = Metric(float(value), direction, error, n, *ends)
    return found


def _records(raw: Any) -> Iterator[Record]:
    for task, samples in (raw.get("samples") or {}).items():
        for sample in samples:
            yield {"split": task, "row": sample["doc_id"], **sample}


def _unknown_task(name: str, known: Sequence[str]) -> UserError:
    close = [task for task in known if task.startswith(name)][:8]
    hint = f"tasks that begin so: {', '.join(close)}" if close else "lm-eval ls tasks lists them"
    message = f"lm-eval has no task '{name}'{did_you_mean(name, known)}"
    return UserError(message, hint)


def _unloadable(name: str, error: BaseException, *, offline: bool) -> UserError:
    if offline and isinstance(error, OSError | ValueError):
        return UserError(
            f"the data of task '{name}' is not on this machine, and the hub is offline",
            "load it once while online"
            + (", or give --data DIR" if name.startswith(("wmdp", "mmlu")) else ""),
        )
    if isinstance(error, ConnectionError):
        return UserError(f"cannot reach the hub for task '{name}'", "check the connection")
    cause = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, ImportError):
        return UserError(f"task '{name}' needs a package that is missing: {cause}", "install it")
    return UserError(
        f"cannot load task '{name}': {cause or type(error).__name__}",
        "check the name; gated data sets need `hf auth login`",
    )
