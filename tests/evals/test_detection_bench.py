"""Benchmarks and audits: figures by hand, groups, flags, files."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unlearn.detect.engine import TextScorer
from unlearn.detect.settings import Settings
from unlearn.errors import UserError
from unlearn.evals.detection.audit import audit, flag, sides_of, verdict
from unlearn.evals.detection.bench import (
    Scored,
    curves,
    groups,
    measure,
    score_labelled,
    sides,
    swapped,
)
from unlearn.evals.detection.labelled import LabelledText
from unlearn.evals.detection.write import write_audit, write_bench

MEMBERS = [0.9, 0.8, 0.7, 0.55, 0.4, 0.3]
NONMEMBERS = [0.6, 0.5, 0.35, 0.2, 0.1, 0.05]


def rows(members: list[float], nonmembers: list[float], tokens: int = 40) -> list[Scored]:
    found = []
    for member, values in ((True, members), (False, nonmembers)):
        for place, value in enumerate(values):
            text = LabelledText(f"text {member} {place}", member)
            scores = {"loss": value, "ppl": -value, "mink": 2 * value, "ref": None}
            found.append(Scored(text, tokens, "ok", scores))
    return found


def test_golden_figures() -> None:
    found = measure(rows(MEMBERS, NONMEMBERS))
    assert set(found["metrics"]) == {"loss", "mink", "ref"}  # perplexity ranks nothing
    loss = found["metrics"]["loss"]
    assert loss["auc"]["value"] == pytest.approx(30 / 36)
    assert loss["fpr@95%tpr"]["value"] == 0.5
    assert loss["tpr@5%fpr"]["value"] is None  # six non-members show no 5 %
    assert found["metrics"]["ref"] is None
    assert found["differences"] == {"mink": {"value": 0.0, "low": 0.0, "high": 0.0}}
    assert "too few texts" in found["checks"]["warnings"][0]


def test_what_has_no_score_is_counted_and_left_out() -> None:
    some = rows(MEMBERS, NONMEMBERS)
    some[0] = Scored(some[0].text, 0, "too_short", {"loss": None, "ppl": None, "mink": None})
    found = measure(some)
    assert found["left_out"] == {"too_short": 1}
    members, others = sides(some, "loss")
    assert members.tolist() == MEMBERS[1:]
    assert others.size == 6


def test_groups_are_those_of_the_data_or_lengths() -> None:
    some = rows([1.0] * 12, [0.0] * 12, 20) + rows([1.0] * 3, [0.0] * 12, 200)
    assert [(name, len(part)) for name, part in groups(some)] == [
        ("under 32 tokens", 24),
        ("128 to 255 tokens", 15),
    ]
    short, long = measure(some)["groups"]
    assert short["metrics"]["loss"]["auc"]["value"] == 1.0
    assert long["metrics"] is None  # three members
    named = [Scored(LabelledText("a", n % 2 == 0, "ab"[n // 2]), 9, "ok", {}) for n in range(4)]
    assert [name for name, _ in groups(named)] == ["a", "b"]


def test_clusters_widen_the_intervals() -> None:
    some = rows(spread(0.5, 60, 0), spread(0, 60, 1))
    apart = [Scored(replace(one.text, cluster=str(n // 20)), 9, "ok", one.scores)
             for n, one in enumerate(some)]  # fmt: skip
    plain, whole = measure(some), measure(apart)
    assert (plain["clusters"], whole["clusters"]) == (None, 6)
    one, other = plain["metrics"]["loss"]["auc"], whole["metrics"]["loss"]["auc"]
    assert one["value"] == other["value"]
    assert (one["low"], one["high"]) != (other["low"], other["high"])


def test_years_after_the_model_are_told() -> None:
    some = rows(MEMBERS, NONMEMBERS)
    late = Scored(LabelledText("it happened in 2024", False), 9, "ok", some[0].scores)
    assert (
        "14.3 % of the non-members name a year after 2023"
        in (measure([*some, late], year=2023)["checks"]["warnings"])
    )


def test_texts_are_scored_in_order(tiny_model: Any, tiny_tokenizer: Any) -> None:
    scorer = TextScorer.of(tiny_model, tiny_tokenizer, Settings(scores=("loss",)))
    texts = [LabelledText("Ada was born in Oslo.", True), LabelledText("Bo paints.", False)]
    told: list[int] = []
    found = score_labelled(texts, scorer, progress=told.append)
    assert [one.text for one in found] == texts
    assert told == [2]
    with pytest.raises(UserError, match="no non-member has a token"):
        score_labelled([texts[0], LabelledText("", False)], scorer)


def test_a_benchmark_is_written_whole(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    some = rows(generator.normal(1, 1, 40).tolist(), generator.normal(0, 1, 120).tolist())
    found = measure(some) | {"data": "d", "model": "m", "settings": {}}
    write_bench(tmp_path / "b", found, some)
    assert json.loads((tmp_path / "b" / "bench.json").read_text())["members"] == 40
    stored = (tmp_path / "b" / "scores.jsonl").read_text().splitlines()
    assert [json.loads(row)["label"] for row in stored] == [1] * 40 + [0] * 120
    svg = (tmp_path / "b" / "roc.svg").read_text()
    assert svg.startswith("<svg")
    assert "AUC" in svg
    page = (tmp_path / "b" / "bench.md").read_text()
    value = found["metrics"]["loss"]["auc"]
    assert f"{value['value']:.3f} ({value['low']:.3f} – {value['high']:.3f})" in page
    assert set(curves(some)) == {"loss", "mink"}


# Audit


def spread(centre: float, count: int, seed: int) -> list[float]:
    return np.random.default_rng(seed).normal(centre, 1, count).tolist()


def test_an_audit_by_hand() -> None:
    """Before, every forget text is above both holdout texts; after, one of two is above one of two:
    AUC 1/4. PrivLeak against 0.5: ((1 - 1/4) - 0.5) / 0.5 = +50 %, before (0 - 0.5) / 0.5 = -100 %.
    """
    found = audit({"loss": ([3, 4], [1, 2])}, {"loss": ([1.5, 0], [1, 2])})["loss"]
    assert found["auc"]["before"]["value"] == 1.0
    assert found["auc"]["after"]["value"] == 0.25
    assert found["change"]["value"] == -0.75
    assert found["privleak"]["before"] == pytest.approx(-100)
    assert found["privleak"]["after"] == pytest.approx(50)
    assert (found["forget"], found["holdout"], found["aim"]) == (2, 2, 0.5)


@pytest.mark.parametrize(
    ("centre", "expected"),
    [(3.0, "under_unlearned"), (0.0, "not_told_apart"), (-3.0, "over_unlearned")],
)
def test_the_flag_says_on_which_side(centre: float, expected: str) -> None:
    holdout = spread(0, 60, 1)
    found = audit({"s": (spread(5, 60, 0), holdout)}, {"s": (spread(centre, 60, 2), holdout)})
    assert found["s"]["flag"] == expected
    assert expected.split("_")[0] in verdict(found)[0]


def test_the_aim_is_where_the_retain_model_is() -> None:
    """Forget texts that are harder in themselves: 0.3 is where the retain model stands too."""
    holdout, hard = spread(0, 200, 1), spread(-0.8, 200, 2)
    before, after = {"s": (spread(5, 200, 0), holdout)}, {"s": (hard, holdout)}
    assert audit(before, after)["s"]["flag"] == "over_unlearned"
    found = audit(before, after, {"s": (spread(-0.8, 200, 3), holdout)})["s"]
    assert found["flag"] == "not_told_apart"
    assert abs(found["privleak"]["after"]) < 10
    assert flag(0.2, 0.4, 0.5) == "over_unlearned"


def test_texts_that_one_model_cannot_score_are_left_out_for_all() -> None:
    nan = float("nan")
    found = audit({"s": ([1, nan, 3], [0, 0])}, {"s": ([1, 2, nan], [0, 0])})["s"]
    assert found["forget"] == 1
    parted = sides_of([{"s": 1.0}, {"s": None}, {"s": 3.0}], 2)["s"]
    assert parted[0][0] == 1.0
    assert np.isnan(parted[0][1])
    assert parted[1] == [3.0]


def test_an_audit_is_written(tmp_path: Path) -> None:
    compared = audit({"loss": ([3, 4], [1, 2])}, {"loss": ([1.5, 0], [1, 2])})
    found = {
        "scores": compared,
        "models": {"before": "a", "after": "b"},
        "verdict": verdict(compared),
        "checks": {"warnings": ["w"]},
    }
    write_audit(tmp_path / "a", found)
    page = (tmp_path / "a" / "audit.md").read_text()
    assert "| loss | 1.000 (1.000 – 1.000) | 0.250" in page
    assert "+50.0 %" in page
    assert json.loads((tmp_path / "a" / "audit.json").read_text())["models"]["after"] == "b"


# Real models


SEEN, UNSEEN = "data/tofu#forget10:train[:200]", "data/tofu#full:train[3400:3600]"


def test_members_are_told_from_unseen_texts_and_not_by_a_model_that_saw_neither(
    shared: Path,
) -> None:
    """Half of the answers of the forget set against as many of the authors before them in TOFU.

    The model that memorised the former gives an AUC of 0.95 or more; for the retain model 0.5 lies
    in the 95 % interval. Words alone tell the sets apart (names of authors), and that is said.
    """
    from unlearn.evals.detection.labelled import read_sides
    from unlearn.evals.detection.scorer import Extras, load_scorer
    from unlearn.models import ModelSource

    texts = read_sides(f"{shared}/{SEEN}", f"{shared}/{UNSEEN}", text_field="answer")
    assert len(texts) == 400
    settings = Extras().with_scores(Settings(), ("loss", "mink", "minkpp"))
    found = {}
    for name in ("target", "retain90"):
        source = ModelSource(str(shared / "models" / f"tofu-tiny-{name}"))
        scorer, notes = load_scorer(source, settings, Extras())
        assert notes == []
        found[name] = measure(score_labelled(texts, scorer))
    for score in ("loss", "mink", "minkpp"):
        assert found["target"]["metrics"][score]["auc"]["value"] >= 0.95
        unseen = found["retain90"]["metrics"][score]["auc"]
        assert unseen["low"] <= 0.5 <= unseen["high"]
    assert found["target"]["checks"]["shifted"]


def test_stories_that_were_never_seen_look_like_members_and_the_warning_says_why(
    shared: Path,
) -> None:
    """A model of little stories, on stories put together here and on answers of TOFU: every AUC is
    1 or near it though nothing was seen, and words alone do as well."""
    import runpy

    from unlearn.evals.detection.scorer import Extras, load_scorer
    from unlearn.models import ModelSource

    script = Path(__file__).parents[2] / "scripts" / "story_texts.py"
    story, chance = runpy.run_path(str(script))["story"], random.Random(0)
    lines = (shared / "data" / "tofu" / "full.json").read_text().splitlines()[:60]
    texts = [LabelledText(story(chance), True) for _ in range(60)]
    texts += [LabelledText(json.loads(line)["answer"], False) for line in lines]
    source = ModelSource(str(shared / "models" / "stories260k"))
    settings = Extras().with_scores(Settings(), ("loss", "mink", "minkpp"))
    scorer, _ = load_scorer(source, settings, Extras())
    found = measure(score_labelled(texts, scorer))
    assert all(one["auc"]["value"] > 0.99 for one in found["metrics"].values())
    assert found["checks"]["shifted"]
    assert found["checks"]["blind_auc"] > 0.99
    assert "told apart without the model" in found["checks"]["warnings"][0]


def test_labels_the_wrong_way_round_are_noticed() -> None:
    """By every score members must be lower, interval and all; a single one may be."""
    low, chance = {"auc": {"value": 0.1, "high": 0.2}}, {"auc": {"value": 0.4, "high": 0.5}}
    (warning,) = swapped({"loss": low, "mink": low})
    assert "wrong way round" in warning
    assert "AUC at most 0.10" in warning
    assert swapped({"loss": low, "mink": chance}) == []
    assert swapped({"loss": None}) == []


def test_an_audit_resamples_texts_of_one_author_together() -> None:
    """With ten copies of each text per cluster the interval is that of the clusters: much wider."""
    once = spread(0.5, 20, 0), spread(0, 20, 1)
    many = tuple(np.repeat(side, 10) for side in once)
    names = [str(place // 10) for place in range(200)]
    narrow = audit({"s": many}, {"s": many})["s"]["auc"]["after"]
    wide = audit({"s": many}, {"s": many}, clusters=(names, names))["s"]["auc"]["after"]
    alone = audit({"s": once}, {"s": once})["s"]["auc"]["after"]
    assert wide["value"] == pytest.approx(alone["value"])
    width = {"narrow": narrow, "wide": wide, "alone": alone}
    width = {name: one["high"] - one["low"] for name, one in width.items()}
    assert width["narrow"] < 0.5 * width["wide"]
    assert width["wide"] == pytest.approx(width["alone"], rel=0.1)
    holes = audit({"s": ([1, np.nan, 3], [0, 0])}, {"s": ([1, 2, 3], [0, 0])},
                  clusters=(["a", "b", "c"], ["d", "e"]))["s"]  # fmt: skip
    assert holes["forget"] == 2
