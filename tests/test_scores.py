"""Scores: numbers derived by hand, and the chunked head against the naive computation."""

import math
from typing import Any

import pytest
import torch

from unlearn.head import VocabularyHead
from unlearn.scores import Scorer, Scores


def batch_of(lengths: list[int], prompt: int = 2, width: int | None = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    width = width or max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, 300, (length,), generator=generator)
        labels[row, prompt:length] = ids[row, prompt:length]
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def naive(model: Any, batch: dict[str, Any]) -> Scores:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return Scores.from_logits(logits, batch["labels"], batch["attention_mask"])


def test_from_logits_by_hand() -> None:
    """Uniform logits over 4 tokens: every labelled token has log p = -ln 4.

    Labels [-100, 1, 2] label tokens 1 and 2, predicted at positions 0 and 1: the row sums to
    -2 ln 4.
    """
    scores = Scores.from_logits(torch.zeros(1, 3, 4), torch.tensor([[-100, 1, 2]]))
    assert scores.mask.tolist() == [[True, True, False]]
    assert scores.sequence.item() == pytest.approx(-2 * math.log(4))
    assert scores.num_tokens.tolist() == [2]
    assert scores.log_probs[0, 2] == 0


def test_unlabelled_logits_do_not_matter() -> None:
    labels = torch.tensor([[-100, -100, 1, -100]])
    logits = torch.randn(1, 4, 5, requires_grad=True)
    Scores.from_logits(logits, labels).sequence.sum().backward()
    touched = logits.grad.abs().sum(-1)[0] > 0
    assert touched.tolist() == [False, True, False, False]


def test_first_label_is_ignored_because_nothing_predicts_it() -> None:
    scores = Scores.from_logits(torch.randn(1, 2, 5), torch.tensor([[3, -100]]))
    assert not scores.mask.any()


def test_half_precision_is_upcast() -> None:
    labels = torch.tensor([[-100, 1]])
    assert (
        Scores.from_logits(torch.zeros(1, 2, 3).bfloat16(), labels).log_probs.dtype == torch.float32
    )
    assert (
        Scores.from_logits(torch.zeros(1, 2, 3).double(), labels).log_probs.dtype == torch.float64
    )


HEADS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "tiny chunks": {"chunk": 1},
}


@pytest.mark.parametrize("kind", HEADS)
def test_chunked_head_equals_naive(kind: str, build_tiny_model: Any) -> None:
    """Values, hits and every gradient equal those of full logits, whatever the chunk size."""
    settings = dict(HEADS[kind])
    chunk = settings.pop("chunk", 256 * 2**20)
    batch = batch_of([9, 5, 12], width=15)
    ours, theirs = build_tiny_model(**settings), build_tiny_model(**settings)
    head = VocabularyHead.of(ours, chunk_bytes=chunk)
    got = Scorer(head)(ours, batch, want={"correct"})
    expected = naive(theirs, batch)
    torch.testing.assert_close(got.log_probs, expected.log_probs, rtol=0, atol=1e-5)
    assert torch.equal(got.correct & got.mask, expected.correct)
    got.sequence.sum().backward()
    expected.sequence.sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-5, msg=name)


def test_lora_on_the_head(build_tiny_model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    model = get_peft_model(build_tiny_model(), config)
    batch = batch_of([7, 11])
    scorer = Scorer.for_model(model)
    assert scorer.head is not None
    got, expected = scorer(model, batch), naive(model, batch)
    torch.testing.assert_close(got.log_probs, expected.log_probs, rtol=0, atol=1e-5)
    got.sequence.sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    expected.sequence.sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(ours[name], p.grad, rtol=0, atol=1e-5, msg=name)


def test_soft_capping_and_scaling() -> None:
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    size = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(Gemma2Config(**size, final_logit_softcapping=0.5)).eval()
    cohere = CohereForCausalLM(CohereConfig(**size, logit_scale=0.0625)).eval()
    for model in (gemma, cohere):
        scorer = Scorer.for_model(model)
        assert scorer.head is not None
        batch = batch_of([8, 6])
        torch.testing.assert_close(
            scorer(model, batch).log_probs, naive(model, batch).log_probs, rtol=0, atol=1e-5
        )


def test_unknown_logit_transformation_falls_back_with_a_warning(build_tiny_model: Any) -> None:
    model = build_tiny_model()
    plain_forward = model.forward

    def doubled(input_ids: Any, logits_to_keep: int = 0, **kwargs: Any) -> Any:
        output = plain_forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    with pytest.warns(UserWarning, match="full logits are used"):
        scorer = Scorer.for_model(model)
    assert scorer.head is None
    batch = batch_of([6, 9])
    torch.testing.assert_close(
        scorer(model, batch).log_probs, naive(model, batch).log_probs, rtol=0, atol=1e-5
    )


def test_streams_in_one_forward_equal_separate_forwards(tiny_model: Any) -> None:
    scorer = Scorer.for_model(tiny_model)
    batches = {"forget": batch_of([5, 9]), "retain": batch_of([12, 4, 6])}
    together = scorer.streams(tiny_model, batches, want={"retain": {"logits"}})
    for name, batch in batches.items():
        alone = scorer(tiny_model, batch)
        torch.testing.assert_close(together[name].log_probs, alone.log_probs, rtol=0, atol=1e-5)
    assert together["forget"].logits is None
    assert together["retain"].logits is not None


def test_padding_changes_nothing(tiny_model: Any) -> None:
    scorer = Scorer.for_model(tiny_model)
    narrow, wide = batch_of([5, 9]), batch_of([5, 9], width=20)
    got = scorer(tiny_model, wide).log_probs[:, :9]
    torch.testing.assert_close(got, scorer(tiny_model, narrow).log_probs, rtol=0, atol=1e-5)


def test_no_vocabulary_sized_tensor_for_token_terms(tiny_model: Any) -> None:
    """The largest tensor the head makes has one row per labelled token of a chunk."""
    seen: list[int] = []
    linear = type(tiny_model.lm_head).forward

    def watched(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden[..., 0].numel())
        return linear(tiny_model.lm_head, hidden)

    tiny_model.lm_head.forward = watched
    head = VocabularyHead.of(tiny_model, chunk_bytes=4 * 300 * 3)
    Scorer(head)(tiny_model, batch_of([9, 5], width=40))
    assert max(seen) <= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_pass_the_self_check(dtype: torch.dtype, tiny_model: Any) -> None:
    model = tiny_model.to(dtype)
    scorer = Scorer.for_model(model)
    assert scorer.head is not None
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert scorer(model, batch_of([6])).log_probs.dtype == expected
