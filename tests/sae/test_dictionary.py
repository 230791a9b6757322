"""Every kind of dictionary against its formula, written out in plain Python."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from unlearn.errors import UserError
from unlearn.sae.dictionary import KINDS, built, check_fits
from unlearn.sae.hook import Hook


def tokens(dictionary: Any, number: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(number, dictionary.width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_reconstructions_are_those_of_the_formula(
    kind: str, centred: bool, build: Any, naive: Any
) -> None:
    dictionary = build(kind, centred=centred)
    x = tokens(dictionary)
    expected = torch.tensor(naive(dictionary, x), dtype=torch.float64)
    assert 0 < (expected > 0).double().mean() < 0.9
    torch.testing.assert_close(dictionary.encode(x), expected, rtol=0, atol=1e-12)
    sums = [[sum(a * w for a, w in zip(row, column, strict=True)) for column in
             dictionary.w_dec.t().tolist()] for row in expected.tolist()]  # fmt: skip
    decoded = torch.tensor(sums, dtype=torch.float64) + dictionary.b_dec
    torch.testing.assert_close(dictionary.reconstruct(x), decoded, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_encoded_alike_in_any_batch_and_shape(kind: str, build: Any) -> None:
    dictionary = build(kind)
    x = tokens(dictionary, 12)
    alone = torch.cat([dictionary.encode(one[None]) for one in x])
    torch.testing.assert_close(dictionary.encode(x), alone)
    assert torch.equal(dictionary.encode(x.view(3, 4, -1)), dictionary.encode(x).view(3, 4, -1))


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_scale_changes_no_latent_and_gives_plain_units(
    kind: str, centred: bool, build: Any
) -> None:
    dictionary = build(kind, centred=centred)
    x, scale = tokens(dictionary), 0.37
    folded = dictionary.folded(scale)
    torch.testing.assert_close(folded.encode(x), dictionary.encode(x * scale))
    torch.testing.assert_close(folded.reconstruct(x) * scale, dictionary.reconstruct(x * scale))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "topk"])
def test_directions_of_length_1_reconstruct_alike(kind: str, build: Any) -> None:
    dictionary = build(kind)
    x, normed = tokens(dictionary), dictionary.normed()
    torch.testing.assert_close(normed.norms(), torch.ones_like(normed.b_enc))
    torch.testing.assert_close(normed.reconstruct(x), dictionary.reconstruct(x))
    torch.testing.assert_close(normed.encode(x), dictionary.encode(x) * dictionary.norms())


def test_an_unfinished_batch_kind_is_refused_and_says_why(build: Any) -> None:
    dictionary = replace(build("batchtopk"), threshold=None)
    with pytest.raises(UserError, match="batchtopk dictionary has no threshold"):
        dictionary.encode(tokens(dictionary))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_enc": torch.zeros(11, 5)}, r"w_enc has shape \[11, 5\], not \[5, 11\]"),
        ({"b_enc": torch.zeros(4)}, r"b_enc has shape \[4\], not \[11\]"),
        ({"threshold": torch.full((11,), torch.nan)}, "NaN or infinite weights, in threshold"),
        ({"threshold": None}, "a jumprelu dictionary needs threshold"),
        ({"kind": "gated"}, "a gated dictionary needs r_mag, b_mag"),
        ({"kind": "topk", "k": 12}, "k=12 given for a topk dictionary of 11 latents"),
    ],
)
def test_weights_that_do_not_fit_together_are_named(
    change: dict[str, Any], message: str, build: Any
) -> None:
    weights = build("jumprelu").tensors() | {"kind": "jumprelu", "k": None} | change
    kind, k = weights.pop("kind"), weights.pop("k")
    with pytest.raises(UserError, match=message):
        built("file", kind, {name: one for name, one in weights.items() if one is not None}, k=k)


def test_another_width_or_layer_is_refused_with_both_named(build: Any) -> None:
    dictionary = replace(build("relu"), hook=Hook(3), model="some/model")
    check_fits(dictionary, 5, 3, source="file")
    check_fits(dictionary, 5, source="file")
    with pytest.raises(UserError, match="width 5, the model's have 64"):
        check_fits(dictionary, 64, 3, source="file")
    with pytest.raises(UserError, match=r"blocks.3.hook_resid_post, not .* layer 4"):
        check_fits(dictionary, 5, 4, source="file")
    with pytest.raises(UserError, match="reads no layer's output"):
        check_fits(replace(dictionary, hook=Hook(3, "mlp_out")), 5, 3, source="file")


@pytest.mark.parametrize(
    ("name", "expected", "leaves"),
    [
        ("blocks.5.hook_resid_post", Hook(5), 5),
        ("blocks.5.hook_resid_pre", Hook(5, "resid_pre"), 4),
        ("blocks.0.hook_resid_pre", Hook(0, "resid_pre"), None),
        ("blocks.2.hook_mlp_out", Hook(2, "mlp_out"), None),
        ("blocks.2.attn.hook_z", Hook(2, "attn_z"), None),
        ("layers.11", Hook(11), 11),
        ("model.layers.7.output", Hook(7), 7),
        ("transformer.h.3", Hook(3), 3),
        ("layers.2.mlp", Hook(2, "mlp_out"), None),
        ("hook_embed", None, None),
        ("blocks.1.hook_q", None, None),
    ],
)
def test_names_of_places(name: str, expected: Hook | None, leaves: int | None) -> None:
    found = Hook.parse(name)
    assert found == expected
    assert (found.leaves if found else None) == leaves
    if found and name.startswith("blocks"):
        assert str(found) == name
