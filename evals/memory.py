"""Whether a batch will fit on the GPU, told before the work starts. Estimates, on the high side."""

from typing import Any

import torch

from unlearn.errors import UserError
from unlearn.head import CHUNK_BYTES, plain

HIDDEN_COPIES = 16
"""Hidden-sized tensors alive in a layer: residuals, queries, keys and values, laid out twice."""
LOGIT_COPIES = 4


def scoring_bytes(model: Any, tokens: int) -> int:
    """Estimate what one forward pass over this many tokens needs beside the weights."""
    config = plain(model).config.get_text_config()
    width = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * width)
    body = tokens * (HIDDEN_COPIES * width + 3 * inner) * model.dtype.itemsize
    return body + LOGIT_COPIES * min(CHUNK_BYTES, 4 * tokens * int(config.vocab_size))


def writing_bytes(model: Any, tokens: int) -> int:
    """Estimate the keys and values of this many tokens, prompts and answers, in all layers."""
    config = plain(model).config.get_text_config()
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kept = int(getattr(config, "num_key_value_heads", None) or heads)
    return 2 * tokens * int(config.num_hidden_layers) * kept * size * model.dtype.itemsize


def require_memory(model: Any, needed: int, *, batch_tokens: int) -> None:
    """Refuse work on CUDA that needs more bytes than are free.

    Raises:
        UserError: it would not fit; names a ``batch_tokens`` that would.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    check_fits(needed, free, batch_tokens)


def check_fits(needed: int, free: int, batch_tokens: int) -> None:
    """Refuse ``needed`` bytes where ``free`` are free; see :func:`require_memory`."""
    if needed > free:
        gib = 2**30
        fitting = max(1, int(batch_tokens * free / needed * 0.9))
        raise UserError(
            f"a batch of {batch_tokens} tokens needs about {needed / gib:.1f} GiB and the GPU has "
            f"{free / gib:.1f} GiB free",
            f"set batch_tokens to {fitting} or less, or free the GPU",
        )
