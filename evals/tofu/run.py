"""``unlearn eval tofu`` as a function: load, check, evaluate, compare, write down.

Everything that can be wrong with the input is found before weights are loaded.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from unlearn import models
from unlearn.data import pad_token_id
from unlearn.errors import RunFailed, UserError
from unlearn.evals.benchmark import Metric, Record, Result
from unlearn.evals.fluency import perplexity
from unlearn.evals.leakage import leakage
from unlearn.evals.report.write import strict, write_report
from unlearn.evals.side_by_side import side_by_side
from unlearn.evals.statistics import RetainSide, forget_ratios, mean_with_interval, with_interval
from unlearn.evals.tofu.benchmark import Tofu, TofuOptions
from unlearn.evals.tofu.compare import check_rows, compare_with_retain
from unlearn.evals.tofu.data import encode_answered, max_tokens
from unlearn.evals.tofu.logs import read_retain_logs, retain_side, write_logs
from unlearn.monitors import peak_memory_bytes
from unlearn.runs import RunFolder, command_line, versions, write_atomic, write_json

Emit = Callable[[dict[str, Any]], None]
MEASURING = ("scipy", "rouge-score")
"""Packages that can change a number here, besides those of every run."""
WHO = {"model": "after", "retain_model": "retain_model"}
"""Name of a model here -> its name in results.json, where a run also has ``before``."""


@dataclass(frozen=True)
class TofuRequest:
    """Which model is evaluated, how, and what it is compared with (at most one of the two)."""

    model: models.ModelSource
    options: TofuOptions = field(default_factory=TofuOptions)
    retain_model: str | None = None
    retain_logs: Path | None = None

    @property
    def retain_source(self) -> models.ModelSource | None:
        """Give the retain model, loaded as the model is: only then are numbers comparable."""
        if self.retain_model is None:
            return None
        return replace(self.model, path=self.retain_model, revision=None)


@dataclass(frozen=True)
class Evaluation:
    """What was found: by model name (``model``, ``retain_model``) the result and its origin."""

    request: TofuRequest
    results: dict[str, Result]
    provenance: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Give one object about the model: what ``unlearn eval tofu --json`` prints.

        ``metrics`` and ``details`` are the evaluated model's own; those of the retain model are
        under ``retain_model``.
        """
        model, other = self.results["model"], self.results.get("retain_model")
        mine = model.values()
        return {
            "benchmark": "tofu",
            "model": self.request.model.path,
            "metrics": mine,
            "details": _details(model),
            "retain_model": other and {"metrics": other.values(), "details": _details(other)},
            "forget_quality": _quality(mine),
            "model_utility": mine.get("model_utility"),
            "settings": self.settings,
            "warnings": self.warnings,
            "provenance": self.provenance,
        }

    def to_results(self, folder: Path | None = None) -> dict[str, Any]:
        """Give the same as ``results.json`` has it, by model: what the report reads.

        The evaluated model is called ``after`` there, as in a run.
        """
        found = {WHO[who]: result for who, result in self.results.items()}
        return {
            "status": "complete",
            "method": "",
            "benchmark": "tofu",
            "model": self.request.model.path,
            "run": str(folder) if folder else "",
            "report": str(folder / "report.html") if folder else "",
            "metrics": {who: result.values() for who, result in found.items()},
            "details": {who: _details(result) for who, result in found.items()},
            "forget_quality": _quality(self.results["model"].values()),
            "examples": side_by_side({w: {"records": r.records} for w, r in found.items()}),
            "training": {},
            "truth_ratios": {who: forget_ratios(r.records) for who, r in found.items()},
            "leakage": {who: leakage(result.records) for who, result in found.items()},
            "settings": self.settings,
            "warnings": self.warnings,
            "provenance": self.provenance,
        }

    @property
    def settings(self) -> dict[str, Any]:
        """Say how the benchmark was run."""
        return self.results["model"].settings

    @property
    def warnings(self) -> list[str]:
        """Say what was left out and why, and what limits a comparison."""
        found = list(self.settings.get("notes", ()))
        for block, count in self.settings["n_skipped"].items():
            if count:
                found.append(f"{count} rows of block '{block}' have no answer tokens: skipped")
        if len(self.results) == 1 and "forget_quality" not in self.results["model"].metrics:
            found.append(
                "no forget quality: it compares with a retain model; give --retain-model or "
                "--retain-logs"
            )
        return found

    def write(self, folder: Path) -> dict[str, Any]:
        """Write every file of an evaluation; ``results.json`` last. Returns its content."""
        results = strict(self.to_results(folder))
        write_json(folder / "RUN.json", {k: results[k] for k in ("provenance", "settings")})
        for who, result in self.results.items():
            name = "records.jsonl" if who == "model" else f"records_{who}.jsonl"
            write_atomic(folder / name, "".join(map(_line, result.records)))
        write_logs(self.results["model"], folder)
        write_report(folder, results)
        write_json(folder / "results.json", results)
        return dict(results)


