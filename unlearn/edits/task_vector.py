"""Task vectors: what fine-tuning on the forget set adds to the weights is taken away from them."""

from typing import Any

import torch
from pydantic import PositiveFloat

from unlearn.head import upcast


@torch.no_grad()
def task_vector(model: Any, tuned: Any, *, scale: PositiveFloat = 5.0) -> Any:
    """Step away from a fine-tuned model: ``model - scale * (tuned - model)``, weight by weight.

    ``tuned`` is ``model`` after fine-tuning on the forget set. With adapters on it, they are
    multiplied by ``-scale`` and it is what is given back; otherwise ``model`` is changed in place.
    Computed in fp32. Source: Ilharco et al. 2023, arXiv:2212.04089 (negation); scale as in MUSE
    (Shi et al. 2024, arXiv:2407.06460).
    """
    if hasattr(tuned, "peft_config"):
        for name, tensor in tuned.named_parameters():
            if ".lora_B." in name:
                tensor.mul_(-scale)
        return tuned
    others = dict(tuned.named_parameters())
    for name, tensor in model.named_parameters():
        start, moved = upcast(tensor), upcast(others[name]).to(tensor.device)
        tensor.copy_(start - scale * (moved - start))
    return model
