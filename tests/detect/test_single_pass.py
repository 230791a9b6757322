"""Scores of one pass: golden numbers, edge cases, and what must not change them."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from unlearn.detect import (
    TokenFrequencies,
    coverage,
    dc_pdd,
    gap_k,
    loss,
    min_k,
    min_k_plus_plus,
    perplexity,
)
from unlearn.detect.several_passes import (
    con_recall,
    lowercase_ratio,
    neighbour_difference,
    pac,
    recall,
    reference_difference,
    swapped_words,
)
from unlearn.detect.single_pass import first_occurrences, lowest_mean, polarized_distance
from unlearn.errors import UserError
from unlearn.scores import Scores

LOGITS = [[2, 0, 0, 0], [0, 1, 0, -1], [3, 0, 1, 0], [0, 0, 0, 0], [-1, 2, 2, 0]]
TARGETS = [0, 1, 2, 3, 1]
COUNTS = [10, 5, 0, 85]


@pytest.fixture
def golden() -> Scores:
    """Give five tokens over a vocabulary of four; the numbers below were worked out apart."""
    logits = torch.tensor([[*LOGITS, [0, 0, 0, 0]]], dtype=torch.float32)
    return Scores.from_logits(logits, torch.tensor([[-100, *TARGETS]]), statistics=True)


def table(counts: list[int] = COUNTS) -> TokenFrequencies:
    """Smooth counts as Laplace does: (c + 1) / (sum + V)."""
    smoothed = torch.tensor(counts, dtype=torch.float64) + 1
    return TokenFrequencies(smoothed / smoothed.sum(), torch.tensor(counts) > 0)


def row(values: list[float]) -> Scores:
    filled = torch.tensor([values])
    return Scores(filled, torch.ones_like(filled).bool(), torch.ones_like(filled).bool())


def close(found: Tensor, *expected: float, digits: float = 2e-6) -> None:
    assert found.tolist() == pytest.approx(list(expected), abs=digits)


def test_token_readings_are_the_golden_ones(golden: Scores) -> None:
    assert golden.mean is not None
    assert golden.variance is not None
    assert golden.top is not None
    close(golden.log_probs[0, :5], -0.340753, -0.626523, -2.210998, -1.386294, -0.781672)
    close(golden.mean[0, :5], -0.918284, -1.164406, -0.672078, -1.386294, -0.973895)
    close(golden.variance[0, :5], 0.821520, 0.393224, 0.951464, 0.0, 0.415851)
    tops = [max(one) - math.log(sum(map(math.exp, one))) for one in LOGITS]
    close(golden.top[0, :5], *tops)


def test_scores_are_the_golden_ones(golden: Scores) -> None:
    close(loss(golden), -1.069248)
    close(perplexity(golden), math.exp(1.069248), digits=1e-5)
    close(min_k(golden, k=0.2), -2.210998)
    close(min_k(golden, k=0.4), -1.798646)
    close(min_k_plus_plus(golden, k=0.4), -0.7888, digits=5e-5)
    close(min_k_plus_plus(golden, k=1.0), (0.6372 + 0.8578 - 1.5777 + 0 + 0.2981) / 5, digits=5e-5)
    close(polarized_distance(golden), 1.870245)


@pytest.mark.parametrize(("clip", "expected"), [(10.0, 0.919715), (0.5, 0.386878), (0.01, 0.01)])
def test_dc_pdd_is_the_golden_one(golden: Scores, clip: float, expected: float) -> None:
    """Alpha is 1.597785, 1.524579, 0.508985, 0.047511; id 1 comes again and counts once."""
    assert first_occurrences(golden)[0].tolist() == [True, True, True, True, False, False]
    close(dc_pdd(golden, table(), clip=clip), expected)


def test_dc_pdd_reports_how_much_of_a_text_the_table_knows(golden: Scores) -> None:
    """Id 2 was never counted: four of five tokens are known."""
    close(coverage(golden, table()), 0.8)


def test_dc_pdd_refuses_the_table_of_another_tokenizer(golden: Scores) -> None:
    with pytest.raises(UserError, match="has 3 tokens, the texts hold token 3"):
        dc_pdd(golden, table([1, 2, 3]))


def test_gap_k_averages_neighbours_before_it_takes_the_lowest(golden: Scores) -> None:
    """Gaps are 0, 0, (1 - 3) / 0.975430 = -2.050377, 0 (uniform), 0.

    Averages of three: -0.683459 each; of one (no smoothing): the lowest alone.
    """
    gap = (1 - 3) / math.sqrt(0.951464)
    close(gap_k(golden, k=0.2), gap / 3)
    close(gap_k(golden, k=0.2, window=1), gap)
    close(gap_k(golden, k=1.0, window=5), gap / 5)
    close(gap_k(golden, k=1.0, window=6), gap / 5)  # shorter than the window: not smoothed


def test_a_share_of_one_is_the_loss_exactly(golden: Scores) -> None:
    assert torch.equal(min_k(golden, k=1.0), loss(golden))


@pytest.mark.parametrize(("k", "count"), [(0.29, 29), (0.3, 30), (0.07, 7), (0.001, 1)])
def test_the_share_is_counted_without_rounding_errors(k: float, count: int) -> None:
    """0.29 * 100 is 28.999... in floating point; the lowest 29 of 0..99 have the mean 14."""
    values = torch.arange(100.0)[None]
    expected = (count - 1) / 2
    close(lowest_mean(values, torch.ones(1, 100).bool(), k), expected)


def test_a_row_without_tokens_has_no_score(golden: Scores) -> None:
    empty = replace(golden, mask=torch.zeros_like(golden.mask), log_probs=golden.log_probs * 0)
    for found in (loss(empty), min_k(empty), min_k_plus_plus(empty), gap_k(empty),
                  dc_pdd(empty, table()), polarized_distance(empty)):  # fmt: skip
        assert found.isnan().all()


def test_masked_vocabulary_does_not_make_statistics_nan() -> None:
    """Of two tokens left, with probabilities e / (e + 1) and 1 / (e + 1)."""
    logits = torch.tensor([[[1.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]]])
    found = Scores.from_logits(logits, torch.tensor([[-100, 0]]), statistics=True)
    p = math.e / (math.e + 1)
    mean = p * math.log(p) + (1 - p) * math.log(1 - p)
    assert found.mean is not None
    assert found.variance is not None
    close(found.mean[0], mean, 0.0)
    close(found.variance[0], p * math.log(p) ** 2 + (1 - p) * math.log(1 - p) ** 2 - mean**2, 0.0)


def test_scores_that_compare_passes() -> None:
    """-2 against -3 in small letters, -2.5 from a reference, -1.5 and -1 after prefixes."""
    main = torch.tensor([-2.0])
    close(lowercase_ratio(main, torch.tensor([-3.0])), 1.5)
    close(reference_difference(main, torch.tensor([-2.5])), 0.5)
    close(recall(main, torch.tensor([-1.5])), 0.75)
    close(con_recall(main, torch.tensor([-1.5]), torch.tensor([-1.0])), (-1.5 + 0.5) / -2)
    close(neighbour_difference(main, torch.tensor([[-3.0, -2.0, math.nan]])), 0.5)
    assert neighbour_difference(main, torch.tensor([[math.nan]])).isnan().all()
    close(pac(torch.tensor([1.0]), torch.tensor([[2.0, 3.0]])), 1.5)


def test_polarized_distance_takes_at_least_one_token_of_each_end() -> None:
    """Of 40 tokens the two likeliest and the twelve least likely."""
    close(polarized_distance(row([-1.0, -4.0])), 3.0)
    values = [-float(n) for n in range(40)]
    close(polarized_distance(row(values)), -0.5 + (28 + 39) / 2)


def test_swapped_words_are_the_same_words_and_depend_on_text_and_seed_alone() -> None:
    text = "one two three four five six seven eight nine ten"
    first = swapped_words(text)
    assert len(first) == 5
    assert len(set(first)) > 1
    assert all(sorted(other.split()) == sorted(text.split()) for other in first)
    assert all(other != text for other in first)
    assert swapped_words(text) == first != swapped_words(text, seed=1)
    assert swapped_words("alone") == ["alone"] * 5
    assert swapped_words("") == [""] * 5
