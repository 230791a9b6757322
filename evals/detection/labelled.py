"""Texts whose membership is known: the public benchmarks in their own columns, and one's own files.

=========  =============================  ========================================================
name       on the hub                     columns
=========  =============================  ========================================================
wikimia    swj0419/WikiMIA                ``input``, ``label``; one split per length in words
bookmia    swj0419/BookMIA                ``snippet``, ``label``
patentmia  (a file of DC-PDD's code)      ``text`` or ``input``, ``label``; Chinese
mimir      iamgroot42/mimir               ``member``, ``nonmember``: two texts per row
muse       muse-bench/MUSE-News, -Books   splits ``forget`` and ``holdout`` with a ``text``
=========  =============================  ========================================================
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unlearn.data.readers import kind_of, opened, rows
from unlearn.data.sources import load_any_rows
from unlearn.detect.inputs import FIELDS, Inputs
from unlearn.errors import UserError, described, did_you_mean, unknown

LABELS = ("label", "member", "is_member", "seen")
YES = {"1", "true", "member", "seen", "yes"}
NO = {"0", "false", "nonmember", "non-member", "unseen", "no"}
LENGTHS = (32, 64, 128, 256)
"""Words of WikiMIA's texts, one split each."""
Found = Iterator["LabelledText"]


@dataclass(frozen=True)
class LabelledText:
    """A text, whether it was in the training data, and the part of the benchmark it belongs to.

    ``cluster`` names what it shares with other texts, as an author or a book: such texts are not
    independent. Empty where nothing is known.
    """

    text: str
    member: bool
    group: str = ""
    cluster: str = ""


@dataclass(frozen=True)
class Columns:
    """Which columns to read; None takes the usual names, and no clusters."""

    text: str | None = None
    label: str | None = None
    cluster: str | None = None


def read_labelled(
    data: str, *, path: str | None = None, columns: Columns | None = None, offline: bool = False
) -> list[LabelledText]:
    """Read a benchmark by name (``wikimia:64``), or a file of labelled rows.

    ``path`` is a copy on this machine, a file or a folder, instead of the hub. Files: one row per
    text with a label, or two columns ``member`` and ``nonmember``.

    Raises:
        UserError: unknown name, nothing to read, a row without text or label, only one side.
    """
    name, _, part = data.partition(":")
    reader = READERS.get(name)
    columns = columns or Columns()
    if reader is not None:
        found = list(reader(part, path, columns, offline))
    elif path is None and Path(data).expanduser().exists():
        found = list(_from_path(data, columns, ""))
    else:
        known = [*READERS, "a FILE of labelled texts"]
        guess = did_you_mean(name, READERS)
        raise UserError(f"no data '{data}'{guess}", f"one of {', '.join(known)}")
    return check_sides(found, data)


def read_sides(
    members: str, nonmembers: str, *, text_field: str | None = None, offline: bool = False
) -> list[LabelledText]:
    """Read members from one source and non-members from another: ``SOURCE[#CONFIG][:SPLIT]``.

    Raises:
        UserError: as :func:`read_labelled`.
    """
    found = [
        LabelledText(text, member)
        for source, member in ((members, True), (nonmembers, False))
        for text in read_texts(source, text_field=text_field, offline=offline)
    ]
    return check_sides(found, f"{members}, {nonmembers}")


def read_texts(source: str, *, text_field: str | None = None, offline: bool = False) -> list[str]:
    """Read the texts of one source: a file of rows, or ``SOURCE[#CONFIG][:SPLIT]``.

    Raises:
        UserError: the source cannot be read, or a row has no text.
    """
    columns = Columns(text_field)
    if Path(source).expanduser().is_file():
        return [text.text for text in Inputs(source, "rows", text_field=text_field).texts()]
    return [
        _text(row, columns, f"row {number} of '{source}'")
        for number, row in enumerate(load_any_rows(source, offline=offline), start=1)
    ]


def check_sides(found: Sequence[LabelledText], data: str) -> list[LabelledText]:
    """Refuse data with only one kind of texts."""
    members = sum(text.member for text in found)
    if not members or members == len(found):
        kind = "non-members" if members else "members"
        raise UserError(
            f"'{data}' has {len(found)} texts and no {kind}", "both kinds are needed to compare"
        )
    return list(found)


def _wikimia(part: str, path: str | None, columns: Columns, offline: bool) -> Found:
    lengths = [part] if part else [str(length) for length in LENGTHS]
    if part and part not in map(str, LENGTHS):
        raise unknown("length of WikiMIA", part, map(str, LENGTHS))
    if path and Path(path).is_file():
        yield from _from_path(path, columns, f"length {part}" if part else "")
        return
    source = path or "swj0419/WikiMIA"
    for length in lengths:
        spec = f"{source}:WikiMIA_length{length}"
        yield from _from_hub(spec, columns, f"length {length}", offline)


def _bookmia(part: str, path: str | None, columns: Columns, offline: bool) -> Found:
    if path:
        yield from _from_path(path, columns, "")
        return
    yield from _from_hub("swj0419/BookMIA:train", columns, "", offline)


def _patentmia(part: str, path: str | None, columns: Columns, offline: bool) -> Found:
    if path is None:
        raise UserError(
            "PatentMIA is not on the hub",
            "unpack it from the code of DC-PDD (zhang-wei-chao/DC-PDD) and give --from FILE",
        )
    yield from _from_path(path, columns, "")


