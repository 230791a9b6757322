"""What ``unlearn plan`` prints; a plan that cannot fit ends with exit code 2."""

import sys
from typing import Any

import typer

from unlearn.cli.entry import MISTAKE, WORDS, say
from unlearn.cli.progress import clock, size
from unlearn.cli.render import PLAIN


def show_plan(planned: dict[str, Any], *, json: bool) -> None:
    """Print a plan; one that does not fit is followed by the error, in JSON it holds it.

    Raises:
        UserError: the run does not fit into memory.
    """
    from unlearn.recipes.fitting import refusal

    error = refusal(planned)
    if error is None or not json:
        say(planned, json=json, people=print_plan)
        if error:
            raise error
        return
    word = WORDS[MISTAKE]
    print(f"{word}: {error.message}\n  hint: {error.hint}", file=sys.stderr)
    report = {"kind": word, "message": error.message, "hint": error.hint, "exit_code": MISTAKE}
    say(planned | {"error": report}, json=True, people=print_plan)
    raise typer.Exit(MISTAKE)


ROWS = {"forget": "forget rows", "chosen": "pairs", "rejected": "rows", "text": "rows"}
"""What is counted when a step's rows are: those of the set that epochs are passes over."""


def print_plan(plan: dict[str, Any]) -> None:
    """Print what a run would cost."""
    from rich.console import Console

    console = Console()
    _steps(console, plan)
    console.print()
    console.print(_memory(plan))
    console.print()
    console.print(_stages(plan))
    if plan["communication"]["parts"]:
        _communication(console, plan)
    console.print()
    console.print(_files(plan))
    _fit(console, plan)
    if measured := plan.get("measured"):
        _measured(console, plan, measured)


def _steps(console: Any, plan: dict[str, Any]) -> None:
    steps, tokens, parameters = plan["steps"], plan["tokens"], plan["parameters"]
    if edit := plan["edit"]:
        number = "steps" if steps["total"] != 1 else "step"
        console.print(
            f"[bold]{steps['total']}[/bold] {number} of {edit} at most, about "
            f"[bold]{tokens['total']:,}[/bold] tokens there and back; nothing is trained",
            highlight=False,
        )
        return
    if first := plan["first_steps"]:
        tokens_first = f"about [bold]{plan['first_tokens']:,}[/bold] tokens"
        console.print(
            f"[bold]{first}[/bold] optimiser steps first, {tokens_first}, and then:",
            highlight=False,
        )
    console.print(
        f"[bold]{steps['total']}[/bold] optimiser steps ({steps['per_epoch']} per epoch), about "
        f"[bold]{tokens['total']:,}[/bold] tokens ({tokens['per_step']:,} per step)",
        highlight=False,
    )
    if chosen := plan["selection"]:
        console.print(selection_line(chosen), highlight=False)
    processes = f" x {steps['processes']} processes" if steps["processes"] > 1 else ""
    console.print(
        f"{steps['effective_batch']} {ROWS[plan['anchor']]} per step: "
        f"{steps['per_device']} at once x {_times(steps['accumulation'])}{processes}",
        highlight=False,
    )
    console.print(
        f"{parameters['trainable']:,} of {parameters['total']:,} weights trained", highlight=False
    )


def selection_line(chosen: dict[str, Any]) -> str:
    """Say in one line which part of the forget set is trained on, and how often."""
    of = f"{chosen['of']} forget rows"
    if chosen["rows"] is None:
        return f"trained on keywords of the {of}; which, the run decides"
    text = f"trained on {chosen['rows']} of the {of} ({chosen['by']})"
    if "scaled_from" in chosen:
        text += f", {chosen['passes']:g} times instead of {chosen['scaled_from']:g}: as many steps"
    return f"{text} as for all rows" if "scaled_from" in chosen else text


def _times(passes: int) -> str:
    return f"{passes} pass" if passes == 1 else f"{passes} passes"


def _memory(plan: dict[str, Any]) -> Any:
    from rich.table import Table

    number = plan["processes"]
    doing = "while editing" if plan["edit"] else "in training"
    where = f"each of {number} processes" if number > 1 else f"one {plan['device']} device"
    how = f"{plan['engine']}, {plan['dtype']}" if number > 1 else plan["dtype"]
    table = Table(title=f"memory of {where} {doing} ({how})", **PLAIN)
    table.add_column("part")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("why", style="dim")
    for part in plan["memory"]:
        table.add_row(part["part"], signed(part["bytes"]), part["why"])
    table.add_row("total", size(plan["memory_bytes"]), "estimate", style="bold")
    return table


def _stages(plan: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="at its largest, stage by stage", **PLAIN)
    table.add_column("stage")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("why", style="dim")
    for stage in plan["stages"]:
        table.add_row(stage["stage"], size(stage["bytes"]), stage["why"])
    for stage in plan["host"]:
        table.add_row(f"host: {stage['stage']}", size(stage["bytes"]), stage["why"])
    return table


def signed(num_bytes: float) -> str:
    """Write a number of bytes that may be below zero."""
    return f"-{size(-num_bytes)}" if num_bytes < 0 else size(num_bytes)


def _fit(console: Any, plan: dict[str, Any]) -> None:
    console.print()
    disk = {"where": "the disk", "available_bytes": plan["disk"]["free_bytes"], **plan["disk"]}
    disk["fits"] = disk["needed_bytes"] <= disk["free_bytes"]
    for check in (*plan["fit"]["checks"], disk):
        verdict = "[green]✓ fits[/green]" if check["fits"] else "[red]✗ does not fit[/red]"
        console.print(
            f"{verdict} {check['where']}: {size(check['needed_bytes'])} needed, "
            f"{size(check['available_bytes'])} available",
            highlight=False,
        )


def _communication(console: Any, plan: dict[str, Any]) -> None:
    from rich.table import Table

    found = plan["communication"]
    table = Table(title="sent by each process, per step", **PLAIN)
    table.add_column("what")
    table.add_column("times", justify="right")
    table.add_column("size", justify="right", no_wrap=True)
    for part in found["parts"]:
        table.add_row(part["what"], str(part["times"]), size(part["bytes"]))
    table.add_row("total", "", size(found["bytes_per_step"]), style="bold")
    console.print()
    console.print(table)


def _files(plan: dict[str, Any]) -> Any:
    from rich.table import Table

    files = Table(title="files that would be written", **PLAIN)
    files.add_column("path")
    files.add_column("size", justify="right", no_wrap=True)
    for file in plan["files"]:
        files.add_row(file["path"], size(file["bytes"]))
    files.add_row("total", size(plan["disk"]["needed_bytes"]), style="bold")
    return files


def _measured(console: Any, plan: dict[str, Any], measured: dict[str, Any]) -> None:
    alone = measured["processes"] == 1
    where = "one process" if alone else f"{measured['processes']} processes"
    console.print()
    console.print(
        f"measured with {where}: {measured['seconds_per_step']:.2f} s per step, about "
        f"[bold]{clock(measured['estimated_seconds'])}[/bold] of training, "
        f"peak memory {size(measured['peak_memory_bytes'])}",
        highlight=False,
    )
    rate = measured["tokens_per_second_per_device"]
    total = f", {measured['tokens_per_second']:,.0f} in all" if not alone else ""
    console.print(
        f"{measured['steps_per_second']:.2f} steps/s, {rate:,.0f} tokens/s per device{total}",
        highlight=False,
    )
    if alone and plan["processes"] > 1:
        console.print(
            f"[yellow]note:[/] one of {plan['processes']} processes, alone; what they send each "
            "other comes on top",
            highlight=False,
        )
