"""Pairs of answers: the forms they may be written in, and what is refused."""

from typing import Any

import pytest

from unlearn.data import Template, encode
from unlearn.data.pairs import check_sides, sides_of
from unlearn.errors import UserError

USER = {"role": "user", "content": "Where?"}
OSLO, BERN = ({"role": "assistant", "content": text} for text in ("In Oslo.", "In Bern."))
CHAT = ({"messages": [USER, OSLO]}, {"messages": [USER, BERN]})
ROW = {"prompt": "Where?", "chosen": "In Oslo.", "rejected": "In Bern."}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ROW, ({"prompt": "Where?", "completion": "In Oslo."},
               {"prompt": "Where?", "completion": "In Bern."})),
        ({"question": "Where?", "chosen": "In Oslo.", "rejected": "In Bern."},
         ({"question": "Where?", "answer": "In Oslo."},
          {"question": "Where?", "answer": "In Bern."})),
        ({"prompt": [USER], "chosen": [OSLO], "rejected": [BERN]}, CHAT),
        ({"chosen": [USER, OSLO], "rejected": [USER, BERN]}, CHAT),
        ({"prompt": "Where?", "chosen": [OSLO], "rejected": [BERN]}, CHAT),
        ({"prompt": "Where?", "chosen": [USER, OSLO], "rejected": [USER, BERN]}, CHAT),
    ],
)  # fmt: skip
def test_all_forms_of_trl_become_two_rows(row: dict[str, Any], expected: Any) -> None:
    sides = sides_of([row], "pairs.jsonl")
    assert (sides["chosen"][0], sides["rejected"][0]) == expected


def test_other_columns_stay() -> None:
    sides = sides_of([ROW | {"id": 7}], "pairs.jsonl")
    assert [side[0]["id"] for side in sides.values()] == [7, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": "In Oslo."}, r"1 pair has two identical answers, of 2 in 'p' \(row 2\)"),
        ({"rejected": None}, "row 2 of 'p' has no 'rejected'"),
        ({"prompt": None}, "row 2 of 'p' has 'chosen' as text, but no prompt"),
        ({"chosen": 5}, r"row 2 of 'p': 'chosen' is a number \(5\)"),
        ({"chosen": [{"role": "assistant"}]}, "a turn of 'chosen' has no role or no content"),
    ],
)
def test_bad_pairs_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sides_of([ROW, ROW | change], "p")


def test_a_misspelt_column_is_answered() -> None:
    with pytest.raises(UserError, match="no 'rejected'; did you mean 'rejectd'"):
        sides_of([{"prompt": "a", "chosen": "b", "rejectd": "c"}], "p")


def test_pairs_that_are_cut_to_the_same_tokens_are_refused(tiny_tokenizer: Any) -> None:
    rows = [ROW | {"chosen": "a b c d e f in Oslo", "rejected": "a b c d e f in Bern"}]
    template = Template.for_tokenizer(tiny_tokenizer)

    def check(max_length: int) -> None:
        how = {"max_length": max_length, "source": "p"}
        sides = {
            name: encode(side, tiny_tokenizer, template, **how)
            for name, side in sides_of(rows, "p").items()
        }
        check_sides(sides, "p", max_length)

    check(64)
    with pytest.raises(UserError, match="identical answers") as error:
        check(12)
    assert "max_length=12 cuts off where they differ" in error.value.hint


def test_empty_answers_are_refused(tiny_tokenizer: Any) -> None:
    rows = sides_of([ROW, ROW | {"rejected": ""}], "p")["rejected"]
    template = Template.for_tokenizer(tiny_tokenizer)
    with pytest.raises(UserError, match=r"1 row has no answer tokens, of 2 in 'p' \(row 2\)"):
        encode(rows, tiny_tokenizer, template, max_length=64, source="p")
