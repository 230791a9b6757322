"""The vocabulary head in chunks: log-probabilities of given tokens without ``[batch, seq, vocab]``.

The head is called as the module it is (tied, untied, with a LoRA on it, sharded by an engine), on
a few labelled positions at a time; each chunk is recomputed in the backward pass. What a model does
to its logits after the head (soft-capping, scaling) is read from its configuration, and
the scorer compares the result with the model's own logits before it is trusted.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 256 * 2**20
"""Upper bound of one chunk of logits in fp32; below it, nothing is recomputed."""
CPU_PIECE_BYTES = 2**20
"""On a CPU, logits are read in pieces that stay in its second-level cache (7 times as fast)."""
LEAST_LOG_PROB = -1000.0
"""Below it a probability is 0 even in fp64, and 0 times its logarithm is to be 0."""


def upcast(logits: Tensor) -> Tensor:
    """Give logits in fp32 (fp64 stays fp64): every loss and metric is computed in at least fp32."""
    return logits if logits.dtype == torch.float64 else logits.float()


@dataclass(frozen=True)
class TokenReadings:
    """Log-probabilities (nats) at some positions and, if asked for, more about each of them.

    ``correct``: the label is the likeliest token. ``mean`` and ``variance``: of the log-probability
    of a token drawn from the model's own distribution (minus its entropy, and its spread). ``top``:
    the log-probability of the likeliest token.
    """

    log_probs: Float[Tensor, " position"]
    correct: Bool[Tensor, " position"] | None = None
    mean: Float[Tensor, " position"] | None = None
    variance: Float[Tensor, " position"] | None = None
    top: Float[Tensor, " position"] | None = None


@dataclass(frozen=True)
class VocabularyHead:
    """The last linear map of a causal language model and what is done to its output.

    Logits are ``scale * head(h)``, then ``softcap * tanh(logits / softcap)`` when there is a cap
    (Gemma 2; Cohere and Granite scale).
    """

    linear: nn.Module
    vocabulary: int
    scale: float = 1.0
    softcap: float | None = None
    chunk_bytes: int = CHUNK_BYTES
    project: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, model: Any, *, chunk_bytes: int = CHUNK_BYTES) -> "VocabularyHead | None":
        """Find the head of a Hugging Face model, wrapped or plain; None when it has none."""
        base = plain(model)
        linear = base.get_output_embeddings()
        if linear is None or not hasattr(linear, "weight"):
            return None
        config = base.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        shape = getattr(linear.weight, "ds_shape", linear.weight.shape)  # split by ZeRO 3, or not
        return cls(linear, shape[0], scale, softcap, chunk_bytes)

    def calling(self, project: Callable[[Tensor], Tensor]) -> "VocabularyHead":
        """Give the same head with another way to apply its linear map: inside the module's call."""
        return replace(self, project=project)

    def logits(
        self, hidden: Float[Tensor, "*positions width"]
    ) -> Float[Tensor, "*positions vocab"]:
        """Give the logits at these positions, in fp32 or fp64."""
        logits = upcast((self.project or self.linear)(hidden))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def read(
        self,
        hidden: Float[Tensor, "position width"],
        targets: Int[Tensor, " position"],
        *,
        want: Collection[str] = (),
    ) -> TokenReadings:
        """Read one target token per position, chunk by chunk.

        ``want`` may name ``correct`` and ``statistics`` (mean, variance, top; without gradient).
        """
        rows = max(1, self.chunk_bytes // (4 * self.vocabulary))
        chunks = list(zip(hidden.split(rows), targets.split(rows), strict=True))
        recompute = len(chunks) > 1 and torch.is_grad_enabled()
        parts = [
            checkpoint(self._chunk, *chunk, want, use_reentrant=False)
            if recompute
            else self._chunk(*chunk, want)
            for chunk in chunks
        ]
        return TokenReadings(
            **{name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        )

    def _chunk(self, hidden: Tensor, targets: Tensor, want: Collection[str]) -> dict[str, Tensor]:
        logits = self.logits(hidden)
        if logits.requires_grad:
            return read_logits(logits, targets, want)
        on_cpu = logits.device.type == "cpu"
        rows = max(1, CPU_PIECE_BYTES // (4 * self.vocabulary)) if on_cpu else max(1, len(logits))
        pieces = zip(logits.split(rows), targets.split(rows), strict=True)
        parts = [read_logits(*piece, want) for piece in pieces]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def read_logits(logits: Tensor, targets: Tensor, want: Collection[str]) -> dict[str, Tensor]:
    """Read one target per row of logits; see :meth:`VocabularyHead.read`."""
    found: dict[str, Tensor] = {}
    if "statistics" in want:
        peak = logits.detach().amax(-1, keepdim=True)
        found |= vars(_statistics(logits.detach(), peak))
        if not logits.requires_grad:  # then no log-softmax is laid out
            found["log_probs"] = (logits.gather(-1, targets[:, None]) - peak)[:, 0] + found["top"]
    if "log_probs" not in found:
        found["log_probs"] = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    if "correct" in want:
        found["correct"] = logits.argmax(-1) == targets
    return found


@dataclass(frozen=True)
class VocabularyStatistics:
    """What is known of a token's log-probability (nats) before the token is.

    ``mean = sum_v p_v log p_v``, ``variance = sum_v p_v (log p_v - mean)^2`` (nats squared) and
    ``top = max_v log p_v``; tokens of probability 0 count nothing.
    """

    mean: Float[Tensor, "*positions"]
    variance: Float[Tensor, "*positions"]
    top: Float[Tensor, "*positions"]


def vocabulary_statistics(logits: Float[Tensor, "*positions vocab"]) -> VocabularyStatistics:
    """Give mean, variance and maximum of the log-probability under the model's own distribution.

    With logits shifted by their maximum, z, and w = exp(z): log p = z - log sum w, so no
    log-softmax is laid out, and sums over the vocabulary stay exact to single precision
    (``log_softmax`` on a CPU is off by 2e-5 at 128,000 tokens).
    """
    return _statistics(logits, logits.amax(-1, keepdim=True))


def _statistics(logits: Tensor, peak: Tensor) -> VocabularyStatistics:
    shifted = logits - peak
    weights = shifted.exp()
    total = weights.sum(-1)
    shifted.clamp_min_(LEAST_LOG_PROB)  # a masked token: 0 times minus infinity is to be 0
    mean = torch.linalg.vecdot(weights, shifted) / total
    spread = shifted.sub_(mean[..., None]).square_()
    variance = torch.linalg.vecdot(weights, spread) / total
    norm = total.log()
    return VocabularyStatistics(mean - norm, variance, -norm)


def plain(model: Any) -> Any:
    """Give the Hugging Face model inside DDP, an adapter wrapper, or neither."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def same_log_probs(ours: Tensor, theirs: Tensor, model: Any) -> bool:
    """Tell whether two sets of logits give the same log-probabilities, within rounding."""
    ours, theirs = ours.log_softmax(-1), upcast(theirs).log_softmax(-1)
    if ours.shape != theirs.shape:
        return False
    coarse = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    tolerance = 0.1 if coarse else 1e-4
    # a model that gives NaN is broken, but its head is found: the benchmarks say what is wrong
    return bool(torch.allclose(ours, theirs, rtol=0, atol=tolerance, equal_nan=True))


def piece_size(head: VocabularyHead, hidden: Tensor) -> int:
    """Say how many positions have their logits computed at once."""
    room = CPU_PIECE_BYTES if hidden.device.type == "cpu" else CHUNK_BYTES
    return max(1, room // (4 * head.vocabulary))
