"""What one experiment is: a frozen, strict, typed description. Defaults live here and only here.

YAML on disk carries what differs. ``unlearn.recipes.files`` reads, changes, checks and writes it.
This module must stay importable without torch.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from unlearn.errors import UserError
from unlearn.recipes.choice import ChoiceSection
from unlearn.recipes.measuring import EvalsSection
from unlearn.recipes.missing import missing_keys
from unlearn.recipes.passthrough import KNOWN_OPTIMIZERS, check_optimizer, passthrough_mistakes
from unlearn.recipes.posttraining import CollapseSection, PruneSection, purpose_mistake
from unlearn.recipes.section import Section as _Section
from unlearn.recipes.sections import (
    AssistantSection,
    EditSection,
    ExtraSection,
    LaunchSection,
    LoraSection,
    Scheduler,
    check_assistant,
    check_edit,
    without_terms,
)
from unlearn.recipes.terms import Term, check_purpose, posttraining, read_by


class ModelSection(_Section):
    """The model to change, and how it is loaded."""

    path: str | None = Field(default=None, min_length=1)
    """Folder or hub name of the model to change (the target). Required to run."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the weights; auto is bfloat16 on CUDA and float32 elsewhere."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""
    lora: LoraSection | None = None
    """Train low-rank adapters instead of all weights; `{}` takes the defaults."""
    quantize: Literal["nf4"] | None = None
    """Load frozen weights in 4 bits (QLoRA); needs `lora` and bitsandbytes."""
    retain_model: str | None = Field(default=None, min_length=1)
    """Model trained without the forget set: what perfect unlearning looks like, for the report."""

    @field_validator("quantize")
    @classmethod
    def _quantized_weights_are_frozen(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value and info.data.get("lora", "invalid") is None:
            raise ValueError(
                f"{value!r} given without lora; 4-bit weights cannot be trained themselves: "
                "add `lora: {}` (or --lora), or leave quantize out"
            )
        return value


def _has_question(template: str | None) -> str | None:
    if template is not None and "{question}" not in template:
        raise ValueError(f"{template!r} given; must contain {{question}}, where the prompt goes")
    return template


class DataSection(_Section):
    """What to forget, what to keep, and how a row becomes text."""

    forget: str | None = Field(default=None, min_length=1)
    """Rows to forget: FILE or FOLDER or hub dataset, then #CONFIG and :SPLIT. Required to run."""
    retain: str | None = Field(default=None, min_length=1)
    """Rows to keep, in the same form. Required when a term is on retain."""
    forget_extra: Annotated[tuple[ExtraSection, ...], Field(strict=False)] = ()
    """More rows for the forget set, for instance paraphrases; trained on, and not measured."""
    retain_extra: Annotated[tuple[ExtraSection, ...], Field(strict=False)] = ()
    """More rows for the retain set; trained on, and not measured."""
    pairs: str | None = Field(default=None, min_length=1)
    """To post-train: rows with a chosen and a rejected answer. Required when a term is on them."""
    text: str | None = Field(default=None, min_length=1)
    """To post-train: rows to train on; null takes the chosen answers of the pairs."""
    heldout: str | None = Field(default=None, min_length=1)
    """To post-train: rows that are measured and never trained on."""
    unseen: str | None = Field(default=None, min_length=1)
    """Rows like the forget set that the model has not seen, for `edit.forget_nll: unseen`."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Standard name -> column in the file, for instance {question: q, answer: a}."""
    template: Annotated[str | None, AfterValidator(_has_question)] = None
    """Prompt text with {question}; the answer follows directly. null: the chat template."""
    refusals: str | None = Field(default=None, min_length=1)
    """File with one refusal per line, for terms on refusals; null: about 30 that ship."""
    system_prompt: str | None = None
    """System message put before every prompt, for chat templates that know one."""
    template_args: dict[str, Any] = Field(default_factory=dict)
    """Variables handed to the chat template, for instance {date_string: 10 Apr 2025}."""
    max_length: int = Field(default=512, ge=2)
    """Longest sequence, in tokens; longer text rows are cut into windows."""
    select: ChoiceSection | None = None
    """Part of the forget set that is trained on; null trains on all of it."""


def _steps(value: int) -> int:
    if value == 0 or value < -1:
        raise ValueError(
            f"{value} given; must be a number of steps above 0, or -1 for whole epochs"
        )
    return value


class TrainingSection(_Section):
    """Settings of the optimisation, named as in transformers.TrainingArguments.

    Any other field of TrainingArguments may be given too, unless the pipeline owns it.
    """

    model_config = ConfigDict(extra="allow")

    num_train_epochs: float = Field(default=10.0, gt=0)
    """Passes over the forget set; each forget row meets another retain row every time."""
    max_steps: Annotated[int, AfterValidator(_steps)] = -1
    """Optimiser steps; -1 leaves it to num_train_epochs."""
    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Forget rows in one forward pass per device; as many retain rows join them."""
    gradient_accumulation_steps: int = Field(default=4, ge=1)
    """Forward passes of each process per optimiser step."""
    global_batch_size: int | None = Field(default=None, ge=1)
    """Forget rows per optimiser step over all processes, instead of gradient_accumulation_steps."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Highest learning rate, reached after the warm-up."""
    lr_scheduler_type: Scheduler = "linear"
    """How the learning rate falls after the warm-up."""
    warmup_epochs: float = Field(default=1.0, ge=0)
    """Length of the warm-up in passes over the forget set; ignored when warmup_steps is given."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Length of the warm-up in optimiser steps."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay (AdamW)."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    optim: Annotated[str, AfterValidator(check_optimizer)] = Field(
        default="adamw_torch", examples=list(KNOWN_OPTIMIZERS)
    )
    """Optimiser, by its name in transformers."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, far less memory."""
    passes: Literal["together", "apart"] = "together"
    """Streams in one forward pass, or one after another: less memory, the same gradient."""
    save_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps between checkpoints; null saves once per epoch."""
    save_total_limit: int | None = Field(default=2, ge=1)
    """Checkpoints kept; null keeps all."""
    trainable: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    """Weights that are trained: regular expressions found in their names; null trains all."""
    collapse: CollapseSection = CollapseSection()
    """When post-training counts as collapsed: right answers becoming unlikely."""
    prune: PruneSection | None = None
    """Post-training: leave rows out of epochs by their losses; `{}` takes the defaults."""
    reference: Literal["cached", "live"] = "cached"
    """The frozen start: its scores are computed once and stored, or asked anew at every step."""

    @model_validator(mode="after")
    def _extra_keys_are_training_arguments(self) -> Self:
        if mistakes := passthrough_mistakes(self.extras, type(self).model_fields):
            lines = "; ".join(f"{key}: {why}" for key, why in mistakes.items())
            raise PydanticCustomError("passthrough", "{lines}", {"lines": lines})
        return self

    @field_validator("trainable")
    @classmethod
    def _regular_expressions(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for pattern in value or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return value

    @property
    def extras(self) -> dict[str, Any]:
        """Fields of TrainingArguments given beyond the declared ones."""
        return dict(self.__pydantic_extra__ or {})


class FirstSection(_Section):
    """Training that comes before the recipe's own, on the same model; what it makes is kept."""

    terms: Annotated[
        tuple[Term, ...], Field(strict=False, min_length=1), AfterValidator(check_purpose)
    ]
    """Terms of its loss."""
    training: TrainingSection = TrainingSection()
    """Settings of its optimisation; keys that are not given are those of `training`."""


class Recipe(_Section):
    """One experiment: the loss is the weighted sum of the terms."""

    method: str = Field(min_length=1)
    """Name shown in reports."""
    description: str = ""
    """What it does, in one line."""
    source: str = ""
    """Where the method and its numbers come from."""
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    first: FirstSection | None = None
    """Train on other terms first, for instance plainly before REDI; null starts from the model."""
    terms: Annotated[tuple[Term, ...], Field(strict=False), AfterValidator(check_purpose)]
    """Terms of the loss; at least one on forget, or all on rows to post-train on."""
    training: TrainingSection = TrainingSection()
    evals: EvalsSection = EvalsSection()
    launch: LaunchSection = LaunchSection()
    assistant: Annotated[AssistantSection | None, AfterValidator(check_assistant)] = None
    """Train an assistant whose logits change those of the model; `{}` takes the defaults."""
    edit: Annotated[EditSection | None, AfterValidator(check_edit)] = None
    """Change the weights by an edit: once the terms are trained, or instead of any training."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of everything random: pairing, order, dropout."""
    out: str | None = Field(default=None, min_length=1)
    """New folder for the run. Required to run."""

    @model_validator(mode="before")
    @classmethod
    def _no_terms_beside_an_edit(cls, tree: Any) -> Any:
        """An edit may stand alone; without one, ``terms`` must be given."""
        alone = isinstance(tree, dict) and tree.get("edit") and "terms" not in tree
        return {**tree, "terms": ()} if alone else tree

    @model_validator(mode="before")
    @classmethod
    def _first_trains_as_the_rest(cls, tree: Any) -> Any:
        """Fill in what ``first.training`` leaves out."""
        first = tree.get("first") if isinstance(tree, dict) else None
        given = [part.get("training", {}) for part in (tree, first) if isinstance(part, dict)]
        if not isinstance(first, dict) or not all(isinstance(one, dict) for one in given):
            return tree
        return {**tree, "first": {**first, "training": given[0] | given[1]}}

    @property
    def trains(self) -> bool:
        """Tell whether there is a loss to be trained on, or an edit alone."""
        return bool(self.terms)

    @property
    def posttrains(self) -> bool:
        """Tell whether it trains on given rows, and has nothing to forget."""
        return posttraining(self.terms)

    @property
    def first_recipe(self) -> "Recipe | None":
        """What is trained first, as a recipe of its own; None when nothing is."""
        if self.first is None:
            return None
        stage = {"terms": self.first.terms, "training": self.first.training, "first": None}
        return self.model_copy(update=stage)

    @property
    def accumulation(self) -> int:
        """Forward passes of each process per optimiser step, in effect."""
        training = self.training
        if training.global_batch_size is None:
            return training.gradient_accumulation_steps
        return training.global_batch_size // self._rows_at_once

    @property
    def _rows_at_once(self) -> int:
        return self.training.per_device_train_batch_size * self.launch.processes

    @model_validator(mode="after")
    def _global_batch_is_whole(self) -> Self:
        wanted, at_once = self.training.global_batch_size, self._rows_at_once
        if wanted is not None and wanted % at_once:
            message = (
                f"training.global_batch_size: {wanted} given; must be a multiple of {at_once}, the "
                f"rows of one forward pass (per_device_train_batch_size "
                f"{self.training.per_device_train_batch_size} on {self.launch.processes} processes)"
            )
            raise PydanticCustomError("global_batch", "{why}", {"why": message})
        return self

    @model_validator(mode="after")
    def _trains_or_edits(self) -> Self:
        if not self.terms and (why := without_terms(self.edit, self.model, self.launch)):
            raise PydanticCustomError("terms", "{why}", {"why": why})
        return self

    @model_validator(mode="after")
    def _fits_its_purpose(self) -> Self:
        if found := purpose_mistake(self):
            key, why = found
            raise PydanticCustomError("purpose", "{why}", {"why": f"{key}: {why}"})
        return self

    @model_validator(mode="after")
    def _unseen_rows_have_a_use(self) -> Self:
        if self.data.unseen and not (self.edit and self.edit.reads_unseen):
            message = "data.unseen: given, but only `edit.forget_nll: unseen` reads it"
            raise PydanticCustomError("unseen", "{why}", {"why": message})
        return self

    @model_validator(mode="after")
    def _adapters_or_chosen_weights(self) -> Self:
        if self.training.trainable and self.model.lora:
            message = (
                "training.trainable: given with model.lora, which trains adapters alone; "
                "choose layers with model.lora.targets, or leave one of the two out"
            )
            raise PydanticCustomError("trainable", "{why}", {"why": message})
        return self

    def read_streams(self) -> set[str]:
        """Name the streams that terms read, those of ``first`` included."""
        return read_by((*self.terms, *(self.first.terms if self.first else ())))

    def missing(self) -> list[str]:
        """List what a run still needs, one line each, with the flag that gives it."""
        return missing_keys(self)

    def require_runnable(self) -> None:
        """Refuse a recipe without model, data or output folder.

        Raises:
            UserError: names everything that is missing.
        """
        if missing := self.missing():
            raise UserError(
                "\n  ".join([f"recipe '{self.method}' cannot run yet:", *missing]),
                "give the flags, or write the keys in the recipe",
            )
