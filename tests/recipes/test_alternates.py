"""Alternates: what decides them, what is kept of them, and how a stopped file goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unlearn.data import load_rows
from unlearn.errors import Interrupted, UserError
from unlearn.evals.generate import Answer, Sampling, text_of, written
from unlearn.models import ModelSource
from unlearn.recipes import alternates
from unlearn.recipes.alternates import Request, write_alternates

FEW = Request(samples=2, max_new_tokens=6)
ROWS = [{"question": f"Where was {n} born?", "answer": f"{n} was born.", "n": n} for n in range(7)]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: Any, build_tiny_model: Any, build_tiny_tokenizer: Any):
    """Work in a folder with a tiny ``model`` and seven rows to ``forget``, two at a time."""
    build_tiny_model(max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    build_tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(alternates, "ROWS_AT_ONCE", 2)
    return tmp_path


def write(out: str = "out.jsonl", request: Request = FEW, **named: Any) -> dict[str, Any]:
    return write_alternates(
        "forget.jsonl", ModelSource("model"), Path(out), request=request, **named
    )


def found(out: str = "out.jsonl") -> list[list[str]]:
    return [row["alternate"] for row in load_rows(out)]


def test_a_token_is_drawn_where_the_cumulative_probability_passes_the_number() -> None:
    """Probabilities 0.2, 0.5, 0.3: below 0.2 the first token, below 0.7 the second, then the third;
    at temperature 0.5 they are 4, 25 and 9 in 38.
    """
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]]))
    for temperature, number, token in (
        (1.0, 0.19, 0), (1.0, 0.21, 1), (1.0, 0.69, 1), (1.0, 0.71, 2), (1.0, 0.999999999, 2),
        (0.5, 0.104, 0), (0.5, 0.107, 1), (0.5, 0.762, 1), (0.5, 0.765, 2),
    ):  # fmt: skip
        drawn = Sampling(temperature, [[number]]).draw(logits, [Answer([1], 5, frozenset())])
        assert drawn.tolist() == [[token]]


def test_samples_follow_the_models_distribution(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """One token, 2000 times: each frequency within 5 standard deviations of its probability."""
    prompt, times = [1, 40, 50], 2000
    numbers = torch.rand(times, 1, generator=torch.Generator().manual_seed(0)).tolist()
    counts = torch.zeros(300)
    for _, answers in written(
        tiny_model, tiny_tokenizer, [prompt] * times, max_new_tokens=1,
        sampling=Sampling(0.3, numbers),
    ):  # fmt: skip
        for answer in answers:
            counts[answer.tokens[0]] += 1
    with torch.no_grad():
        expected = (tiny_model(torch.tensor([prompt])).logits[0, -1] / 0.3).softmax(-1)
    spread = (expected * (1 - expected) / times).sqrt()
    assert ((counts / times - expected).abs() < 5 * spread + 1e-9).all()


def test_rows_keep_their_columns_and_get_alternates_that_say_something_else(world: Path) -> None:
    told = write()
    rows = load_rows("out.jsonl")
    assert [{key: row[key] for key in ROWS[0]} for row in rows] == ROWS
    for row in rows:
        texts = [" ".join(text.lower().split()) for text in row["alternate"]]
        assert len(set(texts)) == len(texts) == 2
        assert row["answer"].lower() not in texts
        assert all(text and "Question:" not in text for text in texts)
    assert told == {
        "alternates": 14, "retried": told["retried"], "dropped": 0, "rows_without": [],
        "rows": 7, "resumed": 0, "out": "out.jsonl",
    }  # fmt: skip
    assert not Path("out.jsonl.partial").exists()


def test_an_alternate_does_not_depend_on_the_rows_beside_it(world: Path, monkeypatch: Any) -> None:
    write()
    for size in (1, 7):
        monkeypatch.setattr(alternates, "ROWS_AT_ONCE", size)
        write(f"{size}.jsonl")
        assert found(f"{size}.jsonl") == found()
    write("more.jsonl", Request(samples=3, max_new_tokens=6))
    assert [texts[:2] for texts in found("more.jsonl")] == found()
    write("other.jsonl", Request(samples=2, max_new_tokens=6, seed=1))
    assert found("other.jsonl") != found()


@pytest.mark.parametrize("torn", ["", '{"texts": ["half'])
def test_a_stopped_file_goes_on(torn: str, world: Path) -> None:
    write("whole.jsonl")

    def stop(done: int, total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="4 of 7 rows are kept in") as stopped:
        write(progress=stop)
    assert "goes on" in stopped.value.hint
    assert not Path("out.jsonl").exists()
    with Path("out.jsonl.partial").open("a") as file:
        file.write(torn)
    seen: list[int] = []
    assert write(progress=lambda done, total: seen.append(done))["resumed"] == 4
    assert seen == [6, 7]
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_a_file_begun_otherwise_is_not_mixed(world: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        write(progress=stop)
    with pytest.raises(UserError, match=r"begun with temperature 1\.0, here 0\.5"):
        write(request=Request(samples=2, max_new_tokens=6, temperature=0.5))
    Path("forget.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(UserError, match="begun with rows and template"):
        write()


def test_empty_and_repeated_answers_are_tried_again_then_given_up(
    world: Path, monkeypatch: Any
) -> None:
    """A model that always says the true answer: 3 new tries for each of 2 samples, then nothing."""
    monkeypatch.setattr(alternates, "text_of", lambda tokenizer, tokens: "0  WAS born.")
    told = write()
    assert (told["retried"], told["dropped"]) == (6 + 6 * 3, 2 + 6)
    assert told["rows_without"] == [1]
    assert found() == [[], *[["0  WAS born."]] * 6]


def test_an_answer_ends_where_another_question_begins(
    world: Path, monkeypatch: Any, tiny_tokenizer: Any
) -> None:
    monkeypatch.setattr(
        alternates, "text_of", lambda t, tokens: f"x {text_of(t, tokens)}\nQ: What? Question: Why?"
    )
    write()
    assert all(text.startswith("x") and "Q:" not in text for texts in found() for text in texts)
    writer = alternates._Writer(None, tiny_tokenizer, FEW)
    ids = tiny_tokenizer("Small boats.\nQuestion: What", add_special_tokens=False)["input_ids"]
    assert writer._ended(Answer([1], 99, frozenset(), ids))
    assert not writer._ended(Answer([1], 99, frozenset(), ids[:4]))


def test_mistakes_are_named(world: Path) -> None:
    Path("there.jsonl").write_text("")
    with pytest.raises(UserError, match=r"'there\.jsonl' exists and is left as it is"):
        write("there.jsonl")
    with pytest.raises(UserError, match=r"'out\.csv' is not the name of a \.jsonl file"):
        write("out.csv")
    long = {"question": "Who?" * 300, "answer": "Ada."}
    Path("forget.jsonl").write_text(json.dumps(long) + "\n")
    with pytest.raises(UserError, match=r"row 1 .* leaves no room .* the model knows 1024 places"):
        write()
    Path("forget.jsonl").write_text('{"text": "Ada was born."}\n')
    with pytest.raises(UserError, match="is a plain text and asks nothing"):
        write()
