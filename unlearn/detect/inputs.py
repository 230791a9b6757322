"""The texts that are to be scored: of a file, a folder or a stream, one after the other."""

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unlearn.data.readers import (
    FORMATS,
    PACKED,
    Bytes,
    Place,
    kind_of,
    opened,
    paragraphs,
    rows,
)
from unlearn.detect.text import Text, whole
from unlearn.errors import UserError, described, did_you_mean

Mode = Literal["auto", "rows", "paragraphs", "document"]
FIELDS = ("input", "text", "snippet", "content", "document")
"""Columns that are taken for the text when none is named, in this order."""
NEIGHBOURS = "neighbours"
"""Column with other wordings of the text, as a list."""


@dataclass(frozen=True)
class Inputs:
    """Where texts come from: ``path`` is a file, a folder, or ``-`` for ``stream``.

    ``mode``: ``rows`` gives one text per row (per line of a text file), ``paragraphs`` parts text
    files at blank lines, ``document`` takes each text whole; ``auto`` is ``document`` for text
    files and ``rows`` for all others. ``max_words`` keeps that many words of each text, as
    benchmarks with texts of one length do.
    """

    path: str
    mode: Mode = "auto"
    format: str | None = None
    text_field: str | None = None
    id_field: str | None = None
    encoding: str = "utf-8"
    max_words: int | None = None
    neighbours: bool = False
    stream: Any = None

    @property
    def is_stream(self) -> bool:
        """Say whether texts come from standard input."""
        return self.path == "-"

    def files(self) -> list[Path]:
        """List the files that are read, sorted by name.

        Raises:
            UserError: there is no such file or folder, or nothing readable in it.
        """
        path = Path(self.path).expanduser()
        if path.is_dir():
            readable = [file for file in _visible(path) if not _useless(file)]
            if not readable:
                ends = ", ".join(FORMATS)
                raise UserError(
                    f"no file to read in '{path}'",
                    f"names must end in {ends}; empty ones do not count",
                )
            return readable
        if not path.is_file():
            names = [other.name for other in path.parent.glob("*")] if path.parent.is_dir() else []
            guess = did_you_mean(path.name, names)
            raise UserError(
                f"no file '{self.path}'{guess}", "give a file, a folder, or - for stdin"
            )
        if not self.format and kind_of(path) is None:
            raise UserError(
                f"'{path}' has the unknown extension '{path.suffix}'",
                f"one of {', '.join(FORMATS)} (packed: {', '.join(PACKED)}), or name the --format",
            )
        return [path]

    def check(self) -> None:
        """Look at the start of every file, and at the first row of the first one.

        Raises:
            UserError: a file is empty, binary or cannot be read; the first row has no text.
        """
        if self.is_stream:
            return
        first, *others = self.files()
        for file in others:
            with opened(file, self.encoding):
                pass
        kind = self.format or kind_of(first)
        assert kind is not None
        with opened(first, self.encoding) as source:
            if kind == "txt":
                return
            place, row = next(rows(source, kind), (None, None))
            if place is None:
                raise UserError(f"'{first}' has no rows", "give a file with at least one text")
            self._text(place, row, 0)

    def left_out(self) -> dict[Path, str]:
        """Give the files of a folder that are not read, and why."""
        path = Path(self.path).expanduser()
        if self.is_stream or not path.is_dir():
            return {}
        reasons = {file: _useless(file) for file in _visible(path)}
        return {file: reason for file, reason in reasons.items() if reason}

    def mode_of(self, kind: str) -> Mode:
        """Say how files of a kind are parted into texts."""
        if self.mode == "auto":
            return "document" if kind == "txt" else "rows"
        return self.mode

    def texts(self, watch: Callable[[Bytes], None] = lambda source: None) -> Iterator[Text]:
        """Give the texts one after the other; ``watch`` is told of every file that is opened.

        Raises:
            UserError: whatever is wrong with a file or a row, named with its place.
        """
        for source, kind, name in self._sources():
            watch(source)
            if kind == "txt" and self.mode_of(kind) == "document":
                whole = "".join(source.blocks())
                yield self._text(Place(source.name, 1), whole, name or 0)
                continue
            parted = kind == "txt" and self.mode_of(kind) == "paragraphs"
            found = paragraphs(source) if parted else rows(source, kind)
            for index, (place, row) in enumerate(found):
                yield self._text(place, row, f"{name}:{index}" if name else index)

    def documents(
        self, watch: Callable[[Bytes], None] = lambda source: None
    ) -> Iterator[tuple[str | int, Iterator[str]]]:
        """Give every document as its id and its text in pieces; a text file is one document.

        The pieces of one must be taken before the next is asked for.

        Raises:
            UserError: as :meth:`texts`; two documents have the same id.
        """
        known: set[str | int] = set()
        for source, kind, name in self._sources():
            watch(source)
            if kind == "txt":
                yield name or Path(source.name).name, source.blocks()
                continue
            for index, (place, row) in enumerate(rows(source, kind)):
                text = self._text(place, row, f"{name}:{index}" if name else index)
                if text.id in known:
                    raise UserError(
                        f"{place}: another document has the id '{text.id}' already",
                        "windows go by the id of their document: name another --id-field, or none",
                    )
                known.add(text.id)
                yield text.id, iter([text.text])

    def fingerprint(self) -> str:
        """Identify the files by name, size and time of change; a stream by nothing."""
        if self.is_stream:
            return "stream"
        digest = hashlib.sha256()
        for file in self.files():
            found = file.stat()
            digest.update(f"{file.resolve()} {found.st_size} {found.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    @property
    def size(self) -> int | None:
        """Give the bytes of all files; None for a stream."""
        return None if self.is_stream else sum(file.stat().st_size for file in self.files())

    def _sources(self) -> Iterator[tuple[Bytes, str, str | None]]:
        """Open one file after the other; give its kind, and its name when there are several."""
        if self.is_stream:
            with self._piped() as source:
                yield source, self.format or _sniffed(source), None
            return
        root = Path(self.path).expanduser()
        for file in self.files():
            kind = self.format or kind_of(file)
            assert kind is not None
            with opened(file, self.encoding) as source:
                yield source, kind, file.relative_to(root).as_posix() if root.is_dir() else None

    @contextmanager
    def _piped(self) -> Iterator[Bytes]:
        assert self.stream is not None
        stream = self.stream
        stream = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream)
        source = Bytes("-", stream, self.encoding)
        if not stream.peek(1):
            raise UserError("nothing came from standard input", "pipe texts into the command")
        yield source

    def _text(self, place: Place, row: Any, id_: str | int) -> Text:
        if isinstance(row, str):
            return Text(id_, self._cut(row))
        if not isinstance(row, dict):
            raise UserError(
                f"{place} is {described(row)}, not an object or a text",
                "a row is an object with a text, or a text",
            )
        field = self.text_field or next((name for name in FIELDS if name in row), None)
        if field is None or field not in row:
            raise _no_field(place, row, field)
        text = "" if row[field] is None else row[field]
        if not isinstance(text, str):
            raise UserError(
                f"{place}: '{field}' is {described(text)}, not a text", "name another --text-field"
            )
        if self.id_field is not None:
            if self.id_field not in row:
                raise _no_field(place, row, self.id_field)
            id_ = (
                row[self.id_field]
                if isinstance(row[self.id_field], int)
                else whole(str(row[self.id_field]))
            )
        return Text(id_, self._cut(text), self._wordings(place, row))

    def _wordings(self, place: Place, row: dict[str, Any]) -> tuple[str, ...]:
        if not self.neighbours:
            return ()
        found = row.get(NEIGHBOURS)
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise UserError(
                f"{place} has no list of texts '{NEIGHBOURS}'",
                "the score 'neighbour' compares each text with other wordings of it",
            )
        return tuple(found)

    def _cut(self, text: str) -> str:
        return text if self.max_words is None else " ".join(text.split()[: self.max_words])


def _no_field(place: Place, row: dict[str, Any], field: str | None) -> UserError:
    names = ", ".join(map(str, row)) or "none"
    if field is None:
        return UserError(
            f"{place} has no column {', '.join(FIELDS[:-1])} or {FIELDS[-1]}",
            f"name one with --text-field; the columns are {names}",
        )
    guess = did_you_mean(field, map(str, row))
    return UserError(f"{place} has no column '{field}'{guess}", f"the columns are {names}")


def _sniffed(source: Bytes) -> str:
    start = source.start()
    return "jsonl" if start.lstrip().startswith(b"{") else "txt"


def _visible(root: Path) -> list[Path]:
    """List the files below a folder; names that begin with a dot are nobody's texts."""
    files = (file for file in root.rglob("*") if file.is_file())
    return sorted(f for f in files if not any(p.startswith(".") for p in f.relative_to(root).parts))


def _useless(file: Path) -> str:
    """Say why a file of a folder is not read; empty when it is."""
    if kind_of(file) is None:
        return "no kind of file we read"
    return "" if file.stat().st_size else "empty (0 bytes)"
