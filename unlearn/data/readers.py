"""Reading files a piece at a time, so that they may be larger than memory.

Rows come out with the place they stand at, which every error names. Texts are decoded strictly: a
file in another encoding is refused, not guessed at.
"""

import codecs
import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from unlearn.errors import UserError

LONGEST_CELL = 2**31 - 1
"""Characters of a cell: csv refuses more than 131,072 unless told otherwise."""
BLOCK = 2**16
"""Bytes read at once from a document."""
PARQUET_ROWS = 256
FORMATS = {
    ".txt": "txt",
    ".md": "txt",
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
PACKED = (".gz", ".zst")
MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


@dataclass(frozen=True)
class Place:
    """Where a row stands: what the file is called, and its line or row, counted from 1."""

    name: str
    number: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"'{self.name}' {self.unit} {self.number}"


@dataclass
class Bytes:
    """One file that is open: its bytes, how far it has been read, and how it is written."""

    name: str
    stream: io.BufferedReader
    encoding: str = "utf-8"
    raw: io.BufferedReader | None = None
    length: int = 0
    """Bytes of the file on disk."""

    @property
    def position(self) -> int:
        """Give the bytes read of the file on disk."""
        try:
            return (self.raw or self.stream).tell()
        except (OSError, ValueError):  # a pipe has no place
            return 0

    def start(self) -> bytes:
        """Look at the first bytes without reading them."""
        return self.stream.peek(BLOCK)

    def lines(self) -> Iterator[tuple[int, str]]:
        """Give every line by number, without its end, which is a line feed and nothing else."""
        bytewise = _is_bytewise(self.encoding)
        lines: Iterable[bytes | str] = self.stream if bytewise else self._decoded_lines()
        for number, line in enumerate(lines, start=1):
            place = Place(self.name, number)
            text = line if isinstance(line, str) else self._decode(line, place)
            text = text.removeprefix("\ufeff") if number == 1 else text
            yield number, text.removesuffix("\n").removesuffix("\r")

    def blocks(self) -> Iterator[str]:
        """Give the whole text in pieces."""
        decoder = codecs.getincrementaldecoder(self.encoding)("strict")
        done = 0
        while True:
            data = self.stream.read(BLOCK)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise self._wrong(f"after byte {done + error.start}") from error
            text = text.removeprefix("\ufeff") if not done else text
            if text:
                yield text
            if not data:
                return
            done += len(data)

    @contextmanager
    def text(self) -> Iterator[TextIO]:
        """Open the bytes as text, line ends as they are."""
        encoding = "utf-8-sig" if self.encoding == "utf-8" else self.encoding
        wrapper = io.TextIOWrapper(self.stream, encoding=encoding, newline="")
        try:
            yield wrapper
        except UnicodeDecodeError as error:
            raise self._wrong("") from error
        finally:
            wrapper.detach()

    def _decoded_lines(self) -> Iterator[str]:
        with self.text() as lines:
            yield from lines

    def _decode(self, line: bytes, place: Place) -> str:
        try:
            return line.decode(self.encoding)
        except UnicodeDecodeError as error:
            raise self._wrong(f"{place.unit} {place.number}, byte {error.start}") from error

    def _wrong(self, where: str) -> UserError:
        at = f" ({where})" if where else ""
        return UserError(
            f"'{self.name}' is not {self.encoding.upper()} text{at}",
            "save it as UTF-8, or name what it is written in with --encoding, for instance latin-1",
        )


@contextmanager
def opened(path: Path, encoding: str = "utf-8") -> Iterator[Bytes]:
    """Open a file, unpacked where its name ends in ``.gz`` or ``.zst``.

    Raises:
        UserError: it is empty, binary, in another encoding, or cannot be read.
    """
    try:
        with path.open("rb") as raw:
            stream = _unpacked(path, raw)
            found = Bytes(str(path), stream, encoding, raw, path.stat().st_size)
            _check_start(found, parquet=kind_of(path) == "parquet")
            yield found
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"'{path}' is damaged: {error}", "copy it again") from error
    except OSError as error:
        cause = error.strerror or str(error).partition("\n")[0]
        raise UserError(
            f"cannot read '{path}': {cause}", "check the file and its rights"
        ) from error


