"""TOFU's figures that need a second model: forget quality, privacy, open-unlearning's aggregate.

Pure functions of results: whether the retain model was evaluated here or read from logs makes no
difference, except for what needs its loss on every row (``mia_reference``).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from unlearn.errors import UserError
from unlearn.evals.benchmark import Metric, Record, Result
from unlearn.evals.membership import ATTACKS, privleak, reference, s_mia
from unlearn.evals.statistics import RetainSide, forget_quality, harmonic
from unlearn.evals.tofu.records import attack_metrics, mean_prob_mean

MIN_K_RETAIN = 0.5
"""The retain model's AUC that PrivLeak assumes when none is known (open-unlearning)."""


def compare_with_retain(
    result: Result, side: RetainSide, retain_result: Result | None = None
) -> Result:
    """Add what is only defined against a model that never saw the forget set.

    ``forget_quality`` (p), its ``_log10_p`` and ``_ks``; ``privleak``; ``s_mia_{attack}``; with the
    retain model's own records ``mia_reference``; and the parts of open-unlearning's aggregate score
    that are at hand. Compared are the rows that both sides have.

    Raises:
        UserError: the sides are about different rows.
    """
    check_side(side, result)
    records = [dict(record) for record in result.records]
    seed = int(result.settings.get("seed", 0))
    found = _quality(records, side, seed)
    if retain_result is not None:
        _set_reference(records, retain_result)
        found |= attack_metrics(records, ["mia_reference"], seed)
    together = replace(result, metrics={**result.metrics, **found}, records=records)
    found |= _privacy(together, side)
    return open_unlearning_aggregate(
        replace(together, metrics={**result.metrics, **found}), target=None
    )


def check_side(side: RetainSide, result: Result) -> None:
    """Refuse truth ratios of other rows than ours, or that are not numbers.

    Raises:
        UserError: as said.
    """
    ours = {r["row"] for r in result.records if r["split"] == "forget"}
    rows = (result.settings.get("rows") or {}).get("forget") or {}
    given = int(rows.get("given", len(ours)))
    check_rows(side, evaluated=len(ours), given=given, split=result.settings.get("split", ""))


def check_rows(side: RetainSide, *, evaluated: int, given: int, split: str) -> None:
    """Refuse a retain side that cannot be that of this split; needs no model.

    Raises:
        UserError: no or other rows, or a ratio that is not a number.
    """
    if not side.truth_ratios:
        raise UserError(
            f"'{side.source}' has no forget_truth_ratio", "give the TOFU_EVAL.json of a full run"
        )
    bad = [row for row, ratio in side.truth_ratios.items() if not math.isfinite(ratio)]
    if bad:
        raise UserError(
            f"'{side.source}': the truth ratio of row {bad[0]} is not a number "
            f"({len(bad)} such rows)",
            "evaluate the retain model again",
        )
    size = max(side.truth_ratios) + 1
    if size > given or size < evaluated:
        raise UserError(
            f"'{side.source}' holds truth ratios of {size} rows, {split} has {given}"
            + (f", of which {evaluated} are evaluated" if evaluated != given else ""),
            "give the retain model's evaluation of the same split, or the same --max-rows",
        )


def _quality(records: Sequence[Record], side: RetainSide, seed: int) -> dict[str, Metric]:
    ours = {
        record["row"]: record["truth_ratio"]
        for record in records
        if record["split"] == "forget" and record.get("truth_ratio") is not None
    }
    shared = sorted(ours.keys() & side.truth_ratios.keys())
    mine, theirs = [ours[row] for row in shared], [side.truth_ratios[row] for row in shared]
    quality, n = forget_quality(mine, theirs), len(shared)
    return {
        "forget_quality": Metric(quality.p, "higher", None, n),
        "forget_quality_log10_p": Metric(quality.log10_p, "higher", None, n),
        "forget_quality_ks": Metric(quality.ks, "lower", None, n),
    }


def _set_reference(records: Sequence[Record], retain: Result) -> None:
    losses = {(r["split"], r["row"]): r.get("avg_loss") for r in retain.records}
    for record in records:
        ours, theirs = record.get("avg_loss"), losses.get((record["split"], record["row"]))
        attacked = record["split"] in ("forget", "holdout")
        if attacked and ours is not None and theirs is not None:
            record["mia_reference"] = float(reference(ours, theirs))


def _privacy(result: Result, side: RetainSide) -> dict[str, Metric]:
    """Give PrivLeak and s_MIA; without an AUC of the retain model PrivLeak assumes 0.5."""
    metrics, found = result.metrics, {}
    if "mia_min_k" in metrics:
        mine = metrics["mia_min_k"]
        value = privleak(mine.value, side.auc.get("min_k", MIN_K_RETAIN))
        found["privleak"] = Metric(value, "none", None, mine.n)
    for attack in ATTACKS:
        name = f"mia_{attack}"
        if name in metrics and attack in side.auc:
            value = s_mia(metrics[name].value, side.auc[attack])
            found[f"s_{name}"] = Metric(value, "higher", None, metrics[name].n)
    return found


def open_unlearning_aggregate(result: Result, target: Mapping[str, float | None] | None) -> Result:
    """Add open-unlearning's aggregate scores, those whose parts are all there.

    ``aggregate_memorization`` = HM(1 - ES, 1 - EM, 1 - ParaProb, 1 - TR as prob_mean);
    ``aggregate_privacy`` = HM of the four s_MIA; ``aggregate_utility`` = HM(model utility,
    fluency), each relative to ``target``, the values of the model before unlearning, at most 1;
    ``aggregate`` = HM of the three (arXiv:2506.12618). Fluency is ``forget_gibberish``.
    """
    values = result.values()
    forgotten = {
        name: None if values.get(name) is None else 1 - float(values[name] or 0.0)
        for name in ("extraction_strength", "exact_memorization", "forget_Q_A_PARA_Prob")
    }
    ratio = mean_prob_mean(result.records)
    forgotten["truth_ratio"] = None if ratio is None else 1 - ratio
    names = ("model_utility", "forget_gibberish")
    parts = {
        "aggregate_memorization": harmonic(forgotten),
        "aggregate_privacy": harmonic({a: values.get(f"s_mia_{a}") for a in ATTACKS}),
        "aggregate_utility": harmonic({n: _relative(values, target or {}, n) for n in names}),
    }
    parts["aggregate"] = harmonic(parts)
    found = {k: Metric(v, "higher", None, 0) for k, v in parts.items() if v is not None}
    return replace(result, metrics={**result.metrics, **found})


def _relative(
    values: Mapping[str, float | None], target: Mapping[str, float | None], name: str
) -> float | None:
    ours, theirs = values.get(name), target.get(name)
    return None if ours is None or not theirs else ours / theirs
