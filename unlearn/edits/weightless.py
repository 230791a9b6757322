"""What weights a model has, before any of them is loaded."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from unlearn.errors import UserError
from unlearn.kinds import load_config, require_plain
from unlearn.models import ModelSource, check_source, resolve_dtype


def weightless(source: ModelSource) -> Any:
    """Build a model from its configuration alone: names and shapes of weights, no memory for them.

    Raises:
        UserError: there is no such model, or it is an adapter, a folder that belongs to a base, or
            quantised: it has no weights of its own that could be changed.
    """
    check_source(source)
    require_plain(source)
    if (Path(source.path) / "adapter_config.json").is_file():
        raise UserError(f"'{source.path}' is an adapter", "merge it into its model first")
    config = load_config(source)
    if source.quantize or getattr(config, "quantization_config", None):
        raise UserError(
            f"the weights of '{source.path}' are quantised, and cannot be changed one by one",
            "give the model before it was quantised, without model.quantize",
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config,
            dtype=resolve_dtype(source.dtype),
            trust_remote_code=source.trust_remote_code,
        )
