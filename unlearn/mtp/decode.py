"""Decoding that drafts and checks in one forward pass, and writes what the base alone would write.

Every step carries the drafted tokens, whose predictions by the base's own head decide, and blocks
of masks for the drafts of the next step (Samragh et al. 2025, section 2.4). A draft is kept while
it is the token that the base chooses after the tokens before it: its likeliest one, or one drawn
from its distribution. So the text, or its distribution, is that of the base for any drafts at all.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from unlearn.errors import UserError, unknown
from unlearn.mtp.cache import preallocated
from unlearn.mtp.layout import Block, block_rows, step_layout
from unlearn.mtp.layouts import LAYOUTS, Layout, layout_named
from unlearn.mtp.predictor import MaskPredictor, context_of

Choose = Callable[[Tensor], Tensor]
"""Logits [row vocab] to the base's token of each row."""
LONG_PROMPT = 512
"""Longer prompts are read first by an ordinary causal pass, which needs no mask of their square."""
SHORTLIST = 256


@dataclass
class Written:
    """Tokens that were written, and how.

    ``steps``: forward passes that wrote something. ``kept``: per step, drafts carried and kept.
    """

    tokens: list[int] = field(default_factory=list)
    steps: int = 0
    kept: list[tuple[int, int]] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        """Give tokens per forward pass: the paper's acceptance rate; plain decoding has 1."""
        return len(self.tokens) / max(1, self.steps)

    def by_position(self) -> list[tuple[int, int]]:
        """Give for draft 1, 2, …: how often it was checked with all before it right; was right."""
        checked: Counter[int] = Counter()
        right: Counter[int] = Counter()
        for carried, kept in self.kept:
            checked.update(range(min(kept + 1, carried)))
            right.update(range(kept))
        return [(checked[j], right[j]) for j in range(len(checked))]


def greedy(logits: Float[Tensor, "row vocab"]) -> Int[Tensor, " row"]:
    """Choose the likeliest token of each row, the first of equals."""
    return logits.argmax(-1)


@dataclass(frozen=True)
class Sampled:
    """Draws a token of each row from the distribution at a temperature."""

    temperature: float
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        """Refuse a temperature that gives no distribution.

        Raises:
            UserError: as said.
        """
        if not (0 < self.temperature < math.inf):
            raise UserError(
                f"temperature {self.temperature} given", "give a number above 0; 0 is greedy"
            )

    def __call__(self, logits: Float[Tensor, "row vocab"]) -> Int[Tensor, " row"]:
        chances = (logits / self.temperature).softmax(-1)
        return torch.multinomial(chances, 1, generator=self.generator)[:, 0]


@dataclass(frozen=True)
class Drafting:
    """How drafts are made: ``k`` at most that trained, layout, and the sampler's shortlist.

    ``masks`` is the most masks of a step in layout ``budget``. None of it changes what is written.
    """

    layout: str = "quadratic"
    k: int | None = None
    masks: int | None = None
    shortlist: int | None = SHORTLIST

    def __post_init__(self) -> None:
        """Refuse what no layout knows.

        Raises:
            UserError: an unknown layout, a number below 1, or masks where no budget is.
        """
        if self.layout not in LAYOUTS:
            raise unknown("layout", self.layout, LAYOUTS)
        for name in ("k", "masks", "shortlist"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} given", "give 1 or more, or leave it out")
        if self.masks is not None and self.layout != "budget":
            raise UserError(
                f"masks={self.masks} given, but layout {self.layout} has its own number",
                "choose layout budget, or leave masks out",
            )

    def made(self, trained: int) -> Layout:
        """Make the layout for a predictor of ``trained`` masks.

        Raises:
            UserError: more masks than were trained, or no such layout.
        """
        k = self.k or trained
        if not 1 <= k <= trained:
            raise UserError(
                f"k={k} given, but {trained} masks were trained", f"give 1 to {trained}"
            )
        return layout_named(self.layout, k, self.masks)

    def used(self, trained: int) -> dict[str, Any]:
        """Give the settings as a predictor of ``trained`` masks uses them."""
        k = self.k or trained
        masks = (self.masks or 2 * k) if self.layout == "budget" else None
        return {"layout": self.layout, "k": k, "masks": masks, "shortlist": self.shortlist}


