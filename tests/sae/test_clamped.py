"""A clamped model answers the same however it is called, and as before once clamps are out."""

import copy

import pytest
import torch

from unlearn.data.encode import Example
from unlearn.errors import UserError
from unlearn.evals.answers import Evaluator
from unlearn.evals.stored import model_key
from unlearn.models import weights_hash
from unlearn.packing import can_pack
from unlearn.sae.clamp import Clamp
from unlearn.sae.clamped import clamped, found, install, remove
from unlearn.sae.dictionary import Dictionary
from unlearn.sae.splice import spliced
from unlearn.scores import Scorer
from unlearn.scoring import scored

BOS = 1
IDS = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(0))


def draw_dictionary(kind="jumprelu", seed=0, **more):
    torch.manual_seed(seed)
    w = torch.randn(32, 64) * 0.3
    more = {"threshold": torch.full((64,), 0.005)} | more if kind == "jumprelu" else more
    return Dictionary(kind, w, torch.zeros(64), w.t().contiguous(), torch.zeros(32), **more)


def make(layer=0, c=4.0, kind="jumprelu", features=(1, 5, 9, 30), **more):
    return Clamp.of(draw_dictionary(kind, **more), features, layer=layer, c=c)


@pytest.fixture(params=["jumprelu", "topk"])
def clamps(request):
    more = {"k": 6} if request.param == "topk" else {}
    return [make(0, kind=request.param, **more), make(1, kind=request.param, seed=1, **more)]


def in_full(model, ids, clamps):
    """Change the layers by hand, position by position, in every row from the second token on."""
    from contextlib import ExitStack

    def change(clamp):
        def changed(hidden):
            rows = [
                [h if t == 0 or ids[i, t] == BOS else clamp(h) for t, h in enumerate(row)]
                for i, row in enumerate(hidden)
            ]
            return torch.stack([torch.stack(row) for row in rows])

        return changed

    with ExitStack() as stack:
        for clamp in clamps:
            stack.enter_context(spliced(model, clamp.layer, change(clamp)))
        return model(ids).logits


def test_layers_are_changed_but_for_first_positions_and_what_stands_in_front(tiny_model, clamps):
    ids = IDS.clone()
    ids[0, 0] = ids[1, 4] = BOS
    before = tiny_model(ids).logits
    expected = in_full(tiny_model, ids, clamps)
    with clamped(tiny_model, clamps, front=[BOS]):
        assert torch.allclose(tiny_model(ids).logits, expected, atol=1e-5)
    assert (expected - before).abs().max() > 0.1
    assert torch.equal(expected[:, 0], before[:, 0])


def build_other(name):
    """Build models that call their decoder, lay out positions or give layers in other ways."""
    import transformers

    small = {
        "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    more = {
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
        "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "Gemma2": {"intermediate_size": 48, "head_dim": 16, "num_key_value_heads": 2},
    }[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**small | more)
    model = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    return getattr(transformers, model)(config).eval()


@pytest.mark.parametrize("name", ["GPT2", "OPT", "Gemma2"])
@torch.no_grad()
def test_other_architectures_are_changed_alike(name):
    """As by hand; written with and without a cache; and padded on the left."""
    model, clamps = build_other(name), [make(0), make(1, seed=1)]
    before, expected = model(IDS).logits, in_full(model, IDS, clamps)
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    left, mask = torch.zeros(3, 2, dtype=torch.long), torch.ones_like(IDS)
    with clamped(model, clamps, front=[BOS]):
        assert torch.allclose(model(IDS).logits, expected, atol=1e-5)
        written = [
            model.generate(IDS, attention_mask=mask, use_cache=cached, **how)
            for cached in (True, False)
        ]
        padded = model.generate(
            torch.cat([left, IDS], 1), attention_mask=torch.cat([left, mask], 1), **how
        )
    assert (expected - before).abs().max() > 0.1
    assert torch.equal(*written)
    assert torch.equal(padded[:, 2:], written[0])


def test_clamps_leave_no_trace(tiny_model, clamps):
    before, name, config = tiny_model(IDS).logits, weights_hash(tiny_model), str(tiny_model.config)
    with clamped(tiny_model, clamps):
        assert not torch.equal(tiny_model(IDS).logits, before)
        assert found(tiny_model) is not None
    assert torch.equal(tiny_model(IDS).logits, before)
    assert (weights_hash(tiny_model), str(tiny_model.config)) == (name, config)
    assert found(tiny_model) is None
    assert torch.equal(install(tiny_model, [])(IDS).logits, before)


def test_padding_on_either_side_and_packing_change_nothing(tiny_model, tiny_tokenizer, clamps):
    """Rows of 9, 6 and 4 tokens: alone, padded, packed, as a tree and left-padded with a cache."""
    rows = [IDS[0].tolist(), IDS[1, :6].tolist(), [*IDS[0, :2].tolist(), *IDS[2, :2].tolist()]]
    with clamped(tiny_model, clamps, front=[BOS]):
        assert can_pack(tiny_model)
        alone = [tiny_model(torch.tensor([row])).logits[0] for row in rows]
        for side in ("left", "right"):
            ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
            for place, row in enumerate(rows):
                where = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
                ids[place, where], mask[place, where] = torch.tensor(row), 1
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            for more in ({}, {"position_ids": positions}):
                if side == "left" and not more:
                    continue  # a Llama then counts padding as positions: another question
                said = tiny_model(ids, attention_mask=mask, **more).logits
                for place in range(3):
                    assert torch.allclose(said[place][mask[place] == 1], alone[place], atol=1e-5)
        examples = [Example(row, [-100, *row[1:]], 1, place) for place, row in enumerate(rows)]
        for places, scores in scored(tiny_model, examples, scorer=Scorer.for_model(tiny_model)):
            for place, values in zip(places, scores.log_probs, strict=True):
                row, logits = rows[place], alone[place].log_softmax(-1)
                expected = torch.stack([logits[t, row[t + 1]] for t in range(len(row) - 1)])
                assert torch.allclose(values[: len(row) - 1], expected, atol=1e-5)


