"""The leaderboard: runs side by side, seeds of one recipe as one row, and the Pareto front."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import t as student

from unlearn.errors import UserError, unknown
from unlearn.evals.report.comparable import require_comparable
from unlearn.evals.report.folders import Found
from unlearn.evals.report.identity import differing, identity
from unlearn.evals.report.pareto import Ranked, draw_front, pareto_front
from unlearn.evals.report.plots import Plot
from unlearn.evals.report.table import Row, table
from unlearn.evals.report.tradeoff import FORGETTING, UTILITY, Axis, Point, choose_axes

FORMAT = "unlearn comparison 1"
CONFIDENCE = 0.95
SHOWN = (*FORGETTING[:-3], "privleak", *UTILITY)
"""Metrics with a column of their own, besides the two axes."""

MOST_COLUMNS = 7
REFERENCES = {"before": "starting model", "retain_model": "retain model"}
LONG = 28
"""Characters of a setting that are shown in the name of a row."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; ``low`` and ``high`` bound its 95 % t interval, None for one seed."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ in the seed only, or a single evaluation."""

    name: str
    members: list[Found]
    rows: list[dict[str, Row]]

    def estimate(self, metric: str, who: str = "after") -> Estimate | None:
        """Average a metric over the members; None unless every member has it."""
        cells = [rows[metric].cell(who) if metric in rows else None for rows in self.rows]
        values = [cell.value for cell in cells if cell and cell.value is not None]
        return t_interval(values) if values and len(values) == len(cells) else None


def t_interval(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Estimate:
    """Give mean and Student's t interval of values from independent seeds."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Estimate(mean, None, None, n)
    error = statistics.stdev(values) / math.sqrt(n)
    half = float(student.ppf((1 + confidence) / 2, n - 1)) * error
    return Estimate(mean, mean - half, mean + half, n)


def compare(
    found: Sequence[Found], *, x: str | None = None, y: str | None = None
) -> dict[str, Any]:
    """Rank runs by forgetting and utility; everything the pages say, as JSON knows it.

    Rows on the front come first, then the others, each from the most to the least forgetting.

    Raises:
        UserError: the runs have no such metrics in common, or other forget sets.
    """
    tables = [{row.name: row for row in table(one.results)} for one in found]
    axes = _axes(found, tables, x, y)
    warnings = require_comparable(found, tables, [axis.metric for axis in axes])
    groups = grouped(found, tables)
    rows = _ranked(groups, axes)
    metrics = _columns(tables, axes)
    return {
        "format": FORMAT,
        "headline": _headline(rows, axes),
        "reading": _reading(groups),
        "x": asdict(axes[0]),
        "y": asdict(axes[1]),
        "metrics": [_heading(name, tables) for name in metrics],
        "rows": [
            _described(place, group, front, metrics)
            for place, (group, front) in enumerate(rows, start=1)
        ],
        "references": list(references(groups, metrics)),
        "warnings": [*warnings, *_repeated(groups)],
    }


def _headline(rows: Sequence[tuple[Group, bool]], axes: tuple[Axis, Axis]) -> str:
    on_front = [group.name for group, front in rows if front]
    runs = sum(len(group.members) for group, _ in rows)
    x, y = (f"{axis.metric} ({axis.direction} is better)" for axis in axes)
    return (
        f"{runs} runs in {len(rows)} row{'s' * (len(rows) > 1)}, compared by {x} and {y}. "
        f"On the Pareto front: {', '.join(on_front) or 'none'}."
    )


def _reading(groups: Sequence[Group]) -> list[str]:
    text = (
        "The front is drawn from the means. It ranks these runs on these rows and says nothing "
        "about attacks that were not tried. To give a forgotten answer less than the retain model "
        "does is not better, only further away."
    )
    if any(len(group.members) > 1 for group in groups):
        return [
            "Runs whose recipes differ in the seed only are one row: their mean, and below it the "
            "95 % t interval over seeds. A row of one seed has no interval: how much another seed "
            "would change it is not known.",
            text,
        ]
    return ["Every row is one seed: how much another seed would change it is not known.", text]


def draw_comparison(comparison: Mapping[str, Any]) -> Plot | None:
    """Draw the leaderboard; None when no row has both metrics."""
    x, y = Axis(**comparison["x"]), Axis(**comparison["y"])
    ranked = []
    for row in comparison["rows"]:
        across, up = row["values"][x.metric], row["values"][y.metric]
        if across and up:
            point = Point(across["mean"], up["mean"], str(row["place"]))
            ranked.append(Ranked(point, row["front"], _bounds(across), _bounds(up)))
    if not ranked:
        return None
    points: dict[str, list[Point]] = {}
    for row in comparison["references"]:
        across, up = row["values"][x.metric], row["values"][y.metric]
        if across and up:
            point = Point(across["mean"], up["mean"], row["name"])
            points.setdefault(row["who"], []).append(point)
    return draw_front(ranked, points, x, y)


def _bounds(estimate: Mapping[str, Any]) -> tuple[float, float] | None:
    low, high = estimate["low"], estimate["high"]
    return None if low is None or high is None else (low, high)


