"""The engine: every score against a plain computation per text, and what must not change it."""

import copy
import json
import math
import zlib
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unlearn.detect import TokenFrequencies
from unlearn.detect.engine import TextScorer
from unlearn.detect.settings import SCORES, Settings
from unlearn.detect.several_passes import swapped_words
from unlearn.detect.text import Text
from unlearn.errors import UserError
from unlearn.models import load_model, load_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog, again and again, in the morning.",
    "Ada was born in Oslo. Bo paints small boats.",
    "no capitals here, only small letters",
    "Question: Where?",
    "Straße, naïve: 東京 and a dog " * 6,
    "x",
    "",
    "zz zz zz zz zz zz zz zz",
]
NEIGHBOURS = [("The slow brown fox jumps over it.", "A fox."), ("Ada was born.",)]
NONMEMBERS, MEMBERS = ["A sentence nobody wrote. ", "Nor this one. "], ["Ada was born in Oslo. "]
ALL = Settings(scores=SCORES, k=(0.2, 0.4), max_tokens=64, shots=2)
ARCHITECTURES = ("llama", "gpt2", "gpt_neox")


def build(kind: str, seed: int = 0) -> Any:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    torch.manual_seed(seed)
    size: dict[str, Any] = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2}
    wide: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                            "num_attention_heads": 2, "max_position_embeddings": 128}  # fmt: skip
    if kind == "gpt2":
        config = GPT2Config(**size, n_embd=32, n_layer=2, n_head=2, n_positions=128)
        return GPT2LMHeadModel(config).eval()
    if kind == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**size, **wide)).eval()
    return LlamaForCausalLM(LlamaConfig(**size, **wide)).eval()


def table(size: int) -> TokenFrequencies:
    counts = torch.randint(0, 50, (size,), generator=torch.Generator().manual_seed(1))
    smoothed = (counts + 1).double()
    return TokenFrequencies(smoothed / smoothed.sum(), counts > 0)


class Plain:
    """All scores of one text in float64, one forward pass at a time, from the formulas."""

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
        self.model, self.tokenizer, self.settings = (
            copy.deepcopy(model).double(),
            tokenizer,
            settings,
        )

    def read(self, text: str, prefix: str | None = None) -> dict[str, np.ndarray]:
        ids = self.tokenizer(text)["input_ids"][: self.settings.max_tokens]
        before = [] if prefix is None else self.tokenizer(prefix)["input_ids"]
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([before + ids])).logits[0]
        assert logits.dtype == torch.float64
        log_p = logits.log_softmax(-1)[len(before) : -1]
        targets = torch.tensor(ids[1:])
        p = log_p.exp()
        mean = (p * log_p).sum(-1)
        found = {
            "l": log_p[torch.arange(len(targets)), targets],
            "mu": mean,
            "var": (p * (log_p - mean[:, None]) ** 2).sum(-1),
            "top": log_p.max(-1).values,
            "ids": targets,
        }
        return {name: value.numpy() for name, value in found.items()}

    def mean(self, text: str, prefix: str | None = None) -> float:
        return float(self.read(text, prefix)["l"].mean())

    @staticmethod
    def lowest(values: np.ndarray, k: float) -> float:
        return float(np.sort(values)[: max(1, math.floor(k * len(values) + 1e-9))].mean())

    def distance(self, text: str) -> float:
        found = self.read(text)["l"]
        high = np.sort(found)[::-1][: max(1, int(0.05 * len(found)))].mean()
        return float(high - self.lowest(found, 0.3))

    def scores(
        self, text: Text, words: str, frequencies: TokenFrequencies, reference: "Plain"
    ) -> dict[str, float]:
        """Give all scores; ``words`` is the text up to where it is cut."""
        one = self.read(text.text)
        spread = np.sqrt(np.maximum(one["var"], 1e-6))
        loss = float(one["l"].mean())
        found = {
            "loss": loss,
            "ppl": math.exp(-loss),
            "zlib": loss / len(zlib.compress(words.encode())),
            "lowercase": self.mean(words.lower()) / loss,
            "ref": loss - reference.mean(words),
            "recall": self.mean(text.text, "".join(NONMEMBERS)) / loss,
            "pac": np.mean([self.distance(t) for t in swapped_words(words)]) - self.distance(words),
        }
        after = [self.mean(text.text, "".join(texts)) for texts in (NONMEMBERS, MEMBERS)]
        found["conrecall"] = (after[0] - 0.5 * after[1]) / loss
        if text.neighbours:
            found["neighbour"] = loss - np.mean([self.mean(t) for t in text.neighbours])
        gaps = (one["l"] - one["top"]) / spread
        smooth = np.convolve(gaps, np.ones(3) / 3, mode="valid") if len(gaps) >= 3 else gaps
        for k in self.settings.k:
            end = "" if k == self.settings.k[0] else f"_{k:g}"
            found[f"mink{end}"] = self.lowest(one["l"], k)
            found[f"minkpp{end}"] = self.lowest((one["l"] - one["mu"]) / spread, k)
            found[f"gapk{end}"] = self.lowest(smooth, k)
        first = [n for n, id_ in enumerate(one["ids"]) if id_ not in one["ids"][:n]]
        f = frequencies.probabilities.numpy()[one["ids"][first]]
        found["dcpdd"] = float(np.minimum(np.exp(one["l"][first]) * -np.log(f), 0.01).mean())
        return found


