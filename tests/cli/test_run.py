"""Runs through the command line: what is printed where, and the screens."""

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from unlearn.cli.entry import FULL_DISK, explain
from unlearn.cli.progress import LivePanel, PlainLines, clock, edit_step, sparkline
from unlearn.cli.render import shortened

CONSOLE = Path(sys.executable).parent / "unlearn"
EVENTS = [
    {"event": "stage", "stage": "benchmark", "name": "before"},
    {"event": "progress", "what": "forget: scoring", "done": 4, "total": 4},
    {"event": "metrics", "name": "before",
     "metrics": {"forget_Q_A_Prob": 0.998, "retain_extraction_strength": None}},
    {"event": "stage", "stage": "train", "resumed_from": "checkpoint-3"},
    *({"event": "step", "step": n, "of": 8, "forget/nll": n / 4, "retain/nll": 0.1,
       "forget/npo": 0.5, "learning_rate": 1e-5, "seconds": n - 3.0, "memory_bytes": 2**30}
      for n in range(4, 7)),
    {"event": "unmoved", "tensors": ["model.norm.weight"]},
]  # fmt: skip


def test_results_are_one_json_object_and_progress_goes_to_stderr(run_npo):
    outcome = run_npo(options=("--json",))
    assert outcome.code == 0, outcome.err
    results = outcome.json
    assert results == json.loads(Path("out/results.json").read_text())
    assert results["status"] == "complete"
    assert set(results["metrics"]) == {"before", "after"}
    assert (Path(results["model"]) / "model.safetensors").is_file()
    assert Path(results["report"]).is_file()
    for line in ("loading the model", "measuring before", "unlearning", "step 2/2"):
        assert line in outcome.err


def test_of_what_libraries_print_only_our_own_warnings_are_shown(run_npo, monkeypatch):
    from unlearn import models

    load = models.load_model

    def noisy(*arguments: Any, **named: Any) -> Any:
        sys.stdout.write("a library says hello\n")
        for module, text in (("transformers.models", "worried"), ("unlearn.scores", "look out")):
            warnings.warn_explicit(text, UserWarning, "file.py", 1, module=module)
        return load(*arguments, **named)

    monkeypatch.setattr(models, "load_model", noisy)  # called before and after training
    outcome = run_npo(options=("--json",))
    assert outcome.json["status"] == "complete"
    assert outcome.err.count("a library says hello") == 2
    assert "worried" not in outcome.err
    assert outcome.err.count("warning: look out\n") == 1


