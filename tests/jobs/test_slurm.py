"""The script for Slurm, run for real: only Slurm's own commands are stand-ins.

The stand-in for srun does what srun does with a SIGTERM of its own: it kills its tasks. It ends
with the largest exit code of them.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from unlearn.jobs import Job, batch_script
from unlearn.jobs.job import RECIPE

STAND_INS = {
    "srun": """
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((node = 0; node < NODES; node++)); do "$@" & tasks+=($!); done
echo "${tasks[@]}" > tasks
trap 'kill -KILL "${tasks[@]}"' TERM
worst=0
for task in "${tasks[@]}"; do
  wait "$task"; code=$?
  if ((code > worst)); then worst=$code; fi
done
exit $worst""",
    "scancel": """
echo "$@" >> scancel.calls
kill -TERM $(cat tasks)""",
    "scontrol": """
case "$1 $2" in
  "show hostnames") printf '%s\\n' $HOSTS ;;
  "show job") echo "JobId=7 JobState=$STATE Reason=None" ;;
  *) echo "$@" >> scontrol.calls ;;
esac""",
    "unlearn": """
echo "$@" >> unlearn.calls
case "$BEHAVE" in
  wait) trap 'sleep 0.3; exit 75' TERM; touch waiting; for i in {1..300}; do sleep 0.1; done ;;
  *) exit "$BEHAVE" ;;
esac""",
}


@dataclass
class Cluster:
    """A folder with stand-ins for Slurm's commands, in which a script is run as a job."""

    folder: Path
    environment: dict[str, str]

    def start(self, job: Job, **changes: str) -> subprocess.Popen[str]:
        script = self.folder / "job.sbatch"
        script.write_text(batch_script(job, folder=self.folder))
        subprocess.run(["bash", "-n", script], check=True)
        return subprocess.Popen(
            ["bash", script], cwd=self.folder, env=self.environment | changes,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, job: Job, **changes: str) -> int:
        started = self.start(job, **changes)
        started.communicate(timeout=60)
        return started.returncode

    def calls(self, name: str) -> list[str]:
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash{text}\n")
        (programs / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node-[1-2]", "STATE": "RUNNING"}
    ours = {"NODES": "1", "HOSTS": "node-1 node-2", "BEHAVE": "0"}
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}
    return Cluster(tmp_path, dict(os.environ) | slurm | ours | path)


ONE = Job(("npo", "--out", "runs/a b"), "runs/a b")
TWO = Job(("npo", "--out", "runs/a"), "runs/a", nnodes=2, nproc=8)


