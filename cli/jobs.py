"""``unlearn launch``: what to type on each node, or a job for a scheduler.

What a scheduler is asked for stays out of recipes: a recipe says what is learned and is repeated
elsewhere, a partition or an image belongs to one cluster. ``launch.nnodes`` and ``launch.nproc``
are in the recipe, because with them a step has other rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from unlearn.cli.entry import say

WHAT, RESOURCES = "What is written", "What the scheduler is asked for"
ELSEWHERE = ("skypilot", "kubernetes")
"""Kinds of jobs that run on machines with other files than this one."""
EPILOG = (
    "Example: [bold]unlearn launch npo --slurm --nnodes 2 --nproc 8 --engine zero3 "
    "--model models/target --forget people#forget --retain people#retain --out runs/a "
    "--time 12:00:00 --partition gpu --save a.sbatch[/bold]"
)
TAKES = {
    "slurm": {"time", "partition", "account", "gpus_per_node", "cpus_per_task", "setup"},
    "skypilot": {"gpus_per_node", "cpus_per_task", "accelerators", "image", "volume", "setup"},
    "kubernetes": {"time", "gpus_per_node", "image", "volume", "setup"},
    "print": set[str](),
}
"""The options of resources that each kind knows."""


def _flag(name: str, help_: str) -> Any:
    return typer.Option(f"--{name}", metavar="", help=help_, rich_help_panel=WHAT)


def _value(metavar: str, help_: str, **more: Any) -> Any:
    return typer.Option(metavar=metavar, help=help_, rich_help_panel=RESOURCES, **more)


Print = Annotated[bool, _flag("print", "The command for each node. This is the default.")]
Slurm = Annotated[bool, _flag("slurm", "A script for sbatch.")]
SkyPilot = Annotated[bool, _flag("skypilot", "A task for `sky jobs launch`.")]
Kubernetes = Annotated[
    bool, _flag("kubernetes", "A TrainJob of Kubeflow Trainer 2, for `kubectl apply`.")
]
Save = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="New file to write it to, instead of stdout.", rich_help_panel=WHAT
    ),
]
Submit = Annotated[
    bool, _flag("submit", "With --slurm: submit it now; needs the extra unlearn-llm\\[slurm].")
]
Time = Annotated[
    str | None, _value("LIMIT", "HH:MM:SS or D-HH:MM:SS. Slurm: 24:00:00 unless given.")
]
Partition = Annotated[str | None, _value("NAME", "Slurm's partition.")]
Account = Annotated[str | None, _value("NAME", "Slurm's account.")]
Gpus = Annotated[int | None, _value("N", "GPUs of each node; one per process unless given.", min=0)]
Cpus = Annotated[
    int | None, _value("N", "CPU cores of each node; 4 per process unless given.", min=1)
]
Accelerators = Annotated[str | None, _value("NAME", "SkyPilot's name of the GPU: H100.")]
Image = Annotated[str | None, _value("IMAGE", "Container image with unlearn in it.")]
Volume = Annotated[
    str | None,
    _value("SOURCE:PATH", "Where --out lies: a claim (Kubernetes), volume or bucket (SkyPilot)."),
]
Setup = Annotated[str | None, _value("TEXT", "Shell commands before the run.")]


@dataclass(frozen=True)
class Wanted:
    """What is to be written, and with which options of resources."""

    kind: str = "print"
    resources: Mapping[str, Any] = field(default_factory=dict)
    save: Path | None = None
    submit: bool = False


def wanted(
    kinds: Mapping[str, bool],
    resources: Mapping[str, Any],
    *,
    print_: bool,
    save: Path | None,
    submit: bool,
    rdzv: str | None,
) -> Wanted:
    """Refuse options that do not go together, before anything is read.

    Raises:
        UserError: names the option.
    """
    from unlearn.errors import UserError
    from unlearn.jobs import Job

    chosen = [name for name, on in {"print": print_, **kinds}.items() if on] or ["print"]
    if len(chosen) > 1:
        flags = ", ".join(f"--{name}" for name in chosen)
        raise UserError(f"{flags} given", "choose one of them")
    kind = chosen[0]
    given = {name: value for name, value in resources.items() if value is not None}
    for name in given:
        if name not in TAKES[kind]:
            takers = " or ".join(f"--{kind}" for kind, takes in TAKES.items() if name in takes)
            raise UserError(f"{option(name)} is not for --{kind}", f"it goes with {takers}")
    if submit and kind != "slurm":
        raise UserError("--submit is for Slurm", "add --slurm, or save a file and submit that")
    if submit and save:
        raise UserError("--submit and --save given", "choose one of them")
    if save and kind == "print":
        raise UserError("--save is for a job", "add --slurm, --skypilot or --kubernetes")
    if rdzv and kind != "print":
        raise UserError(f"--rdzv given with --{kind}", "leave it out: the job knows its own nodes")
    if save:
        _check_new_file(save)
    Job((), "out", **_fields(given))
    return Wanted(kind, given, save, submit)


def option(name: str) -> str:
    """Give an option as it is typed."""
    return "--" + name.replace("_", "-")


def _fields(resources: Mapping[str, Any]) -> dict[str, Any]:
    from unlearn.jobs import Volume

    volume = {"volume": Volume.parse(resources["volume"])} if "volume" in resources else {}
    return dict(resources) | volume


def _check_new_file(path: Path) -> None:
    from unlearn.errors import UserError

    if path.exists():
        raise UserError(f"'{path}' exists and is left as it is", "give --save another name")
    if not path.absolute().parent.is_dir():
        raise UserError(
            f"no folder '{path.parent}' for '{path.name}'", "make it, or save elsewhere"
        )


def check(recipe: Any, wanted: Wanted, overrides: list[str], *, offline: bool) -> None:
    """Refuse what `unlearn run` would refuse; loads no weights.

    For machines with other files only the recipe is checked, not what it names.

    Raises:
        UserError: a mistake in the recipe, its data or its model.
    """
    from unlearn.errors import UserError

    if wanted.kind != "print":
        keys = {text.split("=")[0].strip() for text in overrides}
        if keys & {"launch.rdzv", "launch"}:
            raise UserError("launch.rdzv is set", "leave it out: the job knows its own nodes")
    if wanted.kind in ELSEWHERE:
        recipe.require_runnable()
        return
    from unlearn.recipes.prepare import prepare

    prepare(recipe, offline=offline)


def run_words(
    method: str, *, preset: str | None, map_: list[str] | None, set_: list[str] | None, **given: Any
) -> list[str]:
    """Give the arguments of `unlearn run` as they were typed, without nodes and processes."""
    words = [method, "--recipe", preset] if preset else [method]
    for name in ("model", "forget", "retain", "pairs", "text", "out", "engine"):
        if given[name] is not None:
            words += [f"--{name}", str(given[name])]
    for name, values in (("map", map_), ("set", set_)):
        for value in values or ():
            words += [f"--{name}", value]
    return words + [f"--{name}" for name in ("lora", "offline") if given[name]]


def give(wanted: Wanted, recipe: Any, words: list[str], *, json: bool) -> None:
    """Print, save or submit what is wanted."""
    if wanted.kind == "print":
        _give_commands(wanted, recipe, words, json=json)
        return
    job = _job(wanted, recipe, words)
    if wanted.submit:
        _submit(job, json=json)
        return
    text = _text(wanted, job)
    if wanted.save:
        _save(wanted.save, text)
    told = {"kind": wanted.kind, "nodes": job.nnodes, "processes_per_node": job.nproc}
    told |= {"path": str(wanted.save) if wanted.save else None, "text": text}
    say(told, json=json, people=_print_job)


def _job(wanted: Wanted, recipe: Any, words: list[str]) -> Any:
    from unlearn.jobs import Job
    from unlearn.jobs.job import RECIPE
    from unlearn.recipes.files import find, read_text, recipe_names

    place = 2 if words[1:2] == ["--recipe"] else 0
    text = None
    if words[place] not in recipe_names():
        text = read_text(find(words[place]))
        words = [*words[:place], RECIPE, *words[place + 1 :]]
    launch = recipe.launch
    return Job(
        words, recipe.out, launch.nnodes, launch.nproc, recipe=text, **_fields(wanted.resources)
    )


def _text(wanted: Wanted, job: Any) -> str:
    from unlearn.jobs import batch_script, task, train_job
    from unlearn.runs import command_line

    command = command_line()
    if wanted.kind == "slurm":
        return batch_script(job, folder=Path.cwd(), command=command)
    if wanted.kind == "skypilot":
        return task(job, command=command)
    return train_job(job, limited="time" in wanted.resources, command=command)


def _save(path: Path, text: str) -> None:
    from unlearn.errors import UserError
    from unlearn.runs import write_atomic

    _check_new_file(path)
    try:
        write_atomic(path, text)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}") from None


START = {"slurm": "sbatch", "skypilot": "sky jobs launch", "kubernetes": "kubectl apply -f"}


def _print_job(told: dict[str, Any]) -> None:
    if told["path"] is None:
        print(told["text"], end="")
        return
    import shlex

    print(f"{told['path']} written. Start it with:")
    print(f"  {START[told['kind']]} {shlex.quote(told['path'])}")


def _submit(job: Any, *, json: bool) -> None:
    from unlearn.jobs import submit

    submitted = submit(job)
    told = {"kind": "slurm", "job": submitted.id, "logs": str(submitted.folder), "out": job.out}
    say(told, json=json, people=_print_submitted)


def _print_submitted(told: dict[str, Any]) -> None:
    print(f"job {told['job']} submitted; its logs are in {told['logs']}")
    print(f"  squeue --job {told['job']}")


def _give_commands(wanted: Wanted, recipe: Any, words: list[str], *, json: bool) -> None:
    import shlex

    from unlearn.jobs import node_commands
    from unlearn.launch import Launch

    section = recipe.launch
    nodes = node_commands(Launch(section.nproc, section.nnodes, section.rdzv), words)
    told = {
        "kind": "print",
        "nodes": section.nnodes,
        "processes_per_node": section.nproc,
        "engine": section.chosen,
        "commands": [
            {"node": number} | {name: shlex.join(command) for name, command in commands.items()}
            for number, commands in enumerate(nodes)
        ],
    }
    say(told, json=json, people=lambda told: _print_commands(told, nodes[0]))


def _print_commands(told: dict[str, Any], commands: Mapping[str, list[str]]) -> None:
    from rich.console import Console

    from unlearn.jobs.job import wrapped

    console = Console()
    width = min(console.width, 100)

    def show(name: str) -> None:
        console.print(wrapped(commands[name], width, "  "), highlight=False, soft_wrap=True,
                      markup=False)  # fmt: skip

    nodes, each = told["nodes"], told["processes_per_node"]
    where = f" on each of the {nodes} nodes, in a folder that all see" if nodes > 1 else ""
    count = f"{nodes * each} process{'es' if nodes * each > 1 else ''}"
    console.print(f"[dim]# {count}, engine {told['engine']}[/]")
    console.print(f"[dim]# Type this{where}:[/]")
    show("unlearn")
    if "torchrun" in commands:
        console.print("\n[dim]# Or, through torchrun:[/]")
        show("torchrun")
