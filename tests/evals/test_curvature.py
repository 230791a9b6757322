"""What is said of fitted curvature: names, numbers, page and picture."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unlearn.curvature.blocks import Blocks
from unlearn.curvature.damping import Damping
from unlearn.curvature.factors import Counts, LayerCurvature
from unlearn.curvature.fit import Curvature
from unlearn.curvature.spectrum import spectra, totals
from unlearn.curvature.storage import save_curvature
from unlearn.evals.curvature.describe import cells, compact, describe, facts, in_bytes, short_names
from unlearn.evals.curvature.plots import added_to_mean, draw_spectra
from unlearn.evals.curvature.write import write_spectra

LAYERS = [f"model.layers.{block}.mlp.{kind}" for block in range(2) for kind in ("up", "down")]


def factor(*values):
    return Blocks((torch.diag(torch.tensor(values)),))


@pytest.fixture
def fitted(tmp_path):
    """Two blocks; in the last layer one direction holds nearly all, and one output has nothing."""
    layers = {
        name: LayerCurvature(name, factor(1.0, 3.0), factor(2.0, 4.0, 6.0)) for name in LAYERS
    }
    layers[LAYERS[-1]] = LayerCurvature(LAYERS[-1], factor(1e6, 1e-3), factor(1.0, 0.0, 1e-3))
    found = Curvature(layers, Counts(labels=5, tokens=8, rows=2), {"model": "abc"})
    save_curvature(found, tmp_path / "f")
    return tmp_path / "f", found


def described(fitted, damping="factored:1e-2"):
    path, found = fitted
    how = Damping.parse(damping)
    return describe(path, found, spectra(found, how), how)


def test_names_are_as_short_as_they_stay_unique():
    names = ["model.layers.3.mlp.up_proj", "model.layers.3.self_attn.o_proj", "lone"]
    assert list(short_names(names).values()) == [(3, "up_proj"), (3, "o_proj"), (None, "lone")]
    gpt2 = ["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj", "transformer.h.0.mlp.c_fc"]
    assert list(short_names(gpt2).values()) == [(0, "attn.c_proj"), (0, "mlp.c_proj"), (0, "c_fc")]


@given(st.floats(1e-99, 1e99))
def test_numbers_are_short_and_right(value):
    assert len(compact(value)) <= 7
    assert float(compact(value)) == pytest.approx(value, rel=0.06)


def test_nothing_and_bytes():
    assert (compact(None), compact(0.0), compact(9999.0), compact(1e4)) == (
        "–",
        "0",
        "9999",
        "1.0e4",
    )
    assert [in_bytes(size) for size in (12, 2048, 3 * 2**30)] == ["12 B", "2 KiB", "3 GiB"]


def test_figures_shares_and_doubts(fitted):
    """tr A · tr G = 48 of three layers, and 1.001e6 of the last, which is nearly all there is.

    Its eigenvalues are 1e6, 1e3, 1e-3, 1e-6, 0, 0: the lower middle one is 1e-6, and
    λ = 0.01 · 1.001e6 / 6.
    """
    found = described(fitted)
    json.dumps(found, allow_nan=False)
    assert found["trace"] == pytest.approx(3 * 48 + 1e6 * 1.001)
    assert found["layers"][-1]["share"] == pytest.approx(0.99986, abs=1e-5)
    assert (found["tokens_per_dimension"], found["widest"]) == (pytest.approx(5 / 3), 3)
    (doubt,), (note,) = found["warnings"], found["notes"]
    assert "5 loss tokens for factors of up to 3 dimensions" in doubt
    assert "in 1 of 4 layers (1 down)" in note
    last = found["layers"][-1]
    assert last["eigenvalues"]["condition"] is None
    assert last["damping_to_median"] == pytest.approx(0.01 * 1.001e6 / 6 / 1e-6, rel=1e-3)
    written = cells(last)
    assert (written["to_smallest"], written["shape"], written["share"]) == ("∞", "3×2", "100.0 %")
    assert ("model", "sha256 abc…") in facts(found)


def test_the_short_form_knows_no_eigenvalues(fitted):
    path, found = fitted
    short = describe(path, found, totals(found))
    assert short["layers"][0]["trace"] == 48
    assert "eigenvalues" not in short["layers"][0]
    assert cells(short["layers"][0])["inputs_trace"] == "4"
    assert short["damping"] is None


def test_damping_that_goes_by_the_mean_is_one_line():
    assert added_to_mean("factored:0.01", "A") == pytest.approx(0.1)
    assert added_to_mean("factored:0.01", "H") == pytest.approx(0.01)
    assert added_to_mean("relative:0.1", "A") is None
    assert added_to_mean("relative:0.1", "H") == pytest.approx(0.1)
    assert added_to_mean("absolute:0.1", "H") is None


def test_the_folder_needs_nothing_but_itself(fitted, tmp_path):
    write_spectra(tmp_path / "out", described(fitted))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["curvature.html", "curvature.json", "spectra.svg"]
    page = (tmp_path / "out" / "curvature.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!#)", page)
    assert page.count("<tr") == 2 + 2 * len(LAYERS) + len(facts(described(fitted)))
    assert "100.0 %" in page
    svg = (tmp_path / "out" / "spectra.svg").read_text()
    assert all(word in svg for word in ("up", "down", "block 0", "block 1", "damping", "rank"))
    assert "nan" not in svg.lower()


def test_many_blocks_share_a_ramp_and_a_legend_of_three():
    """Seven blocks: blue at the first, orange at the last, and no layer without curvature fails."""
    layers = {f"h.{n}.up": LayerCurvature(f"h.{n}.up", factor(1.0, 2.0), factor(1.0, float(n)))
              for n in range(6)}  # fmt: skip
    layers["h.6.up"] = LayerCurvature("h.6.up", factor(0.0, 0.0), factor(0.0, 0.0))
    found = spectra(Curvature(layers, Counts(9, 9, 9), {}), Damping.parse("absolute:1"))
    names = short_names(list(layers))
    rows = [{"layer": names[one.name][1], "block": names[one.name][0],
             "curves": {k: vars(c) for k, c in one.curves.items()}} for one in found]  # fmt: skip
    svg = draw_spectra({"layers": rows, "damping": "absolute:1"}).svg
    assert [f"block {n}" in svg for n in (0, 1, 3, 6)] == [True, False, True, True]
    assert "damping" not in svg
