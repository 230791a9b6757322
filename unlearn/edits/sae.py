"""Unlearning with sparse autoencoders: features of the forget set are clamped as a model runs."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from unlearn.curvature.parts import Listen, Parts
from unlearn.data import tokenize
from unlearn.data.encode import Example
from unlearn.edits.clamping import Bench, Budget, Search, Setting, Trial, grid
from unlearn.errors import UserError
from unlearn.head import plain
from unlearn.monitors import peak_memory_bytes
from unlearn.sae.candidates import Candidates, Placed, candidates, listed, placed
from unlearn.sae.clamp import Mode
from unlearn.sae.clamped import install
from unlearn.sae.selection import Rows

Multiple = Annotated[str, Field(pattern=r"^\d+(\.\d+)?x$")]
"""A strength as a multiple of how strongly the features fire: ``3x``."""
Place = Annotated[str, Field(pattern=r"^\d+:\d+$")]
"""A feature of one of several dictionaries: ``LAYER:FEATURE``."""
Share = Annotated[float, Field(gt=0, le=1)]


def sae(  # noqa: PLR0913 - each is a key of the recipe's edit section
    model: Any,
    data: Mapping[str, Sequence[Example]],
    tokenizer: Any,
    listen: Listen = lambda event: None,
    *,
    dictionary: str | list[str] | None = None,
    layer: NonNegativeInt | None = None,
    features: PositiveInt | list[PositiveInt] = 20,
    c: PositiveFloat | Multiple | list[PositiveFloat | Multiple] = "3x",
    tau: Share | list[Share] = 0.01,
    mode: Mode = "clamp",
    exclude: list[NonNegativeInt | Place] | None = None,
    selected: str | None = None,
    retain_kl: PositiveFloat | None = None,
    retain_rise: PositiveFloat | None = None,
    held_out: PositiveInt = 64,
    forget_rows: PositiveInt = 256,
    batch_tokens: PositiveInt = 8192,
) -> Any:
    """Clamp features that fire on the forget set and hardly on the retain set; trains nothing.

    ``dictionary`` names sparse autoencoders of what leaves one layer each (``layer``: where a file
    does not say). Of each the ``features`` that fire on most of the forget tokens are chosen, among
    those that fire on less than ``tau`` of the retain tokens; ``exclude`` vetoes some (with several
    dictionaries as LAYER:FEATURE), ``selected`` takes them from a file of ``unlearn sae select``.
    Where one is active it is set to -``c``, in units of its activation, or as ``3x``: so many times
    the 99th percentile of the chosen features' activations above 0 on the forget set. ``mode``:
    ``clamp``; ``zero`` sets them to 0; ``scale`` takes ``c`` times their value away; ``random`` is
    a control (see :class:`unlearn.sae.clamp.Clamp`). The first position of every row, and what the
    tokenizer puts in front of texts, are left alone.

    Where ``features``, ``c`` or ``tau`` are lists every combination is measured, and the one with
    the greatest forget loss (on ``forget_rows`` rows) is taken among those within the budget: a KL
    from the start of at most ``retain_kl``, a retain loss at most ``retain_rise`` above the
    start's, both in nats per token on ``held_out`` retain rows that features are not chosen by.

    Source: Farrell et al. 2024, arXiv:2410.19278. Ours: the closed form, the search, multiples.

    ``listen`` is told of every ``trial``, of one ``step``, and in the end of the ``outcome``.
    """
    given: dict[str, Any] = {
        "features": features,
        "c": c,
        "tau": tau,
        "mode": mode,
        "exclude": exclude,
    }
    given |= {"dictionary": dictionary, "retain_kl": retain_kl, "retain_rise": retain_rise}
    if why := settings_mistake(given):
        raise UserError(why)
    started = time.monotonic()
    parts = Parts.of(data, held_out, None, forget_rows, batch_tokens)
    if parts.warning:
        listen({"event": "warning", "message": parts.warning})
    front = front_of(tokenizer)
    forget, retain = (
        Rows(rows.examples, front, batch_tokens=batch_tokens) for rows in (parts.forget, parts.fit)
    )
    settings = grid(features, c, tau)
    places = placed(_paths(dictionary), plain(model).config, layer)
    choice = _Choice(settings, selected, _vetoes(exclude or [], places))
    found = [choice.of(model, one, forget, retain, listen) for one in places]
    bench = Bench(model, front, parts.measured, parts.held_out)
    search = Search(bench, found, mode, Budget(retain_kl, retain_rise))
    taken = search.run(settings, listen)
    outcome = search.told(taken) | {
        "dictionaries": [
            one.described(clamp.features, forget, tokenizer)
            | {"c": clamp.offset if mode in ("clamp", "random") else clamp.factor}
            for one, clamp in zip(found, search.clamps(taken.setting), strict=True)
        ]
    }
    install(model, search.clamps(taken.setting), front)
    listen(_step(search, taken, time.monotonic() - started))
    listen({"event": "outcome", "clamp": outcome})
    return model


@dataclass(frozen=True)
class _Choice:
    """How features are chosen: for which settings, from which file, and which never."""

    settings: Sequence[Setting]
    file: str | None
    vetoes: Mapping[int | None, frozenset[int]]

    def of(
        self, model: Any, place: Placed, forget: Rows, retain: Rows, listen: Listen
    ) -> Candidates:
        """Choose features of one dictionary."""
        what = f"features of layer {place.layer}"
        exclude = self.vetoes.get(None, frozenset()) | self.vetoes.get(place.layer, frozenset())
        moved = place.to(model.get_input_embeddings().weight.device)

        def progress(done: int, total: int) -> None:
            listen({"event": "progress", "what": what, "done": done, "total": total})

        if self.file is not None:
            return listed(model, moved, self.file, forget, exclude=exclude, progress=progress)
        number = max(one.features for one in self.settings)
        taus = list(dict.fromkeys(one.tau for one in self.settings))
        return candidates(
            model, moved, forget, retain,
            number=number, taus=taus, exclude=exclude, progress=progress,
        )  # fmt: skip


def front_of(tokenizer: Any) -> tuple[int, ...]:
    """Give the ids that a tokenizer puts in front of a text (BOS); empty when it puts none."""
    return tuple(tokenize(tokenizer, [""], adds_special=True)[0])


def _paths(dictionary: str | list[str] | None) -> list[str]:
    if not dictionary:
        raise UserError("edit sae needs dictionary", "name one made by `unlearn sae train`")
    return [dictionary] if isinstance(dictionary, str) else dictionary


def _vetoes(
    exclude: Sequence[int | str], places: Sequence[Placed]
) -> dict[int | None, frozenset[int]]:
    """Sort vetoed features by layer; plain numbers are those of the only dictionary (None)."""
    pairs, layers = [_veto(one) for one in exclude], [one.layer for one in places]
    if strange := [layer for layer, _ in pairs if layer is not None and layer not in layers]:
        raise UserError(
            f"exclude names layer {strange[0]}, which no dictionary reads",
            f"the dictionaries read layer {', '.join(map(str, layers))}",
        )
    return {layer: frozenset(f for at, f in pairs if at == layer) for layer, _ in pairs}


def _veto(text: int | str) -> tuple[int | None, int]:
    if isinstance(text, int):
        return None, text
    layer, _, feature = text.partition(":")
    return int(layer), int(feature)


def settings_mistake(hyper: Mapping[str, Any]) -> str | None:
    """Say what is wrong with hyperparameters together, each of them right by itself."""
    several = isinstance(hyper["dictionary"], list) and len(hyper["dictionary"]) > 1
    if several and any(isinstance(one, int) for one in hyper["exclude"] or ()):
        return "exclude: with several dictionaries write LAYER:FEATURE, for instance '7:123'"
    settings = grid(hyper["features"], hyper["c"], hyper["tau"])
    if not settings:
        return "features, c and tau: give at least one value of each"
    if hyper["mode"] == "scale" and any(isinstance(one.c, str) for one in settings):
        return "c: with mode scale it is a factor; give a number, for instance 1.0"
    if len(settings) > 1 and hyper["retain_kl"] is None and hyper["retain_rise"] is None:
        return (
            f"features, c and tau make {len(settings)} settings, and the one that forgets most is "
            "the one that breaks most: set retain_kl or retain_rise, in nats per token"
        )
    return None


def _step(search: Search, taken: Trial, seconds: float) -> dict[str, Any]:
    """Say what the clamps have come to, as a step of an edit does."""
    bench, found = search.bench, taken.found
    tokens = sum(len(one.input_ids) for one in (*bench.forget.examples, *bench.retain.examples))
    return {
        "event": "step",
        "step": 1,
        "of": 1,
        **found.told(),
        "gain": found.forget_nll - bench.start.forget_nll,
        "kl_spent": found.retain_kl,
        "kl_budget": search.budget.retain_kl,
        "evaluations": len(search.trials),
        "memory_bytes": peak_memory_bytes(),
        "seconds": round(seconds, 3),
        "tokens": tokens * (1 + len(search.trials)),
    }
