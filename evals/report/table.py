"""The numbers of a report lined up: one row per metric, one cell per model, in blocks.

Imports nothing heavy: the command line reads it for its tables too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLUMNS = {"before": "Before", "after": "After", "retain_model": "Retain model"}
BLOCKS = {
    "summary": "Summary",
    "forget": "Forget set",
    "retain": "Retain set",
    "ra": "Real authors",
    "wf": "World facts",
    "privacy": "Privacy",
    "heldout": "Held-out rows",
    "pairs": "Pairs",
    "chosen": "Chosen answers",
    "rejected": "Rejected answers",
    "text": "Rows trained on",
    "math": "Mathematical problems",
    "other": "Other measures",
}
SPLITS = {
    "forget": "forget set",
    "retain": "retain set",
    "ra": "real authors",
    "wf": "world facts",
    "holdout": "holdout set",
    "heldout": "held-out rows",
    "pairs": "pairs",
    "chosen": "chosen answers",
    "rejected": "rejected answers",
    "text": "rows trained on",
    "math": "mathematical problems",
}
POST_TRAINING = ("heldout", "pairs", "chosen", "rejected", "text")
"""Sets of a run that post-trains."""
WITHOUT_PREFIX = {
    "extraction_strength": "forget",
    "exact_memorization": "forget",
    "model_utility": "summary",
    "privleak": "privacy",
}
"""Metrics whose published name does not start with their set -> their block."""
PREFIXES = {
    "forget_quality": "summary",
    "aggregate": "summary",
    "forget_": "forget",
    "retain_": "retain",
    "ra_": "ra",
    "wf_": "wf",
    "mia_": "privacy",
    "s_mia_": "privacy",
    **{f"{name}_": name for name in (*POST_TRAINING, "math")},
}
"""Start of a metric's name -> its block; the first that fits."""

