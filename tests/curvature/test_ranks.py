"""Two processes fit curvature together and take the step that one takes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("on_ranks.py")


def test_two_processes_give_the_step_of_one(
    tmp_path: Path, build_tiny_model: Any, fresh_rows: Any, on_two_ranks: Any
) -> None:
    """Sums come in another order, so not bit for bit; counts do, and both hold the same."""
    model = build_tiny_model(hidden_size=8, intermediate_size=12, vocab_size=11)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(20)
    model.save_pretrained(tmp_path)
    rows = [dataclasses.asdict(row) for row in fresh_rows(13)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    on_two_ranks(PROGRAM, tmp_path)
    expected = load_file(tmp_path / "alone")
    first, second = (load_file(tmp_path / f"rank-{rank}") for rank in range(2))
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        error = (first[name] - value).norm() / value.norm()
        assert error < 1e-4, name  # norms compute in float32, and sums come in another order
    told = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "rank-0")]
    for kind, (*counts, slope, bend) in told[0].items():
        assert told[1][kind][:3] == counts
        assert told[1][kind][3] == pytest.approx(slope, rel=1e-4)
        assert told[1][kind][4] == (bend and pytest.approx(bend, rel=1e-4))
