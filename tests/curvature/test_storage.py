"""Fitted curvature comes back as it was, and only to where it belongs."""

import dataclasses

import pytest
import torch
from safetensors import safe_open

from unlearn.curvature.fit import FitSettings, fit_curvature, identity_of
from unlearn.curvature.layers import find_layers
from unlearn.curvature.passes import Rows
from unlearn.curvature.storage import load_curvature, save_curvature
from unlearn.errors import UserError
from unlearn.models import weights_hash

pytestmark = pytest.mark.filterwarnings("ignore:.*loss tokens for factors")


def fitted(model, rows, settings):
    layers = find_layers(model)
    identity = identity_of(weights_hash(model), rows, layers, settings)
    return fit_curvature(model, Rows(rows), layers, settings, identity=identity)


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "tkfac", "act", "diag"])
def test_a_file_gives_back_what_was_fitted(llama, rows, tmp_path, kind):
    found = fitted(llama, rows, FitSettings(kind, max_factor_dim=5))
    save_curvature(found, tmp_path / "factors.safetensors")
    again = load_curvature(tmp_path / "factors.safetensors", found.identity)
    assert again.counts == found.counts
    assert list(again.layers) == list(found.layers)
    for name, one in found.layers.items():
        other = again.layers[name]
        assert (one.group, one.trace) == (other.group, other.trace)
        for side in ("inputs", "outputs", "input_basis", "output_basis"):
            ours, theirs = getattr(one, side), getattr(other, side)
            assert (ours is None) == (theirs is None)
            if ours:
                assert all(map(torch.equal, ours.parts, theirs.parts))
        if one.eigenvalues is not None:
            assert torch.equal(one.eigenvalues, other.eigenvalues)
    assert [path.name for path in tmp_path.iterdir()] == ["factors.safetensors"]


def test_shared_inputs_are_written_once(llama, rows, tmp_path):
    save_curvature(fitted(llama, rows, FitSettings()), tmp_path / "f")
    with safe_open(tmp_path / "f", framework="pt") as file:
        names = [name for name in file.keys() if ".layers.0." in name]  # noqa: SIM118
    kinds = sorted(name.split("mlp.")[1] for name in names)
    assert kinds == ["down_proj.inputs.0", "down_proj.outputs.0", "gate_proj.inputs.0",
                     "gate_proj.outputs.0", "up_proj.outputs.0"]  # fmt: skip


def test_a_file_of_something_else_is_refused(llama, rows, tmp_path, fresh_model, fresh_rows):
    settings, path = FitSettings(), tmp_path / "f"
    save_curvature(fitted(llama, rows, settings), path)
    other, layers = fresh_model(seed=1), find_layers(llama)
    attention = find_layers(llama, "attention")
    mine = weights_hash(llama)
    for identity, message in (
        (identity_of(weights_hash(other), rows, layers, settings), "another model"),
        (identity_of(mine, fresh_rows(seed=1), layers, settings), "other rows"),
        (identity_of(mine, rows, attention, settings), "other layers"),
        (identity_of(mine, rows, layers, dataclasses.replace(settings, seed=1)),
         "with seed 0, not 1"),
        (identity_of(mine, rows, layers, FitSettings("act")), "curvature kfac, not act"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_curvature(path, identity)


def test_files_that_hold_no_curvature_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "weights")
    (tmp_path / "torn").write_bytes(b"\x00" * 20)
    for name, message in (("weights", "holds no curvature"), ("torn", "cannot read")):
        with pytest.raises(UserError, match=message):
            load_curvature(tmp_path / name, {})