def some_texts() -> list[Text]:
    wordings = [*NEIGHBOURS, *[()] * len(TEXTS)]
    return [Text(n, text, wordings[n]) for n, text in enumerate(TEXTS)]


def scorer(model: Any, tokenizer: Any, settings: Settings = ALL) -> TextScorer:
    return TextScorer.of(
        model,
        tokenizer,
        settings,
        reference=(build("gpt2", seed=7), tokenizer) if "ref" in settings.scores else None,
        frequencies=table(300) if "dcpdd" in settings.scores else None,
        nonmembers=NONMEMBERS,
        members=MEMBERS,
    )


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_score_is_that_of_a_plain_computation_per_text(
    kind: str, tiny_tokenizer: Any
) -> None:
    """Within 1e-5 of float64, relative where a number is above 1 (perplexities are about 300)."""
    model = build(kind)
    plain, other = (Plain(m, tiny_tokenizer, ALL) for m in (model, build("gpt2", seed=7)))
    for text, got in zip(some_texts(), scorer(model, tiny_tokenizer)(some_texts()), strict=True):
        if len(text.text) < 2:
            assert got.status == "too_short"
            assert set(got.scores.values()) == {None}
            continue
        assert text.text.startswith(got.text)
        expected = plain.scores(text, got.text, table(300), other)
        assert set(expected) == {name for name, value in got.scores.items() if value is not None}
        for name, value in expected.items():
            assert got.scores[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_a_real_model_too(shared: Path) -> None:
    """stories260k against float64; its variances go from 1e-3 to 10 on these texts."""
    path = str(shared / "models" / "stories260k")
    model, tokenizer = load_model(path), load_tokenizer(path)
    settings = Settings(scores=("loss", "zlib", "mink", "minkpp", "gapk", "lowercase", "dcpdd"))
    frequencies = table(512)
    texts = [Text(0, "Once upon a time, there was a little girl named Lily. She had a Dog."),
             Text(1, "The Committee shall, upon receipt of the report, adopt it.")]  # fmt: skip
    ours = TextScorer.of(model, tokenizer, settings, frequencies=frequencies)
    plain = Plain(model, tokenizer, settings)
    for text, got in zip(texts, ours(texts), strict=True):
        expected = plain.scores(text, text.text, frequencies, plain)
        for name, value in got.scores.items():
            assert value == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name


def by_id(rows: Any) -> dict[Any, dict[str, float]]:
    """Give the scores that there are."""
    return {
        row.id: {name: value for name, value in row.scores.items() if value is not None}
        for row in rows
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_neither_batches_nor_order_nor_company_change_a_score(
    attention: str, build_tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """Packed (sdpa) and padded (eager) batches of any size, texts in any order, one by one."""
    model = build_tiny_model(attn_implementation=attention)
    settings = replace(ALL, scores=tuple(name for name in SCORES if name != "ref"))
    whole = by_id(scorer(model, tiny_tokenizer, settings)(some_texts()))
    assert list(whole) == list(range(len(TEXTS)))
    for tokens in (1, 50):
        small = scorer(model, tiny_tokenizer, replace(settings, batch_tokens=tokens))
        rows = list(small(reversed(some_texts())))
        assert [row.id for row in rows] == list(reversed(range(len(TEXTS))))
        for id_, scores in by_id(rows).items():
            assert scores == pytest.approx(whole[id_], rel=1e-5, abs=1e-5)
    alone = scorer(model, tiny_tokenizer, settings)
    for text in some_texts():
        ((_, scores),) = by_id(alone([text])).items()
        assert scores == pytest.approx(whole[text.id], rel=1e-5, abs=1e-5)


def test_one_forward_pass_serves_all_scores_of_one_pass(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """Every token goes through the model once, but the last of a text, which predicts nothing."""
    ours = scorer(tiny_model, tiny_tokenizer, Settings(scores=SCORES[:7]))
    texts = [Text(n, text) for n, text in enumerate(TEXTS[:5])]
    seen: list[int] = []
    blocks = ours.blocks(texts)
    with ours.side.ready():  # the checks of the model are done here, before we count
        tiny_model.model.layers[0].mlp.register_forward_hook(
            lambda module, args, output: seen.append(output.numel() // 32)
        )
        list(blocks)
    ids = [tiny_tokenizer(text.text)["input_ids"][:-1] for text in texts]
    distinct = {tuple(row[: end + 1]) for row in ids for end in range(len(row))}
    assert sum(seen) in (len(distinct), len(distinct) + 18)  # 18: the check of packed passes


def test_a_stream_is_read_a_block_at_a_time(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """Memory is bounded: rows are given long before the (endless) stream has been read."""
    taken = 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield Text(taken, "Ada was born in Oslo, again and again. " * 3)

    ours = scorer(tiny_model, tiny_tokenizer, Settings(batch_tokens=64))
    rows = list(islice(ours(endless()), 100))
    assert [row.id for row in rows] == list(range(1, 101))
    assert taken < 200


def test_a_long_text_counts_by_what_is_scored_of_it(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """A text of a million characters is as its beginning; the rest is not even tokenised."""
    long, short = "Ada paints boats. " * 60_000, "Ada paints boats. " * 100
    ours = scorer(tiny_model, tiny_tokenizer, Settings(max_tokens=40))
    first, second = ours([Text(0, long), Text(1, short)])
    assert first.scores == second.scores
    assert (first.num_tokens, first.notes) == (39, ("truncated",))
    assert short.startswith(first.text)


def test_statuses_and_notes(tiny_model: Any, tiny_tokenizer: Any) -> None:
    texts = ["ab", "", "  ", "A\x00da\ud800 was born in Oslo, in the morning.", "in small letters"]
    settings = Settings(scores=("loss", "lowercase"), min_tokens=4)
    found = list(scorer(tiny_model, tiny_tokenizer, settings)(map(Text, range(5), texts)))
    assert [row.status for row in found] == ["short", "too_short", "short", "ok", "ok"]
    assert [row.notes for row in found[2:]] == [("no_capitals",), ("cleaned",), ("no_capitals",)]
    assert found[4].scores["lowercase"] == 1.0
    assert found[3].text == "Ada? was born in Oslo, in the morning."
    json.dumps([row.as_json() for row in found], allow_nan=False)


def test_a_model_that_gives_no_numbers_is_told(tiny_model: Any, tiny_tokenizer: Any) -> None:
    with torch.no_grad():
        tiny_model.lm_head.weight[5] = math.nan
    (row,) = scorer(tiny_model, tiny_tokenizer, Settings())([Text(0, TEXTS[0])])
    assert (row.status, set(row.scores.values())) == ("nan", {None})


@pytest.mark.parametrize(
    ("bos", "first", "count"), [("auto", "T", 2), ("always", "T", 3), ("never", "T", 2)]
)
def test_start_token(
    bos: Any, first: str, count: int, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """The tiny tokenizer adds none of its own accord: "abc" is three tokens, the first unscored."""
    ours = scorer(tiny_model, tiny_tokenizer, Settings(bos=bos))
    (row,) = ours([Text(0, "xyz")])
    assert row.num_tokens == count


def test_a_tokenizer_of_another_model_is_refused(
    build_tiny_model: Any, tiny_tokenizer: Any
) -> None:
    ours = scorer(build_tiny_model(vocab_size=40), tiny_tokenizer, Settings())
    with pytest.raises(UserError, match="but the model knows 40 tokens"):
        list(ours([Text(0, TEXTS[0])]))


@pytest.mark.parametrize("name", ["ref", "dcpdd", "recall", "conrecall"])
def test_a_score_without_what_it_needs_is_refused(
    name: str, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    with pytest.raises(UserError, match=f"'{name}' needs"):
        TextScorer.of(tiny_model, tiny_tokenizer, Settings(scores=(name,)))


def test_a_prefix_that_does_not_fit_is_refused(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """A context of 256 that texts may fill leaves nothing for the prefix."""
    with pytest.raises(UserError, match="no text of the prefix fits"):
        scorer(tiny_model, tiny_tokenizer, Settings(scores=("recall",), max_tokens=256))


def test_the_prefix_is_shortened_until_it_fits(tiny_model: Any, tiny_tokenizer: Any) -> None:
    size = len(tiny_tokenizer("".join(NONMEMBERS))["input_ids"])
    for room, shots in ((size, 2), (size - 1, 1)):
        settings = Settings(scores=("recall",), max_tokens=256 - room)
        assert scorer(tiny_model, tiny_tokenizer, settings).prefixes["nonmembers"].shots == shots


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scores": ("losss",)}, "did you mean 'loss'"),
        ({"scores": ()}, "no score"),
        ({"k": (0.0,)}, "is not a share"),
        ({"k": ()}, "is not a share"),
        ({"max_tokens": 1}, "too small"),
        ({"clip": 0.0}, "not above 0"),
    ],
)
def test_settings_out_of_bounds(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Settings(**settings)
