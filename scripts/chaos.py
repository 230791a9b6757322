"""Kill a run again and again, resume it each time, and compare the end with an undisturbed run.

    python scripts/chaos.py                                   # 20 kills of a 40-step run
    python scripts/chaos.py --nproc 2 --engine ddp            # two processes
    python scripts/chaos.py --kills 3 --steps 10 --json       # a small one, for machines

The run is NPO on invented people with the small model that ships with the package, on a CPU. Kill k
is SIGKILL when k is even and SIGTERM when it is odd. Its moment is drawn from ``--seed``: some
seconds after the start of the process (while it reads, loads, measures or trains), after a few more
steps, or while a checkpoint is being written (its staging folder is there). With several processes
SIGKILL hits rank 1, rank 0 or the launcher in turn; SIGTERM goes to the launcher.

Wanted: SIGTERM ends with exit code 75; whatever the kill, ``unlearn resume`` goes on; the final
weights equal those of the undisturbed run, bit for bit on one process and to 1e-6 on several, where
the order in which gradients are added up may differ. Threads are set to one for both runs: with
more, the order of additions may differ on one process too.

What bounds the time: every start of a process imports torch and transformers (5 to 10 s on two
cores), so 20 kills take about 4 minutes, and twice that with two processes.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file

from unlearn.data.people import demo_folder, write_people
from unlearn.runs import RunFolder

UNLEARN = [sys.executable, "-m", "unlearn.cli"]
TOLERANCE = 1e-6
"""Largest difference of a weight on several processes."""
PATIENCE = 300
"""Seconds after which a process that neither ends nor reaches its moment counts as hung."""


@dataclass(frozen=True)
class Kill:
    """One kill: when and how it was done, and what became of the run."""

    number: int
    signal: str
    target: str
    moment: str
    step: int
    code: int
    ok: bool


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        report = chaos(Path(name), options)
    print(json.dumps(report, indent=2) if options.json else verdict(report))
    raise SystemExit(0 if report["ok"] else 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--engine", default=None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def chaos(place: Path, options: argparse.Namespace) -> dict[str, object]:
    """Do both runs and give every kill, the largest difference of a weight and the verdict."""
    write_people(place / "people")
    os.environ |= {"OMP_NUM_THREADS": "1", "UNLEARN_CACHE": str(place / "cache")}
    say("the undisturbed run")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(run_command(place, "whole", options), check=True, **quiet)
    kills = list(disturbed(place, options))
    difference = largest_difference(place / "whole", place / "killed")
    allowed = 0.0 if options.nproc == 1 else TOLERANCE
    return {
        "kills": [asdict(kill) for kill in kills],
        "difference": difference,
        "allowed": allowed,
        "ok": difference <= allowed and all(kill.ok for kill in kills),
    }


def run_command(place: Path, out: str, options: argparse.Namespace) -> list[str]:
    people = place / "people"
    settings = {
        "training.max_steps": options.steps,
        "training.num_train_epochs": 100,
        "training.save_steps": 2,
        "training.learning_rate": 3e-4,
        "evals.max_rows": 8,
        "evals.generate": "false",
    }
    changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    engine = ["--engine", options.engine] if options.engine else []
    return [
        *UNLEARN, "run", "npo", "--model", str(demo_folder() / "target"),
        "--forget", f"{people}#forget", "--retain", f"{people}#retain",
        "--out", str(place / out), "--nproc", str(options.nproc), *engine, *changes, "--offline",
    ]  # fmt: skip


def disturbed(place: Path, options: argparse.Namespace) -> Iterator[Kill]:
    """Start or resume the run, kill it at its moment, and once all kills are done let it end."""
    draw = random.Random(options.seed)
    folder = RunFolder(place / "killed")
    for number in range(options.kills):
        process = start(place, folder, options)
        moment, come = chosen_moment(draw, folder)
        done, target = number % 2 == 0, targets(options.nproc, number)
        name = "SIGKILL" if done else "SIGTERM"
        reached = wait_for(process, come)
        if reached:
            send(process, signal.Signals[name], target if done else "launcher")
        code = process.wait(PATIENCE)
        wait_for_orphans(folder)
        ended = code == 0 and folder.results.is_file()  # the signal came after the last stage
        ok = ended or (reached and (code == 75 if name == "SIGTERM" else code != 0))
        moment = moment if reached else f"{moment} (ended before)"
        kill = Kill(number, name, target if done else "launcher", moment, step(folder), code, ok)
        say(f"kill {number + 1}/{options.kills}: {name} to {kill.target} {moment}: "
            f"step {kill.step}, exit code {code}{'' if ok else '  <- wrong'}")  # fmt: skip
        yield kill
    say("resumed for the last time")
    process = start(place, folder, options)
    if process.wait(PATIENCE) != 0:
        raise SystemExit(f"the last resume failed:\n{(place / 'stderr').read_text()[-2000:]}")


def start(place: Path, folder: RunFolder, options: argparse.Namespace) -> "subprocess.Popen[bytes]":
    """Resume the run, or start it anew when it was killed before it had a recipe."""
    command = [*UNLEARN, "resume", str(folder.path), "--offline"]
    if not folder.recipe.is_file():
        shutil.rmtree(folder.path, ignore_errors=True)
        command = run_command(place, folder.path.name, options)
    with (place / "stderr").open("wb") as log:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)


def chosen_moment(draw: random.Random, folder: RunFolder) -> tuple[str, Callable[[], bool]]:
    """Draw when to kill: a description, and a function that tells when the moment has come."""
    kind = draw.choice(("seconds", "steps", "saving", "saving"))
    if kind == "seconds":
        seconds, begun = round(draw.uniform(0.5, 9), 1), time.monotonic()
        return f"{seconds} s after the start", lambda: time.monotonic() - begun > seconds
    more, pause, before = draw.randint(1, 3), draw.uniform(0, 0.05), events(folder)
    if kind == "steps":
        return f"after {more} more steps", lambda: later(events(folder) >= before + more, pause)

    def saving() -> bool:
        return events(folder) > before and any(folder.checkpoints.glob(".checkpoint-*"))

    return "while saving", saving


def later(come: bool, pause: float) -> bool:
    if come:
        time.sleep(pause)
    return come


def targets(nproc: int, number: int) -> str:
    names = ("rank 1", "rank 0", "launcher")
    return "the process" if nproc == 1 else names[number // 2 % len(names)]


def wait_for(process: "subprocess.Popen[bytes]", come: Callable[[], bool]) -> bool:
    """Wait for the moment; False when the process ends before."""
    until = time.monotonic() + PATIENCE
    while process.poll() is None:
        if come():
            return True
        if time.monotonic() > until:
            process.kill()
            raise SystemExit("the run hangs")
        time.sleep(0.002)
    return False


def send(process: "subprocess.Popen[bytes]", number: signal.Signals, target: str) -> None:
    ranks = {f"rank {rank}": pid for rank, pid in enumerate(workers(process.pid))}
    os.kill(ranks.get(target, process.pid), number)


def workers(pid: int) -> list[int]:
    """Give the processes that a launcher has started, by rank (Linux)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(int(child) for child in children)


def wait_for_orphans(folder: RunFolder) -> None:
    """Wait until no process holds the run: ranks whose launcher was killed save and end too."""
    until = time.monotonic() + PATIENCE
    while folder.path.is_dir() and time.monotonic() < until:
        try:
            with folder.locked():
                return
        except Exception:
            time.sleep(0.2)


def events(folder: RunFolder) -> int:
    return len(folder.events("step"))


def step(folder: RunFolder) -> int:
    return max((event["step"] for event in folder.events("step")), default=0)


def largest_difference(one: Path, other: Path) -> float:
    weights = [load_file(run / "model" / "model.safetensors") for run in (one, other)]
    return max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])


def verdict(report: dict[str, object]) -> str:
    word = "the same" if report["ok"] else "NOT the same"
    return f"{word}: largest difference {report['difference']}, allowed {report['allowed']}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
