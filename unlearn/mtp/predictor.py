"""A frozen model with what drafts its next tokens: mask embeddings, gated LoRA, sampler head."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unlearn.errors import UserError
from unlearn.head import VocabularyHead, plain, same_log_probs
from unlearn.mtp.cache import require_croppable
from unlearn.mtp.gate import Gate, GatedLora, linear_layers
from unlearn.mtp.layout import step_layout
from unlearn.mtp.sampler import build_sampler
from unlearn.mtp.settings import Shape

ATTENTION = ("sdpa", "eager")
"""Attention that takes any mask."""
COARSE_NOISE = 0.05
"""Bound on the rounding of half precision, as a share of the spread of the logits."""
ALIGNED = 8
"""Kernels of scaled_dot_product_attention on a GPU copy a mask whose rows begin elsewhere."""


class MaskPredictor:
    """What foretells the tokens after a text, beside the frozen model that decides them.

    ``model``'s weights, names and outputs stay as they are; :meth:`detach` takes the hooks away.
    """

    def __init__(self, model: Any, shape: Shape, *, seed: int = 0) -> None:
        """Draw mask embeddings with the spread of the table's; the LoRA begins at 0.

        Raises:
            UserError: a model that this cannot be exact for, or without the layers named.
        """
        self.model, self.shape = plain(model), shape
        self.decoder, self.head = _parts(self.model)
        table = self.model.get_input_embeddings().weight
        self.width = int(table.shape[1])
        self.gate = Gate()
        layers = linear_layers(self.model, self.decoder, shape.target_names)
        self.lora = GatedLora.beside(layers, shape.rank, shape.scale, self.gate, seed)
        spread = float(table.detach().float().std())
        generator = torch.Generator().manual_seed(seed + 1)
        drawn = torch.randn(shape.k, self.width, generator=generator) * spread
        self.masks = nn.Parameter(drawn)
        size = self._check_exact()
        self.sampler = build_sampler(self.width, shape.sampler, seed + 2, size)
        self.to(self.device)
        self.lora.attach(self.model)

    @property
    def device(self) -> torch.device:
        """Give the device of the model."""
        found: torch.device = next(self.model.parameters()).device
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Give the precision of the model's embeddings."""
        found: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return found

    def detach(self) -> None:
        """Leave the model as it was found."""
        self.lora.detach()

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Take the hooks away inside the block: they take time even where they do nothing."""
        self.lora.detach()
        try:
            yield
        finally:
            self.lora.attach(self.model)

    def trained(self) -> dict[str, nn.Parameter]:
        """Give all parameters that are not the model's, by name."""
        found = {"mask_embeddings": self.masks}
        for name, (a, b) in self.lora.products.items():
            found |= {f"lora_A.{name}": a, f"lora_B.{name}": b}
        if self.sampler is not None:
            found |= {f"sampler.{name}": one for name, one in self.sampler.named_parameters()}
        return found

    def to(self, *where: Any) -> "MaskPredictor":
        """Move what is not the model's to a device, or into a precision."""
        for parameter in self.trained().values():
            parameter.data = parameter.data.to(*where)
        return self

    def embed(self, ids: Int[Tensor, "*position"]) -> Float[Tensor, "*position width"]:
        """Give the model's own embeddings of tokens."""
        found: Tensor = self.model.get_input_embeddings()(ids)
        return found

    def read(
        self,
        embedded: Float[Tensor, "token width"],
        positions: Int[Tensor, " token"],
        visible: Bool[Tensor, "token seen"] | None,
        cache: Any,
    ) -> Float[Tensor, "token width"]:
        """Give the last hidden states, after the final norm, of tokens that follow a cache.

        ``visible`` None: each sees all before it. The gate is the caller's to open.
        """
        output = self.decoder(
            inputs_embeds=embedded[None],
            attention_mask=None if visible is None else self._mask(visible),
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
        )
        found: Tensor = output.last_hidden_state[0]
        return found

    def draft(
        self,
        last: Int[Tensor, ""],
        hidden: Float[Tensor, "mask width"],
        *,
        shortlist: int | None = None,
    ) -> Int[Tensor, " mask"]:
        """Give the tokens that the masks of a block foretell, one after another, after ``last``.

        ``shortlist``: the sampler chooses among that many tokens that the base's head finds
        likeliest at each mask, so the unembedding is read once instead of k times.
        """
        if self.sampler is None:
            return self.head.logits(hidden).argmax(-1)
        few = None
        if shortlist is not None and 4 * shortlist <= self.head.vocabulary:
            few = self.head.logits(hidden).topk(shortlist, -1).indices
        found, previous = [], last
        for place, state in enumerate(hidden):
            chained = self.sampler(self.embed(previous), state)
            previous = self._likeliest(chained, None if few is None else few[place])
            found.append(previous)
        return torch.stack(found)

    def _likeliest(
        self, hidden: Float[Tensor, " width"], among: Int[Tensor, " few"] | None
    ) -> Int[Tensor, ""]:
        """Give the token of the largest logit; scaling and soft caps do not change which it is."""
        if among is None:
            return self.head.logits(hidden[None])[0].argmax()
        linear: Any = self.head.linear
        scores = linear.weight[among] @ hidden
        if getattr(linear, "bias", None) is not None:
            scores = scores + linear.bias[among]
        return among.take(scores.argmax())  # an index in brackets would be read back from a GPU

    def _mask(self, visible: Bool[Tensor, "token seen"]) -> Tensor:
        """Put a mask into the form that the model's attention takes: a sum, in aligned rows.

        Every layer would make this of a mask of booleans again.
        """
        sdpa = self.model.config.get_text_config()._attn_implementation == "sdpa"
        none = -math.inf if sdpa else torch.finfo(self.dtype).min
        rows, seen = visible.shape
        room = -(-seen // ALIGNED) * ALIGNED
        sums = torch.zeros(rows, room, dtype=self.dtype, device=visible.device)[:, :seen]
        return sums.masked_fill_(~visible, none)[None, None]

    @torch.no_grad()
    def _check_exact(self) -> float:
        """Compare ordinary tokens, with masks behind them, with the model's own logits.

        Gives the root mean square of the hidden states.

        Raises:
            UserError: they differ, so what is written would not be what the model writes.
        """
        was, device = self.model.training, self.device
        self.model.eval()
        number, k = 6, self.shape.k
        ids = torch.arange(number, device=device) % self.head.vocabulary
        offsets, sees, which = step_layout(number, ((number - 1, k),), device)
        masks = self.masks.to(device, self.dtype)
        embedded = torch.cat([self.embed(ids), masks[which]])
        hidden = self.read(embedded, offsets, sees, None)[:number]
        theirs = self.model(input_ids=ids[None]).logits[0]
        self.model.train(was)
        if not _agree(self.head.logits(hidden), theirs, self.model):
            raise UserError(
                f"{type(self.model).__name__} gives other logits when masks follow a text",
                "its forward pass or attention is of a kind that mask-token prediction cannot use",
            )
        return float(hidden.float().square().mean().sqrt())


def _agree(ours: Tensor, theirs: Tensor, model: Any) -> bool:
    """Tell whether logits of two forward passes of other shapes are the same up to rounding.

    Half precision rounds in every layer, and logits of 16 and more to an eighth: there the noise,
    as a share of the spread of the logits, is what can be bounded.
    """
    if same_log_probs(ours, theirs, model):
        return True
    if theirs.dtype not in (torch.bfloat16, torch.float16) or ours.shape != theirs.shape:
        return False
    return float((ours - theirs).std()) < COARSE_NOISE * float(theirs.float().std())


def context_of(model: Any) -> int:
    """Give the most tokens, prompt included, that a model knows places for."""
    config = plain(model).config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 10**9)


@contextmanager
def frozen_model(model: Any) -> Iterator[None]:
    """Let no parameter of a model have a gradient inside the block."""
    before = [(one, one.requires_grad) for one in model.parameters()]
    for one, _ in before:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one, had in before:
            one.requires_grad_(had)


def _parts(model: Any) -> tuple[Any, VocabularyHead]:
    """Give decoder and vocabulary head of a model.

    Raises:
        UserError: it has none, a cache that cannot be cut, or attention that takes no mask.
    """
    head = VocabularyHead.of(model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if head is None or decoder is None or decoder is model:
        raise UserError(
            f"{type(model).__name__} has no decoder and vocabulary head that are known",
            "mask-token prediction needs a causal language model of transformers",
        )
    require_croppable(model)
    attention = getattr(model.config.get_text_config(), "_attn_implementation", None)
    if attention not in ATTENTION:
        raise UserError(
            f"attention of kind '{attention}' takes no mask of our own",
            "load the model with attn_implementation='sdpa'",
        )
    return decoder, head
