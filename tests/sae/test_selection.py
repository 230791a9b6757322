"""Features are chosen by exact counts; what nobody reads is not counted."""

import random

import pytest
import torch

from unlearn.activations import read_layer
from unlearn.data.encode import Example
from unlearn.errors import UserError
from unlearn.sae.dictionary import Dictionary
from unlearn.sae.firings import firings, passages
from unlearn.sae.selection import Frequencies, Rows, choose, frequencies

BOS = 1


def counted(forget, retain, tokens=100):
    return Frequencies(torch.tensor(forget), torch.tensor(retain), tokens, tokens)


def test_the_planted_features_are_chosen_in_their_order():
    """tau 0.02 of 100 tokens: 0 and 1 tie at 9; 2 fires too often on retain, 4 never on forget."""
    found = counted([9, 9, 50, 10, 0, 1], [0, 1, 2, 1, 0, 1])
    assert choose(found, 10, tau=0.02) == [3, 0, 1, 5]
    assert choose(found, 2, tau=0.02) == [3, 0]
    assert choose(found, 10, tau=0.02, exclude=[3, 1]) == [0, 5]


def test_the_bound_is_strict():
    """1 of 100 is 0.01: not less than it. So is 3 of 300."""
    assert choose(counted([5, 5], [1, 0]), 2, tau=0.01) == [1]
    assert choose(counted([5, 5], [3, 0], tokens=300), 2, tau=0.01) == [1]
    assert choose(counted([5, 5], [1, 0]), 2, tau=0.0100001) == [0, 1]


def test_nothing_eligible_says_what_is_nearest():
    """0 and 2 are rarest on retain (3 %), and 2 is commoner on forget."""
    found = counted([4, 50, 8, 0], [3, 9, 3, 0])
    with pytest.raises(
        UserError, match=r"nearest is 2, on 8.000% of forget and 3.000% of retain .*above 0.03 adm"
    ):
        choose(found, 5, tau=0.03)
    with pytest.raises(UserError, match="no latent fires on the forget set at all"):
        choose(counted([0, 0], [0, 0]), 5)


def rows_of(seed, number=11, **how):
    draw = random.Random(seed)
    ids = [
        [BOS, *(draw.randrange(3, 300) for _ in range(draw.randrange(2, 9)))] for _ in range(number)
    ]
    ids[3] = ids[3][1:]  # a row that begins without it
    ids[4] = [*ids[4], BOS, 7]  # and one with another in the middle
    return Rows(
        [Example(one, [-100, *one[1:]], 1, at) for at, one in enumerate(ids)], (BOS,), **how
    )


@pytest.fixture
def dictionary():
    torch.manual_seed(0)
    w = torch.randn(32, 64) * 0.3
    threshold = torch.full((64,), 0.005)
    return Dictionary(
        "jumprelu", w, torch.zeros(64), w.t().contiguous(), torch.zeros(32), threshold
    )


def by_hand(model, dictionary, rows, layer):
    """Count row by row and token by token; the first of each and every BOS stay out."""
    found, tokens = [0] * dictionary.latents, 0
    for one in rows.examples:
        ids = torch.tensor([one.input_ids])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        hidden = read_layer(model, {"": batch}, layer)[""].hidden[0]
        for t, h in enumerate(hidden):
            if t == 0 or one.input_ids[t] == BOS:
                continue
            tokens += 1
            for f, a in enumerate(dictionary.encode(h).tolist()):
                found[f] += a > 0
    return found, tokens


@torch.no_grad()
def test_counts_are_those_of_brute_force_for_any_batch(tiny_model, dictionary):
    expected = [by_hand(tiny_model, dictionary, rows_of(seed), 1) for seed in (0, 1)]
    for tokens in (1, 13, 4096):
        forget, retain = (rows_of(seed, batch_tokens=tokens) for seed in (0, 1))
        found = frequencies(tiny_model, dictionary, 1, forget, retain)
        assert (found.forget.tolist(), found.forget_tokens) == expected[0]
        assert (found.retain.tolist(), found.retain_tokens) == expected[1]
        assert found.forget.dtype == torch.int64
    assert 0 < found.forget.sum() < found.forget_tokens * 64


@torch.no_grad()
def test_firings_are_counted_and_their_passages_hold_the_token(
    tiny_model, tiny_tokenizer, dictionary
):
    rows, chosen = rows_of(0, batch_tokens=13), [30, 2, 17]
    counts = frequencies(tiny_model, dictionary, 1, rows, rows_of(1)).forget
    found = firings(tiny_model, dictionary, chosen, 1, rows)
    assert [int((found.feature == one).sum()) for one in chosen] == counts[chosen].tolist()
    assert found.percentile(chosen) == pytest.approx(
        float(torch.tensor(found.value).quantile(0.99))
    )
    assert found.mean(2) == pytest.approx(float(found.value[found.feature == 2].mean()))
    (first, *others) = found.strongest(2, 4)
    assert first[2] == found.value[found.feature == 2].max() >= others[0][2]
    assert len({row for row, _, _ in (first, *others)}) == 1 + len(others)
    shown = passages(found, 2, rows, tiny_tokenizer, 3)[0]
    ids = rows.examples[first[0]].input_ids
    assert shown.before + shown.token == tiny_tokenizer.decode(ids[: first[1] + 1])
    assert (shown.row, shown.value) == (first[0], first[2])


def test_activations_that_are_no_numbers_are_refused(tiny_model, dictionary):
    with torch.no_grad():
        tiny_model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="what leaves layer 1 is NaN or infinite"):
        frequencies(tiny_model, dictionary, 1, rows_of(0), rows_of(1))


def test_a_set_without_a_token_that_counts_is_refused(tiny_model, dictionary):
    single = Rows([Example([BOS], [-100], 1, 0)], (BOS,))
    with pytest.raises(UserError, match="the retain set has no token but the first"):
        frequencies(tiny_model, dictionary, 1, rows_of(0), single)
