"""Which rows of a forget set to train on: one score per row, and the highest are kept.

Every selector is a ranking, so a smaller part is always contained in a larger one. What is ranked
by follows Pal et al. 2025, "LLM Unlearning Reveals a Stronger-Than-Expected Coreset Effect in
Current Benchmarks", arXiv:2504.10185, unless a docstring says otherwise.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from unlearn.activations import read_layer
from unlearn.data.collate import batches_by_length, pad
from unlearn.data.encode import Example
from unlearn.detect import min_k
from unlearn.scores import Scores
from unlearn.scoring import evaluation_mode, scored

Array = NDArray[np.float64]
Progress = Callable[[int, int], None]

K = 0.4
"""Share of the tokens that Min-K% looks at when rows are selected."""


def num_kept(num_rows: int, fraction: float) -> int:
    """Say how many of the rows a fraction is: rounded to the nearest, half up, at least one."""
    return max(1, math.floor(num_rows * fraction + 0.5))


def highest(scores: ArrayLike, number: int) -> list[int]:
    """Give the places of the highest scores, in ascending order; of equal ones the first.

    Raises:
        ValueError: a score is NaN, which has no rank.
    """
    values = np.asarray(scores, float)
    if np.isnan(values).any():
        raise ValueError(f"{int(np.isnan(values).sum())} of {values.size} scores are NaN")
    order = np.argsort(-values, kind="stable")
    return sorted(order[:number].tolist())


def random_scores(num_rows: int, *, seed: int = 0) -> Array:
    """Rank rows by a seeded permutation: the score of a row is minus its place in it."""
    places = np.random.default_rng(seed).permutation(num_rows)
    scores = np.empty(num_rows)
    scores[places] = -np.arange(num_rows)
    return scores


def moderate_scores(
    embeddings: Float[Tensor, "row width"], *, clusters: int = 4, seed: int = 0
) -> Array:
    """Prefer rows that are neither typical nor odd: minus the distance from the median distance.

    Rows are clustered (k-means, as they have no classes), each has a distance to the centre of its
    cluster, and the median is taken over all rows. In units of the embedding.
    Source: Xia et al. 2023, "Moderate Coreset" (ICLR), as used for unlearning in arXiv:2504.10185.
    """
    from sklearn.cluster import KMeans  # noqa: PLC0415 - slow to import, one selector needs it

    points = embeddings.double().cpu().numpy()
    means = KMeans(min(clusters, len(points)), n_init=10, random_state=seed).fit(points)
    distances = np.linalg.norm(points - means.cluster_centers_[means.labels_], axis=1)
    scores: Array = -np.abs(distances - np.median(distances))
    return scores


def min_k_scores(scores: Scores, *, k: float = K) -> Float[Tensor, " batch"]:
    """Say how well each row is memorised: mean log-probability of its least likely ``k``, in nats.

    The highest are kept: the rows the model remembers most. (Scripts that sort the negated score
    downwards keep those it remembers least.) The end token counts.
    """
    return min_k(scores, [], k=k)


def gradient_norm(loss: Float[Tensor, ""], tensors: Sequence[Tensor]) -> float:
    """Give the L2 norm of a loss's gradient over these tensors together (GraNd of one row).

    Tensors that the loss does not touch count as 0.
    """
    gradients = torch.autograd.grad(loss, list(tensors), allow_unused=True)
    squares = [g.detach().float().square().sum() for g in gradients if g is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def gradient_scores(
    losses: Iterable[Callable[[], Tensor]], tensors: Sequence[Tensor], *, progress: Progress
) -> list[float]:
    """Say how strongly each row pulls: the gradient norm of its loss, one backward pass per row.

    The cheap version of GraNd: at the start of unlearning alone, where the paper takes the mean
    over a few points of its course.
    Source: Paul et al. 2021, arXiv:2107.07075; for unlearning arXiv:2504.10185.
    """
    found = []
    for loss in losses:
        found.append(gradient_norm(loss(), tensors))
        progress(len(found), 0)
    return found


def memorised(
    model: Any, examples: Sequence[Example], *, k: float = K, **scoring: Any
) -> list[float]:
    """Give :func:`min_k_scores` of every example, in one pass over them."""
    return _each(model, examples, lambda scores: min_k_scores(scores, k=k), **scoring)


def mean_log_probs(model: Any, examples: Sequence[Example], **scoring: Any) -> list[float]:
    """Give the mean log-probability per labelled token of every example, in nats: minus its loss.

    After a few steps of unlearning the highest are the hardest to forget: the first-order version
    of the worst-case forget set (Fan et al. 2024, "Challenging Forgets", arXiv:2403.07362, who
    optimise weights of the rows over many such runs).
    """
    return _each(model, examples, lambda scores: scores.sequence / scores.num_tokens, **scoring)


def _each(
    model: Any,
    examples: Sequence[Example],
    read: Callable[[Scores], Tensor],
    *,
    progress: Progress,
    pad_id: int = 0,
    batch_tokens: int = 8192,
) -> list[float]:
    found, done = [math.nan] * len(examples), 0
    with evaluation_mode(model):
        for places, scores in scored(model, examples, pad_id=pad_id, batch_tokens=batch_tokens):
            for place, value in zip(places, read(scores).tolist(), strict=True):
                found[place] = value
            done += len(places)
            progress(done, len(examples))
    return found


def embeddings(
    model: Any,
    examples: Sequence[Example],
    *,
    progress: Progress,
    pad_id: int = 0,
    batch_tokens: int = 8192,
) -> Float[Tensor, "row width"]:
    """Give the mean over each example's tokens, prompt included, of what leaves the last layer."""
    layer = model.config.get_text_config().num_hidden_layers - 1
    device = next(model.parameters()).device
    found: list[Tensor] = [torch.empty(0)] * len(examples)
    done = 0
    with evaluation_mode(model):
        for places in batches_by_length([len(one.input_ids) for one in examples], batch_tokens):
            batch = pad([examples[place] for place in places], pad_id)
            said = read_layer(model, {"": {k: v.to(device) for k, v in batch.items()}}, layer)[""]
            real = said.attended[..., None]
            means = (said.hidden * real).sum(1) / real.sum(1)
            for place, mean in zip(places, means.cpu(), strict=True):
                found[place] = mean
            done += len(places)
            progress(done, len(examples))
    return torch.stack(found)


def per_row(values: ArrayLike, examples: Sequence[Example], num_rows: int) -> Array:
    """Give each row the mean over its examples: a text may have been cut into several windows.

    ``values`` holds one number, or one vector, per example.
    """
    values = np.asarray(values, float)
    rows = np.array([example.row for example in examples])
    totals = np.zeros((num_rows, *values.shape[1:]))
    np.add.at(totals, rows, values)
    counts = np.bincount(rows, minlength=num_rows)
    means: Array = totals / counts.reshape(-1, *[1] * (values.ndim - 1))
    return means
