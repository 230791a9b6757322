"""Tiny models in float64 with random weights, rows of uneven length, and a curvature done naively.

The naive one goes through one row at a time, without padding, with full logits and with autograd's
own gradients at the outputs of layers.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from unlearn.curvature.labels import uniforms
from unlearn.curvature.layers import Tracked
from unlearn.data.encode import Example

VOCAB = 11
KINDS = ("llama", "gpt2", "neox")


def make_model(kind: str = "llama", seed: int = 0) -> Any:
    """Build a model of two blocks and width 8, with weights large enough for curvature."""
    torch.manual_seed(seed)
    if kind == "gpt2":
        model: Any = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=8, n_layer=2, n_head=2)
        )
    elif kind == "neox":
        config = GPTNeoXConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=2,
                               num_attention_heads=2, intermediate_size=12,
                               max_position_embeddings=32)  # fmt: skip
        model = GPTNeoXForCausalLM(config)
    else:
        llama = LlamaConfig(vocab_size=VOCAB, hidden_size=8, intermediate_size=12,
                            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                            max_position_embeddings=32, tie_word_embeddings=False)  # fmt: skip
        model = LlamaForCausalLM(llama)
    model = model.double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.6)
            elif name.endswith("bias"):
                weight.normal_(std=0.1)
    return model


def make_rows(number: int = 6, seed: int = 0, labelled: int | None = None) -> list[Example]:
    """Draw rows with a prompt and an answer, some with unlabelled tokens after it."""
    draw = random.Random(seed)
    rows = []
    for row in range(number):
        prompt, answer, rest = draw.randint(1, 4), labelled or draw.randint(1, 5), row % 3
        ids = [draw.randrange(VOCAB) for _ in range(prompt + answer + rest)]
        labels = [-100] * prompt + ids[prompt : prompt + answer] + [-100] * rest
        rows.append(Example(ids, labels, prompt, row))
    return rows


def naive_gradients(
    model: Any, layers: list[Tracked], row: Example, choose: Callable[[torch.Tensor, int], int]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Give inputs and output gradients [token, width] of one row, up to its last loss position."""
    kept: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}
    handles = [
        layer.module.register_forward_hook(
            lambda module, inputs, out, name=layer.name: kept[name].extend([inputs[0], out])
        )
        for layer in layers
    ]
    logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    places = [t for t in range(len(row.labels) - 1) if row.labels[t + 1] != -100]
    labels = [choose(logits[t].detach().softmax(-1), t) for t in places]
    loss = -logits[places].log_softmax(-1)[range(len(places)), labels].sum()
    outs = [kept[layer.name][1] for layer in layers]
    grads = torch.autograd.grad(loss, outs)
    end = places[-1] + 1
    return {
        layer.name: (kept[layer.name][0][0, :end].detach(), grad[0, :end])
        for layer, grad in zip(layers, grads, strict=True)
    }


def naive_factors(
    model: Any, layers: list[Tracked], rows: list[Example], seed: int | None
) -> dict[str, tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]]:
    """Give A, G and the row gradients u; labels are the rows' own, or drawn with this seed."""
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {one.name: [] for one in layers}
    labels = 0
    for row in rows:

        def choose(p: torch.Tensor, t: int, row: Example = row) -> int:
            if seed is None:
                return row.input_ids[t + 1]
            at = float(uniforms(seed, 0, 0, torch.tensor([row.row]), torch.tensor([t]))[0])
            return sum(1 for below in p.cumsum(0).tolist() if below <= at)

        labels += sum(label != -100 for label in row.labels[1:])
        for name, pair in naive_gradients(model, layers, row, choose).items():
            found[name].append(pair)
    result = {}
    for name, pairs in found.items():
        tokens = sum(len(a) for a, _ in pairs)
        inputs = sum(torch.einsum("ti,tj->ij", a, a) for a, _ in pairs) / tokens
        outputs = sum(torch.einsum("ti,tj->ij", g, g) for _, g in pairs) / labels
        result[name] = (inputs, outputs, [g.t() @ a / labels**0.5 for a, g in pairs])
    return result


@pytest.fixture(params=KINDS)
def any_model(request: Any) -> Any:
    return make_model(request.param)


@pytest.fixture
def llama() -> Any:
    return make_model()


@pytest.fixture
def rows() -> list[Example]:
    return make_rows()


@pytest.fixture
def fresh_model() -> Callable[..., Any]:
    """Give the builder of models itself."""
    return make_model


@pytest.fixture
def fresh_rows() -> Callable[..., list[Example]]:
    """Give the builder of rows itself."""
    return make_rows


@pytest.fixture
def naive() -> Callable[..., Any]:
    """Give the naive curvature itself."""
    return naive_factors
