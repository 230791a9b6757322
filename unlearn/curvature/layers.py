"""Which linear layers of a model are tracked, and which of them read the same input."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unlearn.curvature.adapters import Adapter, adapter_of, has_adapters, is_adapted
from unlearn.errors import UserError
from unlearn.head import plain
from unlearn.scoring import evaluation_mode
from unlearn.thinning import decoder_layers

LayerSet = Literal["mlp", "attention", "all-linear"]
ROUTERS = ("gate", "router", "shared_expert_gate")
"""Linear layers that choose experts; they belong to no set."""
PROBE = (2, 4)
"""Rows and tokens of the forward pass that shows how layers are used."""


@dataclass(frozen=True)
class Tracked:
    """A linear layer y = x Wᵀ (+ b) whose weight has curvature; biases are not tracked.

    ``group`` names the first layer that reads the same input (``gate_proj`` for ``up_proj``): their
    input factors are one.
    """

    name: str
    module: Any
    group: str

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight as [out, in], a view where the module keeps it transposed (GPT-2)."""
        return self.laid_out(self.module.weight)

    def laid_out(self, values: Tensor) -> Tensor:
        """Turn [out, in] into the module's own layout, or back."""
        return values.t() if isinstance(self.module, Conv1D) else values

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        out, inputs = self.weight.shape
        return out, inputs


def find_layers(
    model: Any,
    layers: LayerSet | Sequence[str] = "mlp",
    *,
    blocks: tuple[int, int] | None = None,
) -> list[Tracked]:
    """Find the linear layers to be tracked, in the order of the model.

    ``layers``: those of the feed-forward blocks, of attention, or both; or regular expressions
    found in their names. ``blocks``: first and last decoder layer, counted from 0. Embeddings and
    the vocabulary head are never tracked. On a model with LoRA adapters (PEFT's) both matrices of
    each adapter on such a layer are tracked, and not the frozen weight below.

    Raises:
        UserError: nothing is found, what is named is not linear, weights are quantised or shared,
            adapters are no plain LoRA, or a layer is used otherwise than once per forward pass on
            every token.
    """
    base, chosen = plain(model), named_layers(model, layers, blocks=blocks)
    _check_weights(base, chosen)
    groups = _groups(base, chosen)
    return [Tracked(name, module, groups[name]) for name, module in chosen.items()]


def named_layers(
    model: Any,
    layers: LayerSet | Sequence[str],
    *,
    blocks: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Find the linear layers by name, or the matrices of their adapters, without running the model.

    Raises:
        UserError: nothing is found, or what is named is not linear.
    """
    base = plain(model)
    for pattern in () if isinstance(layers, str) else layers:
        _check_pattern(pattern)
    if has_adapters(model):
        return _adapters(base, layers, blocks)
    found = dict(_inside(base, blocks, is_linear))
    if isinstance(layers, str):
        chosen = {name: module for name, module in found.items() if _in_set(name, layers)}
    else:
        chosen = _matching(base, found, layers)
    if not chosen:
        raise UserError(f"layers '{layers}': the model has no such linear layers", _known(found))
    return chosen


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear map that can be tracked."""
    return isinstance(module, nn.Linear | Conv1D)


def _adapters(
    base: Any, layers: LayerSet | Sequence[str], blocks: tuple[int, int] | None
) -> dict[str, Any]:
    """Find A and B of the adapters that lie on the layers in question."""
    adapted = dict(_inside(base, blocks, is_adapted))
    chosen = set()
    for one in [layers] if isinstance(layers, str) else layers:
        in_set = isinstance(layers, str)
        found = {n for n in adapted if (_in_set(n, one) if in_set else re.search(one, n))}
        if not found:
            leaves = _leaves(adapted)
            message = f"layers '{one}': no adapter lies on such a layer"
            raise UserError(message, f"choose model.lora.targets and layers alike; on: {leaves}")
        chosen |= found
    pairs = (Adapter.on(adapted[name]).matrices(name) for name in adapted if name in chosen)
    return {name: matrix for pair in pairs for name, matrix in pair.items()}


def _inside(
    base: Any, blocks: tuple[int, int] | None, wanted: Callable[[nn.Module], bool]
) -> Iterator[tuple[str, nn.Module]]:
    """Give the wanted modules of the decoder layers, with their names in the model."""
    found = decoder_layers(base)
    if found is None:
        message = f"{type(base).__name__} keeps its layers where they are not found"
        raise UserError(message, "use a method without curvature")
    count = len(found[1])
    first, last = blocks or (0, count - 1)
    if not 0 <= first <= last < count:
        hint = f"give first and last, between 0 and {count - 1}"
        raise UserError(f"blocks {first} to {last} given, but the model has {count}", hint)
    inside = {id(m) for block in list(found[1])[first : last + 1] for m in block.modules()}
    for name, module in base.named_modules():
        if id(module) in inside and wanted(module):
            yield name, module


def _in_set(name: str, layers: str) -> bool:
    if layers not in get_args(LayerSet):
        raise UserError(f"layers '{layers}' given", f"one of {', '.join(get_args(LayerSet))}")
    *above, leaf = name.split(".")
    if leaf in ROUTERS:
        return False
    attends = any("attn" in part or "attention" in part for part in above)
    return layers == "all-linear" or attends == (layers == "attention")


def _matching(
    base: Any, found: Mapping[str, nn.Module], patterns: Sequence[str]
) -> dict[str, nn.Module]:
    for pattern in patterns:
        if any(re.search(pattern, name) for name in found):
            continue
        others = [(n, m) for n, m in base.named_modules() if n and re.search(pattern, n)]
        if others:
            name, module = others[-1]
            kind = type(module).__name__
            raise UserError(
                f"layers '{pattern}' is found in '{name}' ({kind}), but in the name of no linear "
                "layer inside a decoder layer",
                _known(found),
            )
        raise UserError(f"layers '{pattern}' is found in no layer's name", _known(found))
    return {n: m for n, m in found.items() if any(re.search(p, n) for p in patterns)}


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"layers '{pattern}' is no regular expression: {error}", "escape or close it"
        ) from error


