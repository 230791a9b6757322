"""Fields of ``transformers.TrainingArguments`` that a recipe may pass on, and those it may not.

transformers (and torch with it) is imported only when a recipe names such a field.
"""

from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from unlearn.errors import did_you_mean

KNOWN_OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_bnb_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "adafactor",
    "sgd",
)
"""Optimisers accepted without importing transformers to ask for the others."""

KINDS = {
    "bool": "true or false",
    "dict": "a group of keys",
    "finite_number": "a finite number",
    "float": "a number",
    "int": "a whole number",
    "int_from_float": "a whole number",
    "list": "a list",
    "model": "a group of keys",
    "none_required": "null",
    "string": "text",
    "tuple": "a list",
}
"""What pydantic calls the kind of value it wanted, in words."""

_OWNED: dict[str, tuple[str, ...]] = {
    "set `out`": ("output_dir", "overwrite_output_dir"),
    "set `seed`": ("seed", "data_seed"),
    "set `model.dtype` or `training.bf16`": ("fp16", "bf16_full_eval", "fp16_full_eval"),
    "set `training.warmup_epochs` or `training.warmup_steps`": ("warmup_ratio",),
    "set `training.save_steps`": ("save_strategy", "save_only_model", "save_on_each_node"),
    "set `training.gradient_checkpointing`": (
        "gradient_checkpointing_kwargs",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
    ),
    "set `evals.every`": (
        "do_eval",
        "eval_delay",
        "eval_on_start",
        "eval_steps",
        "eval_strategy",
        "evaluation_strategy",
    ),
    "set `evals.batch_tokens`": (
        "auto_find_batch_size",
        "eval_accumulation_steps",
        "per_device_eval_batch_size",
    ),
    "the benchmarks of `evals` measure the model": (
        "batch_eval_metrics",
        "do_predict",
        "eval_do_concat_batches",
        "eval_use_gather_object",
        "greater_is_better",
        "include_for_metrics",
        "load_best_model_at_end",
        "metric_for_best_model",
        "prediction_loss_only",
    ),
    "every step is written to events.jsonl in the run folder": (
        "disable_tqdm",
        "include_num_input_tokens_seen",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_dir",
        "logging_first_step",
        "logging_nan_inf_filter",
        "logging_steps",
        "logging_strategy",
        "project",
        "report_to",
        "run_name",
        "trackio_bucket_id",
        "trackio_space_id",
        "trackio_static_space_id",
    ),
    "rows are chosen, paired and ordered from `data` and `seed`": (
        "dataloader_drop_last",
        "label_names",
        "length_column_name",
        "remove_unused_columns",
        "train_sampling_strategy",
    ),
    "the loss is the weighted sum of `terms`": (
        "average_tokens_across_devices",
        "label_smoothing_factor",
    ),
    "use `unlearn resume RUN`": (
        "enable_jit_checkpoint",
        "ignore_data_skip",
        "restore_callback_states_from_checkpoint",
        "resume_from_checkpoint",
    ),
    "use `unlearn run`": ("do_train",),
    "set `launch.engine`": (
        "accelerator_config",
        "ddp_backend",
        "ddp_find_unused_parameters",
        "ddp_static_graph",
        "deepspeed",
        "fsdp",
        "fsdp_config",
        "local_rank",
        "parallelism_config",
    ),
    "upload the model folder of the run yourself": (
        "hub_always_push",
        "hub_model_id",
        "hub_private_repo",
        "hub_revision",
        "hub_strategy",
        "hub_token",
        "push_to_hub",
    ),
}

OWNED: dict[str, str] = {name: instead for instead, names in _OWNED.items() for name in names}
"""Fields the pipeline sets itself, and what a user does instead."""


def argument_types() -> dict[str, Any]:
    """Give the fields a recipe may pass on, with their types."""
    from transformers import TrainingArguments  # noqa: PLC0415 - takes seconds, rarely needed

    names = TrainingArguments.__dataclass_fields__
    hints = get_type_hints(TrainingArguments)
    return {name: hints[name] for name in names if name not in OWNED}


def passthrough_mistakes(extras: Mapping[str, Any], declared: Iterable[str]) -> dict[str, str]:
    """Say for each key that cannot be passed on why not: unknown, owned, or of the wrong type."""
    mistakes = {name: _owned(name) for name in extras if name in OWNED}
    rest = {name: value for name, value in extras.items() if name not in OWNED}
    if not rest:
        return mistakes
    types = argument_types()
    allowed = [f"training.{name}" for name in (*declared, *types)]
    for name, value in rest.items():
        if name not in types:
            mistakes[name] = "unknown key" + (
                did_you_mean(f"training.{name}", allowed)
                or "; not a field of transformers.TrainingArguments either"
            )
        elif why := _wrong_type(types[name], value):
            mistakes[name] = f"{value!r} given; {why}"
    return mistakes


def check_optimizer(name: str) -> str:
    """Return the name of an optimiser of transformers; raise ValueError for any other."""
    if name in KNOWN_OPTIMIZERS:
        return name
    from transformers.training_args import OptimizerNames  # noqa: PLC0415 - takes seconds

    allowed = [str(item.value) for item in OptimizerNames]
    if name not in allowed:
        raise ValueError(
            f"{name!r} given; must be an optimiser of transformers{did_you_mean(name, allowed)} "
            f"({', '.join(KNOWN_OPTIMIZERS)}, …)"
        )
    return name


def _owned(name: str) -> str:
    return f"the pipeline sets this itself; {OWNED[name]}"


def _wrong_type(hint: Any, value: Any) -> str:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(
            hint, config=ConfigDict(arbitrary_types_allowed=True)
        )
    except PydanticSchemaGenerationError:
        return ""
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        return "must be " + " or ".join(dict.fromkeys(_kind(e["type"]) for e in error.errors()))
    return ""


def _kind(error_type: str) -> str:
    name = error_type.removesuffix("_type").removesuffix("_parsing")
    return KINDS.get(name, name.replace("_", " "))
