"""Labelled texts: the public benchmarks in their own columns, own files, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from unlearn.errors import UserError
from unlearn.evals.detection.labelled import (
    Columns,
    LabelledText,
    clustered,
    read_labelled,
    read_sides,
)


def write(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Stand in for the hub: source -> rows."""
    there: dict[str, list[Any]] = {}
    monkeypatch.setattr(
        "unlearn.evals.detection.labelled.load_any_rows", lambda spec, offline: there[spec]
    )
    return there


def test_wikimia_has_a_split_per_length(hub: dict[str, list[Any]]) -> None:
    for length in (32, 64, 128, 256):
        hub[f"swj0419/WikiMIA:WikiMIA_length{length}"] = [
            {"input": f"seen {length}", "label": 1},
            {"input": f"new {length}", "label": 0},
        ]
    assert read_labelled("wikimia:64") == [
        LabelledText("seen 64", True, "length 64"),
        LabelledText("new 64", False, "length 64"),
    ]
    assert {text.group for text in read_labelled("wikimia")} == {
        f"length {n}" for n in (32, 64, 128, 256)
    }
    with pytest.raises(UserError, match="unknown length of WikiMIA '65'"):
        read_labelled("wikimia:65")


def test_bookmia_and_a_copy_of_it(hub: dict[str, list[Any]], tmp_path: Path) -> None:
    rows = [
        {"book_id": 1, "snippet_id": 0, "snippet": "seen", "label": 1},
        {"book_id": 2, "snippet_id": 0, "snippet": "new", "label": 0},
    ]
    hub["swj0419/BookMIA:train"] = rows
    copy = write(tmp_path / "book.jsonl", rows)
    assert read_labelled("bookmia") == read_labelled("bookmia", path=copy)
    assert read_labelled("bookmia") == [LabelledText("seen", True), LabelledText("new", False)]


def test_mimir_has_two_texts_per_row(hub: dict[str, list[Any]], tmp_path: Path) -> None:
    row = {"member": "seen", "nonmember": "new", "member_neighbors": ["a"]}
    hub["iamgroot42/mimir#github:ngram_13_0.8"] = [row]
    found = [LabelledText("seen", True, "github"), LabelledText("new", False, "github")]
    assert read_labelled("mimir:github") == found
    assert read_labelled("mimir:github", path=write(tmp_path / "m.jsonl", [row])) == found
    hub["iamgroot42/mimir#arxiv:none"] = [row]
    assert read_labelled("mimir:arxiv:none")[0].group == "arxiv"
    with pytest.raises(UserError, match="many sources"):
        read_labelled("mimir")


def test_patentmia_comes_from_a_file(tmp_path: Path) -> None:
    rows = [{"text": "一种装置", "label": 1}, {"text": "一种方法", "label": 0}]
    found = read_labelled("patentmia", path=write(tmp_path / "p.jsonl", rows))
    assert [text.text for text in found] == ["一种装置", "一种方法"]
    with pytest.raises(UserError, match="not on the hub"):
        read_labelled("patentmia")


def test_muse_is_two_lists(hub: dict[str, list[Any]], tmp_path: Path) -> None:
    hub["muse-bench/MUSE-News#privleak:forget"] = [{"text": "seen"}]
    hub["muse-bench/MUSE-News#privleak:holdout"] = [{"text": "new"}]
    found = [LabelledText("seen", True, "news"), LabelledText("new", False, "news")]
    assert read_labelled("muse:news") == found
    (tmp_path / "forget.json").write_text('["seen"]')
    (tmp_path / "holdout.json").write_text('["new"]')
    assert read_labelled("muse:news", path=str(tmp_path)) == found
    with pytest.raises(UserError, match="unknown corpus of MUSE 'newz'; did you mean 'news'"):
        read_labelled("muse:newz")


@pytest.mark.parametrize(
    ("yes", "no"), [(1, 0), ("1", "0"), (True, False), (1.0, 0.0), ("member", "nonmember")]
)
def test_own_files_and_the_ways_to_write_a_label(tmp_path: Path, yes: Any, no: Any) -> None:
    rows = [{"content": "seen", "label": yes}, {"content": "new", "label": no}]
    found = read_labelled(write(tmp_path / "own.jsonl", rows))
    assert [text.member for text in found] == [True, False]


def test_own_columns_and_a_file_per_group(tmp_path: Path) -> None:
    rows = [{"body": "seen", "known": 1}, {"body": "new", "known": 0}]
    write(tmp_path / "d" / "short.jsonl", rows)
    write(tmp_path / "d" / "long.jsonl", rows)
    found = read_labelled(str(tmp_path / "d"), columns=Columns("body", "known"))
    assert [text.group for text in found] == ["long", "long", "short", "short"]
    (tmp_path / "t.csv").write_text("text,label\nseen,1\nnew,0\n")
    assert [text.member for text in read_labelled(str(tmp_path / "t.csv"))] == [True, False]


def test_clusters_are_a_column_or_rows_that_follow_one_another(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": n % 2, "book_id": n // 3} for n in range(6)]
    path = write(tmp_path / "own.jsonl", rows)
    found = read_labelled(path, columns=Columns(cluster="book_id"))
    assert [text.cluster for text in found] == ["0", "0", "0", "1", "1", "1"]
    assert [text.cluster for text in clustered(found, 2)] == ["0", "0", "0", "0", "1", "1"]
    with pytest.raises(UserError, match="did you mean 'book_id'"):
        read_labelled(path, columns=Columns(cluster="bookid"))


def test_two_sources(tmp_path: Path) -> None:
    seen = write(tmp_path / "a.jsonl", [{"q": "?", "answer": "seen"}, {"q": "?", "answer": "too"}])
    new = write(tmp_path / "b.jsonl", [{"answer": "new"}])
    found = read_sides(f"{seen}:[:1]", new, text_field="answer")
    assert found == [LabelledText("seen", True), LabelledText("new", False)]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a", "label": 1}], "no non-members"),
        ([{"text": "a", "label": 0}], "no members"),
        ([{"text": "a"}], "has no column label or member"),
        ([{"body": "a", "label": 1}], "has no column input, text"),
        ([{"text": "a", "label": 2}], "neither 1"),
        ([{"text": "a", "label": [1, 0]}], "is a list"),
        ([{"text": 3, "label": 1}], r"is a number \(3\), not a text"),
        (["a"], "has no column label"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path: Path, rows: list[Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_labelled(write(tmp_path / "own.jsonl", rows))


def test_names_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'wikimia'"):
        read_labelled("wikimai")
    with pytest.raises(UserError, match="no file or folder"):
        read_labelled("bookmia", path=str(tmp_path / "nowhere"))
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(UserError, match="no labels"):
        read_labelled(str(tmp_path / "a.txt"))
