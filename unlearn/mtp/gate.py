"""A LoRA that acts on the last tokens of a forward pass only; all others stay what they were.

``y_t = W x_t + 1[t is a mask] (alpha / rank) B A x_t`` (Samragh et al. 2025, section 2.2). Masks
always come last, so the gate is a slice. Hooks add the product to what the layers give: the layers
themselves, their weights and their names stay as they are, and nothing can be merged by mistake.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from unlearn.errors import UserError, did_you_mean

Product = tuple[nn.Parameter, nn.Parameter]
"""A [rank, in] and B [out, rank]."""


class Gate:
    """How many tokens at the end of the forward pass under way are masks.

    It must stay open until the backward pass ends: activations may be computed again.
    """

    def __init__(self) -> None:
        self.masks = 0

    @contextmanager
    def open(self, masks: int) -> Iterator[None]:
        """Let the LoRA act on the last ``masks`` tokens inside the block."""
        before, self.masks = self.masks, masks
        try:
            yield
        finally:
            self.masks = before


class GatedLora:
    """Low-rank products beside linear layers, by the names of the layers in the model."""

    def __init__(self, products: Mapping[str, Product], scale: float, gate: Gate) -> None:
        self.products, self.scale, self.gate = dict(products), scale, gate
        self._handles: list[Any] = []

    @classmethod
    def beside(
        cls, layers: Mapping[str, nn.Module], rank: int, scale: float, gate: Gate, seed: int
    ) -> "GatedLora":
        """Begin with products that are 0: A uniform as a linear layer's weights, B zero (LoRA)."""
        generator = torch.Generator().manual_seed(seed)
        products = {}
        for name, layer in layers.items():
            width, height = int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]
            bound = width**-0.5
            a = (torch.rand(rank, width, generator=generator) * 2 - 1) * bound
            b = torch.zeros(height, rank)
            products[name] = (nn.Parameter(a), nn.Parameter(b))
        return cls(products, scale, gate)

    def attach(self, model: nn.Module) -> None:
        """Let the products act in a model."""
        for name, product in self.products.items():
            layer = model.get_submodule(name)
            self._handles.append(layer.register_forward_hook(self._hook(product)))

    def detach(self) -> None:
        """Take them out again."""
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, product: Product) -> Any:
        def add(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            masks = self.gate.masks
            if not masks:
                return None
            x = args[0]
            one_text = output.shape[0] == 1 and output.is_contiguous() and output.dtype == x.dtype
            if one_text and not torch.is_grad_enabled():
                self._add_in_place(product, x[0, -masks:], output[0, -masks:])
                return None
            added = self._added(product, x[..., -masks:, :])
            if masks == output.shape[-2]:
                return output + added
            return torch.cat([output[..., :-masks, :], output[..., -masks:, :] + added], -2)

        return add

    def _add_in_place(
        self, product: Product, x: Float[Tensor, "mask in_width"], y: Float[Tensor, "mask width"]
    ) -> None:
        """Add to what the layer gave in two kernels: on a GPU their number is the cost."""
        a, b = (one if one.dtype == x.dtype else one.to(x.dtype) for one in product)
        y.addmm_(linear(x, a), b.t(), alpha=self.scale)

    def _added(self, product: Product, x: Float[Tensor, "*batch token in_width"]) -> Tensor:
        """Compute in the precision of the model, whatever the product is kept in."""
        a, b = (one.to(x.dtype) for one in product)
        return linear(linear(x, a), b * self.scale if self.scale != 1.0 else b)


def linear_layers(
    model: nn.Module, decoder: nn.Module, names: Sequence[str] | None
) -> dict[str, nn.Module]:
    """Find the linear layers of the decoder that a LoRA goes beside, by their names in the model.

    Raises:
        UserError: there are none, or none of that name.
    """
    inside = {id(module) for module in decoder.modules()}
    found: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside
    }
    if not found:
        raise UserError(
            f"{type(model).__name__} has no linear layers that a LoRA could go beside",
            "mask-token prediction is for decoders built of torch.nn.Linear",
        )
    if names is None:
        return found
    leaves = sorted({name.rsplit(".", 1)[-1] for name in found})
    for name in names:
        if not any(f".{one}".endswith(f".{name}") for one in found):
            message = f"LoRA target {name} is not in this model{did_you_mean(name, leaves)}"
            raise UserError(message, f"its linear layers: {', '.join(leaves)}")
    return {
        one: layer
        for one, layer in found.items()
        if any(f".{one}".endswith(f".{name}") for name in names)
    }
