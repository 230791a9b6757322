"""The benchmark of steps: its plain losses are ours in value and gradient, on a tiny model."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from unlearn.objectives import OBJECTIVES
from unlearn.terms import Term

SCRIPTS = str(Path(__file__).parents[1] / "scripts")
NAMES = ("npo", "satimp", "grad_diff", "rmu")


@pytest.fixture
def bench(monkeypatch: Any) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    import bench_objectives

    yield bench_objectives
    for name in ("bench_objectives", "plain_steps", "random_llama", "turns"):
        sys.modules.pop(name)


@pytest.fixture
def arguments(tmp_path: Path, build_tiny_model: Any, build_tiny_tokenizer: Any) -> list[str]:
    build_tiny_model().save_pretrained(tmp_path / "model")
    build_tiny_tokenizer().save_pretrained(tmp_path / "model")
    given = ["--model", str(tmp_path / "model"), "--steps", "1", "--batch", "3"]
    for name, words in (("forget", "was born in Oslo."), ("retain", "paints.")):
        rows = [f'{{"question": "Who?", "answer": "{"So " * n}{n} {words}"}}\n' for n in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
        given += [f"--{name}", str(tmp_path / f"{name}.jsonl")]
    return given


@pytest.mark.parametrize("name", NAMES)
def test_both_steps_do_the_same(name: str, bench: Any, arguments: list[str]) -> None:
    """Three steps: losses and gradient norms agree, and every loss has something to say."""
    plain, ours = (
        list(bench._work(bench._parser().parse_args([*arguments, "--worker", name, variant])))[1:]
        for variant in bench.VARIANTS
    )
    assert len(ours) == 3
    assert min(step["norm"] for step in ours) > 0
    assert max(map(bench._difference, plain, ours)) < 1e-4


def test_processes_take_their_steps_in_turn(bench: Any, arguments: list[str]) -> None:
    (pair,) = bench._race("npo", arguments)
    assert pair["plain"]["seconds"] > 0
    assert bench._difference(pair["plain"], pair["ours"]) < 1e-4


def test_a_loss_that_differs_gives_no_time(bench: Any) -> None:
    step = {"seconds": 1.0, "processor": 0.5, "loss": 2.0, "norm": 1.0}
    found = bench._summary(
        [{"plain": step | {"seconds": n}, "ours": step} for n in (2.0, 3.0, 9.0)]
    )
    assert found["speedup"] == 3.0
    with pytest.raises(SystemExit, match=r"differ by 0\.048"):
        bench._summary([{"plain": step | {"loss": 2.1}, "ours": step}])


def test_the_published_settings_are_those_of_the_recipes(bench: Any) -> None:
    from unlearn.recipes.files import load

    given = {"model": {"path": "m"}, "data": {"forget": "f", "retain": "r"}, "out": "o"}
    for name, method in bench.methods(7).items():
        terms = load(name, [], given).terms
        for ours, theirs in zip(method.terms, terms, strict=True):
            hyper = {**ours.objective.hyper, **ours.hyper}
            wanted = Term(OBJECTIVES[theirs.objective], theirs.on, theirs.weight, theirs.hyper)
            assert (ours.objective, ours.weight) == (wanted.objective, wanted.weight)
            assert hyper == {**wanted.objective.hyper, **wanted.hyper}


def test_a_random_model_of_that_depth(bench: Any, arguments: list[str]) -> None:
    options = bench._parser().parse_args([*arguments, "--layers", "4", "--width", "64"])
    model = bench._model(options)
    assert model.config.num_hidden_layers == 4
    assert bench._layer(options, model) == 1
    again = bench._model(options)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
