"""The documents of a reference corpus as a stream: local files of any size, or a hub dataset."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unlearn.data.sources import Source
from unlearn.detect.inputs import FIELDS, Inputs, Mode
from unlearn.errors import UserError


def corpus_texts(
    spec: str, *, text_field: str | None = None, mode: Mode = "rows", offline: bool = False
) -> Iterator[str]:
    """Give every document of a file or folder, else of a hub dataset, which is read as it comes.

    Text files have one document per line, or per paragraph, or are one (``mode``). Hub datasets are
    written ``OWNER/NAME[#CONFIG][:SPLIT]``; the split is ``train`` unless named.

    Raises:
        UserError: whatever is wrong with the source or a row, with its place.
    """
    if Path(spec).expanduser().exists():
        yield from (text.text for text in Inputs(spec, mode, text_field=text_field).texts())
        return
    source = Source.parse(spec)
    if spec.startswith((".", "/", "~")) or source.path.count("/") != 1 or source.local.suffix:
        raise UserError(f"no corpus '{spec}'", "give a file, a folder or a hub name owner/name")
    if offline:
        raise UserError(
            f"the corpus '{spec}' is not on this machine, and --offline opens no connection",
            "give a file or folder",
        )
    yield from _streamed(source, spec, text_field)


def text_of(
    row: Mapping[str, Any], named: str | None, fields: Sequence[str], place: str, option: str
) -> str:
    """Give the text of a row: the column that was named, else the first of ``fields`` there is.

    Raises:
        UserError: there is none, or it is no text; ``option`` is where one is named.
    """
    field = named or next((name for name in fields if name in row), None)
    if field is None or not isinstance(row.get(field), str):
        raise UserError(
            f"{place} has no text in {field or ', '.join(fields)}",
            f"name one with {option}; the columns are {', '.join(row)}",
        )
    return str(row[field])


def _streamed(source: Source, spec: str, text_field: str | None) -> Iterator[str]:
    import datasets  # noqa: PLC0415 - a second to import, and only hub datasets need it

    try:
        split = source.split or "train"
        rows: Any = datasets.load_dataset(source.path, source.config, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield text_of(row, text_field, FIELDS, f"row {number} of '{spec}'", "--text-field")
    except (OSError, ValueError, ConnectionError) as error:
        cause = str(error).strip().partition("\n")[0][:200]
        raise UserError(
            f"cannot read the corpus '{spec}': {cause}",
            "check the name, the configuration and the connection",
        ) from error
