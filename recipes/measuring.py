"""What a recipe measures: the sections under ``evals``.

This module must stay importable without torch.
"""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from unlearn.recipes.section import Section


class TofuSection(Section):
    """The TOFU benchmark instead of the plain forget and retain measures."""

    data: str = Field(default="locuslab/TOFU", min_length=1)
    """Folder or hub name of the TOFU dataset."""
    split: Literal["forget01", "forget05", "forget10"] = "forget10"
    """Which authors were to be forgotten."""
    truth_ratio: Literal["geometric", "arithmetic", "prob_mean"] = "geometric"
    """How the wrong answers are averaged in the truth ratio."""
    compat: Literal["none", "ou"] = "none"
    """`ou` reproduces open-unlearning's numbers, its quirks included."""
    holdout: str | None = Field(default=None, min_length=1)
    """Rows never trained on, for membership inference; null: the dataset's own, if it has any."""
    retain_logs: str | None = Field(default=None, min_length=1)
    """Stored evaluation of a retain model (TOFU_EVAL.json), in place of `model.retain_model`."""
    probes: bool = False
    """Ask in other ways too: paraphrased questions and an answer that is begun for the model."""


class HarnessSection(Section):
    """Tasks of lm-evaluation-harness, measured before and after."""

    tasks: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """Names of tasks or groups, for instance [wmdp_bio, mmlu]."""
    data: str | None = Field(default=None, min_length=1)
    """Folder with the WMDP and MMLU questions, to work without a network."""
    limit: int | None = Field(default=None, ge=1)
    """First questions of every task; null asks all."""


class FamiliaritySection(Section):
    """Membership scores of the forget texts against texts never seen, before and after."""

    holdout: str = Field(min_length=1)
    """Texts of the same kind as the forget set that no model saw: a source."""
    text_field: str | None = Field(default=None, min_length=1)
    """Column with the text; null takes text, answer, completion, input, snippet or content."""
    rows_per_cluster: int | None = Field(default=None, ge=1)
    """Rows that follow one another and are not independent, as 20 of an author: for intervals."""


class MathSection(Section):
    """Problems that the model answers several times, each answer judged, before and after."""

    data: str = Field(min_length=1)
    """Rows with problem, question or prompt and answer or solution: a source."""
    n: int = Field(default=4, ge=1)
    """Samples of each problem."""
    k: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] | None = None
    """The k of every pass@k, for instance [1, 4]; null gives 1 and n."""
    temperature: float = Field(default=0.6, ge=0, strict=False)
    """Of the sampling; 0 is greedy, with n 1."""
    top_p: float = Field(default=0.95, gt=0, le=1, strict=False)
    """Share of the probability that tokens are drawn from."""
    max_new_tokens: int = Field(default=2048, ge=1)
    """Longest completion, in tokens."""
    force_prefix: str = ""
    """What every completion begins with, for instance "<think>\\n"."""
    instruction: str | None = None
    """Goes with each problem; null asks for the answer in a box, "" for nothing."""
    verify: Literal["math", "exact"] = "math"
    """Judge: `math` is math-verify (the `math` extra), `exact` compares numbers and texts."""
    batch_size: int = Field(default=16, ge=1)
    """Completions written at once."""
    max_rows: int | None = Field(default=None, ge=1)
    """First problems only; null takes all."""


class SelectSection(Section):
    """Which of the measured steps becomes the model."""

    metric: str = Field(min_length=1)
    """The metric that must be best, in the direction wanted of it."""
    constraints: dict[str, float] = Field(default_factory=dict)
    """Metric -> bound: at most it where less is wanted, at least it where more is wanted."""


class EvalsSection(Section):
    """What is measured, how much of it, and when."""

    every: int | None = Field(default=None, ge=1)
    """Optimiser steps between measurements; null measures only before and after."""
    tofu: TofuSection | None = None
    """Measure the TOFU benchmark; `{}` takes the defaults."""
    lm_eval: HarnessSection | None = None
    """Also measure tasks of lm-evaluation-harness."""
    familiarity: FamiliaritySection | None = None
    """Also measure how familiar the forget texts are beside texts never seen."""
    math: MathSection | None = None
    """Also measure how often the model's own answers to problems are right."""
    select_best: SelectSection | None = None
    """Keep the best of the measured steps instead of the last; needs `every`."""
    max_rows: int = Field(default=400, ge=1)
    """Rows measured per split: the first ones."""
    retain_kl: bool = False
    """Also measure KL(start || model) on the retain set; needs the starting model in memory."""
    generate: bool = True
    """Let the model write answers; ROUGE needs it, and it takes most of the time."""
    max_new_tokens: int = Field(default=200, ge=1)
    """Longest written answer, in tokens."""
    batch_tokens: int = Field(default=8192, ge=1)
    """Padded tokens per forward pass while measuring; lower it when memory runs out."""

    @field_validator("select_best")
    @classmethod
    def _selection_needs_measurements(
        cls, value: SelectSection | None, info: ValidationInfo
    ) -> SelectSection | None:
        if value and info.data.get("every", "invalid") is None:
            raise ValueError(
                "given without every; the best is chosen among measured steps: "
                "add `every: STEPS`, or leave select_best out"
            )
        return value
