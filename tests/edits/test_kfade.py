"""K-FADE on a tiny model that has memorised a few rows."""

import copy
import random
import re
from itertools import pairwise

import pytest
import torch

from unlearn.curvature.parts import Parts, num_labels
from unlearn.curvature.rules import Rule
from unlearn.curvature.steps import Reading
from unlearn.data.encode import Example
from unlearn.edits import find
from unlearn.edits.kfade import kfade
from unlearn.errors import RunFailed, UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*loss tokens for factors")


def rows(number, seed):
    draw = random.Random(seed)
    found = []
    for row in range(number):
        ids = [draw.randrange(3, 60) for _ in range(8)]
        found.append(Example(ids, [-100] * 3 + ids[3:], 3, row))
    return found


DATA = {"forget": rows(4, 1), "retain": rows(25, 2)}


@pytest.fixture(scope="module")
def memorised():
    """Train a model on the rows of both sets until it knows them."""
    from tests.conftest import build_model

    model = build_model(vocab_size=60).train()
    every = DATA["forget"] + DATA["retain"]
    ids = torch.tensor([row.input_ids for row in every])
    labels = torch.tensor([row.labels for row in every])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(input_ids=ids, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.3
    return model.eval()


@pytest.fixture
def edit(memorised):
    """Give a function that edits a copy: the model and what was told."""

    def apply(**hyper):
        events = []
        model = kfade(copy.deepcopy(memorised), DATA, events.append, **hyper)
        return model, [event for event in events if event["event"] == "step"]

    return apply


@torch.no_grad()
def loss(model, name):
    ids = torch.tensor([row.input_ids for row in DATA[name]])
    labels = torch.tensor([row.labels for row in DATA[name]])
    return float(model(input_ids=ids, labels=labels).loss)


def test_the_forget_loss_rises_to_its_goal_step_by_step(edit, memorised):
    model, steps = edit(forget_nll=3.0, steps=3)
    losses = [loss(memorised, "forget"), *(event["forget/nll"] for event in steps)]
    rises = [after - before for before, after in pairwise(losses)]
    assert [event["step"] for event in steps] == [1, 2, 3]
    assert all(rise > 0 for rise in rises)
    assert loss(model, "forget") == pytest.approx(3.0, abs=0.2)
    assert loss(model, "forget") == pytest.approx(steps[-1]["forget/nll"], rel=1e-4)
    retained = loss(model, "retain") - loss(memorised, "retain")
    assert retained < 0.5 * (loss(model, "forget") - loss(memorised, "forget"))
    assert all(1 <= event["evaluations"] <= 8 for event in steps)


def test_curvature_keeps_more_of_the_retain_set_than_the_plain_gradient(edit):
    """At the same forget loss; damping of 1e9 makes the metric the identity."""
    kept = [edit(forget_nll=3.0, damping=text, layers="all-linear")[1][-1]["retain/kl"]
            for text in ("factored:1e-3", "absolute:1e9")]  # fmt: skip
    assert kept[0] < 0.2 * kept[1]


def test_the_kl_is_never_exceeded(edit):
    _, steps = edit(forget_nll=20.0, retain_kl=0.05)
    assert 0 < steps[-1]["retain/kl"] <= 0.05
    assert all(event["retain/kl"] <= 0.05 for event in steps)
    only = edit(retain_kl=0.05)[1]
    assert 0.04 <= only[-1]["retain/kl"] <= 0.05


def test_only_chosen_weights_change(edit, memorised):
    model, _ = edit(forget_nll=2.0, steps=1, layers=["down_proj"])
    changed = {name for name, one in model.named_parameters()
               if not torch.equal(one, dict(memorised.named_parameters())[name])}  # fmt: skip
    assert changed == {f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1)}
    assert all(one.requires_grad for one in model.parameters())


def test_fixed_steps_are_taken_as_given_and_uphill(edit, memorised):
    """A small α: the measured gain is the predicted one; the sign is plus."""
    _, steps = edit(step_rule="fixed", step_size=1e-6, steps=1)
    gain = steps[0]["forget/nll"] - loss(memorised, "forget")
    assert steps[0]["alpha"] == 1e-6
    assert gain > 0
    assert gain == pytest.approx(steps[0]["predicted_gain"], rel=0.1, abs=1e-5)