def directives(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH --")]
    return {
        name: value
        for name, _, value in (line[len("#SBATCH --") :].partition("=") for line in lines)
    }


def test_what_is_asked_for() -> None:
    job = Job(("npo",), "runs/A_b", 2, 8, time="1-0", partition="gpu", account="lab")
    asked = directives(batch_script(job, folder=Path("/srv/it's")))
    assert asked == {
        "job-name": "unlearn-a-b", "nodes": "2", "ntasks-per-node": "1", "cpus-per-task": "32",
        "gpus-per-node": "8", "time": "1-0", "partition": "gpu", "account": "lab",
        "signal": "B:TERM@120", "requeue": "", "open-mode": "append", "output": "%x-%j.log",
        "chdir": "'/srv/it'\"'\"'s'",
    }  # fmt: skip
    assert "gpus-per-node" not in directives(
        batch_script(Job(("npo",), "a", gpus_per_node=0), folder=Path("/"))
    )


def test_a_run_that_ends_is_not_requeued(cluster: Cluster) -> None:
    assert cluster.run(ONE) == 0
    assert cluster.calls("unlearn") == ["run npo --out runs/a b"]
    assert cluster.calls("scontrol") == []


def test_an_interrupted_run_is_requeued_and_resumed(cluster: Cluster) -> None:
    """Job 4711 meets at port 10000 + 4711 of the first node."""
    two = {"NODES": "2"}
    assert cluster.run(TWO, BEHAVE="75", **two) == 75
    assert cluster.calls("scontrol") == ["requeue 4711"]
    run = "run npo --out runs/a --nnodes 2 --nproc 8 --rdzv node-1:14711"
    assert cluster.calls("unlearn") == [run, run]
    (cluster.folder / "runs/a").mkdir(parents=True)
    (cluster.folder / "runs/a/recipe.yaml").touch()
    assert cluster.run(TWO, HOSTS="node-8 node-9", **two) == 0
    assert cluster.calls("unlearn")[2:] == ["resume runs/a --rdzv node-8:14711"] * 2
    assert cluster.calls("scontrol") == ["requeue 4711"]


@pytest.mark.parametrize("code", ["1", "2", "137"])
def test_a_failed_run_is_not_requeued(cluster: Cluster, code: str) -> None:
    assert cluster.run(ONE, BEHAVE=code) == int(code)
    assert cluster.calls("scontrol") == []


@pytest.mark.parametrize(
    "changes", [{"STATE": "COMPLETING"}, {"SLURM_RESTART_COUNT": "100"}], ids=str
)
def test_a_cancelled_job_stays_away_and_no_job_comes_back_for_ever(
    cluster: Cluster, changes: dict[str, str]
) -> None:
    assert cluster.run(ONE, BEHAVE="75", **changes) == 75
    assert cluster.calls("scontrol") == []


def wait_for(path: Path, started: Any) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_reaches_the_tasks_which_may_save(cluster: Cluster, times: int) -> None:
    started = cluster.start(TWO, BEHAVE="wait", NODES="2")
    wait_for(cluster.folder / "waiting", started)
    for _ in range(times):
        started.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    printed, _ = started.communicate(timeout=30)
    assert started.returncode == 75, printed
    assert cluster.calls("scancel") == ["--signal=TERM 4711"] * times
    assert cluster.calls("scontrol") == ["requeue 4711"]


def test_setup_comes_first_and_its_failure_is_final(cluster: Cluster) -> None:
    assert cluster.run(Job(("npo",), "a", setup="export BEHAVE=3")) == 3
    assert cluster.run(Job(("npo",), "a", setup="false")) == 1
    assert cluster.calls("unlearn") == ["run npo"]


def test_a_recipe_of_the_user_is_in_the_job(cluster: Cluster) -> None:
    text = "method: npo\n# it's $HOME and `date`\nEND_OF_RECIPE\n"
    assert cluster.run(Job((RECIPE, "--lora"), "runs/a", recipe=text)) == 0
    assert cluster.calls("unlearn") == ["run runs/a.recipe.yaml --lora"]
    assert (cluster.folder / "runs/a.recipe.yaml").read_text() == text


def test_words_reach_the_command_as_they_are(cluster: Cluster) -> None:
    """Nothing a person types is expanded, not even what the script itself uses."""
    words = ["$HOME", "a  b", "it's", "$rdzv", "$out", "`date`", "x" * 90, "*"]
    name = cluster.folder / "bin" / "unlearn"
    name.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > unlearn.calls\n')
    assert cluster.run(Job(["npo", *[f"--set={word}" for word in words], *words], "a")) == 0
    assert cluster.calls("unlearn")[2:] == [f"--set={word}" for word in words] + words


@pytest.mark.slow
def test_a_real_run_is_stopped_requeued_and_finished(
    cluster: Cluster, build_tiny_model: Any, build_tiny_tokenizer: Any
) -> None:
    """Two tasks on one machine, which meet at localhost; the second life resumes the first."""
    folder = cluster.folder
    build_tiny_model().save_pretrained(folder / "model")
    build_tiny_tokenizer().save_pretrained(folder / "model")
    row = '{"question": "Who is %s?", "answer": "%s was born."}\n'
    for name in ("forget", "retain"):
        (folder / f"{name}.jsonl").write_text("".join(row % (n, n) for n in range(8)))
    program = f'#!/bin/bash\nexec {sys.executable} -m unlearn.cli "$@"\n'
    (folder / "bin" / "unlearn").write_text(program)
    job = Job(run_words(), "out", nnodes=2, nproc=1)
    here = {"NODES": "2", "HOSTS": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    started = cluster.start(job, **here)
    events = folder / "out" / "events.jsonl"
    wait_for(events, started)
    while '"step"' not in events.read_text():
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    printed, _ = started.communicate(timeout=120)
    assert started.returncode == 75, printed
    assert cluster.calls("scontrol") == [f"requeue {os.getpid()}"]
    assert not (folder / "out" / "results.json").exists()
    again = cluster.start(job, **here)
    printed, _ = again.communicate(timeout=240)
    assert again.returncode == 0, printed
    assert (folder / "out" / "results.json").is_file()
    assert "unlearning from" in printed


def run_words() -> Sequence[str]:
    changes = [
        "training.max_steps=200", "training.per_device_train_batch_size=2",
        "training.gradient_accumulation_steps=1", "evals.max_rows=2", "evals.generate=false",
    ]  # fmt: skip
    pairs = [part for change in changes for part in ("--set", change)]
    data = ["--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    return ["npo", *data, "--out", "out", *pairs, "--offline"]
