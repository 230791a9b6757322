"""transformers' generate with drafts: the same text, or a refusal with its reason."""

from typing import Any

import pytest
import torch
from transformers import StaticCache, StoppingCriteriaList

from unlearn.errors import UserError
from unlearn.mtp.custom import custom_generate
from unlearn.mtp.decode import Drafting

IDS = torch.tensor([[5, 17, 3, 88]])
GIVEN: dict[str, Any] = {"attention_mask": torch.ones_like(IDS), "pad_token_id": 0}


def test_generate_writes_the_same_with_drafts(predictor: Any) -> None:
    model = predictor.model
    plain = model.generate(IDS, max_new_tokens=20, do_sample=False, **GIVEN)
    drafted = model.generate(
        IDS, max_new_tokens=20, do_sample=False, **GIVEN,
        custom_generate=custom_generate(predictor, Drafting("linear")),
    )  # fmt: skip
    assert torch.equal(plain, drafted)
    stop = int(plain[0, 9])
    both = [
        model.generate(IDS, max_new_tokens=20, do_sample=False, eos_token_id=stop, **GIVEN, **more)
        for more in ({}, {"custom_generate": custom_generate(predictor)})
    ]
    assert torch.equal(*both)
    assert both[0].shape[1] <= 10


def test_sampling_from_one_token_is_greedy(predictor: Any) -> None:
    """With top_k = 1 the likeliest token has all the probability."""
    model = predictor.model
    plain = model.generate(IDS, max_new_tokens=12, do_sample=False, **GIVEN)
    drafted = model.generate(
        IDS, max_new_tokens=12, do_sample=True, top_k=1, temperature=0.7, **GIVEN,
        custom_generate=custom_generate(predictor),
    )  # fmt: skip
    assert torch.equal(plain, drafted)


def test_stopping_criteria_see_every_token(predictor: Any) -> None:
    def three(ids: Any, scores: Any, **more: Any) -> Any:
        return torch.tensor([ids.shape[1] == 7])

    found = predictor.model.generate(
        IDS, max_new_tokens=20, do_sample=False, stopping_criteria=StoppingCriteriaList([three]),
        custom_generate=custom_generate(predictor), **GIVEN,
    )  # fmt: skip
    assert found.shape[1] == 7


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor changes the logits"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor changes the logits"),
        ({"cache_implementation": "static"}, "a StaticCache given"),
        ({"num_return_sequences": 2, "do_sample": True}, "2 sequences given"),
        ({"num_beams": 3}, "num_beams=3 given"),
        ({"return_dict_in_generate": True}, "dictionaries of scores"),
    ],
)
def test_what_would_not_be_exact_is_refused(predictor: Any, given: Any, reason: str) -> None:
    given = {"do_sample": False, "max_new_tokens": 4, **GIVEN, **given}
    with pytest.raises(UserError, match=reason):
        predictor.model.generate(IDS, custom_generate=custom_generate(predictor), **given)


def test_batches_padding_and_caches_in_use_are_refused(predictor: Any) -> None:
    model, write = predictor.model, custom_generate(predictor)
    with pytest.raises(UserError, match="2 sequences given"):
        model.generate(IDS.repeat(2, 1), custom_generate=write, max_new_tokens=4, pad_token_id=0)
    mask = torch.tensor([[0, 1, 1, 1]])
    with pytest.raises(UserError, match="padded prompt"):
        model.generate(
            IDS, attention_mask=mask, custom_generate=write, max_new_tokens=4, pad_token_id=0
        )
    cache = StaticCache(config=model.config, max_cache_len=30)
    with pytest.raises(UserError, match="cut back"):
        model.generate(IDS, past_key_values=cache, custom_generate=write, max_new_tokens=4, **GIVEN)


def test_another_model_is_refused_and_the_same_weights_are_not(
    predictor: Any, build_sharp: Any
) -> None:
    """A copy with equal numbers is another model: nothing tells that it stays equal."""
    write, how = custom_generate(predictor), {"do_sample": False, "max_new_tokens": 4, **GIVEN}
    with pytest.raises(UserError, match="not the model that the predictor sits beside"):
        build_sharp().generate(IDS, custom_generate=write, **how)
    shared = type(predictor.model)(predictor.model.config).double().eval()
    for name, parameter in predictor.model.named_parameters():
        shared.get_parameter(name).data = parameter.data
    found = shared.generate(IDS, custom_generate=write, **how)
    assert torch.equal(found, predictor.model.generate(IDS, **how))
