"""Evaluation logs of others, read as our own results: open-unlearning's and TOFU's.

Both become a :class:`Result` with open-unlearning's metric names and one record per row. Files may
be compressed with gzip. The token ``NaN``, which Python writes and JSON does not know, is read, and
refused where it would enter a number that is asked for.
"""

import gzip
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlearn.errors import UserError
from unlearn.evals.benchmark import Metric, Record, Result
from unlearn.evals.statistics import (
    EPSILON,
    UTILITY_PARTS,
    RetainSide,
    TruthRatio,
    forget_quality,
)
from unlearn.evals.statistics import truth_ratio as ratio
from unlearn.evals.tofu.open_unlearning import (
    SPLITS,
    aggregates,
    from_open_unlearning,
    to_open_unlearning,
)
from unlearn.evals.tofu.original import AGAIN, BLOCKS, from_tofu, loss
from unlearn.evals.tofu.records import Reading, metrics_of
from unlearn.runs import write_json

__all__ = ["import_log", "read_log", "read_retain_logs", "to_open_unlearning", "write_logs"]

SAME_TEXT = 0.5
"""Two logs are about the same questions when at least this share of true answers agrees."""
UTILITY = tuple(name for names in UTILITY_PARTS.values() for name in names)
KINDS = (
    "give open-unlearning's TOFU_EVAL.json or TOFU's eval_log_aggregated.json, "
    "plain or compressed with gzip"
)


def read_log(path: Path, *, truth_ratio: TruthRatio = "geometric") -> Result:
    """Read an evaluation of TOFU; rows and metrics are named as in ``unlearn eval tofu``.

    ``truth_ratio`` chooses between the geometric mean of the wrong answers' probabilities, as in
    open-unlearning and TOFU's ``aggregate_eval_stat.py``, and the arithmetic mean of TOFU's paper.
    ``model_utility`` is there when all nine of its parts are.

    Raises:
        UserError: unreadable, of no known kind, or with NaN among the values that are needed.
    """
    tree, kind = _load(path)
    source = str(path)
    try:
        records = from_tofu(tree, source) if kind == "tofu" else from_open_unlearning(tree)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise UserError(f"'{path}' is damaged: {error}", KINDS) from error
    for record in records:
        _set_truth_ratio(record, truth_ratio, source)
    epsilon = EPSILON if kind == "open-unlearning" else 0.0
    metrics = metrics_of(records, Reading(truth_ratio, epsilon=epsilon))
    if kind == "open-unlearning":
        metrics |= aggregates(tree, known=[*metrics, "model_utility", "forget_quality"])
    _require_numbers(metrics, source)
    settings = {"source": source, "kind": kind, "truth_ratio": truth_ratio}
    return Result("tofu", "imported", metrics, records, settings)


def read_retain_logs(path: Path, *, truth_ratio: TruthRatio = "geometric") -> RetainSide:
    """Read what a comparison needs from a retain model's own evaluation.

    Raises:
        UserError: as :func:`read_log`; also without truth ratios of the forget set, or with an AUC
            that is not a number.
    """
    return retain_side(read_log(path, truth_ratio=truth_ratio))


def retain_side(result: Result) -> RetainSide:
    """Take the same from an evaluation that is at hand."""
    source = result.settings.get("source") or "the retain model"
    ratios = {
        record["row"]: record["truth_ratio"]
        for record in result.records
        if record["split"] == "forget" and record.get("truth_ratio") is not None
    }
    if not ratios:
        hint = "forget quality compares forget_truth_ratio row by row; give a log that has it"
        raise UserError(f"'{source}' has no truth ratios of the forget set", hint)
    auc = {
        name.removeprefix("mia_"): metric.value
        for name, metric in result.metrics.items()
        if name.startswith("mia_")
    }
    for attack, value in auc.items():
        if not math.isfinite(value):
            raise UserError(f"'{source}': the AUC of mia_{attack} is not a number", AGAIN)
    return RetainSide(ratios, auc, source)


def import_log(
    path: Path, retain_logs: Path | None, *, truth_ratio: TruthRatio = "geometric"
) -> dict[str, Any]:
    """Give forget quality, model utility, its parts and every metric of a log, as plain values.

    ``forget_quality`` is ``{p, log10_p, ks}``: the two-sided Kolmogorov-Smirnov test between the
    truth ratios of the two logs. It is None without ``retain_logs``, and ``model_utility`` is None
    when the log lacks one of its nine parts.

    Raises:
        UserError: as :func:`read_log`; or the logs are about different forget sets.
    """
    result = read_log(path, truth_ratio=truth_ratio)
    found: dict[str, Any] = {"source": str(path), "kind": result.settings["kind"]}
    found |= {"retain_logs": None, "truth_ratio": truth_ratio, "forget_quality": None}
    if retain_logs is not None:
        retain = read_log(retain_logs, truth_ratio=truth_ratio)
        found["retain_logs"] = str(retain_logs)
        found["forget_quality"] = _quality(result, retain)
    values = result.values()
    rows = {split: sum(r["split"] == split for r in result.records) for split in SPLITS}
    return found | {
        "model_utility": values.get("model_utility"),
        "model_utility_parts": {name: values.get(name) for name in UTILITY},
        "rows": {split: n for split, n in rows.items() if n},
        "metrics": values,
        "details": {name: metric.to_dict() for name, metric in result.metrics.items()},
    }


