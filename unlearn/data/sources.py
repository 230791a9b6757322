"""Where rows come from: a file, a folder or a hub dataset, named by ``SOURCE[#CONFIG][:SPLIT]``.

``people.jsonl``, ``people.jsonl:[:100]``, ``data/tofu#full:train[:10%]``,
``locuslab/TOFU#forget10:train``. Slices follow the ``datasets`` library.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn.data.files import read_file
from unlearn.data.readers import FORMATS, kind_of
from unlearn.data.rows import Kind, Row, check_rows, rename_columns, row_kind
from unlearn.errors import UserError, did_you_mean, unknown

__all__ = ["Kind", "Row", "Source", "load_rows", "load_variants", "row_kind"]

GRAMMAR = "a source is PATH[#CONFIG][:SPLIT], e.g. data/tofu#forget10:train[:100]"
LONGEST_REASON = 200
"""Characters of a reason given by ``datasets``, which may list every file extension it knows."""
_PART = re.compile(r"(?P<name>\w+(?:[.-]\w+)*)?(?P<slice>\[-?\d*%?:-?\d*%?\](?:\(\w+\))?)?")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SPLIT_MARK = re.compile(r"(?P<path>.+?):(?![/\\])(?P<split>.*)")  # not the colon of C:\ or ://


@dataclass(frozen=True)
class Source:
    """The parts of ``SOURCE[#CONFIG][:SPLIT]``; ``split`` may hold several joined by ``+``."""

    path: str
    config: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, spec: str) -> "Source":
        """Take a source apart; a file whose name holds ``#`` or ``:`` is taken as it is."""
        try:
            if Path(spec).expanduser().exists():
                return cls(spec)
        except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, no such ~user
            cause = getattr(error, "strerror", None) or error
            raise UserError(f"cannot use the source '{spec[:80]}': {cause}", GRAMMAR) from error
        path, config, split = _cut(spec)
        if not path or config == "" or split == "":
            raise UserError(f"cannot read the source '{spec}': a part of it is empty", GRAMMAR)
        for part in (split or "all").split("+"):
            if not part or not _PART.fullmatch(part):
                raise UserError(
                    f"cannot read the split '{split}' of '{spec}'",
                    "write a split as train, train[:400], train[10%:20%] or train+test",
                )
        return cls(path, config, split)

    @property
    def local(self) -> Path:
        """The path of a file or folder on this machine (which may not exist)."""
        return Path(self.path).expanduser()


def _cut(spec: str) -> tuple[str, str | None, str | None]:
    path, mark, rest = spec.partition("#")
    if mark:
        config, colon, split = rest.partition(":")
        return path, config, split if colon else None
    match = _SPLIT_MARK.fullmatch(spec)
    return (match["path"], None, match["split"]) if match else (spec, None, None)


def load_rows(
    spec: str, *, columns: Mapping[str, str] | None = None, offline: bool = False
) -> list[Row]:
    """Load rows of one kind, with every column they came with.

    ``columns`` maps a standard name to the column that holds it: ``{"question": "q"}``. A mapped
    column is also kept under its own name. With ``offline`` no connection is opened.

    Raises:
        UserError: whatever is wrong with the source, its rows or the mapping.
    """
    source = Source.parse(spec)
    rows = _load(source, spec, offline=offline)
    if not rows:
        raise UserError(
            f"'{spec}' has no rows", "give a source, or a slice of it, that is not empty"
        )
    columns = columns or {}
    rows = rename_columns(rows, columns, spec)
    check_rows(rows, spec, columns)
    return rows


def load_any_rows(spec: str, *, offline: bool = False) -> list[Row]:
    """Load rows as they are, whatever their columns.

    Raises:
        UserError: the source cannot be read, or has no rows.
    """
    rows = _load(Source.parse(spec), spec, offline=offline)
    if not rows:
        raise UserError(f"'{spec}' has no rows", "give a source that is not empty")
    return rows


