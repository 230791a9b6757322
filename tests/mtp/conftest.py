"""A two-layer Llama in float64 whose choices are clear, and a predictor of random drafts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from unlearn.mtp.predictor import MaskPredictor
from unlearn.mtp.settings import Shape

VOCABULARY = 97


def make_model(**changes: Any) -> Any:
    """Build it; weights times 4 so that no two tokens are nearly equal."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": None,
        "bos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    } | changes
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval().double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight *= 4
    return model.requires_grad_(False)


def make_predictor(model: Any, *, random: float = 0.3, seed: int = 0, **shape: Any) -> Any:
    """Build a predictor whose every part is moved from its start by random numbers."""
    settings: Any = {"k": 3, "rank": 4} | shape
    predictor = MaskPredictor(model, Shape(**settings), seed=seed).to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for parameter in predictor.trained().values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += random * noise
    return predictor


@pytest.fixture(scope="session")
def sharp_model() -> Any:
    return make_model()


@pytest.fixture
def build_sharp() -> Callable[..., Any]:
    return make_model


@pytest.fixture
def build_predictor() -> Callable[..., Any]:
    return make_predictor


@pytest.fixture
def predictor(sharp_model: Any) -> Any:
    made = make_predictor(sharp_model)
    yield made
    made.detach()


@pytest.fixture(scope="session")
def counting() -> tuple[Any, Callable[[int, int], list[int]]]:
    """A Llama that has learnt to count in steps of one to three, told by the first token.

    Tokens 4 … 23; the text goes on from its last number by the step that the first token names.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=24, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
            eos_token_id=None, pad_token_id=0, bos_token_id=1,
        )
    )  # fmt: skip
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        ids = torch.tensor([counted(16, 100 * step + row) for row in range(16)])
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval().requires_grad_(False), counted


def counted(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    step = int(torch.randint(1, 4, (), generator=generator))
    start = int(torch.randint(20, (), generator=generator))
    return [step, *(4 + (start + step * place) % 20 for place in range(length - 1))]
