"""Selectors: scores by hand, nested parts, and the ways they are commonly got wrong."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unlearn import selection
from unlearn.data.encode import IGNORE, Example
from unlearn.errors import UserError
from unlearn.keywords import keyword_positions, log_odds, masked, word_positions
from unlearn.scores import Scorer, Scores


def quiet(done: int, total: int) -> None: ...


def example(tokens: list[int], prompt: int, row: int = 0) -> Example:
    return Example(tokens, [IGNORE] * prompt + tokens[prompt:], prompt, row)


@pytest.mark.parametrize(
    ("rows", "fraction", "kept"),
    [(400, 0.05, 20), (400, 0.01, 4), (12, 0.25, 3), (10, 0.05, 1), (3, 0.01, 1), (7, 1.0, 7)],
)
def test_a_fraction_of_the_rows(rows: int, fraction: float, kept: int) -> None:
    """0.05 of 10 is 0.5, which rounds up; never fewer than one row."""
    assert selection.num_kept(rows, fraction) == kept


SCORES = st.lists(st.floats(-5, 5) | st.just(0.0), min_size=1, max_size=30)


@given(SCORES, st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_smaller_part_lies_in_a_larger_one(scores: list[float], one: float, two: float) -> None:
    small, large = sorted(selection.num_kept(len(scores), share) for share in (one, two))
    inner, outer = (set(selection.highest(scores, number)) for number in (small, large))
    assert inner <= outer
    assert len(inner) == small
    assert min(scores[i] for i in inner) >= max(
        [s for i, s in enumerate(scores) if i not in inner], default=-math.inf
    )


def test_of_equal_scores_the_first_rows_are_kept() -> None:
    assert selection.highest([1.0, 2.0, 1.0, 2.0, 1.0], 3) == [0, 1, 3]


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        selection.highest([1.0, math.nan], 1)


def test_random_is_a_permutation_of_its_seed() -> None:
    one, again = (selection.random_scores(50, seed=3) for _ in range(2))
    assert (one == again).all()
    assert sorted(one) == list(range(-49, 1))
    chosen = [selection.highest(selection.random_scores(50, seed=s), 5) for s in range(20)]
    assert len({tuple(rows) for rows in chosen}) == 20


def test_min_k_keeps_what_is_memorised_most() -> None:
    """Five tokens each; 40 % are the two least likely ones.

    Row 0: -1 and -2, mean -1.5. Row 1: -0.1 and -0.1, mean -0.1: remembered most. Row 2: -3 and -4.
    The other tokens do not count, though they make row 2 the likeliest on average.
    """
    rows = [[-0.2, -1, -2, -0.3, -0.2], [-0.1] * 5, [0, -3, -4, 0, 0]]
    log_probs = torch.tensor(rows)
    mask = torch.ones_like(log_probs, dtype=torch.bool)
    found = selection.min_k_scores(Scores(log_probs, mask, mask))
    assert found.tolist() == pytest.approx([-1.5, -0.1, -3.5])
    assert selection.highest(found.tolist(), 1) == [1]


def test_the_row_a_model_was_trained_on_is_the_one_it_remembers(tiny_model: Any) -> None:
    """The trap: sorting minus the score downwards would name this row last."""
    rows = [example([1, 40 + r, 60 + r, 80 + r, 100 + r, 2], 2, r) for r in range(6)]
    optimiser = torch.optim.Adam(tiny_model.parameters(), 1e-2)
    ids = torch.tensor([rows[4].input_ids])
    for _ in range(30):
        optimiser.zero_grad()
        tiny_model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    scores = selection.memorised(tiny_model, rows, progress=quiet)
    assert selection.highest(scores, 1) == [4]
    losses = selection.mean_log_probs(tiny_model, rows, progress=quiet)
    assert selection.highest(losses, 1) == [4]


def test_moderate_by_hand() -> None:
    """One cluster at 0, 1, 2, 3, 14: centre 4, distances 4, 3, 2, 1, 10, median 3: row 1 is it.

    Next are rows 0 and 2, one away from the median; then 3 (two away); 14 is seven away.
    """
    points = torch.tensor([[0.0], [1.0], [2.0], [3.0], [14.0]])
    scores = selection.moderate_scores(points, clusters=1)
    assert scores.tolist() == pytest.approx([-1, 0, -1, -2, -7])


def test_moderate_measures_from_the_own_cluster() -> None:
    """0, 2, 4 lie around 2, and 100, 102, 104 around 102: the median of 2 0 2 2 0 2 is 2."""
    points = torch.tensor([[0.0], [2.0], [4.0], [100.0], [102.0], [104.0]])
    scores = selection.moderate_scores(points, clusters=2, seed=1)
    assert scores.tolist() == pytest.approx([0, -2, 0, 0, -2, 0])
    assert len(selection.moderate_scores(points[:2], clusters=4)) == 2


def test_gradient_norm_by_hand() -> None:
    """3x + 4y has the gradient (3, 4), of length 5; x alone 3; what is not touched counts 0."""
    x, y, z = (torch.tensor(1.0, requires_grad=True) for _ in range(3))
    assert selection.gradient_norm(3 * x + 4 * y, [x, y, z]) == pytest.approx(5)
    assert selection.gradient_norm(3 * x + 4 * y, [x]) == pytest.approx(3)
    assert selection.gradient_norm(3 * x + 4 * y, [z]) == 0


def test_embeddings_are_means_over_real_tokens(tiny_model: Any) -> None:
    """Padding beside a longer row does not change a row's mean; the last layer is read."""
    rows = [example([1, 5, 9, 2], 2, 0), example(list(range(3, 30)), 2, 1)]
    together = selection.embeddings(tiny_model, rows, progress=quiet)
    alone = selection.embeddings(tiny_model, rows[:1], progress=quiet)
    assert torch.allclose(together[0], alone[0], atol=1e-6)
    caught = []
    hook = tiny_model.model.layers[-1].register_forward_hook(
        lambda module, given, out: caught.append(out if torch.is_tensor(out) else out[0])
    )
    tiny_model(input_ids=torch.tensor([rows[0].input_ids]))
    hook.remove()
    assert torch.allclose(alone[0], caught[0][0].mean(0), atol=1e-6)


