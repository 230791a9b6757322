"""Engines: what splits a training step over processes, and how to get whole weights back from it.

Each is a setting of Accelerate, FSDP2 or DeepSpeed, handed on through ``TrainingArguments``.

``none`` one process. ``ddp`` every process holds everything, gradients are averaged. ``zero2``
gradients and optimiser states are split (Rajbhandari et al. 2020, arXiv:1910.02054). ``fsdp2`` and
``zero3`` weights too. ``zero3-offload`` keeps them in the memory of the host.
"""

import importlib
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from unlearn.errors import UserError

Engine = Literal["none", "ddp", "fsdp2", "zero2", "zero3", "zero3-offload"]
SHARDED = ("fsdp2", "zero3", "zero3-offload")
"""Engines that split the weights: a forward pass takes all processes."""


def environment(engine: Engine) -> dict[str, str]:
    """Give the variables that must be set before an engine's library is imported."""
    if engine.startswith("zero") and not torch.cuda.is_available():
        return {"DS_ACCELERATOR": "cpu"}
    return {}


def check_engine(engine: Engine, nproc: int, *, quantized: bool = False) -> None:
    """Refuse an engine that cannot work here, before any process is started.

    Raises:
        UserError: says what is missing or too many.
    """
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        raise UserError(f"engine {engine} needs deepspeed", "pip install deepspeed, or use fsdp2")
    if quantized and engine in SHARDED:
        raise UserError(
            f"engine {engine} cannot split 4-bit weights (model.quantize)",
            "use ddp or zero2, or leave model.quantize out",
        )
    devices = torch.cuda.device_count()
    if devices and nproc > devices:
        raise UserError(
            f"{nproc} processes given, but this machine has {devices} CUDA devices",
            f"give --nproc {devices} or fewer, one process per device",
        )


def engine_arguments(engine: Engine, *, bf16: bool) -> dict[str, Any]:
    """Give the fields of ``TrainingArguments`` that choose an engine.

    ``bf16``: the weights are in bfloat16. DeepSpeed then keeps a copy of them in fp32 and updates
    that; the other engines update the weights themselves.
    """
    if engine == "none":
        return {}
    common: dict[str, Any] = {
        "ddp_find_unused_parameters": False,  # a tensor without gradient is a mistake, and named
        "accelerator_config": {"even_batches": False},  # EpochSampler evens them out
    }
    if not torch.cuda.is_available():
        common["ddp_backend"] = "gloo"
    if engine == "fsdp2":
        return common | {"fsdp": True, "fsdp_config": _fsdp2()}
    if engine.startswith("zero"):
        return common | {"deepspeed": _deepspeed(engine, bf16=bf16), "bf16": bf16}
    return common


def _fsdp2() -> dict[str, Any]:
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "state_dict_type": "SHARDED_STATE_DICT",  # each process writes its own part
        "reshard_after_forward": True,
    }


def _deepspeed(engine: Engine, *, bf16: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": 2 if engine == "zero2" else 3,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
    }
    if engine == "zero3-offload":
        host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero |= {"offload_optimizer": host, "offload_param": host}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW: nothing to compile, same numbers
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "bf16": {"enabled": bf16},
        "fp16": {"enabled": False},
        "steps_per_print": 2**31,
    }


def is_sharded(model: Any) -> bool:
    """Tell whether an engine has split this model's weights between the processes."""
    return any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """Give the part of a parameter (or gradient) that lies in this process; it may be empty."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    return getattr(tensor, "ds_tensor", tensor).detach()  # what is detached has no ds_tensor


def trained_weights(model: Any, *, keep: bool = True) -> Mapping[str, Tensor]:
    """Give the trained weights whole, on the CPU; all processes must call this.

    One tensor is put together at a time. ``keep=False`` for processes that only take part.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = _whole(parameter)
            if keep:
                found[name] = whole.detach().cpu().clone().contiguous()
    return found


def put_trained(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Put trained weights into a model that no engine has split."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(weights[name])


def _whole(parameter: Tensor) -> Tensor:
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id"):
        # DeepSpeed takes seconds to import and is already loaded by whoever split the weights
        zero = importlib.import_module("deepspeed").zero
        with zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter
