"""Whether runs may be ranked at all: the same forget set, the same rows, the same start."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from unlearn.errors import UserError
from unlearn.evals.report.folders import Found
from unlearn.evals.report.identity import identity
from unlearn.evals.report.table import Row

HOW_ONLY = ("evals.every", "evals.batch_tokens", "evals.select_best")
"""Settings under ``evals`` that do not change what a number means."""


def require_comparable(
    found: Sequence[Found], tables: Sequence[Mapping[str, Row]], metrics: Sequence[str]
) -> list[str]:
    """Give warnings about what limits a comparison of these runs.

    Raises:
        UserError: the runs were measured on different forget sets.
    """
    for kind in (measured_hash, given_hash):
        forget = _by(found, kind)
        distinct = [runs for key, runs in forget.items() if key]
        if len(distinct) > 1:
            each = "; ".join(f"{_names(runs)}: {_source(runs[0])}" for runs in distinct)
            raise UserError(
                f"the runs have different forget sets and cannot be ranked ({each})",
                "compare runs of one forget set; `unlearn report` shows any runs on one page",
            )
        if None not in forget:
            break
    return list(_warnings(found, tables, metrics))


def _warnings(
    found: Sequence[Found],
    tables: Sequence[Mapping[str, Row]],
    metrics: Sequence[str],
) -> Iterator[str]:
    unknown = [[one for one in found if not kind(one)] for kind in (measured_hash, given_hash)]
    if len(found) > 1 and all(unknown):
        some = min(unknown, key=len)
        yield (
            f"Whether the forget set is the same cannot be checked: {_names(some)} recorded no "
            "hash of it, or of another form than the others."
        )
    checks: dict[str, Callable[[Found], str | None]] = {
        "start from different models": _start,
        "have different retain sets": lambda one: given_hash(one, "retain"),
        "were measured with different prompts (chat template)": _template,
        "were measured with different settings": _measured,
    }
    for what, key in checks.items():
        groups = _by(found, key)
        if len(groups.keys() - {None}) > 1:
            each = "; ".join(_names(runs) for name, runs in groups.items() if name)
            yield f"The runs {what} ({each}): compare their numbers with care."
    for metric in metrics:
        cells = (rows[metric].after for rows in tables if metric in rows)
        sizes = sorted({cell.n for cell in cells if cell and cell.n})
        if len(sizes) > 1:
            counts = ", ".join(map(str, sizes))
            yield f"{metric} was measured on different numbers of rows ({counts})."
    for one in found:
        if one.results.get("status", "complete") != "complete":
            yield f"{one.name} is not complete (status: {one.results['status']})."


def _by(
    found: Sequence[Found], key: Callable[[Found], str | None]
) -> dict[str | None, list[Found]]:
    groups: dict[str | None, list[Found]] = {}
    for one in found:
        groups.setdefault(key(one), []).append(one)
    return groups


def _names(found: Sequence[Found], most: int = 4) -> str:
    names = ", ".join(one.name for one in found[:most])
    return f"{names} and {len(found) - most} more" if len(found) > most else names


def _recorded(one: Found) -> Mapping[str, Any]:
    return one.results.get("provenance") or {}


def measured_hash(one: Found, name: str = "forget") -> str | None:
    """Give the recorded hash of the rows a benchmark measured, such as TOFU's with all variants."""
    settings = one.results.get("settings") or {}
    for section in (settings, *settings.values()):
        hashes = section.get("data_sha256") if isinstance(section, Mapping) else None
        if isinstance(hashes, Mapping) and hashes.get(name):
            return str(hashes[name])
    return None


def given_hash(one: Found, name: str = "forget") -> str | None:
    """Give the recorded hash of the rows that the run was given."""
    source = _recorded(one).get(name)
    return source.get("sha256") if isinstance(source, Mapping) else None


def _source(one: Found) -> str:
    source = _recorded(one).get("forget")
    place = source.get("source") if isinstance(source, Mapping) else _recorded(one).get("data")
    sha256 = measured_hash(one) or given_hash(one) or ""
    return f"{place or 'unknown'}, sha256 {sha256[:12]}…"


def _start(one: Found) -> str | None:
    """Identify the starting model of a run; an evaluation has none."""
    return _recorded(one).get("model_sha256") if "before" in one.results["metrics"] else None


def _template(one: Found) -> str | None:
    template = _recorded(one).get("template")
    return None if template is None else repr(template)


def _measured(one: Found) -> str | None:
    settings = sorted(
        (key, value)
        for key, value in identity(one).items()
        if key.startswith("evals.") and not key.startswith(HOW_ONLY)
    )
    return repr(settings) if one.recipe else None
