"""What is watched while a model is trained on pairs, beside the losses of the terms."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from unlearn.data.pairs import SIDES
from unlearn.objectives.verified import per_token
from unlearn.scores import Scores


def pair_readings(
    scores: Mapping[str, Scores], counts: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Give a micro-batch's share of the step's means, by name.

    ``chosen/entropy`` and ``rejected/entropy``: of the model's distribution at the labelled
    positions, nats per token; needs scores with ``statistics``. ``pairs/accuracy``: share of pairs
    whose chosen answer has the higher mean log-probability; ``pairs/margin``: by how much, nats per
    token. ``counts`` holds the labelled tokens of each side and the ``pairs`` of the whole step.
    """
    for side in SIDES:
        if side in scores and (mean := scores[side].mean) is not None:
            yield f"{side}/entropy", -mean.sum() / counts[side].clamp_min(1)
    if set(SIDES) <= scores.keys():
        chosen, rejected = (scores[side] for side in SIDES)
        margin = (per_token(chosen) - per_token(rejected)).detach()
        margin = margin * chosen.attended.any(-1)
        pairs = counts["pairs"].clamp_min(1)
        yield "pairs/accuracy", (margin > 0).sum() / pairs
        yield "pairs/margin", margin.sum() / pairs
