"""A batch script for Slurm that saves before it is stopped, and goes on when it is started again.

What the script relies on (read in Slurm's sources and manual pages):

- ``--signal=B:TERM@120`` sends SIGTERM to the script alone, two minutes before the time limit.
- srun answers a SIGTERM of its own by killing its tasks. So the script does not pass the signal to
  srun, it lets ``scancel --signal`` send it to the tasks.
- srun ends with the largest exit code of its tasks: 75 when all have stopped and can go on.
- A job that a person cancels is no longer RUNNING when its tasks end: it is not brought back.
"""

import shlex
from pathlib import Path

from unlearn.jobs.job import GRACE_SECONDS, RESUMABLE, Job, start_lines

MOST_REQUEUES = 100
"""A job that never gets far enough to save would be put back for ever."""
PORTS = 10_000
"""Two jobs on one node meet at different ports: this many, from this one on."""


def batch_script(job: Job, *, folder: Path, command: str = "unlearn launch --slurm") -> str:
    """Give the text of an sbatch script; relative paths in it are read from ``folder``."""
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415 - only when a job is written

    text = Path(__file__).with_name("slurm.sh.j2").read_text(encoding="utf-8")
    template = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    ).from_string(text)
    return template.render(
        job=job,
        command=" ".join(command.split()),
        folder=shlex.quote(str(folder)),
        grace=GRACE_SECONDS,
        resumable=RESUMABLE,
        most=MOST_REQUEUES,
        ports=PORTS,
        start=start_lines(job, recipe_file='"$out.recipe.yaml"').rstrip(),
    )
