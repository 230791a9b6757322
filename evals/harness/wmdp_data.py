"""WMDP and MMLU from local files: found, read and checked row by row.

A row has ``question``, four ``choices`` and an ``answer`` (0 to 3, or A to D); MMLU's also have a
``subject``. Schema: cais/wmdp and cais/mmlu on the hub. In CSV files ``choices`` is a JSON list.
"""

import ast
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unlearn.data.files import read_file
from unlearn.data.readers import FORMATS, kind_of
from unlearn.errors import UserError, did_you_mean, unknown

Question = dict[str, Any]

TASKS = {"bio": "wmdp_bio", "chem": "wmdp_chem", "cyber": "wmdp_cyber", "mmlu": "mmlu"}
"""Short name -> lm-eval's task."""
SETS = {"bio": "wmdp-bio", "chem": "wmdp-chem", "cyber": "wmdp-cyber", "mmlu": "mmlu"}
"""Short name -> how its file or folder is called; ``wmdp_bio`` and ``bio`` are found too."""
LETTERS = "ABCD"
ROW = "a row has question, choices (a list of 4) and answer (0 to 3)"


def chosen(names: str | None) -> tuple[str, ...]:
    """Read ``bio,chem,cyber,mmlu``; lm-eval's names are known too, ``wmdp`` is the first three.

    Raises:
        UserError: unknown name.
    """
    found: dict[str, None] = {}
    for name in (names or ",".join(TASKS)).split(","):
        short = name.strip().replace("-", "_").removeprefix("wmdp_")
        if short == "wmdp":
            found |= dict.fromkeys(("bio", "chem", "cyber"))
        elif short in TASKS:
            found[short] = None
        else:
            raise unknown("task", name.strip(), [*TASKS, "wmdp"])
    return tuple(found)


def read_questions(
    folder: Path, names: Sequence[str], *, required: bool
) -> dict[str, list[Question]]:
    """Read the sets that are in a folder, by short name.

    Unless ``required``, a set that is not there is left out, as long as one is.

    Raises:
        UserError: no such folder, a set that is not there, a damaged file or an invalid row.
    """
    if not folder.is_dir():
        raise UserError(f"no folder '{folder}'", f"give one with {_expected(names)}")
    files = {name: list(_files(folder, name)) for name in names}
    absent = [name for name in names if not files[name]]
    if absent and (required or len(absent) == len(names)):
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        guess = did_you_mean(SETS[absent[0]], [path.stem for path in folder.iterdir()])
        raise UserError(
            f"'{folder}' has no questions for {', '.join(absent)}{guess}; it holds {there}",
            f"name the files {_expected(absent)}",
        )
    return {
        name: [question for file in found for question in _questions(file, name)]
        for name, found in files.items()
        if found
    }


def _expected(names: Sequence[str]) -> str:
    return ", ".join(f"{SETS[name]}.jsonl" for name in names) + " (or .json, .csv, .parquet)"


def _files(folder: Path, name: str) -> Iterator[Path]:
    """Find a set's files: ``wmdp-bio.jsonl``, or the test files in a folder ``wmdp-bio``."""
    for stem in (SETS[name], SETS[name].replace("-", "_"), name):
        whole = [folder / f"{stem}{suffix}" for suffix in FORMATS if FORMATS[suffix] != "txt"]
        there = [path for path in whole if path.is_file()]
        if len(there) > 1:
            both = " and ".join(sorted(path.name for path in there))
            raise UserError(f"'{folder}' has both {both}", "keep one of them")
        if there:
            yield there[0]
            return
        if (folder / stem).is_dir():
            yield from _test_files(folder / stem)
            return


def _test_files(folder: Path) -> list[Path]:
    """Give the test files of a data set's folder, also where it has a folder per subject.

    MMLU on the hub has every subject once more under ``all``, which is then the only one read.
    """
    root = folder / "all" if (folder / "all").is_dir() else folder
    data = [path for path in sorted(root.rglob("*")) if _holds_rows(path)]
    tests = [path for path in data if "test" in path.relative_to(root).as_posix().lower()]
    if not tests and len(data) != 1:
        names = ", ".join(path.name for path in data[:6]) or "no data file"
        raise UserError(
            f"'{folder}' holds {names}: which are the test questions is not clear",
            "name them test.jsonl (or .json, .csv, .parquet), or test-….parquet as on the hub",
        )
    return tests or data


def _holds_rows(path: Path) -> bool:
    settings = ("dataset_info.json", "dataset_dict.json", "state.json", "dataset_infos.json")
    return path.is_file() and kind_of(path) is not None and path.name not in settings


def _questions(path: Path, name: str) -> Iterator[Question]:
    rows = read_file(path)
    if not rows:
        raise UserError(f"'{path}' has no rows", ROW)
    for number, row in enumerate(rows, start=1):
        where = f"row {number} of '{path}'"
        question = {
            "question": _text(row, "question", where),
            "choices": _choices(row, where),
            "answer": _answer(row, where),
        }
        if name == "mmlu":
            question["subject"] = _text(row, "subject", where)
        yield question


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        problem = f"'{column}' is {value!r}" if column in row else f"there is no '{column}'"
        guess = "" if column in row else did_you_mean(column, row)
        raise UserError(
            f"{where}: {problem}{guess}",
            ROW if column != "subject" else f"{ROW}; MMLU's also a subject",
        )
    return value


def _choices(row: Mapping[str, Any], where: str) -> list[str]:
    value = row.get("choices")
    if isinstance(value, str):
        value = _list_in_cell(value)
    if not isinstance(value, list) or len(value) != len(LETTERS):
        size = f"a list of {len(value)}" if isinstance(value, list) else repr(value)[:60]
        raise UserError(f"{where}: 'choices' is {size}, not a list of 4", ROW)
    if not all(isinstance(choice, str) for choice in value):
        raise UserError(f"{where}: 'choices' holds something that is no text: {value}"[:200], ROW)
    return value


def _list_in_cell(text: str) -> Any:
    """Read a list written into a CSV cell, as JSON or as Python prints it."""
    readers: tuple[Callable[[str], Any], ...] = (json.loads, ast.literal_eval)
    for reader in readers:
        try:
            return reader(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _answer(row: Mapping[str, Any], where: str) -> int:
    value = row.get("answer")
    if isinstance(value, str):
        text = value.strip().upper()
        value = LETTERS.find(text) if len(text) == 1 and text in LETTERS else _digit(text)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(LETTERS):
        raise UserError(f"{where}: 'answer' is {row.get('answer')!r}, not one of 0 to 3", ROW)
    return value


def _digit(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() else -1
