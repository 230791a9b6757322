"""K-FADE: a few uphill Gauss–Newton steps on the forget loss, in the metric of the retain KL."""

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from unlearn.curvature.damping import Damping, DampingText
from unlearn.curvature.distance import mean_nll
from unlearn.curvature.factors import Kind
from unlearn.curvature.fit import Curvature, FitSettings, fit_curvature, identity_of
from unlearn.curvature.kept import Kept
from unlearn.curvature.labels import Ascend, Fisher
from unlearn.curvature.layers import LayerSet, Tracked, find_layers
from unlearn.curvature.parts import Listen, LossOn, Parts, told
from unlearn.curvature.passes import Rows
from unlearn.curvature.rules import Rule, StepRule
from unlearn.curvature.steps import Weights
from unlearn.curvature.storage import load_curvature, save_curvature
from unlearn.data.encode import Example
from unlearn.edits.adapters import added_below
from unlearn.edits.ascent import Ascent
from unlearn.edits.update import stored_change
from unlearn.errors import UserError
from unlearn.models import weights_hash
from unlearn.ranks import Ranks
from unlearn.scores import Scorer


def kfade(  # noqa: PLR0913 - each is a key of the recipe's edit section
    model: Any,
    data: Mapping[str, Sequence[Example]],
    listen: Listen = lambda event: None,
    seed: int = 0,
    keep: Path | None = None,
    *,
    steps: PositiveInt = 4,
    step_rule: StepRule = "search",
    step_size: PositiveFloat | None = None,
    forget_nll: PositiveFloat | Literal["unseen"] | None = None,
    retain_kl: PositiveFloat | None = None,
    ascend: Ascend = "nll",
    curvature: Kind = "kfac",
    damping: DampingText = "factored:1e-3",
    trim: NonNegativeInt = 0,
    layers: LayerSet | list[str] = "mlp",
    refit: bool = True,
    correct: bool = True,
    fisher: Fisher = "importance",
    label_draws: PositiveInt = 1,
    loss_on: LossOn = "completion",
    retain_tokens: PositiveInt | None = 1_000_000,
    held_out: PositiveInt = 64,
    forget_rows: PositiveInt = 256,
    batch_tokens: PositiveInt = 8192,
    max_factor_dim: PositiveInt = 16384,
    factors: str | None = None,
    update_rank: PositiveInt | None = None,
) -> Any:
    """Raise the loss of the forget rows where that moves the outputs on the retain rows least.

    Each step is δ = (H + λI)⁻¹(αg − βr). g is the gradient of the mean forget loss (nats per
    token), r that of KL(start || model) per retain token, H the Gauss–Newton matrix of that KL; all
    are taken anew at every step. At the start r is 0: the first step is the paper's, α(H + λI)⁻¹g,
    up the loss. Weights of linear layers change, in place; biases, embeddings, norms and head do
    not. Source: McKinney et al. 2026, arXiv:2602.10568. Ours, and not the paper's: several steps,
    ``refit`` (without it H stays that of the start), ``correct`` (without it β is 0), the search
    for α, ``ascend``, the factored damping, the held-out KL, adapters, and all defaults.

    On a model with LoRA adapters (PEFT's) the two matrices of each are what changes, A and B with
    H blocks of their own, and the weights below stay. While B is 0, A has no gradient and no
    curvature, and does not move.

    ``ascend`` says what g raises: ``nll``, −log p of the tokens, as in the paper, whose gradient
    comes more and more from those that are lost already; or ``unlikelihood``, log(1 − p), which
    pulls at tokens that are still known. ``correct``: before a step the weights go down the KL
    along (H + λI)⁻¹r, half a Newton step or less, as long as that lowers it on held-out rows.

    ``step_rule``: ``search`` measures after trial steps and takes the longest that reaches its
    share of the way to ``forget_nll`` and stays within ``retain_kl`` (on ``held_out`` rows that H
    never sees); ``fixed`` takes α = ``step_size``; ``trust_region`` the α whose predicted KL is
    ``step_size``; ``influence`` α = (forget tokens / retain tokens) / steps, the Newton step to
    where retain rows alone would lead. Whatever the rule, the loop ends at ``forget_nll`` or
    ``retain_kl``. ``forget_nll="unseen"`` is the mean loss that the model has, at the start, on the
    rows ``data["unseen"]``: of the same kind, and never trained on.

    ``trim`` leaves that many of the largest eigenvalues out of the mean that λ is a share of;
    ``loss_on`` says which retain tokens count: what rows train, or ``all``. ``retain_tokens`` caps
    the labelled tokens that H is fitted to; ``forget_rows`` those rows that are measured.
    ``factors`` names a file for the curvature at the start: read when it is there, else written.
    ``listen`` is told of progress, a
    ``step`` after every step, and in the end an ``update``: what was added to each weight, in fp32,
    and the ``update_rank`` that it is to be kept in (None: whole).
    ``keep`` names a file for the steps taken so far: a later call with the same arguments goes on
    after the last of them, with the same result.
    """
    parts = Parts.of(data, held_out, retain_tokens, forget_rows, batch_tokens, loss_on)
    scorer = Scorer.for_model(model)
    goal = _goal(model, parts, scorer, forget_nll, listen)
    rule = Rule(step_rule, steps, step_size, goal, retain_kl)
    if why := rule.mistake():
        raise UserError(why)
    if parts.warning:
        listen({"event": "warning", "message": parts.warning})
    settings = FitSettings(curvature, fisher, label_draws, max_factor_dim, seed)
    tracked, lambdas = find_layers(model, layers), Damping.parse(damping, trim)
    rows = told(parts.fit, "curvature of the retain set", listen)
    start = weights_hash(model) if keep or factors else ""
    fit = _Fit(model, rows, tracked, settings, scorer, factors, start)
    how = (rule, lambdas, ascend, correct, refit)
    kept = Kept(keep, _identity(start, parts, tracked, settings, how)) if keep else None
    ascent = Ascent(model, parts, tracked, scorer, rule, lambdas, listen, ascend, correct, kept)
    with _warnings_told(listen):
        ascent.run(fit, refit=refit)
    listen({"event": "update", "rank": update_rank, **_added(model, tracked, ascent.weights)})
    return model


