"""Reading texts: every kind of file gives the same texts, and what is wrong is named."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from unlearn.detect.inputs import Inputs
from unlearn.errors import UserError

TEXTS = ["Ada was born in Oslo.", 'She said "so, then"\nand left.', "Straße, naïve, 東京"]


def read(path: Any, **settings: Any) -> list[tuple[str | int, str]]:
    return [(text.id, text.text) for text in Inputs(str(path), **settings).texts()]


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS))


def write_json(path: Path) -> None:
    path.write_text(json.dumps([{"text": text} for text in TEXTS]))


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerows([["n", "text"], *([str(n), text] for n, text in enumerate(TEXTS))])


def write_tsv(path: Path) -> None:
    write_csv(path, "\t")


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "n": [1, 2, 3]}), path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_kind_gives_the_same_texts(kind: str, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / f"texts.{kind}"
    globals()[f"write_{kind}"](path)
    if packed:
        whole = path.read_bytes()
        path = tmp_path / f"texts.{kind}.gz"
        path.write_bytes(gzip.compress(whole))
    assert read(path) == list(enumerate(TEXTS))


def test_a_text_file_by_line_by_paragraph_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    content = "one\r\ntwo\n\n \nthree\u2028still three\n"
    path.write_bytes(content.encode())
    assert read(path, mode="rows") == [(0, "one"), (1, "two"), (2, "three\u2028still three")]
    assert read(path, mode="paragraphs") == [(0, "one\ntwo"), (1, "three\u2028still three")]
    assert read(path, mode="document") == read(path) == [(0, content)]
    found = [(name, "".join(pieces)) for name, pieces in Inputs(str(path)).documents()]
    assert found == [("texts.txt", content)]


def test_a_document_in_pieces_keeps_characters_that_a_piece_would_part(tmp_path: Path) -> None:
    path = tmp_path / "long.md"
    whole = "\ufeff" + "東京 " * 30_000  # 7 bytes each, so blocks of 65,536 end within characters
    path.write_text(whole, encoding="utf-8")
    parts = [piece for _, pieces in Inputs(str(path)).documents() for piece in pieces]
    assert len(parts) > 2
    assert "".join(parts) == whole.removeprefix("\ufeff")


def test_a_folder_gives_all_its_files_by_name_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("one\ntwo\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "empty.txt").touch()
    inputs = Inputs(str(tmp_path), mode="rows")
    inputs.check()
    ids = [text.id for text in inputs.texts()]
    assert ids == ["a/x.txt:0", "a/x.txt:1", "b.jsonl:0", "b.jsonl:1", "b.jsonl:2"]
    left_out = {file.name: reason for file, reason in inputs.left_out().items()}
    assert left_out == {"empty.txt": "empty (0 bytes)", "picture.png": "no kind of file we read"}


def test_two_documents_of_one_name_are_refused(tmp_path: Path) -> None:
    """Windows go by the id of their document; rows may be called whatever one likes."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one", "key": "x"}\n{"text": "two", "key": "x"}\n')
    assert [text.id for text in Inputs(str(path), id_field="key").texts()] == ["x", "x"]
    with pytest.raises(UserError, match=r"line 2: another document has the id 'x' already"):
        list(Inputs(str(path), mode="document", id_field="key").documents())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'\n {"text": "one"}\n"two"\n', [(0, "one"), (1, "two")]),
        (b"one\ntwo", [(0, "one"), (1, "two")]),
    ],
)
def test_standard_input_is_rows_or_lines(content: bytes, expected: Any) -> None:
    assert read("-", stream=io.BytesIO(content), mode="rows") == expected


def test_names_words_and_missing_texts(tmp_path: Path) -> None:
    """The text is the first known column; a row without text is kept, as an empty one."""
    path = tmp_path / "texts.jsonl"
    rows = [{"snippet": "a b  c d", "content": "no", "key": "x"}, {"snippet": None, "key": 7}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(path, id_field="key", max_words=3) == [("x", "a b c"), (7, "")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", b"", "is empty"),
        ("x.txt", b"\x00\x01\x02MZ", "is a binary file"),
        ("x.txt", "ä".encode("latin-1") + b"\n", "line 1, byte 0"),
        ("x.txt", b"fine\nfine\n\xff\n", "line 3, byte 0"),
        ("x.txt", "text".encode("utf-16"), "is UTF-16"),
        ("x.exe", b"text", "unknown extension '.exe'"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("x.jsonl", b'{"text": 5}\n', "'text' is a number (5)"),
        ("x.jsonl", b"[1, 2]\n", "is a list ([1, 2])"),
        ("x.jsonl", b'{"body": "a"}\n', "columns are body"),
        ("x.json", b'[{"text": "a"}', "damaged JSON"),
        ("x.csv", b'text\n"a\n', "damaged CSV"),
        ("x.csv", b"text\na,b\n", "more cells than the header's 1"),
        ("x.csv", b"text\n\xff\n", "not UTF-8"),
        ("x.parquet", b"no parquet", "damaged parquet"),
        ("x.txt.gz", b"not packed", "damaged"),
    ],
)
def test_what_is_wrong_is_named(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read(path, mode="rows")
    assert words in str(error.value)
    assert name in str(error.value)


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl")
    for settings in ({"text_field": "texd"}, {"id_field": "texd"}):
        with pytest.raises(UserError, match=r"no column 'texd'; did you mean 'text'"):
            read(tmp_path / "x.jsonl", **settings)
        with pytest.raises(UserError, match="no column 'texd'"):
            Inputs(str(tmp_path / "x.jsonl"), **settings).check()


def test_another_encoding_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Größe\nzwei\n".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes("Größe\nzwei\n".encode("utf-16"))
    for name, encoding in (("a.txt", "latin-1"), ("b.txt", "utf-16")):
        found = read(tmp_path / name, encoding=encoding, mode="rows")
        assert found == [(0, "Größe"), (1, "zwei")]
    with pytest.raises(UserError, match="unknown encoding"):
        read(tmp_path / "a.txt", encoding="utf-99")


def test_rows_come_without_reading_the_file_to_its_end(tmp_path: Path) -> None:
    """The second row is damaged and the file large; the first is there before either matters."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "first"}\nno json\n' + "x" * 2**22)
    texts = Inputs(str(path)).texts()
    assert next(texts).text == "first"
    with pytest.raises(UserError, match="line 2"):
        next(texts)