def test_console_script_prints_nothing_but_its_own_lines(world):
    """Fresh process, real descriptors: DeepSpeed and transformers have their say at import."""
    flags = ["--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    fast = ["training.max_steps=1", "evals.max_rows=2", "evals.max_new_tokens=2"]
    changes = [part for change in fast for part in ("--set", change)]
    done = subprocess.run(
        [CONSOLE, "run", "npo", *flags, "--out", "out", *changes, "--json"],
        capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert json.loads(done.stdout)["run"] == "out"
    ours = ("[", "  forget", "  retain", "  reference on ", "  step ")
    assert [line for line in done.stderr.splitlines() if not line.startswith(ours)] == []


def test_tables_for_people_fit_the_terminal(run_npo, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    answers = ("evals.generate=true", "evals.max_new_tokens=90", "model.retain_model=model")
    outcome = run_npo(*answers)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) <= 80
    probability = next(line for line in lines if "probability" in line)
    assert probability.split()[:2] == ["forget", "probability"]
    assert probability.split()[-1] == "lower"
    assert [line.split()[0] for line in lines if " was born." in line] == ["true", "true"]
    for name in ("before", "after", "retain model"):
        assert sum(line.startswith(f"{name} ") for line in lines) == 4
    assert lines[-1] == "report out/report.html"


def test_long_paths_are_not_broken(run_npo, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    out = "/".join(["a-rather-long-folder-name"] * 4)
    assert f"report {out}/report.html" in run_npo(out=out).out.splitlines()


def test_unexpected_error_is_one_line_and_a_log(run_npo, monkeypatch):
    def broken(*arguments: Any, **named: Any) -> Any:
        raise ValueError("the cause\nand a long story")

    monkeypatch.setattr("unlearn.recipes.run.train", broken)
    outcome = run_npo(options=("--json",))
    assert outcome.code == 1
    assert "failed: ValueError: the cause\n" in outcome.err
    assert "Traceback" not in outcome.err
    assert "out/error.log" in outcome.json["error"]["hint"]
    log = Path("out/error.log").read_text()
    assert log.startswith("Traceback")
    assert "a long story" in log
    shown = run_npo(options=("--debug",), out="other")
    assert shown.code == 1
    assert "Traceback" in shown.err


def test_running_out_of_memory_says_what_to_change(run_npo, monkeypatch):
    import torch

    def hungry(*arguments: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("unlearn.recipes.run.train", hungry)
    outcome = run_npo()
    assert outcome.code == 1
    assert "failed: out of memory\n" in outcome.err
    assert "per_device_train_batch_size" in outcome.err
    assert "`unlearn resume out`" in outcome.err


@pytest.mark.parametrize("sign", FULL_DISK)
def test_full_disk_is_recognised(sign):
    assert explain(RuntimeError(f"[enforce fail] {sign}: 12 != 34")).message == "the disk is full"


def test_help_needs_no_heavy_library():
    """Each of them takes seconds to import."""
    code = (
        "import sys; from unlearn.cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'jinja2'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize("command", ["run", "resume", "quickstart", "plan"])
def test_every_command_shows_an_example(unlearn, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "300")
    outcome = unlearn(command, "--help")
    assert outcome.code == 0
    assert f"Example: unlearn {command} " in outcome.out
    assert "<bool>" not in outcome.out.replace("--help", "").split("Show this message")[-1]


def test_version(unlearn):
    from unlearn import __version__

    assert unlearn("--version").out == f"unlearn {__version__}\n"


@pytest.mark.parametrize("width", [60, 110])
def test_live_panel_shows_stage_bar_curves_and_what_is_left(width):
    from rich.console import Console

    panel = LivePanel()
    panel.console = Console(file=io.StringIO(), force_terminal=True, width=width, record=True)
    panel.live.console = panel.console
    with panel.live:
        for event in EVENTS:
            panel.show(event)
        panel.console.print(panel.render())
        panel.finish()
    lines = panel.console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    shown = " ".join(" ".join(line.split()) for line in lines)
    for words in (
        "✓ measuring before",
        "forget probability 0.998",
        "retain extraction strength –",
        "warning: no update reached model.norm.weight",
        "6/8",
        "0:02 left",
        "1.0 GiB",
        "1.00 → 1.50 nats per token",
        "✓ unlearning from checkpoint-3",
    ):
        assert words in shown


def test_plain_lines_for_logs(capsys):
    lines = PlainLines(seconds=0.0)
    for event in EVENTS:
        lines.show(event)
    shown = capsys.readouterr().err
    assert "  forget: probability 0.998" in shown
    assert "unlearning from checkpoint-3" in shown
    assert "step 6/8: forget/nll 1.500, retain/nll 0.100, forget/npo 0.500 (0:02 left)" in shown


EDIT_STEP = {"event": "step", "step": 3, "of": 4, "forget/nll": 2.23, "retain/kl": 0.224,
             "gain": 0.74, "kl_spent": 0.14, "kl_budget": 0.25, "alpha": 1e-4, "seconds": 62.0,
             "memory_bytes": 2**30}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "loss 1.49 → 2.23, retain KL 0.224 (+0.140), 89.6 % of the budget"),
        ({"kl_budget": None}, "loss 1.49 → 2.23, retain KL 0.224 (+0.140)"),
        ({"kl_spent": -2e-6}, "loss 1.49 → 2.23, retain KL 0.224 (-2.0e-06), 89.6 % of the budget"),
        ({"gain": None, "kl_spent": None, "kl_budget": None}, "loss 2.23, retain KL 0.224"),
    ],
)
def test_a_step_of_an_edit_in_words(changes, line):
    """2.23 - 0.74 = 1.49; 0.224 / 0.25 = 89.6 %."""
    assert edit_step(EDIT_STEP | changes) == f"step 3/4: forget {line}"
    corrected = edit_step(EDIT_STEP | changes | {"correction": 0.5, "corrected_kl": 0.084})
    assert corrected == f"step 3/4: retain KL lowered to 0.0840; then forget {line}"
    assert edit_step(EVENTS[-2]) == ""


def test_every_step_of_an_edit_is_told_however_soon(capsys):
    lines, panel = PlainLines(seconds=1000.0), LivePanel()
    for event in ({"event": "progress", "what": "step 1: trial", "done": 1, "total": 1}, EDIT_STEP):
        lines.show(event)
        panel.show(event)
    shown = capsys.readouterr().err.splitlines()
    assert "  step 3/4: forget loss 1.49 → 2.23, retain KL 0.224 (+0.140), 89.6 % of the budget " \
        "(after 1:02)" in shown  # fmt: skip
    assert panel.series == {"forget/nll": [pytest.approx(1.49), 2.23]}


def test_sparkline_starts_at_zero_and_shares_its_scale():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([1.0, 1.0], top=7.0) == "▂▂"
    assert sparkline([0.0] * 100, width=10) == "▁" * 10


def test_answers_cannot_steer_the_terminal():
    assert shortened("a\x1b[2Jb\x00\n c  d") == "a·[2Jb· c d"
    assert len(shortened("x" * 1000)) == 240


def test_clock():
    assert clock(59.9) == "0:59"
    assert clock(3 * 3600 + 62) == "3:01:02"


@pytest.mark.slow
def test_quickstart_forgets_within_ninety_seconds(tmp_path):
    done = subprocess.run(
        [CONSOLE, "quickstart", "--out", tmp_path / "q", "--json"],
        capture_output=True, text=True, check=True, timeout=180,
    )  # fmt: skip
    metrics = json.loads(done.stdout)["metrics"]
    assert metrics["before"]["forget_Q_A_Prob"] > 0.9
    assert metrics["after"]["forget_Q_A_Prob"] < 0.3
    assert metrics["after"]["retain_Q_A_Prob"] > 0.9
    assert metrics["retain_model"]["forget_Q_A_Prob"] < 0.3


def test_quickstart_in_short(world, unlearn):
    fast = ("training.max_steps=1", "evals.max_rows=2", "evals.max_new_tokens=2")
    changes = [part for change in fast for part in ("--set", change)]
    outcome = unlearn("quickstart", "--out", "q", *changes, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["method"] == "npo"
    assert set(outcome.json["metrics"]) == {"before", "after", "retain_model"}
