"""The update that leads from one model to another: what fine-tuning, or any edit, has changed."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from unlearn.curvature.factors import accumulated
from unlearn.edits.update import Remainder, Update, changed_share, has_adapters
from unlearn.errors import UserError
from unlearn.head import plain
from unlearn.models import weights_hash

SAME = "give two models of one architecture and size, for instance before and after a fine-tuning"


@torch.no_grad()
def between(start: Any, edited: Any) -> Update:
    """Make the update that turns ``start`` into ``edited``: differences of the weights that differ.

    Added once to ``start`` it gives ``edited``, bit for bit, in fp32 and in bf16 (but a weight that
    became -0 becomes 0). A difference rounded to fp32 does not always lead back: where a weight
    shrinks by orders of magnitude or changes its sign, digits are lost. What is missing there is
    kept as a remainder.

    Raises:
        UserError: another architecture, other weights or shapes, adapters, 4-bit weights, weights
            that are not finite, or no difference at all.
    """
    ours, theirs = check_alike(start, edited)
    changes: dict[str, Tensor] = {}
    remainders: dict[str, Remainder] = {}
    for name, before in ours.items():
        after = theirs[name].to(before.device)
        if torch.equal(before, after):
            continue
        if not (before.isfinite().all() and after.isfinite().all()):
            raise UserError(f"'{name}' has NaN or infinite values", "give models that are whole")
        changes[name], rest = _difference(before, after)
        if len(rest.places):
            remainders[name] = rest
    if not changes:
        raise UserError(
            "both models have the same weights: there is no update", "give another model"
        )
    about = {"edit": "difference", "hyper": {}, "start": weights_hash(plain(start))}
    return Update(changes, about, remainders)


def check_alike(start: Any, edited: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Give the weights of two models by name; refuse models that no update leads between.

    Models on the meta device will do: values are not read.

    Raises:
        UserError: names what is different.
    """
    for model in (start, edited):
        if has_adapters(model):
            raise UserError("a model has adapters, which are no weights yet", "merge them first")
    kinds = [type(plain(model)).__name__ for model in (start, edited)]
    if kinds[0] != kinds[1]:
        raise UserError(f"the start is a {kinds[0]}, the edited model a {kinds[1]}", SAME)
    ours, theirs = (dict(plain(model).named_parameters()) for model in (start, edited))
    for name in sorted(ours.keys() ^ theirs.keys()):
        which = "start" if name in ours else "edited model"
        raise UserError(f"only the {which} has a weight '{name}'", SAME)
    for name, one in ours.items():
        first, second = list(one.shape), list(theirs[name].shape)
        if first != second:
            raise UserError(f"'{name}' is {first} in the start, {second} in the edited model", SAME)
        if not (one.is_floating_point() and theirs[name].is_floating_point()):
            raise UserError(
                f"'{name}' is quantised: differences of 4-bit weights mean nothing",
                "give the models before they were quantised",
            )
    return ours, theirs


def _difference(before: Tensor, after: Tensor) -> tuple[Tensor, Remainder]:
    """Give the difference in at least fp32, and what it lacks to lead exactly to ``after``.

    One remainder is enough: start + difference is so near to the goal that their own difference is
    exact (Sterbenz 1974), or it is 0 and the goal itself remains.
    """
    wide = accumulated(torch.promote_types(before.dtype, after.dtype))
    start, goal = before.to(wide), after.to(wide)
    change = goal - start
    change[start == goal] = -0.0  # x + -0 is x for every x; -0 + 0 would be 0
    reached = start + change
    places = (reached != goal).view(-1).nonzero().view(-1)
    values = (goal - reached).view(-1)[places]
    return change, Remainder(places.to(_index_type(before.numel())), values)


def _index_type(number: int) -> torch.dtype:
    return torch.int32 if number < 2**31 else torch.int64


@torch.no_grad()
def described(start: Any, edited: Any, update: Update) -> dict[str, Any]:
    """Say what an update between two models changes, the largest first; norms are Frobenius's.

    ``relative`` is ‖Δ‖ / ‖start‖, of all weights or of one; ``changed_share`` the share of entries
    with another value, of the weights that changed, as they are and rounded to bf16.
    """
    ours, theirs = (dict(plain(model).named_parameters()) for model in (start, edited))
    layers = [_layer(name, ours[name], theirs[name]) for name in update.kept]
    layers.sort(key=lambda one: -one["norm"])
    norm = sum(one["norm"] ** 2 for one in layers) ** 0.5
    whole = sum(_norm(one) ** 2 for one in ours.values()) ** 0.5
    changed = {name: theirs[name] for name in update.kept}
    return {
        "weights": len(layers),
        "of": len(ours),
        "norm": norm,
        "relative": norm / whole,
        "changed_share": changed_share(ours, changed),
        "changed_share_bfloat16": changed_share(
            _rounded(ours, changed), _rounded(changed, changed)
        ),
        "rank": update.about.get("rank"),
        "relative_error": update.about.get("relative_error", 0.0),
        "layers": layers,
    }


def _layer(name: str, before: Tensor, after: Tensor) -> dict[str, Any]:
    after = after.to(before.device)
    wide = accumulated(torch.promote_types(before.dtype, after.dtype))
    norm, whole = _norm(after.to(wide) - before.to(wide)), _norm(before)
    return {
        "weight": name,
        "shape": list(before.shape),
        "norm": norm,
        "relative": norm / whole if whole else None,
        "changed_share": changed_share({name: before}, {name: after}),
    }


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _rounded(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    return {name: weights[name].bfloat16() for name in names}