def evaluate_tofu(
    request: TofuRequest, *, out: Path | None = None, emit: Emit = lambda event: None
) -> dict[str, Any]:
    """Evaluate and give the content of ``results.json``; with ``out`` all files are written."""
    evaluation = measure_tofu(request, out=out, emit=emit)
    return evaluation.to_results(out) if out is None else evaluation.write(out)


def measure_tofu(
    request: TofuRequest, *, out: Path | None = None, emit: Emit = lambda event: None
) -> Evaluation:
    """Evaluate a model on TOFU and, if there is one, the retain model; compare the two.

    The models are loaded one after the other. ``out`` is only checked here.

    Raises:
        UserError: whatever is wrong with models, data, logs or options, before weights are loaded;
            a model gives no finite numbers.
        RunFailed: the GPU's memory runs out.
    """
    started = time.monotonic()
    benchmark, tokenizer, side = _prepare(request, out)
    measured = _Measured(benchmark, tokenizer, emit, [], {})
    results = {"model": measured.run(request.model, "model")}
    if request.retain_source is not None:
        results["retain_model"] = measured.run(request.retain_source, "retain_model")
        side = replace(retain_side(results["retain_model"]), source=request.retain_source.path)
    if side is not None:
        retain = results.get("retain_model")
        results["model"] = compare_with_retain(results["model"], side, retain)
        if retain is not None:
            results["retain_model"] = compare_with_retain(retain, side, None)
    for who, losses in measured.judged.items():
        results[who] = _with_perplexity(results[who], losses)
    provenance = _provenance(request, results["model"], measured.sources, started)
    return Evaluation(request, results, provenance)


def _prepare(request: TofuRequest, out: Path | None) -> tuple[Tofu, Any, RetainSide | None]:
    """Check and read everything but the weights."""
    if request.retain_model and request.retain_logs:
        raise UserError("a retain model and retain logs were given", "give one of the two")
    if out is not None and out.exists():
        RunFolder.create(out)  # refuses one that has something in it
    retain = request.retain_source
    sources = [request.model, *([retain] if retain else [])]
    for source in sources:
        models.check_source(source)
        models.check_memory(source)
        models.check_finite_weights(source)
    options = request.options
    side = None
    if request.retain_logs:
        side = read_retain_logs(request.retain_logs, truth_ratio=options.truth_ratio)
    benchmark = Tofu.load(options, offline=request.model.offline)
    if side is not None:
        rows, given = len(benchmark.blocks["forget"]), benchmark.given["forget"]
        check_rows(side, evaluated=rows, given=given, split=options.split)
    tokenizer = models.load_tokenizer(request.model)
    sheet = benchmark.prepare(tokenizer)
    models.check_vocabulary(request.model, sheet.tokens() | {pad_token_id(tokenizer)})
    if retain is not None:
        models.check_same_tokenizer(tokenizer, retain, sheet.tokens())
    return benchmark, tokenizer, side


