"""Can the two sets be told apart without the model? Then a detection figure may show only that.

Members collected before a date and non-members after it differ in their words: a bag of words
alone reaches an AUC of 0.99 on WikiMIA and 0.91 on BookMIA, above every attack that reads a model
(Das, Zhang and Tramer 2024, arXiv:2406.16201).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from unlearn.detect.roc import auc
from unlearn.detect.thresholds import at_fpr

FEWEST = 50
"""Texts per side below which the check says nothing: without any shift AUCs spread by 0.1."""
MOST = 1000
"""Texts per side that are looked at; more only take longer."""
NOTABLE = 0.60
PERMUTATIONS = 50
FOLDS = 5
_YEAR = re.compile(r"(?<!\d)(?:19|20)\d\d(?!\d)")


@dataclass(frozen=True)
class BlindBaseline:
    """What words alone say about two sets of texts.

    ``auc``: cross-validated AUC of a classifier that never sees the model, in [0, 1], None with too
    few texts. ``chance``: what 95 % of runs with shuffled labels stay below, None where the AUC is
    too low to warn anyway. ``telling``: words and pairs of words that speak most for the suspects
    and for the references. ``shared``: texts that are in both sets, word for word.
    """

    auc: float | None
    chance: float | None
    shifted: bool
    suspects: int
    references: int
    telling: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    shared: int = 0

    @property
    def warnings(self) -> list[str]:
        """Say in plain words what a reader must know before any detection figure."""
        found = []
        if self.shifted:
            words = "; ".join(", ".join(f"'{word}'" for word in side) for side in self.telling)
            found.append(
                f"the two sets can be told apart without the model (AUC {self.auc:.2f} from words "
                f"alone; chance stays below {self.chance:.2f}): scores may show a difference of "
                f"topic or date, not membership. Telling words: {words}"
            )
        if self.auc is None:
            found.append(
                f"too few texts to check for a shift of topic or date: {self.suspects} and "
                f"{self.references}, {FEWEST} per side needed, 200 recommended"
            )
        if self.shared:
            found.append(f"{self.shared} texts are in both sets, word for word")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Give everything as JSON knows it."""
        return {
            "blind_auc": self.auc,
            "blind_chance": self.chance,
            "shifted": self.shifted,
            "telling_words": {"suspects": self.telling[0], "references": self.telling[1]},
            "shared_texts": self.shared,
            "warnings": self.warnings,
        }


def blind_baseline(
    suspects: Sequence[str], references: Sequence[str], *, seed: int = 0
) -> BlindBaseline:
    """Try to tell two sets of texts apart by their words, without any model.

    Five-fold logistic regression on TF-IDF of words and pairs of words. It warns when the AUC is
    at least 0.60 *and* above what 5 % of runs with shuffled labels reach (the 49th of 50): with few
    texts a fixed bound alone is often crossed by chance. At most 1000 texts per side,
    drawn by ``seed``.
    """
    shared = len({text.strip() for text in suspects} & {text.strip() for text in references})
    sizes = len(suspects), len(references)
    if min(sizes) < FEWEST:
        return BlindBaseline(None, None, False, *sizes, shared=shared)
    generator = np.random.default_rng([seed, *sizes])
    chosen = [_drawn(side, generator) for side in (suspects, references)]
    labels = np.repeat([1, 0], [len(side) for side in chosen])
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, token_pattern=r"\w+|[^\w\s]")
    features = vectorizer.fit_transform([*chosen[0], *chosen[1]])
    found = _cross_validated(features, labels, generator)
    if found < NOTABLE:
        return BlindBaseline(found, None, False, *sizes, shared=shared)
    shuffled = [
        _cross_validated(features, generator.permutation(labels), generator)
        for _ in range(PERMUTATIONS)
    ]
    chance = at_fpr(shuffled, 0.05).value
    telling = _telling_words(features, labels, vectorizer.get_feature_names_out())
    return BlindBaseline(found, chance, found > chance, *sizes, telling, shared)


def later_years(texts: Sequence[str], year: int) -> float:
    """Give the share of texts that name a year later than ``year``, as 2024 after a 2023 model.

    Such a text cannot have been in the training data as it stands, whatever its score.
    """
    late = sum(any(int(found) > year for found in _YEAR.findall(text)) for text in texts)
    return late / len(texts) if texts else 0.0


def _drawn(texts: Sequence[str], generator: np.random.Generator) -> list[str]:
    if len(texts) <= MOST:
        return list(texts)
    return [texts[place] for place in sorted(generator.choice(len(texts), MOST, replace=False))]


def _classifier() -> LogisticRegression:
    return LogisticRegression(C=10.0, solver="liblinear", random_state=0)


def _cross_validated(features: Any, labels: np.ndarray, generator: np.random.Generator) -> float:
    """Average the AUC of the folds: values of different classifiers are not comparable."""
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=int(generator.integers(2**31)))
    found = []
    for train, test in folds.split(labels, labels):
        values = _classifier().fit(features[train], labels[train]).decision_function(features[test])
        found.append(auc(values[labels[test] == 0], values[labels[test] == 1]))
    return float(np.mean(found))


def _telling_words(
    features: Any, labels: np.ndarray, names: np.ndarray, count: int = 4
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    weights = _classifier().fit(features, labels).coef_[0]
    order = [place for place in np.argsort(weights) if names[place][0].isalnum()]
    return tuple(names[order[::-1][:count]]), tuple(names[order[:count]])