def write_logs(result: Result, folder: Path) -> None:
    """Write ``TOFU_EVAL.json`` and ``TOFU_SUMMARY.json`` for open-unlearning's readers."""
    evaluation, summary = to_open_unlearning(result)
    write_json(folder / "TOFU_EVAL.json", evaluation)
    write_json(folder / "TOFU_SUMMARY.json", summary)


def _load(path: Path) -> tuple[dict[str, Any], str]:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        tree = json.loads(data.decode("utf-8-sig"))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"'{path}' is damaged gzip: {error}", "copy it again") from error
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}", KINDS) from error
    except (ValueError, RecursionError) as error:
        cause = str(error).partition("\n")[0]
        raise UserError(f"'{path}' is not JSON: {cause}", KINDS) from error
    return tree, _kind(tree, path)


def _kind(tree: Any, path: Path) -> str:
    if not isinstance(tree, dict):
        raise UserError(f"'{path}' is a JSON {type(tree).__name__}, not an object", KINDS)
    if BLOCKS["forget"] in tree or BLOCKS["retain"] in tree:
        return "tofu"
    if any(isinstance(value, dict) and "agg_value" in value for value in tree.values()):
        return "open-unlearning"
    if tree and all(value is None or isinstance(value, int | float) for value in tree.values()):
        hint = "give the TOFU_EVAL.json beside it"
        raise UserError(f"'{path}' is a summary: it holds means but no rows", hint)
    names = ", ".join(list(tree)[:4]) or "nothing"
    raise UserError(f"'{path}' is no evaluation log; it holds {names}", KINDS)


def _set_truth_ratio(record: Record, variant: TruthRatio, source: str) -> None:
    """Set R = wrong / correct from the losses; a geometric one that was logged is kept.

    The correct answer is the paraphrased one; real authors and world facts have only the true one,
    which TOFU scored twice, in batches of different shape, and took the second time.
    """
    stored, wrong = record.get("truth_ratio"), record.get("pert_loss")
    true = record.get("avg_loss") if record["split"] in ("ra", "wf") else None
    correct = record.get("para_loss", true)
    where = f"'{source}' {record['split']} row {record['row']}"
    computed = None
    if correct is not None and wrong:
        losses = [loss(value, where) for value in wrong]
        computed = float(ratio(loss(correct, where), losses, variant=variant))
    if stored is None:
        record["truth_ratio"] = computed
    elif not isinstance(stored, float | int) or not math.isfinite(stored) or stored < 0:
        raise UserError(f"{where} has a truth ratio that is not a number ({stored})", AGAIN)
    elif variant != "geometric":
        if computed is None:
            hint = "leave --truth-ratio out for the logged ratios (geometric)"
            raise UserError(f"{where} has no losses to compute its {variant} truth ratio", hint)
        record["truth_ratio"] = computed


def _require_numbers(metrics: Mapping[str, Metric], source: str) -> None:
    for name in UTILITY:
        if name in metrics and not math.isfinite(metrics[name].value):
            raise UserError(f"'{source}': {name} is not a number", AGAIN)


def _quality(result: Result, retain: Result) -> dict[str, float]:
    ours, theirs = retain_side(result), retain_side(retain)
    if len(ours.truth_ratios) != len(theirs.truth_ratios):
        raise UserError(
            f"'{ours.source}' has {len(ours.truth_ratios)} rows of the forget set, "
            f"'{theirs.source}' has {len(theirs.truth_ratios)}",
            "compare evaluations of the same forget set (TOFU's own logs stop at 300 rows)",
        )
    _require_same_questions(result, retain)
    found = forget_quality(list(ours.truth_ratios.values()), list(theirs.truth_ratios.values()))
    return found._asdict()


def _require_same_questions(result: Result, retain: Result) -> None:
    """Refuse logs whose true answers differ; spaces and ends may, as tokenizers change them."""
    ours, theirs = _answers(result), _answers(retain)
    shared = ours.keys() & theirs.keys()
    same = sum(ours[row] == theirs[row] for row in shared)
    if shared and same < SAME_TEXT * len(shared):
        raise UserError(
            f"'{result.settings['source']}' and '{retain.settings['source']}' are about different "
            f"forget sets: {same} of {len(shared)} true answers agree",
            "give the log of the retain model for the same forget set",
        )


def _answers(result: Result) -> dict[int, str]:
    """Give the start of each true answer of the forget set, letters and digits alone."""
    return {
        record["row"]: "".join(filter(str.isalnum, record["answer"]))[:80]
        for record in result.records
        if record["split"] == "forget" and record.get("answer")
    }
