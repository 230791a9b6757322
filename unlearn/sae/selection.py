"""Which latents to clamp: those that fire often on the forget set and hardly on the retain set.

Farrell et al. 2024, arXiv:2410.19278, section 3. Frequencies are shares of tokens; what is left
alone later (:mod:`unlearn.sae.spared`) and padding are no tokens here. Ours: counts are whole
numbers, so that they depend neither on the batch nor on the order; the authors add up means in
half precision.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unlearn.activations import read_layer
from unlearn.data.collate import batches_by_length, pad
from unlearn.data.encode import Example
from unlearn.errors import UserError
from unlearn.ranks import Ranks, whole
from unlearn.sae.dictionary import Dictionary
from unlearn.sae.spared import first_positions, spared
from unlearn.scoring import CPU_TOKENS, evaluation_mode

Progress = Callable[[int, int], None]
ENTRIES = 2**25
"""Most latents of tokens that are encoded at once."""


@dataclass(frozen=True)
class Rows:
    """Tokenised rows, what the tokenizer puts in front of each, and how they go through a model."""

    examples: Sequence[Example]
    front: tuple[int, ...] = ()
    pad_id: int = 0
    batch_tokens: int = 8192


@dataclass(frozen=True)
class Frequencies:
    """On how many tokens each latent fires; ``forget`` and ``retain`` are counts."""

    forget: Int[Tensor, " latent"]
    retain: Int[Tensor, " latent"]
    forget_tokens: int
    retain_tokens: int

    @cached_property
    def of_forget(self) -> Float[Tensor, " latent"]:
        """Shares of the forget tokens, in float64."""
        return self.forget.double() / self.forget_tokens

    @cached_property
    def of_retain(self) -> Float[Tensor, " latent"]:
        """Shares of the retain tokens, in float64."""
        return self.retain.double() / self.retain_tokens


def frequencies(
    model: Any,
    dictionary: Dictionary,
    layer: int,
    forget: Rows,
    retain: Rows,
    *,
    progress: Progress = lambda done, total: None,
) -> Frequencies:
    """Count on how many tokens of two sets each latent is above 0.

    Layers above are not run. With several processes every one must call this alike; they share
    the batches, and each is given the counts of all.

    Raises:
        UserError: activations that are no numbers, or a set without a token that counts.
    """
    total = len(forget.examples) + len(retain.examples)

    def counted(name: str, rows: Rows, before: int) -> Tensor:
        told = partial(_told, progress, before, total)
        counts = _counts(model, dictionary, layer, rows, told)
        if not counts[-1]:
            raise UserError(f"the {name} set has no token but the first of each row", "give text")
        return counts

    ours = counted("forget", forget, 0)
    theirs = counted("retain", retain, len(forget.examples))
    return Frequencies(ours[:-1], theirs[:-1], int(ours[-1]), int(theirs[-1]))


def _told(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def choose(
    found: Frequencies, number: int, *, tau: float = 0.01, exclude: Collection[int] = ()
) -> list[int]:
    """Give the latents to clamp, at most ``number`` of them.

    Eligible is what fires on less than ``tau`` of the retain tokens (strictly) and on the forget
    set at all; they are ordered by their share of the forget tokens, ties by number.

    Raises:
        UserError: nothing is eligible; says which latent comes nearest.
    """
    admitted = eligible(found, tau, exclude)
    if not admitted.any():
        raise _none_eligible(found, _usable(found, exclude), tau)
    order = found.of_forget.where(admitted, -1.0).sort(descending=True, stable=True).indices
    return [int(one) for one in order[: min(number, int(admitted.sum()))]]


def eligible(
    found: Frequencies, tau: float, exclude: Collection[int] = ()
) -> Bool[Tensor, " latent"]:
    """Mark the latents that fire on the forget set, and on less than tau of the retain tokens."""
    return _usable(found, exclude) & (found.of_retain < tau)


def _usable(found: Frequencies, exclude: Collection[int]) -> Bool[Tensor, " latent"]:
    usable = found.forget > 0
    usable[list(exclude)] = False
    return usable


def _none_eligible(found: Frequencies, usable: Tensor, tau: float) -> UserError:
    """Say which latent comes nearest: the rarest on retain, of those the commonest on forget."""
    if not usable.any():
        return UserError(
            "no latent fires on the forget set at all (but those that are excluded)",
            "check that dictionary, layer and model belong together: unlearn sae inspect",
        )
    least = found.of_retain[usable].min()
    nearest = int(found.of_forget.where(usable & (found.of_retain == least), -1.0).argmax())
    return UserError(
        f"no latent fires on the forget set and on less than tau={tau:g} of the retain tokens; "
        f"the nearest is {nearest}, on {found.of_forget[nearest]:.3%} of forget and "
        f"{float(least):.3%} of retain tokens",
        f"a tau above {float(least):.3g} admits it",
    )


def activations(
    model: Any, rows: Rows, layer: int, progress: Callable[[int], None] = lambda done: None
) -> Iterator[tuple[Int[Tensor, " token"], Int[Tensor, " token"], Float[Tensor, "token width"]]]:
    """Give what leaves a layer at tokens that count: places of their rows, positions, vectors.

    This process's share of the rows, in batches of similar length.

    Raises:
        UserError: some are NaN or infinite.
    """
    model, ranks = whole(model), Ranks.of(model)
    device, most = model.get_input_embeddings().weight.device, rows.batch_tokens
    most = min(most, CPU_TOKENS) if device.type == "cpu" else most
    groups = batches_by_length([len(one.input_ids) for one in rows.examples], most)
    done = 0
    for number, group in enumerate(groups):
        if number % ranks.size == ranks.rank:
            batch = pad([rows.examples[place] for place in group], rows.pad_id)
            batch = {name: one.to(device) for name, one in batch.items()}
            yield _at_tokens(model, batch, torch.tensor(group, device=device), layer, rows.front)
        done += len(group)
        progress(done)


def _at_tokens(
    model: Any, batch: dict[str, Tensor], places: Tensor, layer: int, front: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    with evaluation_mode(model):
        hidden = read_layer(model, {"": batch}, layer)[""].hidden
    ids, attended = batch["input_ids"], batch["attention_mask"].bool()
    alone = spared(ids, first_positions(ids, attended=attended), front)
    row, position = (attended & ~alone).nonzero().unbind(1)
    vectors = hidden[row, position]
    if not bool(vectors.isfinite().all()):
        raise UserError(
            f"what leaves layer {layer} is NaN or infinite",
            "load the model as bfloat16 or float32, or check its weights",
        )
    return places[row], position, vectors


@torch.no_grad()
def _counts(
    model: Any, dictionary: Dictionary, layer: int, rows: Rows, progress: Callable[[int], None]
) -> Int[Tensor, " count"]:
    """Count the tokens that each latent fires on, and in the end all tokens."""
    found = torch.zeros(dictionary.latents + 1, dtype=torch.int64)
    encoder = dictionary.encoder()
    for _, _, vectors in activations(model, rows, layer, progress):
        for part in vectors.split(max(1, ENTRIES // dictionary.latents)):
            found[:-1] += (encoder.encode(part.to(encoder.w_enc)) > 0).sum(0).cpu()
        found[-1] += len(vectors)
    return Ranks.of(model).add(found)
