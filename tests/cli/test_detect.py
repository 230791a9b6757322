import io
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unlearn.cli.detect import main


@pytest.fixture
def detect(world: Path, unlearn: Any) -> Any:
    def call(*arguments: object) -> Any:
        return unlearn(*arguments, program=main)

    return call


def rows(outcome: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_one_json_object_per_text_in_the_order_of_the_texts(detect):
    outcome = detect("forget.jsonl", "--model", "model", "--text-field", "question", "--json")
    assert outcome.code == 0, outcome.err
    found = rows(outcome)
    assert [row["id"] for row in found] == list(range(12))
    for n, row in enumerate(found):
        scores = row["scores"]
        assert list(scores) == ["loss", "ppl", "zlib", "mink", "minkpp", "gapk", "dcpdd"]
        assert scores["mink"] <= scores["loss"] < 0
        size = len(zlib.compress(f"Where was {n} born?".encode()))
        assert scores["zlib"] == pytest.approx(scores["loss"] / size, rel=1e-5)


@pytest.mark.parametrize("words", [("detect",), ("detect", "score")])
def test_the_command_of_unlearn_is_the_same(words, world, unlearn, detect):
    arguments = ("retain.jsonl", "--model", "model", "--text-field", "answer", "--json")
    assert unlearn(*words, *arguments).out == detect(*arguments).out
    assert unlearn(*words, *arguments).out == detect("score", *arguments).out


def test_table_for_people_keeps_its_numbers_at_80_columns(detect, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    Path("texts.txt").write_text("Bo paints [red]boats[/red], " * 20 + "\n")
    outcome = detect("texts.txt", "--model", "model", "--mode", "rows")
    row = next(line for line in outcome.out.splitlines() if "Bo" in line)
    assert len(row) <= 80
    assert len([word for word in row.split() if word.startswith("-")]) == 5
    assert "rough" in outcome.err or "generic English" in outcome.err  # the table of dcpdd
    assert "Alone it decides nothing" in outcome.out
    assert "were" not in outcome.out  # no claim about the past of the model


def test_scores_shares_and_other_models_by_option_and_by_file(detect):
    Path("prefix.txt").write_text("One. Two.\nThree.\n")
    Path("detect.yaml").write_text(
        "model: model\nscores: [loss, mink]\nk: [0.1, 0.5]\nmax_tokens: 60\n"
    )
    base = ("forget.jsonl", "--text-field", "question", "--json", "--recipe", "detect.yaml")
    assert list(rows(detect(*base))[0]["scores"]) == ["loss", "mink", "mink_0.5"]
    more = ("--score", "ref", "--score", "recall", "--score", "conrecall", "--score", "pac")
    files = ("--reference", "model", "--prefix", "prefix.txt", "--member-prefix", "prefix.txt")
    found = rows(detect(*base, *more, *files))[0]["scores"]
    assert list(found) == ["ref", "recall", "conrecall", "pac"]
    assert found["ref"] == 0.0  # the model itself
    every = rows(detect(*base, "--score", "all", *files))[0]["scores"]
    assert {"lowercase", "pac", "recall", "ref", "dcpdd"} <= set(every)
    assert "neighbour" not in every  # no column was named for it


def test_neighbours_stand_in_a_column(detect):
    row = {"id": "a", "text": "Ada was born in Oslo.", "neighbours": ["Ada was born.", "Bo."]}
    Path("texts.jsonl").write_text(json.dumps(row))
    outcome = detect("texts.jsonl", "--model", "model", "--id-field", "id", "--score", "neighbour",
                     "--json")  # fmt: skip
    (found,) = rows(outcome)
    assert found["id"] == "a"
    assert found["scores"]["neighbour"] is not None


def test_it_runs_out_of_the_box_and_says_what_that_is_worth(detect):
    outcome = detect("forget.jsonl", "--text-field", "question", "--offline")
    assert outcome.code == 0
    assert "made-up people" in outcome.err
    assert "nothing about the training data of any other model" in outcome.err


def test_standard_input(detect, monkeypatch):
    texts = io.BytesIO(b'{"text": "Ada was born in Oslo, in the morning."}\n{"text": ""}\n')
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=texts))
    found = rows(detect("-", "--model", "model", "--json"))
    assert [row["status"] for row in found] == ["ok", "too_short"]


