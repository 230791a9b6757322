"""``unlearn curvature``: fitted from the command line, looked at without a model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from unlearn.cli.main import app
from unlearn.curvature.blocks import Blocks
from unlearn.curvature.factors import Counts, LayerCurvature
from unlearn.curvature.fit import Curvature
from unlearn.curvature.storage import save_curvature
from unlearn.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*loss tokens for factors")


def unlearn(*words: Any) -> Any:
    return CliRunner(env={"COLUMNS": "80"}).invoke(
        app, ["curvature", *map(str, words)], catch_exceptions=False
    )


@pytest.fixture
def factors(tmp_path: Path) -> Path:
    """A wide layer of a deep model, with numbers of every length."""
    name = "model.layers.{}.self_attn.gate_up_proj"
    layers = {
        name.format(block): LayerCurvature(
            name.format(block),
            Blocks((torch.diag(torch.logspace(-9, 9, 120)),)),
            Blocks((torch.diag(torch.logspace(-9, -3, 40) * block),)),
        )
        for block in (0, 31, 127)
    }
    save_curvature(Curvature(layers, Counts(7, 9, 2), {}), tmp_path / "factors")
    return tmp_path / "factors"


def test_tables_fit_80_columns(factors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(factors.parent)  # a path is written whole, however long
    done = unlearn("inspect", factors.name)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "…" not in done.stdout
    assert "127  gate_up_proj" in done.stdout
    assert "Inverted with damping factored:0.001" in done.stdout
    assert "warning: 7 loss tokens" in done.stdout


def test_json_and_folder_say_the_same(factors: Path, tmp_path: Path) -> None:
    out = tmp_path / "spectra"
    done = unlearn("inspect", factors, "--damping", "relative:0.1", "--out", out, "--json")
    found = json.loads(done.stdout)
    assert found.pop("out") == str(out)
    assert found == json.loads((out / "curvature.json").read_text())
    assert found["damping"] == "relative:0.1"
    assert sorted(path.name for path in out.iterdir()) == [
        "curvature.html", "curvature.json", "spectra.svg",
    ]  # fmt: skip


def test_mistakes_are_named_before_any_work(factors: Path, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "weights")
    (tmp_path / "text").write_text("not tensors at all")
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").touch()
    for words, message in (
        (("inspect", tmp_path / "weights"), "holds no curvature"),
        (("inspect", tmp_path / "text"), "cannot read"),
        (("inspect", tmp_path / "missing"), "cannot read"),
        (("inspect", factors, "--damping", "lots"), "--damping: 'lots' given; must be KIND:C"),
        (("inspect", factors, "--damping", "factored:0"), "C above 0"),
        (("inspect", factors, "--out", used), "already exists"),
        (("fit", "kfade", "--out", factors), "already exists"),
        (("fit", "kfade", "--out", tmp_path / "new"), "model.path is missing"),
        (("fit", "npo", "--out", tmp_path / "new"), "'npo' has no curvature"),
        (("fit", "kfade", "--out", tmp_path / "new", "--set", "edit.curvature=kfc"), "kfc"),
    ):
        with pytest.raises(UserError, match=message):
            unlearn(*words)
    assert [path.name for path in used.iterdir()] == ["file"]
    assert not (tmp_path / "new").exists()


def test_a_fit_is_kept_and_shown(
    tmp_path: Path, build_tiny_model: Any, tiny_tokenizer: Any
) -> None:
    build_tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rows = ({"q": f"Who is {n}?", "answer": f"{n} paints."} for n in range(8))
    (tmp_path / "retain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("fit", "kfade", "--model", tmp_path / "model", "--retain", tmp_path / "retain.jsonl",
             "--map", "question=q", "--set", "edit.curvature=act")  # fmt: skip
    done = unlearn(*words, "--out", tmp_path / "factors")
    assert "curvature of the retain set" in done.stderr
    assert f"--set edit.factors={tmp_path / 'factors'}" in done.stdout
    assert "act knows inputs alone" in done.stdout
    again = json.loads(unlearn(*words, "--out", tmp_path / "again", "--json").stdout)
    assert (again["curvature"], again["rows"], again["trace"]) == ("act", 7, None)
    first, second = (load_file(tmp_path / name) for name in ("factors", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