def _known(found: Mapping[str, Any]) -> str:
    return f"its linear layers: {_leaves(found)}"


def _leaves(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"


def _check_weights(base: Any, chosen: Mapping[str, nn.Module]) -> None:
    """Refuse weights that cannot be changed one by one."""
    users: dict[int, list[str]] = {}
    for name, module in base.named_modules(remove_duplicate=False):
        if isinstance(weight := getattr(module, "weight", None), Tensor):
            users.setdefault(id(weight), []).append(name)
    for name, module in chosen.items():
        weight = module.weight
        assert isinstance(weight, Tensor)
        if not weight.is_floating_point():
            raise UserError(
                f"'{name}' is quantised: a step cannot be added to 4-bit weights",
                "load the model without quantize",
            )
        if others := [one for one in users[id(weight)] if one != name]:
            raise UserError(
                f"'{name}' shares its weight with '{others[0]}', so its curvature is not its own",
                "choose other layers",
            )


def _groups(base: Any, chosen: Mapping[str, nn.Module]) -> dict[str, str]:
    """Name the first layer with the same input, and refuse layers that are not used once."""
    seen: dict[str, list[Tensor]] = {name: [] for name in chosen}

    def keep(name: str) -> Any:
        return lambda module, inputs: seen[name].append(inputs[0])

    handles = [
        _reader(base, name, module).register_forward_pre_hook(keep(name))
        for name, module in chosen.items()
    ]
    device = base.get_input_embeddings().weight.device
    size = base.config.get_text_config().vocab_size
    ids = torch.randint(size, PROBE, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        with evaluation_mode(base):
            base(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for name, inputs in seen.items():
        _check_used_once(name, inputs)
    first: dict[tuple[Any, ...], str] = {}  # all inputs are held, so no address is used twice
    return {
        name: first.setdefault((x.data_ptr(), x.shape, x.stride(), x._version), name)
        for name, (x,) in seen.items()
    }


def _reader(base: Any, name: str, module: nn.Module) -> Any:
    """Give the module that is called with a layer's input as others are called with it too.

    A of an adapter may be given a copy in another precision of what its layer reads.
    """
    found = adapter_of(base, name)
    return found[1].module if found and module is found[1].down else module


def _check_used_once(name: str, inputs: Sequence[Tensor]) -> None:
    if len(inputs) != 1:
        often = "never" if not inputs else f"{len(inputs)} times"
        raise UserError(
            f"'{name}' is called {often} per forward pass, so it has no Kronecker factors",
            "leave it out with layers",
        )
    if inputs[0].shape[:-1].numel() != PROBE[0] * PROBE[1]:
        raise UserError(
            f"'{name}' sees only part of the tokens (an expert?), which is not supported",
            "leave it out with layers",
        )
