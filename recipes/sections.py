"""Parts of a recipe beyond the weighted loss: adapters, an assistant, an edit, rows, processes.

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

from unlearn.recipes.section import Section

Engine = Literal["none", "ddp", "fsdp2", "zero2", "zero3", "zero3-offload"]
Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]
"""Learning-rate schedules of transformers that need no evaluation loss."""


class LoraSection(Section):
    """Low-rank adapters: only they are trained, the weights below stay as they are."""

    rank: int = Field(default=16, ge=1)
    """Rank of the two small matrices per layer; memory and capacity grow with it."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale: the update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of adapter inputs dropped while training."""
    targets: (
        Literal["all-linear"] | Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    ) = "all-linear"
    """Layers that get adapters: `all-linear`, or names such as [q_proj, v_proj]."""


class AssistantSection(Section):
    """Train an assistant beside the model instead of the model; needs `model.lora`."""

    layers: int | None = Field(default=8, ge=1)
    """Lowest decoder layers of the model that make the assistant; null takes all."""
    combine: Literal["subtract", "offset", "suppress"] = "subtract"
    """How both sets of logits become one: ULD, offset unlearning, or WHP."""
    weight: float = Field(default=0.75, ge=0)
    """How much of the assistant's logits is taken; 0 leaves the model as it was."""
    top_filter: float = Field(default=0.01, ge=0, lt=1)
    """`subtract`: tokens less likely than this share of the likeliest stay out; 0 keeps all."""

    @field_validator("top_filter")
    @classmethod
    def _filter_has_a_use(cls, value: float, info: ValidationInfo) -> float:
        combine = info.data.get("combine", "subtract")
        if combine != "subtract" and value != cls.model_fields["top_filter"].default:
            raise ValueError(f"{value:g} given with combine: {combine}, which filters nothing")
        return value


class EditSection(Section):
    """A change of the weights that is not training. Other keys are the edit's hyperparameters."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1)
    """Which edit, for instance task_vector."""

    @property
    def hyper(self) -> dict[str, Any]:
        """The edit's hyperparameters, as written."""
        return dict(self.__pydantic_extra__ or {})

    @property
    def reads_unseen(self) -> bool:
        """Tell whether a goal is measured on the rows of `data.unseen`."""
        return self.hyper.get("forget_nll") == "unseen"


EDIT_NEEDS = {
    "update": "--set edit.update=FILE, the update.safetensors of a run",
    "dictionary": "--set edit.dictionary=FOLDER, what `unlearn sae train` wrote",
}
"""Files without which an edit cannot be made, and how they are given."""


class ExtraSection(Section):
    """More rows for a set, made from chosen columns. They are trained on, and not measured."""

    source: str = Field(min_length=1)
    """Where they come from, written like `data.forget`."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Standard name -> column, for instance {answer: paraphrased_answer}."""
    take: int = Field(default=1, ge=1)
    """Rows made of each row where a column holds a list: its first entries."""


def _meeting_place(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"[^\s:]+:\d+", value):
        raise ValueError(f"{value!r} given; must be HOST:PORT, for instance node-1:29500")
    return value


class LaunchSection(Section):
    """How many processes share the run, and which engine joins them."""

    engine: Engine | None = None
    """What splits the work: see docs/scale.md. null: `none` for one process, `ddp` for several."""
    nproc: int = Field(default=1, ge=1)
    """Processes on each node, one per device."""
    nnodes: int = Field(default=1, ge=1)
    """Nodes that take part; the same command is started on each."""
    rdzv: Annotated[str | None, AfterValidator(_meeting_place)] = None
    """Where the nodes meet: HOST:PORT of one of them. Needed with several nodes."""
    device_memory: float | None = Field(default=None, gt=0)
    """GiB of each device, instead of what is found: for a plan, or to run whatever it says."""

    @property
    def processes(self) -> int:
        """Processes of all nodes."""
        return self.nproc * self.nnodes

    @property
    def chosen(self) -> Engine:
        """The engine, with the default filled in."""
        return self.engine or ("none" if self.processes == 1 else "ddp")

    @model_validator(mode="after")
    def _engine_for_several(self) -> Self:
        if self.engine == "none" and self.processes > 1:
            message = (
                f"engine: 'none' given with {self.processes} processes; it knows one only: "
                "choose ddp, fsdp2, zero2 or zero3, or leave engine out"
            )
            raise PydanticCustomError("engine", "{why}", {"why": message})
        return self


def check_assistant(
    value: AssistantSection | None, info: ValidationInfo
) -> AssistantSection | None:
    """Refuse an assistant with anything it cannot be combined with."""
    model, launch = info.data.get("model"), info.data.get("launch")
    if value and model and model.lora is None:
        raise ValueError(
            "given without model.lora; the assistant is adapters on the model's own layers: "
            "add `lora: {}` (or --lora), or leave assistant out"
        )
    if value and model and model.quantize:
        raise ValueError("given with model.quantize, which it cannot share: leave one out")
    if value and launch and launch.chosen.startswith(("fsdp2", "zero3")):
        raise ValueError(
            f"given with engine {launch.chosen}, which would split weights that the assistant "
            "shares with the model; use ddp or zero2"
        )
    return value


def check_edit(value: EditSection | None, info: ValidationInfo) -> EditSection | None:
    """Refuse an edit with anything it cannot be combined with."""
    if value and info.data.get("assistant"):
        raise ValueError("given with assistant; leave one of the two out")
    if value and (evals := info.data.get("evals")) and evals.every:
        raise ValueError(
            "given with evals.every; before its end a run has nothing that is edited: "
            "leave evals.every out"
        )
    return value


CHANGE_ADAPTERS = ("kfade",)
"""Edits that train nothing and can change adapters in place of the weights below them."""
NOTHING = (
    "no term is on forget and there is no edit, so nothing would be forgotten; "
    "give one `on: forget`"
)


def without_terms(edit: EditSection | None, model: Any, launch: Any) -> str | None:
    """Say what is wrong with a recipe that has no terms, after the key; None when nothing is."""
    if edit is None:
        return f"terms: {NOTHING}"
    if model.lora is not None and (why := _adapters_mistake(edit.name, model)):
        return why
    if launch.chosen not in ("none", "ddp"):
        return (
            f"launch.engine: {launch.chosen} given without terms; it would split weights that the "
            "edit changes as a whole: use ddp"
        )
    return None


def _adapters_mistake(edit: str, model: Any) -> str | None:
    if edit not in CHANGE_ADAPTERS:
        return (
            f"model.lora: given without terms; edit {edit} changes the weights themselves and no "
            "adapters: leave lora out"
        )
    if model.lora.dropout:
        return (
            f"model.lora.dropout: {model.lora.dropout:g} given without terms; edit {edit} takes "
            "exact gradients and drops nothing: leave it out"
        )
    if model.quantize:
        return (
            f"model.quantize: {model.quantize} given without terms; edit {edit} tells what is "
            "added to the weights below adapters, and 4-bit weights cannot take it: leave it out"
        )
    return None
