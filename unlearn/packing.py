"""Padding-free forward passes: rows are laid end to end, only attention sees them as rows.

Every linear layer then works on real tokens alone. Just around the attention product the rows are
laid out with padding, in groups of similar length; that runs on any device and needs no extra
kernels. Only models with plain causal attention are packed, and only after :func:`can_pack` has
compared the result with the model's own logits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NAME = "unlearn_packed"
SHORTEST = 0.65
"""A row shorter than this share of the longest of its group starts a new group."""
SPARED = {"cuda": 4_000_000}
"""Query-key pairs that a new group must spare, by device; on a GPU another attention call costs
more than short rows do that are padded (950 million parameters on an H200: launching work is what
small batches wait for)."""
_active: ContextVar[bool] = ContextVar("packing", default=False)


class _Scatter(torch.autograd.Function):
    """Put rows at distinct places of a larger zero tensor; keeps only the places for backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return rows.new_zeros(size, *rows.shape[1:]).index_copy_(0, places, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


class _Gather(torch.autograd.Function):
    """Take the rows at distinct places: the transpose of :class:`_Scatter`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(rows)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, places, grad), None


def scatter(rows: Tensor, places: Int[Tensor, " row"], size: int) -> Tensor:
    """Put rows at distinct places of a zero tensor of this length."""
    return _Scatter.apply(rows, places, size)


def gather(rows: Tensor, places: Int[Tensor, " row"]) -> Tensor:
    """Take the rows at distinct places."""
    return _Gather.apply(rows, places)


@dataclass(frozen=True)
class Group:
    """Rows of similar length that attend together: their tokens' slots in [rows * width]."""

    slots: Int[Tensor, " token"]
    rows: int
    width: int

    def unpack(self, tokens: Tensor) -> Tensor:
        """[token, heads, size] -> [rows, heads, width, size], zeros at padding."""
        flat = scatter(tokens, self.slots, self.rows * self.width)
        return flat.unflatten(0, (self.rows, self.width)).transpose(1, 2)

    def pack(self, attended: Tensor) -> Tensor:
        """[rows, width, heads, size] -> [token, heads, size]."""
        return gather(attended.flatten(0, 1), self.slots)


@runtime_checkable
class Layout(Protocol):
    """How tokens laid end to end attend to each other, and where each of them stands."""

    @property
    def positions(self) -> Int[Tensor, "1 token"]: ...

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, **arguments: Any
    ) -> Tensor: ...


@dataclass(frozen=True)
class Packing:
    """Where each real token of a right-padded [batch, width] layout stands, longest row first."""

    places: Int[Tensor, " token"]
    positions: Int[Tensor, "1 token"]
    groups: tuple[Group, ...]
    batch: int
    width: int

    @classmethod
    def of(cls, attended: Bool[Tensor, "batch width"]) -> "Packing":
        """Read the layout off an attention mask."""
        batch, width = attended.shape
        lengths, order = attended.sum(-1).sort(descending=True, stable=True)
        sorted_mask = attended[order]
        starts = (order * width)[:, None] + torch.arange(width, device=order.device)
        places = starts[sorted_mask]
        groups = tuple(_groups(lengths[lengths > 0].tolist(), order.device))
        return cls(places, (places % width)[None], groups, batch, width)

    def pack(self, padded: Tensor) -> Tensor:
        """[batch, width, ...] -> [1, token, ...]."""
        return gather(padded.flatten(0, 1), self.places)[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """[1, token, ...] -> [batch, width, ...], zeros at padding."""
        flat = scatter(packed[0], self.places, self.batch * self.width)
        return flat.unflatten(0, (self.batch, self.width))

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, **arguments: Any
    ) -> Tensor:
        """Run causal attention within each row; inputs are [1, heads, token, width]."""
        sizes = [len(group.slots) for group in self.groups]
        parts = (part[0].transpose(0, 1).split(sizes) for part in (query, key, value))
        outputs = []
        for group, *tokens in zip(self.groups, *parts, strict=True):
            rows = [group.unpack(part) for part in tokens]
            outputs.append(group.pack(row_attention(module, *rows, **arguments)))
        return torch.cat(outputs)[None]


