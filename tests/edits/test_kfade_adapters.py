"""K-FADE on adapters: which matrices move when, what it comes to, and going on after a stop."""

import copy
import random

import pytest
import torch

from unlearn.data.encode import Example
from unlearn.edits.kfade import kfade
from unlearn.edits.update import Update, reapply
from unlearn.models import Lora, add_lora

pytestmark = pytest.mark.filterwarnings("ignore:.*loss tokens for factors")
HOW = {"forget_nll": 3.0, "steps": 3, "layers": "all-linear"}


def rows(number, seed):
    draw = random.Random(seed)
    ids = [[draw.randrange(3, 60) for _ in range(8)] for _ in range(number)]
    return [Example(one, [-100] * 3 + one[3:], 3, row) for row, one in enumerate(ids)]


DATA = {"forget": rows(4, 1), "retain": rows(25, 2)}
IDS = torch.tensor([row.input_ids for row in DATA["forget"] + DATA["retain"]])


@pytest.fixture(scope="module")
def memorised():
    """Train a model on the rows of both sets until it knows them."""
    from tests.conftest import build_model

    model = build_model(vocab_size=60).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


@pytest.fixture
def fresh(memorised):
    """Give a function that puts the same adapters on a copy each time."""

    def make():
        torch.manual_seed(0)
        return add_lora(copy.deepcopy(memorised), Lora(rank=4, alpha=8.0))

    return make


def matrices(model, which):
    named = model.named_parameters()
    return {name: one.detach().clone() for name, one in named if f".lora_{which}." in name}


def moved(model, start, which):
    """List which matrices of a kind are others than at the start: all, none or some of them."""
    before = matrices(start, which)
    return {not torch.equal(one, before[name]) for name, one in matrices(model, which).items()}


def test_b_moves_first_and_then_both(fresh):
    """While B is 0, A has neither gradient nor curvature; nothing else ever moves."""
    small = {"step_rule": "fixed", "step_size": 1e-6, "layers": "all-linear"}
    once = kfade(fresh(), DATA, **small, steps=1)
    assert (moved(once, fresh(), "A"), moved(once, fresh(), "B")) == ({False}, {True})
    events = []
    model = kfade(fresh(), DATA, events.append, **HOW)
    assert (moved(model, fresh(), "A"), moved(model, fresh(), "B")) == ({True}, {True})
    below = {n: one for n, one in fresh().named_parameters() if ".lora_" not in n}
    assert all(torch.equal(one, below[n]) for n, one in model.named_parameters() if n in below)
    steps = [event for event in events if event["event"] == "step"]
    assert steps[-1]["forget/nll"] == pytest.approx(3.0, abs=0.2)
    assert all(event["damping"][0] > 0 for event in steps)
    assert any(event["correction"] > 0 for event in steps)
    assert not [event for event in events if "curvature at all" in str(event.get("message"))]
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert trained == {n for n, one in fresh().named_parameters() if one.requires_grad}


def test_with_the_curvature_of_the_start_a_stays_and_one_warning_says_so(fresh):
    events = []
    with pytest.warns(UserWarning, match="no curvature at all"):
        model = kfade(fresh(), DATA, events.append, **HOW, refit=False)
    assert (moved(model, fresh(), "A"), moved(model, fresh(), "B")) == ({False}, {True})
    warned = [event for event in events if "curvature at all" in str(event.get("message"))]
    assert len(warned) == 1


def test_the_update_added_to_the_plain_model_is_the_merged_one(fresh, memorised):
    """Bit for bit where s is a power of two, as here: then sB·A is s·BA."""
    events = []
    merged = kfade(fresh(), DATA, events.append, **HOW).merge_and_unload()
    (told,) = [event for event in events if event["event"] == "update"]
    update = Update(told["weights"], {})
    again = reapply(copy.deepcopy(memorised), update, scale=1.0)
    assert {one.left.shape[1] for one in update.kept.values()} == {4}
    assert told["changed_share"] > 0.5
    for ours, theirs in zip(again.parameters(), merged.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    same, smaller = update.of_rank(4), update.of_rank(2)
    assert same.about["relative_error"] == 0
    assert same.kept == update.kept
    assert smaller.about["relative_error"] > 0


def test_an_interrupted_edit_goes_on_after_its_last_step(fresh, tmp_path):
    whole = kfade(fresh(), DATA, **HOW)

    def stop(event):
        if event["event"] == "step" and event["step"] == 3:
            raise KeyboardInterrupt

    keep, again = tmp_path / "steps", []
    with pytest.raises(KeyboardInterrupt):
        kfade(fresh(), DATA, stop, keep=keep, **HOW)
    model = kfade(fresh(), DATA, again.append, keep=keep, **HOW)
    assert [event["step"] for event in again if event["event"] == "step"] == [3]
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
