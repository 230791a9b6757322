"""The curvature that K-FADE would fit, fitted ahead: one fit serves many forget requests."""

from collections.abc import Mapping, Sequence
from typing import Any

from unlearn.curvature.fit import Curvature, FitSettings, fit_curvature, identity_of
from unlearn.curvature.layers import find_layers
from unlearn.curvature.parts import Listen, Parts, told
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
    parts = Parts.of(
        {"forget": [], "retain": retain},
        hyper["held_out"],
        hyper["retain_tokens"],
        hyper["forget_rows"],
        hyper["batch_tokens"],
        hyper["loss_on"],
    )
    if parts.warning:
        listen({"event": "warning", "message": parts.warning})
    settings = FitSettings(
        hyper["curvature"],
        hyper["fisher"],
        hyper["label_draws"],
        hyper["max_factor_dim"],
        seed,
    )
    layers, rows = find_layers(model, hyper["layers"]), parts.fit
    identity = identity_of(weights_hash(model), rows.examples, layers, settings)
    rows = told(rows, "curvature of the retain set", listen)
    return fit_curvature(model, rows, layers, settings, identity=identity)
