"""What a setting means, which are tried, and which of them is taken."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from unlearn.edits.clamping import (
    Budget,
    Measured,
    Search,
    Setting,
    Trial,
    best,
    grid,
    strength,
)
from unlearn.edits.sae import sae, settings_mistake
from unlearn.errors import RunFailed, UserError
from unlearn.sae.candidates import Candidates, Placed
from unlearn.sae.dictionary import Dictionary
from unlearn.sae.firings import Firings

START, NONE = Measured(1.0, 2.0, 0.0), Budget()
GIVEN = {
    "dictionary": "d", "features": 20, "c": "3x", "tau": 0.01, "mode": "clamp", "exclude": None,
    "retain_kl": None, "retain_rise": None,
}  # fmt: skip


def found(chosen):
    """Feature 4 fires with 1, 2, …, 100, feature 7 not at all, feature 1 once, with 1000."""
    values = np.array([1000.0, *range(100, 0, -1)])
    feature, places = np.array([1] + [4] * 100), np.arange(101)
    fired = Firings((1, 4, 7), feature, places, places, values)
    w = torch.eye(8)
    made = Dictionary("relu", w, torch.zeros(8), w, torch.zeros(8))
    return Candidates(Placed("d", 0, made), chosen, {}, fired)


def trial(nll, kl=0.0, retain=2.0, features=1, how=NONE):
    measured = Measured(nll, retain, kl)
    return Trial(Setting(features, 1.0, 0.01), measured, how.allows(measured, START))


def test_a_multiple_is_of_the_percentile_of_the_chosen_features_together():
    """The 99th percentile of 1 … 100 lies at place 98.01 of 0 … 99: 99.01."""
    one = found({0.01: (4, 7)})
    assert strength(one, (4,), "3x") == pytest.approx(3 * 99.01)
    assert strength(one, (4, 7), "0.5x") == pytest.approx(0.5 * 99.01)
    assert strength(one, (1, 4), "1x") == pytest.approx(100.0)  # 1 … 100 and 1000: place 99
    assert strength(one, (7,), 2) == 2.0
    with pytest.raises(UserError, match=r"of 'd' do not fire on the forget set, so c=3x means"):
        strength(one, (7,), "3x")


def test_the_greatest_forget_loss_within_both_bounds_is_taken():
    how = Budget(retain_kl=0.1, retain_rise=0.5)
    trials = [
        trial(2.0, 0.05, how=how), trial(5.0, 0.11, how=how), trial(4.0, 0.1, 2.6, how=how),
        trial(3.0, 0.1, 2.5, 7, how), trial(3.0, 0.0, how=how), trial(9.0, float("nan"), how=how),
    ]  # fmt: skip
    taken = best(trials, START, how)
    assert (taken.found.forget_nll, taken.setting.features) == (3.0, 7)


def test_nothing_within_names_the_nearest():
    how = Budget(0.1)
    with pytest.raises(RunFailed, match=r"stays within retain_kl 0.1: .* of 3 \(features 5, c 1.0"):
        best([trial(2.0, 0.3, how=how), trial(2.0, 0.2, features=5, how=how),
              trial(2.0, float("nan"), how=how)], START, how)  # fmt: skip


def test_what_is_no_number_is_never_taken_and_written_as_nothing():
    broken = trial(float("nan"), float("inf"))
    assert broken.told()["forget/nll"] is broken.told()["retain/kl"] is None
    with pytest.raises(RunFailed, match="stays within what a model can still compute"):
        best([broken], START, NONE)


def test_settings_that_clamp_the_same_or_nothing_are_tried_once():
    """tau 0.1 admits 4 and 1, tau 0.01 only 4, tau 0.001 nothing: of 12 settings 4 differ."""
    measured = []

    def measure(clamps):
        measured.append((clamps[0].features, clamps[0].offset))
        return Measured(1.0 + len(measured), 2.0, 0.0)

    bench = SimpleNamespace(measure=measure, start=START)
    one = found({0.1: (4, 1), 0.01: (4,)})
    search, events = Search(bench, [one], "clamp", Budget(1.0)), []
    taken = search.run(grid([1, 2], [1.0, 2.0], [0.001, 0.01, 0.1]), events.append)
    assert search.asked == 12
    assert measured == [((4,), 1.0), ((4,), 2.0), ((4, 1), 1.0), ((4, 1), 2.0)]
    assert taken is search.trials[-1]
    assert sum(event["event"] == "trial" for event in events) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c": [1.0, 2.0]}, "features, c and tau make 2 settings, .* set retain_kl or retain_rise"),
        ({"features": []}, "give at least one value of each"),
        ({"mode": "scale"}, "with mode scale it is a factor"),
        ({"dictionary": ["a", "b"], "exclude": [3]}, "write LAYER:FEATURE"),
    ],
)
def test_settings_that_do_not_go_together_are_told(change, message):
    assert re.search(message, settings_mistake(GIVEN | change))


def test_settings_that_go_together_pass():
    several = {"c": ["1x", 2.0], "retain_rise": 0.1}
    for change in ({}, several, {"exclude": [3]}, {"dictionary": ["a", "b"], "exclude": ["0:3"]}):
        assert settings_mistake(GIVEN | change) is None


def test_the_edit_needs_a_dictionary_and_retain_rows():
    with pytest.raises(UserError, match="needs retain rows"):
        sae(None, {"forget": []}, None)
