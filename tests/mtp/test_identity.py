"""A real model's text, prompt after prompt, is that of transformers' generate in every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch

from unlearn.data.encode import Example
from unlearn.models import load_model
from unlearn.mtp.decode import Drafting, decode
from unlearn.mtp.layouts import LAYOUTS
from unlearn.mtp.settings import TrainSettings
from unlearn.mtp.train import train_predictor


def texts(model: Any, number: int, length: int) -> torch.Tensor:
    """Let the model write, drawing from its distribution."""
    torch.manual_seed(0)
    start = torch.full((number, 1), model.config.bos_token_id)
    return model.generate(
        start, do_sample=True, top_k=0, max_new_tokens=length, pad_token_id=0, eos_token_id=[]
    )


def compare(model: Any, prompts: int, steps: int, tokens: int) -> float:
    """Train a little, so that drafts are both right and wrong; give tokens per step."""
    written = texts(model, prompts, 24)
    rows = [Example(ids, ids, 0, at) for at, ids in enumerate(written.tolist())]
    how = TrainSettings(k=4, rank=8, steps=steps, batch=4, anchors=16, lr=5e-3, labels="self")
    predictor = train_predictor(model, rows, how).predictor
    rates = []
    for place, row in enumerate(written):
        prompt = row[: 4 + place % 8]
        given = {"attention_mask": torch.ones_like(prompt[None]), "pad_token_id": 0}
        plain = model.generate(prompt[None], do_sample=False, max_new_tokens=tokens, **given)
        for layout in LAYOUTS:
            found = decode(
                predictor,
                prompt.tolist(),
                max_new_tokens=tokens,
                drafting=Drafting(layout),
                stops=frozenset({model.config.eos_token_id} - {None}),
            )
            assert found.tokens == plain[0, len(prompt) :].tolist(), (layout, place)
            rates.append(found.tokens_per_step)
    return sum(rates) / len(rates)


def test_a_story_is_the_same(shared: Path) -> None:
    model = load_model(str(shared / "models" / "stories260k"), device="cpu")
    assert compare(model, prompts=4, steps=3, tokens=20) >= 1


@pytest.mark.slow
def test_two_hundred_stories_are_the_same(shared: Path) -> None:
    """Every layout, drafts of a trained predictor: more than one token per step is written."""
    model = load_model(str(shared / "models" / "stories260k"), device="cpu")
    assert compare(model, prompts=200, steps=40, tokens=30) > 1.1


@pytest.mark.slow
def test_two_hundred_texts_of_a_trained_model_are_the_same(counting: Any) -> None:
    assert compare(counting[0], prompts=200, steps=40, tokens=30) > 1.3
