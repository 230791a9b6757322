"""One data file as rows with columns, with the line or row at fault in every error.

Corpora of plain text have no columns: a line of a ``.txt`` file, and a line of a ``.jsonl`` file
that is a JSON string, is a row with a ``text``. The lines of a ``.jsonl`` file that are no JSON are
texts only when none of them begins like JSON (WMDP's corpora come in all three forms): one damaged
line makes no text of its file.

Files are read by :mod:`unlearn.data.readers` and not through ``datasets``, which would guess column
types (an answer "1984" becomes a number), fill absent columns with nulls, keep a second copy and
blame no line.
"""

import warnings
from pathlib import Path
from typing import Any

from unlearn.data.readers import FORMATS, Place, kind_of, opened, rows
from unlearn.errors import UserError, described

Row = dict[str, Any]

JSON_FORMS = "a .json or .jsonl file holds one object per line, or one array of objects"
JSON_STARTS = ("{", "[", '"')


def read_file(path: Path) -> list[Row]:
    """Read every row of one file; the extension says which format, ``.gz`` that it is packed.

    Raises:
        UserError: unknown extension, unreadable, empty or damaged file.
    """
    kind = kind_of(path)
    if kind is None:
        raise UserError(
            f"'{path}' has the unknown extension '{path.suffix}'", f"one of {', '.join(FORMATS)}"
        )
    if kind == "jsonl" and _holds_no_json(path):
        warnings.warn(f"'{path}' holds no JSON: each line is read as one text", stacklevel=2)
        kind = "txt"
    with opened(path) as source:
        return [_row(place, value) for place, value in rows(source, kind)]


def _row(place: Place, value: Any) -> Row:
    if isinstance(value, dict):
        return value
    if isinstance(value, str) and place.unit == "line":
        return {"text": value}
    raise UserError(f"{place} is {described(value)}, not an object", JSON_FORMS)


def _holds_no_json(path: Path) -> bool:
    """Whether no line was meant as JSON, damaged or not; looks as far as the first that was."""
    with opened(path) as source:
        empty = True
        for _, line in source.lines():
            if line.lstrip().startswith(JSON_STARTS):
                return False
            empty = empty and not line.strip()
        return not empty