def test_a_trust_region_is_a_predicted_kl(edit):
    _, steps = edit(step_rule="trust_region", step_size=1e-4, steps=2)
    assert [event["predicted_kl"] for event in steps] == pytest.approx([1e-4, 1e-4])


def test_influence_is_the_ratio_of_tokens_over_the_steps(edit):
    """4 forget rows and 20 fitted retain rows of 5 labelled tokens, two steps."""
    _, steps = edit(step_rule="influence", steps=2, retain_kl=1e9, damping="relative:10")
    assert [event["alpha"] for event in steps] == [0.1, 0.1]


@pytest.mark.parametrize("kind", ["ekfac", "tkfac", "act", "diag"])
def test_every_kind_of_curvature_forgets(edit, kind):
    _, steps = edit(forget_nll=2.5, curvature=kind, damping="relative:1e-2", refit=True, steps=2)
    assert steps[-1]["forget/nll"] == pytest.approx(2.5, abs=0.3)
    assert (steps[-1]["predicted_kl"] is None) == (kind == "act")


@pytest.mark.parametrize("refit", [True, False])
def test_an_interrupted_edit_goes_on_after_its_last_step(memorised, tmp_path, refit):
    """Stopped while step 3 is told of: two steps are kept, and the weights are those of one go."""
    how = {"forget_nll": 3.0, "steps": 3, "layers": "all-linear", "refit": refit}
    told = []
    whole = kfade(copy.deepcopy(memorised), DATA, told.append, **how)

    def stop(event):
        if event["event"] == "step" and event["step"] == 3:
            raise KeyboardInterrupt

    keep = tmp_path / "steps"
    with pytest.raises(KeyboardInterrupt):
        kfade(copy.deepcopy(memorised), DATA, stop, keep=keep, **how)
    again = []
    model = kfade(copy.deepcopy(memorised), DATA, again.append, keep=keep, **how)
    (last,) = [event for event in again if event["event"] == "step"]
    expected = [event for event in told if event["event"] == "step"][2]
    measured = ("step", "alpha", "forget/nll", "retain/kl", "correction", "corrected_kl")
    assert [last[name] for name in measured] == [expected[name] for name in measured]
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    other = []
    kfade(copy.deepcopy(memorised), DATA, other.append, keep=keep, **how | {"forget_nll": 2.0})
    assert [event["step"] for event in other if event["event"] == "step"] == [1, 2, 3]


def test_a_goal_is_measured_on_unseen_rows(memorised):
    """Rows of other random tokens; without them the goal cannot be had."""
    unseen, events = rows(6, 9), []
    kfade(copy.deepcopy(memorised), DATA | {"unseen": unseen}, events.append, forget_nll="unseen")
    (goal,) = [event for event in events if event["event"] == "goal"]
    ids = torch.tensor([row.input_ids for row in unseen])
    labels = torch.tensor([row.labels for row in unseen])
    with torch.no_grad():
        expected = float(memorised(input_ids=ids, labels=labels).loss)
    assert goal["forget_nll"] == pytest.approx(expected, rel=1e-5)
    last = [event for event in events if event["event"] == "step"][-1]
    assert last["forget/nll"] == pytest.approx(expected, rel=0.05)
    with pytest.raises(UserError, match="needs rows of the same kind"):
        kfade(copy.deepcopy(memorised), DATA, forget_nll="unseen")


def test_a_correction_only_ever_lowers_the_kl(edit):
    _, steps = edit(forget_nll=3.0, steps=4, layers="all-linear")
    before = [event["retain/kl"] for event in steps[:-1]]
    after = [event["corrected_kl"] for event in steps[1:]]
    assert all(later <= earlier for later, earlier in zip(after, before, strict=True))
    assert any(event["correction"] > 0 for event in steps)
    assert steps[0]["correction"] == 0
    _, plain = edit(forget_nll=3.0, steps=4, layers="all-linear", correct=False)
    assert steps[-1]["retain/kl"] < plain[-1]["retain/kl"]


def test_all_tokens_of_retain_rows_may_count():
    """Rows of 8 tokens whose first 3 are a prompt: 5 of them are labelled, or 7 can be."""
    kept = [num_labels(Parts.of(DATA, 5, None, 10, 100, on).fit.examples)
            for on in ("completion", "all")]  # fmt: skip
    assert kept == [20 * 5, 20 * 7]


