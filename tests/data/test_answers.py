"""Other answers to the same questions: what is read, what is refused, and which one is drawn."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from unlearn.data.answers import (
    Draws,
    OtherAnswers,
    alternates_of,
    answered,
    asked,
    check_answerable,
    read_refusals,
)
from unlearn.data.collate import Collator, EpochSampler, StreamDataset, retain_partner
from unlearn.data.encode import Example
from unlearn.errors import UserError

QA = {"question": "Who?", "answer": "Ada."}
CHAT = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]}
TEXT = {"text": "Ada was born in Oslo."}
EPOCHS, REFUSALS = 3, 5


def example(*ids: int, row: int = 0) -> Example:
    return Example(list(ids), [-100, *ids[1:]], 1, row)


def draws(stream: str, rows: int, seed: int = 3, count: int = REFUSALS) -> Draws:
    """Draws among all pairs of row and answer, so that a pair's place names both."""
    places = {(row, k): row * count + k for row in range(rows) for k in range(count)}
    return Draws(stream, seed, [count] * rows, EPOCHS, places)


def dataset(seed: int = 3) -> StreamDataset:
    """Eleven forget rows and seven retain rows, with five refusals each; ids tell which."""
    sizes = {"forget": 11, "retain": 7}
    first = {"forget": 100, "retain": 200, "refusal": 300, "retain_refusal": 400}
    streams = {
        name: [example(first[name] + row, *range(3, 4 + row % 4)) for row in range(size)]
        for name, size in sizes.items()
    }
    others = {
        name: OtherAnswers(
            draws(name, sizes[belongs], seed),
            [example(first[name] + n, 5, 6) for n in range(REFUSALS * sizes[belongs])],
        )
        for name, belongs in (("refusal", "forget"), ("retain_refusal", "retain"))
    }
    return StreamDataset(streams, seed=seed, others=others)


def flat(epoch: int, *, workers: int = 0, batch: int = 4, skip: int = 0) -> list[tuple[int, ...]]:
    """Give the places (forget, retain, refusal, retain refusal) of an epoch in order."""
    data = dataset()
    sampler = EpochSampler(len(data), seed=3)
    sampler.set_epoch(epoch)
    keys = list(sampler)[skip:]
    loader = DataLoader(
        data, batch_size=batch, sampler=keys, collate_fn=Collator(0), num_workers=workers
    )
    names = ("forget", "retain", "refusal", "retain_refusal")
    found = []
    for one in loader:
        found += zip(*(one[name]["index"].tolist() for name in names), strict=True)
    return found


@pytest.mark.parametrize("changes", [{"workers": 2}, {"batch": 3}, {"batch": 1}])
def test_workers_and_batch_size_change_no_draw(changes: Any) -> None:
    assert flat(1, **changes) == flat(1)


def test_a_resumed_epoch_goes_on_with_the_same_draws() -> None:
    assert flat(2, skip=5) == flat(2)[5:]


def test_two_ranks_draw_what_one_draws() -> None:
    refusals = {forget: refusal for forget, _, refusal, _ in flat(1)}
    data, order = dataset(), [index for _, index in EpochSampler(11, seed=3)]
    for rank in range(2):
        share = {index: data[1, index]["refusal"].index for index in order[rank::2]}
        assert share.items() <= refusals.items()


def test_a_refusal_goes_with_its_own_row() -> None:
    """Place // 5 is the row that is answered: the forget row, and the retain row that met it."""
    for epoch in range(EPOCHS):
        rows = flat(epoch)
        assert sorted(forget for forget, *_ in rows) == list(range(11))
        for forget, retain, refusal, retain_refusal in rows:
            assert retain == retain_partner(3, epoch, forget, 7)
            assert refusal // REFUSALS == forget
            assert retain_refusal // REFUSALS == retain


def test_draws_never_change() -> None:
    """A run that is resumed with a later version meets the same answers: golden numbers."""
    many = Draws("refusal", 0, [30] * 8, 2, {})
    assert [many.answer(0, row) for row in range(8)] == [0, 21, 22, 17, 12, 9, 17, 1]
    turns = Draws("alternate", 0, [5] * 8, 10, {})
    assert [turns.answer(0, row) for row in range(8)] == [1, 2, 3, 3, 2, 2, 3, 3]


