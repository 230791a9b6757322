"""The curvature that K-FADE would fit, fitted ahead: one fit serves many forget requests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unlearn.curvature.fit import Curvature, FitSettings, fit_curvature, identity_of
from unlearn.curvature.layers import find_layers
from unlearn.curvature.parts import Listen, Parts, told
from unlearn.curvature.storage import check_curvature
from unlearn.data.encode import Example
from unlearn.models import weights_hash


def retain_curvature(
    model: Any,
    retain: Sequence[Example],
    hyper: Mapping[str, Any],
    listen: Listen = lambda event: None,
    seed: int = 0,
) -> Curvature:
    """Fit what :func:`~unlearn.edits.kfade.kfade` fits in its first step with these settings.

    ``hyper`` holds all its hyperparameters. The same rows are held out, the same cap holds, and the
    identity is the same: kept with :func:`~unlearn.curvature.storage.save_curvature`, it is what
    the edit reads as ``factors``. Curvature does not depend on the forget rows.
    """
    parts, settings = _parts(retain, hyper), _settings(hyper, seed)
    if parts.warning:
        listen({"event": "warning", "message": parts.warning})
    layers, rows = find_layers(model, hyper["layers"]), parts.fit
    identity = identity_of(weights_hash(model), rows.examples, layers, settings)
    rows = told(rows, "curvature of the retain set", listen)
    return fit_curvature(model, rows, layers, settings, identity=identity)


def check_factors(
    model: Any, retain: Sequence[Example], hyper: Mapping[str, Any], *, seed: int, start: str
) -> None:
    """Refuse layers or ``hyper["factors"]`` that do not belong to a model and these rows.

    ``start`` is the hash of the model's weights. A file that is not there is no mistake.

    Raises:
        UserError: as said, before anything is measured.
    """
    layers = find_layers(model, hyper["layers"])
    if hyper["factors"] is None or not Path(hyper["factors"]).is_file():
        return
    rows, settings = _parts(retain, hyper).fit.examples, _settings(hyper, seed)
    check_curvature(Path(hyper["factors"]), identity_of(start, rows, layers, settings))


def _parts(retain: Sequence[Example], hyper: Mapping[str, Any]) -> Parts:
    return Parts.of(
        {"forget": [], "retain": retain},
        hyper["held_out"],
        hyper["retain_tokens"],
        hyper["forget_rows"],
        hyper["batch_tokens"],
        hyper["loss_on"],
    )


def _settings(hyper: Mapping[str, Any], seed: int) -> FitSettings:
    return FitSettings(
        hyper["curvature"],
        hyper["fisher"],
        hyper["label_draws"],
        hyper["max_factor_dim"],
        seed,
    )
