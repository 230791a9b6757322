"""Fitted factors against a naive reference, and what they must not depend on."""

import random
import warnings

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from unlearn.curvature import blocks as blocks_module
from unlearn.curvature import factors as factors_module
from unlearn.curvature.blocks import Blocks
from unlearn.curvature.fit import FitSettings, fit_curvature, gradient
from unlearn.curvature.layers import find_layers
from unlearn.curvature.passes import Batch, Rows
from unlearn.errors import UserError
from unlearn.scores import Scorer

EXACT = {"rtol": 1e-10, "atol": 1e-12}
EMPIRICAL = FitSettings(fisher="empirical")
KINDS = ("kfac", "ekfac", "tkfac", "act", "diag")


def tensors(curvature):
    """Give everything that was fitted, by name."""
    found = {}
    for name, layer in curvature.layers.items():
        for kind in ("inputs", "outputs"):
            if blocks := getattr(layer, kind):
                found[f"{name} {kind}"] = blocks.dense()
        if layer.trace is not None:
            found[f"{name} trace"] = torch.tensor(layer.trace)
        if layer.eigenvalues is not None:
            found[f"{name} eigenvalues"] = layer.eigenvalues
    return found


def assert_same(first, second, **tolerance):
    ours, theirs = tensors(first), tensors(second)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], **(tolerance or EXACT))


@pytest.mark.filterwarnings("ignore:.*loss tokens for factors")
@pytest.mark.parametrize("seed", [None, 5], ids=["empirical", "sampled"])
def test_factors_are_those_of_one_row_at_a_time(any_model, rows, naive, seed):
    """A, G and the trace of every layer, for the rows' labels and for the same drawn ones."""
    layers = find_layers(any_model, "all-linear")
    fisher = "empirical" if seed is None else "mc"
    settings = FitSettings("tkfac", fisher, seed=seed or 0)
    found = fit_curvature(any_model, Rows(rows, batch_tokens=30), layers, settings)
    expected = naive(any_model, layers, rows, seed)
    assert found.counts.rows == len(rows)
    assert found.counts.labels == sum(label != -100 for row in rows for label in row.labels[1:])
    for layer in layers:
        inputs, outputs, gradients = expected[layer.name]
        one = found.layers[layer.name]
        torch.testing.assert_close(one.inputs.dense(), inputs, **EXACT)
        torch.testing.assert_close(one.outputs.dense(), outputs, **EXACT)
        norms = sum(float(u.square().sum()) for u in gradients)
        assert one.trace == pytest.approx(norms, rel=1e-10)


@pytest.mark.filterwarnings("ignore:.*loss tokens for factors")
def test_eigenvalues_are_squared_row_gradients_in_the_basis(any_model, rows, naive):
    layers = find_layers(any_model, "all-linear")
    full = fit_curvature(any_model, Rows(rows), layers, FitSettings("ekfac", "empirical"))
    plain = fit_curvature(any_model, Rows(rows), layers, FitSettings("diag", "empirical"))
    expected = naive(any_model, layers, rows, None)
    for layer in layers:
        inputs, _, gradients = expected[layer.name]
        one = full.layers[layer.name]
        left, right = one.output_basis.dense(), one.input_basis.dense()
        rotated = right.t() @ inputs @ right
        torch.testing.assert_close(rotated, rotated.diagonal().diag(), rtol=0, atol=1e-9)
        spectrum = sum((left.t() @ u @ right).square() for u in gradients)
        torch.testing.assert_close(one.eigenvalues, spectrum, rtol=1e-8, atol=1e-10)
        squares = sum(u.square() for u in gradients)
        torch.testing.assert_close(plain.layers[layer.name].eigenvalues, squares, **EXACT)


@pytest.mark.filterwarnings("ignore:.*loss tokens for factors")
@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_the_order_of_rows_change_nothing(llama, rows, kind):
    """Labels are drawn by a row's place in its set, so sets of one order are compared there."""
    layers = find_layers(llama, "all-linear")
    found = [
        fit_curvature(llama, Rows(rows, batch_tokens=tokens), layers, FitSettings(kind))
        for tokens in (1, 25, 1000)
    ]
    assert_same(found[0], found[1], rtol=1e-8, atol=1e-10)
    assert_same(found[0], found[2], rtol=1e-8, atol=1e-10)
    settings = FitSettings(kind, "empirical")
    shuffled = random.Random(1).sample(rows, len(rows))
    doubled = fit_curvature(llama, Rows(shuffled + rows), layers, settings)
    once = fit_curvature(llama, Rows(rows), layers, settings)
    assert_same(doubled, once, rtol=1e-8, atol=1e-10)


