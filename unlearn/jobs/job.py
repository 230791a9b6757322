"""What a scheduler must know about a run, and the shell lines with which every job starts it."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from unlearn.errors import UserError


class Variable(str):
    """A word that the shell of a job expands; every other word is quoted."""


RECIPE = Variable("$recipe")
"""Stands in ``Job.arguments`` for the recipe file that a job writes before it starts the run."""
RESUMABLE = 75
"""Exit code of a run that was interrupted and can go on: ``EX_TEMPFAIL`` of sysexits.h."""
GRACE_SECONDS = 120
"""How long a run may take to finish its step and save it when it is asked to stop."""
PORT = 29500

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


@dataclass(frozen=True)
class Volume:
    """Storage that outlives the machines of a job, and the folder where it appears."""

    source: str
    path: str

    @classmethod
    def parse(cls, text: str) -> "Volume":
        """Read ``SOURCE:PATH``; SOURCE may be a URL, PATH is absolute.

        Raises:
            UserError: it has another form.
        """
        source, _, path = text.rpartition(":")
        if not source or not path.startswith("/") or path.startswith("//"):
            hint = "give SOURCE:PATH with an absolute PATH, for instance --volume my-claim:/runs"
            raise UserError(f"--volume '{text}' is not SOURCE:PATH", hint)
        return cls(source, path.rstrip("/") or "/")

    @property
    def bucket(self) -> bool:
        """Tell whether it is an object store, which nodes cannot share as a file system."""
        return "://" in self.source

    def require_holds(self, out: str) -> None:
        """Refuse a run folder that would be lost with the machine.

        Raises:
            UserError: ``out`` does not lie in the volume.
        """
        if PurePosixPath(self.path) not in PurePosixPath(out).parents:
            hint = f"give --out {self.path.rstrip('/')}/{PurePosixPath(out).name}"
            raise UserError(f"--out '{out}' does not lie in the volume at {self.path}", hint)


@dataclass(frozen=True)
class Job:
    """A run and the resources it asks for. The fields are named as the schedulers name them.

    ``arguments`` are those of ``unlearn run``, without nodes, processes and meeting place: the job
    adds them. ``recipe`` is the text of a recipe that is not one of ours; :data:`RECIPE` stands for
    it in ``arguments``. ``gpus_per_node`` is one per process unless given.
    """

    arguments: Sequence[str]
    out: str
    nnodes: int = 1
    nproc: int = 1
    recipe: str | None = None
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    accelerators: str | None = None
    image: str | None = None
    volume: Volume | None = None
    setup: str | None = None

    def __post_init__(self) -> None:
        seconds(self.time)
        for name in ("partition", "account", "accelerators", "image"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.,:/@+-]+", value):
                raise UserError(f"--{name} '{value}' is not a name", "give it without spaces")

    @property
    def gpus(self) -> int:
        """GPUs of each node."""
        return self.nproc if self.gpus_per_node is None else self.gpus_per_node

    @property
    def cpus(self) -> int:
        """CPU cores of each node: four per process unless given."""
        return self.cpus_per_task or 4 * self.nproc

    @property
    def name(self) -> str:
        """A name that every scheduler accepts: lower-case letters, digits and dashes."""
        words = re.sub(r"[^a-z0-9]+", "-", PurePosixPath(self.out).name.lower()).strip("-")
        return f"unlearn-{words}"[:40].strip("-")

    def run_words(self, *, nnodes: str, rdzv: str) -> list[str]:
        """Give the words of ``unlearn run``; the run's own nodes and meeting place are added."""
        words = ["unlearn", "run", *self.arguments]
        if self.nnodes > 1:
            words += ["--nnodes", nnodes]
        if self.nproc * self.nnodes > 1:
            words += ["--nproc", str(self.nproc)]
        return words + self._meeting(rdzv)

    def resume_words(self, *, out: str, rdzv: str) -> list[str]:
        """Give the words of ``unlearn resume``: its recipe knows the rest."""
        offline = ["--offline"] if "--offline" in self.arguments else []
        return ["unlearn", "resume", out, *offline, *self._meeting(rdzv)]

    def _meeting(self, rdzv: str) -> list[str]:
        return ["--rdzv", rdzv] if self.nnodes > 1 else []


def start_lines(job: Job, *, recipe_file: str, nnodes: str | None = None) -> str:
    """Give shell lines that set ``$@`` to the command: to start the run, or to go on with it.

    They read ``$rdzv``, set before. A run that has begun has a recipe in its folder; that file is
    written when all nodes have met, so all of them decide alike.
    """
    rdzv = Variable("$rdzv")
    run = job.run_words(nnodes=nnodes or str(job.nnodes), rdzv=rdzv)
    resume = job.resume_words(out=Variable("$out"), rdzv=rdzv)
    lines = [
        f"out={shlex.quote(job.out)}",
        'if [ -f "$out/recipe.yaml" ]; then',
        f"  set -- {wrapped(resume)}",
        "else",
        *_recipe_lines(job, recipe_file),
        f"  set -- {wrapped(run)}",
        "fi",
    ]
    return "\n".join(lines) + "\n"


def _recipe_lines(job: Job, recipe_file: str) -> list[str]:
    if job.recipe is None:
        return []
    end = "END_OF_RECIPE"
    while end in job.recipe:
        end += "_"
    text = job.recipe.rstrip("\n")
    made = f'  recipe={recipe_file}; mkdir -p "$(dirname "$recipe")"'
    return [made, f"  cat >\"$recipe\" <<'{end}'", text, end]


def wrapped(words: Sequence[str], width: int = 96, indent: str = "    ") -> str:
    """Quote words for a shell, on lines that break before an option."""
    groups: list[str] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append(_quoted(word))
        else:
            groups[-1] += f" {_quoted(word)}"
    lines = groups[:1]
    for group in groups[1:]:
        if len(lines[-1]) + len(group) + len(" ") + len(" \\") > width:
            lines.append(indent + group)
        else:
            lines[-1] += f" {group}"
    return " \\\n".join(lines)


def _quoted(word: str) -> str:
    return f'"{word}"' if isinstance(word, Variable) else shlex.quote(word)


def seconds(time: str) -> int:
    """Read a time limit as Slurm writes it: minutes, [H:]MM:SS, D-H, D-H:MM or D-H:MM:SS.

    Raises:
        UserError: it has another form, or is shorter than what a run needs to stop in order.
    """
    match = _TIME.fullmatch(time)
    if not match:
        hint = "minutes, HH:MM:SS or D-HH:MM:SS, for instance --time 12:00:00"
        raise UserError(f"--time '{time}' is not a time limit", hint)
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        hours, minutes, rest = (*parts, 0, 0)[:3]
    else:
        hours, minutes, rest = (0, *parts, 0)[:3] if len(parts) < 3 else parts
    total = int(match["days"] or 0) * 86400 + hours * 3600 + minutes * 60 + rest
    if total < 2 * GRACE_SECONDS:
        hint = f"give at least {2 * GRACE_SECONDS // 60} minutes: a run is stopped 2 minutes before"
        raise UserError(f"--time '{time}' is too short", hint)
    return total