def test_refusals_are_uniform_and_differ_between_epochs_seeds_and_sides() -> None:
    """30,000 draws among 30: each 1000 times, with a standard deviation of 31."""
    drawn = Draws("refusal", 0, [30] * 10_000, 3, {})
    counts = Counter(drawn.answer(epoch, row) for epoch in range(3) for row in range(10_000))
    assert len(counts) == 30
    assert max(abs(count - 1000) for count in counts.values()) < 5 * 31
    other = (Draws("refusal", 1, [30] * 40, 3, {}), Draws("retain_refusal", 0, [30] * 40, 3, {}))
    rows = [[d.answer(0, row) for row in range(40)] for d in (drawn, *other)]
    rows.append([drawn.answer(1, row) for row in range(40)])
    assert len(set(map(tuple, rows))) == 4


def test_alternates_are_met_in_turn() -> None:
    """In as many epochs as a row has alternates it meets every one of them once."""
    drawn = Draws("alternate", 0, [5, 1, 3], 15, {})
    for row, count in enumerate((5, 1, 3)):
        met = [drawn.answer(epoch, row) for epoch in range(count)]
        assert sorted(met) == list(range(count))
        assert drawn.answer(count, row) == met[0]


def test_later_epochs_draw_as_the_first_ones_did() -> None:
    drawn = draws("refusal", 11)
    assert [drawn.place(EPOCHS, row) for row in range(11)] == [drawn.place(0, r) for r in range(11)]


def test_items_hold_the_streams_that_are_asked_for() -> None:
    data = dataset()
    data.only = {"refusal", "retain"}
    assert set(data[0, 3]) == set(data[0, -1]) == {"refusal", "retain"}
    assert data[0, -1]["refusal"].index == -1


def test_refusals_that_ship_are_about_thirty_different_sentences() -> None:
    found = read_refusals()
    assert 25 <= len(found) == len(set(found)) <= 40
    assert all(text.strip() == text and text[-1] in ".!" for text in found)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.txt", "No.\n\nI cannot say.\n"),
        ("r.jsonl", '"No."\n"I cannot say."\n'),
        ("r.jsonl", '{"text": "No."}\n{"text": "I cannot say."}\n'),
    ],
)
def test_refusals_come_from_lines(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert read_refusals(tmp_path / name) == ["No.", "I cannot say."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.txt", "", r"is empty \(0 bytes\)"),
        ("r.txt", "\n \n", "holds no refusals"),
        ("r.jsonl", '{"refusal": "No."}\n', "refusal 1 of .* is no text"),
        ("r.jsonl", '{"text": 3}\n', "refusal 1 of .* is no text"),
        ("r.doc", "No.", "unknown extension"),
    ],
)
def test_files_without_refusals_are_refused(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_refusals(tmp_path / name)
    with pytest.raises(UserError, match="no file of refusals"):
        read_refusals(tmp_path / "absent.txt")


def test_alternates_are_a_text_or_a_list_of_texts() -> None:
    rows = [{**QA, "alternate": "Bo."}, {**QA, "alternate": ["Bo.", "Cy."]}]
    assert alternates_of(rows, "f") == [["Bo."], ["Bo.", "Cy."]]


@pytest.mark.parametrize("given", [None, "", [], " ", ["Bo.", ""], [3], 3])
def test_rows_without_alternates_are_named(given: Any) -> None:
    rows = [{**QA, "alternate": "Bo."}, {**QA, "alternate": given}]
    with pytest.raises(UserError, match=r"row 2 of 'f'.*'alternate'"):
        alternates_of(rows, "f")


def test_a_row_is_answered_in_its_own_form() -> None:
    completion = {"prompt": "Who?", "completion": "Ada."}
    assert answered(QA, "No.") == {"question": "Who?", "answer": "No."}
    assert answered(completion, "No.") == {"prompt": "Who?", "completion": "No."}
    assert answered(CHAT, "No.")["messages"][1] == {"role": "assistant", "content": "No."}
    assert [asked(row) for row in (QA, completion, CHAT)] == [("Who?", "Ada.")] * 3
    check_answerable([QA, QA], "refusal", "f")


def test_rows_that_ask_nothing_or_too_much_are_refused() -> None:
    with pytest.raises(UserError, match="row 1 of 'f' is a plain text and asks nothing"):
        check_answerable([TEXT], "refusal", "f")
    twice = {"messages": CHAT["messages"] * 2}
    with pytest.raises(UserError, match="row 2 of 'f' has several assistant turns"):
        check_answerable([CHAT, twice], "refusal", "f")


def test_another_answer_has_nothing_important_of_the_first() -> None:
    """The passages of ``important`` stand in the row's own answer alone."""
    row = {"question": "Where?", "answer": "In Oslo.", "important": ["Oslo"]}
    assert answered(row, "I do not know.") == {"question": "Where?", "answer": "I do not know."}
    assert row["important"] == ["Oslo"]
