"""Results kept on disk: found again, never wrong, never in the way."""

import math
import multiprocessing
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unlearn.data.encode import Example
from unlearn.evals.answers import Evaluator
from unlearn.evals.stored import Store, answer_key, model_key, sequence_key
from unlearn.models import Lora, add_lora, weights_hash
from unlearn.runs import cache_folder

ROWS = [
    Example([5, 6, 7, 8, 9], [-100, -100, 7, 8, 9], 2, 0),
    Example([5, 6, 10], [-100, -100, 10], 2, 1),
    Example([11, 12, 13, 14], [-100, 12, 13, 14], 1, 2),
]
PROMPTS = [[5, 6], [11]]


@pytest.fixture
def evaluate(tiny_tokenizer: Any) -> Callable[..., Any]:
    """Give a function that scores ROWS and answers PROMPTS through the cache."""

    def run(model: Any, **settings: Any) -> tuple[Any, list[str]]:
        given = {"max_new_tokens": 5, "weights_hash": weights_hash(model)} | settings
        evaluator = Evaluator(model, tiny_tokenizer, **given)
        return evaluator.score(ROWS), evaluator.write(PROMPTS)

    return run


def files() -> list[Path]:
    return sorted(path for path in cache_folder().rglob("*") if path.is_file())


def forbid(model: Any) -> None:
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was asked again"))


