"""What is written is what the model alone writes: for any drafts, layouts, lengths and stops."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unlearn.errors import UserError
from unlearn.mtp.decode import Drafting, Sampled, Written, decode
from unlearn.mtp.layouts import LAYOUTS

PROMPT = [5, 17, 3, 88]


@pytest.fixture
def oracle() -> Any:
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("oracle", Path(__file__).with_name("oracle.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def alone(model: Any, prompt: list[int], number: int, stop: int | None = None) -> list[int]:
    """Give the greedy continuation of transformers' own generate."""
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=number,
        eos_token_id=stop, pad_token_id=0,
    )  # fmt: skip
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chance", [0.0, 0.6, 1.0])
def test_greedy_text_is_the_models_own(
    predictor: Any, oracle: Any, layout: str, chance: float
) -> None:
    """Drafts that are all wrong, right with 0.6 (every number kept occurs), all right."""
    true = alone(predictor.model, PROMPT, 60)
    oracle.with_drafts(predictor, PROMPT + true, oracle.right_with(chance, 97))
    found = decode(predictor, PROMPT, max_new_tokens=60, drafting=Drafting(layout))
    assert found.tokens == true
    if chance == 0.6 and layout == "quadratic":
        assert {kept for carried, kept in found.kept if carried == 3} == {0, 1, 2, 3}
    if chance == 1.0 and layout == "quadratic":
        assert found.steps == 1 + math.ceil(59 / 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_own_random_drafts_change_nothing(predictor: Any, layout: str, k: int) -> None:
    drafting = Drafting(layout, k=k)
    found = decode(predictor, PROMPT, max_new_tokens=25, drafting=drafting)
    assert found.tokens == alone(predictor.model, PROMPT, 25)


def test_a_right_draft_after_a_wrong_one_is_not_kept(predictor: Any, oracle: Any) -> None:
    """Drafts wrong, right, right: counting the right ones, as some code does, would keep two."""
    true = alone(predictor.model, PROMPT, 30)
    oracle.with_drafts(predictor, PROMPT + true, lambda coming: [coming[0] ^ 1, *coming[1:]])
    found = decode(predictor, PROMPT, max_new_tokens=30)
    assert found.tokens == true
    assert {kept for _, kept in found.kept} == {0}
    assert found.by_position()[0] == (28, 0)


def test_the_cache_always_holds_the_verified_text_but_its_last_token(
    predictor: Any, oracle: Any
) -> None:
    """Keys and values equal those of reading the text anew, whatever was kept of a step."""
    model, checked = predictor.model, []
    true = alone(model, PROMPT, 24)

    def check(cache: Any, verified: list[int]) -> None:
        assert cache.get_seq_length() == len(verified) - 1
        fresh = model(torch.tensor([verified[:-1]]), use_cache=True).past_key_values
        for ours, theirs in zip(cache.layers, fresh.layers, strict=True):
            torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=1e-6)
            torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=1e-6)
        checked.append(len(verified))

    oracle.with_drafts(predictor, PROMPT + true, oracle.right_with(0.6, 97), check)
    decode(predictor, PROMPT, max_new_tokens=24)
    assert len(checked) > 5


@pytest.mark.parametrize("number", [1, 2, 3, 7, 11])
def test_lengths_that_no_step_ends_at(predictor: Any, oracle: Any, number: int) -> None:
    """All drafts right: steps of 4 would overrun; nothing is computed beyond the last position."""
    true = alone(predictor.model, PROMPT, 11)
    oracle.with_drafts(predictor, PROMPT + true, lambda coming: coming)
    found = decode(predictor, PROMPT, max_new_tokens=number)
    assert found.tokens == true[:number]
    assert found.steps == 1 + math.ceil((number - 1) / 4)


def test_it_ends_at_the_first_stop_inside_an_accepted_run(predictor: Any, oracle: Any) -> None:
    """The stop is any of the tokens 5 to 8 that has not come before."""
    true = alone(predictor.model, PROMPT, 20)
    place = next(at for at in range(5, 9) if true[at] not in true[:at])
    oracle.with_drafts(predictor, PROMPT + true, lambda coming: coming)
    found = decode(predictor, PROMPT, max_new_tokens=20, stops=frozenset([true[place]]))
    assert found.tokens == true[: place + 1]
    assert found.tokens == alone(predictor.model, PROMPT, 20, stop=true[place])
    early = decode(predictor, PROMPT, max_new_tokens=20, ended=lambda tokens: len(tokens) == 6)
    assert early.tokens == true[:6]


@pytest.mark.parametrize("prompt", [[9], list(range(1, 60))])
def test_prompts_of_one_token_and_of_many(
    predictor: Any, monkeypatch: Any, prompt: list[int]
) -> None:
    """Long prompts, here above 20 tokens, are read by an ordinary pass first."""
    from unlearn.mtp import decode as module

    monkeypatch.setattr(module, "LONG_PROMPT", 20)
    found = decode(predictor, prompt, max_new_tokens=12)
    assert found.tokens == alone(predictor.model, prompt, 12)


def test_a_buffer_that_is_too_small_grows() -> None:
    from unlearn.mtp.cache import PreallocatedLayer

    layer = PreallocatedLayer(2)
    parts = [torch.randn(1, 2, size, 4) for size in (2, 1, 5)]
    for part in parts:
        keys, values = layer.update(part, 2 * part)
    whole = torch.cat(parts, 2)
    assert torch.equal(keys, whole)
    assert torch.equal(values, 2 * whole)
    layer.crop(-5)
    assert torch.equal(layer.keys, whole[:, :, :3])
    assert layer.get_seq_length() == 3


