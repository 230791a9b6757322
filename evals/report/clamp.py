"""Clamped features of a sparse autoencoder: which, why, to what, and what else was tried."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter

from unlearn.evals.report.edit_steps import three
from unlearn.evals.report.labels import label_points
from unlearn.evals.report.plots import FAINT, LINES, PAPER, Plot, drawing, tidy, to_plot
from unlearn.evals.report.table import finite
from unlearn.evals.report.tradeoff import Point, mark

MODES = {
    "clamp": "set to -c where it is active",
    "zero": "set to 0 where it is active",
    "scale": "lowered by c times its value",
    "random": "a control: other directions, changed as much as the right ones would be",
}
CONTROLS = {
    "zero": "the same features set to 0",
    "random": "other directions, changed as much",
}
WHOLE = "the model keeps the whole encoder, which alone knows the k largest of a token"
SHOWN = 3
"""Passages of each feature that are shown; ``results.json`` has more."""
NOTE = (
    "Share of the tokens of each set that the feature is active on; mean: of its activations above "
    "0 on the forget set. The passages are those where it is strongest, with the token marked. A "
    "feature that fires on something else than what is to be forgotten can be vetoed: "
    "--set edit.exclude=[ID, …], with several layers ['LAYER:ID', …]."
)
SUPPRESSED = (
    "Nothing is erased: no weight has changed, and the base still knows all of it. The clamps "
    "work where unlearn loads the model; vLLM, llama.cpp and others cannot apply them."
)


def describe_clamp(training: Mapping[str, Any]) -> dict[str, Any] | None:
    """Give what the report says of clamped features; None where there are none."""
    clamp = training.get("clamp")
    if not clamp:
        return None
    return {
        "line": _line(clamp),
        "layers": [_layer(one, clamp) for one in clamp["dictionaries"]],
        "settings": _settings(clamp),
        "left_out": max(0, clamp["asked"] - len(clamp["settings"])),
        "outcomes": _outcomes(clamp),
        "note": NOTE,
        "suppressed": SUPPRESSED,
        "caption": _caption(clamp),
    }


def _line(clamp: Mapping[str, Any]) -> str:
    """Say in one sentence what was done."""
    number = sum(len(one["features"]) for one in clamp["dictionaries"])
    layers = ", ".join(str(one["layer"]) for one in clamp["dictionaries"])
    what = "feature" if number == 1 else "features"
    return f"{number} {what} of layer {layers}; each is {MODES[clamp['mode']]}."


def _layer(found: Mapping[str, Any], clamp: Mapping[str, Any]) -> dict[str, Any]:
    c = f"c = {three(finite(found['c']))}" if clamp["mode"] != "zero" else ""
    if isinstance(clamp["c"], str) and c:
        c += f" ({clamp['c']} the 99th percentile of these features, {three(finite(found['p99']))})"
    parts = [c, WHOLE if found["kind"] == "topk" else ""]
    return {
        "layer": found["layer"],
        "path": found["path"],
        "c": "; ".join(part for part in parts if part),
        "features": [_feature(one) for one in found["features"]],
    }


def _feature(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": found["id"],
        "forget": percent(found["forget"]),
        "retain": percent(found["retain"]),
        "mean": three(finite(found["mean"])),
        "passages": [
            {"before": one["before"], "token": _visible(one["token"]), "after": one["after"]}
            for one in found["examples"][:SHOWN]
        ],
    }


def _visible(token: str) -> str:
    """Show line breaks, which would be nothing to mark."""
    return token.replace("\n", "↵")


def percent(share: float) -> str:
    """Write a share of tokens, small ones too."""
    return f"{three(100 * share)} %"


def _settings(clamp: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give every setting that was measured, by rising forget loss."""
    chosen = {name: clamp[name] for name in ("features", "c", "tau")}
    return [
        {
            "features": one["features"],
            "c": one["c"] if isinstance(one["c"], str) else three(one["c"]),
            "tau": f"{one['tau']:g}",
            **_numbers(one),
            "word": _word(one, {name: one[name] for name in chosen} == chosen),
        }
        for one in sorted(clamp["settings"], key=lambda one: finite(one["forget/nll"]) or 0.0)
    ]


def _word(one: Mapping[str, Any], taken: bool) -> str:
    return "taken" if taken else "" if one["within"] else "beyond the budget"


def _numbers(found: Mapping[str, Any]) -> dict[str, str]:
    names = {"forget_nll": "forget/nll", "retain_nll": "retain/nll", "retain_kl": "retain/kl"}
    return {name: three(finite(found.get(key))) for name, key in names.items()}


def _outcomes(clamp: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give the start, what was taken, and the controls."""
    rows = [("before", clamp["start"]), ("clamped", clamp)]
    rows += [(CONTROLS[one["mode"]], one) for one in clamp["controls"]]
    return [{"who": who, **_numbers(found)} for who, found in rows]


def _caption(clamp: Mapping[str, Any]) -> str:
    rows = clamp["rows"]
    text = (
        f"Mean loss of {rows['forget']} forget rows, and KL(model before ‖ clamped) on "
        f"{rows['retain']} retain rows that the features were not chosen by; in nats per token. "
        "Filled: what was taken. Hollow: the controls with the same features."
    )
    if len(clamp["settings"]) > 1:
        text += " Small points: other settings."
    budget = clamp["budget"]["retain_kl"]
    return text + (f" Line across: the budget, a KL of {budget:g}." if budget else "")


def draw_clamp(training: Mapping[str, Any]) -> Plot | None:
    """Draw forget loss against KL for every setting and the controls; None without clamps."""
    clamp = training.get("clamp")
    if not clamp:
        return None
    others = [one for one in map(_point, clamp["settings"]) if one]
    controls = [_point(one, CONTROL_LABELS[one["mode"]]) for one in clamp["controls"]]
    taken, named = _point(clamp, "taken"), [one for one in controls if one]
    with drawing(3.4) as figure:
        axes = figure.subplots()
        axes.set_xlabel("forget loss, nats per token")
        axes.set_ylabel("KL on retain rows")
        axes.set_yscale("symlog", linthresh=_least([*others, *named]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        tidy(axes)
        axes.plot([p.x for p in others], [p.y for p in others], "o", color=FAINT, markersize=3.5)
        for one in named:
            mark(axes, one, fill=PAPER, edge=LINES[1])
        if taken:
            mark(axes, taken, fill=LINES[0], edge=LINES[0])
        if budget := clamp["budget"]["retain_kl"]:
            axes.axhline(budget, color=FAINT, linewidth=1.2, linestyle=(0, (6, 3)))
        axes.set_ylim(bottom=0)
        label_points(figure, axes, [*([taken] if taken else []), *named], others)
        return to_plot(figure, "clamp", "Forget loss and KL on retain rows by setting")


CONTROL_LABELS = {"zero": "set to 0", "random": "other directions"}


def _point(found: Mapping[str, Any], label: str = "") -> Point | None:
    x, y = finite(found["forget/nll"]), finite(found["retain/kl"])
    return None if x is None or y is None else Point(x, max(0.0, y), label)


def _least(points: Sequence[Point]) -> float:
    """Give where the scale becomes linear: at the smallest KL that is not tiny."""
    return min((one.y for one in points if one.y > 1e-4), default=1e-3)