def test_padding_on_the_left_is_moved_to_the_right(rows):
    """A row of two tokens before and after padding; a pad position predicts nothing."""
    left = {
        "input_ids": torch.tensor([[0, 0, 7, 8, 9], [1, 2, 3, 4, 5]]),
        "labels": torch.tensor([[-100, -100, 7, 8, 9], [-100, -100, 3, 4, -100]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    }
    batch = Batch.of(left, [0, 1])
    assert batch.input_ids.tolist() == [[7, 8, 9, 0, 0], [1, 2, 3, 4, 5]]
    assert batch.loss.tolist() == [[True, True, False, False, False],
                                   [False, True, True, False, False]]  # fmt: skip
    assert batch.taking_part.tolist() == [[True, True, False, False, False],
                                          [True, True, True, False, False]]  # fmt: skip
    assert batch.label_places.targets.tolist() == [8, 9, 3, 4]
    assert batch.tokens_per_row == [2, 3]


@pytest.mark.filterwarnings("ignore:.*loss tokens for factors")
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_are_heard_once(fresh_model, rows, reentrant):
    """Also with two draws, which go back through the same forward pass twice."""
    settings = FitSettings("ekfac", label_draws=2)
    plain, recomputed = fresh_model(), fresh_model()
    recomputed.activation_checkpointing_enable({"use_reentrant": reentrant})
    found = [
        fit_curvature(one, Rows(rows), find_layers(one, "all-linear"), settings)
        for one in (plain, recomputed)
    ]
    assert_same(*found)
    assert not any(module.training for module in recomputed.modules())
    assert all(parameter.requires_grad for parameter in recomputed.parameters())


@pytest.mark.filterwarnings("ignore:.*loss tokens for factors")
def test_inputs_are_shared_where_layers_read_the_same(any_model, rows):
    layers = find_layers(any_model, "all-linear")
    found = fit_curvature(any_model, Rows(rows), layers, EMPIRICAL).layers
    by_leaf = {name.split(".", 3)[-1]: one for name, one in found.items() if ".0." in name}
    if "self_attn.q_proj" in by_leaf:
        assert by_leaf["self_attn.v_proj"].inputs is by_leaf["self_attn.q_proj"].inputs
        assert by_leaf["mlp.up_proj"].inputs is by_leaf["mlp.gate_proj"].inputs
        assert by_leaf["mlp.down_proj"].inputs is not by_leaf["mlp.gate_proj"].inputs
    else:
        assert len({id(one.inputs) for one in found.values()}) == len(found)


@pytest.mark.filterwarnings("ignore:.*loss tokens for factors")
def test_a_forward_pass_alone_gives_the_same_inputs(llama, rows):
    layers = find_layers(llama)
    act = fit_curvature(llama, Rows(rows), layers, FitSettings("act"))
    kfac = fit_curvature(llama, Rows(rows), layers, FitSettings("kfac"))
    for name, layer in act.layers.items():
        assert layer.outputs is None
        torch.testing.assert_close(layer.inputs.dense(), kfac.layers[name].inputs.dense(), **EXACT)


@pytest.mark.filterwarnings("ignore:.*loss tokens for factors")
def test_wide_axes_are_cut_into_blocks(llama, rows, monkeypatch):
    """12 into at most 5: widths 4, 4, 4, which are those blocks of the whole factor."""
    layers = find_layers(llama)
    whole = fit_curvature(llama, Rows(rows), layers, EMPIRICAL).layers
    cut = fit_curvature(
        llama, Rows(rows), layers, FitSettings(fisher="empirical", max_factor_dim=5)
    ).layers
    mask = torch.block_diag(*[torch.ones(4, 4)] * 3).double()
    name = "model.layers.0.mlp.down_proj"
    assert cut[name].inputs.widths == [4, 4, 4]
    torch.testing.assert_close(cut[name].inputs.dense(), whole[name].inputs.dense() * mask, **EXACT)
    assert cut[name].outputs.widths == [4, 4]
    monkeypatch.setattr(blocks_module, "TILED_FROM", {"cpu": 1})
    tiled = fit_curvature(llama, Rows(rows), layers, EMPIRICAL).layers
    for one, layer in tiled.items():
        torch.testing.assert_close(layer.inputs.dense(), whole[one].inputs.dense(), **EXACT)
        torch.testing.assert_close(layer.outputs.dense(), whole[one].outputs.dense(), **EXACT)


@pytest.mark.filterwarnings("ignore:.*loss tokens for factors")
def test_a_rescaling_that_changes_no_output_rescales_the_factors(fresh_model, rows):
    """up ← 3·up, down ← down/3: A of down is 9 times as large, G of up a ninth."""
    before, after = fresh_model(), fresh_model()
    with torch.no_grad():
        after.model.layers[0].mlp.up_proj.weight.mul_(3)
        after.model.layers[0].mlp.down_proj.weight.div_(3)
    old, new = (
        fit_curvature(one, Rows(rows), find_layers(one), EMPIRICAL).layers
        for one in (before, after)
    )
    mlp = "model.layers.0.mlp"
    for name, side, factor in (
        ("down_proj", "inputs", 9.0), ("up_proj", "outputs", 1 / 9),
        ("up_proj", "inputs", 1.0), ("down_proj", "outputs", 1.0),
    ):  # fmt: skip
        traces = [getattr(one[f"{mlp}.{name}"], side).trace() for one in (old, new)]
        assert traces[1] == pytest.approx(factor * traces[0], rel=1e-9)


def test_the_gradient_is_that_of_the_mean_loss(any_model, rows):
    """Against autograd on full logits, for any split into batches."""
    layers = find_layers(any_model, "all-linear")
    found = gradient(any_model, Rows(rows, batch_tokens=30), layers)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        logits = any_model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0]
        labels = torch.tensor(row.labels[1:])
        total = total + torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="sum")
        count += int((labels != -100).sum())
    (total / count).backward()
    assert found.num_labels == count
    for layer in layers:
        grad = layer.module.weight.grad
        grad = grad.t() if isinstance(layer.module, Conv1D) else grad
        # the norms of a Llama compute in float32, whatever its weights are
        torch.testing.assert_close(found.weights[layer.name], grad, rtol=1e-5, atol=1e-6)


