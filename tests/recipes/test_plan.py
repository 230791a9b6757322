"""What a plan says of a model that is only a configuration: sizes, fit, and what would fit."""

import json
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from unlearn.errors import UserError
from unlearn.recipes.files import load
from unlearn.recipes.fitting import refusal, require_memory, with_changes
from unlearn.recipes.plan import plan_run
from unlearn.recipes.prepare import Prepared, prepare
from unlearn.recipes.run import run

ENGINES = ("ddp", "fsdp2", "zero2", "zero3", "zero3-offload")
ROOT = Path(__file__).parents[2]
Make = Callable[..., Prepared]


@pytest.fixture
def make(tmp_path: Path, build_tiny_tokenizer: Any) -> Make:
    """Give a function that prepares NPO on a Llama of 110 million parameters without weights."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=8000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=7,
        num_attention_heads=8, num_key_value_heads=8, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder = tmp_path / "model"
    config.save_pretrained(folder)
    save_file({}, folder / "model.safetensors")
    build_tiny_tokenizer().save_pretrained(folder)
    for name in ("forget", "retain"):
        rows = ({"question": f"Who is {n}?", "answer": "Nobody. " * 12} for n in range(64))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)

    def call(*settings: str, lora: bool = False, method: str = "npo") -> Prepared:
        given = {
            "model": {"path": str(folder)},
            "data": {name: str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain")},
            "out": str(tmp_path / "out"),
        }
        return prepare(load(method, list(settings), given, lora=lora))

    return call


def part(planned: dict[str, Any], name: str) -> int:
    return next((one["bytes"] for one in planned["memory"] if one["part"] == name), 0)


def test_sizes_on_eight_devices_by_hand(make: Make) -> None:
    """Devices that are not here: bfloat16, as `auto` means on CUDA."""
    planned = plan_run(make("launch.device_memory=80", "launch.nproc=8", "launch.engine=zero3"))
    layer = 4 * 1024**2 + 3 * 1024 * 2816 + 2 * 1024
    total = 7 * layer + 2 * 8000 * 1024 + 1024
    assert planned["parameters"] == {"total": total, "trainable": total}
    assert (planned["device"], planned["dtype"]) == ("cuda", "bfloat16")
    assert part(planned, "weights") == part(planned, "gradients") == 2 * total / 8
    assert part(planned, "fp32 copy") == 4 * total / 8
    assert part(planned, "optimizer") == 8 * total / 8
    stages = {stage["stage"]: stage["bytes"] for stage in planned["stages"]}
    assert stages["loading"] == 2 * total + 2 * total / 8
    assert stages["measuring"] > 2 * total
    assert planned["memory_bytes"] == stages["training"]
    assert planned["peak"]["bytes"] == max(stages.values())
    host = {stage["stage"]: stage["bytes"] for stage in planned["host"]}
    assert host["loading"] == pytest.approx(8 * (2 * total + 0.6 * 2**30))
    assert planned["communication"]["bytes_per_step"] == 4 * (2 + 1) * 2 * total * 7 / 8
    assert planned["steps"] == {
        "total": 10, "per_epoch": 1, "effective_batch": 256, "per_device": 8, "accumulation": 4,
        "processes": 8,
    }  # fmt: skip


def test_rows_of_a_step_fix_the_passes_of_each_process(make: Make) -> None:
    planned = plan_run(make("launch.nproc=4", "training.per_device_train_batch_size=2",
                            "training.global_batch_size=32"))  # fmt: skip
    steps = planned["steps"]
    assert (steps["accumulation"], steps["effective_batch"], steps["per_epoch"]) == (4, 32, 2)
    alone = plan_run(make("training.global_batch_size=32"))
    assert planned["tokens"]["per_step"] == alone["tokens"]["per_step"]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_on_more_devices_needs_less_of_each(make: Make, engine: str) -> None:
    def needed(nproc: int) -> int:
        settings = (f"launch.nproc={nproc}", f"launch.engine={engine}", "launch.device_memory=80")
        return int(plan_run(make(*settings))["peak"]["bytes"])

    found = [needed(nproc) for nproc in (2, 16)]
    assert found == sorted(found, reverse=True)


def test_processes_on_one_cpu_share_its_memory(make: Make) -> None:
    one, two = (plan_run(make(f"launch.nproc={n}"))["fit"]["checks"][0] for n in (1, 2))
    assert one["where"] == two["where"] == "the memory of each node"
    assert two["needed_bytes"] >= 2 * one["needed_bytes"]


@pytest.mark.parametrize(
    ("gib", "nproc", "lora"),
    [(0.4, 1, False), (0.7, 1, False), (1.2, 4, False), (0.4, 4, True), (0.5, 1, True)],
)
def test_every_suggested_change_fits_and_keeps_the_step(
    make: Make, gib: float, nproc: int, lora: bool
) -> None:
    prepared = make(f"launch.device_memory={gib}", f"launch.nproc={nproc}", lora=lora)
    planned = plan_run(prepared)
    assert planned["fit"]["fits"] == (planned["peak"]["bytes"] <= gib * 2**30)
    if planned["fit"]["fits"]:
        assert planned["fit"]["suggestions"] == []
        return
    for one in planned["fit"]["suggestions"]:
        recipe = with_changes(prepared.recipe, one["changes"])
        changed = plan_run(replace(prepared, recipe=recipe))
        assert changed["fit"]["fits"], one
        assert changed["peak"]["bytes"] == one["needed_bytes"] <= gib * 2**30
        rows = prepared.rows_per_step
        assert changed["steps"]["effective_batch"] == max(
            rows, recipe.launch.processes * _at_once(recipe)
        )


def _at_once(recipe: Any) -> int:
    return int(recipe.training.per_device_train_batch_size)


def test_suggestions_name_checkpointing_batches_devices_and_adapters(make: Make) -> None:
    named: set[str] = set()
    for gib in (0.4, 0.8, 1.2):
        planned = plan_run(make(f"launch.device_memory={gib}"))
        for one in planned["fit"]["suggestions"]:
            named |= set(one["changes"])
            others = [rest["changes"] for rest in planned["fit"]["suggestions"] if rest != one]
            assert not any(rest.items() <= one["changes"].items() for rest in others)
    assert named >= {
        "training.gradient_checkpointing", "training.per_device_train_batch_size",
        "launch.engine", "launch.nproc", "model.lora",
    }  # fmt: skip


def test_a_plan_that_cannot_fit_is_refused_in_one_line(make: Make) -> None:
    planned = plan_run(make("launch.device_memory=1.2"))
    with pytest.raises(UserError) as refused:
        require_memory(planned)
    message, hint = refused.value.message, refused.value.hint
    assert "\n" not in message
    largest = planned["fit"]["checks"][0]["largest"]
    assert f"1.2 GiB are there (largest part: {largest})" in message
    assert "--lora" in hint
    assert "launch.device_memory" in hint


def test_a_run_that_cannot_fit_is_refused_and_leaves_no_folder(make: Make) -> None:
    recipe = make("launch.device_memory=0.1").recipe
    with pytest.raises(UserError, match="102 MiB are there"):
        run(recipe)
    assert not Path(str(recipe.out)).exists()


def test_weights_that_fit_nowhere_are_said_to(make: Make) -> None:
    error = refusal(plan_run(make("launch.device_memory=0.1")))
    assert error is not None
    assert "no engine helps" in error.hint


def test_memory_that_is_given_overrides_what_is_there(make: Make, monkeypatch: Any) -> None:
    monkeypatch.setattr("unlearn.recipes.fitting.host_memory", lambda: (2**30, 2**20))
    assert refusal(plan_run(make())) is not None
    require_memory(plan_run(make("launch.device_memory=1000")))


def test_checkpoints_hold_what_the_engine_keeps(make: Make) -> None:
    def checkpoint(*settings: str, lora: bool = False) -> float:
        planned = plan_run(make("training.save_total_limit=1", *settings, lora=lora))
        files = {file["path"]: file["bytes"] for file in planned["files"]}
        return files["checkpoints/"] / 2 / planned["parameters"]["trainable"]

    assert checkpoint() == 3 * 4  # weights and two states in float32
    assert checkpoint("launch.engine=zero2", "launch.nproc=2") == 4 * 4  # and the fp32 copy
    assert checkpoint(lora=True) == 3 * 4


def test_a_term_on_hidden_states_pays_for_the_layers_up_to_there(make: Make) -> None:
    """RMU reads layer 3 of 7 twice, forget and retain, and trains all of them here."""
    settings = ["terms.forget.layer=3", "terms.retain.layer=3", "training.trainable=null"]
    read, whole = plan_run(make(*settings, method="rmu")), plan_run(make())
    share = part(read, "activations") / part(whole, "activations")
    assert 4 / 7 < share < 4.5 / 7  # and a quarter of a layer in flight, without a head
    top = plan_run(make(*settings[:2], "training.trainable=[layers\\.3]", method="rmu"))
    assert part(top, "activations") < part(read, "activations") / 3  # below it nothing is kept


def test_the_tables_of_the_page_are_those_of_the_formulas() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "scale_table.py"))
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for table in (script["engine_table"](), script["step_table"]()):
        assert "\n".join(table) in page
