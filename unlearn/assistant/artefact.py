"""A composition on disk: a small folder that names its base, with the adapter of the assistant.

``uld_config.json`` (what the base is, how many layers, how the logits are combined), ``adapter/``
(PEFT) and the tokenizer. There is no ``config.json`` and no model file, so that transformers
refuses the folder instead of loading a base that has forgotten nothing; neither does the adapter
fit the base, because its weights are named for the assistant.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unlearn import models
from unlearn.assistant.build import Assistant, compose
from unlearn.assistant.rules import RULES, settings
from unlearn.errors import UserError, unknown
from unlearn.head import plain
from unlearn.kinds import kind_of, weights_sha256
from unlearn.runs import versions, write_json

CONFIG, ADAPTER = "uld_config.json", "adapter"
FORMAT = 1
"""Raise when the meaning of the folder changes."""


@dataclass(frozen=True)
class Composition:
    """What ``uld_config.json`` says, checked."""

    base: models.ModelSource
    base_weights_sha256: str
    tokenizer_sha256: str
    assistant: Assistant

    @classmethod
    def read(cls, source: models.ModelSource) -> "Composition":
        """Read the folder of a composition; its base is loaded in the same way as the folder.

        Raises:
            UserError: the file is damaged, or made by a later version.
        """
        path = Path(source.path) / CONFIG
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] > FORMAT:
                raise UserError(f"'{path}' was written by a later version", "update unlearn")
            rule = found["combine"]
            if rule not in RULES:
                raise unknown(f"rule in '{path}':", rule, RULES)
            hyper = _numbers(path, settings(rule, found))
            base = replace(source, path=found["base_model"], revision=found["base_revision"])
            assistant = Assistant(found["layers"], rule, hyper)
            hashes = (str(found["base_weights_sha256"]), str(found["tokenizer_sha256"]))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"'{path}' is damaged: {error!r}", "copy the folder again") from error
        return cls(base, *hashes, assistant)


def _numbers(path: Path, hyper: Mapping[str, Any]) -> dict[str, float]:
    """Check numbers that a person may have changed."""
    for key, value in hyper.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
            raise UserError(f"'{path}': {key} is {value!r}", "give a number of at least 0")
    return {key: float(value) for key, value in hyper.items()}


def base_of(source: models.ModelSource) -> models.ModelSource:
    """Give the base that a composition's folder names."""
    return Composition.read(source).base


def check(source: models.ModelSource) -> None:
    """Refuse a composition that cannot be loaded; reads no weights.

    Raises:
        UserError: no base where the folder says, no adapter, or damaged files.
    """
    folder, base = Path(source.path), base_of(source)
    if source.quantize:
        message = (
            f"'{source.path}' cannot be loaded in 4 bits: its base is shared with an assistant"
        )
        raise UserError(message, "leave quantize out")
    if not (folder / ADAPTER / "adapter_config.json").is_file():
        raise UserError(f"'{source.path}' has no {ADAPTER}/adapter_config.json", "copy it again")
    weights = folder / ADAPTER / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"'{source.path}' has no {ADAPTER}/{weights.name}", "copy it again")
    models.check_safetensors(weights)
    try:
        models.check_source(base)
    except UserError as error:
        hint = f"set base_model in {folder / CONFIG} to where it is now"
        raise UserError(f"'{source.path}' needs its base: {error.message}", hint) from error
    if kind_of(base):
        raise UserError(f"the base of '{source.path}', '{base.path}', is no plain model")


def load_composed(
    folder: models.ModelSource | str | Path,
    base: str | None = None,
    *,
    device: str | None = None,
    dtype: models.Dtype = "auto",
) -> Any:
    """Load a composition: its base, the assistant built from it, and the adapter.

    ``base`` says where the base is now, when it is not where the folder says.

    Raises:
        UserError: the base is missing, has other weights or another tokenizer.
    """
    source = folder
    if not isinstance(source, models.ModelSource):
        source = models.ModelSource(str(folder), dtype=dtype)
    found = Composition.read(source)
    if base is None:
        check(source)
    else:
        found = replace(found, base=replace(found.base, path=base, revision=None))
    loaded = models.load_model(found.base, device=device)
    _require_same_base(source, found)
    composed = compose(loaded, found.assistant)
    # peft takes seconds to import
    from peft import PeftModel  # noqa: PLC0415

    return PeftModel.from_pretrained(composed, str(Path(source.path) / ADAPTER)).eval()


def save_composed(
    model: Any, tokenizer: Any, folder: Path, base: models.ModelSource, assistant: Assistant
) -> None:
    """Write the folder of a composition whose base was loaded from ``base``."""
    local = Path(base.path)
    content = {
        "format": FORMAT,
        "base_model": str(local.absolute()) if local.exists() else base.path,
        "base_revision": base.revision,
        "base_weights_sha256": weights_sha256(base),
        "tokenizer_sha256": models.tokenizer_sha256(tokenizer),
        "layers": plain(model).decoder.depths[1],
        "combine": assistant.combine,
        **settings(assistant.combine, assistant.hyper),
        "versions": versions(),
    }
    model.save_pretrained(folder / ADAPTER)
    tokenizer.save_pretrained(folder)
    write_json(folder / CONFIG, content)


def _require_same_base(source: models.ModelSource, found: Composition) -> None:
    path = found.base.path
    if weights_sha256(found.base) != found.base_weights_sha256:
        raise UserError(
            f"'{path}' does not hold the weights that '{source.path}' was made for",
            f"set base_model in {Path(source.path) / CONFIG} to the model it was made from",
        )
    if models.tokenizer_sha256(models.load_tokenizer(found.base)) != found.tokenizer_sha256:
        raise UserError(
            f"the tokenizer of '{path}' is not the one that '{source.path}' was made with",
            "restore the base's tokenizer files",
        )
