"""An update is added again as long as it has to be, and no longer."""

import copy
import random

import pytest
import torch

from unlearn.curvature.distance import Reference, mean_nll
from unlearn.curvature.passes import Rows
from unlearn.data.encode import Example
from unlearn.edits.reapply import FIRST, LARGEST, reapply, settings_mistake
from unlearn.edits.update import Update, save_update
from unlearn.errors import RunFailed, UserError
from unlearn.models import weights_hash
from unlearn.scores import Scorer


def rows(seed):
    draw = random.Random(seed)
    ids = [[draw.randrange(3, 60) for _ in range(8)] for _ in range(6)]
    return [Example(one, [-100] * 3 + one[3:], 3, row) for row, one in enumerate(ids)]


DATA = {"forget": rows(1), "retain": rows(2)}


@pytest.fixture(scope="module")
def start():
    from tests.conftest import build_model

    return build_model(vocab_size=60)


@pytest.fixture(scope="module")
def uphill(start):
    """Give the gradient of the forget loss, of norm 1: added, it raises the loss."""
    model = copy.deepcopy(start)
    ids, labels = (
        torch.tensor([getattr(row, name) for row in DATA["forget"]])
        for name in ("input_ids", "labels")
    )
    model(input_ids=ids, labels=labels).loss.backward()
    weights = {name: one.grad for name, one in model.named_parameters() if ".mlp." in name}
    norm = sum(one.square().sum() for one in weights.values()).sqrt()
    return {name: one / norm for name, one in weights.items()}


@pytest.fixture
def again(start, uphill, tmp_path):
    """Give a function that adds the gradient at a length: the model and what was told."""

    def add(length, **hyper):
        weights = {name: length * one for name, one in uphill.items()}
        place = tmp_path / "update.safetensors"
        save_update(Update(weights, {"edit": "kfade", "start": weights_hash(start)}), place)
        model, events = copy.deepcopy(start), []
        try:
            reapply(model, DATA, events.append, update=str(place), **hyper)
        except RunFailed as error:
            assert weights_hash(model) == weights_hash(start)
            raise error from None
        return model, events, weights

    return add


def measured(start, model):
    """Measure in the plainest way: one model that first has the one's weights, then the other's."""
    here = copy.deepcopy(start)
    scorer = Scorer.for_model(here)
    reference = Reference.of(here, Rows(DATA["retain"]), scorer)
    here.load_state_dict(model.state_dict())
    return mean_nll(here, Rows(DATA["forget"]), scorer), reference.kl(here)


def kinds(events, kind):
    return [event for event in events if event["event"] == kind]


def test_the_search_reaches_the_goal_and_leaves_the_scaled_update(again, start):
    first = measured(start, start)[0]
    model, events, weights = again(8.0, forget_nll=first + 0.1)
    (step,), (told,) = kinds(events, "step"), kinds(events, "update")
    assert step["forget/nll"] == pytest.approx(first + 0.1, abs=0.05 * 0.1 + 1e-6)
    assert (step["forget/nll"], step["retain/kl"]) == pytest.approx(measured(start, model))
    assert step["gain"] == pytest.approx(step["forget/nll"] - first)
    assert (step["kl_spent"], step["kl_budget"]) == (step["retain/kl"], None)
    trials = kinds(events, "trial")
    assert trials[0]["scale"] == FIRST
    assert len(trials) == step["evaluations"] == len(told["trials"]) <= 8
    assert told["scale"] == step["alpha"] < 1
    assert (told["missed"], told["is_start"]) == ("", True)
    for name, one in model.named_parameters():
        before = dict(start.named_parameters())[name]
        expected = before + told["scale"] * weights[name] if name in weights else before
        assert torch.equal(one, expected)
        assert name not in weights or torch.equal(
            told["weights"][name], told["scale"] * weights[name]
        )
    assert told["changed_share"] > 0.9
    assert told["rounding"] == 0.0


def test_the_bound_on_the_kl_is_kept_and_a_goal_beyond_it_is_told_as_missed(again, start):
    model, events, _ = again(8.0, forget_nll=30.0, retain_kl=0.02)
    assert 0.01 < measured(start, model)[1] <= 0.02
    (warning,) = kinds(events, "warning")
    assert "below forget_nll 30" in warning["message"]
    assert kinds(events, "update")[0]["missed"] in warning["message"]


def test_no_scale_beyond_the_longest_is_tried(again):
    _, events, _ = again(0.01, forget_nll=30.0)
    assert [event["scale"] for event in kinds(events, "trial")] == [0.25, 1.0, LARGEST]
    assert kinds(events, "step")[0]["alpha"] == LARGEST


def test_where_no_scale_stays_within_bounds_nothing_is_changed(again):
    with pytest.raises(RunFailed, match="the least of 8 tried"):
        again(1e14, retain_kl=1e-3)
    with pytest.raises(RunFailed, match="does not raise the forget loss"):
        again(-8.0, forget_nll=30.0)
    with pytest.raises(RunFailed, match="there is nothing to be added"):
        again(8.0, forget_nll=1.0)


def test_a_number_is_taken_and_measured_whatever_the_goals(again, start):
    model, events, _ = again(8.0, scale=0.5, retain_kl=1e-6)
    (step,), (told,) = kinds(events, "step"), kinds(events, "update")
    assert (step["forget/nll"], step["retain/kl"]) == pytest.approx(measured(start, model))
    assert (step["alpha"], step["evaluations"]) == (0.5, 1)
    assert "above retain_kl 1e-06" in told["missed"]


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({}, "scale: search needs a goal"),
        ({"scale": 0.0}, "must be search or a finite number other than 0"),
        ({"scale": float("nan")}, "must be search or a finite number"),
        ({"scale": 1.0}, None),
        ({"retain_kl": 0.1}, None),
    ],
)
def test_settings_that_make_no_sense_are_told(hyper, message):
    given = {"scale": "search", "forget_nll": None, "retain_kl": None} | hyper
    found = settings_mistake(given)
    assert found is None if message is None else message in found


def test_what_is_missing_is_asked_for(start, tmp_path):
    with pytest.raises(UserError, match="needs update"):
        reapply(start, DATA, retain_kl=0.1)
    with pytest.raises(UserError, match="needs retain rows"):
        reapply(start, {"forget": DATA["forget"]}, update="a", retain_kl=0.1)
