"""Progress on stderr: a live panel on a terminal, plain lines elsewhere (logs, pipes, CI)."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

Emit = Callable[[dict[str, Any]], None]

BLOCKS = "▁▂▃▄▅▆▇█"
STAGES = {
    "start": "reading the recipe and the data",
    "load": "loading the model",
    "texts": "looking at the texts",
    "references": "scoring texts that are no members",
    "score": "scoring",
    "benchmark": "measuring",
    "cell": "run",
    "select": "choosing forget rows:",
    "reference": "scoring under the starting model:",
    "alternates": "writing other answers",
    "pairs": "making pairs",
    "count": "counting tokens",
    "measure": "timing a few steps",
    "train": "unlearning",
    "post-train": "training",
    "edit": "changing the model:",
    "curvature": "fitting the curvature",
    "spectra": "working out eigenvalues",
    "save": "saving the model",
}


MEASURES = {
    "Q_A_Prob": "probability",
    "Q_A_ROUGE": "ROUGE-L recall",
    "extraction_strength": "extraction strength",
    "loss": "loss per token",
    "logp": "log-probability per token",
    "accuracy": "told apart",
    "margin": "margin per token",
    "answer_tokens": "answer length",
    "unfinished": "unfinished",
    "pass_at_1": "pass@1",
    "truncated": "truncated",
}
"""Words for the metrics, whose names start with the split: ``forget_Q_A_Prob``."""
COLOURS = {
    **{"forget": "red", "retain": "cyan"},
    **{"heldout": "magenta", "chosen": "green", "rejected": "red", "pairs": "cyan", "text": "blue"},
    "math": "yellow",
}


@contextmanager
def listening(*, quiet: bool = False) -> Iterator[Emit]:
    """Give a function that shows events as they come; what libraries print goes to stderr too.

    ``quiet`` shows nothing: of several processes only one speaks.
    """
    with redirect_stdout(sys.stderr):
        if quiet:
            yield lambda event: None
            return
        if not sys.stderr.isatty():
            yield PlainLines().show
            return
        panel = LivePanel()
        with panel.live:
            yield panel.show
            panel.finish()


def unmoved(event: dict[str, Any]) -> str:
    """Name the first tensors that a step did not move, and why that may be."""
    names = event["tensors"]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    why = f" ({event['why']})" if "why" in event else ""
    return f"no update reached {', '.join(names[:3])}{more}{why}"


def describe(event: dict[str, Any]) -> str:
    """Name a stage in words."""
    text = STAGES.get(event["stage"], event["stage"])
    detail = event.get("name") or event.get("stream") or ""
    if event.get("resumed_from"):
        detail = f"from {event['resumed_from']}"
    if event["stage"] != "cell":  # a folder's name, which stays as it is
        detail = detail.replace("_", " ")
    return f"{text} {detail}".strip()


SUMMARY = {"model_utility": "model utility", "forget_quality": "forget quality"}
"""Words for the figures that are about all sets together."""


def in_words(metric: str) -> str:
    """Name a metric in words, without its split."""
    return MEASURES.get(metric.partition("_")[2], metric)


def by_split(metrics: dict[str, float | None]) -> dict[str, str]:
    """Write the main metrics of each split in one line, and those of all together in another."""
    lines: dict[str, list[str]] = {}
    for name, value in metrics.items():
        split, _, measure = name.partition("_")
        if name in SUMMARY:
            lines.setdefault("all", []).append(f"{SUMMARY[name]} {number(value)}")
        elif measure in MEASURES and split in COLOURS:
            lines.setdefault(split, []).append(f"{in_words(name)} {number(value)}")
        elif "/" in name:  # a task of lm-eval
            lines.setdefault("tasks", []).append(f"{name} {number(value)}")
    return {split: ", ".join(parts) for split, parts in lines.items()}


def readings(event: dict[str, Any]) -> dict[str, float]:
    """Give the per-stream numbers of a step event: ``forget/nll`` and the terms."""
    return {key: value for key, value in event.items() if "/" in key}


def edit_step(event: dict[str, Any]) -> str:
    """Say what a step of an edit has come to; empty for a step of training.

    "step 3/4: forget loss 1.49 → 2.23, retain KL 0.224 (+0.140), 90 % of the budget". Where the KL
    was lowered first: "step 3/4: retain KL lowered to 0.084; forget loss …".
    """
    if "alpha" not in event or not {"forget/nll", "retain/kl"} <= event.keys():
        return ""
    nll, kl = event["forget/nll"], event["retain/kl"]
    gain, spent, budget = (event.get(key) for key in ("gain", "kl_spent", "kl_budget"))
    loss = f"{nll:.2f}" if gain is None else f"{nll - gain:.2f} → {nll:.2f}"
    rise = "" if spent is None else f" ({'+' if spent >= 0 else '-'}{three(abs(spent))})"
    share = f", {100 * kl / budget:.3g} % of the budget" if budget else ""
    where = f"step {event['step']}/{event['of']}"
    if event.get("correction"):
        where += f": retain KL lowered to {three(event['corrected_kl'])}"
    joint = "; then" if event.get("correction") else ":"
    return f"{where}{joint} forget loss {loss}, retain KL {three(kl)}{rise}{share}"


def three(value: float) -> str:
    """Write a number with three significant digits, a tiny one with an exponent."""
    return f"{value:.1e}" if 0 < abs(value) < 0.0005 else f"{value:#.3g}".rstrip(".")


def size(num_bytes: float) -> str:
    """Write a number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def number(value: float | None) -> str:
    """Write a metric with three decimals, a tiny one with an exponent; a dash for none."""
    if value is not None and 0 < abs(value) < 0.0005:
        return f"{value:.1e}"
    return "–" if value is None else f"{value:.3f}"


