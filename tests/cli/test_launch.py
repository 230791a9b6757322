"""``unlearn launch``: what is printed or saved, and what is refused, as at the prompt."""

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.test_bad_input import refused

GIVEN = ("--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl")
TWO = ("--nnodes", "2", "--nproc", "4")
MEETING = ("--rdzv", "node-1:29500")


@pytest.fixture
def launch(world: Path, unlearn: Any) -> Any:
    def call(*options: object, method: str = "npo", out: str = "runs/a") -> Any:
        return unlearn("launch", method, *GIVEN, *(("--out", out) if out else ()), *options)

    return call


def commands(printed: str) -> list[list[str]]:
    return [shlex.split(one, comments=True) for one in printed.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("width", ["80", "120"])
def test_commands_are_printed_for_every_node(launch, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    found = launch(*TWO, *MEETING, "--engine", "zero3", "--set", "data.template=a b: {question}")
    assert found.code == 0, found.err
    assert "each of the 2 nodes" in found.out
    assert all(len(line) <= int(width) for line in found.out.splitlines())
    ours, torchrun = [words for words in commands(found.out) if words]
    common = ["npo", *GIVEN, "--out", "runs/a", "--engine", "zero3",
              "--set", "data.template=a b: {question}"]  # fmt: skip
    assert ours == ["unlearn", "run", *common, *TWO, *MEETING]
    place = torchrun.index("unlearn.cli") + 1
    assert torchrun[place:] == ["run", *common]
    assert {"--nnodes", "--rdzv-endpoint", "node-1:29500"} <= set(torchrun[:place])


def test_json_has_one_entry_per_node(launch):
    found = launch(*TWO, *MEETING, "--json").json
    assert (found["nodes"], found["processes_per_node"], found["engine"]) == (2, 4, "ddp")
    assert [one["node"] for one in found["commands"]] == [0, 1]
    assert found["commands"][0]["unlearn"].startswith("unlearn run npo --model model ")


def test_one_process_needs_no_launcher(launch):
    (words,) = [words for words in commands(launch("--print").out) if words]
    assert words == ["unlearn", "run", "npo", *GIVEN, "--out", "runs/a"]


def test_sizes_may_stand_in_the_recipe(launch):
    Path("mine.yaml").write_text(
        "method: npo\nterms: [{objective: npo, on: forget}]\nlaunch: {nproc: 2, nnodes: 2}\n"
    )
    text = launch("--slurm", method="mine.yaml").out
    assert "#SBATCH --nodes=2" in text
    assert "--nproc 2" in text
    assert "launch: {nproc: 2, nnodes: 2}" in text  # the recipe itself is in the job
    assert '"$recipe"' in text


def test_a_job_is_saved_and_said_how_to_start(launch):
    found = launch(*TWO, "--slurm", "--save", "a b.sbatch", "--time", "2:00:00")
    assert found.code == 0, found.err
    assert "sbatch 'a b.sbatch'" in found.out
    text = Path("a b.sbatch").read_text()
    assert "#SBATCH --time=2:00:00" in text
    assert f"#SBATCH --chdir={Path.cwd()}" in text
    subprocess.run(["bash", "-n", "a b.sbatch"], check=True)
    refused(launch(*TWO, "--slurm", "--save", "a b.sbatch"), "exists and is left as it is")
    assert Path("a b.sbatch").read_text() == text
    assert not Path("runs").exists()


def test_jobs_for_other_machines_do_not_look_at_files_here(launch):
    for name in ("forget.jsonl", "retain.jsonl"):
        Path(name).unlink()
    volume = ("--volume", "claim:/runs")
    sky = launch(*TWO, "--skypilot", "--accelerators", "H100", *volume, out="/runs/a")
    assert yaml.safe_load(sky.out)["num_nodes"] == 2
    pods = launch(*TWO, "--kubernetes", "--image", "x", *volume, "--json", out="/runs/a").json
    assert pods["kind"] == "kubernetes"
    assert len(list(yaml.safe_load_all(pods["text"]))) == 2
    refused(launch(*TWO, "--slurm"), "forget.jsonl")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (TWO, ("2 nodes given", "--rdzv HOST:PORT")),
        (("--slurm", "--kubernetes"), ("--slurm, --kubernetes given", "choose one")),
        (("--kubernetes", "--partition", "x"), ("--partition is not for --kubernetes", "--slurm")),
        (("--time", "1:00:00"), ("--time is not for --print", "--slurm or --kubernetes")),
        (("--slurm", "--time", "soon"), ("--time 'soon' is not a time limit",)),
        (("--slurm", "--partition", "a b"), ("--partition 'a b' is not a name",)),
        (("--skypilot", "--volume", "x"), ("--volume 'x' is not SOURCE:PATH",)),
        (("--slurm", *MEETING), ("--rdzv given with --slurm",)),
        (("--slurm", "--set", "launch.rdzv=a:1"), ("launch.rdzv is set",)),
        (("--submit",), ("--submit is for Slurm", "add --slurm")),
        (("--slurm", "--submit", "--save", "x"), ("--submit and --save given",)),
        (("--save", "x"), ("--save is for a job",)),
        (("--slurm", "--save", "no/x"), ("no folder 'no' for 'x'",)),
        (("--slurm", "--set", "training.learning_rat=1"), ("training.learning_rate",)),
        (("--slurm", "--set", "training.global_batch_size=7", *TWO), ("multiple of 64",)),
    ],
    ids=str,
)
def test_mistakes_are_one_line_and_write_nothing(launch, world, options, words):
    before = set(world.rglob("*"))
    refused(launch(*options), *words)
    refused(launch(*options, "--json"), *words)
    assert set(world.rglob("*")) == before


def test_what_a_run_needs_is_asked_for_here_too(launch, unlearn):
    refused(launch("--slurm", out=""), "--out, a new folder")
    refused(launch("--kubernetes", "--image", "x", "--volume", "c:/runs", out=""), "--out")
    Path("forget.jsonl").write_text('{"question": "?", "answer": ""}\n')
    refused(launch("--slurm"), "forget.jsonl")