def kind_of(path: Path) -> str | None:
    """Say what a file's name promises; None when that is nothing we read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def rows(source: Bytes, kind: str) -> Iterator[tuple[Place, Any]]:
    """Give every row of a file of this kind with its place: a mapping, or a bare text."""
    return READERS[kind](source)


def paragraphs(source: Bytes) -> Iterator[tuple[Place, str]]:
    """Give what stands between blank lines, with the line it begins at."""
    begun: list[str] = []
    start = 1
    for number, line in source.lines():
        if line.strip():
            start = start if begun else number
            begun.append(line)
        elif begun:
            yield Place(source.name, start), "\n".join(begun)
            begun = []
    if begun:
        yield Place(source.name, start), "\n".join(begun)


def _lines(source: Bytes) -> Iterator[tuple[Place, str]]:
    for number, line in source.lines():
        if line.strip():
            yield Place(source.name, number), line.strip()


def _jsonl(source: Bytes) -> Iterator[tuple[Place, Any]]:
    for place, line in _lines(source):
        try:
            yield place, json.loads(line)
        except (ValueError, RecursionError) as error:
            cause = str(error).replace("line 1 column", "column")
            raise UserError(
                f"{place} is not JSON: {cause}",
                "a .jsonl file holds one object or text per line; "
                "give a file of plain text the extension .txt",
            ) from error


def _json(source: Bytes) -> Iterator[tuple[Place, Any]]:
    """Read one array, which must fit into memory, or one object per line."""
    if not source.start().lstrip(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _jsonl(source)
        return
    with source.text() as file:
        try:
            values = json.load(file)
        except (ValueError, RecursionError) as error:
            raise UserError(f"'{source.name}' is damaged JSON: {error}", "copy it again") from error
    for number, value in enumerate(values, start=1):
        yield Place(source.name, number, "entry"), value


def _csv(source: Bytes, delimiter: str = ",") -> Iterator[tuple[Place, Any]]:
    previous = csv.field_size_limit(LONGEST_CELL)
    with source.text() as file:
        reader = csv.DictReader(file, strict=True, delimiter=delimiter)
        try:
            _check_names(source, reader.fieldnames or ())
            for row in reader:
                place = Place(source.name, reader.line_num)
                if None in row:
                    size = len(reader.fieldnames or ())
                    raise UserError(
                        f"{place} has more cells than the header's {size}",
                        "quote cells that hold commas, quotes or line breaks",
                    )
                yield place, row
        except csv.Error as error:
            raise UserError(
                f"'{source.name}' line {reader.line_num} is damaged CSV: {error}",
                "quote cells that hold commas, quotes or line breaks",
            ) from error
        finally:
            csv.field_size_limit(previous)


def _check_names(source: Bytes, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"'{source.name}' has more than one column '{twice[0]}'",
            "give every column its own name",
        )


def _tsv(source: Bytes) -> Iterator[tuple[Place, Any]]:
    return _csv(source, "\t")


def _parquet(source: Bytes) -> Iterator[tuple[Place, Any]]:
    # pyarrow takes half a second to import, and only parquet files need it
    import pyarrow  # type: ignore[import-untyped] # noqa: PLC0415
    import pyarrow.parquet  # type: ignore[import-untyped] # noqa: PLC0415

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(source.stream).iter_batches(PARQUET_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield Place(source.name, number, "row"), row
    except pyarrow.ArrowException as error:
        cause = str(error).partition("\n")[0]
        raise UserError(f"'{source.name}' is damaged parquet: {cause}", "copy it again") from error


READERS: dict[str, Callable[[Bytes], Iterator[tuple[Place, Any]]]] = {
    "txt": _lines,
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": _tsv,
    "parquet": _parquet,
}


def _unpacked(path: Path, raw: io.BufferedReader) -> io.BufferedReader:
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if path.suffix.lower() == ".zst":
        if find_spec("zstandard") is None:
            raise UserError(f"'{path}' is packed with zstd", "pip install zstandard, or unpack it")
        import zstandard  # type: ignore[import-not-found] # noqa: PLC0415

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw))
    return raw


def _check_start(source: Bytes, *, parquet: bool) -> None:
    start = source.start()
    if not start:
        raise UserError(f"'{source.name}' is empty (0 bytes)", "give a file with at least one text")
    if parquet or not _is_bytewise(source.encoding):
        return
    for mark, name in MARKS.items():
        if start.startswith(mark):
            raise UserError(
                f"'{source.name}' is {name}, not {source.encoding.upper()}",
                f"give --encoding {name.lower()}, or save it as UTF-8",
            )
    if b"\x00" in start[:4096] and not start.lstrip().startswith((b"{", b"[")):
        raise UserError(
            f"'{source.name}' is a binary file, not text",
            f"give text, or a file whose name ends in one of {', '.join(FORMATS)}",
        )


def _is_bytewise(encoding: str) -> bool:
    """Whether a line of bytes is a line of text."""
    try:
        return "\n".encode(encoding) == b"\n"
    except LookupError as error:
        raise UserError(
            f"unknown encoding '{encoding}'", "for instance utf-8 or latin-1"
        ) from error