def test_a_row_in_several_windows_has_the_mean_of_them() -> None:
    windows = [example([1, 2], 1, row) for row in (0, 0, 1)]
    assert selection.per_row([1.0, 3.0, 5.0], windows, 2).tolist() == [2.0, 5.0]
    assert selection.per_row([[1.0, 0], [3.0, 1], [5.0, 2]], windows, 2).tolist() == [
        [2, 0.5],
        [5, 2],
    ]


# keywords


def test_log_odds_by_hand() -> None:
    """Forget answers: 7 7 8 (F = 3), retain answers: 8 8 9 9 (R = 4), V = 3 distinct tokens.

    7: log(3/6) - log(1/7) = log 3.5. 8: log(2/6) - log(3/7) = log(7/9). 9 is not in the forget set.
    """
    forget, retain = [example([1, 7, 7, 8], 1)], [example([1, 8, 8, 9, 9], 1)]
    found = log_odds(forget, retain)
    assert found == pytest.approx({7: math.log(3.5), 8: math.log(7 / 9)})


def test_only_keywords_keep_their_label() -> None:
    """Half of the six labelled tokens. 7 and 8 stand twice each and are tied: the first three."""
    forget = [example([1, 7, 7, 8], 1, 0), example([1, 8, 5, 5], 1, 1)]
    retain = [example([1, 5, 5, 5, 5], 1)]
    places, scores = keyword_positions(forget, retain, 0.5)
    assert places == [[1, 2, 3], []]
    assert scores[7] == scores[8] > scores[5]
    assert masked(forget[0], [2]).labels == [IGNORE, IGNORE, 7, IGNORE]
    assert masked(forget[0], [2]).input_ids == forget[0].input_ids
    smaller, _ = keyword_positions(forget, retain, 0.2)
    assert all(set(few) <= set(many) for few, many in zip(smaller, places, strict=True))


def test_prompts_and_first_tokens_are_no_keywords() -> None:
    """Token 7 stands in the prompt and, in a text, at the start: neither can be a label."""
    forget = [example([7, 7, 3, 4], 2), Example([7, 3], [7, 3], 0, 1)]
    places, scores = keyword_positions(forget, [example([1, 9], 1)], 1.0)
    assert places == [[2, 3], [1]]
    assert 7 not in scores


def test_words_of_the_user_are_found_as_tokens(tiny_tokenizer: Any) -> None:
    words = tiny_tokenizer("Ada was born in Oslo. Oslo!", add_special_tokens=False)["input_ids"]
    one = example([1, *words], 1)
    (places,) = word_positions([one], ["Oslo", "Ada"], tiny_tokenizer)
    text = tiny_tokenizer.decode([words[at - 1] for at in places])
    assert text.replace(" ", "") == "AdaOsloOslo"
    with pytest.raises(UserError, match="in no answer of the forget set: 'Bergen'"):
        word_positions([one], ["Ada", "Bergen"], tiny_tokenizer)


def test_scores_do_not_depend_on_the_order_of_rows(tiny_model: Any) -> None:
    rows = [example([1, 9 + r, 30 + r, 50 + r, *range(60, 60 + r), 2], 2, r) for r in range(5)]
    forwards = selection.memorised(tiny_model, rows, progress=quiet)
    backwards = selection.memorised(tiny_model, rows[::-1], progress=quiet)
    assert np.allclose(forwards, backwards[::-1], atol=1e-6)
    scorer = Scorer.for_model(tiny_model)
    batch = {"input_ids": torch.tensor([rows[0].input_ids]),
             "labels": torch.tensor([rows[0].labels])}  # fmt: skip
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    found = scorer(tiny_model, batch)
    lowest = found.log_probs[found.mask].sort().values[:1].mean()  # 40 % of 3 tokens: one
    assert forwards[0] == pytest.approx(lowest.item(), abs=1e-6)
