import zlib
from pathlib import Path
from typing import Any

import pytest

from unlearn.cli.detect import main


@pytest.fixture
def detect(world: Path, unlearn: Any) -> Any:
    def call(*arguments: object) -> Any:
        return unlearn(*arguments, program=main)

    return call


def test_every_line_with_text_gets_a_row_with_its_number(detect):
    Path("texts.txt").write_text("Ada was born in Oslo.\n\n  \nBo paints [red]boats[/red].\n")
    outcome = detect("texts.txt", "--model", "model", "--json")
    assert outcome.code == 0, outcome.err
    rows = outcome.json["rows"]
    assert [row["line"] for row in rows] == [1, 4]
    for row in rows:
        assert row["tokens"] > 1
        # the mean of the least likely tokens is below the mean of all
        assert row["min_k"] <= row["loss"] < 0
        size = len(zlib.compress(row["text"].encode()))
        assert row["zlib"] == pytest.approx(row["loss"] / size, rel=1e-5)


def test_table_for_people_keeps_its_numbers_at_80_columns(detect, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    Path("texts.txt").write_text("Bo paints [red]boats[/red], " * 20 + "\n")
    outcome = detect("texts.txt", "--model", "model")
    row = next(line for line in outcome.out.splitlines() if "Bo paints" in line)
    assert "[red]" in row
    assert len(row) <= 80
    assert len([word for word in row.split() if word.startswith("-")]) == 3


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "is empty"), (b" \n\n", "is empty"), (b"\xff\xfe", "not UTF-8")]
)
def test_unusable_file(detect, content, words):
    Path("texts.txt").write_bytes(content)
    outcome = detect("texts.txt", "--model", "model", "--json")
    assert outcome.code == 2
    assert words in outcome.json["error"]["message"]


def test_absent_file_and_model(detect):
    assert "no file 'nowhere.txt'" in detect("nowhere.txt", "--model", "model").err
    assert "no model folder './nowhere'" in detect("forget.jsonl", "--model", "./nowhere").err
    assert detect("forget.jsonl").code == 2


def test_share_outside_its_bounds(detect):
    assert detect("forget.jsonl", "--model", "model", "--k", "1.5").code == 2
