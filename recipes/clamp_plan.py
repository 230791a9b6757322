"""What clamping features of a dictionary takes: memory, tokens read, and a small folder."""

from typing import Any

from unlearn.edits import EDITS
from unlearn.edits.clamping import CONTROLS, grid
from unlearn.evals.memory import scoring_bytes
from unlearn.kinds import load_config
from unlearn.recipes.inputs import dictionaries_of
from unlearn.recipes.memory import Part
from unlearn.recipes.prepare import Prepared
from unlearn.sae.candidates import Placed, placed
from unlearn.sae.selection import ENTRIES
from unlearn.scoring import CPU_TOKENS


def _settings(prepared: Prepared) -> dict[str, Any]:
    section = prepared.recipe.edit
    assert section is not None
    return EDITS[section.name].filled(section.hyper)


def _placed(prepared: Prepared) -> list[Placed]:
    layer = _settings(prepared)["layer"]
    return placed(dictionaries_of(prepared.recipe), load_config(prepared.source), layer)


def clamp_parts(prepared: Prepared, model: Any, device: str) -> list[Part]:
    """List what is held, beside the weights, while features are chosen and settings are tried."""
    how, places = _settings(prepared), _placed(prepared)
    longest = max(len(row.input_ids) for one in prepared.streams.values() for row in one.examples)
    tokens = min(how["batch_tokens"], CPU_TOKENS) if device == "cpu" else how["batch_tokens"]
    tokens = max(longest, tokens)
    sizes = [sum(t.nbytes for t in one.dictionary.tensors().values()) for one in places]
    latents = max(one.dictionary.latents for one in places)
    encoded = 3 * 4 * min(max(ENTRIES, latents), tokens * latents)
    return [
        Part("dictionaries", sum(sizes), f"of {len(places)} layers, in fp32"),
        Part("features", encoded, f"{latents:,} of each token, a part of the tokens at a time"),
        Part("forward pass", scoring_bytes(model, tokens), f"over {tokens:,} tokens"),
    ]


def clamp_tokens(prepared: Prepared) -> dict[str, int]:
    """Count the tokens that go through the model, there and never back.

    Once to count (forget and retain set, for each dictionary), once more to see where features fire
    (forget set), and for every setting the rows that are measured.
    """
    how = _settings(prepared)
    forget, retain = (
        [len(row.input_ids) for row in prepared.streams[name].examples]
        for name in ("forget", "retain")
    )
    measured = _first(forget, how["forget_rows"]) + 2 * _first(retain, how["held_out"])
    trials = 1 + len(grid(how["features"], how["c"], how["tau"]))
    trials += len(CONTROLS) if how["mode"] == "clamp" else 0
    chosen = (2 * sum(forget) + sum(retain)) * len(dictionaries_of(prepared.recipe))
    return {"per_step": measured, "total": chosen + trials * measured}


def clamp_bytes(prepared: Prepared) -> int:
    """Give the size of the folder: encoder and direction of each chosen feature, in fp32.

    A ``topk`` dictionary leaves its whole encoder there.
    """
    how = _settings(prepared)
    number = max(one.features for one in grid(how["features"], how["c"], how["tau"]))
    return sum(
        4 * one.dictionary.width * (number + _encoders(one, number)) for one in _placed(prepared)
    )


def _encoders(place: Placed, number: int) -> int:
    return place.dictionary.latents if place.dictionary.kind == "topk" else number


def _first(lengths: list[int], number: int) -> int:
    """Count the tokens of so many rows, of average length."""
    return round(sum(lengths) * min(number, len(lengths)) / len(lengths))
