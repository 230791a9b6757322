"""The closed form is the full encoding and decoding with the rest added back, for every kind."""

import math

import pytest
import torch

from unlearn.errors import UserError
from unlearn.sae.clamp import MODES, Clamp
from unlearn.sae.dictionary import KINDS

X = torch.randn(40, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CHOSEN = [7, 2, 9]


def in_full(d, naive, x, features, value):
    """h' = dec(a') + (h - dec(a)), with a' from plain Python numbers; ``value`` maps a to a'."""
    a = torch.tensor(naive(d, x), dtype=torch.float64)
    changed = a.clone()
    for f in features:
        changed[:, f] = torch.tensor(
            [value(v) if v > 0 else v for v in a[:, f].tolist()], dtype=torch.float64
        )
    return d.decode(changed) + (x - d.decode(a)), a


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("mode", "value"),
    [("clamp", lambda a: -2.5), ("zero", lambda a: 0.0), ("scale", lambda a: a - 2.5 * a)],
)
def test_the_closed_form_is_the_full_one(build, naive, kind, centred, mode, value):
    d = build(kind, centred=centred)
    expected, a = in_full(d, naive, X, CHOSEN, value)
    clamp = Clamp.of(d, CHOSEN, layer=0, mode=mode, c=2.5)
    assert (clamp(X) - expected).abs().max() < 1e-10
    assert torch.allclose(clamp.active(X), a[:, CHOSEN])
    assert 0 < (a[:, CHOSEN] > 0).sum() < a[:, CHOSEN].numel()
    assert clamp(X.float()).dtype == torch.float32
    assert (clamp(X.float()) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_rows_of_chosen_latents_are_kept(build, kind):
    """A topk dictionary needs its whole encoder; of directions there are the chosen ones alone."""
    clamp = Clamp.of(build(kind), CHOSEN, layer=0, c=1.0)
    assert clamp.encoder.w_enc.shape == (5, 11 if kind == "topk" else 3)
    assert clamp.directions.shape == (3, 5)


def test_where_nothing_chosen_is_active_the_bits_stay(build):
    d = build("relu")
    for dtype in (torch.float32, torch.bfloat16):
        x = X.to(dtype)
        clamp = Clamp.of(d, CHOSEN, layer=0, c=9.0)
        silent = ~(clamp.to(x.float()).active(x.float()) > 0).any(-1)
        assert 0 < silent.sum() < len(x)
        assert torch.equal(clamp(x)[silent], x[silent])
        assert not torch.equal(clamp(x)[~silent], x[~silent])


def test_bfloat16_is_changed_in_float32_and_rounded_once(build):
    clamp, x = Clamp.of(build("jumprelu"), CHOSEN, layer=0, c=3.0), X.bfloat16()
    assert torch.equal(clamp(x), clamp(x.float()).bfloat16())


def test_the_control_goes_elsewhere_just_as_far(build):
    """Of 11 features 2, 3 and 10 are chosen: their stand-ins are 4, 4 and 0 (after the last)."""
    d = build("relu")
    clamp = Clamp.of(d, [2, 3, 10], layer=0, mode="random", c=2.0)
    for row, own, other in zip(
        clamp.directions, d.w_dec[[2, 3, 10]], d.w_dec[[4, 4, 0]], strict=True
    ):
        assert row.norm() == pytest.approx(own.norm())
        assert torch.cosine_similarity(row, other, dim=0) == pytest.approx(1.0)
    one = Clamp.of(d, [3], layer=0, mode="random", c=2.0).change(X).norm(dim=1)
    assert torch.allclose(one, Clamp.of(d, [3], layer=0, c=2.0).change(X).norm(dim=1))


def test_a_clamp_is_rebuilt_from_what_is_stored_of_it(build):
    for kind in ("topk", "gated", "jumprelu"):
        for mode in MODES:
            clamp = Clamp.of(build(kind), CHOSEN, layer=3, mode=mode, c=2.0)
            again = Clamp.rebuilt(clamp.about(), clamp.tensors())
            assert torch.equal(again(X), clamp(X))
            assert again.about() == clamp.about()


@pytest.mark.parametrize(
    ("features", "how", "message"),
    [
        ([11], {"c": 1.0}, "feature 11 given, but the dictionary has 11"),
        ([-1], {"c": 1.0}, "feature -1 given"),
        ([2, 2], {"c": 1.0}, "feature 2 is given twice"),
        ([2], {"c": 0.0}, "c=0.0 given with mode clamp"),
        ([2], {"c": math.inf}, "c=inf"),
        ([2], {"c": 1.0, "mode": "clump"}, "unknown mode 'clump'.*did you mean 'clamp'"),
        (list(range(11)), {"c": 1.0, "mode": "random"}, "every feature is chosen"),
    ],
)
def test_mistakes_are_named(build, features, how, message):
    with pytest.raises(UserError, match=message):
        Clamp.of(build("relu"), features, layer=0, **how)
