"""A composition against its formula, and as the model that everything else takes it for."""

import math

import pytest
import torch
from transformers import DynamicCache

from unlearn.assistant.build import Assistant, assisted, lower_part
from unlearn.assistant.compose import together
from unlearn.data.encode import Example
from unlearn.errors import UserError
from unlearn.head import plain
from unlearn.models import Lora, weights_hash
from unlearn.packing import can_pack
from unlearn.scores import Scorer, Scores
from unlearn.scoring import scored

RULES = ("subtract", "offset", "suppress")
IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def naive(model, ids, *, writing=False):
    """Combine the logits of separate passes token by token, in plain Python."""
    decoders, head = plain(model).decoder, plain(model).head
    each = [part(input_ids=ids).logits.double() for part in decoders.models]
    out = torch.empty_like(each[0])
    weight, share = head.hyper["weight"], head.hyper.get("top_filter")
    for place in torch.cartesian_prod(*(torch.arange(n) for n in ids.shape)).tolist():
        z, a, *s = (logits[tuple(place)].tolist() for logits in each)
        ranked = sorted(z, reverse=True)
        for token in range(len(z)):
            if head.rule == "offset":
                new = z[token] + weight * (a[token] - s[0][token])
            elif head.rule == "suppress":
                new = z[token] - weight * max(0.0, a[token] - z[token])
            elif z[token] >= min(ranked[0] + math.log(share), ranked[int(share * len(z)) - 1]):
                new = z[token] - weight * a[token]
            else:
                new = -math.inf if writing else z[token]
            out[(*place, token)] = new
    return out


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_formula(build_assisted, build_tiny_model, rule, tied):
    base = build_tiny_model(num_hidden_layers=3, tie_word_embeddings=tied).double()
    model = build_assisted(rule, base=base)
    with torch.no_grad():
        looked_up, written = model(IDS).logits, model(IDS, use_cache=True).logits
        torch.testing.assert_close(looked_up, naive(model, IDS), rtol=0, atol=1e-12)
        torch.testing.assert_close(written, naive(model, IDS, writing=True), rtol=0, atol=1e-12)
        assert not torch.allclose(looked_up, base(IDS).logits, atol=0.1)


@pytest.mark.parametrize("rule", RULES)
def test_weight_zero_is_the_base_bit_for_bit(build_assisted, build_tiny_model, rule):
    base = build_tiny_model(num_hidden_layers=3)
    expected = base(IDS).logits
    model = build_assisted(rule, base=base, weight=0.0)
    assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model(IDS, use_cache=True).logits, expected)
    assert plain(model).writes_as_it_scores


def test_before_training_an_offset_changes_nothing(build_tiny_model):
    base = build_tiny_model(num_hidden_layers=3)
    expected = base(IDS).logits
    model = assisted(base, Assistant(2, "offset", {"weight": 1.0}), Lora(4)).eval()
    assert torch.equal(model(IDS).logits, expected)


def test_a_cached_pass_token_by_token_equals_a_whole_one(build_assisted):
    for rule in RULES:
        model = build_assisted(rule)
        whole = model(IDS, use_cache=True).logits
        for cache in (DynamicCache(), DynamicCache(config=plain(model).config)):
            said = [
                model(token, past_key_values=cache, use_cache=True).logits
                for token in IDS.split(1, dim=1)
            ]
            torch.testing.assert_close(torch.cat(said, dim=1), whole, rtol=0, atol=2e-5)
            assert cache.get_seq_length() == 9


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_generation_with_a_cache_equals_generation_without(build_assisted, rule, how):
    model = build_assisted(rule)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | how
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        found.append(model.generate(**inputs, use_cache=use_cache, **settings))
    assert torch.equal(*found)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("beams", [1, 3])
def test_left_padded_rows_are_answered_as_alone(build_assisted, rule, beams):
    model = build_assisted(rule)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    rows = [IDS[0, :9], IDS[1, :4]]
    padded, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for place, row in enumerate(rows):
        padded[place, 9 - len(row) :], mask[place, 9 - len(row) :] = row, 1
    batch = model.generate(input_ids=padded, attention_mask=mask, **settings)[:, 9:]
    for row, found in zip(rows, batch, strict=True):
        ones = torch.ones_like(row[None])
        alone = model.generate(input_ids=row[None], attention_mask=ones, **settings)
        assert alone[0, len(row) :].tolist() == found[: alone.shape[1] - len(row)].tolist()


def test_left_padding_moves_nothing_when_scores_are_looked_up(build_assisted):
    model = build_assisted()
    padded = torch.nn.functional.pad(IDS, (3, 0))
    mask = (torch.arange(12) >= 3).long().expand(2, -1)
    found = model(padded, attention_mask=mask).logits[:, 3:]
    torch.testing.assert_close(found, model(IDS).logits, rtol=0, atol=1e-5)


