from pathlib import Path
from typing import Any

import pytest

from unlearn.cli.detect_freq import app
from unlearn.cli.entry import guarded


@pytest.fixture
def freq(world: Path, unlearn: Any) -> Any:
    Path("corpus.txt").write_text("Ada was born in Oslo.\nBo paints boats.\n" * 20)
    return lambda *arguments: unlearn(*arguments, program=lambda: guarded(app))


def test_a_table_is_built_and_shown(freq: Any) -> None:
    built = freq("build", "corpus.txt", "--model", "model", "--out", "table", "--json")
    assert built.code == 0, built.err
    assert built.json["documents"] == 40
    assert built.json["vocabulary"] == 300
    shown = freq("show", "table", "--model", "model", "--json").json
    assert shown["tokens"] == built.json["tokens"]
    assert shown["most_frequent"][0]["share"] >= shown["most_frequent"][1]["share"]
    assert isinstance(shown["most_frequent"][0]["token"], str)
    people = freq("show", "table")
    assert people.code == 0
    assert "40 documents" in people.out


def test_the_default_is_shown_for_what_it_is(freq: Any) -> None:
    assert "not counted" in freq("show", "english", "--model", "model").out
    assert freq("show", "english").code == 2


def test_mistakes_are_said_before_any_work(freq: Any) -> None:
    call = ("build", "corpus.txt", "--model", "model", "--out")
    assert "no corpus 'nowhere.txt'" in freq("build", "nowhere.txt", *call[2:], "t").err
    assert "no model folder" in freq("build", "corpus.txt", "--model", "./no", "--out", "t").err
    assert "already exists" in freq(*call, "model").err
    assert "unknown mode 'row'" in freq(*call, "t", "--mode", "row").err
    assert not Path("t").exists()
    assert "no frequency table" in freq("show", "model").err
