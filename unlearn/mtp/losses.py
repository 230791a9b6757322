"""What a mask is to learn: three sums over masks, in nats or squared units, never averaged.

Samragh et al. 2025, section 2.5: cross-entropy of the base's head and of the sampler's, and latent
consistency (equation 1). The learner divides by the number of masks of the whole step.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unlearn.head import VocabularyHead, piece_size
from unlearn.mtp.predictor import MaskPredictor


def cross_entropy(
    head: VocabularyHead, hidden: Float[Tensor, "mask width"], labels: Int[Tensor, " mask"]
) -> Float[Tensor, " mask"]:
    """Give minus the log-probability of each label (nats); logits are laid out in chunks."""
    return -head.read(hidden, labels).log_probs


def soft_cross_entropy(
    head: VocabularyHead, hidden: Float[Tensor, "mask width"], teacher: Float[Tensor, "mask width"]
) -> Float[Tensor, " mask"]:
    """Give the cross-entropy (nats) to what the head says of the teacher's hidden states.

    Its least value is the teacher's entropy. Chunks are computed again in the backward pass.
    """
    rows = piece_size(head, hidden)
    chunks = zip(hidden.split(rows), teacher.detach().split(rows), strict=True)
    return torch.cat([checkpoint(_soft, head, *one, use_reentrant=False) for one in chunks])


def _soft(head: VocabularyHead, hidden: Tensor, teacher: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = head.logits(teacher).softmax(-1)
    return -(wanted * head.logits(hidden).log_softmax(-1)).sum(-1)


def latent_consistency(
    hidden: Float[Tensor, "mask width"], anchors: Float[Tensor, "mask width"], reduction: str
) -> Float[Tensor, " mask"]:
    """Give the squared distance of each mask's hidden state from that of its ordinary counterpart.

    Equation 1: the counterpart, which foretells the same token from the whole text, is detached.
    ``mean`` over hidden dimensions, or ``sum``; the paper does not say which. Its mean over the
    masks of a token, then over tokens, is here a mean over masks: other weights at the ends only.
    """
    squared = (anchors.detach().float() - hidden.float()).square()
    return squared.mean(-1) if reduction == "mean" else squared.sum(-1)


@torch.no_grad()
def likeliest(
    head: VocabularyHead, hidden: Float[Tensor, "position width"]
) -> Int[Tensor, " position"]:
    """Give the head's choice at each position, in chunks."""
    return torch.cat(
        [head.logits(one).argmax(-1) for one in hidden.split(piece_size(head, hidden))]
    )


def own_previous(
    predictor: MaskPredictor,
    hidden: Float[Tensor, "anchor k width"],
    first: Int[Tensor, " anchor"],
) -> Int[Tensor, "anchor k"]:
    """Give the token before each, as decoding knows it: the first, then the sampler's choices."""
    sampler = predictor.sampler
    assert sampler is not None
    with torch.no_grad():
        found = [first]
        for state in hidden.unbind(1)[:-1]:
            found.append(likeliest(predictor.head, sampler(predictor.embed(found[-1]), state)))
    return torch.stack(found, 1)