@torch.inference_mode()
def decode(
    predictor: MaskPredictor,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stops: frozenset[int] = frozenset(),
    drafting: Drafting | None = None,
    choose: Choose = greedy,
    ended: Callable[[list[int]], bool] = lambda tokens: False,
) -> Written:
    """Write the continuation of a prompt, exactly as the frozen model alone would.

    It ends with a token of ``stops``, where ``ended`` says so of the tokens so far, or after
    ``max_new_tokens``. ``choose`` decides every token from the base's logits.

    Raises:
        UserError: the prompt is empty, has tokens that the model does not know, or leaves no room
            for the text in the model's context; ``drafting`` asks for what was not trained.
    """
    _check_prompt(predictor, prompt, max_new_tokens)
    drafting = drafting or Drafting()
    layout = drafting.made(predictor.shape.k)
    state = _State(predictor, list(prompt), max_new_tokens, drafting.shortlist)
    written = Written()
    while len(written.tokens) < max_new_tokens:
        chosen, drafted, kept = state.step(layout, choose, max_new_tokens - len(written.tokens))
        written.steps += 1
        written.kept.append((drafted, kept))
        layout.saw(drafted, kept)
        for token in chosen:
            written.tokens.append(token)
            if token in stops or ended(written.tokens):
                return written
            if len(written.tokens) == max_new_tokens:
                break
    return written


def _check_prompt(predictor: MaskPredictor, prompt: Sequence[int], most: int) -> None:
    if not prompt:
        raise UserError("the prompt is empty", "give at least one token")
    if most < 1:
        raise UserError(f"max_new_tokens={most} given", "give 1 or more")
    known = int(predictor.model.get_input_embeddings().weight.shape[0])
    if odd := [token for token in prompt if not 0 <= token < known]:
        message = f"the prompt has token {odd[0]}, but the model knows {known} tokens, from 0 on"
        raise UserError(message, "tokenise it with the model's own tokenizer")
    context = context_of(predictor.model)
    if len(prompt) + most > context:
        room = context - len(prompt)
        raise UserError(
            f"a prompt of {len(prompt)} tokens and {most} new ones, but the model's context is "
            f"{context}",
            f"set max_new_tokens to {room} or less" if room > 0 else "shorten the prompt",
        )


class _State:
    """A text under way: what the cache holds, verified tokens that it lacks, and drafts."""

    def __init__(
        self, predictor: MaskPredictor, prompt: list[int], room: int, shortlist: int | None
    ) -> None:
        self.predictor, self.shortlist = predictor, shortlist
        self.masks = predictor.masks.to(predictor.dtype)
        k = predictor.shape.k
        self.cache = preallocated(predictor.model, len(prompt) + room + (k + 1) ** 2)
        self.known = torch.tensor(prompt, device=predictor.device)
        self.drafts = self.known[:0]
        if len(prompt) > LONG_PROMPT:
            first, self.known = self.known[:-1], self.known[-1:]
            positions = torch.arange(len(first), device=first.device)
            predictor.read(predictor.embed(first), positions, None, self.cache)

    def step(self, layout: Layout, choose: Choose, room: int) -> tuple[list[int], int, int]:
        """Do one forward pass; give the tokens that are right, the drafts checked and kept.

        Drafts and masks that could write nothing within ``room`` more tokens are left out.
        """
        self.drafts = self.drafts[: room - 1]
        before, drafted = len(self.known) - 1, len(self.drafts)
        regular = before + 1 + drafted
        left = [(place, min(length, room - 2 - place)) for place, length in layout.blocks(drafted)]
        blocks = tuple((before + place, length) for place, length in left if length > 0)
        hidden = self._forward(regular, blocks)
        choices = choose(self.predictor.head.logits(hidden[before:regular]))
        agreed = (self.drafts == choices[:-1]).cumprod(0).sum()
        kept, *tokens = torch.cat([agreed[None], choices]).tolist()  # the one wait for the device
        self.cache.crop(-(hidden.shape[0] - before - 1 - kept))
        self.known = choices[kept : kept + 1]
        rows = block_rows(regular, blocks, before + kept)
        self.drafts = self.drafts[:0]
        if rows is not None:
            self.drafts = self.predictor.draft(
                choices[kept], hidden[rows], shortlist=self.shortlist
            )
        return tokens[: kept + 1], drafted, kept

    def _forward(self, regular: int, blocks: tuple[Block, ...]) -> Float[Tensor, "token width"]:
        offsets, sees, which = step_layout(regular, blocks, self.known.device)
        past = self.cache.get_seq_length()
        visible = pad(sees, (past, 0), value=True)
        ids = torch.cat([self.known, self.drafts])
        embedded = torch.cat([self.predictor.embed(ids), self.masks[which]])
        with self.predictor.gate.open(len(which)):
            return self.predictor.read(embedded, offsets + past, visible, self.cache)
