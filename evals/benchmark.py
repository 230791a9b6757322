"""Benchmarks: a model becomes numbers with a direction, an interval and per-row records."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Direction = Literal["lower", "higher", "none"]
Progress = Callable[[str, int, int], None]
Record = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """A mean over rows, what is wanted of it, and how sure it is.

    ``standard_error`` is that of the mean over the rows (sample deviation / sqrt(n)); None when
    there is one row. Both are NaN when the model gave a row no finite number. ``low`` and ``high``
    bound the 95 % bootstrap interval over rows, where it has been computed.
    """

    value: float
    direction: Direction
    standard_error: float | None
    n: int
    low: float | None = None
    high: float | None = None

    @classmethod
    def mean(cls, values: Sequence[float], direction: Direction) -> "Metric":
        """Average per-row values."""
        n = len(values)
        mean = math.fsum(values) / n
        if n < 2:
            return cls(mean, direction, None, n)
        variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
        return cls(mean, direction, math.sqrt(variance / n), n)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values; what is not a finite number becomes null."""
        return {
            "value": _finite(self.value),
            "standard_error": _finite(self.standard_error),
            "low": _finite(self.low),
            "high": _finite(self.high),
            "n": self.n,
            "direction": self.direction,
        }


@dataclass(frozen=True)
class Result:
    """What a benchmark found: metrics, one record per example, and how it was run."""

    benchmark: str
    version: str
    metrics: dict[str, Metric]
    records: list[Record]
    settings: dict[str, Any] = field(default_factory=dict)

    def values(self) -> dict[str, float | None]:
        """Give the bare numbers, null where there is none."""
        return {name: _finite(metric.value) for name, metric in self.metrics.items()}

    @classmethod
    def joined(cls, results: Sequence["Result"]) -> "Result":
        """Put the results of several benchmarks on one model together; settings stay apart."""
        if len(results) == 1:
            return results[0]
        return cls(
            "+".join(result.benchmark for result in results),
            "+".join(result.version for result in results),
            {name: metric for result in results for name, metric in result.metrics.items()},
            [record for result in results for record in result.records],
            {result.benchmark: result.settings for result in results},
        )

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Result":
        """Read back what :meth:`to_dict` gave; null becomes NaN."""
        metrics = {
            name: Metric(**{**metric, "value": _nan(metric["value"])})
            for name, metric in stored["metrics"].items()
        }
        return cls(
            stored["benchmark"], stored["version"], metrics, stored["records"], stored["settings"]
        )

    def to_dict(self) -> dict[str, Any]:
        """Give everything as JSON knows it."""
        return {
            "benchmark": self.benchmark,
            "version": self.version,
            "settings": self.settings,
            "metrics": {name: metric.to_dict() for name, metric in self.metrics.items()},
            "records": [{key: _finite(value) for key, value in r.items()} for r in self.records],
        }


def told(result: Result, model: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Give one object about one model: what an evaluation prints with ``--json``."""
    return {
        "benchmark": result.benchmark,
        "model": model,
        "metrics": result.values(),
        "details": {name: metric.to_dict() for name, metric in result.metrics.items()},
        "settings": result.settings,
        "warnings": result.settings["notes"],
        "provenance": dict(provenance),
    }


def as_results(told: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Give the same as the folder's ``results.json`` has it: what the report reads."""
    return {
        **told,
        "status": "complete",
        "method": "",
        "run": str(folder),
        "report": str(folder / "report.html"),
        "metrics": {"after": told["metrics"]},
        "details": {"after": told["details"]},
        "examples": [],
        "training": {},
    }


class Benchmark(Protocol):
    """Anything that turns a model into numbers."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str:
        """Raised whenever the same model could get other numbers."""
        ...

    def run(
        self,
        model: Any,
        tokenizer: Any,
        *,
        progress: Progress = ...,
        weights_hash: str | None = ...,
    ) -> Result:
        """Measure a model; with the hash of its weights, results may be kept and found again."""
        ...


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _finite(value: Any) -> Any:
    """Turn NaN and infinities, which JSON does not know, into None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