def load_variants(
    spec: str, *, columns: Mapping[str, str], take: int = 1, offline: bool = False
) -> list[Row]:
    """Load rows made from chosen columns, of which some may hold several texts.

    ``columns`` maps a standard name to a column. Where such a column holds a list, ``take`` rows
    are made of each row: the first with the first entry of every list, and so on; always the first
    ones, so the same rows each time.

    Raises:
        UserError: whatever is wrong with the source, the mapping or the rows; a list is too short.
    """
    found = rename_columns(_load(Source.parse(spec), spec, offline=offline), columns, spec)
    rows = [
        _variant(row, columns, place, f"row {number} of '{spec}'")
        for number, row in enumerate(found, start=1)
        for place in range(take if any(isinstance(row[name], list) for name in columns) else 1)
    ]
    if not rows:
        raise UserError(f"'{spec}' has no rows", "give a source that is not empty")
    check_rows(rows, spec, columns)
    return rows


def _variant(row: Row, columns: Mapping[str, str], place: int, which: str) -> Row:
    """Give the row with entry number ``place`` of every list among its mapped columns."""
    for name, column in columns.items():
        if isinstance(row[name], list) and place >= len(row[name]):
            raise UserError(
                f"{which}: column '{column}' holds {len(row[name])} texts, not {place + 1}",
                "take fewer",
            )
    lists = {name: row[name][place] for name in columns if isinstance(row[name], list)}
    return {**row, **lists}


def _load(source: Source, spec: str, *, offline: bool) -> list[Row]:
    if source.local.is_dir():
        if file := _file_of(source):
            return _rows_of(file, source)
        saved = [source.local / name for name in ("state.json", "dataset_dict.json")]
        with _quiet_datasets(spec, offline=offline):
            if any(path.is_file() for path in saved):
                return _from_saved(source)
            return _from_datasets(str(source.local), source)
    if source.local.exists():
        return _from_file(source)
    if kind_of(source.local) or not _HUB_NAME.fullmatch(source.path):
        raise _not_found(source)
    with _quiet_datasets(spec, offline=offline):
        return _from_datasets(source.path, source)


def _file_of(source: Source) -> Path | None:
    """Find a configuration's file in a folder that has no dataset card: ``forget10.json``."""
    if source.config is None or (source.local / "README.md").exists():
        return None
    files = (source.local / f"{source.config}{suffix}" for suffix in FORMATS)
    return next((file for file in files if file.is_file()), None)


def _from_file(source: Source) -> list[Row]:
    if source.config is not None:
        raise UserError(
            f"'{source.path}' is a file and has no configuration '{source.config}'",
            "leave #CONFIG out; only folders and hub datasets have configurations",
        )
    return _rows_of(source.local, source)


def _rows_of(file: Path, source: Source) -> list[Row]:
    split = _choose_split(source, ["train"])
    rows = read_file(file)
    return rows if split == "train" else _sliced(split, {"train": rows})


def _from_saved(source: Source) -> list[Row]:
    """Read a folder that ``Dataset.save_to_disk`` wrote."""
    import datasets  # noqa: PLC0415

    saved = datasets.load_from_disk(str(source.local))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    split = _choose_split(source, list(splits))
    return _sliced(split, {name: data.to_list() for name, data in splits.items()})


def _from_datasets(path: str, source: Source) -> list[Row]:
    import datasets  # noqa: PLC0415

    config = _choose_config(source, datasets.get_dataset_config_names(path))
    split = _choose_split(source, datasets.get_dataset_split_names(path, config))
    rows: list[Row] = datasets.load_dataset(path, config, split=split).to_list()
    return rows


def _choose_config(source: Source, allowed: Sequence[str]) -> str:
    """Never fall back on a default: it would silently be the whole set (TOFU's is ``full``)."""
    if source.config is not None:
        if source.config not in allowed:
            raise unknown(f"configuration of '{source.path}':", source.config, allowed)
        return source.config
    if len(allowed) != 1:
        raise UserError(
            f"'{source.path}' has {len(allowed)} configurations and none was chosen",
            f"append #NAME with one of {', '.join(allowed)}",
        )
    return allowed[0]


