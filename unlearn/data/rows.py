"""What a row must hold: its kind, its columns and their types. Rows are counted from 1."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from unlearn.errors import UserError, described, did_you_mean, unknown

Row = dict[str, Any]
Kind = Literal["qa", "completion", "messages", "text"]

COLUMNS: dict[Kind, tuple[str, ...]] = {
    "qa": ("question", "answer"),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
OPTIONAL = (
    "paraphrased_question",
    "paraphrased_answer",
    "perturbed_answer",
    "alternate",
    "important",
    "chosen",
    "rejected",
)
ROLES = ("system", "user", "assistant", "tool")
NEEDED = "rows need question and answer, prompt and completion, messages, or text"


def row_kind(row: Mapping[str, Any]) -> Kind:
    """Say which kind of row this is: the first kind whose columns are all there and not null."""
    for kind, names in COLUMNS.items():
        if all(row.get(name) is not None for name in names):
            return kind
    raise _missing_columns(row, "a row")


def rename_columns(rows: Iterable[Row], columns: Mapping[str, str], source: str) -> list[Row]:
    """Give mapped columns their standard names; every other column stays as it is."""
    standard = [*(name for names in COLUMNS.values() for name in names), *OPTIONAL]
    for name in columns:
        if name not in standard:
            raise unknown("standard column", name, standard)
    return [_renamed(row, columns, number, source) for number, row in enumerate(rows, start=1)]


def _renamed(row: Row, columns: Mapping[str, str], number: int, source: str) -> Row:
    for name, column in columns.items():
        if column not in row:
            raise UserError(
                f"row {number} of '{source}' has no column '{column}' to use as '{name}'"
                f"{did_you_mean(column, row)}",
                f"its columns: {_listed(row)}",
            )
    return {**row, **{name: row[column] for name, column in columns.items()}}


def check_rows(rows: Sequence[Row], source: str, mapped: Iterable[str] = ()) -> Kind:
    """Refuse rows of mixed kinds and values of the wrong type; return the kind they share."""
    try:
        kind = row_kind(rows[0])
    except UserError as error:
        raise _missing_columns(rows[0], f"row 1 of '{source}'") from error
    _check_map_is_used(kind, mapped, source)
    check = _check_messages if kind == "messages" else _check_strings
    for number, row in enumerate(rows, start=1):
        if any(row.get(name) is None for name in COLUMNS[kind]):
            raise _missing_columns(row, f"row {number} of '{source}'", kind)
        check(row, kind, f"row {number} of '{source}'")
    return kind


def _check_map_is_used(kind: Kind, mapped: Iterable[str], source: str) -> None:
    for name in mapped:
        if name not in (*COLUMNS[kind], *OPTIONAL):
            raise UserError(
                f"column '{name}' is mapped, but the rows of '{source}' also have "
                f"{' and '.join(COLUMNS[kind])}, which are read first",
                "remove those columns, or leave the mapping out",
            )


def _check_strings(row: Row, kind: Kind, place: str) -> None:
    for name in COLUMNS[kind]:
        if not isinstance(row[name], str):
            raise UserError(
                f"{place}: '{name}' is {described(row[name])}, not a string",
                "write the value as text, one string per row",
            )


def _check_messages(row: Row, kind: Kind, place: str) -> None:
    turns = row["messages"]
    shape = 'messages is a list of {"role": …, "content": "…"}'
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{place}: 'messages' is not a list of turns", shape)
    for number, turn in enumerate(turns, start=1):
        if turn.get("role") not in ROLES:
            raise UserError(
                f"{place}: turn {number} has the unknown role {turn.get('role')!r}"
                f"{did_you_mean(str(turn.get('role')), ROLES)}",
                f"one of {', '.join(ROLES)}",
            )
        if not isinstance(turn.get("content"), str):
            content = described(turn.get("content"))
            raise UserError(f"{place}: turn {number}'s content is {content}, not a string", shape)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise UserError(
            f"{place} has no assistant turn, so nothing in it would be trained",
            "add the assistant's answer or remove the row",
        )


def _missing_columns(row: Mapping[str, Any], place: str, kind: Kind | None = None) -> UserError:
    """Blame the columns of the kind that the row comes closest to."""
    present = [name for name, value in row.items() if value is not None]
    closest = kind or _closest_kind(row)
    missing = [name for name in COLUMNS[closest] if name not in present]
    if missing[0] in row:
        return UserError(f"{place}: '{missing[0]}' is null", "fill it in or remove the row")
    names = " or ".join(f"'{name}'" for name in missing)
    spare = [name for name in present if name not in COLUMNS[closest]]
    guess = next((text for name in missing if (text := did_you_mean(name, spare))), "")
    needed = f"; {NEEDED}" if len(missing) == len(COLUMNS[closest]) else ""
    return UserError(
        f"{place} has no {names}; its columns: {_listed(present)}{guess}",
        f"name the column that holds it with --map {missing[0]}=COLUMN{needed}",
    )


def _closest_kind(row: Mapping[str, Any]) -> Kind:
    return max(COLUMNS, key=lambda kind: len(set(COLUMNS[kind]) & set(row)))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(str, names))) or "none"
