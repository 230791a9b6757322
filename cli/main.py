"""The ``unlearn`` command. Heavy imports happen inside the commands: ``--help`` must stay quick."""

from pathlib import Path
from typing import Annotated, Any

import typer

from unlearn.cli import (
    curvature,
    data,
    detect,
    doctor,
    edit,
    evals,
    jobs,
    mtp,
    reapply,
    recipes,
    report,
    sae,
    select,
    sweep,
)
from unlearn.cli import pairs as pairs_data
from unlearn.cli.entry import Json, Offline, go_offline, guarded, naming, say
from unlearn.cli.options import (
    HOW,
    Data,
    Forget,
    Lora,
    Map,
    Method,
    Model,
    Out,
    Pairs,
    Preset,
    Retain,
    Set,
    Text,
)
from unlearn.cli.progress import Emit, listening
from unlearn.cli.ranks import (
    Engine,
    Nnodes,
    Nproc,
    Rdzv,
    joined_ranks,
    launch_changes,
    needs_launch,
    start,
    start_run,
)
from unlearn.cli.resolve import changes_of, resolve
from unlearn.cli.select import By, Fraction, Indices, choice_changes
from unlearn.launch import rank

RUNS, BEFORE, AFTER = "Runs", "Before a run", "Evidence"

app = typer.Typer(
    help="Remove data from language models and show evidence a reader can check.",
    epilog="Try it without any files: [bold]unlearn quickstart[/bold]",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data.app.command(epilog=select.EPILOG)(select.select)
data.app.command(epilog=pairs_data.PAIRS)(pairs_data.pairs)
data.app.command(epilog=pairs_data.LADDER)(pairs_data.ladder)
app.add_typer(data.app, name="data", rich_help_panel=BEFORE)
app.add_typer(recipes.app, name="recipes", rich_help_panel=BEFORE)
app.add_typer(curvature.app, name="curvature", rich_help_panel=BEFORE)
app.add_typer(sae.app, name="sae", rich_help_panel=BEFORE)
app.add_typer(edit.app, name="edit", rich_help_panel=AFTER)
app.add_typer(evals.app, name="eval", rich_help_panel=AFTER)
app.add_typer(detect.app, name="detect", rich_help_panel=AFTER)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", metavar="", help="Show tracebacks and library warnings.")
    ] = False,
) -> None:
    """Options before the command; --debug is taken out by ``guarded``, wherever it stands."""
    if version:
        from unlearn import __version__

        print(f"unlearn {__version__}")
        raise typer.Exit