def _choose_split(source: Source, allowed: Sequence[str]) -> str:
    """Name every part of the split; a part without a name means the only split there is."""
    parts = []
    for part in (source.split or "").split("+"):
        match = _PART.fullmatch(part)
        assert match is not None, part
        name = match["name"]
        if name is None and len(allowed) != 1:
            raise UserError(
                f"'{source.path}' has {len(allowed)} splits and none was chosen",
                f"append :NAME with one of {', '.join(allowed)}",
            )
        if name is not None and name not in allowed:
            raise unknown(f"split of '{source.path}':", name, allowed)
        parts.append((name or allowed[0]) + (match["slice"] or ""))
    return "+".join(parts)


def _sliced(split: str, rows: Mapping[str, list[Row]]) -> list[Row]:
    import datasets  # noqa: PLC0415

    sizes = {name: len(members) for name, members in rows.items()}
    try:
        spans = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        cause = str(error).partition("\n")[0]
        raise UserError(f"cannot take the slice '{split}': {cause}", GRAMMAR) from error
    return [row for span in spans for row in rows[span.splitname][span.from_ : span.to]]


def _not_found(source: Source) -> UserError:
    folder = source.local.parent
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return UserError(f"no file or folder '{source.path}': '{folder}' does not exist", GRAMMAR)
    guess = did_you_mean(source.local.name, names)
    return UserError(f"no file or folder '{source.path}'{guess}", GRAMMAR)


@contextmanager
def _quiet_datasets(spec: str, *, offline: bool) -> Iterator[None]:
    """Silence ``datasets`` for a while and turn each of its many errors into one line."""
    import datasets  # noqa: PLC0415
    import pyarrow  # type: ignore[import-untyped] # noqa: PLC0415
    import yaml  # noqa: PLC0415

    failures = (OSError, ValueError, RuntimeError, TypeError, KeyError, pyarrow.ArrowException,
                yaml.YAMLError, datasets.exceptions.DatasetsError)  # fmt: skip
    with quiet_hub(offline=offline) as is_offline:
        try:
            yield
        except failures as error:
            raise _explained(error, spec, offline=is_offline) from error


@contextmanager
def quiet_hub(*, offline: bool) -> Iterator[bool]:
    """Silence ``datasets`` for a while and, if asked for, keep it and the hub's client offline.

    Yields whether they are offline, which the environment may also have asked for.
    """
    import datasets  # noqa: PLC0415
    import huggingface_hub  # noqa: PLC0415

    offline = offline or huggingface_hub.constants.HF_HUB_OFFLINE
    with ExitStack() as stack:
        stack.enter_context(_silenced(datasets))
        # both libraries read their offline switch once, at import
        modules: tuple[Any, ...] = (huggingface_hub.constants, datasets.config)
        for module in modules:
            stack.callback(setattr, module, "HF_HUB_OFFLINE", module.HF_HUB_OFFLINE)
            module.HF_HUB_OFFLINE = offline
        yield offline


@contextmanager
def _silenced(datasets: Any) -> Iterator[None]:
    verbosity, bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def _explained(error: BaseException, spec: str, *, offline: bool) -> UserError:
    if isinstance(error, ConnectionError) and offline:
        return UserError(
            f"'{spec}' is neither a file or folder here nor in the cache, and the hub is offline",
            "check the path, or load it once while online",
        )
    if isinstance(error, ConnectionError):
        return UserError(f"cannot reach the hub for '{spec}'", "check the path or the connection")
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = str(cause).strip().partition("\n")[0] or type(cause).__name__
    reason = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}…"
    if Source.parse(spec).local.is_dir():
        hint = "check the files in it; given one by one, their errors name the line"
    else:
        hint = "check the name; private and gated datasets need `hf auth login`"
    return UserError(f"cannot load '{spec}': {reason}", hint)