def row_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    **arguments: Any,
) -> Tensor:
    """Attend in rows [rows, heads, width, size]: causally, or as the mask says.

    Gives [rows, width, heads, size]; what stands at padding means nothing.
    """
    arguments["is_causal"] = mask is None
    output, _ = _transformers()[0](module, query, key, value, mask, **arguments)
    return output


def _groups(lengths: list[int], device: torch.device) -> Iterator[Group]:
    """Cut rows, longest first, where one begins a group of its own."""
    start = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or _begins(lengths, start, end, SPARED.get(device.type, 0)):
            width = lengths[start]
            counts = torch.tensor(lengths[start:end], device=device)
            mask = torch.arange(width, device=device) < counts[:, None]
            yield Group(mask.flatten().nonzero().squeeze(-1), end - start, width)
            start = end


def _begins(lengths: list[int], start: int, end: int, spared: int) -> bool:
    """Tell whether a row is so short beside its group's longest that a new group pays."""
    longest, row = lengths[start], lengths[end]
    return row < SHORTEST * longest and (len(lengths) - end) * (longest**2 - row**2) >= spared


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Layout | None = None,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention, packed when the forward pass carries a :class:`Layout`."""
    if packing is None:
        return _transformers()[0](module, query, key, value, attention_mask, **arguments)
    for name in ("softcap", "sliding_window", "s_aux", "position_bias"):
        if arguments.get(name) is not None:
            raise ValueError(f"attention with {name} cannot be packed")
    return packing.attend(module, query, key, value, **arguments), None


def mask(*arguments: Any, **named: Any) -> Tensor | None:
    """Build the usual mask; none in a packed pass, where rows are apart and causal."""
    return None if _active.get() else _transformers()[1](*arguments, **named)


@cache
def _transformers() -> tuple[Any, Any]:
    """Import what is needed of transformers once, and register our attention there.

    Imported late, so that a mistake in a recipe is told before the seconds this takes.
    """
    from transformers import AttentionInterface, AttentionMaskInterface  # noqa: PLC0415
    from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: PLC0415
    from transformers.masking_utils import sdpa_mask  # noqa: PLC0415

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    return sdpa_attention_forward, sdpa_mask


@contextmanager
def packable(model: Any) -> Iterator[None]:
    """Let this model take packed batches inside the block; ordinary ones work as before."""
    _transformers()
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def is_packable(model: Any) -> bool:
    """Tell whether the model is inside a :func:`packable` block."""
    return bool(model.config._attn_implementation == NAME)


def packed_forward(model: Any, input_ids: Tensor, packing: Packing, **arguments: Any) -> Any:
    """Call the model on the real tokens of a padded batch, each row starting at position 0."""
    return layout_forward(model, packing.pack(input_ids), packing, **arguments)


def layout_forward(
    model: Any, tokens: Int[Tensor, "1 token"], layout: Layout, **arguments: Any
) -> Any:
    """Call the model on tokens that stand and attend as the layout says."""
    token = _active.set(True)
    try:
        return model(
            input_ids=tokens,
            position_ids=layout.positions,
            packing=layout,
            use_cache=False,
            **arguments,
        )
    finally:
        _active.reset(token)


@torch.no_grad()
def can_pack(model: Any, *, tolerance: float = 1e-4) -> bool:
    """Compare packed with padded log-probabilities on two rows of different length.

    False for models whose attention is not plain causal attention (sliding windows, soft-capping,
    linear attention) or that do not take transformers' attention interface.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config._attn_implementation != "sdpa" or kinds != {"full_attention"}:
        return False
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2, 9), generator=generator).to(device)
    attended = torch.arange(9, device=device) < torch.tensor([[9], [5]], device=device)
    packing = Packing.of(attended)
    try:
        with packable(model):
            packed = packed_forward(model, ids, packing).logits
        padded = packing.pack(model(input_ids=ids, use_cache=False).logits)
    except (ValueError, TypeError, RuntimeError):
        return False
    coarse = packed.dtype in (torch.bfloat16, torch.float16)
    difference = _log_softmax(packed) - _log_softmax(padded)
    return bool(difference.abs().max() <= (0.1 if coarse else tolerance))


def _log_softmax(logits: Float[Tensor, "*positions vocab"]) -> Tensor:
    return logits.double().log_softmax(-1)