def test_a_document_gives_windows_passages_and_a_map(detect):
    Path("book.txt").write_text("Ada was born in Oslo. Bo paints small boats.\n\n" * 30)
    small = ("--model", "model", "--window", "16", "--stride", "8", "--context", "64")
    found = rows(detect("book.txt", *small, "--json"))
    *windows, end = found
    assert [row["start_token"] for row in windows[:3]] == [0, 8, 16]
    assert end["n_windows"] == len(windows)
    assert end["basis"] == "rank"
    assert end["n_tokens"] == windows[-1]["start_token"] + 16
    outcome = detect("book.txt", *small, "--html", "map.html")
    assert "passages that stand out" in outcome.out
    assert "Which passages stand out" in Path("map.html").read_text()
    refused = detect("book.txt", *small, "--html", "map.html")
    assert "already exists" in refused.err
    assert "loading" not in refused.err
    outcome = detect("book.txt", *small)
    assert f"{len(windows)} windows 100 % of" in outcome.err


def test_another_models_tokenizer_is_noticed(detect, build_tiny_model):
    build_tiny_model(vocab_size=5000).save_pretrained("model")
    outcome = detect("forget.jsonl", "--model", "model", "--text-field", "question")
    assert outcome.code == 0
    assert "do they belong together?" in " ".join(outcome.err.split())


def test_the_help_shows_commands_and_how_to_score(detect):
    out = detect("--help").out
    assert "calibrate" in out
    assert "--text-field" in out


def test_windows_get_p_values_from_documents_never_seen(detect):
    """Against windows of the same text no window stands out much; too few of them are refused."""
    text = "Ada was born in Oslo. Bo paints small boats in the morning.\n\n"
    for name, repeats in (("book", 20), ("others", 40), ("few", 2)):
        Path(f"{name}.txt").write_text(text * repeats)
    small = ("--model", "model", "--window", "16", "--stride", "8", "--context", "64", "--json")
    *windows, end = rows(detect("book.txt", *small, "--nonmembers", "others.txt"))
    assert end["basis"] == "p"
    assert 0 < end["p"] <= 1
    assert "as a whole" in end["verdict"]
    for one in windows:
        assert set(one["p"]) == set(one["scores"]) - {"ppl"}
        assert all(0 < value <= 1 for value in one["p"].values())
    few = detect("book.txt", *small, "--nonmembers", "few.txt")
    assert few.code in (2, 4)
    assert "reference" in few.json["error"]["message"]
    Path("rows.jsonl").write_text(json.dumps({"text": text}))
    assert "detect decide" in detect("rows.jsonl", *small, "--nonmembers", "others.txt").err


def test_nothing_to_score_has_a_code_of_its_own(detect):
    Path("texts.jsonl").write_text('{"text": ""}\n{"text": "x"}\n')
    outcome = detect("texts.jsonl", "--model", "model", "--json")
    assert outcome.code == 5
    assert len(rows(outcome)) == 2


def test_what_a_reader_must_know_is_counted(detect):
    texts = [
        "x",
        "Bo.",
        "Ada was born in Oslo, in the morning. " * 3,
        "A\x00da was born in Oslo, in Oslo.",
    ]
    Path("texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    outcome = detect("texts.jsonl", "--model", "model", "--max-tokens", "20", "--json")
    for words in ("1 text without a token", "1 text with fewer tokens than --min-tokens",
                  "1 text longer than --max-tokens", "1 text with zero characters"):  # fmt: skip
        assert words in outcome.err


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("texts.txt", b"", "is empty"),
        ("texts.txt", b"\xff\xfe", "is UTF-16"),
        ("texts.txt", b"\x00\x00MZ", "binary file"),
        ("texts.jsonl", b"\n", "has no rows"),
        ("texts.jsonl", b'{"body": "x"}', "--text-field"),
        ("texts.docx", b"PK", "unknown extension"),
    ],
)
def test_unusable_file(detect, name, content, words):
    """Said before the model is looked for."""
    Path(name).write_bytes(content)
    outcome = detect(name, "--model", "owner/none", "--json")
    assert outcome.code == 2
    error = outcome.json["error"]
    assert words in error["message"] + error["hint"]


def test_absent_file_and_model(detect):
    assert "no file 'nowhere.txt'" in detect("nowhere.txt", "--model", "model").err
    absent = detect("forget.jsonl", "--model", "./nowhere", "--text-field", "question")
    assert "no model folder './nowhere'" in absent.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--k", "1.5"), "is not a share"),
        (("--score", "min-k"), "did you mean 'mink'"),
        (("--mode", "line"), "mode: input should be"),
        (("--score", "recall"), "needs texts that are no members"),
        (("--html", "map.html"), "add --mode document"),
        (("--recipe", "none.yaml"), "no file 'none.yaml'"),
    ],
)
def test_wrong_options(detect, options, words):
    outcome = detect("forget.jsonl", "--model", "model", "--text-field", "question", *options)
    assert outcome.code == 2
    assert words in outcome.err