@dataclass
class _Measured:
    """One model after the other on the same benchmark; ``judged``: losses of what they wrote."""

    benchmark: Tofu
    tokenizer: Any
    emit: Emit
    sources: list[dict[str, Any]]
    judged: dict[str, list[float]]
    texts: dict[str, list[Record]] = field(default_factory=dict)

    def run(self, source: models.ModelSource, who: str) -> Result:
        self.emit({"event": "stage", "stage": "load", "name": source.path})
        started = time.monotonic()
        with _naming_lack_of_memory(self.benchmark.options.batch_tokens):
            model = models.load_model(source)
            self.emit({"event": "stage", "stage": "benchmark", "name": source.path})
            digest = models.weights_hash(model)
            result = self.benchmark.run(
                model, self.tokenizer, progress=self._progress, weights_hash=digest
            )
            self.texts[who] = result.records
            if who == "retain_model":
                self._judge(model, digest)
        self.sources.append(
            {
                "who": who,
                "path": source.path,
                "revision": source.revision,
                "weights_sha256": digest,
                "parameters": sum(tensor.numel() for tensor in model.parameters()),
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
                "device": str(next(model.parameters()).device),
                "seconds": round(time.monotonic() - started, 2),
            }
        )
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return result

    def _judge(self, model: Any, weights_hash: str) -> None:
        """Score what every model wrote about the forget set, under the retain model."""
        for who, records in self.texts.items():
            evaluator = self.benchmark.evaluator(model, self.tokenizer, weights_hash=weights_hash)
            pairs = [
                {"question": record["question"], "answer": record["generation"]}
                for record in records
                if record["split"] == "forget" and (record.get("generation") or "").strip()
            ]
            if not pairs:
                continue
            examples = encode_answered(
                pairs,
                self.tokenizer,
                self.benchmark.template(self.tokenizer),
                max_length=max_tokens(self.tokenizer),
                source="the written answers",
            )
            scores = evaluator.score(
                examples, progress=lambda done, total: self._progress("judging", done, total)
            )
            self.judged[who] = (-scores.sequence / scores.num_tokens).tolist()

    def _progress(self, stage: str, done: int, total: int) -> None:
        self.emit({"event": "progress", "what": stage, "done": done, "total": total})


@contextmanager
def _naming_lack_of_memory(batch_tokens: int) -> Iterator[None]:
    """Say what to lower when memory runs out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunFailed(
            "the GPU is out of memory",
            f"lower --batch-tokens (it is {batch_tokens}), or free memory: see `nvidia-smi`",
        ) from error


def _with_perplexity(result: Result, losses: Sequence[float]) -> Result:
    """Add the perplexity, under the retain model, of the answers to the forget set's questions."""
    mean = Metric.mean(losses, "lower")
    metric = mean_with_interval(mean, losses, seed=int(result.settings.get("seed", 0)))
    found = Metric(perplexity(losses), "lower", None, mean.n)
    if metric.low is not None and metric.high is not None:
        found = with_interval(found, (math.exp(metric.low), math.exp(metric.high)))
    return replace(result, metrics={**result.metrics, "forget_perplexity": found})


def _provenance(
    request: TofuRequest, result: Result, sources: list[dict[str, Any]], started: float
) -> dict[str, Any]:
    mine = next(source for source in sources if source["who"] == "model")
    retain = next((source for source in sources if source["who"] == "retain_model"), None)
    settings = result.settings
    return {
        "command": command_line(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": mine["path"],
        "weights_sha256": mine["weights_sha256"],
        "dtype": mine["dtype"],
        "device": mine["device"],
        "models": sources,
        "retain": retain["path"] if retain else str(request.retain_logs or "") or None,
        "data": settings["data"],
        "data_sha256": settings["data_sha256"],
        "template": settings["template_fingerprint"],
        "compat": settings["compat"],
        "seed": settings["seed"],
        "tokens": settings["tokens"],
        "seconds": round(time.monotonic() - started, 2),
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": versions() | {name: metadata.version(name) for name in MEASURING},
    }


def _details(result: Result) -> dict[str, dict[str, Any]]:
    return {name: metric.to_dict() for name, metric in result.metrics.items()}


def _quality(values: Mapping[str, float | None]) -> dict[str, float | None] | None:
    if "forget_quality" not in values:
        return None
    return {
        "p": values["forget_quality"],
        "log10_p": values["forget_quality_log10_p"],
        "ks": values["forget_quality_ks"],
    }


def _line(record: Record) -> str:
    return json.dumps(strict(record), ensure_ascii=False, allow_nan=False) + "\n"
