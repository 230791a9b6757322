"""A composition on disk: a small folder that names its base, with the adapter of the assistant.

``uld_config.json`` (what the base is, how many layers, how the logits are combined), ``adapter/``
(PEFT) and the tokenizer. There is no ``config.json`` and no model file, so that transformers
refuses the folder instead of loading a base that has forgotten nothing; neither does the adapter
fit the base, because its weights are named for the assistant.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn import models
from unlearn.assistant.build import Assistant, compose
from unlearn.assistant.compose import AssistedForCausalLM
from unlearn.assistant.rules import RULES, settings
from unlearn.bases import Base, content_of, recorded, source_of
from unlearn.errors import UserError, unknown
from unlearn.head import plain
from unlearn.runs import versions, write_json

CONFIG, ADAPTER = "uld_config.json", "adapter"
FORMAT = 1
"""Raise when the meaning of the folder changes."""
WHAT = "a base with an assistant beside it"


@dataclass(frozen=True)
class Composition:
    """What ``uld_config.json`` says, checked."""

    base: Base
    assistant: Assistant

    @classmethod
    def read(cls, source: models.ModelSource) -> "Composition":
        """Read the folder of a composition; its base is loaded in the same way as the folder.

        Raises:
            UserError: the file is damaged, or made by a later version.
        """
        path = Path(source.path) / CONFIG
        with content_of(path, FORMAT) as found:
            rule = found["combine"]
            if rule not in RULES:
                raise unknown(f"rule in '{path}':", rule, RULES)
            hyper = _numbers(path, settings(rule, found))
            return cls(Base.named(found, source), Assistant(found["layers"], rule, hyper))


def _numbers(path: Path, hyper: Mapping[str, Any]) -> dict[str, float]:
    """Check numbers that a person may have changed."""
    for key, value in hyper.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
            raise UserError(f"'{path}': {key} is {value!r}", "give a number of at least 0")
    return {key: float(value) for key, value in hyper.items()}


def base_of(source: models.ModelSource) -> models.ModelSource:
    """Give the base that a composition's folder names."""
    return Composition.read(source).base.source


def check(source: models.ModelSource) -> None:
    """Refuse a composition that cannot be loaded; reads no weights.

    Raises:
        UserError: no base where the folder says, no adapter, or damaged files.
    """
    folder, base = Path(source.path), Composition.read(source).base
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
    base.check(source.path, CONFIG)


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
    source = source_of(folder, dtype)
    found = Composition.read(source)
    if base is None:
        check(source)
    loaded = found.base.at(base).loaded(source.path, CONFIG, device=device)
    composed = compose(loaded, found.assistant)
    # peft takes seconds to import
    from peft import PeftModel  # noqa: PLC0415

    return PeftModel.from_pretrained(composed, str(Path(source.path) / ADAPTER)).eval()


def holds(model: Any) -> bool:
    """Tell whether a model in memory is such a composition."""
    return isinstance(plain(model), AssistedForCausalLM)


def save_composed(model: Any, tokenizer: Any, folder: Path, base: models.ModelSource) -> None:
    """Write the folder of a composition whose base was loaded from ``base``."""
    inner = plain(model)
    content = {
        "format": FORMAT,
        **recorded(base, tokenizer),
        "layers": inner.decoder.depths[1],
        "combine": inner.head.rule,
        **inner.head.hyper,
        "versions": versions(),
    }
    model.save_pretrained(folder / ADAPTER)
    tokenizer.save_pretrained(folder)
    write_json(folder / CONFIG, content)
