"""A folder about fitted curvature: a page, the picture of the eigenvalues, and the figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlearn.evals.curvature.describe import cells, facts
from unlearn.evals.curvature.plots import draw_spectra
from unlearn.evals.report.page import render
from unlearn.runs import staged, write_atomic, write_json


def write_spectra(folder: Path, found: Mapping[str, Any]) -> None:
    """Write ``curvature.json``, ``spectra.svg`` and ``curvature.html``, all of them or nothing."""
    plot = draw_spectra(found)
    context = {
        "title": f"Curvature: {Path(found['file']).name}",
        "found": found,
        "facts": facts(found),
        "rows": [cells(one) | {"name": one["name"]} for one in found["layers"]],
        "plot": plot,
    }
    with staged(folder) as staging:
        write_json(staging / "curvature.json", found)
        write_atomic(staging / "spectra.svg", plot.standalone())
        write_atomic(staging / "curvature.html", render("curvature.html.j2", context))