def test_kept_factors_give_the_same_step(edit, tmp_path):
    place = str(tmp_path / "factors.safetensors")
    first = edit(step_rule="fixed", step_size=1e-5, steps=1, factors=place)
    second = edit(step_rule="fixed", step_size=1e-5, steps=1, factors=place)
    for ours, theirs in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(UserError, match="with curvature kfac, not act"):
        edit(step_rule="fixed", step_size=1e-5, factors=place, curvature="act")


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({}, "search needs a goal"),
        ({"step_rule": "fixed"}, "fixed needs step_size"),
        ({"step_size": 1.0, "forget_nll": 3.0}, "which step_rule: search does not use"),
        ({"forget_nll": 3.0, "layers": ["nothing"]}, "found in no layer's name"),
        ({"forget_nll": 3.0, "layers": ["(up_proj"]}, "no regular expression"),
        ({"forget_nll": 3.0, "layers": ["layernorm"]}, "(LlamaRMSNorm), but in the name of no"),
    ],
)
def test_what_cannot_be_followed_is_refused(edit, hyper, message):
    with pytest.raises(UserError, match=re.escape(message)):
        edit(**hyper)


def test_factors_that_cannot_be_inverted_take_no_step(memorised):
    """One retain row of 5 tokens for matrices of 32 and 48 dimensions; 1e-30 damps nothing."""
    data = {"forget": DATA["forget"], "retain": DATA["retain"][:1]}
    model, how = copy.deepcopy(memorised), {"forget_nll": 8.0, "damping": "absolute:1e-30"}
    with pytest.raises(RunFailed, match="singular"):
        kfade(model, data, **how)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, memorised.get_parameter(name))


@pytest.mark.filterwarnings("default")
def test_too_few_retain_rows_are_told(memorised):
    """20 fitted rows of 5 labelled tokens for factors of 48 dimensions: 100 are enough for 50."""
    events = []
    data = {"forget": DATA["forget"], "retain": DATA["retain"][:10]}
    with pytest.warns(UserWarning, match="40 loss tokens for factors of up to 48"):
        kfade(copy.deepcopy(memorised), data, events.append, step_rule="fixed", step_size=1e-6,
              steps=1)  # fmt: skip
    (told,) = [event["message"] for event in events if event["event"] == "warning"]
    assert "give more retain rows" in told


def test_a_goal_that_is_reached_already_leaves_nothing_to_do(edit):
    with pytest.raises(RunFailed, match="already end at"):
        edit(forget_nll=1e-4)


def test_retain_rows_are_held_out_and_capped():
    """25 rows: 5 held out at equal distances, 20 of 5 tokens left; at most 40 tokens: 8 rows."""
    parts = Parts.of(DATA, 64, 40, 3, 100)
    assert [row.row for row in parts.held_out.examples] == [0, 5, 10, 15, 20]
    assert num_labels(parts.fit.examples) == 40
    assert not {row.row for row in parts.fit.examples} & {0, 5, 10, 15, 20}
    assert len(parts.measured.examples) == 3
    few = Parts.of({"forget": DATA["forget"], "retain": DATA["retain"][:3]}, 64, None, 3, 100)
    assert "too few retain rows" in few.warning
    assert few.held_out.examples == few.fit.examples == DATA["retain"][:3]
    with pytest.raises(UserError, match="needs retain rows"):
        Parts.of({"forget": DATA["forget"]}, 64, None, 3, 100)


def test_steps_share_what_is_left_of_the_way():
    """From 1 to 4 in three steps: 2 first; at 2.5 with two to go, 3.25."""
    rule = Rule("search", 3, None, 4.0, 0.1)
    assert rule.goal(1, Reading(1.0, 0.0)).nll == 2.0
    assert rule.goal(2, Reading(2.5, 0.0)).nll == 3.25
    assert rule.ends(Reading(3.99, 0.0)) == "forget_nll reached"
    assert rule.ends(Reading(1.0, 0.0995)) == "retain_kl reached"
    assert rule.ends(Reading(1.0, 0.05)) is None


def test_the_table_says_that_it_trains_nothing():
    edit = find("kfade")
    assert edit.asks("data")
    assert edit.asks("listen")
    assert not edit.asks("tuned")
    assert edit.hyper["steps"] == 4
