"""How familiar the forget texts still are: membership scores as a benchmark of a run.

Measured before and after (and on the retain model) it is the audit of a run; reports show it under
privacy. The texts are scored as they stand, without question or chat template, as a stranger would
who knows nothing of how the model was trained on them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from unlearn.data.sources import load_any_rows
from unlearn.detect.corpus import text_of
from unlearn.detect.engine import TextScorer
from unlearn.detect.roc import auc, auc_draws, interval
from unlearn.detect.settings import Settings
from unlearn.evals.benchmark import Metric, Progress, Record, Result
from unlearn.evals.detection.bench import clusters_of, ranked, score_labelled, sides
from unlearn.evals.detection.labelled import LabelledText, clustered

SCORES = ("loss", "zlib", "mink", "minkpp", "gapk")
FIELDS = ("text", "answer", "completion", "input", "snippet", "content")
"""Columns that are taken for the text when none is named, in this order."""
KEY = "evals.familiarity.text_field"


@dataclass(frozen=True)
class Familiarity:
    """AUC of telling forget texts from holdout texts, per score: 1 perfectly, 0.5 not at all."""

    texts: Sequence[LabelledText]
    settings: Settings = field(default_factory=lambda: Settings(scores=SCORES))
    seed: int = 0
    name: str = "familiarity"
    version: str = "1"

    @classmethod
    def load(
        cls,
        forget: str,
        holdout: str,
        *,
        text_field: str | None = None,
        max_rows: int | None = None,
        rows_per_cluster: int | None = None,
        offline: bool = False,
        **how: Any,
    ) -> "Familiarity":
        """Read the texts of both sources; ``max_rows`` keeps the first rows of each.

        ``rows_per_cluster`` rows that follow one another, as the 20 of an author of TOFU, are not
        independent: they are resampled together.

        Raises:
            UserError: a source cannot be read, or has no column with a text.
        """
        texts = [
            LabelledText(
                text_of(row, text_field, FIELDS, f"row {number} of '{source}'", KEY), member
            )
            for source, member in ((forget, True), (holdout, False))
            for number, row in enumerate(load_any_rows(source, offline=offline)[:max_rows], start=1)
        ]
        return cls(clustered(texts, rows_per_cluster) if rows_per_cluster else texts, **how)

    def run(
        self,
        model: Any,
        tokenizer: Any,
        *,
        progress: Progress = lambda stage, done, total: None,
        weights_hash: str | None = None,
    ) -> Result:
        """Measure a model."""
        scorer = TextScorer.of(model, tokenizer, self.settings)
        found = score_labelled(
            self.texts, scorer, progress=lambda done: progress("score", done, len(self.texts))
        )
        metrics = {}
        for score in ranked(found):
            forget, holdout = sides(found, score)
            if forget.size and holdout.size:
                clusters = clusters_of([one.text for one in found if one.scores[score] is not None])
                draws = auc_draws(
                    members=forget, nonmembers=holdout, clusters=clusters, seed=self.seed
                )
                size = forget.size + holdout.size
                ends = interval(draws)
                metrics[f"mia_text_{score}"] = Metric(
                    auc(holdout, forget), "none", None, size, *ends
                )
        records: list[Record] = [
            {"split": "forget_text" if one.text.member else "holdout_text", "row": place}
            | {f"mia_text_{score}": value for score, value in one.scores.items()}
            for place, one in enumerate(found)
        ]
        settings = {"scores": self.settings.scores, "max_tokens": self.settings.max_tokens}
        return Result(self.name, self.version, metrics, records, settings)
