"""Compositions of tiny models whose adapters do something."""

from typing import Any

import pytest
import torch

HYPER = {
    "subtract": {"weight": 0.75, "top_filter": 0.05},
    "offset": {"weight": 0.5},
    "suppress": {"weight": 2.0},
}


@pytest.fixture
def build_assisted(build_tiny_model: Any):
    """Give a function that puts an assistant of two layers, adapters drawn at random, on a base."""
    from unlearn.assistant.build import Assistant, assisted
    from unlearn.models import Lora

    def build(combine: str = "subtract", *, base: Any = None, layers: int = 2, **hyper: Any) -> Any:
        base = base or build_tiny_model(num_hidden_layers=3)
        settings = HYPER[combine] | hyper
        model = assisted(base, Assistant(layers, combine, settings), Lora(rank=4, alpha=8.0))
        generator = torch.Generator().manual_seed(1)
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.data.copy_(0.3 * noise)
        return model.eval()

    return build
