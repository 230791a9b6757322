"""Two processes evaluate together and get the numbers of one."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from unlearn.ranks import Ranks

PROGRAM = Path(__file__).with_name("on_ranks.py")


def save_rows(folder: Path) -> None:
    """Write 9 prompts with 3 answers each, and starts known for some of the prompts."""
    draw = random.Random(0)
    prompts = [draw.choices(range(3, 300), k=draw.randint(1, 9)) for _ in range(9)]
    rows = []
    for row, prompt in enumerate(prompts):
        for _ in range(3):
            answer = draw.choices(range(3, 300), k=draw.randint(1, 8))
            labels = [-100] * len(prompt) + answer
            rows.append(
                {
                    "input_ids": prompt + answer,
                    "labels": labels,
                    "prompt_length": len(prompt),
                    "row": row,
                }
            )
    known = [[40 + row][: row % 2] for row in range(9)]
    content = {"rows": rows, "prompts": prompts, "known": known}
    (folder / "rows.json").write_text(json.dumps(content))


def outcome(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_file(folder / f"{name}.safetensors"), json.loads(
        (folder / f"{name}.json").read_text()
    )


def test_two_processes_give_the_numbers_of_one(
    tmp_path: Path, build_tiny_model: Any, tiny_tokenizer: Any, on_two_ranks: Any
) -> None:
    """Bit for bit, on both; stored results are known to both and ask the model no more."""
    model = build_tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        model.lm_head.weight[2] += 0.6  # some answers end early
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    save_rows(tmp_path)
    on_two_ranks(PROGRAM, tmp_path)
    expected, told = outcome(tmp_path, "alone")
    assert len(set(map(len, told["answers"]))) > 1
    for name in ("first-rank-0", "first-rank-1", "second-rank-0", "second-rank-1"):
        tensors, found = outcome(tmp_path, name)
        assert found["answers"] == told["answers"]
        assert all(torch.equal(tensors[key], value) for key, value in expected.items())
        assert found["passes"] < told["passes"]
        assert (found["passes"] == 0) == name.startswith("second")


def test_a_process_alone_keeps_everything(tiny_model: Any) -> None:
    ranks = Ranks.of(tiny_model)
    values = torch.ones(2, 3)
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.gather(values, [3])[0] is values
    assert ranks.share([b"a", None]) == [b"a", None]
    assert ranks.all(True)
    assert not ranks.all(False)
