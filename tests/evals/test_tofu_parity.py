"""The same numbers as open-unlearning's own evaluation of two small models, row by row.

``parity/tofu_eval_ou_*.json.gz`` in the folder of shared data: its commit d3d7cf9, template
"Question: {q}\\nAnswer:\\n{a}".
"""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from unlearn.evals.benchmark import Result
from unlearn.evals.statistics import RetainSide
from unlearn.evals.tofu.benchmark import Tofu, TofuOptions
from unlearn.evals.tofu.compare import compare_with_retain
from unlearn.models import load_model, load_tokenizer

MODELS = ("target", "retain90")
CLOSE = 1e-4
FIELDS = {
    "Q_A_Prob": {"prob": "prob", "avg_loss": "avg_loss"},
    "Q_A_PARA_Prob": {"prob": "para_prob", "avg_loss": "para_loss"},
    "Q_A_PERT_Prob": {"prob": "pert_prob", "avg_loss": "pert_loss"},
    "Q_A_Prob_normalised": {"prob": "prob_normalised"},
    "truth_ratio": {"score": "truth_ratio"},
    "Truth_Ratio": {"score": "truth_ratio"},
    "extraction_strength": {"score": "extraction_strength"},
}
ROUGE = {
    "rouge1_recall": "rouge1_recall",
    "rougeL_f1": "rouge_l_f1",
    "rougeL_recall": "rouge_l_recall",
}


def theirs(shared: Path, who: str) -> dict[str, Any]:
    with gzip.open(shared / "parity" / f"tofu_eval_ou_tofu-tiny-{who}.json.gz") as file:
        return dict(json.load(file))


def evaluate(shared: Path, who: str, **options: Any) -> Result:
    path = str(shared / "models" / f"tofu-tiny-{who}")
    benchmark = Tofu.load(TofuOptions(data=str(shared / "data" / "tofu"), compat="ou", **options))
    return benchmark.run(load_model(path, device="cpu"), load_tokenizer(path))


def require_equal_rows(result: Result, reference: dict[str, Any]) -> int:
    """Compare every row of every shared metric; give the number of answers that were the same."""
    rows = {(record["split"], record["row"]): record for record in result.records}
    same = 0
    for metric, content in reference.items():
        split, _, measure = metric.partition("_")
        if split not in ("forget", "retain", "ra", "wf"):
            split, measure = "forget", metric
        for index, values in content.get("value_by_index", {}).items():
            record = rows.get((split, int(index)))
            if record is None:  # fewer rows were evaluated
                continue
            if measure == "Q_A_ROUGE":
                same += record["generation"] == values["generation"]
                fields = ROUGE if record["generation"] == values["generation"] else {}
                assert record["answer"] == values["ground_truth"]
            else:
                fields = FIELDS[measure]
            for its, ours in fields.items():
                exact = measure == "Q_A_ROUGE"
                expected = values[its] if exact else pytest.approx(values[its], abs=CLOSE)
                assert record[ours] == expected, (metric, index)
    return same


@pytest.mark.parametrize("who", MODELS)
def test_rows_agree_with_open_unlearning(shared: Path, who: str) -> None:
    """The first twelve rows of each block; answers are cut short, which changes no other metric."""
    result = evaluate(shared, who, max_rows=12)
    assert require_equal_rows(result, theirs(shared, who)) >= 47  # of 48: one near-tie is allowed


@pytest.mark.slow
def test_the_whole_evaluation_agrees_with_open_unlearning(shared: Path) -> None:
    """All 1017 rows of both models; and the target against the retain model."""
    results = {who: evaluate(shared, who) for who in MODELS}
    for who, result in results.items():
        reference = theirs(shared, who)
        assert require_equal_rows(result, reference) >= 1010
        for metric, content in reference.items():
            value = result.metrics[metric].value
            assert value == pytest.approx(content["agg_value"], abs=CLOSE), (who, metric)
    side = RetainSide(
        {
            int(row): value["score"]
            for row, value in theirs(shared, "retain90")["forget_truth_ratio"][
                "value_by_index"
            ].items()
        },
        {},
        "open-unlearning's log",
    )
    target = compare_with_retain(results["target"], side).metrics["forget_quality"].value
    assert target < 1e-10
    retain = compare_with_retain(results["retain90"], side).metrics["forget_quality"].value
    assert retain == pytest.approx(1.0)
