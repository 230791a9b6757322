"""Membership scores that compare passes: of other wordings, after prefixes, of other models.

The functions are pure: they take mean log-probabilities per token (nats), one per text, that were
computed elsewhere. Higher = more likely a member. What has to be written for them (words swapped,
letters made small) is here too, and depends on the text and the seed alone.
"""

from collections.abc import Sequence
from random import Random

from jaxtyping import Float
from torch import Tensor

SWAPPED = 0.3
"""Swaps of two words in an adjacent sample of PAC, as a share of the text's words."""
NUM_ADJACENT = 5
"""Adjacent samples of PAC per text."""
MOST_TRIES = 3
"""Draws of a second word that differs from the first, as in PAC's code."""
MEMBER_WEIGHT = 0.5
"""How much the pass after members counts in Con-ReCaLL."""


def lowercase_ratio(
    loss: Float[Tensor, " batch"], lowered: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """How much less likely the text becomes in small letters: ratio of the two means, no unit.

    Both means are negative, so more is a member; 1 for a text that has no capitals, about which it
    says nothing. Source: Carlini et al. 2021, arXiv:2012.07805.
    """
    return lowered / loss


def reference_difference(
    loss: Float[Tensor, " batch"], reference: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Mean log-probability minus that of a reference model, each over its own tokens, in nats.

    The log of the ratio of per-token likelihoods. Source: Carlini et al. 2021, arXiv:2012.07805.
    """
    return loss - reference


def recall(
    loss: Float[Tensor, " batch"], after_nonmembers: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """How much less likely the text is after texts the model never saw: ratio of means, no unit.

    Source: Xie et al. 2024, ReCaLL, arXiv:2406.15968. The prefix is drawn from non-members, so
    where members differ from them in topic or date the score measures that. Deviation: the text's
    first token, which only the prefix lets be scored, is left out of both means.
    """
    return after_nonmembers / loss


def con_recall(
    loss: Float[Tensor, " batch"],
    after_nonmembers: Float[Tensor, " batch"],
    after_members: Float[Tensor, " batch"],
    *,
    gamma: float = MEMBER_WEIGHT,
) -> Float[Tensor, " batch"]:
    """Contrast the passes after non-members and after members: no unit.

    ``(after_nonmembers - gamma * after_members) / loss``.
    Source: Wang et al. 2025, Con-ReCall, arXiv:2409.03363.
    """
    return (after_nonmembers - gamma * after_members) / loss


def neighbour_difference(
    loss: Float[Tensor, " batch"], neighbours: Float[Tensor, "batch neighbour"]
) -> Float[Tensor, " batch"]:
    """How much likelier a text is than texts that differ in a few words, in nats per token.

    Source: Mattern et al. 2023, arXiv:2305.18462. A text without neighbours scores NaN; places
    without a neighbour are NaN and do not count.
    """
    return loss - neighbours.nanmean(-1)


def pac(
    distance: Float[Tensor, " batch"], adjacent: Float[Tensor, "batch sample"]
) -> Float[Tensor, " batch"]:
    """How much less polarised a text's tokens are than with its words swapped, in nats.

    ``-(PD(x) - mean PD(swapped x))`` of :func:`~unlearn.detect.single_pass.polarized_distance`.
    Source: Ye et al. 2024, PAC, arXiv:2405.11930.
    """
    return adjacent.nanmean(-1) - distance


def swapped_words(
    text: str, *, seed: int = 0, count: int = NUM_ADJACENT, share: float = SWAPPED
) -> list[str]:
    """Write ``count`` versions of a text in which pairs of words have changed places.

    ``max(1, int(share * words))`` swaps each, words being what single spaces part, as in PAC's
    code. Deviation: the draws depend on the text and the seed, not on the texts before it. A text
    of one word comes back as it is.
    """
    draws = Random(f"{seed}/{text}")
    words = text.split(" ")
    swaps = max(1, int(share * len(words)))
    return [" ".join(_swapped(words, swaps, draws)) for _ in range(count)]


def _swapped(words: Sequence[str], swaps: int, draws: Random) -> list[str]:
    found = list(words)
    for _ in range(swaps):
        one = draws.randrange(len(found))
        tries = (draws.randrange(len(found)) for _ in range(MOST_TRIES))
        two = next((place for place in tries if place != one), one)
        found[one], found[two] = found[two], found[one]
    return found
