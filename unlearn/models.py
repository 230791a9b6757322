"""Loading and saving causal language models: dtype, LoRA and QLoRA, and checks before long work."""

import hashlib
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from unlearn.errors import UserError

Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on chosen linear layers (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"


@dataclass(frozen=True)
class ModelSource:
    """Which model, in which precision, from which revision."""

    path: str
    dtype: Dtype = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    quantize: Literal["nf4"] | None = None
    offline: bool = False

    def arguments(self) -> dict[str, Any]:
        """Give what every ``from_pretrained`` call needs to find this model."""
        return {
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "local_files_only": self.offline,
        }


def check_source(source: ModelSource) -> None:
    """Refuse a model that cannot be loaded, before any long work.

    Raises:
        UserError: no such folder, no ``config.json``, pickled or truncated weights.
    """
    if source.quantize and not _has_bitsandbytes():
        hint = "pip install 'unlearn-llm[quant]', or leave model.quantize out"
        raise UserError("4-bit loading (QLoRA) needs bitsandbytes, which is not installed", hint)
    folder = Path(source.path)
    if not folder.exists():
        if source.path.startswith((".", "/", "~")) or source.path.count("/") != 1:
            raise UserError(
                f"no model folder '{source.path}'", "give a folder or a hub name owner/name"
            )
        return
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"'{source.path}' has no config.json", "give a folder saved with save_pretrained"
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(
            f"'{source.path}' has no .safetensors file; pickled weights are never loaded",
            "convert it: model.save_pretrained(folder) writes safetensors",
        )
    for path in weights:
        check_safetensors(path)


def check_safetensors(path: Path) -> None:
    """Compare a file's size with what its header promises; raise UserError when it is cut short."""
    size = path.stat().st_size
    redo = "copy or download it again"
    if size < 8:
        raise UserError(f"'{path}' is truncated: {size} bytes", redo)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise UserError(f"'{path}' is truncated: its header alone needs {length} bytes", redo)
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise UserError(
                f"'{path}' is not a safetensors file: its header is damaged", redo
            ) from error
    spans = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(spans, default=0)
    if size != expected:
        raise UserError(
            f"'{path}' is truncated: {size} bytes, its header promises {expected}", redo
        )


def load_tokenizer(source: ModelSource | str) -> Any:
    """Load the tokenizer that lies beside a model."""
    source = ModelSource(source) if isinstance(source, str) else source
    with _readable(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source.path, **source.arguments())


def load_model(source: ModelSource | str, *, device: str | None = None) -> Any:
    """Load a causal language model in evaluation mode; safetensors only."""
    source = ModelSource(source) if isinstance(source, str) else source
    check_source(source)
    dtype = resolve_dtype(source.dtype)
    extra: dict[str, Any] = {"quantization_config": _nf4(dtype)} if source.quantize else {}
    with _readable(source, "model"):
        model = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=dtype, use_safetensors=True, **source.arguments(), **extra
        )
    model = model.eval()
    return model if source.quantize else model.to(device or best_device())


def best_device() -> str:
    """Give ``cuda`` when there is one, ``mps`` on a Mac, else ``cpu``."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve_dtype(dtype: Dtype) -> torch.dtype:
    """Turn ``auto`` into bfloat16 on CUDA and float32 elsewhere."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def add_lora(model: Any, lora: Lora) -> Any:
    """Wrap a model with trainable low-rank adapters; everything else is frozen."""
    # peft takes seconds to import, and only LoRA runs need it
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training  # noqa: PLC0415

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        leaves = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules()
                         if isinstance(module, torch.nn.Linear)})  # fmt: skip
        raise UserError(
            f"LoRA targets {targets} are not in this model",
            f"its linear layers: {', '.join(leaves)}",
        ) from error


def save_model(model: Any, tokenizer: Any, folder: Path, adapter: Path) -> None:
    """Save a plain Hugging Face folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    Adapters are merged into the weights, except on a quantised base, where the adapter alone is
    saved; merged adapters are also kept on their own in ``adapter``.
    """
    if hasattr(model, "merge_and_unload"):
        if getattr(model.get_base_model(), "is_loaded_in_4bit", False):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            return
        model.save_pretrained(adapter)
        model = model.merge_and_unload()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def weights_hash(model: Any) -> str:
    """Identify the weights: a hash of every tensor's name, dtype, shape and bytes."""

    def one(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        digest = hashlib.blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.digest()

    tensors = sorted(model.state_dict().items())
    with ThreadPoolExecutor(8) as pool:
        return hashlib.sha256(b"".join(pool.map(one, tensors))).hexdigest()


def _has_bitsandbytes() -> bool:
    return find_spec("bitsandbytes") is not None


def _nf4(dtype: torch.dtype) -> Any:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


class _readable:
    """Turn the many ways a hub or folder can be unreadable into one line."""

    def __init__(self, source: ModelSource, what: str) -> None:
        self.source, self.what = source, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, OSError | ValueError | KeyError) and not isinstance(error, UserError):
            cause = str(error).strip().split("\n")[0]
            raise UserError(
                f"cannot load the {self.what} of '{self.source.path}': {cause}",
                "check the path; hub models need a network unless they are already downloaded",
            ) from error
