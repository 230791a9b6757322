"""Keeping the best of the measured steps, by an objective that the recipe declares.

The trained weights of the best step so far lie in ``best/`` of the run folder, so a stopped run
does not lose them.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from unlearn.engines import put_trained, trained_weights
from unlearn.errors import RunFailed, unknown
from unlearn.ranks import Ranks
from unlearn.recipes.measuring import SelectSection
from unlearn.runs import staged, write_json

WEIGHTS, RECORD = "weights.safetensors", "selected.json"


@dataclass(frozen=True)
class Selection:
    """The declared objective, and the folder of the best step."""

    rule: SelectSection
    folder: Path

    def consider(self, model: Any, step: int, details: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep this step's trained weights when it is better than every step before it.

        ``details`` holds value and direction of every metric measured at this step.
        """
        score = rank(self.rule, details)
        best = self.best()
        if math.isinf(score[0]) or (best and tuple(best["rank"]) <= score):
            return
        record = {
            "step": step,
            "metric": self.rule.metric,
            "value": details[self.rule.metric]["value"],
            "constraints": dict(self.rule.constraints),
            "satisfied": score[0] == 0,
            "rank": score,
        }
        ranks = Ranks.world()
        weights = trained_weights(model, keep=ranks.rank == 0)
        ranks.first(lambda: self._keep(dict(weights), record))

    def _keep(self, weights: dict[str, Tensor], record: dict[str, Any]) -> None:
        with staged(self.folder) as staging:
            save_file(weights, staging / WEIGHTS)
            write_json(staging / RECORD, record)

    def best(self) -> dict[str, Any] | None:
        """Give the record of the best step so far: step, metric, value, constraints, satisfied."""
        path = self.folder / RECORD
        return dict(json.loads(path.read_text())) if path.is_file() else None

    def restore(self, model: Any) -> dict[str, Any]:
        """Put the weights of the best step into the model; give its record.

        Raises:
            RunFailed: no step could be ranked.
        """
        best = self.best()
        if best is None:
            raise RunFailed(
                f"'{self.rule.metric}' was not a number at any measured step",
                "choose another evals.select_best.metric",
            )
        put_trained(model, load_file(self.folder / WEIGHTS))
        return best


def best_step(folder: Path) -> int | None:
    """Give the best of the steps measured so far; None when nothing is to be selected."""
    path = folder / RECORD
    return int(json.loads(path.read_text())["step"]) if path.is_file() else None


def rank(rule: SelectSection, details: Mapping[str, Mapping[str, Any]]) -> tuple[float, float]:
    """Give a pair to be minimised: how far the constraints are missed, then the metric.

    A step whose numbers are missing (null) ranks last: (inf, inf).
    """
    missed = 0.0
    for name, bound in rule.constraints.items():
        value = details[name]["value"]
        if value is None:
            return math.inf, math.inf
        excess = value - bound if details[name]["direction"] == "lower" else bound - value
        missed += max(0.0, excess)
    value = details[rule.metric]["value"]
    if value is None:
        return math.inf, math.inf
    return missed, value if details[rule.metric]["direction"] == "lower" else -value


def check_rule(rule: SelectSection, details: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a rule over metrics that are not measured, or of which nothing is wanted.

    Raises:
        UserError: names the metric and those there are.
    """
    wanted = [name for name, metric in details.items() if metric["direction"] != "none"]
    for name in (rule.metric, *rule.constraints):
        if name not in wanted:
            raise unknown("metric in evals.select_best:", name, wanted)
