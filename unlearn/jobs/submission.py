"""Submitting through submitit, which asks Slurm itself and puts a preempted run back in the queue.

submitit is an extra. It lets Slurm send SIGUSR2 before the time limit and at preemption, asks the
callable for its ``checkpoint`` and requeues what that returns.
"""

import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unlearn.errors import UserError
from unlearn.jobs.job import GRACE_SECONDS, RECIPE, RESUMABLE, Job, seconds
from unlearn.jobs.slurm import MOST_REQUEUES, PORTS
from unlearn.runs import write_atomic


@dataclass(frozen=True)
class Submitted:
    """A job in the queue: its number, and the folder with its logs."""

    id: str
    folder: Path
    handle: Any
    """submitit's own object for the job."""


def submit(job: Job, *, cluster: str = "slurm") -> Submitted:
    """Submit a run and give its job; logs and submitit's files lie beside the run folder.

    ``cluster`` is submitit's: ``local`` runs the job on this machine, on one node.

    Raises:
        UserError: submitit is not installed, or Slurm is not here.
    """
    submitit = _submitit()
    folder = Path(f"{job.out}.slurm").absolute()
    if job.recipe is not None:
        path = folder / "recipe.yaml"
        write_atomic(path, job.recipe)
        words = [str(path) if word == RECIPE else word for word in job.arguments]
        job = replace(job, arguments=words, recipe=None)
    try:
        executor = submitit.AutoExecutor(
            folder, cluster=cluster, slurm_max_num_timeout=MOST_REQUEUES
        )
    except RuntimeError:
        hint = "submit where Slurm is, or write a script with --slurm --save FILE"
        raise UserError("there is no Slurm here: `srun` is not on the PATH", hint) from None
    executor.update_parameters(**_parameters(job, cluster))
    submitted = executor.submit(Run(job))
    return Submitted(submitted.job_id, folder, submitted)


def _submitit() -> Any:
    try:
        import submitit  # noqa: PLC0415 - an extra
    except ImportError:
        raise UserError(
            "--submit needs submitit, which is not installed", "pip install 'unlearn-llm[slurm]'"
        ) from None
    return submitit


def _parameters(job: Job, cluster: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": job.name,
        "nodes": job.nnodes,
        "tasks_per_node": 1,
        "gpus_per_node": job.gpus,
        "timeout_min": -(-seconds(job.time) // 60),
    }
    if cluster != "slurm":
        return found
    found |= {
        "cpus_per_task": job.cpus,
        "slurm_partition": job.partition,
        "slurm_account": job.account,
        "slurm_setup": [job.setup] if job.setup else None,
        "slurm_signal_delay_s": GRACE_SECONDS,
        "slurm_srun_args": ["--kill-on-bad-exit=0", "--wait=0", f"--cpus-per-task={job.cpus}"],
        "slurm_additional_parameters": {"requeue": True},
    }
    if not job.gpus:  # Slurm need not know of any
        del found["gpus_per_node"]
    return found


class Run:
    """What one node does: run the command and wait; when asked, stop it so that it can go on."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.process: subprocess.Popen[bytes] | None = None
        self.code: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"job": self.job, "process": None, "code": None}

    def __call__(self) -> int:
        """Start the run, or go on with it, and give its exit code: 0, or 75 beside the first node.

        Raises:
            RuntimeError: the run failed; its message is in the log.
        """
        from submitit import JobEnvironment  # noqa: PLC0415 - an extra

        here = JobEnvironment()
        self.process = subprocess.Popen(self._words(here), preexec_fn=_deaf_to_usr2)
        threading.Thread(target=self._watch, args=(self.process,), daemon=True).start()
        code = self._ended()
        if code == RESUMABLE and here.global_rank == 0:
            # stopped by somebody else: submitit's own handler takes over, and does not come back
            signal.raise_signal(getattr(signal, f"SIG{here.USR_SIG}"))
        if code not in (0, RESUMABLE):
            raise RuntimeError(f"the run ended with exit code {code}; the lines above say why")
        return code

    def checkpoint(self) -> Any:
        """Let the run save and end; give what is to be run next, None when it has failed."""
        from submitit.helpers import DelayedSubmission  # noqa: PLC0415 - an extra

        if self.process:
            self.process.send_signal(signal.SIGTERM)
            if self._ended() not in (0, RESUMABLE):
                return None
        return DelayedSubmission(Run(self.job))

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        self.code = process.wait()

    def _ended(self) -> int:
        """Wait without a lock: ``checkpoint`` is called in a signal handler, during this wait."""
        while self.code is None:
            time.sleep(0.2)
        return self.code

    def _words(self, here: Any) -> list[str]:
        rdzv = f"{here.hostnames[0]}:{PORTS + int(here.raw_job_id) % PORTS}"
        if (Path(self.job.out) / "recipe.yaml").is_file():
            words = self.job.resume_words(out=self.job.out, rdzv=rdzv)
        else:
            words = self.job.run_words(nnodes=str(self.job.nnodes), rdzv=rdzv)
        return [sys.executable, "-m", "unlearn.cli", *words[1:]]


def _deaf_to_usr2() -> None:
    """Keep submitit's signal from ending the run: some Slurms send it to every process."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
