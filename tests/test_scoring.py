"""Scoring many rows: how they are grouped, and that grouping changes nothing."""

from typing import Any

import pytest
import torch

from unlearn.data.encode import Example
from unlearn.scores import Scores
from unlearn.scoring import by_prompt, num_labelled, scored

WANT = ("correct", "statistics")


def example(prompt: list[int], answer: list[int]) -> Example:
    return Example(prompt + answer, [-100] * len(prompt) + answer, len(prompt), 0)


def family(prompts: int, answers: int, seed: int = 0) -> list[Example]:
    """Give rows of several prompts in turn; answers are 1 to 9 tokens long."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(least: int, most: int) -> list[int]:
        size = int(torch.randint(least, most + 1, (), generator=generator))
        return torch.randint(3, 300, (size,), generator=generator).tolist()

    asked = [tokens(2, 20) for _ in range(prompts)]
    return [example(asked[row % prompts], tokens(1, 9)) for row in range(prompts * answers)]


def test_rows_of_one_prompt_stay_together_and_the_prompt_counts_once() -> None:
    """Prompts of 10 with two answers of 5: 20 tokens each, so a budget of 40 takes two of them."""
    rows = [example([prompt] * 10, [8, answer, 8, 8, 8]) for answer in (1, 2) for prompt in "abc"]
    assert by_prompt(rows, 40) == [[0, 3, 1, 4], [2, 5]]
    assert by_prompt(rows, 39) == [[0, 3], [1, 4], [2, 5]]


def test_a_prompt_that_exceeds_the_budget_alone_is_parted() -> None:
    """10 + 5 + 5 is over 15, but 10 + 5 is not; a row over the budget goes alone."""
    rows = [example([1] * 10, [answer] * 5) for answer in range(3)]
    assert by_prompt(rows, 15) == [[0], [1], [2]]
    assert by_prompt(rows, 24) == [[0, 1], [2]]
    assert by_prompt(rows, 1) == [[0], [1], [2]]


def test_longest_first() -> None:
    rows = [example([1], [5] * size) for size in (2, 4, 3)]
    assert by_prompt(rows, 100) == [[1, 2, 0]]


def by_place(model: Any, rows: list[Example], **scoring: Any) -> list[list[torch.Tensor]]:
    found: list[Any] = [None] * len(rows)
    for places, scores in scored(model, rows, want=WANT, **scoring):
        for row, place in enumerate(places):
            assert found[place] is None
            mask = scores.mask[row]
            columns = (scores.log_probs, scores.correct, scores.mean, scores.variance)
            found[place] = [column[row][mask] for column in columns]
    return found


def naive(model: Any, row: Example) -> list[torch.Tensor]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.input_ids])).logits
    scores = Scores.from_logits(logits, torch.tensor([row.labels]), statistics=True)
    columns = (scores.log_probs, scores.correct, scores.mean, scores.variance)
    return [column[0][scores.mask[0]] for column in columns]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_numbers_are_those_of_each_row_alone(
    batch_tokens: int, attention: str, build_tiny_model: Any
) -> None:
    """With shared beginnings (sdpa) and in padded batches (eager), for any batch."""
    model = build_tiny_model(attn_implementation=attention)
    rows = family(prompts=4, answers=5)
    for row, found in zip(rows, by_place(model, rows, batch_tokens=batch_tokens), strict=True):
        assert len(found[0]) == num_labelled(row)
        for got, expected in zip(found, naive(model, row), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_prompt_goes_through_the_model_once(tiny_model: Any) -> None:
    rows = [example([5, 6, 7, 8], [answer, 9]) for answer in (10, 11, 12)]
    seen: list[int] = []
    scores = scored(tiny_model, rows)
    tiny_model.model.layers[0].mlp.register_forward_hook(lambda m, i, out: seen.append(out.numel()))
    assert len(list(scores)) == 1
    assert seen[-1] == 32 * (4 + 3)  # hidden size times tokens; the last ones predict nothing


def test_full_logits_work_too(tiny_model: Any) -> None:
    """A model whose logits are not those of its head is scored in padded batches."""
    from unlearn.scores import Scorer

    rows = family(prompts=2, answers=3)
    for row, found in zip(rows, by_place(tiny_model, rows, scorer=Scorer(None)), strict=True):
        for got, expected in zip(found, naive(tiny_model, row), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_several_labelled_turns_and_rows_without_labels(tiny_model: Any) -> None:
    """Labels may begin again later in a row; a row may have none at all."""
    ids = [5, 6, 7, 8, 9, 10]
    rows = [
        Example(ids, [-100, 6, -100, -100, 9, 10], 1, 0),
        Example(ids, [-100] * 6, 6, 1),
        Example([5], [5], 0, 2),
    ]
    found = by_place(tiny_model, rows)
    assert [len(columns[0]) for columns in found] == [3, 0, 0]
    torch.testing.assert_close(found[0][0], naive(tiny_model, rows[0])[0], rtol=0, atol=1e-5)


def test_gradients_are_on_between_groups(tiny_model: Any) -> None:
    for _ in scored(tiny_model, family(2, 2), batch_tokens=1):
        assert torch.is_grad_enabled()
    assert tiny_model.config._attn_implementation == "sdpa"
