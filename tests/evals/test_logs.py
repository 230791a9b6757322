"""Logs of other tools: TOFU's published values, open-unlearning's files there and back."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from unlearn.errors import UserError
from unlearn.evals.tofu.logs import import_log, read_log, read_retain_logs, write_logs
from unlearn.evals.tofu.open_unlearning import to_open_unlearning

FULL, RETAIN = "llama2-7b_full.json.gz", "llama2-7b_retain90.json.gz"


def mistake(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        import_log(path, options.pop("retain_logs", None), **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def tofu_logs(shared: Path) -> Path:
    return shared / "golden/tofu-logs"


@pytest.mark.parametrize(
    ("variant", "p", "ks", "utilities"),
    [
        ("geometric", 1.834066410994743e-21, 0.39666666666666667, (0.6227, 0.6137)),
        ("arithmetic", 6.0319e-23, 0.41, (0.5859, 0.5752)),
    ],
)
def test_values_of_tofus_published_logs(
    tofu_logs: Path, variant: Any, p: float, ks: float, utilities: tuple[float, float]
) -> None:
    """Llama-2-7B on 300 rows; values computed from these logs, the geometric p to the last bit."""
    found = import_log(tofu_logs / FULL, tofu_logs / RETAIN, truth_ratio=variant)
    quality = found["forget_quality"]
    if variant == "geometric":
        assert quality["p"] == p
    assert quality["p"] == pytest.approx(p, rel=1e-4)
    assert quality["ks"] == pytest.approx(ks, abs=1e-12)
    assert quality["log10_p"] == pytest.approx(math.log10(p), abs=1e-4)
    assert found["model_utility"] == pytest.approx(utilities[0], abs=5e-5)
    retain = import_log(tofu_logs / RETAIN, None, truth_ratio=variant)
    assert retain["forget_quality"] is None
    assert retain["model_utility"] == pytest.approx(utilities[1], abs=5e-5)


def test_parts_of_tofus_published_logs(tofu_logs: Path) -> None:
    """Probability, ROUGE and truth ratio per set, to the four decimals they are known to."""
    found = import_log(tofu_logs / FULL, None)
    expected = {
        "ra": (0.4555, 0.9330, 0.5962),
        "wf": (0.4186, 0.8825, 0.5390),
        "retain": (0.9895, 0.9857, 0.4747),
        "forget": (0.9909, 0.9854, 0.516),
    }
    for split, values in expected.items():
        share = "_normalised" if split in ("ra", "wf") else ""
        ratio = "truth_ratio" if split == "forget" else "Truth_Ratio"
        names = (f"{split}_Q_A_Prob{share}", f"{split}_Q_A_ROUGE", f"{split}_{ratio}")
        assert [found["metrics"][name] for name in names] == pytest.approx(values, abs=6e-5), split
    retain = import_log(tofu_logs / RETAIN, None)
    assert retain["metrics"]["forget_truth_ratio"] == pytest.approx(0.674, abs=5e-4)
    assert found["rows"] == {"forget": 300, "retain": 300, "ra": 100, "wf": 117}


def test_a_model_against_itself_has_quality_one(tofu_logs: Path) -> None:
    quality = import_log(tofu_logs / FULL, tofu_logs / FULL)["forget_quality"]
    assert quality == {"p": 1.0, "log10_p": 0.0, "ks": 0.0}


@pytest.fixture
def theirs(shared: Path) -> Path:
    return shared / "parity/tofu_eval_ou_tofu-tiny-target.json.gz"


def test_their_file_there_and_back(theirs: Path, tmp_path: Path) -> None:
    """Every row and every mean of a TOFU_EVAL.json that open-unlearning wrote survives."""
    original = json.loads(gzip.decompress(theirs.read_bytes()))
    write_logs(read_log(theirs), tmp_path)
    written = json.loads((tmp_path / "TOFU_EVAL.json").read_text())
    assert list(written) == sorted(original)
    for name, metric in original.items():
        assert written[name].get("value_by_index") == metric.get("value_by_index"), name
        assert written[name]["agg_value"] == pytest.approx(metric["agg_value"], abs=1e-12), name
    summary = json.loads((tmp_path / "TOFU_SUMMARY.json").read_text())
    names = ["extraction_strength", "forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_truth_ratio"]
    assert list(summary) == [*names, "model_utility"]
    assert all(summary[name] == written[name]["agg_value"] for name in summary)


def test_ratios_of_another_variant_are_written_as_geometric_ones(theirs: Path) -> None:
    plain, _ = to_open_unlearning(read_log(theirs))
    other, _ = to_open_unlearning(read_log(theirs, truth_ratio="arithmetic"))
    ratio, same = (tree["forget_truth_ratio"] for tree in (other, plain))
    assert ratio["agg_value"] == pytest.approx(same["agg_value"], abs=1e-6)
    assert ratio["value_by_index"]["7"]["score"] == pytest.approx(
        same["value_by_index"]["7"]["score"], rel=1e-5
    )
    assert other["model_utility"]["agg_value"] == pytest.approx(
        plain["model_utility"]["agg_value"], abs=1e-6
    )


def evaluation(scores: list[float], **more: Any) -> dict[str, Any]:
    """Give a small TOFU_EVAL.json; its rows are not in order."""
    rows = {str(n): {"score": score} for n, score in reversed(list(enumerate(scores)))}
    return {"forget_truth_ratio": {"agg_value": 0.5, "value_by_index": rows}, **more}


def attack(**values: Any) -> dict[str, Any]:
    return {"mia_min_k": {"auc": 0.4, "agg_value": 0.4} | values}


def write(path: Path, tree: Any) -> Path:
    path.write_text(json.dumps(tree))  # NaN is written as NaN, which JSON does not know
    return path


def test_the_side_of_a_retain_model(tmp_path: Path) -> None:
    """Ratios by row whatever their order, AUCs by attack; gzip is told by content, not by name."""
    path = tmp_path / "TOFU_EVAL.json"
    path.write_bytes(gzip.compress(json.dumps(evaluation([0.5, 2.0, 1.0], **attack())).encode()))
    side = read_retain_logs(path)
    assert side.truth_ratios == {0: 0.5, 1: 2.0, 2: 1.0}
    assert side.auc == {"min_k": 0.4}
    assert side.source == str(path)


def test_forget_quality_of_two_small_logs(tmp_path: Path) -> None:
    """Two sets of three that do not overlap: D = 1, exact two-sided p = 2 / C(6, 3) = 0.1."""
    ours = write(tmp_path / "a.json", evaluation([0.1, 0.2, 0.3]))
    theirs = write(tmp_path / "b.json", evaluation([1.1, 1.2, 1.3]))
    found = import_log(ours, theirs)
    assert found["forget_quality"] == pytest.approx({"p": 0.1, "log10_p": -1.0, "ks": 1.0})
    assert found["model_utility"] is None


def test_nan_that_nobody_needs_is_read(tmp_path: Path) -> None:
    tree = evaluation([0.1, 0.2], forget_gibberish={"agg_value": math.nan})
    found = import_log(write(tmp_path / "a.json", tree), None)
    assert found["metrics"]["forget_gibberish"] is None


NEEDED = {
    "a truth ratio": (evaluation([0.1, math.nan]), "forget row 1 has a truth ratio that is not"),
    "an AUC": (evaluation([0.1], **attack(agg_value=math.nan)), "the AUC of mia_min_k is not"),
    "a part of model utility": (
        evaluation([0.1], retain_Q_A_Prob={"agg_value": math.nan}),
        "retain_Q_A_Prob is not a number",
    ),
}


@pytest.mark.parametrize("name", NEEDED)
def test_nan_that_is_needed_is_refused(tmp_path: Path, name: str) -> None:
    tree, words = NEEDED[name]
    path = write(tmp_path / "a.json", tree)
    with pytest.raises(UserError, match=words):
        read_retain_logs(path)


def test_nan_loss_in_tofus_own_log(tofu_logs: Path, tmp_path: Path) -> None:
    tree = json.loads(gzip.decompress((tofu_logs / FULL).read_bytes()))
    tree["eval_log_forget.json"]["average_perturb_loss"]["3"][2] = math.nan
    message = mistake(write(tmp_path / "a.json", tree))
    assert "eval_log_forget.json row 3 has a loss that is not a finite number (nan)" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not JSON: "),
        (b"[]", "is a JSON list, not an object"),
        (b"{}", "is no evaluation log; it holds nothing"),
        (b'{"forget_quality": 0.5, "privleak": null}', "is a summary: it holds means but no rows"),
        (b'{"metrics": {}, "details": {}}', "is no evaluation log; it holds metrics, details"),
        (b'{"eval_log_forget.json": {"gt_loss": {}}}', "has no column avg_gt_loss"),
        (b'{"eval_log_forget.json": {"avg_gt_loss": {"first": 1.0}}}', "is damaged: invalid"),
        (b'{"forget_truth_ratio": {"agg_value": 1, "value_by_index": [1]}}', "is damaged: "),
        (gzip.compress(b"{}" * 99)[:-9], "is damaged gzip"),
        (b"\xff\xfe\x00", "is not JSON: "),
    ],
)
def test_what_is_no_log_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "log.json"
    path.write_bytes(content)
    message = mistake(path)
    assert words in message
    assert str(path) in message


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    assert "No such file" in mistake(tmp_path / "none.json")


def test_arithmetic_ratios_need_the_losses(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", evaluation([0.1]))
    message = mistake(path, truth_ratio="arithmetic")
    assert "row 0 has no losses to compute its arithmetic truth ratio" in message


def test_logs_of_different_forget_sets_are_refused(tofu_logs: Path, theirs: Path) -> None:
    message = mistake(theirs, retain_logs=tofu_logs / RETAIN)
    assert "has 400 rows of the forget set" in message
    assert "has 300" in message


def test_logs_about_other_questions_are_refused(theirs: Path, tmp_path: Path) -> None:
    """The same number of rows is not enough: true answers must agree, spaces apart."""
    tree = json.loads(gzip.decompress(theirs.read_bytes()))
    rows = tree["forget_Q_A_ROUGE"]["value_by_index"]
    for row in rows.values():
        row["ground_truth"] = f"  {row['ground_truth']} "
    spaced = write(tmp_path / "spaced.json", tree)
    assert import_log(theirs, spaced)["forget_quality"]["p"] == 1.0
    answers = [row["ground_truth"] for row in rows.values()]
    for row, answer in zip(rows.values(), answers[1:] + answers[:1], strict=True):
        row["ground_truth"] = answer
    shifted = write(tmp_path / "shifted.json", tree)
    assert "are about different forget sets" in mistake(theirs, retain_logs=shifted)


def test_a_log_without_ratios_cannot_be_compared_with(tmp_path: Path) -> None:
    tree = {"forget_Q_A_Prob": {"agg_value": 0.5, "value_by_index": {"0": {"prob": 0.5}}}}
    ours = write(tmp_path / "a.json", evaluation([0.1]))
    other = write(tmp_path / "b.json", tree)
    assert "has no truth ratios of the forget set" in mistake(ours, retain_logs=other)


def test_attacks_keep_their_rows(tmp_path: Path) -> None:
    """Both sides are read and written; forget scores 1, 2 and holdout 3, 4 give an AUC of 1."""
    sides = {
        "forget": {"agg_value": 1.5, "value_by_index": {"0": {"score": 1.0}, "1": {"score": 2.0}}},
        "holdout": {"agg_value": 3.5, "value_by_index": {"0": {"score": 3.0}, "1": {"score": 4.0}}},
    }
    tree = evaluation([0.1, 0.2], mia_loss=sides | {"auc": 1.0, "agg_value": 1.0})
    result = read_log(write(tmp_path / "a.json", tree))
    assert result.metrics["mia_loss"].value == 1.0
    assert to_open_unlearning(result)[0]["mia_loss"] == tree["mia_loss"]