def test_an_unknown_key_is_named(detect):
    Path("detect.yaml").write_text("scorse: [loss]\n")
    assert (
        "unknown key 'scorse'; did you mean 'scores'" in detect("x", "--recipe", "detect.yaml").err
    )


def test_a_text_file_and_rows_in_one_folder_need_a_decision(detect):
    Path("both").mkdir()
    Path("both/a.txt").write_text("Ada was born in Oslo.\n")
    Path("both/b.jsonl").write_text('{"text": "Bo paints boats."}\n')
    assert "choose --mode" in detect("both", "--model", "model").err
    found = rows(detect("both", "--model", "model", "--mode", "rows", "--json"))
    assert [row["id"] for row in found] == ["a.txt:0", "b.jsonl:0"]


def write_many(path: Path, count: int) -> None:
    text = "Ada was born in Oslo and paints small boats in the morning. "
    rows = ({"text": f"{n} {text * (1 + n % 7)}"} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(number, detect):
    """Part of the rows are there, the file is not; afterwards it is that of an undisturbed run."""
    write_many(Path("texts.jsonl"), 500)
    words = ["texts.jsonl", "--model", "model", "--offline", "--batch-tokens", "256"]
    assert detect(*words, "--out", "whole.jsonl").code == 0
    command = [sys.executable, "-m", "unlearn.cli", "detect", *words, "--out", "out.jsonl"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=dict(os.environ))
    part, state = Path("out.jsonl.part"), Path("out.jsonl.part.json")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not state.is_file():
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (75 if number == signal.SIGTERM else -number)
    if number == signal.SIGTERM:
        assert b"the same command goes on" in errors
    assert not Path("out.jsonl").exists()
    assert 0 < part.stat().st_size < Path("whole.jsonl").stat().st_size
    assert "begun with other settings" in detect(*words, "--out", "out.jsonl", "--k", "0.5").err
    outcome = detect(*words, "--out", "out.jsonl")
    assert "scoring from row" in outcome.err
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert not part.exists()
    assert "is there already" in detect(*words, "--out", "out.jsonl").err


def test_documents_go_on_too(detect, monkeypatch):
    """Killed after some windows of the second of two documents."""
    from unlearn.detect import output

    Path("books").mkdir()
    for name in ("a", "b"):
        Path(f"books/{name}.txt").write_text("Ada was born in Oslo. Bo paints boats.\n\n" * 60)
    words = ("books", "--model", "model", "--window", "16", "--stride", "8", "--context", "32",
             "--batch-tokens", "32")  # fmt: skip
    assert detect(*words, "--out", "whole.jsonl").code == 0
    append, calls = output.Output.append, []

    def failing(self: Any, block: Any) -> None:
        calls.append(block)
        if len(calls) == 6:
            raise KeyboardInterrupt
        append(self, block)

    monkeypatch.setattr(output.Output, "append", failing)
    assert detect(*words, "--out", "out.jsonl").code == 75
    monkeypatch.setattr(output.Output, "append", append)
    assert detect(*words, "--out", "out.jsonl", "--html", "map.html").code == 0
    found, whole = (
        [json.loads(line) for line in Path(name).read_text().splitlines()]
        for name in ("out.jsonl", "whole.jsonl")
    )
    for one, two in zip(found, whole, strict=True):
        scores = [row.pop("scores", {}) for row in (one, two)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
        one.pop("spans", None), two.pop("spans", None)
        assert one == two
    assert Path("map-1.html").exists()
    assert Path("map-2.html").exists()


def test_half_a_character_is_cleaned_wherever_texts_are_read(detect):
    """JSON may hold halves of surrogate pairs, which no tokenizer takes; also for dcpdd's check."""
    Path("texts.jsonl").write_text('{"text": "Ada was \\ud800 born in Oslo.", "id": "\\ud800"}\n')
    (row,) = rows(detect("texts.jsonl", "--model", "model", "--id-field", "id", "--json"))
    assert (row["id"], row["notes"]) == ("?", ["cleaned"])
    assert row["scores"]["dcpdd"] is not None
    outcome = detect("texts.jsonl", "--model", "model", "--mode", "document", "--json")
    assert outcome.code == 0


def test_a_blank_or_short_document_says_so(detect):
    Path("blank.txt").write_text("\n\n \n")
    end = rows(detect("blank.txt", "--model", "model", "--json"))[-1]
    assert end["status"] == "short"
    outcome = detect("blank.txt", "--model", "model")
    assert "1 window\n" in outcome.out
    assert "no passage stands out" in outcome.out
