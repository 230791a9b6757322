"""What a mask-token predictor is and how it is trained: every default, and the paper's choices."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from unlearn.errors import UserError

SamplerKind = Literal["residual", "paper", "none"]
Labels = Literal["data", "self", "soft"]
Count = Annotated[int, Field(ge=0)]
MOST_MASKS = 64
"""A step of layout quadratic reads (k + 1)^2 tokens."""


@dataclass(frozen=True)
class Shape:
    """What is added to a frozen model: ``k`` masks, a gated LoRA, a sampler head.

    ``alpha`` None means ``rank`` (a scale of 1). ``targets``: names of linear layers of the
    decoder, comma-separated, or ``all-linear``. ``sampler``: see :mod:`unlearn.mtp.sampler`.
    """

    k: Annotated[int, Field(ge=1, le=MOST_MASKS)] = 8
    rank: PositiveInt = 128
    alpha: PositiveFloat | None = None
    targets: str = "all-linear"
    sampler: SamplerKind = "residual"

    def __post_init__(self) -> None:
        """Refuse more masks than could be of use.

        Raises:
            UserError: as said.
        """
        if not 1 <= self.k <= MOST_MASKS:
            raise UserError(f"k={self.k} masks asked for", f"give 1 to {MOST_MASKS}")

    @property
    def scale(self) -> float:
        """Give the factor of the LoRA's product, alpha / rank."""
        return (self.alpha or self.rank) / self.rank

    @property
    def target_names(self) -> tuple[str, ...] | None:
        """Give the names of the layers; None for all of the decoder."""
        if self.targets == "all-linear":
            return None
        return tuple(name.strip() for name in self.targets.split(",") if name.strip())


@dataclass(frozen=True)
class TrainSettings(Shape):
    """Settings of one training.

    ``labels``: tokens that masks are to foretell: of the ``data``; what the frozen base finds
    likeliest (``self``); or all that it says (``soft``, cross-entropy to its distribution). What
    verification accepts is the base's own choice, so ``self`` fits better where the data is not its
    own text. ``previous``: the token before, which the sampler is given: of the ``data`` (teacher
    forcing), or the sampler's ``own`` choice.

    Weights of the three losses: base cross-entropy, the sampler's, latent consistency, whose
    square is a ``mean`` or a ``sum`` over hidden dimensions. ``sampler_on_ntp`` trains the sampler
    at ordinary positions too. ``anchors``: most positions per sequence that get a block of masks,
    drawn anew each time. ``train_mask_embeddings``: else they stay as drawn.

    ``batch``: sequences per step over all processes. The learning rate rises for ``warmup_steps``,
    at most a tenth of all, and stays. ``held_out``: rows kept to measure on; None keeps 16, at most
    a tenth of all.
    """

    labels: Labels = "data"
    previous: Literal["data", "own"] = "data"
    base_weight: NonNegativeFloat = 1.0
    sampler_weight: NonNegativeFloat = 1.0
    lcm_weight: NonNegativeFloat = 1.0
    lcm_reduction: Literal["mean", "sum"] = "mean"
    sampler_on_ntp: bool = False
    anchors: PositiveInt = 256
    train_mask_embeddings: bool = True
    steps: PositiveInt = 5000
    batch: PositiveInt = 8
    lr: PositiveFloat = 2e-4
    warmup_steps: Count = 5000
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: NonNegativeFloat = 1.0
    gradient_checkpointing: bool = False
    max_length: Annotated[int, Field(ge=2)] = 512
    held_out: Count | None = None
    save_steps: PositiveInt = 500
    seed: Count = 0

    def __post_init__(self) -> None:
        """Refuse settings under which nothing, or no used part, would be trained."""
        super().__post_init__()
        if self.sampler == "none" and self.sampler_on_ntp:
            raise UserError("sampler_on_ntp given without a sampler", "choose residual or paper")
        weights = self.base_weight, self.lcm_weight, self.sampler_weight * (self.sampler != "none")
        if not any(weights):
            raise UserError("every loss has weight 0: nothing would be trained", "raise one weight")

    @property
    def shape(self) -> Shape:
        """Give what is trained, without how."""
        return Shape(**{one.name: getattr(self, one.name) for one in fields(Shape)})

    def learning_rate(self, step: int) -> float:
        """Give the learning rate of a step; the first is above 0."""
        warmup = min(self.warmup_steps, math.ceil(self.steps / 10))
        return self.lr * (min(1.0, (step + 1) / warmup) if warmup else 1.0)

    def identity(self) -> dict[str, Any]:
        """Give all that the trained weights depend on; how they are computed and saved is not."""
        left_out = ("save_steps", "gradient_checkpointing")
        return {key: value for key, value in asdict(self).items() if key not in left_out}


def require_share(settings: TrainSettings, processes: int) -> None:
    """Refuse more processes than sequences in a step: some would have nothing to do.

    Raises:
        UserError: as said.
    """
    if processes > settings.batch:
        raise UserError(
            f"{processes} processes share {settings.batch} sequences of a step, which are not "
            "split",
            f"raise batch, or start at most {settings.batch} processes",
        )


PAPER: dict[str, Any] = {
    "k": 8,
    "rank": 128,
    "sampler": "paper",
    "sampler_on_ntp": True,
    "train_mask_embeddings": False,
    "steps": 50_000,
    "batch": 8,
    "lr": 2e-4,
    "warmup_steps": 5_000,
}
"""Samragh et al. 2025, sections 2 and 3, as far as they say; the rest are the defaults above."""
PRESETS: dict[str, dict[str, Any]] = {"default": {}, "paper": PAPER}
