"""How a dictionary is trained: all settings with their defaults, and the schedules they make."""

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from unlearn.errors import UserError
from unlearn.sae.dictionary import OF_BATCH, Kind

Share = Annotated[float, Field(ge=0, le=1)]
UNIT = ("topk", *OF_BATCH)
"""Kinds whose directions are kept at length 1; the penalties of the others carry the lengths."""
CHOICE = ("mutual", "feature")
"""Kinds whose auxiliary loss follows a Zipf law, once it is fitted."""


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one training; what is None depends on the width of the model or on the steps.

    ``features``: latents, 8 times the width. ``k``: active latents per token, for all kinds but
    relu, jumprelu and gated, which have a ``sparsity`` coefficient (of the L1 of relu and gated,
    of the L0 of jumprelu; inputs have the mean length sqrt(width)). ``batch``: activations per
    step; ``buffer``: activations shuffled together. ``context``: tokens per row of text, packed
    unless ``pack`` is off. ``model_tokens``: tokens that go through the model at once.

    ``lr``: 2e-4 / sqrt(features / 2^14) (dictionary_learning). It rises for ``warmup_steps``, at
    most a tenth of all, and falls to 0 over the last ``decay`` of the steps; ``sparsity`` rises
    over the first ``sparsity_warmup``. A latent is dead after ``dead_tokens`` without firing: 10
    million (sparsify), at most a tenth of the training. ``aux`` weighs AuxK, or aux_zipf, on
    ``k_aux`` latents: half the width.

    ``choice_warmup``: share of the steps in which Mutual and Feature Choice are BatchTopK with
    AuxK; then the Zipf law is fitted. ``jump_penalty``: ``step`` or ``tanh``. ``pre_act`` weighs
    what pulls dead latents of jumprelu up. ``bf16``: the dense products of a step are of bfloat16
    numbers; None on a GPU and nowhere else. ``held_out``: rows to measure on, every ``eval_steps``.
    """

    layer: Annotated[int, Field(ge=0)]
    kind: Kind = "topk"
    features: PositiveInt | None = None
    k: PositiveInt = 32
    steps: PositiveInt = 5000
    batch: PositiveInt = 4096
    buffer: PositiveInt = 2**17
    context: PositiveInt = 1024
    pack: bool = True
    model_tokens: PositiveInt = 8192
    lr: PositiveFloat | None = None
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    decay: Share = 0.2
    sparsity: NonNegativeFloat = 1.0
    sparsity_warmup: Share = 0.05
    dead_tokens: PositiveInt = 10_000_000
    aux: NonNegativeFloat = 1 / 32
    k_aux: PositiveInt | None = None
    choice_warmup: Share = 0.3
    threshold_start: PositiveInt = 1000
    theta: PositiveFloat = 0.01
    bandwidth: PositiveFloat = 0.05
    jump_penalty: Literal["step", "tanh"] = "step"
    pre_act: NonNegativeFloat = 3e-6
    bf16: bool | None = None
    held_out: PositiveInt = 32
    eval_steps: PositiveInt = 1000
    save_steps: PositiveInt = 1000
    seed: int = 0

    def latents(self, width: int) -> int:
        """Give the number of latents.

        Raises:
            UserError: k is larger.
        """
        found = self.features or 8 * width
        if self.kind in UNIT and self.k > found:
            raise UserError(f"k={self.k} given for {found} features", f"give 1 to {found}")
        return found

    def learning_rate(self, step: int, latents: int) -> float:
        """Give the learning rate of a step; the first is 0."""
        peak = self.lr or 2e-4 / math.sqrt(latents / 2**14)
        warmup = min(self.warmup_steps, self.steps // 10)
        falling = self.decay * self.steps
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        fall = min(1.0, (self.steps - step) / falling) if falling else 1.0
        return peak * min(rise, fall)

    def sparsity_at(self, step: int) -> float:
        """Give the coefficient of the sparsity penalty at a step."""
        warmup = self.sparsity_warmup * self.steps
        return self.sparsity * (min(1.0, (step + 1) / warmup) if warmup else 1.0)

    @property
    def dead_after(self) -> int:
        """Give the tokens without firing after which a latent is dead."""
        return max(1, min(self.dead_tokens, self.steps * self.batch // 10))

    @property
    def choice_step(self) -> int:
        """Give the step at which Zipf's law is fitted and Feature Choice begins."""
        return max(1, int(self.choice_warmup * self.steps))

    @property
    def threshold_step(self) -> int:
        """Give the step from which thresholds are averaged: in the second half at the latest."""
        return min(self.threshold_start, self.steps // 2)

    def identity(self) -> dict[str, Any]:
        """Give all that the trained weights depend on; when it is measured or saved is left out."""
        told = asdict(self)
        return {key: told[key] for key in told if key not in ("eval_steps", "save_steps")}
