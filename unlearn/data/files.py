"""Reading one data file into rows, with the line or row at fault in every error.

Corpora of plain text have no columns: a line of a ``.txt`` file, and a line of a ``.jsonl`` file
that is a JSON string, is a row with a ``text``. The lines of a ``.jsonl`` file that are no JSON are
texts only when none of them begins like JSON (WMDP's corpora come in all three forms): one damaged
line makes no text of its file.

Files are read here and not through ``datasets``, which would guess column types (an answer "1984"
becomes a number), fill absent columns with nulls, keep a second copy and blame no line.
"""

import csv
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unlearn.errors import UserError, described

Row = dict[str, Any]

JSON_FORMS = "a .json or .jsonl file holds one object per line, or one array of objects"
LINE_FORMS = f"{JSON_FORMS}; give a file of plain text the extension .txt"
JSON_STARTS = ("{", "[", '"')
LONGEST_CELL = 2**31 - 1  # csv refuses cells above 131,072 characters unless told otherwise


def read_file(path: Path) -> list[Row]:
    """Read every row of one file; the extension says which format.

    Raises:
        UserError: unknown extension, unreadable, empty or damaged file.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"'{path}' has the unknown extension '{path.suffix}'", f"one of {', '.join(READERS)}"
        )
    try:
        if path.stat().st_size == 0:
            raise UserError(f"'{path}' is empty (0 bytes)", "give a file with at least one row")
        return reader(path)
    except UnicodeDecodeError as error:
        raise UserError(
            f"'{path}' is not UTF-8 text: {error.reason} at byte {error.start}",
            "save it as UTF-8; compressed files must be unpacked first",
        ) from error
    except OSError as error:
        cause = error.strerror or str(error).partition("\n")[0]
        raise UserError(
            f"cannot read '{path}': {cause}", "check the file and its rights"
        ) from error


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return _objects(path, [(f"entry {n}", value) for n, value in _json_array(path, text)])
    lines = _lines(text)
    if path.suffix.lower() == ".jsonl" and lines and not any(map(_looks_like_json, lines.values())):
        warnings.warn(f"'{path}' holds no JSON: each line is read as one text", stacklevel=2)
        return [{"text": line} for line in lines.values()]
    values = [(f"line {n}", _json_line(path, n, line)) for n, line in lines.items()]
    return _objects(path, [(n, {"text": v} if isinstance(v, str) else v) for n, v in values])


def _read_text(path: Path) -> list[Row]:
    """Read one text per line; blank lines separate nothing and are left out."""
    return [{"text": line} for line in _lines(path.read_text(encoding="utf-8-sig")).values()]


def _lines(text: str) -> dict[int, str]:
    """Give the lines that are not blank by number.

    Not with ``str.splitlines``, which also cuts at characters that JSON allows inside strings
    (U+2028).
    """
    lines = enumerate(text.split("\n"), start=1)
    return {number: line.strip() for number, line in lines if line.strip()}


def _looks_like_json(line: str) -> bool:
    """Whether a line was meant as JSON, damaged or not."""
    return line.startswith(JSON_STARTS)


def _json_array(path: Path, text: str) -> list[tuple[int, Any]]:
    try:
        return list(enumerate(json.loads(text), start=1))
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is damaged JSON: {error}", JSON_FORMS) from error


def _json_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        cause = str(error).replace("line 1 column", "column")  # the line is named in front
        raise UserError(f"'{path}' line {number} is not JSON: {cause}", LINE_FORMS) from error


def _objects(path: Path, values: list[tuple[str, Any]]) -> list[Row]:
    for place, value in values:
        if not isinstance(value, dict):
            raise UserError(f"'{path}' {place} is {described(value)}, not an object", JSON_FORMS)
    return [value for _, value in values]


def _read_csv(path: Path) -> list[Row]:
    previous = csv.field_size_limit(LONGEST_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            try:
                return _cells(path, reader)
            except csv.Error as error:
                raise UserError(
                    f"'{path}' line {reader.line_num} is damaged CSV: {error}",
                    "quote cells that hold commas, quotes or line breaks",
                ) from error
    finally:
        csv.field_size_limit(previous)


def _cells(path: Path, reader: "csv.DictReader[str]") -> list[Row]:
    names = list(reader.fieldnames or [])
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"'{path}' has more than one column '{twice[0]}'", "give every column its own name"
        )
    rows: list[Row] = []
    for row in reader:
        if None in row:
            raise UserError(
                f"'{path}' line {reader.line_num} has more cells than the header's {len(names)}",
                "quote cells that hold commas, quotes or line breaks",
            )
        rows.append(dict(row))
    return rows


def _read_parquet(path: Path) -> list[Row]:
    # pyarrow takes half a second to import, and only parquet files need it
    import pyarrow  # type: ignore[import-untyped] # noqa: PLC0415
    import pyarrow.parquet  # type: ignore[import-untyped] # noqa: PLC0415

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        cause = str(error).partition("\n")[0]
        raise UserError(f"'{path}' is damaged parquet: {cause}", "copy it again") from error
    return rows


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