def chi_squared(model: Any, predictor: Any, draw: Any, runs: int) -> float:
    """Compare counts of the first two tokens, of 16 pairs, with the model's own probabilities."""
    with torch.no_grad():
        first = (model(torch.tensor([[1, 2]])).logits[0, -1] / 0.8).softmax(-1)
        batch = torch.tensor([[1, 2, token] for token in range(4)])
        second = (model(batch).logits[:, -1] / 0.8).softmax(-1)
    expected = (first[:, None] * second * runs).flatten().tolist()
    counts = Counter(draw() for _ in range(runs))
    pairs = [counts[a, b] for a in range(4) for b in range(4)]
    assert min(expected) > 5
    return sum((n - e) ** 2 / e for n, e in zip(pairs, expected, strict=True))


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("layout", "runs"),
    [
        ("quadratic", 250),
        *(pytest.param(layout, 1000, marks=slow) for layout in LAYOUTS),
    ],
)
def test_sampled_text_has_the_models_distribution(
    build_sharp: Any, build_predictor: Any, layout: str, runs: int
) -> None:
    """Chi-squared with 15 degrees of freedom: above 37.7 once in a thousand times."""
    small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    model = build_sharp(vocab_size=4, pad_token_id=None, bos_token_id=None, **small)
    with torch.no_grad():
        model.lm_head.weight *= 0.1
    predictor = build_predictor(model, k=2)
    choose = Sampled(0.8, torch.Generator().manual_seed(0))

    def draw() -> tuple[int, int]:
        found = decode(
            predictor, [1, 2], max_new_tokens=4, drafting=Drafting(layout), choose=choose
        )
        return found.tokens[0], found.tokens[1]

    assert chi_squared(model, predictor, draw, runs) < 37.7


def test_figures_of_a_text_by_hand() -> None:
    """Steps that carried and kept (0, 0), (3, 3), (3, 1): draft 1 right in 2 of 2, 2 in 1 of 2."""
    found = Written([0] * 7, 3, [(0, 0), (3, 3), (3, 1)])
    assert found.tokens_per_step == pytest.approx(7 / 3)
    assert found.by_position() == [(2, 2), (2, 1), (1, 1)]


class Asked(TorchDispatchMode):
    """Counts the values that Python asks of tensors one by one: each makes a GPU finish."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += op.__name__.split(".")[0] in ("item", "_local_scalar_dense", "nonzero")
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_asks_the_device_for_its_tokens_alone(
    build_sharp: Any, build_predictor: Any, layout: str
) -> None:
    """They come as one list, which is not counted; a shortlist of 8 is drawn on by every draft."""
    predictor = build_predictor(build_sharp())
    with Asked() as asked:
        decode(predictor, [5, 9], max_new_tokens=12, drafting=Drafting(layout, shortlist=8))
    assert asked.number == 0
    with Asked() as asked:
        torch.arange(3)[torch.tensor(1)]
    assert asked.number == 1


def test_what_cannot_be_written_is_refused(predictor: Any) -> None:
    with pytest.raises(UserError, match="k=4 given, but 3 masks were trained"):
        decode(predictor, PROMPT, max_new_tokens=5, drafting=Drafting(k=4))
    with pytest.raises(UserError, match="the prompt is empty"):
        decode(predictor, [], max_new_tokens=5)
    with pytest.raises(UserError, match="unknown layout"):
        decode(predictor, PROMPT, max_new_tokens=5, drafting=Drafting("cubic"))
    with pytest.raises(UserError, match="max_new_tokens=0 given"):
        decode(predictor, PROMPT, max_new_tokens=0)
    with pytest.raises(UserError, match=r"has token 97, but the model knows 97 tokens"):
        decode(predictor, [5, 97], max_new_tokens=5)
    with pytest.raises(UserError, match="has token -1"):
        decode(predictor, [-1], max_new_tokens=5)
    with pytest.raises(UserError, match=r"context is 256 .shorten the prompt"):
        decode(predictor, [1] * 600, max_new_tokens=5)
    with pytest.raises(UserError, match="set max_new_tokens to 6 or less"):
        decode(predictor, [1] * 250, max_new_tokens=7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layout": "cubic", "k": 1}, "unknown layout 'cubic'"),
        ({"layout": "linear", "k": 0}, "k=0 given"),
        ({"layout": "budget", "masks": 0}, "masks=0 given"),
        ({"shortlist": 0}, "shortlist=0 given"),
        ({"layout": "linear", "masks": 3}, "layout linear has its own number"),
    ],
)
def test_drafts_that_no_layout_makes_are_refused(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Drafting(**given)


def test_the_settings_of_drafts_are_told_as_they_are_used() -> None:
    """Nothing given: all 3 masks that were trained; a budget is twice the drafts."""
    assert Drafting().used(3) == {
        "layout": "quadratic", "k": 3, "masks": None, "shortlist": 256,
    }  # fmt: skip
    assert Drafting("budget", k=2).used(3)["masks"] == 4


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_without_a_distribution_is_refused(temperature: float) -> None:
    with pytest.raises(UserError, match=r"temperature .* given"):
        Sampled(temperature)
