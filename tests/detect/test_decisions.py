"""Calls on texts, files and sets, the words for them, and the check that reads no model."""

import math

import numpy as np
import pytest

from unlearn.detect.blind import blind_baseline, later_years
from unlearn.detect.conformal import NotCalibrated
from unlearn.detect.dataset_test import dataset_test
from unlearn.detect.decisions import decide, judge_file
from unlearn.detect.thresholds import at_fpr
from unlearn.detect.verdict import of_file, of_text, of_texts, of_threshold
from unlearn.errors import UserError

NINETEEN = {"loss": np.arange(19.0), "mink": np.arange(19.0)}


def test_one_primary_score_decides() -> None:
    """Above all 19: p = 1/20. Two texts: q = 1/20 · 2 / 1 = 0.1, and 0.5 · 2 / 2."""
    found = decide({"loss": [20.0, 9.5, math.nan]}, NINETEEN, primary="loss")
    assert found.rows() == [
        {"p": {"loss": 0.05}, "q": 0.1, "references": 19, "decision": "member"},
        {"p": {"loss": 0.5}, "q": 0.5, "references": 19, "decision": "not_detected"},
        {"p": {"loss": None}, "q": None, "references": 19, "decision": None},
    ]
    assert found.listed.tolist() == [True, False, False]


def test_without_a_primary_score_all_of_them_pay() -> None:
    """Two scores: 2 · min(0.05, 0.5) = 0.1, so 5 % cannot be shown by 19 references any more."""
    scores = {"loss": [20.0], "mink": [9.5]}
    with pytest.raises(NotCalibrated, match="need at least 39"):
        decide(scores, NINETEEN)
    assert decide(scores, NINETEEN, fpr=0.1).deciding.tolist() == pytest.approx([0.1])
    with pytest.raises(UserError, match="unknown score 'los'; did you mean 'loss'"):
        decide(scores, NINETEEN, primary="los")


def test_a_file_by_its_windows() -> None:
    apart = judge_file([4, 5, 6], [1, 2, 3])
    assert (apart.p, apart.windows, apart.method) == (pytest.approx(1 / 20), 3, "mann-whitney")
    assert apart.median_p == 0.25
    over = judge_file([4, 5, 6], [1, 2, 3], overlapping=True)
    assert (over.p, over.method) == (pytest.approx(0.25), "cauchy")


def test_words_never_claim_more_than_a_likeness() -> None:
    assert of_text(0.012, fpr=0.05) == "scores like a member at FPR 5 % (p = 0.012)"
    assert of_text(0.012, fpr=0.05, known_members=True).startswith("scores like known members")
    assert of_text(0.3, fpr=0.05) == "not detected at FPR 5 % (p = 0.3)"
    assert of_text(None, fpr=0.05).startswith("no decision")
    lines = of_texts(decide({"loss": [20.0, 9.5, math.nan]}, NINETEEN, primary="loss"))
    assert lines[0] == (
        "1 of 2 texts score like members at FPR 5 % by loss; were none a member, about 0.1 would."
    )
    assert lines[1].startswith("1 of them hold up")
    assert lines[2].startswith("1 texts have no decision")
    assert "as a whole scores like members" in of_file(judge_file([4, 5, 6], [1, 2, 3]), fpr=0.05)
    assert "5 % will be" in of_threshold(at_fpr(range(39), 0.05))


# Without the model

TOPICS = {
    "sea": "the {} boat sailed over the {} water to the {} harbour",
    "farm": "the {} cow walked over the {} grass to the {} barn",
}
WORDS = ["old", "small", "grey", "quiet", "far", "wide", "cold", "green", "new", "slow"]


def texts(topic: str, count: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [TOPICS[topic].format(*generator.choice(WORDS, 3)) for _ in range(count)]


def test_a_shift_of_topic_is_named() -> None:
    found = blind_baseline(texts("sea", 60, 0), texts("farm", 60, 1))
    assert found.shifted
    assert found.auc == 1.0
    assert {"boat", "water", "harbour", "sailed", "sea"} & set(found.telling[0])
    assert {"cow", "grass", "barn", "walked"} & set(found.telling[1])
    assert "told apart without the model" in found.warnings[0]


def test_without_a_shift_it_stays_quiet() -> None:
    """Pairs of sets of one kind: by construction at most one in twenty passes the bound that
    chance gives; more than 5 of 40 has a probability of 1 %."""
    found = [
        blind_baseline(texts("sea", 60, 5000 + 2 * n), texts("sea", 60, 5001 + 2 * n))
        for n in range(40)
    ]
    assert sum(one.shifted for one in found) <= 5
    assert all(one.auc is not None and 0.2 < one.auc < 0.8 for one in found)


def test_too_few_texts_say_nothing() -> None:
    found = blind_baseline(texts("sea", 49, 0), texts("farm", 200, 1))
    assert found.auc is None
    assert not found.shifted
    assert "too few texts" in found.warnings[0]


def test_texts_on_both_sides_are_counted() -> None:
    found = blind_baseline(["one", "two "], ["two", "three"])
    assert found.shared == 1
    assert "1 texts are in both sets" in found.warnings[-1]


def test_years_after_the_model() -> None:
    """2024 is later than 2023; a page number 20245 and the year itself are not."""
    assert later_years(["in 2024", "in 2023", "page 20245", "1999 and 2030"], 2023) == 0.5
    assert later_years([], 2023) == 0.0


# One test for a set


def scored_set(shift: float, seed: int, count: int = 200) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {"loss": generator.normal(shift, 1, count), "noise": generator.normal(0, 5, count)}


def test_weak_evidence_adds_up_over_a_set() -> None:
    """A third of a deviation per text is AUC 0.59 for one text, and beyond doubt for 200."""
    found = dataset_test(scored_set(1 / 3, 0), scored_set(0.0, 1))
    assert found.p < 0.05
    assert 0.5 < found.auc < 0.7
    assert found.weights["loss"] > 0.2 > abs(found.weights["noise"])
    assert (found.suspects, found.heldout) == (200, 200)


def test_a_set_like_the_held_out_one_is_rarely_called() -> None:
    """Twice a median of dependent p-values is cautious: at 0.1, far fewer than 10 % of 60."""
    calls = [
        dataset_test(scored_set(0, 2 * n), scored_set(0, 2 * n + 1)).p < 0.1 for n in range(60)
    ]
    assert np.mean(calls) <= 0.1


def test_a_set_that_scores_lower_is_not_called() -> None:
    """The classifier learns the other direction too; what it learned is tested, so p may be small.

    Telling apart is the question of this test; the weight says in which direction.
    """
    found = dataset_test(scored_set(-1.0, 0), scored_set(0.0, 1))
    assert found.weights["loss"] < 0


def test_too_few_texts_are_refused() -> None:
    few = {"loss": np.arange(19.0)}
    with pytest.raises(NotCalibrated, match="needs 20 scored texts"):
        dataset_test(few, scored_set(0, 0))


def test_scores_that_are_all_the_same_say_nothing() -> None:
    same = {"loss": np.ones(40)}
    assert dataset_test(same, same).p == 1.0