def _added(model: Any, layers: Sequence[Tracked], weights: Weights) -> dict[str, Any]:
    """Give what has been added to each weight, and what is left of it as weights are stored."""
    if below := added_below(model, layers):
        return below
    now = {layer.name: layer.weight for layer in layers}
    return {
        "weights": weights.changes(),
        **stored_change(weights.start, now, weights.total),
    }


def _goal(
    model: Any,
    parts: Parts,
    scorer: Scorer,
    forget_nll: float | Literal["unseen"] | None,
    listen: Listen,
) -> float | None:
    """Give the forget loss to be reached, measured on unseen rows where that is asked for."""
    if forget_nll != "unseen":
        return forget_nll
    if parts.unseen is None:
        raise UserError("forget_nll: unseen needs rows of the same kind", "give data.unseen")
    found = mean_nll(model, parts.unseen, scorer)
    listen({"event": "goal", "forget_nll": found, "rows": len(parts.unseen.examples)})
    return found


def _identity(
    start: str,
    parts: Parts,
    layers: Sequence[Tracked],
    settings: FitSettings,
    how: tuple[object, ...],
) -> dict[str, Any]:
    """Name all that the steps depend on."""
    found = identity_of(start, parts.fit.examples, layers, settings)
    read = (parts.forget, parts.measured, parts.held_out)
    rows = json.dumps([[one.hashed() for one in rows.examples] for rows in read])
    return found | {"read": hashlib.sha256(rows.encode()).hexdigest(), "how": repr(how)}


@contextmanager
def _warnings_told(listen: Listen) -> Iterator[None]:
    """Tell the listener of our own warnings too, and let all of them go on their way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for one in {(each.category, str(each.message)): each for each in caught}.values():
        if one.category is UserWarning:
            listen({"event": "warning", "message": str(one.message)})
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def settings_mistake(hyper: Mapping[str, Any]) -> str | None:
    """Say what is wrong with hyperparameters together, each of them right by itself."""
    goal = 1.0 if hyper["forget_nll"] == "unseen" else hyper["forget_nll"]
    rule = Rule(hyper["step_rule"], hyper["steps"], hyper["step_size"], goal, hyper["retain_kl"])
    unpredicted = hyper["curvature"] == "act" and rule.step_rule == "trust_region"
    if unpredicted:
        return "step_rule: trust_region needs a predicted KL, which curvature: act does not give"
    return rule.mistake()


@dataclass(frozen=True)
class _Fit:
    """Fits the curvature to the weights as they are; a file may keep that of the start."""

    model: Any
    rows: Rows
    layers: Sequence[Tracked]
    settings: FitSettings
    scorer: Scorer
    factors: str | None
    start: str
    """Hash of the weights that the edit begins with."""

    def __call__(self, at_start: bool) -> Curvature:
        fit = partial(
            fit_curvature, self.model, self.rows, self.layers, self.settings, scorer=self.scorer
        )
        if self.factors is None or not at_start:
            return fit()
        place, ranks = Path(self.factors), Ranks.of(self.model)
        identity = identity_of(self.start, self.rows.examples, self.layers, self.settings)
        if ranks.all(place.is_file()):
            return load_curvature(place, identity, device=self.model.device)
        found = fit(identity=identity)
        ranks.first(lambda: save_curvature(found, place))
        return found
