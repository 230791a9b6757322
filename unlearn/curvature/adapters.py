"""Low-rank adapters on linear layers, y = Wx + s·B(Ax), as PEFT lays them out in a model.

A and B are linear layers themselves: A reads what its layer reads, and B reads Ax. So each has
Kronecker factors of its own, and the frozen weight below them needs none.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unlearn.errors import UserError

INNER = (".lora_A.", ".lora_B.")
"""What stands between the name of an adapted layer and that of its adapter."""


@dataclass(frozen=True)
class Adapter:
    """The adapter on one linear layer: ``down`` is A, ``up`` is B, ``scale`` is s."""

    module: Any
    name: str

    @classmethod
    def on(cls, module: Any) -> "Adapter":
        """Give the one adapter of an adapted layer."""
        (name,) = module.lora_A
        return cls(module, name)

    @property
    def down(self) -> nn.Linear:
        found: nn.Linear = self.module.lora_A[self.name]
        return found

    @property
    def up(self) -> nn.Linear:
        found: nn.Linear = self.module.lora_B[self.name]
        return found

    @property
    def scale(self) -> float:
        return float(self.module.scaling[self.name])

    @property
    def base(self) -> Tensor:
        """The weight below, laid out as its module keeps it."""
        weight: Tensor = self.module.base_layer.weight
        return weight

    @property
    def transposed(self) -> bool:
        """Whether the weight below is kept as [in, out] (GPT-2)."""
        return isinstance(self.module.base_layer, Conv1D)

    def matrices(self, layer: str) -> dict[str, nn.Linear]:
        """Give A and B under their names in the model, for the name of the layer they lie on."""
        pair = zip(INNER, (self.down, self.up), strict=True)
        return {f"{layer}{inner}{self.name}": matrix for inner, matrix in pair}


def adapter_of(base: Any, name: str) -> tuple[str, Adapter] | None:
    """Give the adapter, and the name of its layer, that a matrix of this name belongs to."""
    for inner in INNER:
        layer, found, _ = name.rpartition(inner)
        if found:
            return layer, Adapter.on(base.get_submodule(layer))
    return None


def is_adapted(module: nn.Module) -> bool:
    """Tell whether this is a linear layer with an adapter on it."""
    below = getattr(module, "base_layer", None)
    return isinstance(below, nn.Linear | Conv1D) and bool(getattr(module, "lora_A", None))


def has_adapters(model: Any) -> bool:
    """Tell whether a model has adapters.

    Raises:
        UserError: they are no plain LoRA that PEFT has put there alone, or lie on 4-bit weights.
    """
    configs = getattr(model, "peft_config", None)
    if configs is None:
        return False
    alone = len(configs) == 1 and hasattr(model, "get_base_model")
    if not alone or not all(_is_plain(one) for one in configs.values()):
        raise UserError(
            "the model has adapters whose curvature is not known: several, or no plain LoRA",
            "merge them first",
        )
    if getattr(model.get_base_model(), "is_loaded_in_4bit", False):
        raise UserError(
            "the weights below the adapters are in 4 bits: no update could be told of them",
            "load the model without quantize",
        )
    return True


def _is_plain(config: Any) -> bool:
    return config.peft_type == "LORA" and not (config.use_dora or config.lora_bias)