def clock(seconds: float) -> str:
    """Write a duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def remaining(event: dict[str, Any], first: dict[str, Any]) -> float:
    """Estimate the seconds left from the steps seen in this session."""
    seen = event["step"] - first["step"] + 1
    return event["seconds"] / seen * (event["of"] - event["step"])


def share_done(event: dict[str, Any]) -> str:
    """Write how much is done: "3/8", of bytes "40 % of 1.2 GiB"; nothing without a known end."""
    done, total = event["done"], event["total"]
    if not total:
        return ""
    if event.get("unit") == "bytes":
        return f"{100 * done // total} % of {size(total)}"
    return f"{done}/{total}"


def sparkline(values: Sequence[float], width: int = 32, top: float | None = None) -> str:
    """Draw losses in one line of blocks, from 0 to ``top`` (default: the largest)."""
    picks = values
    if len(values) > width:
        picks = [values[int(i * len(values) / width)] for i in range(width)]
    scale = (len(BLOCKS) - 1) / (top or max(values) or 1.0)
    places = (min(len(BLOCKS) - 1, max(0, round(value * scale))) for value in picks)
    return "".join(BLOCKS[place] for place in places)


class PlainLines:
    """One line per stage, and for steps and batches one line every few seconds."""

    def __init__(self, seconds: float = 2.0) -> None:
        self.seconds = seconds
        self.last = 0.0
        self.before = ""
        self.first: dict[str, Any] | None = None

    def show(self, event: dict[str, Any]) -> None:
        line = self._line(event)
        if line and line != self.before:
            print(line, file=sys.stderr, flush=True)
        self.before = line or self.before

    def _line(self, event: dict[str, Any]) -> str:
        kind = event["event"]
        if kind == "stage":
            self.first = None
            return f"[{time.strftime('%H:%M:%S')}] {describe(event)}"
        if kind == "metrics":
            return "\n".join(f"  {s}: {line}" for s, line in by_split(event["metrics"]).items())
        if kind == "unmoved":
            return f"  warning: {unmoved(event)}"
        if kind == "warning":
            return f"  warning: {event['message']}"
        if kind not in ("step", "progress") or not self._due(event):
            return ""
        if kind == "progress":
            return f"  {event['what']} {share_done(event)}".rstrip()
        self.first = self.first or event
        if line := edit_step(event):  # the search may end early: what is left is not known
            return f"  {line} (after {clock(event['seconds'])})"
        numbers = ", ".join(f"{key} {value:.3f}" for key, value in readings(event).items())
        left = clock(remaining(event, self.first))
        return f"  step {event['step']}/{event['of']}: {numbers} ({left} left)"

    def _due(self, event: dict[str, Any]) -> bool:
        if edit_step(event):  # few and long: each is told
            return True
        ends = event.get("step") == event.get("of", 0) or event.get("done") == event.get("total", 0)
        if not ends and time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True


class LivePanel:
    """The stages done so far, and for the one under way a bar, curves, ETA and memory."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        self.spinner = Spinner("dots")  # one for all frames: a new one would never turn
        self.stage = ""
        self.detail = ""
        self.done, self.total, self.share = 0, 0, ""
        self.first: dict[str, Any] | None = None
        self.series: dict[str, list[float]] = {}
        self.started = time.monotonic()
        self.console = Console(stderr=True)
        self.live = Live(
            console=self.console,
            refresh_per_second=8,
            get_renderable=self.render,
            transient=True,
        )

    def show(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "stage":
            self.finish()
            self.stage, self.started = describe(event), time.monotonic()
        elif kind == "progress":
            self.detail, self.done, self.total = event["what"], event["done"], event["total"]
            self.share = share_done(event)
        elif kind == "step":
            self._step(event)
        elif kind == "metrics":
            for split, line in by_split(event["metrics"]).items():
                self.finish()
                self._note(f"[{COLOURS.get(split, 'default')}]{split}[/] {line}")
        elif kind == "unmoved":
            self._note(f"[yellow]warning: {unmoved(event)}[/]")
        elif kind == "warning":
            self._note(f"[yellow]warning: {event['message']}[/]")

    def _note(self, text: str) -> None:
        from rich.padding import Padding

        self.console.print(Padding(text, (0, 0, 0, 4)), highlight=False)

    def finish(self) -> None:
        """Tick off the stage under way."""
        if self.stage:
            seconds = clock(time.monotonic() - self.started)
            self.console.print(f"  [green]✓[/] {self.stage} [dim]{seconds}[/]", highlight=False)
            if self.series:
                self.console.print(self._curves())
        self.stage = self.detail = ""
        self.done, self.total, self.share = 0, 0, ""
        self.first = None
        self.series = {}

    def _step(self, event: dict[str, Any]) -> None:
        self.first = self.first or event
        self.done, self.total = event["step"], event["of"]
        self.share = f"{self.done}/{self.total}"
        left, memory = clock(remaining(event, self.first)), size(event["memory_bytes"])
        self.detail = f"{left} left · peak memory {memory}"
        if line := edit_step(event):
            self._note(line)
            if not self.series and event.get("gain") is not None:  # its curve has the start, too
                self.series["forget/nll"] = [event["forget/nll"] - event["gain"]]
        for name, value in readings(event).items():
            if name.endswith("/nll"):
                self.series.setdefault(name, []).append(value)

    def _curves(self) -> Any:
        from rich.padding import Padding
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        top = max(max(values) for values in self.series.values())
        for name in sorted(self.series):
            values, stream = self.series[name], name.split("/")[0]
            colour = COLOURS.get(stream, "default")
            ends = f"{values[0]:.2f} → {values[-1]:.2f} [dim]nats per token[/]"
            curve = sparkline(values, max(8, min(40, self.console.width - 48)), top)
            table.add_row(f"[{colour}]{stream}[/]", f"[{colour}]{curve}[/]", ends)
        return Padding(table, (0, 0, 0, 4))

    def render(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        if not self.stage:
            return ""
        head = Table.grid(padding=(0, 1))
        row: list[Any] = [" ", self.spinner, f"[bold]{self.stage}[/]"]
        if self.total:
            row += [ProgressBar(self.total, self.done, width=20), self.share]
        head.add_row(*row, f"[dim]{self.detail}[/]")
        return Group(head, self._curves()) if self.series else head
