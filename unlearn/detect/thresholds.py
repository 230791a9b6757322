"""A threshold fitted once on labelled texts, and kept with what it is valid for."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import beta

from unlearn.detect.conformal import TOLERANCE, NotCalibrated, check_enough, share_interval
from unlearn.detect.roc import roc
from unlearn.errors import UserError
from unlearn.runs import write_json

FORMAT = "unlearn calibration 1"
Rule = Literal["fpr", "tpr", "youden"]


@dataclass(frozen=True)
class Conditions:
    """What a threshold is valid for: it means nothing for other values of any of these.

    ``model`` and ``tokenizer`` are fingerprints; ``bos`` says whether a start token was added;
    ``mode``: ``snippet`` (scored from its own start) or ``stream`` (a window of a long text, with
    more context); ``tokens``: scored tokens per text, None when texts were not cut to one length.
    """

    model: str
    tokenizer: str
    bos: str = "auto"
    mode: Literal["snippet", "stream"] = "snippet"
    tokens: int | None = None


@dataclass(frozen=True)
class Threshold:
    """A text is called a likely member when its score is *above* ``value``.

    ``rule`` says how it was chosen and ``target`` the rate that was asked for. ``fpr`` is the
    expected rate of false calls among exchangeable non-members, with the 95 % range in which the
    rate of this very threshold lies; ``tpr`` that of right calls among the calibration's members
    (optimistic when the members also chose the threshold), with its exact interval.
    """

    value: float
    rule: Rule
    target: float | None
    fpr: tuple[float, float, float]
    tpr: tuple[float, float, float] | None
    nonmembers: int
    members: int


@dataclass(frozen=True)
class Calibration:
    """A threshold of one score, with its settings and conditions."""

    score: str
    settings: dict[str, Any]
    threshold: Threshold
    conditions: Conditions


def at_fpr(nonmembers: ArrayLike, fpr: float, *, members: ArrayLike | None = None) -> Threshold:
    """Fit the threshold that a non-member exceeds with probability ``fpr`` or less.

    The ceil((m + 1)(1 - fpr))-th smallest of m non-members: the same calls as p <= ``fpr``.

    Raises:
        NotCalibrated: too few non-members for that rate.
    """
    ordered = np.sort(np.asarray(nonmembers, float))
    check_enough(ordered.size, fpr)
    rank = math.ceil((ordered.size + 1) * (1 - fpr) - TOLERANCE)
    return _threshold(float(ordered[rank - 1]), "fpr", fpr, ordered, members)


def at_tpr(members: ArrayLike, tpr: float, *, nonmembers: ArrayLike) -> Threshold:
    """Fit the highest threshold that a member exceeds with probability ``tpr`` or more.

    Just below the floor((n + 1)(1 - tpr))-th smallest of n members.

    Raises:
        NotCalibrated: too few members for that rate.
    """
    ordered = np.sort(np.asarray(members, float))
    if not 0 < tpr < 1:
        raise UserError(f"tpr={tpr} is not a rate", "give more than 0 and less than 1, as 0.9")
    rank = math.floor((ordered.size + 1) * (1 - tpr) + TOLERANCE)
    if rank < 1:
        needed = math.ceil(1 / (1 - tpr) - TOLERANCE) - 1
        raise NotCalibrated(
            f"{ordered.size} members cannot carry a true-positive rate of {tpr:g}",
            f"need at least {needed} members, or a lower rate",
        )
    return _threshold(_just_below(ordered[rank - 1]), "tpr", tpr, nonmembers, ordered)


def youden(members: ArrayLike, nonmembers: ArrayLike) -> Threshold:
    """Fit the threshold with the largest TPR - FPR on the labelled texts (Youden 1950).

    It promises no rate: both were chosen to look best on these texts.
    """
    curve = roc(members=members, nonmembers=nonmembers)
    best = int(np.argmax((curve.tpr - curve.fpr).round(12)))
    value = _just_below(curve.thresholds[best])
    return _threshold(value, "youden", None, nonmembers, members)


def _just_below(score: float) -> float:
    """Turn "at or above" into "above": the next smaller number."""
    return float(np.nextafter(score, -np.inf))


def _threshold(
    value: float,
    rule: Rule,
    target: float | None,
    nonmembers: ArrayLike,
    members: ArrayLike | None,
) -> Threshold:
    no = np.asarray(nonmembers, float)
    yes = np.empty(0) if members is None else np.asarray(members, float)
    if np.isnan(no).any() or np.isnan(yes).any():
        raise ValueError("a score is not a number; leave such texts out and count them")
    tpr = None
    if yes.size:
        hits = int((yes > value).sum())
        tpr = (hits / yes.size, *share_interval(hits, yes.size))
    return Threshold(value, rule, target, _fpr(value, no, rule), tpr, no.size, yes.size)


def _fpr(value: float, nonmembers: np.ndarray, rule: Rule) -> tuple[float, float, float]:
    """Give the false-positive rate of a threshold and its 95 % range.

    Were the threshold the k-th smallest of m non-members (rule ``fpr``), its rate over all
    calibration sets is Beta(m + 1 - k, k), whatever the scores' distribution. Other rules do not
    choose by the non-members alone; there it is the exact interval of the observed share.
    """
    above, size = int((nonmembers > value).sum()), nonmembers.size
    if rule != "fpr":
        return (above / size, *share_interval(above, size))
    rank = size - above
    spread = beta(size + 1 - rank, rank)
    low, high = spread.ppf([0.025, 0.975])
    return float(spread.mean()), float(low), float(high)


def save(calibration: Calibration, path: Path) -> None:
    """Write a calibration as JSON."""
    write_json(path, {"format": FORMAT, **asdict(calibration)})


def load(path: Path) -> Calibration:
    """Read a calibration back.

    Raises:
        UserError: no such file, or not a calibration.
    """
    made = "make one with `unlearn detect calibrate`"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("format") != FORMAT:
            raise UserError(f"'{path}' is not a calibration", made)
        fitted = dict(found["threshold"])
        fitted |= {name: tuple(fitted[name]) for name in ("fpr", "tpr") if fitted[name]}
        return Calibration(
            found["score"],
            found["settings"],
            Threshold(**fitted),
            Conditions(**found["conditions"]),
        )
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}", made) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"'{path}' is not a calibration: it is damaged", made) from error


def check_conditions(calibration: Calibration, now: Conditions, *, source: str) -> None:
    """Refuse a threshold under conditions it was not fitted for.

    Raises:
        NotCalibrated: names every condition that differs.
    """
    then = calibration.conditions
    differing = [
        f"{field.name} {_short(getattr(then, field.name))}, not {_short(getattr(now, field.name))}"
        for field in fields(Conditions)
        if getattr(then, field.name) != getattr(now, field.name)
    ]
    if differing:
        raise NotCalibrated(
            f"'{source}' was fitted for {'; '.join(differing)}",
            "calibrate again under these conditions, or give --force and trust no rate",
        )


def _short(value: Any) -> str:
    return "any" if value is None else f"{value:.12}" if isinstance(value, str) else str(value)


def calls(calibration: Calibration, scores: Mapping[str, ArrayLike]) -> np.ndarray:
    """Say which texts score above the threshold; never one without a score."""
    if calibration.score not in scores:
        raise UserError(
            f"the threshold is for the score '{calibration.score}', which was not computed",
            f"one of {', '.join(scores)}",
        )
    with np.errstate(invalid="ignore"):
        return np.asarray(scores[calibration.score], float) > calibration.threshold.value
