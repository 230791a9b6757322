"""The folder of a training that has a learner of its own: a dictionary's, a mask predictor's.

While it is trained the folder holds ``training.safetensors``, which the same command goes on from,
and ``events.jsonl``; ``results.json`` comes last. This module must stay importable without torch.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlearn.errors import UserError
from unlearn.runs import RunFolder

if TYPE_CHECKING:
    from unlearn.ranks import Ranks

CHECKPOINT, EVENTS, RESULTS = "training.safetensors", "events.jsonl", "results.json"
LOGGED = 50
"""Of the steps, each so many-th is kept in the events."""
Emit = Callable[[dict[str, Any]], None]


def check_folder(out: Path, ours: Collection[str]) -> None:
    """Refuse a folder that holds a finished training, or something else than a training.

    ``ours``: what such a training writes beside checkpoint and events.

    Raises:
        UserError: as said.
    """
    if not out.exists():
        return
    names = {one.name for one in out.iterdir()} if out.is_dir() else {"."}
    if RESULTS in names:
        raise UserError(f"'{out}' holds a finished training", "choose another --out")
    strangers = {one for one in names if not _left_by_the_way(one)} - {CHECKPOINT, EVENTS, *ours}
    if strangers or "." in names:
        raise UserError(f"output folder '{out}' already exists", "choose another --out")


def _left_by_the_way(name: str) -> bool:
    """Tell files of a writer that was stopped, and the tracebacks that a failure leaves."""
    return name.startswith(".") or (name.startswith("error") and name.endswith(".log"))


def logged(emit: Emit, out: Path, ranks: "Ranks") -> Emit:
    """Let one rank keep what is told in ``events.jsonl`` too, steps each fiftieth and last."""
    folder = RunFolder(out)

    def tell(event: dict[str, Any]) -> None:
        emit(event)
        step, last = event.get("step", 0), event.get("of")
        kept = event["event"] != "learnt" or step % LOGGED == 0 or step == last
        if ranks.rank == 0 and kept:
            out.mkdir(parents=True, exist_ok=True)
            folder.append_event(event)

    return tell