def test_greedy_writing_never_chooses_a_dropped_token(build_assisted):
    """At a filter of 0.01 of 300 tokens at least three stay; the others must not be written."""
    from unlearn.assistant.rules import likely

    model = build_assisted(weight=5.0, top_filter=0.01)
    ids = model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=20, do_sample=False
    )
    kept = likely(plain(model).decoder.base(ids).logits, 0.01)[:, 8:-1]
    assert kept.gather(-1, ids[:, 9:, None]).all()


@pytest.mark.parametrize("rule", RULES)
def test_the_scorer_reads_it_in_chunks_and_packed(build_assisted, rule):
    model = build_assisted(rule)
    scorer = Scorer.for_model(model)
    assert scorer.head is not None
    assert can_pack(model)
    rows = [(IDS[0].tolist(), 3), (IDS[1, :6].tolist(), 2), (IDS[0, :5].tolist(), 3)]
    examples = [
        Example(ids, [-100] * start + ids[start:], start, place)
        for place, (ids, start) in enumerate(rows)
    ]
    for places, group in scored(model, examples, want=("correct", "statistics")):
        for place, log_probs, mean, mask in zip(
            places, group.log_probs, group.mean, group.mask, strict=True
        ):
            ids, start = rows[place]
            labels = torch.tensor([[-100] * start + ids[start:]])
            logits = naive(model, torch.tensor([ids]))
            expected = Scores.from_logits(logits, labels, statistics=True)
            chosen = expected.mask[0]
            close = {"rtol": 0, "atol": 1e-4, "check_dtype": False}
            torch.testing.assert_close(log_probs[mask], expected.log_probs[0, chosen], **close)
            torch.testing.assert_close(mean[mask], expected.mean[0, chosen], **close)


def test_the_assistant_shares_the_frozen_weights_and_only_adapters_are_trained(build_tiny_model):
    base = build_tiny_model(num_hidden_layers=3)
    own = {tensor.data_ptr() for tensor in base.parameters()}
    model = assisted(base, Assistant(2, "offset", {}), Lora(4))
    for name, tensor in model.named_parameters():
        assert tensor.requires_grad == ("lora_" in name)
        assert tensor.requires_grad or tensor.data_ptr() in own
    adapted = {n.split(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert len(adapted) == 2 * 7  # seven linear layers in each of two layers, and not the head
    assert all(".decoder.assistant.model.layers." in name for name in adapted)
    assert len(base.model.layers) == 3
    assert base.config.num_hidden_layers == 3


def test_alone_the_assistant_answers_by_itself(build_assisted):
    model = build_assisted()
    plain(model).alone = True
    expected = plain(model).decoder.assistant(input_ids=IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-6)
    with together(model):
        torch.testing.assert_close(model(IDS).logits, naive(model, IDS).float(), rtol=0, atol=1e-4)
    assert plain(model).alone
    assert Scorer.for_model(model).head is not None


def test_stored_results_tell_compositions_apart(build_assisted, build_tiny_model):
    from unlearn.evals.stored import model_key

    base = build_tiny_model(num_hidden_layers=3)
    models = [build_assisted(base=base, weight=weight) for weight in (0.5, 0.75)]
    assert weights_hash(models[0]) == weights_hash(models[1])
    assert model_key(models[0], "same") != model_key(models[1], "same")


def test_bfloat16_is_combined_in_float32(build_assisted, build_tiny_model):
    model = build_assisted(base=build_tiny_model(num_hidden_layers=3).bfloat16())
    said = model(IDS).logits
    assert said.dtype == torch.float32
    adapters = {p.dtype for n, p in model.named_parameters() if "lora_" in n}
    assert adapters == {torch.float32}


@pytest.mark.parametrize("layers", [0, 4])
def test_more_layers_than_there_are_is_a_mistake(build_tiny_model, layers):
    with pytest.raises(UserError, match=f"assistant.layers={layers} given, .* has 3 layers"):
        lower_part(build_tiny_model(num_hidden_layers=3), layers)


def test_a_base_with_adapters_or_an_assistant_is_refused(build_assisted, tiny_model):
    from unlearn.models import add_lora

    model = build_assisted()
    with pytest.raises(UserError, match="has adapters"):
        assisted(add_lora(tiny_model, Lora(2)), Assistant(1), Lora(2))
    with pytest.raises(UserError, match="has adapters"):
        assisted(model, Assistant(1), Lora(2))
    with pytest.raises(TypeError, match="save_composed"):
        plain(model).save_pretrained("nowhere")


def test_unknown_lora_target_is_named(tiny_model):
    with pytest.raises(UserError, match="'q_prj'; did you mean 'q_proj'"):
        assisted(tiny_model, Assistant(1), Lora(2, targets=("q_prj",)))


def test_loss_of_labels_is_that_of_the_combined_logits(build_assisted):
    model = build_assisted()
    said = model(IDS, labels=IDS)
    scores = Scores.from_logits(said.logits, IDS)
    expected = -scores.log_probs.sum() / scores.mask.sum()
    torch.testing.assert_close(said.loss, expected)
