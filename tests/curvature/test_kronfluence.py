"""Our curvature is kronfluence's, once its means are taken over our counts."""

import sys
from pathlib import Path
from typing import Any

import pytest

from unlearn.curvature.blocks import Blocks
from unlearn.curvature.factors import LayerCurvature
from unlearn.curvature.fit import FitSettings, fit_factors, with_spectrum
from unlearn.curvature.layers import find_layers
from unlearn.curvature.passes import Rows

pytest.importorskip("kronfluence")
SCRIPTS = str(Path(__file__).parents[2] / "scripts")
EMPIRICAL = FitSettings("kfac", "empirical")
CLOSE = 1e-4
"""Relative distance of matrices in fp32, the precision of kronfluence."""


@pytest.fixture
def peers(monkeypatch: Any) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    import peer_kronfluence

    yield peer_kronfluence
    sys.modules.pop("peer_kronfluence")


def assert_close(ours: Any, theirs: Any, name: str) -> None:
    assert float((ours - theirs).norm()) < CLOSE * float(theirs.norm()), name


@pytest.mark.filterwarnings("ignore:.*loss tokens for factors")
@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.GradScaler:FutureWarning")
def test_factors_and_eigenvalues_are_kronfluences(
    peers: Any, fresh_model: Any, fresh_rows: Any, tmp_path: Path
) -> None:
    """Padded rows with prompts, and with tokens after the last label.

    Kronfluence's sums are over the P positions that take part (A, G) and the rows (Λ); G and Λ of
    ours are over the N labelled tokens, so G is P/N times theirs and Λ rows/N times.
    """
    rows, names = fresh_rows(), [layer.name for layer in find_layers(fresh_model(), "all-linear")]
    peer = peers.Peer(fresh_model().float(), names, tmp_path, strategy="ekfac", batch=4)
    peer.factors(rows)
    peer.eigen()
    peer.spectrum(rows)
    theirs = peer.found()

    model = fresh_model().float()
    layers = find_layers(model, "all-linear")
    ours, counts = fit_factors(model, Rows(rows), layers, EMPIRICAL)
    labels = sum(label != -100 for row in rows for label in row.labels[1:])
    assert (counts.labels, counts.rows) == (labels, len(rows))
    bases = {}
    for name, layer in ours.items():
        assert int(theirs["num_activation_covariance_processed"][name]) == counts.tokens
        assert int(theirs["num_lambda_processed"][name]) == len(rows)
        assert_close(
            layer.inputs.dense() * counts.tokens, theirs["activation_covariance"][name], name
        )
        assert_close(layer.outputs.dense() * labels, theirs["gradient_covariance"][name], name)
        right = Blocks((theirs["activation_eigenvectors"][layer.group],))
        left = Blocks((theirs["gradient_eigenvectors"][name],))
        bases[name] = LayerCurvature(layer.group, input_basis=right, output_basis=left)
    ours, _ = with_spectrum(bases, model, Rows(rows), layers, EMPIRICAL)
    for name, layer in ours.items():
        assert_close(layer.eigenvalues * labels, theirs["lambda_matrix"][name], name)


@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.GradScaler:FutureWarning")
def test_the_benchmark_compares_what_is_the_same(peers: Any, tmp_path: Path) -> None:
    """Also the steps at the same damping, which amplify what is rounded."""
    import bench_curvature

    given = ["--width", "32", "--layers", "1", "--rows", "40", "--length", "16"]
    options = bench_curvature._parser().parse_args(given)
    for kind in bench_curvature.KINDS:
        folder = tmp_path / kind
        for name, found in bench_curvature._differences(kind, options, folder).items():
            assert found <= bench_curvature.AGREEMENT[name], (kind, name)
    sys.modules.pop("bench_curvature")