MEASURES = {
    "Q_A_Prob": ("Probability of the true answer", "per token, geometric mean"),
    "Q_A_Prob_normalised": ("True answer among the options", "share of the probability"),
    "Q_A_ROUGE": ("Overlap of the written with the true answer", "ROUGE-L recall"),
    "Q_A_PARA_Prob": ("Probability of the reworded true answer", "per token, geometric mean"),
    "Q_A_PERT_Prob": ("Probability of wrong answers", "per token, geometric mean"),
    "Q_A_PARA_ROUGE": ("Overlap with the reworded true answer", "ROUGE-L recall"),
    "Q_A_PERT_ROUGE": ("Overlap with wrong answers", "ROUGE-L recall"),
    "PARA_Q_A_Prob": ("Probability, question reworded", "per token, geometric mean"),
    "PARA_Q_A_ROUGE": ("Overlap, question reworded", "ROUGE-L recall"),
    "PARA_Q_A_extraction_strength": (
        "Extraction strength, question reworded",
        "share of the answer",
    ),
    "loss": ("Loss", "nats per token"),
    "logp": ("Log-probability of the answers", "nats per token"),
    "accuracy": ("Pairs told apart", "share whose chosen answer is the likelier one, per token"),
    "margin": ("Margin of the chosen answers", "nats per token above the rejected ones"),
    "answer_tokens": ("Length of its own answers", "tokens, the end token counted"),
    "unfinished": ("Own answers without an end", "share cut at evals.max_new_tokens"),
    "pass_at_1": ("Own answers that are right", "pass@1: mean over samples and problems"),
    "sampling_error": ("Standard error of pass@1 over samples", "the problems stay the same"),
    "tokens": ("Length of its own answers", "tokens, the end token counted"),
    "truncated": ("Own answers without an end", "share cut at max_new_tokens"),
    "kl": ("Distance from the starting model", "KL(start || model), nats per labelled token"),
    "jailbreak_ROUGE": ("Overlap, answer begun for the model", "ROUGE-L recall"),
    "extraction_strength": ("Extraction strength", "share of the answer recited to its end"),
    "exact_memorization": ("Exact memorisation", "share of tokens predicted right"),
    "truth_ratio": ("Truth ratio", "wrong against reworded true answers; 1 = told apart no more"),
    "Truth_Ratio": ("Truth ratio", "how much likelier the true answer is than wrong ones"),
    "repetition": ("Repetition in its answers", "share of word 4-grams that came before"),
    "perplexity": ("Perplexity of its answers", "per token, under the model that judges"),
    "gibberish": ("Clean language in its answers", "probability by a classifier"),
    "forget_quality": ("Forget quality", "p of the KS test against the retain model"),
    "forget_quality_log10_p": ("Forget quality, log10 p", "0 is the most there is"),
    "forget_quality_ks": ("KS distance to the retain model", "between the truth ratios"),
    "model_utility": ("Model utility", "harmonic mean of nine parts"),
    "privleak": ("PrivLeak", "in %; below 0 under-, above 0 over-unlearned"),
    "mia_loss": ("Membership by loss", "AUC; 0.5 = cannot be told from unseen rows"),
    "mia_zlib": ("Membership by loss per zlib byte", "AUC; 0.5 = cannot be told"),
    "mia_min_k": ("Membership by Min-K%", "AUC; 0.5 = cannot be told"),
    "mia_min_k_plus_plus": ("Membership by Min-K%++", "AUC; 0.5 = cannot be told"),
    "mia_reference": ("Membership by loss against a reference", "AUC; 0.5 = cannot be told"),
    "mia_gradnorm": ("Membership by gradient norm", "AUC; 0.5 = cannot be told"),
    "mia_text_loss": ("Membership by loss, bare texts", "AUC; 0.5 = cannot be told"),
    "mia_text_zlib": ("Membership by loss per zlib byte, bare texts", "AUC; 0.5 = cannot be told"),
    "mia_text_mink": ("Membership by Min-K%, bare texts", "AUC; 0.5 = cannot be told"),
    "mia_text_minkpp": ("Membership by Min-K%++, bare texts", "AUC; 0.5 = cannot be told"),
    "mia_text_gapk": ("Membership by Gap-K%, bare texts", "AUC; 0.5 = cannot be told"),
    "s_mia_loss": ("Membership by loss, closeness", "1 = as the retain model"),
    "s_mia_zlib": ("Membership by loss per zlib byte, closeness", "1 = as the retain model"),
    "s_mia_min_k": ("Membership by Min-K%, closeness", "1 = as the retain model"),
    "s_mia_min_k_plus_plus": ("Membership by Min-K%++, closeness", "1 = as the retain model"),
    "aggregate": ("open-unlearning's aggregate", "harmonic mean of the three below"),
    "aggregate_memorization": ("Aggregate: memorisation", "harmonic mean; 1 = nothing left"),
    "aggregate_privacy": ("Aggregate: privacy", "harmonic mean of the closenesses"),
    "aggregate_utility": ("Aggregate: utility", "relative to the model before"),
}
"""Metric without the prefix of its set -> its name in words, and its unit or meaning."""

SMALLEST = 1e-6
"""Numbers below it are written with an exponent."""


@dataclass(frozen=True)
class Cell:
    """One number of the table; ``value`` is None when the model gave nothing finite.

    ``low`` and ``high`` bound the 95 % bootstrap interval over rows, where it is known.
    """

    value: float | None
    standard_error: float | None = None
    n: int | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """One metric for the model before and after, and for the retain model when there is one."""

    name: str
    direction: str
    before: Cell | None
    after: Cell | None
    retain_model: Cell | None = None

    @property
    def block(self) -> str:
        return block_of(self.name)

    @property
    def split(self) -> str:
        """Name the rows that the metric is about; empty when it is about several sets."""
        return self.block if self.block in SPLITS else ""

    @property
    def measure(self) -> str:
        return self.name.removeprefix(f"{self.split}_") if self.split else self.name

    @property
    def title(self) -> str:
        if self.split == "math" and self.measure not in MEASURES:
            return self.measure.replace("pass_at_", "pass@")
        return MEASURES.get(self.measure, (self.measure.replace("_", " "), ""))[0]

    @property
    def detail(self) -> str:
        return MEASURES.get(self.measure, ("", ""))[1]

    @property
    def change(self) -> float | None:
        """After minus before."""
        return difference(self.after, self.before)

    def cell(self, who: str) -> Cell | None:
        """Give the cell of ``before``, ``after`` or ``retain_model``."""
        return {"before": self.before, "after": self.after, "retain_model": self.retain_model}[who]


