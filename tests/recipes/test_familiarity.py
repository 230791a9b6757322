"""The audit of a run: membership scores before and after, in results and report."""

import json
from pathlib import Path
from typing import Any

import pytest

from unlearn.errors import UserError
from unlearn.evals.detection.familiarity import Familiarity
from unlearn.recipes.files import load
from unlearn.recipes.run import run


def test_forgetting_shows_in_every_score(shared: Path, tmp_path: Path) -> None:
    """Sixteen memorised answers against sixteen of authors never seen, before and after a short
    gradient ascent: told apart perfectly at first, hardly or the other way round in the end."""
    tofu = shared / "data" / "tofu"
    changes = {
        "model": {"path": str(shared / "models" / "tofu-tiny-target")},
        "data": {"forget": f"{tofu}#forget10:train[:16]"},
        "out": str(tmp_path / "run"),
    }
    settings = [
        "training.max_steps=8",
        "training.per_device_train_batch_size=8",
        "training.learning_rate=1e-3",
        "training.warmup_steps=0",
        "evals.generate=false",
        f"evals.familiarity.holdout={tofu}#full:train[3584:3600]",
    ]
    results = run(load("grad_ascent", settings, changes))
    before, after = (results["metrics"][who] for who in ("before", "after"))
    for score in ("loss", "mink", "minkpp"):
        assert before[f"mia_text_{score}"] > 0.9
        assert after[f"mia_text_{score}"] < before[f"mia_text_{score}"] - 0.3
    detail = results["details"]["before"]["mia_text_loss"]
    assert (detail["n"], detail["direction"]) == (32, "none")
    assert detail["low"] <= detail["value"] <= detail["high"]
    page = (tmp_path / "run" / "report.md").read_text()
    assert "Membership by Min-K%++, bare texts" in page
    stored = json.loads((tmp_path / "run" / "evals" / "after.json").read_text())
    assert sum(row["split"] == "holdout_text" for row in stored["records"]) == 16


def test_texts_without_the_column_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"answer": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"body": "b"}\n')
    forget, holdout = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="has no text in text, answer"):
        Familiarity.load(forget, holdout)
    found = Familiarity.load(forget, forget, max_rows=1)
    assert [(text.text, text.member) for text in found.texts] == [("a", True), ("a", False)]


def test_two_benchmarks_run_one_after_the_other(tiny_model: Any, tiny_tokenizer: Any) -> None:
    from unlearn.evals.detection.labelled import LabelledText

    texts = [LabelledText("Ada was born in Oslo.", True), LabelledText("Bo paints boats.", False)]
    told: list[tuple[str, int, int]] = []
    found = Familiarity(texts).run(
        tiny_model, tiny_tokenizer, progress=lambda *event: told.append(event)
    )
    assert set(found.metrics) == {
        f"mia_text_{s}" for s in ("loss", "zlib", "mink", "minkpp", "gapk")
    }
    assert told == [("score", 2, 2)]
    assert [record["split"] for record in found.records] == ["forget_text", "holdout_text"]
