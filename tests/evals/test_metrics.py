import math

import pytest
import torch

from unlearn.evals.metrics import (
    exact_memorization,
    extraction_strength,
    normalised_probability,
    probability,
    rouge,
    rouge_l_recall,
)
from unlearn.scores import Scores


def rows(*lines: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Read rows of x (labelled, right), o (labelled, wrong) and . (not labelled)."""
    mask = torch.tensor([[mark != "." for mark in line] for line in lines])
    return torch.tensor([[mark == "x" for mark in line] for line in lines]), mask


def test_probability_is_the_geometric_mean_over_labelled_tokens() -> None:
    # row 1: 1/2 and 1/8 -> sqrt(1/16) = 1/4; row 2: one token of probability 1/5
    log_probs = torch.tensor([[0.0, math.log(1 / 2), math.log(1 / 8)], [math.log(1 / 5), 0, 0]])
    mask = torch.tensor([[False, True, True], [True, False, False]])
    found = probability(Scores(log_probs, mask, torch.ones_like(mask)))
    assert found.tolist() == pytest.approx([0.25, 0.2])


def test_probability_of_a_row_without_labels_is_nan() -> None:
    none = torch.zeros(1, 3, dtype=torch.bool)
    assert probability(Scores(torch.zeros(1, 3), none, ~none)).isnan().all()


@pytest.mark.parametrize(
    ("line", "kept", "dropped"),
    [
        ("..xxxx", 1.0, 1.0),
        ("..oxxx", 3 / 4, 2 / 3),
        ("..xoxx", 2 / 4, 1 / 3),  # right before a mistake does not count
        ("..xxxo", 0.0, 1.0),  # only EOS is wrong
        ("..xxox", 1 / 4, 0.0),
        ("..oooo", 0.0, 0.0),
        ("xx.o.x", 1 / 4, 0.0),  # labelled positions of several turns count in order
        ("xx.x.o", 0.0, 1.0),
        ("oxx...", 2 / 3, 1 / 2),  # right padding
    ],
)
def test_extraction_strength(line: str, kept: float, dropped: float) -> None:
    correct, mask = rows(line)
    assert extraction_strength(correct, mask, drop_last=False).item() == pytest.approx(kept)
    assert extraction_strength(correct, mask).item() == pytest.approx(dropped)


def test_extraction_strength_ignores_correct_outside_the_mask() -> None:
    correct, mask = rows("..ox..")
    assert extraction_strength(correct | ~mask, mask, drop_last=False).item() == 0.5


def test_a_row_with_nothing_to_extract_has_no_number() -> None:
    correct, mask = rows("..x..", ".xo..")
    found = extraction_strength(correct, mask)
    assert math.isnan(found[0])
    assert found[1] == 1.0
    assert exact_memorization(correct, mask).isnan().tolist() == [True, False]


def test_exact_memorization_counts_right_predictions_anywhere() -> None:
    correct, mask = rows("..xoxx", "ooooox")
    assert exact_memorization(correct, mask, drop_last=False).tolist() == pytest.approx(
        [3 / 4, 1 / 6]
    )
    assert exact_memorization(correct, mask).tolist() == pytest.approx([2 / 3, 0.0])


@pytest.mark.parametrize(
    ("target", "generation", "recall"),
    [
        ("Ada was born in Oslo.", "ada was born in oslo", 1.0),
        ("Ada was born in Oslo.", "In Oslo Ada was born", 3 / 5),  # "ada was born", in order
        ("Ada was born in Oslo.", "Ada was born in Oslo, and she writes a great deal.", 1.0),
        ("She writes novels", "She was writing a novel", 1.0),  # stems: write, novel
        ("Ada was born in Oslo.", "", 0.0),
        ("Ada was born in Oslo.", "Nobody knows", 0.0),
    ],
)
def test_rouge_l_recall(target: str, generation: str, recall: float) -> None:
    assert rouge_l_recall(target, generation) == pytest.approx(recall)


@pytest.mark.parametrize(
    ("line", "exact", "ou", "satimp"),
    [
        ("..xxxx", 1.0, 1.0, 1.0),
        ("..oxxx", 2 / 3, 2 / 3, 3 / 4),
        ("..xxoo", 0.0, 1 / 3, 0.0),  # wrong before the end token: open-unlearning gives 1/n
        ("..xxxo", 1.0, 1.0, 0.0),  # SatImp counts the last token
        ("..oooo", 0.0, 1 / 3, 0.0),
    ],
)
def test_variants_of_extraction_strength(line: str, exact: float, ou: float, satimp: float) -> None:
    correct, mask = rows(line)
    for variant, expected in (("exact", exact), ("ou", ou), ("satimp", satimp)):
        found = extraction_strength(correct, mask, variant=variant)  # type: ignore[arg-type]
        assert found.item() == pytest.approx(expected), variant


def test_open_unlearning_gives_nothing_to_extract_a_zero() -> None:
    correct, mask = rows("..x..")
    assert extraction_strength(correct, mask, variant="ou").tolist() == [0.0]


def test_normalised_probability_is_the_share_of_the_right_option() -> None:
    # 0.5 / (0.5 + 0.25 + 0.25); all zero: no number, but 0 with open-unlearning's epsilon
    correct = torch.tensor([0.5, 0.0])
    wrong = torch.tensor([[0.25, 0.25], [0.0, 0.0]])
    found = normalised_probability(correct, wrong)
    assert found[0] == 0.5
    assert found[1].isnan()
    assert normalised_probability(correct, wrong, epsilon=1e-10)[1] == 0.0


def test_rouge_scores() -> None:
    """Five words of the target; "oslo ada was" shares all three, in order "ada was" (2 of 3)."""
    found = rouge("Ada was born in Oslo.", "Oslo: Ada was")
    assert found.rouge1_recall == pytest.approx(3 / 5)
    assert found.rouge_l_recall == pytest.approx(2 / 5)
    assert found.rouge_l_f1 == pytest.approx(2 * (2 / 5) * (2 / 3) / (2 / 5 + 2 / 3))


def test_rouge_is_that_of_the_package() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    peer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    texts = ("She was writing novels, short ones.", "A writer of short novels she was!", "")
    for target in texts[:2]:
        for text in texts:
            expected = peer.score(target, text)
            longest = expected["rougeL"]
            assert rouge(target, text) == pytest.approx(
                (expected["rouge1"].recall, longest.recall, longest.fmeasure)
            )
