"""Two made-up topics, end to end: a model learns both, a dictionary tells them apart, one goes.

Each topic has 40 words, each with 3 that may follow it; 9 words belong to both. What is asserted is
what Farrell et al. 2024, arXiv:2410.19278, report: clamping forgets one topic and spares the other,
setting the same features to 0 does little, and features chosen at random harm both.
"""

import random

import pytest
import torch

from unlearn.curvature.passes import Rows as Measured
from unlearn.data.encode import Example
from unlearn.edits.clamping import Bench
from unlearn.sae.candidates import Placed, candidates
from unlearn.sae.clamp import Clamp
from unlearn.sae.corpus import corpus_of
from unlearn.sae.selection import Rows
from unlearn.sae.settings import TrainSettings
from unlearn.sae.train import train_dictionary

BOS, SHARED, WORDS, LAYER = 1, 9, 40, 1
LENGTH, NUMBER = 24, 20


def text(draw, topic, following):
    """One row: words of a topic, each followed by one of its three; every sixth is a shared one."""
    word, ids = draw.randrange(WORDS), [BOS]
    while len(ids) < LENGTH:
        ids.append(3 + SHARED + topic * WORDS + word)
        word = following[topic][word][draw.randrange(3)]
        if draw.random() < 1 / 6:
            ids.append(3 + draw.randrange(SHARED))
    return ids[:LENGTH]


def rows_of(number, topic, seed):
    table = random.Random(0)
    following = [[[table.randrange(WORDS) for _ in range(3)] for _ in range(WORDS)] for _ in "ab"]
    draw = random.Random(seed)
    texts = [text(draw, topic, following) for _ in range(number)]
    return [Example(ids, [-100, *ids[1:]], 1, place) for place, ids in enumerate(texts)]


@pytest.fixture(scope="module")
def trained():
    """Train a model of three layers on both topics, and a dictionary on what leaves the second."""
    from tests.conftest import build_model

    sets = [rows_of(400, topic, topic) for topic in (0, 1)]
    everything = [row for pair in zip(*sets, strict=True) for row in pair]
    ids = torch.tensor([row.input_ids for row in everything])
    model = build_model(
        vocab_size=3 + SHARED + 2 * WORDS, hidden_size=48, num_hidden_layers=3, intermediate_size=96
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(200):
        batch = ids[torch.arange(step * 32, step * 32 + 32) % len(ids)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    settings = TrainSettings(
        LAYER, "batchtopk", 256, 8, 400, batch=512, buffer=8192, context=LENGTH, pack=False,
        lr=2e-3, warmup_steps=40, threshold_start=200,
    )  # fmt: skip
    corpus = corpus_of(everything, front=[BOS], end=None, context=LENGTH, pack=False)
    return model.eval(), train_dictionary(model, corpus, settings)


@pytest.mark.slow
def test_one_topic_goes_and_the_other_stays(trained):
    """Losses are of rows that neither the model nor the choice has seen."""
    model, found = trained
    assert found.metrics["variance_explained"] > 0.9
    place = Placed("d", LAYER, found.dictionary)
    forget, retain = (Rows(rows_of(200, topic, 10 + topic), (BOS,)) for topic in (0, 1))
    chosen = candidates(model, place, forget, retain, number=NUMBER).first(NUMBER, 0.01)
    assert len(chosen) == NUMBER
    bench = Bench(model, (BOS,), *(Measured(rows_of(100, topic, 20 + topic)) for topic in (0, 1)))

    def change(features, mode="clamp", c=5.0):
        clamp = Clamp.of(found.dictionary, features, layer=LAYER, mode=mode, c=c)
        now, start = bench.measure([clamp]), bench.start
        return now.forget_nll - start.forget_nll, now.retain_nll - start.retain_nll

    clamp, zero = change(chosen), change(chosen, "zero")
    others = change(random.Random(0).sample(range(256), NUMBER))
    assert clamp[0] >= 1.0
    assert clamp[1] <= 0.1
    assert zero[0] <= 0.25 * clamp[0]
    assert others[1] >= 10 * clamp[1]