def test_it_writes_the_same_with_and_without_a_cache(tiny_model, tiny_tokenizer, clamps):
    prompts = [IDS[0].tolist(), IDS[1, :5].tolist(), [BOS, *IDS[2, :3].tolist()]]
    with clamped(tiny_model, clamps, front=[BOS]):
        expected = []
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(8):
                ids.append(int(tiny_model(torch.tensor([ids])).logits[0, -1].argmax()))
            expected.append(ids[len(prompt) :])
        for use_cache in (True, False):
            ids = torch.tensor([prompts[0]])
            said = tiny_model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8,
                do_sample=False, use_cache=use_cache, eos_token_id=None,
            )  # fmt: skip
            assert said[0, 9:].tolist() == expected[0]
        tiny_model.generation_config.eos_token_id = None
        tiny_tokenizer.eos_token = "<pad>"
        written = Evaluator(tiny_model, tiny_tokenizer, max_new_tokens=8).write(prompts)
        texts = [tiny_tokenizer.decode(one, skip_special_tokens=True).strip() for one in expected]
        assert written == texts
    without = tiny_model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
    assert without[0, 9:].tolist() != expected[0]


def test_layers_that_give_tuples_are_changed_too(tiny_model, clamps):
    with clamped(tiny_model, clamps):
        expected = tiny_model(IDS).logits

    class Tuple(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, *args, **kwargs):
            return (self.layer(*args, **kwargs), "weights")

    class First(torch.nn.Module):
        def forward(self, hidden, **kwargs):
            return hidden[0]

    seen = []
    layer = tiny_model.model.layers[0]
    tiny_model.model.layers[0] = Tuple(layer)
    with clamped(tiny_model, clamps):
        handle = tiny_model.model.layers[0].register_forward_hook(
            lambda module, args, output: seen.append(output) or output[0]
        )
        assert torch.allclose(tiny_model(IDS).logits, expected)
        handle.remove()
    assert seen[0][1] == "weights"


def test_clamps_keep_their_precision_in_a_model_that_changes_its_own(tiny_model):
    install(tiny_model, [make()])
    tiny_model.bfloat16()
    assert tiny_model.lm_head.weight.dtype == torch.bfloat16
    assert {one.dtype for one in found(tiny_model).buffers()} == {torch.float32}
    assert tiny_model(IDS).logits.dtype == torch.bfloat16


def test_double_precision_is_kept(tiny_model):
    tiny_model.double()
    with clamped(tiny_model, [make()]):
        assert tiny_model(IDS).logits.dtype == torch.float64


def test_a_copy_has_clamps_of_its_own(tiny_model, clamps):
    install(tiny_model, clamps)
    expected = tiny_model(IDS).logits
    again = copy.deepcopy(tiny_model)
    remove(tiny_model)
    assert torch.equal(again(IDS).logits, expected)
    assert not torch.equal(tiny_model(IDS).logits, expected)
    assert torch.equal(remove(again)(IDS).logits, tiny_model(IDS).logits)


def test_stored_results_tell_clamped_models_apart(tiny_model):
    """Other features, another strength, another mode, other rows of the same shape, or none."""
    other = draw_dictionary(seed=7)
    several = [
        [], [make()], [make(c=5.0)], [make(features=(1, 5, 9, 31))], [make(layer=1)],
        [Clamp.of(other, (1, 5, 9, 30), layer=0, c=4.0)],
        [Clamp.of(draw_dictionary(), (1, 5, 9, 30), layer=0, mode="random", c=4.0)],
    ]  # fmt: skip
    keys, hashes = set(), set()
    for each in several:
        with clamped(tiny_model, each):
            hashes.add(weights_hash(tiny_model))
            keys.add(model_key(tiny_model, weights_hash(tiny_model)))
    with clamped(tiny_model, [make()], front=[BOS]):
        keys.add(model_key(tiny_model, weights_hash(tiny_model)))
    assert len(keys) == len(several) + 1
    assert len(hashes) > 3


def test_what_cannot_be_clamped_is_refused(tiny_model, build_tiny_model):
    for clamps, message in (
        ([make(), make()], "two clamps are at layer 0"),
        ([make(layer=2)], "layer=2 given, but the model has 2 layers"),
    ):
        with pytest.raises(UserError, match=message):
            install(tiny_model, clamps)
    with pytest.raises(UserError, match="clamp of width 32 given, the model's is 16"):
        install(build_tiny_model(hidden_size=16), [make()])
    install(tiny_model, [make()])
    with pytest.raises(UserError, match="has clamps already"):
        install(tiny_model, [make()])
    with pytest.raises(TypeError, match="not one set of weights"):
        tiny_model.save_pretrained("somewhere")
    with pytest.raises(UserError, match="was given embeddings"):
        tiny_model(inputs_embeds=torch.zeros(1, 3, 32))