def _axes(
    found: Sequence[Found],
    tables: Sequence[Mapping[str, Row]],
    x: str | None,
    y: str | None,
) -> tuple[Axis, Axis]:
    directions = {name: row.direction for rows in tables for name, row in rows.items()}
    common = [name for name in directions if all(_has(rows, name) for rows in tables)]
    for option, name in (("--x", x), ("--y", y)):
        if name is None:
            continue
        if name not in common:
            raise unknown(f"metric for {option}:", name, common)
        if directions[name] == "none":
            hint = f"one of {', '.join(n for n in common if directions[n] != 'none')}"
            raise UserError(f"nothing is wanted of '{name}', so it ranks nothing", hint)
    axes = choose_axes(lambda name: name in common, directions, x, y)
    if axes is None:
        had = ([name for name in rows if _has(rows, name)] for rows in tables)
        each = "; ".join(f"{one.name}: {_listed(n)}" for one, n in zip(found, had, strict=True))
        message = f"the runs have no metrics of forgetting and of utility in common ({each})"
        raise UserError(message, "name them with --x and --y, or leave a run out")
    return axes


def _has(rows: Mapping[str, Row], name: str) -> bool:
    return name in rows and rows[name].after is not None


def _listed(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(names[:most]) or "none"
    return f"{shown}, …" if len(names) > most else shown


def _columns(tables: Sequence[Mapping[str, Row]], axes: tuple[Axis, Axis]) -> list[str]:
    first = [axis.metric for axis in axes]
    more = [name for name in SHOWN if any(_has(rows, name) for rows in tables)]
    return list(dict.fromkeys([*first, *more]))[:MOST_COLUMNS]


def _heading(name: str, tables: Sequence[Mapping[str, Row]]) -> dict[str, str]:
    row = next(rows[name] for rows in tables if name in rows)
    return {"name": name, "title": row.title, "set": row.split, "direction": row.direction}


def grouped(found: Sequence[Found], tables: Sequence[dict[str, Row]]) -> list[Group]:
    """Put runs together whose recipes differ in the seed only."""
    together: dict[str, list[int]] = {}
    for place, one in enumerate(found):
        settings = identity(one)
        key = repr(sorted(settings.items())) if settings else f"folder {one.folder.resolve()}"
        together.setdefault(key, []).append(place)
    members = [[found[place] for place in places] for places in together.values()]
    names = _names([runs[0] for runs in members])
    return [
        Group(name, runs, [tables[place] for place in places])
        for name, runs, places in zip(names, members, together.values(), strict=True)
    ]


def _names(runs: Sequence[Found]) -> list[str]:
    """Name rows by method; where one method has several, by the settings they differ in too."""
    names = []
    for run in runs:
        method = _method(run)
        rivals = [identity(other) for other in runs if _method(other) == method]
        own = identity(run)
        said = [f"{key.rpartition('.')[2]} {_short(own.get(key))}" for key in differing(rivals)]
        names.append(", ".join([method, *said]))
    return [
        name if names.count(name) == 1 else f"{name} ({run.name})"
        for name, run in zip(names, runs, strict=True)
    ]


def _short(setting: object) -> str:
    text = "default" if setting is None else str(setting)
    return text if len(text) <= LONG else f"…{text[1 - LONG :]}"


def _method(run: Found) -> str:
    return str(run.results.get("method") or run.name)


def _ranked(groups: Sequence[Group], axes: tuple[Axis, Axis]) -> list[tuple[Group, bool]]:
    points = [
        [estimate.mean if (estimate := group.estimate(axis.metric)) else math.nan for axis in axes]
        for group in groups
    ]
    front = pareto_front(points, [axis.direction for axis in axes])
    sign = 1.0 if axes[0].direction == "lower" else -1.0

    def place(number: int) -> tuple[bool, bool, float]:
        value = points[number][0]
        return not front[number], math.isnan(value), 0.0 if math.isnan(value) else sign * value

    return [(groups[number], front[number]) for number in sorted(range(len(groups)), key=place)]


def _described(place: int, group: Group, front: bool, metrics: Sequence[str]) -> dict[str, Any]:
    return {
        "place": place,
        "name": group.name,
        "n": len(group.members),
        "runs": [str(member.folder) for member in group.members],
        "seeds": [_seed(member) for member in group.members],
        "front": front,
        "values": {name: _plain(group.estimate(name)) for name in metrics},
    }


def _seed(found: Found) -> int | None:
    seed = str((found.recipe or {}).get("seed", ""))
    return int(seed) if seed.isdecimal() else None


def _plain(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else asdict(estimate)


def references(groups: Sequence[Group], metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Give starting and retain models, each distinct one once."""
    for who, name in REFERENCES.items():
        seen: list[dict[str, Any]] = []
        for rows in (rows for group in groups for rows in group.rows):
            values = {
                metric: _plain(t_interval([cell.value]))
                if (cell := rows[metric].cell(who) if metric in rows else None)
                and cell.value is not None
                else None
                for metric in metrics
            }
            if any(values.values()) and not any(_alike(values, other) for other in seen):
                seen.append(values)
        for number, values in enumerate(seen, start=1):
            numbered = f"{name} {number}" if len(seen) > 1 else name
            yield {"who": who, "name": numbered, "values": values}


def _alike(values: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Say whether two sets of numbers agree where both have one: the same model measured again."""
    pairs = [(values[name], other[name]) for name in values if values[name] and other[name]]
    return all(math.isclose(a["mean"], b["mean"], rel_tol=1e-4, abs_tol=1e-6) for a, b in pairs)


def _repeated(groups: Sequence[Group]) -> Iterator[str]:
    """Warn of runs that repeat a seed: they are no new evidence."""
    for group in groups:
        seeds = [_seed(member) for member in group.members]
        for seed in sorted({s for s in seeds if s is not None and seeds.count(s) > 1}):
            runs = [member.name for member in group.members if _seed(member) == seed]
            yield (
                f"{' and '.join(runs)} have the same recipe and seed {seed}: they count as several "
                "seeds, so the interval is too narrow."
            )