def _mimir(part: str, path: str | None, columns: Columns, offline: bool) -> Found:
    if path:
        yield from _from_path(path, columns, part)
        return
    source, _, split = part.partition(":")
    if not source:
        raise UserError("mimir has many sources", "name one: --data mimir:github:ngram_13_0.8")
    spec = f"iamgroot42/mimir#{source}:{split or 'ngram_13_0.8'}"
    yield from _from_hub(spec, columns, source, offline)


def _muse(part: str, path: str | None, columns: Columns, offline: bool) -> Found:
    corpora = {"news": "MUSE-News", "books": "MUSE-Books"}
    if not path and part not in corpora:
        raise unknown("corpus of MUSE", part, corpora)
    for split, member in (("forget", True), ("holdout", False)):
        if path:
            file = _file_of(Path(path), split)
            found, place = [row for _, row in _rows(file)], f"'{file}'"
        else:
            spec = f"muse-bench/{corpora[part]}#privleak:{split}"
            found, place = load_any_rows(spec, offline=offline), f"'{spec}'"
        for number, row in enumerate(found, start=1):
            yield LabelledText(_text(row, columns, f"row {number} of {place}"), member, part)


READERS: dict[str, Callable[[str, str | None, Columns, bool], Found]] = {
    "wikimia": _wikimia,
    "bookmia": _bookmia,
    "patentmia": _patentmia,
    "mimir": _mimir,
    "muse": _muse,
}


def _from_hub(spec: str, columns: Columns, group: str, offline: bool) -> Found:
    for number, row in enumerate(load_any_rows(spec, offline=offline), start=1):
        yield from _labelled(row, columns, f"row {number} of '{spec}'", group)


def _from_path(path: str, columns: Columns, group: str) -> Found:
    """Read one file, or every file of a folder as a group of its own."""
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"no file or folder '{path}'", "give a copy of the data")
    files = [place] if place.is_file() else sorted(f for f in place.rglob("*") if kind_of(f))
    if not files:
        raise UserError(f"no file to read in '{path}'", "give jsonl, json, csv, tsv or parquet")
    for file in files:
        name = group if place.is_file() else file.name.partition(".")[0]
        for where, row in _rows(file):
            yield from _labelled(row, columns, str(where), name)


def _rows(file: Path) -> Iterator[tuple[Any, Any]]:
    kind = kind_of(file)
    if kind is None or kind == "txt":
        raise UserError(
            f"'{file}' has no columns, so no labels", "give jsonl, json, csv, tsv or parquet"
        )
    with opened(file) as source:
        yield from rows(source, kind)


def _file_of(folder: Path, name: str) -> Path:
    found = [path for path in sorted(folder.glob(f"{name}*")) if kind_of(path)]
    if not found:
        raise UserError(f"no file '{name}.json' in '{folder}'", "give MUSE's privleak folder")
    return found[0]


def _labelled(row: Any, columns: Columns, place: str, group: str) -> Found:
    """Turn a row into one text with its label, or a wide one into two."""
    if isinstance(row, Mapping) and {"member", "nonmember"} <= set(row) and not columns.label:
        for side, member in (("member", True), ("nonmember", False)):
            yield LabelledText(_text(row, Columns(side), place), member, group)
        return
    text = _text(row, columns, place)
    cluster = _cluster(row, columns, place)
    yield LabelledText(text, _label(row, columns, place), group, cluster)


def _text(row: Any, columns: Columns, place: str) -> str:
    if isinstance(row, str) and columns.text is None:
        return row
    if not isinstance(row, Mapping):
        raise UserError(f"{place} is no row with columns", "give one object per text")
    field = columns.text or next((name for name in FIELDS if name in row), None)
    if field not in row:
        guess = did_you_mean(field, map(str, row)) if field else ""
        raise UserError(
            f"{place} has no column {field or ', '.join(FIELDS)}{guess}",
            f"name one with --text-field; the columns are {', '.join(map(str, row))}",
        )
    if not isinstance(row[field], str):
        raise UserError(
            f"{place}: '{field}' is {described(row[field])}, not a text",
            "name another --text-field",
        )
    return str(row[field])


def _cluster(row: Mapping[str, Any], columns: Columns, place: str) -> str:
    if columns.cluster is None:
        return ""
    if columns.cluster not in row:
        guess = did_you_mean(columns.cluster, map(str, row))
        raise UserError(
            f"{place} has no column '{columns.cluster}'{guess}",
            f"the columns are {', '.join(map(str, row))}",
        )
    return str(row[columns.cluster])


def clustered(texts: Sequence[LabelledText], rows: int) -> list[LabelledText]:
    """Take every ``rows`` texts of a side that follow one another for one cluster."""
    seen: Counter[bool] = Counter()
    found = []
    for text in texts:
        found.append(replace(text, cluster=f"{seen[text.member] // rows}"))
        seen[text.member] += 1
    return found


def _label(row: Any, columns: Columns, place: str) -> bool:
    names = [columns.label] if columns.label else list(LABELS)
    field = next((name for name in names if isinstance(row, Mapping) and name in row), None)
    if field is None:
        columns_there = ", ".join(map(str, row)) if isinstance(row, Mapping) else "none"
        raise UserError(
            f"{place} has no column {' or '.join(names)}",
            f"name it with --label-field; the columns are {columns_there}",
        )
    value = row[field]
    if isinstance(value, list):
        raise UserError(
            f"{place}: '{field}' is a list", "rows with one label per part are not read"
        )
    word = str(value).strip().lower().removesuffix(".0")
    if word not in YES | NO:
        raise UserError(
            f"{place}: the label {value!r} is neither 1 (member) nor 0 (non-member)",
            "write 1 or 0, or name another --label-field",
        )
    return word in YES
