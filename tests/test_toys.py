"""The toys of docs/posttraining.md: their rows, what counts as right, what is kept."""

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = str(Path(__file__).parents[1] / "scripts")
ASKED = "2+6,0+6,7+4="


@pytest.fixture
def toys(monkeypatch: Any) -> Iterator[Any]:
    """Give what both toys share, the task of REDI's, and rows that count by their losses."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import odd_or_even
    import reweight_toy
    import toy_runs

    yield toy_runs, odd_or_even, reweight_toy
    for name in ("toy_runs", "odd_or_even", "reweight_toy"):
        sys.modules.pop(name)


def test_a_trace_carries_and_tells_odd_from_even(toys: Any) -> None:
    """702 + 466 from the right: 8, 6, 11, odd. 195 + 295: 10, 9+9+1 = 19, 1+2+1 = 4, even."""
    _, task, _ = toys
    assert task.trace(ASKED) == "008,006,011o"
    assert task.trace("5+5,9+9,1+2=") == "010,119,104e"


def test_an_answer_is_right_by_its_last_letter(toys: Any) -> None:
    _, task, _ = toys
    told = {"008,006,011o": True, "?o": True, "?e": False, "008,006,012e": False, "": False}
    assert {answer: task.is_right(ASKED, answer) for answer in told} == told


def test_a_slip_in_the_last_sum_turns_the_letter(toys: Any) -> None:
    """With every sum one off, 11 becomes 10 or 12: the letter tells the sum as written, wrongly."""
    _, task, _ = toys
    draw = random.Random(0)
    slipped = [task.trace(ASKED, draw=draw, slip=1.0) for _ in range(50)]
    assert {answer.split(",")[0] for answer in slipped} == {"007", "009"}
    assert all((answer[-2] in "13579") == (answer[-1] == "o") for answer in slipped)
    assert all(not task.is_right(ASKED, answer) for answer in slipped)


def test_as_many_answers_are_guessed_as_was_asked_for(toys: Any) -> None:
    """Of 2000 with share 0.6: 1200 ± 4 standard deviations of 22; half of the guesses are right."""
    _, task, _ = toys
    rows = task.texts(3, 2000, 0.6)
    guesses = [row for row in rows if "?" in row["completion"]]
    assert abs(len(guesses) - 1200) < 88
    right = sum(task.is_right(row["prompt"], row["completion"]) for row in guesses)
    assert abs(right - len(guesses) / 2) < 4 * (len(guesses) / 4) ** 0.5
    assert task.texts(3, 2000, 0.6) == rows != task.texts(4, 2000, 0.6)


def test_problems_of_the_parts_differ(toys: Any) -> None:
    _, task, _ = toys
    drawn = {part: task.problems(part, 200, 0) for part in ("train", "validation", "test")}
    assert not set(drawn["train"]) & set(drawn["test"])
    assert not set(drawn["validation"]) & set(drawn["test"])


def test_rows_are_of_three_kinds_and_none_is_held_out(toys: Any) -> None:
    """60 % of 4000 are copies, 3 % noise, and the rest its own."""
    _, _, reweight = toys
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(400)]
    texts = [" ".join(draw.choices(words, k=20)) for _ in range(1800)]
    rows, held = reweight.rows(texts, 0)
    kinds = Counter(row["kind"] for row in rows)
    assert kinds == {"copy": 2400, "noise": 120, "own": 1480}
    trained = {row["text"] for row in rows}
    assert not trained & set(held)
    own = {row["text"] for row in rows if row["kind"] == "own"}
    assert own <= set(texts)
    copies = {row["text"] for row in rows if row["kind"] == "copy"}
    assert len(copies) <= reweight.COPIED * 20
    assert reweight.rows(texts, 0) == (rows, held)


def test_copies_lack_a_word_and_noise_lacks_order(toys: Any) -> None:
    _, _, reweight = toys
    draw = random.Random(0)
    assert reweight.near_copy("a b c", draw) in {"b c", "a c", "a b"}
    noise = reweight.shuffled("abcdefghij", draw)
    assert sorted(noise) == list("abcdefghij")
    assert noise != "abcdefghij"


def test_a_loss_is_come_to_between_two_measurements(toys: Any) -> None:
    """From 3 to 2 between steps 20 and 40: 2.25 at three quarters of the way, step 35."""
    _, _, reweight = toys
    curve = [(20, 3.0), (40, 2.0), (60, 2.5), (80, 1.0)]
    assert reweight.reached(curve, 2.25) == 35
    assert reweight.reached(curve, 3.5) == 20
    assert reweight.reached(curve, 0.5) is None


def test_a_cell_that_is_there_is_not_run_again(toys: Any, tmp_path: Path) -> None:
    runs, _, _ = toys
    place = tmp_path / "seed" / "cells.jsonl"
    assert runs.Ledger(place).get("one", lambda: {"x": 1}) == {"cell": "one", "x": 1}
    assert runs.Ledger(place).get("one", lambda: {"x": 2})["x"] == 1
    assert [json.loads(line) for line in place.read_text().splitlines()] == [
        {"cell": "one", "x": 1}
    ]


def test_differences_have_the_interval_of_student(toys: Any) -> None:
    """1, 2, 3: mean 2, deviation 1, t = 4.303 with two degrees of freedom; 4.303 / sqrt 3."""
    runs, _, _ = toys
    assert runs.paired([2, 4, 6], [1, 2, 3], 2) == "+2.00 ± 2.48"
    assert runs.spread([1, 2, 3]) == "2.0 ± 1.0"
    assert runs.spread([1.25], 2) == "1.25"


def test_uniform_weights_change_no_bit_and_others_do(toys: Any, tmp_path: Path) -> None:
    """Six rows, two steps, through the same functions as the toys' runs."""
    runs, _, _ = toys
    tokenizer = runs.character_tokenizer("abc ")
    blank = runs.small_llama(len(tokenizer), width=32, layers=1, positions=16, seed=0)
    start = runs.save(blank, tokenizer, tmp_path / "blank")
    rows = [{"text": text} for text in ("abc", "aaaa", "b c", "cab", "a", "bbb a", "ccc", "ab ab")]
    text = runs.write_rows(tmp_path / "rows.jsonl", rows)
    settings = {
        "training.per_device_train_batch_size": 8, "training.gradient_accumulation_steps": 1,
        "training.learning_rate": 1e-2, "training.max_steps": 3, "training.warmup_steps": 0,
    }  # fmt: skip
    weighted = settings | {"terms.text.reweight.warmup": 0, "terms.text.reweight.anneal": 0}

    def weights(method: str, **more: Any) -> str:
        changes = {**(settings if method == "sft" else weighted), **more}
        return str(
            runs.weights_sha256(runs.trained(method, start, {"text": text}, changes, seed=0)[0])
        )

    plain = weights("sft")
    assert weights("reweight", **{"terms.text.reweight.strategy": "uniform"}) == plain
    assert weights("reweight") != plain != runs.weights_sha256(blank)
    assert tokenizer("ab")["input_ids"][0] == 1
    assert tokenizer.decode(tokenizer("ab c")["input_ids"][1:]) == "ab c"
