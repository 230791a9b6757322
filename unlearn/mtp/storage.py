"""A mask predictor on disk: a peft adapter that does nothing by itself, and what belongs to it.

The LoRA is stored as an activated one (aLoRA), which acts on no token unless it is told on which:
whoever loads the folder with peft alone gets the base, unchanged, instead of a LoRA without its
gate. ``mtp_config.json`` names the base by hashes, ``mtp.safetensors`` holds mask embeddings and
sampler head. As a model folder of ours it is its base: nothing beside drafts depends on it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unlearn import models
from unlearn.bases import Base, content_of, recorded
from unlearn.errors import RunFailed, UserError
from unlearn.errors import described as described_value
from unlearn.mtp.predictor import MaskPredictor
from unlearn.mtp.settings import Shape
from unlearn.runs import staged, versions, write_json

CONFIG, WEIGHTS = "mtp_config.json", "mtp.safetensors"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
FORMAT = 1
"""Raise when the meaning of the folder changes."""
WHAT = "a base with a mask predictor beside it"
NEVER = [0]
"""aLoRA wants tokens that switch it on; ours is switched on by offsets, so any will do."""


@dataclass(frozen=True)
class Stored:
    """What ``mtp_config.json`` says, checked."""

    base: Base
    shape: Shape
    layers: tuple[str, ...]
    metrics: Mapping[str, Any]

    @classmethod
    def read(cls, source: models.ModelSource) -> "Stored":
        """Read the folder of a predictor; its base is loaded in the same way as the folder.

        Raises:
            UserError: it is none, is damaged, or was made by a later version.
        """
        path = Path(source.path) / CONFIG
        if not path.parent.is_dir():
            raise UserError(f"no folder '{source.path}'", "give the folder of a predictor")
        if (path.parent / "model" / CONFIG).is_file():
            message = f"'{source.path}' is the folder of a run"
            raise UserError(message, f"give its predictor: {path.parent / 'model'}")
        if not path.is_file():
            message = f"'{source.path}' has no {CONFIG}: it holds no mask predictor"
            raise UserError(message, "train one: unlearn run mtp --model … --data … --out …")
        with _telling(path), content_of(path, FORMAT) as found:
            shape = TypeAdapter(Shape).validate_python(found["shape"])
            layers = tuple(str(name) for name in found["layers"])
            if not isinstance(found["base_model"], str):
                raise ValueError(f"base_model is {described_value(found['base_model'])}")
            return cls(Base.named(found, source), shape, layers, found.get("metrics") or {})


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Say in words what is wrong with a damaged file."""
    try:
        yield
    except UserError as error:
        if error.__cause__ is None:
            raise
        raise UserError(f"'{path}' is damaged: {_told(error.__cause__)}", error.hint) from error


def _told(cause: BaseException) -> str:
    if isinstance(cause, ValidationError):
        first = cause.errors()[0]
        where = ".".join(["shape", *map(str, first["loc"])])
        return f"{where} is {first['input']!r}: {first['msg']}"
    if isinstance(cause, KeyError):
        return f"it has no '{cause.args[0]}'"
    if isinstance(cause, JSONDecodeError):
        return f"it is not JSON from line {cause.lineno}, column {cause.colno} on"
    if isinstance(cause, TypeError):
        return "a value is of another kind than it should be"
    return str(cause)


def base_of(source: models.ModelSource) -> models.ModelSource:
    """Give the base that a predictor's folder names."""
    return Stored.read(source).base.source


def check(source: models.ModelSource) -> None:
    """Refuse a folder that cannot be loaded; reads no weights.

    Raises:
        UserError: no base where the folder says, or damaged files.
    """
    folder = Path(source.path)
    _require_files(folder)
    Stored.read(source).base.check(source.path, CONFIG)


def _require_files(folder: Path) -> None:
    for name in (WEIGHTS, ADAPTER):
        if not (folder / name).is_file():
            raise UserError(f"'{folder}' has no {name}", "copy the folder again")
        models.check_safetensors(folder / name)


def load_composed(source: models.ModelSource, *, device: str | None = None) -> Any:
    """Load the base: what it says, and writes, is the same with the predictor or without."""
    check(source)
    return Stored.read(source).base.loaded(source.path, CONFIG, device=device)


def holds(model: Any) -> bool:
    """Tell whether a loaded model is saved as such a folder: never, it is only its base."""
    return False


def load_predictor(
    folder: Path | str,
    base: models.ModelSource | None = None,
    *,
    device: str | None = None,
    model: Any = None,
) -> MaskPredictor:
    """Load a predictor beside its base, ready to draft.

    ``base`` says where the base is and how it is loaded, when that is not as the folder says;
    ``model`` is that base, when it is loaded already.

    Raises:
        UserError: no predictor, damaged, of another base, of other sizes, or with NaN in it.
    """
    source = replace(base or models.ModelSource("."), path=str(folder), revision=None)
    found = Stored.read(source)
    if base is not None:
        found = replace(found, base=replace(found.base, source=base))
    else:
        check(source)
    _require_base(found.base, folder)
    loaded = models.load_model(found.base.source, device=device) if model is None else model
    predictor = MaskPredictor(loaded, found.shape)
    fill(predictor, _tensors(Path(folder), found), str(folder))
    predictor.to(predictor.dtype)
    for parameter in predictor.trained().values():
        parameter.requires_grad_(False)
    return predictor


