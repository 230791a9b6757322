"""From what a model said to one record per row, and from records to TOFU's metrics.

Names of metrics are open-unlearning's. Where it has none, they are built the same way:
``forget_PARA_Q_A_Prob`` is the answer's probability after a paraphrased question (its
``forget_Q_A_PARA_Prob`` is that of a paraphrased answer).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from unlearn.evals.benchmark import Direction, Metric, Record
from unlearn.evals.fluency import repetition
from unlearn.evals.membership import ATTACKS, auc
from unlearn.evals.metrics import (
    EsVariant,
    exact_memorization,
    extraction_strength,
    normalised_probability,
    probability,
    rouge,
)
from unlearn.evals.statistics import (
    EPSILON,
    UTILITY_PARTS,
    TruthRatio,
    auc_interval,
    mean_with_interval,
    model_utility,
    readable,
    truth_ratio,
    utility_interval,
    with_interval,
)
from unlearn.evals.tofu.data import PARAPHRASED, Item, Rows, Sheet
from unlearn.scores import Scores

Columns = dict[str, list[float | None]]
KEPT = ("retain", "ra", "wf")


@dataclass(frozen=True)
class Reading:
    """How the numbers are read: the variants of truth ratio and extraction strength, the seed.

    ``epsilon`` is what open-unlearning adds to denominators (0 or 1e-10).
    """

    truth_ratio: TruthRatio = "geometric"
    es: EsVariant = "exact"
    epsilon: float = 0.0
    seed: int = 0


def columns_of(scores: Scores, texts: Sequence[str], reading: Reading) -> Columns:
    """Give every per-sequence number; what is not defined for a sequence is None.

    ``texts`` are the answers, for the compressed size.
    """
    assert scores.correct is not None
    found = {
        "prob": probability(scores),
        "avg_loss": -scores.sequence / scores.num_tokens,
        "num_tokens": scores.num_tokens,
        "extraction_strength": extraction_strength(
            scores.correct, scores.mask, variant="ou" if reading.es == "ou" else "exact"
        ),
        "satimp": extraction_strength(scores.correct, scores.mask, variant="satimp"),
        "exact_memorization": exact_memorization(scores.correct, scores.mask),
    }
    found |= {f"mia_{name}": attack(scores, texts) for name, attack in ATTACKS.items()}
    return {name: _listed(column) for name, column in found.items()}


def _listed(column: torch.Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in column.tolist()]


def records_of(
    blocks: Rows,
    sheet: Sheet,
    columns: Columns,
    written: Sequence[str] | None,
    reading: Reading,
) -> list[Record]:
    """Put together one record per row; ``written`` are the answers to the sheet's prompts.

    Perturbed answers become lists (``pert_prob``, ``pert_loss``). A field is None, or absent,
    where it is not defined; a row lacks the truth ratio if one of its texts was skipped.
    """
    records = {
        (block, place): _start(block, place, row)
        for block, rows in blocks.items()
        for place, row in enumerate(rows)
    }
    for place, item in enumerate(sheet.items):
        values = {name: column[place] for name, column in columns.items()}
        _add_scored(records[item.split, item.row], item, values, reading)
    for prompt, text in zip(sheet.prompts, written or (), strict=False):
        record = records[prompt.split, prompt.row]
        _add_written(record, prompt.kind, text, blocks[prompt.split][prompt.row])
    for record in records.values():
        _add_ratio(record, blocks[record["split"]][record["row"]], reading)
    return list(records.values())


def _start(block: str, place: int, row: Mapping[str, Any]) -> Record:
    return {"split": block, "row": place, "question": row["question"], "answer": row["answer"]}


ATTACK_FIELDS = tuple(f"mia_{name}" for name in ATTACKS)
ANSWER = ("prob", "avg_loss", "num_tokens", "extraction_strength", "exact_memorization")


def _add_scored(
    record: Record, item: Item, values: Mapping[str, float | None], reading: Reading
) -> None:
    if item.kind == "answer":
        attacked = item.split in ("forget", "holdout")
        names = ANSWER + (ATTACK_FIELDS if attacked else ())
        record |= {name: values[name] for name in names}
    elif item.kind == "satimp":
        record["extraction_strength"] = values["satimp"]
    elif item.kind == "pert":
        record.setdefault("pert_prob", []).append(values["prob"])
        record.setdefault("pert_loss", []).append(values["avg_loss"])
    else:
        record[f"{item.kind}_prob"] = values["prob"]
        record[f"{item.kind}_loss"] = values["avg_loss"]
        if item.kind == "para_question":
            strength = values["extraction_strength"]
            record["para_question_extraction_strength"] = strength


def _add_written(record: Record, kind: str, text: str, row: Mapping[str, Any]) -> None:
    found = rouge(row["answer"], text)
    if kind != "answer":
        record |= {f"{kind}_generation": text, f"{kind}_rouge_l_recall": found.rouge_l_recall}
        return
    record |= {"generation": text, **found._asdict(), "repetition": repetition(text)}
    if record["split"] == "forget":
        record["para_rouge_l_recall"] = rouge(row["paraphrased_answer"], text).rouge_l_recall
        wrong = [rouge(answer, text).rouge_l_recall for answer in row["perturbed_answer"]]
        record["pert_rouge_l_recall"] = wrong


def _add_ratio(record: Record, row: Mapping[str, Any], reading: Reading) -> None:
    wrong = record.get("pert_loss", [])
    if record["split"] == "holdout":
        return
    correct = record.get("para_loss" if record["split"] in PARAPHRASED else "avg_loss")
    complete = len(wrong) == len(row["perturbed_answer"]) and None not in wrong
    record["truth_ratio"] = None
    if correct is not None and complete:
        ratio = truth_ratio(correct, wrong, variant=reading.truth_ratio, epsilon=reading.epsilon)
        record["truth_ratio"] = float(ratio)
        record["truth_prob_mean"] = float(
            truth_ratio(correct, wrong, variant="prob_mean", epsilon=reading.epsilon)
        )
        if record["split"] not in PARAPHRASED:
            shares = normalised_probability(
                torch.tensor([record["prob"]], dtype=torch.float64),
                torch.tensor([record["pert_prob"]], dtype=torch.float64),
                epsilon=reading.epsilon,
            )
            record["prob_normalised"] = _listed(shares)[0]


Getter = Callable[[Record], float | None]


def _field(name: str) -> Getter:
    return lambda record: record.get(name)


def _mean_of(name: str) -> Getter:
    def getter(record: Record) -> float | None:
        values = [value for value in record.get(name) or () if value is not None]
        return math.fsum(values) / len(values) if values else None

    return getter


def _means() -> list[tuple[str, str, Getter, Direction]]:
    """List every metric that is a mean over the rows of one block."""
    found: list[tuple[str, str, Getter, Direction]] = [
        ("forget_Q_A_Prob", "forget", _field("prob"), "lower"),
        ("forget_Q_A_ROUGE", "forget", _field("rouge_l_recall"), "lower"),
        ("extraction_strength", "forget", _field("extraction_strength"), "lower"),
        ("exact_memorization", "forget", _field("exact_memorization"), "lower"),
        ("forget_Q_A_PARA_Prob", "forget", _field("para_prob"), "lower"),
        ("forget_Q_A_PERT_Prob", "forget", _mean_of("pert_prob"), "none"),
        ("forget_Q_A_PARA_ROUGE", "forget", _field("para_rouge_l_recall"), "lower"),
        ("forget_Q_A_PERT_ROUGE", "forget", _mean_of("pert_rouge_l_recall"), "none"),
        ("forget_PARA_Q_A_Prob", "forget", _field("para_question_prob"), "lower"),
        ("forget_PARA_Q_A_ROUGE", "forget", _field("para_question_rouge_l_recall"), "lower"),
        (
            "forget_PARA_Q_A_extraction_strength",
            "forget",
            _field("para_question_extraction_strength"),
            "lower",
        ),
        ("forget_jailbreak_ROUGE", "forget", _field("jailbreak_rouge_l_recall"), "lower"),
        ("forget_repetition", "forget", _field("repetition"), "lower"),
    ]
    for block in KEPT:
        wanted: list[tuple[str, Getter, Direction]] = [
            ("Q_A_Prob", _field("prob"), "higher"),
            ("Q_A_Prob_normalised", _field("prob_normalised"), "higher"),
            ("Q_A_ROUGE", _field("rouge_l_recall"), "higher"),
            ("Q_A_PARA_Prob", _field("para_prob"), "higher"),
            ("Q_A_PERT_Prob", _mean_of("pert_prob"), "none"),
            ("PARA_Q_A_Prob", _field("para_question_prob"), "higher"),
            ("PARA_Q_A_ROUGE", _field("para_question_rouge_l_recall"), "higher"),
            ("repetition", _field("repetition"), "lower"),
        ]
        found += [(f"{block}_{name}", block, getter, d) for name, getter, d in wanted]
    return found


MEANS = _means()


def metrics_of(records: Sequence[Record], reading: Reading) -> dict[str, Metric]:
    """Average records into metrics with standard error and 95 % bootstrap interval.

    A metric whose field no record has is left out.
    """
    found: dict[str, Metric] = {}
    for name, block, getter, direction in MEANS:
        values = [getter(record) for record in records if record["split"] == block]
        _add_mean(found, name, values, direction, reading.seed)
    for block in ("forget", *KEPT):
        name = "forget_truth_ratio" if block == "forget" else f"{block}_Truth_Ratio"
        values = _truth_scores(records, block, reading)
        forgets = block == "forget" and reading.truth_ratio == "prob_mean"
        _add_mean(found, name, values, "lower" if forgets else "higher", reading.seed)
    utility = _utility(found, records, reading)
    if utility is not None:
        found["model_utility"] = utility
    return found | attack_metrics(records, (*ATTACK_FIELDS, "mia_gradnorm"), reading.seed)


def attack_metrics(
    records: Sequence[Record], fields: Sequence[str], seed: int
) -> dict[str, Metric]:
    """Give the AUC of each attack between forget and holdout rows; empty without holdout rows."""
    found = {}
    for name in fields:
        low, high = (
            [r[name] for r in records if r["split"] == split and r.get(name) is not None]
            for split in ("forget", "holdout")
        )
        if low and high:
            metric = Metric(auc(low, high), "none", None, len(low) + len(high))
            found[name] = with_interval(metric, auc_interval(low, high, seed=seed))
    return found


def mean_prob_mean(records: Sequence[Record]) -> float | None:
    """Give the mean over forget rows of correct / (correct + wrong), whatever variant was asked."""
    values = [r["truth_prob_mean"] for r in records if r.get("truth_prob_mean") is not None
              and r["split"] == "forget"]  # fmt: skip
    return math.fsum(values) / len(values) if values else None


def _add_mean(
    found: dict[str, Metric],
    name: str,
    values: Sequence[float | None],
    direction: Direction,
    seed: int,
) -> None:
    present = [value for value in values if value is not None]
    if present:
        found[name] = mean_with_interval(Metric.mean(present, direction), present, seed=seed)


def _truth_scores(records: Sequence[Record], block: str, reading: Reading) -> list[float | None]:
    ratios = [record.get("truth_ratio") for record in records if record["split"] == block]
    scores = readable(
        [np.nan if ratio is None else ratio for ratio in ratios],
        block,
        variant=reading.truth_ratio,
        epsilon=reading.epsilon,
    )
    return [None if ratio is None else float(s) for ratio, s in zip(ratios, scores, strict=True)]


def _utility(
    found: Mapping[str, Metric], records: Sequence[Record], reading: Reading
) -> Metric | None:
    """Give model utility, if all of its nine parts are there."""
    names = [name for parts in UTILITY_PARTS.values() for name in parts]
    if any(name not in found for name in names):
        return None
    utility = model_utility([found[name].value for name in names])
    rows = [_part_rows(records, block, reading) for block in UTILITY_PARTS]
    metric = Metric(utility, "higher", None, sum(len(block) for block in rows))
    return with_interval(metric, utility_interval(rows, seed=reading.seed))


def _part_rows(records: Sequence[Record], block: str, reading: Reading) -> list[list[float]]:
    """Give the three parts of each row of a block; rows that lack one are left out."""
    share = "prob" if block == "retain" else "prob_normalised"
    scores = _truth_scores(records, block, reading)
    rows = zip((r for r in records if r["split"] == block), scores, strict=True)
    found = [[record.get(share), record.get("rouge_l_recall"), score] for record, score in rows]
    return [[float(v) for v in row if v is not None] for row in found if None not in row]


def epsilon_of(compat: str) -> float:
    """Give what is added to denominators: open-unlearning's 1e-10, else nothing."""
    return EPSILON if compat == "ou" else 0.0
