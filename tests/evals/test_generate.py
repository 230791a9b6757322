import copy
from typing import Any

import pytest
import torch
from torch import nn

from unlearn.errors import UserError
from unlearn.evals.generate import evaluation_mode, generate, stop_ids

PROMPTS = [[5, 9, 40], [7], [30, 31, 32, 33, 34, 35, 36], [12, 200], [5, 9, 41, 8], [99, 98, 97]]


def greedy(model: Any, prompt: list[int], most: int, stops: set[int]) -> list[int]:
    """Decode one row by itself, without a cache or padding."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) - len(prompt) < most and not stops & set(ids[len(prompt) :]):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def text(tokenizer: Any, ids: list[int]) -> str:
    found: str = tokenizer.decode(ids, skip_special_tokens=True)
    return found.strip()


def lively(model: Any) -> Any:
    """Make answers differ by row, and some of them end early."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        model.lm_head.weight[2] += 0.6
    return model


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_answers_do_not_depend_on_the_batch(
    tiny_model: Any, tiny_tokenizer: Any, budget: int
) -> None:
    model = lively(tiny_model)
    alone = [greedy(model, prompt, 12, {2}) for prompt in PROMPTS]
    assert len({len(tokens) for tokens in alone}) > 1  # rows leave the batch at different times
    found = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=12, token_budget=budget)
    assert found == [text(tiny_tokenizer, tokens) for tokens in alone]


def architectures() -> dict[str, Any]:
    """Give models that differ in positions and cache: rotary, learnt, sliding window, ALiBi."""
    from transformers import BloomConfig, Gemma2Config, GPT2Config, LlamaConfig

    ids = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    rotary = ids | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 64,
    }
    return {
        "rotary": LlamaConfig(**rotary),
        "learnt": GPT2Config(**ids, n_embd=32, n_layer=2, n_head=2, n_positions=64),
        "sliding": Gemma2Config(**rotary, sliding_window=6, query_pre_attn_scalar=16),
        "alibi": BloomConfig(**ids, hidden_size=32, n_layer=2, n_head=2),
    }


@pytest.mark.parametrize("name", ["rotary", "learnt", "sliding", "alibi"])
def test_answers_are_those_of_transformers(tiny_tokenizer: Any, name: str) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architectures()[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        attention = torch.ones_like(ids)
        whole = model.generate(ids, attention_mask=attention, do_sample=False, max_new_tokens=12)
        expected.append(text(tiny_tokenizer, whole[0, len(prompt) :].tolist()))
    assert generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=12) == expected


def test_finished_rows_wait_for_a_tenth_but_not_past_the_last_position(
    tiny_tokenizer: Any,
) -> None:
    """Of 12 rows one ends at GPT-2's 12 positions while the others need 8 tokens more."""
    from transformers import AutoModelForCausalLM, GPT2Config

    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 12, "vocab_size": 300}
    model = AutoModelForCausalLM.from_config(GPT2Config(**size, eos_token_id=2)).eval()
    prompts = [[5] * 11, *([row] for row in range(20, 31))]
    expected = [
        text(tiny_tokenizer, greedy(model, prompt, min(9, 12 - len(prompt)), {2}))
        for prompt in prompts
    ]
    assert generate(model, tiny_tokenizer, prompts, max_new_tokens=9) == expected


def test_a_model_without_a_cache_is_refused(tiny_model: Any, tiny_tokenizer: Any) -> None:
    tiny_model.forward = lambda input_ids: None
    with pytest.raises(UserError, match="no key-value cache"):
        generate(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=2)


def test_known_tokens_are_not_computed_again(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = lively(tiny_model)
    alone = [greedy(model, prompt, 12, {2}) for prompt in PROMPTS]
    expected = [text(tiny_tokenizer, tokens) for tokens in alone]
    for keep in (1, 3, 12):
        known = [tokens[:keep] for tokens in alone]
        found = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=12, known=known)
        assert found == expected
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("nothing is left to compute"))
    assert generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=3, known=alone) == [
        text(tiny_tokenizer, tokens[:3]) for tokens in alone
    ]


def test_known_tokens_after_the_end_are_ignored(tiny_model: Any, tiny_tokenizer: Any) -> None:
    found = generate(tiny_model, tiny_tokenizer, [[5]], max_new_tokens=9, known=[[70, 2, 71]])
    assert found == [text(tiny_tokenizer, [70])]


def test_shipped_sampling_defaults_change_nothing(tiny_model: Any, tiny_tokenizer: Any) -> None:
    expected = generate(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=8)
    tiny_model.generation_config.update(
        do_sample=True, temperature=3.0, repetition_penalty=5.0, max_length=2
    )
    before = copy.deepcopy(tiny_model.generation_config.to_dict())
    assert generate(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=8) == expected
    assert tiny_model.generation_config.to_dict() == before


def test_every_stop_token_of_the_model_ends_an_answer(tiny_model: Any, tiny_tokenizer: Any) -> None:
    tokens = greedy(tiny_model, [5, 9, 40], 6, set())
    tiny_model.generation_config.eos_token_id = [tokens[3], 250]
    assert stop_ids(tiny_model, tiny_tokenizer) == {2, 250, tokens[3]}
    stop = tokens.index(tokens[3])
    found = generate(tiny_model, tiny_tokenizer, [[5, 9, 40]], max_new_tokens=6)
    assert found == [text(tiny_tokenizer, tokens[: stop + 1])]


def test_the_positions_of_the_model_bound_an_answer(
    build_tiny_model: Any, tiny_tokenizer: Any
) -> None:
    model = build_tiny_model(max_position_embeddings=8)
    prompts = [[5, 9, 40], [7] * 8]
    found = generate(model, tiny_tokenizer, prompts, max_new_tokens=200)
    assert found == [text(tiny_tokenizer, greedy(model, prompts[0], 5, {2})), ""]


def test_mode_is_left_as_found(tiny_model: Any, tiny_tokenizer: Any) -> None:
    tiny_model.train()
    tiny_model.model.norm.eval()
    before = {name: module.training for name, module in tiny_model.named_modules()}
    generate(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=2)
    assert {name: module.training for name, module in tiny_model.named_modules()} == before
    with pytest.raises(IndexError), evaluation_mode(tiny_model):
        [][tiny_model.training]
    assert {name: module.training for name, module in tiny_model.named_modules()} == before


def test_dropout_is_off(build_tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = build_tiny_model(attention_dropout=0.9).train()
    first = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=8)
    assert generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=8) == first


def test_adapters_take_part(tiny_model: Any, tiny_tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    plain = generate(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=8)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model, config)
    assert generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=8) == plain  # B starts at 0
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    changed = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=8)
    merged = generate(model.merge_and_unload(), tiny_tokenizer, PROMPTS, max_new_tokens=8)
    assert changed == merged != plain


def test_an_empty_prompt_is_refused(tiny_model: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="row 2 has an empty prompt"):
        generate(tiny_model, tiny_tokenizer, [[5], []], max_new_tokens=2)


def test_no_prompts_give_no_answers(tiny_model: Any, tiny_tokenizer: Any) -> None:
    assert generate(tiny_model, tiny_tokenizer, [], max_new_tokens=2) == []


def test_progress_counts_to_the_end(tiny_model: Any, tiny_tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    generate(
        tiny_model,
        tiny_tokenizer,
        PROMPTS,
        max_new_tokens=2,
        token_budget=10,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == sorted(seen)
    assert seen[-1] == (6, 6)
