"""Work of test_ranks.py on one of several processes: curvature of a model fitted together."""

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from unlearn.curvature.damping import Damping
from unlearn.curvature.direction import direction
from unlearn.curvature.fit import FitSettings, fit_curvature, gradient
from unlearn.curvature.layers import find_layers
from unlearn.curvature.passes import Rows
from unlearn.data.encode import Example
from unlearn.models import load_model
from unlearn.ranks import Ranks

CASES = {"kfac": "factored:1e-3", "tkfac": "factored:1e-3", "ekfac": "relative:1e-2",
         "diag": "relative:0.1", "act": "relative:1e-2"}  # fmt: skip


def work(folder: Path, name: str) -> None:
    """Fit every kind of curvature and write a direction for each."""
    warnings.simplefilter("ignore")
    model = load_model(
        str(folder), device="cpu"
    ).double()  # eigenvectors of close values are touchy
    rows = [Example(**row) for row in json.loads((folder / "rows.json").read_text())]
    layers, tensors, figures = find_layers(model, "all-linear"), {}, {}
    grad = gradient(model, Rows(rows[:7], batch_tokens=20), layers)
    for kind, damping in CASES.items():
        settings: Any = FitSettings(kind, label_draws=2)  # type: ignore[arg-type]
        found = fit_curvature(model, Rows(rows, batch_tokens=30), layers, settings)
        step = direction(found, grad, Damping.parse(damping), ranks=Ranks.of(model))
        tensors |= {f"{kind} {key}": value for key, value in step.weights.items()}
        counts = [found.counts.labels, found.counts.tokens, found.counts.rows]
        figures[kind] = [*counts, step.slope, step.bend]
    save_file({key: one.contiguous() for key, one in tensors.items()}, folder / name)
    (folder / f"{name}.json").write_text(json.dumps(figures))