def test_too_few_tokens_are_said_and_enough_are_not(llama, rows, fresh_rows):
    layers = find_layers(llama)
    with pytest.warns(UserWarning, match="loss tokens for factors of up to 12 dimensions.*96 are"):
        fit_curvature(llama, Rows(rows), layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_curvature(llama, Rows(fresh_rows(20)), layers)


def test_rows_without_labels_and_weights_that_overflow_are_refused(llama, rows):
    from dataclasses import replace

    layers = find_layers(llama)
    nothing = [replace(row, labels=[-100] * len(row.labels)) for row in rows]
    with pytest.raises(UserError, match="no labelled token"):
        fit_curvature(llama, Rows(nothing), layers)
    with pytest.raises(UserError, match="no labelled token"):
        gradient(llama, Rows(nothing), layers)
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight.fill_(float("inf"))
    with (
        pytest.warns(UserWarning, match="loss tokens"),
        pytest.raises(UserError, match="is not finite"),
    ):
        fit_curvature(llama, Rows(rows), layers)


@pytest.mark.filterwarnings("ignore:.*loss tokens for factors")
def test_full_logits_give_the_same_factors(llama, rows):
    """For a model whose head cannot be called apart."""
    layers = find_layers(llama)
    ours, theirs = (
        fit_curvature(llama, Rows(rows), layers, FitSettings("ekfac"), scorer=scorer)
        for scorer in (Scorer.for_model(llama), Scorer(None))
    )
    assert_same(ours, theirs, rtol=1e-8, atol=1e-10)


def test_sums_of_bfloat16_rows_are_taken_in_float32():
    """400 batches: sums in bfloat16 would stop growing after 256 of them."""
    rows = torch.ones(400, 3, dtype=torch.bfloat16)
    found = Blocks.zeros(3, 16384, dtype=torch.float32, device="cpu")
    for row in rows.split(1):
        found.add_rows(row)
    assert torch.equal(found.finished(400).dense(), torch.ones(3, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 4608])
def test_sums_of_bfloat16_on_cuda_are_those_of_float32(size):
    rows = torch.randn(500, size, device="cuda", dtype=torch.bfloat16)
    found = Blocks.zeros(size, 16384, dtype=torch.float32, device="cuda")
    for part in rows.split(100):
        found.add_rows(part)
    exact = rows.double().t() @ rows.double() / 500
    ours = found.finished(500).dense().double()
    assert (ours - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.filterwarnings("ignore:.*loss tokens for factors")
def test_a_backward_pass_ends_at_the_lowest_layer(llama, rows):
    """Nothing below the lowest layer that is tracked is asked for a gradient."""
    asked = []
    below = llama.model.layers[0]
    below.register_forward_hook(lambda module, inputs, out: asked.append(out.requires_grad))
    fit_curvature(llama, Rows(rows), find_layers(llama, blocks=(1, 1)), EMPIRICAL)
    assert asked
    assert not any(asked)


@pytest.mark.filterwarnings("ignore:.*loss tokens for factors")
def test_factors_that_are_not_finite_are_told_before_they_are_decomposed(llama, rows):
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="is not finite"):
        fit_curvature(llama, Rows(rows), find_layers(llama), FitSettings("ekfac", "empirical"))


@pytest.mark.filterwarnings("ignore:.*loss tokens for factors")
def test_tokens_and_sums_of_rows_are_rotated_to_the_same(llama, rows, monkeypatch):
    layers = find_layers(llama, "all-linear")
    found = []
    for choice in (True, False):
        monkeypatch.setattr(factors_module, "_rotates_tokens", lambda *given, it=choice: it)
        found.append(fit_curvature(llama, Rows(rows), layers, FitSettings("ekfac", "empirical")))
    assert_same(*found, rtol=1e-8, atol=1e-10)