def _require_base(base: Base, folder: Path | str) -> None:
    """Refuse another base than the predictor's; one that was given is not to be put in its file.

    Raises:
        UserError: as said.
    """
    try:
        base.require_same(str(folder), CONFIG)
    except UserError as error:
        made_from = Stored.read(models.ModelSource(str(folder))).base.source.path
        if Path(made_from).absolute() == Path(base.source.path).absolute():
            raise
        raise UserError(error.message, f"give the model it was made from: {made_from}") from error


def _tensors(folder: Path, found: Stored) -> dict[str, Tensor]:
    """Read all parameters, by the predictor's own names."""
    _require_files(folder)
    tensors = load_file(folder / WEIGHTS)
    adapter = load_file(folder / ADAPTER)
    for file, content in ((WEIGHTS, tensors), (ADAPTER, adapter)):
        if odd := not_finite(content):
            raise UserError(
                f"'{folder / file}' has NaN or infinity in it: {odd} is not finite",
                "copy the folder again, or train again with a smaller lr",
            )
    for layer in found.layers:
        for part in ("A", "B"):
            name = _adapter_name(layer, part)
            if name not in adapter:
                raise UserError(f"'{folder / ADAPTER}' has no {name}", "copy the folder again")
            tensors[f"lora_{part}.{layer}"] = adapter[name]
    return tensors


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name the first tensor that holds NaN or infinity; None where none does."""
    return next((name for name, one in tensors.items() if not torch.isfinite(one).all()), None)


def fill(predictor: MaskPredictor, tensors: Mapping[str, Tensor], folder: str) -> None:
    """Put stored values into a predictor.

    Raises:
        UserError: other names or shapes than the model asks for.
    """
    own = predictor.trained()
    if set(own) != set(tensors):
        odd = sorted(set(own) ^ set(tensors))
        raise UserError(
            f"'{folder}' does not fit the model: {odd[0]} has no counterpart",
            "give the model it was trained on",
        )
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            raise UserError(
                f"'{folder}' has {name} of shape {tuple(tensors[name].shape)}, the model asks for "
                f"{tuple(parameter.shape)}",
                "give the model it was trained on",
            )
        parameter.data = tensors[name].to(parameter.device, parameter.dtype)


def save_predictor(
    predictor: MaskPredictor,
    folder: Path,
    base: models.ModelSource,
    tokenizer: Any,
    *,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write the folder of a predictor whose base was loaded from ``base``, completely or not.

    Raises:
        RunFailed: the predictor holds NaN or infinity.
    """
    if odd := not_finite(predictor.trained()):
        raise RunFailed(f"the predictor is spoiled: {odd} is not finite", "train with a smaller lr")
    layers = sorted(predictor.lora.products)
    content = {
        "format": FORMAT,
        **recorded(base, tokenizer),
        "shape": {one.name: getattr(predictor.shape, one.name) for one in fields(Shape)},
        "layers": layers,
        "versions": versions(),
        **(about or {}),
    }
    with staged(folder) as staging:
        _write_adapter(predictor, staging, content["base_model"])
        own = {
            name: value.detach().cpu().contiguous()
            for name, value in predictor.trained().items()
            if not name.startswith("lora_")
        }
        save_file(own, staging / WEIGHTS, {"format": "pt"})
        write_json(staging / CONFIG, content)


def _write_adapter(predictor: MaskPredictor, folder: Path, base: str) -> None:
    # peft takes seconds to import
    from peft import LoraConfig  # noqa: PLC0415

    tensors = {}
    for layer, product in predictor.lora.products.items():
        for part, value in zip("AB", product, strict=True):
            tensors[_adapter_name(layer, part)] = value.detach().cpu().contiguous()
    save_file(tensors, folder / ADAPTER, {"format": "pt"})
    shape = predictor.shape
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.rank * shape.scale,
        target_modules=_targets(predictor),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        alora_invocation_tokens=NEVER,
        inference_mode=True,
    )
    config.save_pretrained(folder)


def _targets(predictor: MaskPredictor) -> list[str]:
    """Name the layers by their last names, where these name no other layer of the model."""
    layers = set(predictor.lora.products)
    leaves = {name.rsplit(".", 1)[-1] for name in layers}
    named = {n for n, _ in predictor.model.named_modules() if n.rsplit(".", 1)[-1] in leaves}
    return sorted(leaves) if named == layers else sorted(layers)


def _adapter_name(layer: str, part: str) -> str:
    return f"base_model.model.{layer}.lora_{part}.weight"


def described(folder: Path) -> dict[str, Any]:
    """Say what a folder holds: its base, shape and figures."""
    found = Stored.read(models.ModelSource(str(folder)))
    return {"folder": str(folder), "base": found.base.source.path, **asdict(found.shape)} | {
        "metrics": dict(found.metrics)
    }