def block_of(metric: str) -> str:
    """Say which block of the table a metric belongs to."""
    if metric in WITHOUT_PREFIX:
        return WITHOUT_PREFIX[metric]
    return next((block for start, block in PREFIXES.items() if metric.startswith(start)), "other")


def number(value: float | None) -> str:
    """Write a number so that it can be read: three decimals, or two digits when it is small."""
    if value is None or not math.isfinite(value):
        return "not a number"
    if value == 0 or abs(value) >= 0.001:
        return f"{value:.3f}"
    if abs(value) < SMALLEST:
        return f"{value:.1e}"
    return f"{value:.{1 - math.floor(math.log10(abs(value)))}f}"


def difference(cell: Cell | None, other: Cell | None) -> float | None:
    """Subtract two means; None when either is missing."""
    if cell is None or other is None or cell.value is None or other.value is None:
        return None
    return cell.value - other.value


def table(results: Mapping[str, Any]) -> list[Row]:
    """Line up the metrics of the models; a metric that some model lacks keeps an empty cell."""
    details = {who: _details(results, who) for who in results.get("metrics", {})}
    names = dict.fromkeys(name for who in COLUMNS for name in details.get(who, {}))
    rows = []
    for name in names:
        found = {who: details[who][name] for who in COLUMNS if name in details.get(who, {})}
        cells = {who: _cell(detail) for who, detail in found.items()}
        direction = next((d["direction"] for d in found.values() if "direction" in d), "none")
        before, after, retain = (cells.get(who) for who in COLUMNS)
        rows.append(Row(name, direction, before, after, retain))
    return rows


def blocks(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Sort rows into the blocks of the table, known measures first; empty blocks are left out."""
    order = {measure: place for place, measure in enumerate(MEASURES)}
    rows = sorted(rows, key=lambda row: order.get(row.measure, len(order)))
    found = {title: [row for row in rows if row.block == key] for key, title in BLOCKS.items()}
    return {title: chosen for title, chosen in found.items() if chosen}


def columns(rows: Sequence[Row]) -> dict[str, str]:
    """Name the models that were measured; a single model is not called before or after."""
    titles = {who: title for who, title in COLUMNS.items() if any(row.cell(who) for row in rows)}
    if "before" not in titles and "after" in titles:
        titles["after"] = "Model"
    return titles


def is_post_training(rows: Sequence[Row]) -> bool:
    """Tell a report on post-training from one on unlearning, by what was measured."""
    alone = bool(rows) and all(row.split == "math" for row in rows)
    return alone or any(row.split in POST_TRAINING for row in rows)


def finite(value: Any) -> float | None:
    """Give a number, or None for what is none: missing, NaN, infinite, text."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _details(results: Mapping[str, Any], who: str) -> dict[str, dict[str, Any]]:
    stored = results.get("details", {}).get(who, {})
    found = {
        name: {"value": value, **stored.get(name, {})}
        for name, value in results["metrics"][who].items()
    }
    p = finite(found.get("forget_quality", {}).get("value"))
    if p and "forget_quality_log10_p" not in found:
        n = found["forget_quality"].get("n")
        found["forget_quality_log10_p"] = {"value": math.log10(p), "direction": "higher", "n": n}
    return found


def _cell(detail: Mapping[str, Any]) -> Cell:
    value, error, low, high = (
        finite(detail.get(key)) for key in ("value", "standard_error", "low", "high")
    )
    return Cell(value, error, detail.get("n"), low, high)
