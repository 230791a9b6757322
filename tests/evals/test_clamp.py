"""What a report says of clamped features."""

import copy

from unlearn.evals.report.clamp import describe_clamp, draw_clamp
from unlearn.evals.report.limits import limits
from unlearn.evals.report.write import describe

READ = {"forget/nll": 1.5, "retain/nll": 0.5, "retain/kl": 0.05}
FEATURE = {
    "id": 7, "forget": 0.0212, "retain": 0.00004, "mean": 1.26,
    "examples": [{"before": "by\nMr", "token": "\n", "after": " <b>", "value": 3.0, "row": 2}] * 5,
}  # fmt: skip
CLAMP = {
    "mode": "clamp", "features": 1, "c": "3x", "tau": 0.01, "within": True, **READ,
    "start": {"forget/nll": 0.1, "retain/nll": 0.1, "retain/kl": 0.0},
    "budget": {"retain_kl": 0.1, "retain_rise": None}, "asked": 4,
    "settings": [
        {"features": 1, "c": "3x", "tau": 0.01, **READ, "within": True},
        {"features": 1, "c": 9.0, "tau": 0.01, "forget/nll": None, "retain/nll": None,
         "retain/kl": None, "within": False},
    ],
    "controls": [{"mode": "zero", **READ}, {"mode": "random", **READ}],
    "rows": {"forget": 9, "retain": 8},
    "dictionaries": [{"path": "d", "sha256": "", "layer": 4, "kind": "topk", "p99": 2.0, "c": 6.0,
                      "features": [FEATURE]}],
}  # fmt: skip


def test_features_settings_and_controls_are_told():
    found = describe_clamp({"edit": "sae", "clamp": CLAMP})
    assert found["line"] == "1 feature of layer 4; each is set to -c where it is active."
    (layer,) = found["layers"]
    assert layer["c"].startswith("c = 6.00 (3x the 99th percentile of these features, 2.00); the m")
    (feature,) = layer["features"]
    shown = [feature[name] for name in ("id", "forget", "retain", "mean")]
    assert shown == [7, "2.12 %", "0.00400 %", "1.26"]
    assert feature["passages"] == [{"before": "by\nMr", "token": "↵", "after": " <b>"}] * 3
    assert [one["word"] for one in found["settings"]] == ["beyond the budget", "taken"]
    assert (found["settings"][0]["forget_nll"], found["left_out"]) == ("–", 2)
    whos = [one["who"] for one in found["outcomes"]]
    assert whos[:3] == ["before", "clamped", "the same features set to 0"]
    assert draw_clamp({"clamp": CLAMP}).svg.startswith("<svg")
    assert describe_clamp({"edit": "kfade"}) is draw_clamp({"edit": "kfade"}) is None


def test_a_report_says_that_nothing_is_erased():
    training = {"edit": "sae", "clamp": copy.deepcopy(CLAMP), "steps": 1, "curve": []}
    run = describe({"method": "sae", "training": training, "metrics": {}, "details": {}})
    assert run["edit"]["clamp"]["layers"][0]["layer"] == 4
    assert run["limits"][0].startswith("Erasure.")
    assert limits([])[0].startswith("Whether the information is gone")
