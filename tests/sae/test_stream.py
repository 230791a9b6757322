"""From texts to shuffled activations: rows, masks, order, and what the model itself gives there."""

from typing import Any

import numpy as np
import pytest
import torch

from unlearn.errors import UserError
from unlearn.sae.buffer import ShuffleBuffer
from unlearn.sae.corpus import Corpus, Reader, apart, kept_positions, packed
from unlearn.sae.dictionary import Dictionary
from unlearn.sae.measure import Recovery, fidelity, recovery
from unlearn.sae.splice import spliced
from unlearn.sae.stream import Activations, Stream, scale_of, without_outliers

TEXTS = [[11, 12, 13, 14], [21, 2], [31, 32, 33]]


def rows_of(corpus: Corpus) -> list[list[int]]:
    ends = zip(corpus.starts, corpus.starts[1:], strict=False)
    return [corpus.ids[start:end].tolist() for start, end in ends]


def test_texts_are_packed_with_ends_between_and_bos_in_front() -> None:
    """The second text has its end (2) already; bodies of 4 tokens, the last one shorter."""
    corpus = packed(TEXTS, front=[1], end=2, context=5)
    assert rows_of(corpus) == [[1, 11, 12, 13, 14], [1, 2, 21, 2, 31], [1, 32, 33, 2]]
    assert corpus.tokens([0, 2]) == 7


def test_texts_apart_have_rows_of_their_own() -> None:
    corpus = apart(TEXTS, front=[1], context=4)
    assert rows_of(corpus) == [[1, 11, 12, 13], [1, 14], [1, 21, 2], [1, 31, 32, 33]]


def test_neither_bos_nor_padding_is_kept() -> None:
    corpus = apart(TEXTS, front=[1], context=9)
    batch = corpus.batch([0, 1], pad_id=0)
    assert batch["input_ids"].tolist() == [[1, 11, 12, 13, 14], [1, 21, 2, 0, 0]]
    assert kept_positions(batch).long().tolist() == [[0, 1, 1, 1, 1], [0, 1, 1, 0, 0]]
    assert kept_positions(corpus.batch([1])).sum() == corpus.tokens([1]) == 2


def test_too_little_text_is_refused() -> None:
    with pytest.raises(UserError, match="no token"):
        packed([], front=[1], end=None, context=8)
    with pytest.raises(UserError, match="context=2 leaves no room"):
        packed(TEXTS, front=[1], end=2, context=2)
    with pytest.raises(UserError, match="one must be held out"):
        packed(TEXTS, front=[1], end=2, context=64).split(4, 0)


def test_rows_are_held_out_once_and_for_all() -> None:
    corpus = apart([[n] for n in range(40)], front=[1], context=9)
    train, held_out = corpus.split(32, 0)
    assert sorted(train + held_out) == list(range(40))
    assert len(held_out) == 4
    assert corpus.split(3, 0)[1] == corpus.split(3, 0)[1] != corpus.split(3, 1)[1]