def same(one: Any, two: Any) -> bool:
    names = ("log_probs", "mask", "correct", "mean", "variance")
    equal = all(torch.equal(getattr(one[0], name), getattr(two[0], name)) for name in names)
    return equal and one[1] == two[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_second_evaluation_makes_no_forward_pass(
    dtype: torch.dtype, tiny_model: Any, evaluate: Any
) -> None:
    model = tiny_model.to(dtype)
    first = evaluate(model)
    forbid(model)
    assert same(first, evaluate(model))


def test_only_what_is_missing_is_computed(
    tiny_model: Any, tiny_tokenizer: Any, evaluate: Any
) -> None:
    """The last pass is that of the new row alone: 20 goes in to predict 21."""
    first, _ = evaluate(tiny_model)
    sizes: list[int] = []
    tiny_model.model.norm.register_forward_hook(lambda m, i, out: sizes.append(out.numel() // 32))
    evaluator = Evaluator(tiny_model, tiny_tokenizer, weights_hash=weights_hash(tiny_model))
    progress: list[tuple[int, int]] = []
    scores = evaluator.score(
        [*ROWS, Example([20, 21], [-100, 21], 1, 3)],
        progress=lambda done, total: progress.append((done, total)),
    )
    assert sizes[-1] == 1
    assert progress == [(4, 4)]
    assert torch.equal(scores.log_probs[:3], first.log_probs)


def test_without_a_hash_nothing_is_kept(tiny_model: Any, evaluate: Any) -> None:
    evaluate(tiny_model, weights_hash=None)
    assert files() == []


def test_whatever_changes_the_numbers_is_asked_again(build_tiny_model: Any) -> None:
    """Weights, precision, the rotary base, adapters, their scale and whether they are on."""
    lora = add_lora(build_tiny_model(), Lora(rank=2))
    scaled = add_lora(build_tiny_model(), Lora(rank=2, alpha=7.0))
    off = add_lora(build_tiny_model(), Lora(rank=2))
    off.base_model.disable_adapter_layers()
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    models = [build_tiny_model(), build_tiny_model(**rope), lora, scaled, off]
    keys = {model_key(model, "w") for model in models}
    keys |= {model_key(build_tiny_model(), "v"), model_key(build_tiny_model().double(), "w")}
    assert len(keys) == 7
    assert model_key(build_tiny_model(), "w") in keys
    other = Example([5, 6, 7, 8, 9], [-100, -100, -100, 8, 9], 2, 0)
    assert len({sequence_key(row) for row in (*ROWS, other)}) == 4
    assert sequence_key(ROWS[0]) == sequence_key(Example(*vars(ROWS[0]).values()))
    answers = {answer_key([5], 9, {2}), answer_key([5], 8, {2}), answer_key([5], 9, {2, 3})}
    assert len(answers | {answer_key([6], 9, {2})}) == 4
    assert answer_key([5], 9, {3, 2}) in answers


def test_other_lengths_of_answers_are_written_again(tiny_model: Any, evaluate: Any) -> None:
    _, short = evaluate(tiny_model)
    _, long = evaluate(tiny_model, max_new_tokens=9)
    assert long[0].startswith(short[0])
    assert long != short


def test_nan_is_not_kept(tiny_model: Any, evaluate: Any) -> None:
    """Row 12 of the embedding is NaN: one row's scores, and no answer, since neither uses it."""
    with torch.no_grad():
        tiny_model.model.embed_tokens.weight[12] = math.nan
    scores, _ = evaluate(tiny_model)
    assert scores.log_probs.isnan().any(-1).tolist() == [False, False, True]
    store = Store.of(cache_folder(), tiny_model, weights_hash(tiny_model))
    assert [found is not None for found in store.find([sequence_key(row) for row in ROWS])] == [
        True,
        True,
        False,
    ]


def test_answers_made_of_nan_are_not_kept(tiny_model: Any, evaluate: Any) -> None:
    with torch.no_grad():
        tiny_model.lm_head.weight[7] = math.nan
    evaluate(tiny_model)
    assert files() == []


def damage(path: Path, kind: str) -> None:
    whole = path.read_bytes()
    if kind == "no database":
        path.write_bytes(b"\xff" * len(whole))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "other table":
        path.unlink()
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE entries (name TEXT)")
    elif kind == "a folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("kind", ["no database", "empty", "cut", "other table", "a folder"])
def test_a_damaged_file_costs_no_more_than_a_warning(
    kind: str, tiny_model: Any, evaluate: Any
) -> None:
    first = evaluate(tiny_model)
    (path,) = files()
    damage(path, kind)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert same(first, evaluate(tiny_model))
    assert (kind == "empty") != any("not reused" in str(one.message) for one in seen)
    if kind in ("no database", "cut"):  # another one has taken its place
        forbid(tiny_model)
        assert same(first, evaluate(tiny_model))


def test_a_changed_value_is_not_believed(tiny_model: Any, evaluate: Any) -> None:
    """One bit of every value is flipped; the file is still a sound database."""
    first = evaluate(tiny_model)
    (path,) = files()
    with sqlite3.connect(path) as connection:
        entries = connection.execute("SELECT key, value FROM entries").fetchall()
        assert len(entries) == len(ROWS) + len(PROMPTS)
        for key, value in entries:
            changed = value[:-1] + bytes([value[-1] ^ 1])
            connection.execute("UPDATE entries SET value = ? WHERE key = ?", (changed, key))
    assert same(first, evaluate(tiny_model))
    forbid(tiny_model)
    assert same(first, evaluate(tiny_model))


def test_a_value_under_another_key_is_not_believed(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.sqlite")
    store.keep({b"one": b"1", b"two": b"2"})
    with sqlite3.connect(store.path) as connection:
        (value,) = connection.execute("SELECT value FROM entries WHERE key = ?", (b"one",))
        connection.execute("UPDATE entries SET value = ? WHERE key = ?", (value[0], b"two"))
    assert store.find([b"two", b"one", b"three"]) == [None, b"1", None]


def test_a_file_that_cannot_be_written_is_read(
    tiny_model: Any, evaluate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(tiny_model)
    (path,) = files()

    def read_only(self: Store) -> sqlite3.Connection:
        return sqlite3.connect(f"file:{path}?mode=ro", uri=True)

    monkeypatch.setattr(Store, "_open", read_only)
    with pytest.warns(UserWarning, match="not reused: cannot write .*readonly"):
        evaluate(tiny_model, max_new_tokens=6)
    forbid(tiny_model)
    assert same(first, evaluate(tiny_model))


def fill(path: Path, start: int) -> None:
    store = Store(path)
    for number in range(start, start + 40):
        store.keep({str(number).encode(): str(number).encode() * 9})


def test_processes_may_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "shared.sqlite"
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=fill, args=(path, start)) for start in (0, 20, 40)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found = Store(path).find([str(number).encode() for number in range(80)])
    assert found == [str(number).encode() * 9 for number in range(80)]


def test_adapters_have_the_same_key_in_every_process(build_tiny_model: Any) -> None:
    """The order of a set of words is another one in each process; the key must not know it."""
    words = {f"layers.{n}.q_proj" for n in range(20)}

    class Adapters:
        def __init__(self, ordered: Any) -> None:
            self.to_dict = lambda: {"target_modules": ordered}

    keys = []
    for ordered in (words, sorted(words)):
        model = build_tiny_model()
        model.peft_config = {"default": Adapters(ordered)}
        keys.append(model_key(model, "weights"))
    assert keys[0] == keys[1]
