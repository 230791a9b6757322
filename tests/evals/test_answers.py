"""The one-pass evaluator: equal to the plain way, whatever the order, batches and duplicates."""

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn.data.encode import Example
from unlearn.errors import UserError
from unlearn.evals.answers import Evaluator, known_start, select
from unlearn.evals.generate import generate
from unlearn.evals.memory import check_fits, scoring_bytes, writing_bytes
from unlearn.models import weights_hash
from unlearn.scores import Scores

NAMES = ("log_probs", "correct", "mean", "variance")


def example(prompt: Sequence[int], answer: Sequence[int], row: int = 0) -> Example:
    return Example([*prompt, *answer], [-100] * len(prompt) + [*answer], len(prompt), row)


def questions(num: int = 5, answers: int = 4) -> list[Example]:
    """Give answers of 1 to 8 tokens to prompts of 1 to 9 that share their first two tokens."""
    draw = random.Random(0)
    prompts = [[5, 6, *draw.choices(range(3, 300), k=size)] for size in range(num)]
    return [
        example(prompt, draw.choices(range(3, 300), k=draw.randint(1, 8)), row)
        for row, prompt in enumerate(prompts)
        for _ in range(answers)
    ]


def one_by_one(model: Any, row: Example) -> list[torch.Tensor]:
    """Score one row by itself, from full logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.input_ids])).logits
    scores = Scores.from_logits(logits, torch.tensor([row.labels]), statistics=True)
    return [getattr(scores, name)[0][scores.mask[0]] for name in NAMES]


def row_of(scores: Scores, row: int) -> list[torch.Tensor]:
    return [getattr(scores, name)[row][scores.mask[row]] for name in NAMES]


def count_passes(model: Any) -> list[int]:
    """Count the tokens of every forward pass from here on."""
    seen: list[int] = []

    def count(_module: Any, _inputs: Any, named: Any) -> None:
        seen.append(named["input_ids"].numel())

    model.register_forward_pre_hook(count, with_kwargs=True)
    return seen


def test_order_batches_and_duplicates_change_nothing(tiny_model: Any, tiny_tokenizer: Any) -> None:
    rows = questions()
    alone = [one_by_one(tiny_model, row) for row in rows]

    @given(
        st.permutations(range(20)),
        st.lists(st.integers(0, 19), max_size=10),
        st.sampled_from([1, 17, 64, 8192]),
    )
    @settings(max_examples=15, deadline=None, derandomize=True)
    def check(order: list[int], again: list[int], batch_tokens: int) -> None:
        places = [*order, *again]
        scores = Evaluator(tiny_model, tiny_tokenizer, batch_tokens).score(
            [rows[place] for place in places]
        )
        assert len(scores.mask) == len(places)
        for row, place in enumerate(places):
            for got, expected in zip(row_of(scores, row), alone[place], strict=True):
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)

    check()


def test_equal_sequences_are_scored_once(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """Twelve rows, three different ones; the same tokens with other labels are another row."""
    one, two = example([5, 6, 7], [8, 9]), example([5, 6, 7], [8, 10, 11])
    unlabelled = Example(one.input_ids, [-100] * 4 + [9], 4, 0)
    evaluator = Evaluator(tiny_model, tiny_tokenizer)
    seen: list[tuple[int, int]] = []
    scores = evaluator.score(
        [one, two, unlabelled] * 4, progress=lambda done, total: seen.append((done, total))
    )
    assert scores.num_tokens.tolist() == [2, 3, 1] * 4
    assert torch.equal(scores.log_probs[:3], scores.log_probs[9:])
    assert scores.log_probs[2, 0] == scores.log_probs[0, 1]
    assert seen[-1] == (12, 12)
    passes = count_passes(tiny_model)
    evaluator.score([one, two] * 4)
    assert passes[-1] == 3 + 1 + 1  # the prompt, 8 for both, 10; the last tokens predict nothing


def test_the_layout_is_that_of_answers_alone(tiny_model: Any, tiny_tokenizer: Any) -> None:
    scores = Evaluator(tiny_model, tiny_tokenizer).score(
        [example([5] * 9, [7]), example([5], [7, 8, 9])]
    )
    assert scores.mask.tolist() == [[True, False, False], [True, True, True]]
    assert scores.log_probs[0, 1:].tolist() == [0, 0]
    assert torch.equal(scores.attended, scores.mask)
    kept = select(scores, [1])
    assert torch.equal(kept.log_probs[0], scores.log_probs[1])


def test_a_float64_model_keeps_its_precision(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model, rows = tiny_model.double(), questions()
    scores = Evaluator(model, tiny_tokenizer, 64).score(rows)
    assert scores.log_probs.dtype == torch.float64
    for row, given_row in enumerate(rows):
        for got, expected in zip(row_of(scores, row), one_by_one(model, given_row), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_the_model_is_left_as_found(tiny_model: Any, tiny_tokenizer: Any) -> None:
    tiny_model.train()
    Evaluator(tiny_model, tiny_tokenizer).score(questions())
    assert tiny_model.training
    assert tiny_model.config._attn_implementation == "sdpa"


PROMPTS = [[5, 9, 40], [7], [30, 31, 32, 33], [5, 9, 40], [12, 200], [7]]


def test_equal_prompts_are_answered_once(tiny_model: Any, tiny_tokenizer: Any) -> None:
    plain = generate(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=6)
    seen: list[tuple[int, int]] = []
    evaluator = Evaluator(tiny_model, tiny_tokenizer, max_new_tokens=6)
    rows: list[int] = []
    tiny_model.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    found = evaluator.write(PROMPTS, progress=lambda done, total: seen.append((done, total)))
    assert found == plain
    assert max(rows) == 4
    assert seen == sorted(seen)
    assert seen[-1] == (6, 6)


def test_the_longest_known_start_of_a_prompt_is_used(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """Two rows ask the same; one of them knows the whole answer, so nothing is decoded."""
    tokens = greedy(tiny_model, PROMPTS[0], 6)
    tiny_model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("nothing is left to do"))
    evaluator = Evaluator(tiny_model, tiny_tokenizer, max_new_tokens=6)
    found = evaluator.write([PROMPTS[0]] * 2, known=[tokens[:1], tokens])
    assert found[0] == found[1] == tiny_tokenizer.decode(tokens, skip_special_tokens=True).strip()


def greedy(model: Any, prompt: list[int], most: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(most):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_known_start_ends_at_the_first_wrong_prediction() -> None:
    row = example([5, 6], [7, 8, 9])
    assert known_start(row, [True, True, False], [5, 6]) == [7, 8]
    assert known_start(row, [False, True, True], [5, 6]) == []
    assert known_start(row, [True, True, True], [5, 6]) == [7, 8, 9]
    assert known_start(row, [True, True, True], [5, 7]) == []  # tokens merged over the border


def test_the_starts_that_scoring_tells_change_no_answer(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """Half of the answers are what the model would write anyway."""
    prompts = [[5, 6, row] for row in range(10, 18)]
    rows = [
        example(prompt, greedy(tiny_model, prompt, 5 if row % 2 else 2) + [9] * (row % 3))
        for row, prompt in enumerate(prompts)
    ]
    evaluator = Evaluator(tiny_model, tiny_tokenizer, max_new_tokens=9)
    scores = evaluator.score(rows)
    assert scores.correct is not None
    hits = [scores.correct[row][scores.mask[row]].tolist() for row in range(len(rows))]
    known = [known_start(*given_row) for given_row in zip(rows, hits, prompts, strict=True)]
    assert {len(start) for start in known} >= {2, 5}
    assert evaluator.write(prompts, known=known) == evaluator.write(prompts)


def test_nan_is_named_before_the_work(tiny_model: Any, tiny_tokenizer: Any) -> None:
    evaluator = Evaluator(tiny_model, tiny_tokenizer)
    evaluator.check_finite()
    evaluator.check_finite(questions())
    with torch.no_grad():
        tiny_model.model.layers[1].mlp.up_proj.weight[3, 3] = math.nan
    passes = count_passes(tiny_model)
    message = "'runs/a' gives NaN or infinite numbers"
    with pytest.raises(UserError, match=message) as error:
        evaluator.check_finite(questions(), name="'runs/a'")
    assert "float32" in error.value.hint
    assert max(passes) < 40
    with pytest.raises(UserError):
        evaluator.check_finite()


def test_a_batch_that_does_not_fit_names_one_that_does() -> None:
    """3 GiB needed, 2 free: 8192 * 2 / 3 * 0.9 = 4915 tokens."""
    check_fits(2**31, 2**31, 8192)
    with pytest.raises(UserError, match=r"8192 tokens needs about 3\.0 GiB .* 2\.0 GiB") as error:
        check_fits(3 * 2**30, 2**31, 8192)
    assert "4915" in error.value.hint


def test_memory_by_hand(tiny_model: Any) -> None:
    """Width 32, inner 48, 300 words, fp32, 2 layers with 2 heads of 16.

    Scoring 10 tokens: 10 * (16 * 32 + 3 * 48) * 4 + 4 * (10 * 300 * 4) = 26240 + 48000; writing:
    2 (keys and values) * 10 * 2 layers * 32 * 4 bytes.
    """
    assert scoring_bytes(tiny_model, 10) == 74240
    assert writing_bytes(tiny_model, 10) == 5120


def test_adapters_are_scored_too(tiny_model: Any, tiny_tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    rows = questions()
    before = Evaluator(tiny_model, tiny_tokenizer).score(rows)
    model = get_peft_model(tiny_model, config)
    wrapped = Evaluator(model, tiny_tokenizer, weights_hash=weights_hash(model)).score(rows)
    merged = Evaluator(model.merge_and_unload(), tiny_tokenizer).score(rows)
    torch.testing.assert_close(wrapped.log_probs, merged.log_probs, rtol=0, atol=1e-5)
    assert (wrapped.log_probs - before.log_probs).abs().max() > 0.1