def test_a_reader_takes_every_row_once_per_epoch_and_goes_on_from_a_place() -> None:
    corpus = apart([[n] for n in range(10)], front=[1], context=9)
    rows = iter(Reader(corpus, list(range(10)), 3, rows_per_batch=4))
    epochs = [[row for _ in range(3) for row in next(rows)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    resumed = iter(Reader(corpus, list(range(10)), 3, 4, epoch=1, place=4))
    assert [row for _ in range(2) for row in next(resumed)] == epochs[1][4:]


def test_a_buffer_gives_every_vector_once_in_another_order() -> None:
    given = iter(torch.arange(1000.0)[:, None].split(10))
    asked = []

    def fill(number: int) -> list[torch.Tensor]:
        asked.append(number)
        return [next(given) for _ in range(-(-number // 10))]

    buffer = ShuffleBuffer(40, fill, seed=0)
    taken = torch.cat([buffer.take(8) for _ in range(12)]).flatten().tolist()
    assert asked == [40, 24, 26, 28]  # with 16, 14 and 12 left of the 40, 46 and 44 it held
    assert len(set(taken)) == len(taken) == 96
    assert taken != sorted(taken)
    assert buffer.vectors is not None
    left = buffer.vectors.flatten().tolist()
    assert sorted(taken + left) == list(range(len(taken) + len(left)))


def test_outliers_are_left_out_and_the_scale_is_that_of_the_mean_length() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(50, 16), dim=1) * 3
    vectors[7] *= 11
    kept = without_outliers(vectors)
    assert torch.equal(kept, torch.cat([vectors[:7], vectors[8:]]))
    assert scale_of(kept) == pytest.approx(4 / 3)


class Tupled(torch.nn.Module):
    """A decoder layer as transformers 4 had them: it gives a tuple."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **named: Any) -> tuple[Any, None]:
        return self.layer(*args, **named), None


def long_rows(number: int = 12, front: int = 1) -> Corpus:
    draw = np.random.default_rng(0)
    texts = [draw.integers(3, 300, int(draw.integers(4, 20))).tolist() for _ in range(number)]
    return apart(texts, front=[1] * front, context=40)


def test_vectors_are_what_the_model_gives_row_by_row(tiny_model: Any) -> None:
    """Against each row alone, without padding, from Hugging Face's own hidden states."""
    corpus = long_rows()
    for layer in (0, 1):
        found = Activations(tiny_model, corpus, layer).of_rows([3, 0, 7])
        expected = []
        inner = tiny_model.model.layers[layer]
        for row in (3, 0, 7):
            said: list[Any] = []
            handle = inner.register_forward_hook(lambda m, i, o, said=said: said.append(o))
            tiny_model(torch.tensor([rows_of(corpus)[row]]))
            handle.remove()
            expected.append(said[0][0, 1:])
        torch.testing.assert_close(found, torch.cat(expected).detach())


def test_layers_above_are_not_run_and_not_lost(tiny_model: Any) -> None:
    count: list[int] = []
    tiny_model.model.layers[1].register_forward_hook(lambda *said: count.append(1))
    Activations(tiny_model, long_rows(), 0).of_rows([0, 1])
    assert not count
    tiny_model(torch.tensor([[1, 5]]))
    assert count == [1]


def test_layers_that_give_tuples_read_and_splice_alike(tiny_model: Any, monkeypatch: Any) -> None:
    ids = torch.tensor([[1, 5, 9, 4]])
    plain = Activations(tiny_model, long_rows(), 1).of_rows([0, 1])
    with spliced(tiny_model, 1, lambda hidden: hidden * 2):
        doubled = tiny_model(ids).logits
    inner = tiny_model.model.layers[1]
    assert not torch.allclose(doubled, tiny_model(ids).logits)

    def as_tuple(module: Any, inputs: Any, output: Any) -> Any:
        return (output, "more")

    def opened(module: Any, inputs: Any) -> Any:
        (first,) = inputs
        return (first[0] if isinstance(first, tuple) else first,)

    inner.register_forward_hook(as_tuple)
    tiny_model.model.norm.register_forward_pre_hook(opened)
    assert torch.equal(Activations(tiny_model, long_rows(), 1).of_rows([0, 1]), plain)
    with spliced(tiny_model, 1, lambda hidden: hidden * 2):
        assert torch.equal(tiny_model(ids).logits, doubled)


def test_a_splice_leaves_no_trace_even_after_an_error(tiny_model: Any) -> None:
    ids = torch.tensor([[1, 5, 9, 4]])
    before = tiny_model(ids).logits

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError), spliced(tiny_model, 0, broken):
        tiny_model(ids)
    assert torch.equal(tiny_model(ids).logits, before)


def test_activations_that_are_no_numbers_are_refused(tiny_model: Any) -> None:
    """One token of the vocabulary is broken: the first row where it stands is named."""
    corpus = long_rows()
    broken = int(corpus.ids[corpus.starts[7] + 3])
    with torch.no_grad():
        tiny_model.get_input_embeddings().weight[broken] = torch.nan
    row = next(n for n, ids in enumerate(rows_of(corpus)) if broken in ids)
    with pytest.raises(UserError, match=f"layer 0 is NaN or infinite in row {row} of the text"):
        Activations(tiny_model, corpus, 0).of_rows(range(12))
    with pytest.raises(UserError, match="layer=5 given, but the model has 2 layers"):
        Activations(tiny_model, long_rows(), 5)


def other_family(name: str) -> Any:
    """A decoder that keeps its layers elsewhere than Llama does."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    if name == "gpt2":
        config: Any = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2,
                                 bos_token_id=1, eos_token_id=2)  # fmt: skip
        return GPT2LMHeadModel(config).eval()
    config = GPTNeoXConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2,
                           num_attention_heads=2, intermediate_size=48,
                           max_position_embeddings=64, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return GPTNeoXForCausalLM(config).eval()


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_other_families_are_read_and_spliced(name: str) -> None:
    model, corpus = other_family(name), long_rows(front=0)
    source = Activations(model, corpus, 0)
    row = torch.tensor([rows_of(corpus)[2]])
    expected = model(row, output_hidden_states=True).hidden_states[1][0]
    torch.testing.assert_close(source.of_rows([2]), expected.detach())
    eye = torch.eye(32)
    both = torch.cat([eye, -eye])
    same = Dictionary("relu", both.t(), torch.zeros(64), both, torch.zeros(32))
    told = recovery(source, [0, 1, 2], same, 100)
    assert told.dictionary == pytest.approx(told.base, rel=1e-6)
    assert told.zero != told.base


def test_a_bfloat16_model_gives_float32_vectors_and_is_spliced_in_its_own_type(
    tiny_model: Any,
) -> None:
    exact = Activations(tiny_model, long_rows(), 0).of_rows([0, 1])
    coarse = Activations(tiny_model.bfloat16(), long_rows(), 0)
    found = coarse.of_rows([0, 1])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.02)
    eye = torch.eye(32)
    both = torch.cat([eye, -eye])
    same = Dictionary("relu", both.t(), torch.zeros(64), both, torch.zeros(32))
    told = recovery(coarse, [0, 1], same, 100)
    assert told.dictionary == pytest.approx(told.base, rel=1e-3)


def test_a_stream_gives_all_vectors_of_an_epoch_and_goes_on_from_its_state(
    tiny_model: Any,
) -> None:
    source = Activations(tiny_model, long_rows(40), 0)
    rows = list(range(40))

    def stream() -> Stream:
        return Stream.over(source, rows, seed=1, capacity=64, tokens=80)

    first = stream()
    batches = [first.take(16) for _ in range(5)]
    tensors, place = first.state()
    tensors = {name: one.clone() for name, one in tensors.items()}
    ahead = [first.take(16) for _ in range(8)]
    second = stream()
    second.load(tensors, place)
    assert all(torch.equal(second.take(16), one) for one in ahead)
    again = stream()
    assert all(torch.equal(again.take(16), one) for one in batches)
    known = {tuple(one) for one in source.of_rows(rows).round(decimals=3).tolist()}
    shuffled = torch.cat(batches).round(decimals=3).tolist()
    assert sum(tuple(one) in known for one in shuffled) > 70  # rounding may part a few


# Measures


def test_fidelity_is_its_formula(build: Any) -> None:
    """Over two parts as over one; float64 sums by hand."""
    dictionary = build("jumprelu")
    x = torch.randn(60, dictionary.width, dtype=torch.float64, generator=torch.Generator())
    a = dictionary.encode(x)
    error = (x - dictionary.decode(a)).square().sum()
    found = fidelity(dictionary, x.split(25))
    assert found.variance_explained == pytest.approx(
        float(1 - error / (x - x.mean(0)).square().sum())
    )
    assert found.l0 == pytest.approx(float((a > 0).sum() / 60))
    assert found.dead == pytest.approx(float((~(a > 0).any(0)).double().mean()))
    assert found.tokens == 60


def test_recovery_compares_the_models_own_loss_with_both_replacements(
    tiny_model: Any, build: Any
) -> None:
    """A dictionary that gives its input back loses nothing; one that gives 0 is as bad as zeros."""
    eye = torch.eye(32)
    both = torch.cat([eye, -eye])
    perfect = Dictionary("relu", both.t(), torch.zeros(64), both, torch.zeros(32))
    source = Activations(tiny_model, long_rows(), 0)
    found = recovery(source, list(range(12)), perfect, 100)
    assert found.dictionary == pytest.approx(found.base, rel=1e-6)
    nothing = Dictionary("relu", both.t(), torch.full((64,), -1e9), both, torch.zeros(32))
    told = recovery(source, list(range(12)), nothing, 100)
    assert told.dictionary == told.zero == found.zero != found.base
    sums, count = 0.0, 0
    for row in rows_of(source.corpus):
        logits = tiny_model(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1)
        sums -= float(logits.detach().gather(1, torch.tensor(row[1:])[:, None]).sum())
        count += len(row) - 1
    assert found.base == pytest.approx(sums / count, rel=1e-5)


def test_what_is_recovered_by_hand() -> None:
    """Zeros cost 2 nats, the dictionary 0.5: three quarters. Where zeros cost nothing: None."""
    assert Recovery(base=1.0, dictionary=1.5, zero=3.0).recovered == 0.75
    assert Recovery(base=3.0, dictionary=1.5, zero=3.0).recovered is None
    assert Recovery(base=3.0, dictionary=3.5, zero=2.0).as_json()["ce_recovered"] is None
