"""``unlearn doctor``: is this machine ready, and what to do where it is not."""

from typing import Annotated, Any

import typer

from unlearn.cli.entry import FAILED, Json, say
from unlearn.cli.ranks import EngineName
from unlearn.cli.render import PLAIN

MARKS = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "problem": "[red]✗[/]"}
EPILOG = "Example: [bold]unlearn doctor --engine zero3[/bold]"


def doctor(
    engine: Annotated[
        EngineName | None,
        typer.Option(
            "--engine",
            metavar="ENGINE",
            help="Also fail when this engine does not work here: ddp, fsdp2, zero2, zero3, …",
        ),
    ] = None,
    network: Annotated[
        bool, typer.Option("--network", metavar="", help="Ask whether the hub answers.")
    ] = False,
    json: Json = False,
) -> None:
    """Look whether this machine is ready: versions, devices, engines, caches, disks, offline.

    Exit code 1 when something is a problem. Opens no connection unless --network is given.
    """
    from unlearn.doctor import examine, healthy, to_dicts

    findings = examine(engine=engine, network=network)
    fine = healthy(findings)
    say({"ok": fine, "findings": to_dicts(findings)}, json=json, people=_print)
    if not fine:
        raise typer.Exit(FAILED)


def _print(examined: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, findings = Console(), examined["findings"]
    for group in dict.fromkeys(finding["group"] for finding in findings):
        table = Table(title=group, show_header=False, **PLAIN)
        table.add_column(width=1)
        table.add_column(no_wrap=True)
        table.add_column()
        for one in (finding for finding in findings if finding["group"] == group):
            advice = f"\n[bold]→[/] {escape(one['advice'])}" if one["advice"] else ""
            table.add_row(MARKS[one["status"]], escape(one["name"]), escape(one["found"]) + advice)
        console.print(table)
        console.print()
    counts = [
        f"{number} {status}{'s' if number > 1 else ''}"
        for status in ("problem", "warning")
        if (number := sum(one["status"] == status for one in findings))
    ]
    console.print(", ".join(counts) or "[green]everything is in order[/]")