@app.command(
    rich_help_panel=RUNS,
    epilog="Example: [bold]unlearn run npo --model models/target --forget people#forget "
    "--retain people#retain --out runs/a --set training.learning_rate=2e-5[/bold]",
)
def run(
    method: Method,
    model: Model = None,
    forget: Forget = None,
    retain: Retain = None,
    pairs: Pairs = None,
    text: Text = None,
    data_: Data = None,
    out: Out = None,
    map_: Map = None,
    recipe: Preset = None,
    lora: Lora = False,
    set_: Set = None,
    forget_select: By = None,
    forget_fraction: Fraction = None,
    forget_indices: Indices = None,
    nproc: Nproc = None,
    engine: Engine = None,
    nnodes: Nnodes = None,
    rdzv: Rdzv = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Unlearn: train a model to lose the forget set and keep the retain set. Or post-train it.

    METHOD mtp trains what lets a model write faster instead (docs/mtp.md).
    """
    if mtp.is_method(method):
        changes = mtp.changes_of(map_, model=model, data=data_, out=out)
        changes |= launch_changes(nproc, engine, nnodes, rdzv)
        unknown = {"--forget": forget, "--retain": retain, "--pairs": pairs, "--text": text,
                   "--lora": lora, "--forget-select": forget_select,
                   "--forget-fraction": forget_fraction,
                   "--forget-indices": forget_indices}  # fmt: skip
        mtp.run(method, recipe, changes, set_ or [], unknown, offline=offline, json=json)
        return
    mtp.require_no_data(data_)
    changes = changes_of(
        map_, model=model, forget=forget, retain=retain, pairs=pairs, text=text, out=out
    )
    changes |= launch_changes(nproc, engine, nnodes, rdzv)
    if part := choice_changes(forget_select, forget_fraction, forget_indices):
        changes.setdefault("data", {})["select"] = part
    with listening(quiet=rank() > 0) as emit:
        emit({"event": "stage", "stage": "start"})
        resolved = resolve(method, recipe, changes, set_ or [], lora)
        launching = needs_launch(resolved)
        results = {} if launching else _run(resolved, emit, offline=offline)
    if launching:
        start_run(resolved, offline=offline, json=json)
    else:
        _show(results, json=json)


@app.command(rich_help_panel=RUNS, epilog="Example: [bold]unlearn resume runs/a[/bold]")
def resume(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The --out folder of a stopped run.")
    ],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="CHECKPOINT",
            help="Go on from this one ([bold]checkpoint-20[/bold]); newer ones are set aside.",
        ),
    ] = None,
    rdzv: Rdzv = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Continue a stopped run from its newest usable checkpoint."""
    from unlearn.recipes.results import stored_results
    from unlearn.runs import RunFolder

    opened = RunFolder.open(folder)
    if mtp.is_method(str(opened.recipe)):
        mtp.resume(folder, checkpoint, rdzv, offline=offline, json=json)
        return
    if opened.results.is_file():
        _show(stored_results(opened), json=json)
        return
    go_offline(offline)
    with listening(quiet=rank() > 0) as emit, naming(folder):
        emit({"event": "stage", "stage": "start"})
        from unlearn.recipes.files import load

        truth = launch_changes(None, None, None, rdzv)
        recipe = load(str(opened.recipe), [], {"out": str(folder)} | truth)
        launching = needs_launch(recipe)
        if launching and recipe.launch.nnodes == 1:
            with opened.locked():  # a second writer is refused before processes are started
                pass
        results = {} if launching else _resume(recipe, opened, emit, checkpoint, offline)
    if launching:
        chosen = ["--from", checkpoint] if checkpoint else []
        start(recipe, ["resume", str(folder), *chosen], offline=offline, json=json)
    else:
        _show(results, json=json)


def _resume(
    recipe: Any, opened: Any, emit: Emit, checkpoint: str | None, offline: bool
) -> dict[str, Any]:
    from unlearn.recipes.run import resume as resume_run

    with joined_ranks(recipe.launch.chosen):
        return resume_run(recipe, opened, emit=emit, offline=offline, checkpoint=checkpoint)


@app.command(rich_help_panel=RUNS, epilog=jobs.EPILOG)
def launch(
    method: Method,
    model: Model = None,
    forget: Forget = None,
    retain: Retain = None,
    pairs: Pairs = None,
    text: Text = None,
    out: Out = None,
    map_: Map = None,
    recipe: Preset = None,
    lora: Lora = False,
    set_: Set = None,
    nproc: Nproc = None,
    engine: Engine = None,
    nnodes: Nnodes = None,
    rdzv: Rdzv = None,
    print_: jobs.Print = False,
    slurm: jobs.Slurm = False,
    skypilot: jobs.SkyPilot = False,
    kubernetes: jobs.Kubernetes = False,
    save: jobs.Save = None,
    submit: jobs.Submit = False,
    time: jobs.Time = None,
    partition: jobs.Partition = None,
    account: jobs.Account = None,
    gpus_per_node: jobs.Gpus = None,
    cpus_per_task: jobs.Cpus = None,
    accelerators: jobs.Accelerators = None,
    image: jobs.Image = None,
    volume: jobs.Volume = None,
    setup: jobs.Setup = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Prepare a run for several nodes: what to type on each, or a job for a scheduler.

    Takes the options of `unlearn run` and checks them as it does; starts nothing without --submit.
    """
    kinds = {"slurm": slurm, "skypilot": skypilot, "kubernetes": kubernetes}
    asked = {"time": time, "partition": partition, "account": account,
             "gpus_per_node": gpus_per_node, "cpus_per_task": cpus_per_task,
             "accelerators": accelerators, "image": image, "volume": volume,
             "setup": setup}  # fmt: skip
    wanted = jobs.wanted(kinds, asked, print_=print_, save=save, submit=submit, rdzv=rdzv)
    changes = changes_of(
        map_, model=model, forget=forget, retain=retain, pairs=pairs, text=text, out=out
    )
    changes |= launch_changes(nproc, engine, nnodes, rdzv)
    go_offline(offline)
    with listening() as emit:
        emit({"event": "stage", "stage": "start"})
        here = wanted.kind not in jobs.ELSEWHERE
        resolved = resolve(method, recipe, changes, set_ or [], lora, here=here)
        jobs.check(resolved, wanted, set_ or [], offline=offline)
    words = jobs.run_words(
        method, preset=recipe, model=model, forget=forget, retain=retain, pairs=pairs, text=text,
        out=out, map_=map_, lora=lora, engine=engine, set_=set_, offline=offline,
    )  # fmt: skip
    jobs.give(wanted, resolved, words, json=json)


@app.command(
    rich_help_panel=RUNS, epilog="Example: [bold]unlearn quickstart --out runs/first[/bold]"
)
def quickstart(out: Out = None, set_: Set = None, json: Json = False) -> None:
    """Try everything offline: a small model forgets a few made-up people (about a minute)."""
    go_offline(True)
    with listening() as emit:
        emit({"event": "stage", "stage": "start"})
        from unlearn.recipes.inputs import check_inputs
        from unlearn.recipes.quickstart import quickstart_recipe

        recipe = quickstart_recipe(out, set_ or [])
        check_inputs(recipe)
        results = _run(recipe, emit, offline=True)
    _show(results, json=json)


@app.command(
    rich_help_panel=BEFORE,
    epilog="Example: [bold]unlearn plan npo --model models/target --forget people#forget "
    "--retain people#retain --lora --measure[/bold]",
)
def plan(
    method: Method,
    model: Model = None,
    forget: Forget = None,
    retain: Retain = None,
    pairs: Pairs = None,
    text: Text = None,
    out: Out = None,
    map_: Map = None,
    recipe: Preset = None,
    lora: Lora = False,
    set_: Set = None,
    forget_select: By = None,
    forget_fraction: Fraction = None,
    forget_indices: Indices = None,
    nproc: Nproc = None,
    engine: Engine = None,
    nnodes: Nnodes = None,
    rdzv: Rdzv = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            metavar="",
            help="Load the model and time a few steps; nothing is kept.",
            rich_help_panel=HOW,
        ),
    ] = False,
    device_memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            min=0.001,
            help="Memory of each device, to plan for CUDA devices that are not here.",
            rich_help_panel=HOW,
        ),
    ] = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Say what a run would cost: steps, tokens, memory, files; exit code 2 when it cannot fit."""
    changes = changes_of(
        map_, model=model, forget=forget, retain=retain, pairs=pairs, text=text,
        out=out or Path("runs/plan"),
    )  # fmt: skip
    changes |= launch_changes(nproc, engine, nnodes, rdzv)
    if part := choice_changes(forget_select, forget_fraction, forget_indices):
        changes.setdefault("data", {})["select"] = part
    if device_memory:
        changes.setdefault("launch", {})["device_memory"] = device_memory
    go_offline(offline)
    with listening() as emit:
        emit({"event": "stage", "stage": "start"})
        resolved = resolve(method, recipe, changes, set_ or [], lora)
        from unlearn.recipes.plan import measure_step, plan_run
        from unlearn.recipes.prepare import prepare

        prepared = prepare(resolved, offline=offline)
        planned = plan_run(prepared)
        if measure and planned["fit"]["fits"]:
            emit({"event": "stage", "stage": "measure"})
            planned = planned | {"measured": measure_step(prepared)}
    from unlearn.cli.plan import show_plan

    show_plan(planned, json=json)


def _run(recipe: Any, emit: Emit, *, offline: bool) -> dict[str, Any]:
    go_offline(offline)
    with naming(Path(recipe.out)):
        from unlearn.recipes.run import run as run_recipe

        with joined_ranks(recipe.launch.chosen):
            return run_recipe(recipe, emit=emit, offline=offline)


def _show(results: dict[str, Any], *, json: bool) -> None:
    from unlearn.cli.render import print_results

    if rank() == 0:
        say(results, json=json, people=print_results)


app.command(rich_help_panel=RUNS, epilog=sweep.EPILOG)(sweep.sweep)
app.command(rich_help_panel=AFTER, epilog=mtp.GENERATE)(mtp.generate)
app.command(rich_help_panel=RUNS, epilog=reapply.EPILOG)(reapply.reapply)

# here and not above, because panels of the help follow the order of the commands
app.command(rich_help_panel=BEFORE, epilog=doctor.EPILOG)(doctor.doctor)
app.command(rich_help_panel=AFTER, epilog=report.REPORT)(report.report)
app.command(rich_help_panel=AFTER, epilog=report.COMPARE)(report.compare)


def main() -> None:
    """Run the command line; turn errors into one line and a documented exit code."""
    guarded(app)


if __name__ == "__main__":
    main()
