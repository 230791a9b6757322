"""Pairs out of judged traces: every filter counted, ids by content, the same bytes each time."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from unlearn.data.traces import How, build_pairs, grams
from unlearn.data.verdicts import Verdict
from unlearn.errors import UserError
from unlearn.recipes.pair_data import write_pairs

HOW = How(Verdict.parse("llama & math"), keep={"valid": "yes"}, drop={"source": "cn_k12"})


def row(problem: str, llama: Any, math: Any, **more: Any) -> dict[str, Any]:
    """Give a problem whose answers are numbered."""
    answers = [f"{problem}: answer {n}" for n in range(len(llama))]
    said = {"valid": "Yes ", "source": "olympiads", "llama": llama, "math": math}
    return {"problem": problem, "generations": answers} | said | more


ROWS = [
    row("A", [True, False, True], [True, True, True]),  # 0 right, 1 wrong
    row("B", [True, True], [True, True]),  # no wrong answer
    row("C", [False, False], [False, True]),  # no right answer
    row("D", [True, False], [True, False], valid="no"),
    row("E", [True, False], [True, False], source="CN_K12"),
    row("F", [True], [True, False], generations=["a", "b"]),  # verdicts of another number
    row("", [True, False], [True, False]),
    row("G", [], []),
    row("H", [True, None], [True, True]),  # null is no
    row("a.", [True, False], [True, False]),  # A again
    row("I", [False, True, True], [True, False, True],
        generations=["<think>hm", "<think>x</think>y", "<think>z</think>w"]),
    row("What is the sum of the first nine primes", [True, False], [True, False]),
]  # fmt: skip


def test_a_dozen_rows_by_hand() -> None:
    built = build_pairs(ROWS, HOW, against=["Tell: what is the sum of the first nine primes?"])
    assert built.counts == {
        "rows": 12,
        "no wrong answer (trained on first, no pair)": 1,
        "no right answer": 1,
        "valid is not yes": 1,
        "source is cn_k12": 1,
        "verdicts of another number than answers": 1,
        "no problem": 1,
        "no answers": 1,
        "the same problem again": 1,
        "answers without an end": 1,
        "shares words with an evaluation": 1,
        "rows to train on first": 4,
        "pairs": 3,
    }
    found = {one["question"]: (one["chosen"], one["rejected"]) for one in built.pairs}
    assert found == {
        "A": ("A: answer 0", "A: answer 1"),
        "H": ("H: answer 0", "H: answer 1"),
        "I": ("<think>z</think>w", "<think>x</think>y"),
    }
    assert sorted(one["question"] for one in built.rows) == ["A", "B", "H", "I"]


def test_all_pairs_of_a_problem_or_the_first_few() -> None:
    """Two right and two wrong answers: 4 pairs, or 2 without an answer in both."""
    rows = [row("A", [True, False, True, False], [True] * 4)]
    every = build_pairs(rows, replace(HOW, per_problem=None)).pairs
    assert len({(one["chosen"], one["rejected"]) for one in every}) == 4
    two = build_pairs(rows, replace(HOW, per_problem=2))
    assert {(one["chosen"][-1], one["rejected"][-1]) for one in two.pairs} == {
        ("0", "1"),
        ("2", "3"),
    }
    assert len(two.rows) == 2


def test_a_stricter_negative_needs_every_verdict_against_it() -> None:
    rows = [row("A", [True, False, False], [True, True, False])]
    built = build_pairs(rows, replace(HOW, negative="all_false"))
    assert [one["rejected"] for one in built.pairs] == ["A: answer 2"]
    assert built.counts["answers that verdicts disagree on"] == 1


def test_ids_are_of_content_and_the_order_of_the_seed() -> None:
    once, again = build_pairs(ROWS, HOW), build_pairs(list(reversed(ROWS)), HOW)
    key = {one["id"]: one for one in once.pairs}
    assert {one["id"] for one in again.pairs} - key.keys() == {
        one["id"] for one in again.pairs if one["question"] == "a."
    }
    other = build_pairs(ROWS, replace(HOW, seed=1))
    assert [one["id"] for one in other.pairs] != [one["id"] for one in once.pairs]
    assert sorted(one["id"] for one in other.pairs) == sorted(key)


def test_long_ones_are_left_out_and_lengths_noted() -> None:
    how = replace(HOW, count=lambda texts: [len(t) for t in texts], max_response=11, max_prompt=5)
    built = build_pairs(ROWS, how)
    assert sorted(one["question"] for one in built.pairs) == ["A", "H"]
    assert built.pairs[0]["chosen_tokens"] == 11
    assert built.counts["answer above 11 tokens"] == 2  # of I: its row and its pair
    assert built.counts["problem above 5 tokens"] == 2


def test_short_texts_are_one_gram() -> None:
    assert list(grams("What's 2+2?")) == ["what s 2 2"]
    assert len(list(grams("a b c d e f g h i"))) == 2


@pytest.mark.parametrize(
    ("text", "right"), [("a", [1, 1, 0]), ("a & b", [1, 0, 0]), ("~(a | b)", [0, 0, 1]),
                        ("c.d", [0, 1, 1]), ("~a & c.d", [0, 0, 1])],
)  # fmt: skip
def test_verdict_expressions(text: str, right: list[int]) -> None:
    said = {"a": [True, 1, False], "b": [True, None, False], "c": {"d": [0, True, True]}}
    verdict = Verdict.parse(text)
    lists = verdict.lists(said, "row 1")
    assert [int(verdict.right(lists, at)) for at in range(3)] == right


@pytest.mark.parametrize("text", ["", "a and b", "f(a)", "a > 1", "__import__('os')", "a &", "1"])
def test_anything_else_is_no_verdict(text: str) -> None:
    with pytest.raises(UserError, match="cannot read the verdict"):
        Verdict.parse(text)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UserError, match="row 1 of 'x' has no column 'mth'; did you mean 'math'"):
        build_pairs(ROWS, replace(HOW, verdict=Verdict.parse("mth")), source="x")
    with pytest.raises(UserError, match="has no column 'answers'"):
        build_pairs(ROWS, replace(HOW, generations="answers"))
    with pytest.raises(UserError, match=r"no pair is left of 'x' \(rows: 2; no wrong answer"):
        build_pairs([ROWS[1], ROWS[2]], HOW, source="x")


def test_a_second_run_writes_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "traces.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    for name in ("one", "two"):
        found = write_pairs(str(source), tmp_path / name, HOW)
    assert found["counts"]["pairs"] == 4
    for name in ("pairs.jsonl", "first.jsonl", "made.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with pytest.raises(UserError, match="exists and is left as it is"):
        write_pairs(str(source), tmp_path / "one", HOW)
    with pytest.raises(UserError, match="no model whose tokens it counts"):
        write_pairs(str(source), tmp_path / "three", replace(HOW, max_prompt=5))


@pytest.mark.parametrize("said", ["false", "no", 0.3, ["x"], 2])
def test_what_is_no_verdict_is_refused(said: Any) -> None:
    """Any of these would count as yes; 1.0 and 0 are verdicts."""
    rows = [{"problem": "P", "generations": ["a", "b"], "ok": [True, said]}]
    with pytest.raises(UserError, match=r"row 1 of .x.: .ok. holds .* which is no verdict"):
        build_pairs(rows, How(Verdict.parse("ok")), source="x")
    rows[0]["ok"] = [1.0, 0]
    assert len(build_pairs(rows, How(Verdict.parse("ok"))).pairs) == 1


def test_lists_that_are_texts_are_refused() -> None:
    row = {"problem": "P", "generations": ["a", "b"], "ok": "true"}
    with pytest.raises(UserError, match="'ok' is 'true', no list of verdicts"):
        build_pairs([row], How(Verdict.parse("ok")))
    row |= {"generations": "a", "ok": [True]}
    with pytest.raises(UserError, match="'generations' is a text, no list of answers"):
        build_pairs([row], How(Verdict.parse("ok")))
