"""``unlearn eval math`` as a function: check, sample, judge, sum up, write down."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unlearn import models
from unlearn.evals.benchmark import Result, as_results, told
from unlearn.evals.reasoning.benchmark import VERSION, MathProblems
from unlearn.evals.reasoning.completions import (
    Completion,
    Kept,
    Place,
    check_folder,
    kept,
    to_traces,
)
from unlearn.evals.reasoning.endpoint import Endpoint
from unlearn.evals.reasoning.options import MathOptions, check_writer
from unlearn.evals.reasoning.problems import (
    Prompt,
    chat_prompts,
    fingerprint,
    local_prompts,
    tokens_of,
)
from unlearn.evals.reasoning.sampling import sample
from unlearn.evals.reasoning.verify import judging
from unlearn.evals.report.reasoning import write_page
from unlearn.evals.report.write import strict
from unlearn.monitors import peak_memory_bytes
from unlearn.runs import command_line, versions, write_atomic, write_json

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class MathRequest:
    """Whom to ask what.

    ``model`` writes in this process; with an ``endpoint`` it gives only the tokenizer, so that the
    endpoint is sent the very tokens, and may be left out: then the endpoint's own chat template
    makes the prompts.
    """

    data: str
    model: models.ModelSource | None = None
    endpoint: Endpoint | None = None
    options: MathOptions = field(default_factory=MathOptions)
    max_rows: int | None = None

    @property
    def name(self) -> str:
        """Name the model that is measured."""
        if self.endpoint:
            return self.endpoint.model
        return self.model.path if self.model else ""

    @property
    def offline(self) -> bool:
        return bool(self.model and self.model.offline)

    def check(self) -> None:
        """Refuse what cannot be done, before anything is read.

        Raises:
            UserError: says what, and what to do.
        """
        self.options.check()
        model, endpoint = self.model is not None, self.endpoint is not None
        check_writer(model=model, endpoint=endpoint, offline=self.offline)
        if not model:
            self.options.check_untokenized()


@dataclass(frozen=True)
class MathEvaluation:
    """What was found about a model, and where the numbers come from."""

    request: MathRequest
    result: Result
    provenance: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Give one object: what ``--json`` prints."""
        return told(self.result, self.request.name, self.provenance)

    def to_results(self, folder: Path) -> dict[str, Any]:
        """Give the same as ``results.json`` has it: what the report reads."""
        return as_results(self.to_json(), folder)


def evaluate_math(
    request: MathRequest, *, out: Path | None = None, emit: Emit = lambda event: None
) -> MathEvaluation:
    """Sample, judge and sum up; with ``out`` write everything there as it comes.

    ``out`` gets ``completions.jsonl`` (a line per sample, as soon as it is written),
    ``traces.jsonl`` (a line per problem, for ``unlearn data pairs --verdict correct``),
    ``report.html`` and at last ``results.json``. A second call with the same settings goes on where
    the first stopped.

    Raises:
        UserError: whatever is wrong with the input; ``out`` holds samples of other settings.
        RunFailed: an endpoint does not answer.
    """
    started = time.monotonic()
    request.check()
    benchmark = MathProblems.load(
        request.data, request.options, max_rows=request.max_rows, offline=request.offline
    )
    prompts, tokenizer = _prompts(request, benchmark)
    asking = _Asking(request, benchmark, prompts, tokenizer, emit)
    with judging(request.options.verify) as judge:
        settings = asking.settings() | {"judge": judge.version}
        if out is not None:
            check_folder(out, settings)
        asking.get_ready()
        with kept(out, settings | asking.identity) as found:
            benchmark.fill(found, judge, asking.ask, tell=asking.tell)
            result = benchmark.result(found, judge)
            evaluation = MathEvaluation(request, result, _provenance(asking, result, started))
            if out is not None:
                _write(evaluation, benchmark, found, out)
    return evaluation


@dataclass
class _Asking:
    """The model or the endpoint; weights are loaded once, and before anything is written."""

    request: MathRequest
    benchmark: MathProblems
    prompts: Sequence[Prompt]
    tokenizer: Any
    emit: Emit
    model: Any = None
    identity: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Give all that decides a sample and is known without weights."""
        request = self.request
        asked = [[prompt.prefix, prompt.ids, prompt.messages] for prompt in self.prompts]
        return {
            "version": VERSION,
            "model": request.name,
            "written_by": "endpoint" if request.endpoint else "this process",  # it may move
            "dtype": request.model.dtype if request.model and not request.endpoint else None,
            **request.options.decisive(),
            "problems_sha256": fingerprint(self.benchmark.problems),
            "prompts_sha256": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        }

    def get_ready(self) -> None:
        """Load the weights, or ask the endpoint whether it is there."""
        if self.request.endpoint:
            self.request.endpoint.check()
            return
        assert self.request.model is not None
        self.emit({"event": "stage", "stage": "load", "name": self.request.name})
        self.model = models.load_model(self.request.model)
        self.identity = {"weights_sha256": models.weights_hash(self.model)}
        self.emit({"event": "stage", "stage": "benchmark", "name": self.request.name})

    def ask(self, places: Sequence[Place]) -> Iterable[list[Completion]]:
        prompts, options = self.benchmark.by_id(self.prompts), self.request.options
        if self.request.endpoint:
            return self.request.endpoint.sample(prompts, places, options)
        return sample(self.model, self.tokenizer, prompts, places, options)

    def tell(self, done: int, total: int) -> None:
        self.emit({"event": "progress", "what": "answering", "done": done, "total": total})


def _prompts(request: MathRequest, benchmark: MathProblems) -> tuple[list[Prompt], Any]:
    """Write the prompts; check them against model and tokenizer."""
    source = request.model
    if source is None:
        return chat_prompts(benchmark.problems, request.options), None
    if request.endpoint is None:
        models.check_source(source)
        models.check_memory(source)
    tokenizer = models.load_tokenizer(source)
    prompts = local_prompts(benchmark.problems, tokenizer, request.options)
    if request.endpoint is None:
        models.check_vocabulary(source, tokens_of(prompts, tokenizer))
    return prompts, tokenizer


def _write(evaluation: MathEvaluation, benchmark: MathProblems, found: Kept, folder: Path) -> None:
    """Write every file but the samples, which are there; ``results.json`` last."""
    results = strict(evaluation.to_results(folder))
    table = found.table(benchmark.problems, benchmark.options.n)
    traces = to_traces(benchmark.problems, table, benchmark.options.instruction)
    write_atomic(folder / "traces.jsonl", traces)
    write_page(folder, results, evaluation.result.records)
    write_json(folder / "results.json", results)


def _provenance(asking: _Asking, result: Result, started: float) -> dict[str, Any]:
    request = asking.request
    first = next(asking.model.parameters()) if asking.model is not None else None
    return {
        "command": command_line(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": request.name,
        "endpoint": request.endpoint.url if request.endpoint else None,
        **asking.identity,
        "dtype": str(first.dtype).removeprefix("torch.") if first is not None else None,
        "device": str(first.device) if first is not None else None,
        "data": request.data,
        "data_sha256": result.settings["data_sha256"],
        "judge": result.settings["judge"],
        "seed": request.options.seed,
        "seconds": round(time.monotonic() - started, 2),
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": versions(),
    }
