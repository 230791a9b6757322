"""Loading and saving causal language models: dtype, LoRA and QLoRA, and checks before long work."""

import hashlib
import json
import math
import re
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from unlearn.errors import UserError, did_you_mean
from unlearn.kinds import kind_of, load_config, weight_files

Dtype = Literal["auto", "float32", "bfloat16"]
SAMPLING = (
    "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip
"""Settings of a model's ``generate`` that have no effect unless it samples."""


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
    if kind := kind_of(source):
        kind.check(source)
        return
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
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise UserError(f"'{path}' is a git-lfs pointer, not the weights", "run: git lfs pull")
        if len(start) < 8:
            raise UserError(f"'{path}' is truncated: {size} bytes", redo)
        (length,) = struct.unpack("<Q", start)
        if length > size - 8:
            raise UserError(f"'{path}' is truncated: its header alone needs {length} bytes", redo)
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            expected = 8 + length + end
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise UserError(
                f"'{path}' is not a safetensors file: its header is damaged", redo
            ) from error
    if size != expected:
        raise UserError(
            f"'{path}' is truncated: {size} bytes, its header promises {expected}", redo
        )


def check_memory(source: ModelSource) -> None:
    """Refuse a local model whose weights alone do not fit into the free memory of the GPU.

    Raises:
        UserError: both sizes are named. Never without CUDA, nor for what is not downloaded yet.
    """
    if not torch.cuda.is_available() or source.quantize:
        return
    needed = _num_weights(source) * resolve_dtype(source.dtype).itemsize
    free = torch.cuda.mem_get_info()[0]
    if needed > free:
        raise UserError(
            f"'{source.path}' needs {needed / 2**30:.1f} GiB of GPU memory for its weights, "
            f"{free / 2**30:.1f} GiB are free",
            "free memory (see `nvidia-smi`) or choose a smaller dtype",
        )


def check_finite_weights(source: ModelSource) -> None:
    """Refuse a local model with NaN or infinity among its weights; reads every weight file once.

    Raises:
        UserError: names the model and the first such tensor.
    """
    for path in weight_files(source):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if not torch.isfinite(file.get_tensor(name).float()).all():
                    raise UserError(
                        f"'{source.path}' has NaN or infinite weights, in {name} first",
                        "take an earlier checkpoint, or train again with a smaller learning rate",
                    )


def _num_weights(source: ModelSource) -> int:
    total = 0
    for path in weight_files(source):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        total += sum(math.prod(entry["shape"]) for entry in header.values())
    return total


def check_vocabulary(source: ModelSource, tokens: Collection[int]) -> None:
    """Refuse a model that does not know some of the tokens it would be given.

    Raises:
        UserError: the configuration cannot be read, or its vocabulary is too small.
    """
    try:
        config = load_config(source)
    except (OSError, ValueError, KeyError) as error:
        cause = str(error).strip().split("\n")[0]
        raise UserError(f"cannot read the configuration of '{source.path}': {cause}") from error
    size = config.get_text_config().vocab_size
    if max(tokens) >= size:
        raise UserError(
            f"the tokenizer writes token {max(tokens)}, but '{source.path}' knows {size} tokens",
            "give the tokenizer and the model of one folder that was saved together",
        )


def check_same_tokenizer(tokenizer: Any, other: ModelSource, tokens: Collection[int]) -> None:
    """Refuse a retain model that knows the given tokens as something else, or not at all.

    Raises:
        UserError: as said.
    """
    used = sorted(tokens)
    if load_tokenizer(other).convert_ids_to_tokens(used) != tokenizer.convert_ids_to_tokens(used):
        raise UserError(
            f"the tokenizer of the retain model '{other.path}' is not that of the model",
            "give a retain model trained from the same base",
        )
    check_vocabulary(other, tokens)


def load_tokenizer(source: ModelSource | str) -> Any:
    """Load the tokenizer that lies beside a model."""
    source = ModelSource(source) if isinstance(source, str) else source
    with _readable(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source.path, **source.arguments())


def load_model(source: ModelSource | str, *, device: str | None = None) -> Any:
    """Load a causal language model in evaluation mode; safetensors only."""
    source = ModelSource(source) if isinstance(source, str) else source
    if kind := kind_of(source):
        return kind.load_composed(source, device=device)
    check_source(source)
    dtype = resolve_dtype(source.dtype)
    extra: dict[str, Any] = {"quantization_config": _nf4(dtype)} if source.quantize else {}
    with _readable(source, "model"):
        model, found = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # found and refused below, by name
            **source.arguments(),
            **extra,
        )
    _require_all_weights(source, found)
    _drop_ignored_sampling(model.generation_config)
    model = model.eval()
    return model if source.quantize else model.to(device or best_device())


