"""Was this *set* of texts in the training data? One test over many texts instead of many tests.

Single texts give weak evidence; a set of hundreds from one distribution can give strong evidence
(Maini et al. 2024, LLM Dataset Inference, arXiv:2406.06443).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy.stats import ttest_ind
from sklearn.linear_model import LogisticRegression

from unlearn.detect.conformal import NotCalibrated
from unlearn.detect.roc import auc

FEWEST = 20
SPLITS = 10
OUTLIERS = (2.5, 97.5)
"""Percentiles that scores are clipped to: a twentieth of the values, split over both tails."""
BAR = 0.1
"""p below which the paper calls a set a member; on the Pile's test splits it never was."""


@dataclass(frozen=True)
class DatasetTest:
    """What all scores together say about a set.

    ``p``: p-value of "the suspect set scores like the held-out set", in (0, 1]. ``weights``: mean
    weight of each score (standardised, higher = more likely a member). ``auc``: how well the
    combined score tells the halves it was not fitted on, mean over splits.
    """

    p: float
    auc: float
    weights: dict[str, float]
    suspects: int
    heldout: int

    def to_dict(self) -> dict[str, Any]:
        """Give everything as JSON knows it."""
        return dict(vars(self))


def dataset_test(
    suspects: Mapping[str, ArrayLike], heldout: Mapping[str, ArrayLike], *, seed: int = 0
) -> DatasetTest:
    """Test a suspect set against held-out texts of the same distribution, by all their scores.

    Both map each score to its values per text. On a random half of both sets a linear classifier
    learns which mixture of scores tells them apart; on the other half Welch's one-sided t-test asks
    whether the mixture is higher for the suspects. Ten halves; p is twice the median, at most 1,
    which is valid for dependent p-values (van de Wiel et al. 2009).

    Deviations from the paper: clipping, centring and scaling use the fitting half of both sets
    (theirs: the suspect set), logistic regression with an L2 penalty in place of linear regression.
    Texts without one of the scores are left out.

    Raises:
        NotCalibrated: fewer than 20 texts on a side.
    """
    names = [name for name in suspects if name in heldout]
    ours, theirs = _complete(suspects, names), _complete(heldout, names)
    if min(len(ours), len(theirs)) < FEWEST:
        raise NotCalibrated(
            f"a dataset test needs {FEWEST} scored texts per side; "
            f"there are {len(ours)} suspects and {len(theirs)} held-out texts",
            "give more texts, 200 or more for a clear answer",
        )
    generator = np.random.default_rng([seed, len(ours), len(theirs)])
    splits = [_one_split(ours, theirs, generator) for _ in range(SPLITS)]
    weights = np.mean([weights for _, _, weights in splits], axis=0)
    return DatasetTest(
        min(1.0, 2 * float(np.median([p for p, _, _ in splits]))),
        float(np.mean([area for _, area, _ in splits])),
        dict(zip(names, weights.tolist(), strict=True)),
        len(ours),
        len(theirs),
    )


def _complete(side: Mapping[str, ArrayLike], names: list[str]) -> Float[ndarray, "text score"]:
    """Give the texts that have every score."""
    table = np.stack([np.asarray(side[name], float) for name in names], axis=1)
    return table[np.isfinite(table).all(1)]


def _one_split(
    ours: Float[ndarray, "a score"], theirs: Float[ndarray, "b score"], generator: Any
) -> tuple[float, float, ndarray]:
    """Fit on one half, test on the other: p, AUC and weights."""
    halves = [_halved(side, generator) for side in (ours, theirs)]
    fitted = np.concatenate([first for first, _ in halves])
    low, high = np.percentile(fitted, OUTLIERS, axis=0)
    clipped = fitted.clip(low, high)
    centre, spread = clipped.mean(0), clipped.std(0)
    spread[spread == 0] = 1.0  # a score that is the same for all says nothing
    labels = np.repeat([1, 0], [len(first) for first, _ in halves])
    classifier = LogisticRegression().fit((clipped - centre) / spread, labels)
    yes, no = (
        classifier.decision_function((rest.clip(low, high) - centre) / spread) for _, rest in halves
    )
    if np.ptp(np.concatenate([yes, no])) == 0:
        return 1.0, 0.5, classifier.coef_[0]
    p = float(ttest_ind(yes, no, equal_var=False, alternative="greater").pvalue)
    return p, auc(no, yes), classifier.coef_[0]


def _halved(side: ndarray, generator: Any) -> tuple[ndarray, ndarray]:
    order = generator.permutation(len(side))
    return side[order[: len(side) // 2]], side[order[len(side) // 2 :]]
