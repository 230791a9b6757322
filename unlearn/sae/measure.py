"""How good a dictionary is: variance explained, L0, dead latents, cross-entropy recovered."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unlearn.ranks import Ranks, whole
from unlearn.sae.corpus import Corpus, kept_positions
from unlearn.sae.dictionary import Dictionary
from unlearn.sae.splice import Change, spliced
from unlearn.sae.stream import Activations
from unlearn.scores import Scorer
from unlearn.scoring import evaluation_mode


@dataclass(frozen=True)
class Fidelity:
    """How well activations are reconstructed, over ``tokens`` of them.

    ``variance_explained``: 1 - sum ||x - x̂||² / sum ||x - mean x||², at most 1. ``l0``: active
    latents per token. ``dead``: share of the latents that are active on no token here.
    """

    variance_explained: float
    l0: float
    dead: float
    tokens: int


@dataclass(frozen=True)
class Recovery:
    """Next-token cross-entropy, in nats per token, with something else in the layer's place.

    ``recovered``: (zero - dictionary) / (zero - base): 1 is as good as the model itself, 0 as bad
    as zeros.
    """

    base: float
    dictionary: float
    zero: float

    @property
    def recovered(self) -> float | None:
        """Give the share of what zeros cost that the dictionary saves; None if they cost nothing.

        Then the layer does not help the model with this text, and nothing can be recovered.
        """
        cost = self.zero - self.base
        return (self.zero - self.dictionary) / cost if cost > 0 else None

    def as_json(self) -> dict[str, float | None]:
        """Give the figures by name."""
        return {f"ce_{name}": value for name, value in asdict(self).items()} | {
            "ce_recovered": self.recovered
        }


@torch.no_grad()
def fidelity(
    dictionary: Dictionary,
    parts: Iterable[Float[Tensor, "_ width"]],
    ranks: Ranks | None = None,
) -> Fidelity:
    """Measure reconstructions; every rank gives parts of its own, and gets the result of all."""
    width, latents = dictionary.width, dictionary.latents
    # squared error, sum of squares, active latents, tokens; then the sum of x, and who fired
    sums, total = torch.zeros(4, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    fired = torch.zeros(latents, dtype=torch.int64)
    for x in parts:
        a = dictionary.encode(x)
        error = (x - dictionary.decode(a)).double().square().sum()
        active = a > 0
        told = [error, x.double().square().sum(), active.sum(), torch.tensor(len(x))]
        sums += torch.stack([one.double().cpu() for one in told])
        total += x.double().sum(0).cpu()
        fired += active.sum(0).cpu()
    ranks = ranks or Ranks()
    sums, total, fired = ranks.add(sums), ranks.add(total), ranks.add(fired)
    error, squares, active, tokens = sums.tolist()
    variance = squares - float(total.square().sum()) / tokens
    dead = float((fired == 0).double().mean())
    return Fidelity(1 - error / variance, active / tokens, dead, int(tokens))


def held_out_activations(
    source: Activations, rows: Sequence[int], tokens: int
) -> Iterator[Float[Tensor, "_ width"]]:
    """Give this rank's share of the activations of rows."""
    ranks, size = Ranks.of(source.model), source.rows_per_batch(tokens)
    for number, start in enumerate(range(0, len(rows), size)):
        if number % ranks.size == ranks.rank:
            yield source.of_rows(rows[start : start + size])


def recovery(
    source: Activations, rows: Sequence[int], dictionary: Dictionary, tokens: int
) -> Recovery:
    """Measure the cross-entropy of the rows with the layer as it is, reconstructed, and zero.

    The first positions (BOS) and padding keep their own activations.
    """
    model, corpus = whole(source.model), source.corpus
    ranks, size = Ranks.of(source.model), source.rows_per_batch(tokens)
    scorer = Scorer.for_model(model)
    changes = (None, dictionary.reconstruct, torch.zeros_like)
    sums = torch.zeros(len(changes) + 1, dtype=torch.float64)
    for number, start in enumerate(range(0, len(rows), size)):
        if number % ranks.size == ranks.rank:
            batch = _batch(corpus, rows[start : start + size], source)
            sums += _losses(model, scorer, batch, source.layer, changes)
    *losses, count = ranks.add(sums).tolist()
    return Recovery(*(loss / count for loss in losses))


def _batch(corpus: Corpus, rows: Sequence[int], source: Activations) -> dict[str, Tensor]:
    found = corpus.batch(rows, source.pad_id)
    return {name: one.to(source.device) for name, one in found.items()}


def _losses(
    model: Any,
    scorer: Scorer,
    batch: dict[str, Tensor],
    layer: int,
    changes: Sequence[Change | None],
) -> Float[Tensor, " sum"]:
    """Give the summed loss under every change, and the number of tokens that are predicted."""
    kept, found = kept_positions(batch), []
    with evaluation_mode(model):
        for change in changes:
            place: AbstractContextManager[None] = nullcontext()
            if change is not None:
                place = spliced(model, layer, _only_at(kept, change))
            with place:
                scores = scorer(model, batch)
            found.append(-scores.log_probs.double().sum().cpu())
    return torch.stack([*found, scores.mask.sum().double().cpu()])


def _only_at(kept: Tensor, change: Callable[[Tensor], Tensor]) -> Change:
    def changed(hidden: Tensor) -> Tensor:
        found = hidden.clone()
        found[kept] = change(hidden[kept].float()).to(hidden.dtype)
        return found

    return changed


def doubts(found: Fidelity, latents: int) -> list[str]:
    """Say what speaks against this dictionary belonging to these activations."""
    told = []
    if not found.variance_explained > 0:
        told.append(f"it explains {found.variance_explained:.2f} of the variance")
    if not 0 < found.l0 < latents / 4:
        told.append(f"{found.l0:.1f} of {latents} latents are active per token")
    return [f"{one}: wrong layer, side or scale of the activations?" for one in told]