def _require_all_weights(source: ModelSource, found: Mapping[str, Any]) -> None:
    """Refuse a model some of whose weights would be random numbers."""
    wrong_shape = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    for what, names in (("missing", found["missing_keys"]), ("of the wrong shape", wrong_shape)):
        if names:
            first = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            raise UserError(
                f"'{source.path}': {len(names)} weights are {what} ({first})",
                "config.json and the weights do not belong together, or a file is missing",
            )


def _drop_ignored_sampling(generation: Any) -> None:
    """Unset sampling flags of a model that does not sample: with them it could not be saved."""
    if generation is not None and not generation.do_sample:
        for flag in SAMPLING:
            if hasattr(generation, flag):
                setattr(generation, flag, None)


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
    absent = [] if isinstance(targets, str) else [t for t in targets if not _has_module(model, t)]
    if absent:
        raise _not_in_model(model, absent)
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
        raise _not_in_model(model, [str(targets)]) from error


def train_only(model: Any, patterns: Sequence[str]) -> None:
    """Freeze every weight in whose name none of the regular expressions is found.

    Raises:
        UserError: an expression is found in no name.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            count = getattr(getattr(model, "config", None), "num_hidden_layers", 0)
            layers = f"; its layers are 0 to {count - 1}, also for `layer` of a term"
            raise UserError(
                f"trainable '{pattern}' is found in no weight's name",
                f"it has weights such as {', '.join(names[-3:])}{layers if count else ''}",
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(re.search(pattern, name) for pattern in patterns))


@contextmanager
def recomputed(model: Any, *, on: bool = True) -> Iterator[None]:
    """Compute activations again in backward passes inside the block: slower, far less memory."""
    if not on:
        yield
        return
    new = hasattr(model, "activation_checkpointing_enable")  # its name since transformers 5.23
    verb = "activation" if new else "gradient"
    getattr(model, f"{verb}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{verb}_checkpointing_disable")()


def _has_module(model: Any, target: str) -> bool:
    return any(f".{name}".endswith(f".{target}") for name, _ in model.named_modules())


def _not_in_model(model: Any, targets: list[str]) -> UserError:
    linear = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    leaves = sorted({name.rsplit(".", 1)[-1] for name in linear})
    meant = did_you_mean(targets[0], leaves)
    return UserError(
        f"LoRA targets {', '.join(targets)} are not in this model{meant}",
        f"its linear layers: {', '.join(leaves)}",
    )


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
        for path in adapter.iterdir():
            path.chmod(0o644)  # safetensors leaves files readable by their owner alone
        model = model.merge_and_unload()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def weights_hash(model: Any) -> str:
    """Identify the weights: a hash of every tensor's name, dtype, shape and bytes."""

    def one(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        digest = hashlib.blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
        return digest.digest()

    tensors = sorted(model.state_dict().items())
    with ThreadPoolExecutor(8) as pool:
        return hashlib.sha256(b"".join(pool.map(one, tensors))).hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """Identify a tokenizer: a hash of which token has which number."""
    words = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def _has_bitsandbytes() -> bool:
    return find_spec("bitsandbytes") is not None


def _nf4(dtype: torch.dtype) -> Any:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


@contextmanager
def _readable(source: ModelSource, what: str) -> Iterator[None]:
    """Turn the many ways a hub or folder can be unreadable into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        cause = str(error).strip().split("\n")[0]
        raise UserError(
            f"cannot load the {what} of '{source.path}': {cause}",
            "check the path; hub models need a network unless they are already downloaded",
        ) from error
