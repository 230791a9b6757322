"""What every command shares: exit codes, the --json and --offline options, one way to print.

Exit codes: 0 ok, 1 failed, 2 user mistake, 75 interrupted and resumable, 141 the reader of our
output has gone (`… | head -1`), as for every program that a broken pipe ends.
"""

import atexit
import io
import json as json_module
import logging
import os
import shlex
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import typer

from unlearn import launch

MACHINES = "For scripts"
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        metavar="",
        help="Print one JSON object on stdout and nothing else.",
        rich_help_panel=MACHINES,
    ),
]
Offline = Annotated[
    bool,
    typer.Option(
        "--offline",
        metavar="",
        help="Open no connection: local files and what is already downloaded.",
        rich_help_panel=MACHINES,
    ),
]

OK, FAILED, MISTAKE, INTERRUPTED, PIPE_BROKEN = 0, 1, 2, 75, 141
WORDS = {FAILED: "failed", MISTAKE: "error", INTERRUPTED: "interrupted"}
FULL_DISK = ("No space left on device", "PytorchStreamWriter failed", "inline_container.cc")
"""How a full disk reads: from the system, and from torch, which does not pass the cause on."""


def go_offline(offline: bool) -> None:
    """Tell Hugging Face libraries not to use the network; must run before they are imported."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"


def say(value: Any, *, json: bool, people: Callable[[Any], None]) -> None:
    """Print a result: as one JSON object, or as text for people."""
    if json:
        text = json_module.dumps(value, indent=2, ensure_ascii=False, default=str)
        print(text, file=getattr(sys.stdout, "real", sys.stdout), flush=True)
    else:
        people(value)


def guarded(app: Callable[..., Any]) -> None:
    """Run an application and exit: user mistakes and known failures are one line, no traceback."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    json = "--json" in sys.argv and not {"-h", "--help"} & set(sys.argv)
    code: int | None = None
    launch.enter()
    with _quiet_libraries(debug=debug):
        try:
            with _stoppable(), _reserved_stdout() if json else nullcontext():
                code = app(standalone_mode=False)
                sys.stdout.flush()
            launch.leave(code or OK)
        except BrokenPipeError:  # the reader of our output has gone: nothing is left to say
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = PIPE_BROKEN
        except SystemExit as error:  # typer's own, for a reader of the help that has gone
            code = error.code if isinstance(error.code, int) else FAILED
        except BaseException as error:
            code = _report(error, json=json, debug=debug)
    if launch.inside_launch():
        _end_now(code or OK)
    atexit.register(_ignore_stops)
    raise SystemExit(code or OK)


def _ignore_stops() -> None:
    """Let the exit code stand while libraries are torn down: all is done that could be stopped."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _end_now(code: int) -> NoReturn:
    """End without tearing libraries down: threads that still wait for another rank would abort."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


@dataclass
class Explained:
    """An error for people: exit code, cause and what to do; ``known`` unless it is a bug."""

    code: int
    message: str
    hint: str = ""
    known: bool = True


class LaunchEnded(Exception):
    """How a launch of several processes ended, when it did not succeed; the cause is known."""

    def __init__(self, outcome: launch.Outcome, folder: Path) -> None:
        super().__init__(outcome.message)
        self.outcome, self.folder = outcome, folder


class InRun(Exception):
    """Wraps what stopped a run, to say in which folder it happened."""

    def __init__(self, cause: BaseException, folder: Path) -> None:
        super().__init__(str(cause))
        self.cause, self.folder = cause, folder


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Let everything that stops this block know the run folder, for the hint how to go on."""
    from unlearn.errors import UserError

    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        raise InRun(error, folder) from error


def explain(error: BaseException) -> Explained:
    """Give exit code, cause and what to do for an exception."""
    from unlearn.errors import Interrupted, RunFailed, UserError

    if isinstance(error, LaunchEnded):
        return _explain_launch(error.outcome, error.folder)
    folder = error.folder if isinstance(error, InRun) else None
    error = error.cause if isinstance(error, InRun) else error
    begun = folder is not None and (folder / "recipe.yaml").is_file()
    resume = f"`unlearn resume {shlex.quote(str(folder))}`" if begun else "the same command"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, UserError):
        return Explained(error.exit_code, error.message, error.hint)
    if isinstance(error, Interrupted | Halt | KeyboardInterrupt):
        how = f"{resume} continues it" if begun else f"nothing was written; {resume} starts again"
        how = getattr(error, "hint", "") or how
        return Explained(INTERRUPTED, text or "stopped on request", how)
    if isinstance(error, RunFailed):
        return Explained(FAILED, error.message, error.hint)
    if hasattr(error, "format_message"):  # typer's or click's own, two classes of one shape
        return _usage(error)
    if any(sign in str(error) for sign in FULL_DISK):
        where = f" where '{folder}' is written" if folder else ""
        return Explained(FAILED, f"the disk{where} is full", f"free some space, then {resume}")
    if type(error).__name__ == "OutOfMemoryError" or "out of memory" in text.lower():
        return Explained(FAILED, "out of memory", _lower_memory(resume if begun else ""))
    if isinstance(error, OSError) and error.strerror:
        name = f": '{error.filename}'" if error.filename else ""
        return Explained(FAILED, f"{error.strerror}{name}", f"when that is put right, {resume}")
    hint = "this looks like a bug; --debug shows the traceback"
    return Explained(FAILED, f"{type(error).__name__}: {text}", hint, known=False)


def _explain_launch(outcome: launch.Outcome, folder: Path) -> Explained:
    where = ""
    if outcome.rank and outcome.code == FAILED and not outcome.message.startswith("rank "):
        where = f"rank {outcome.rank} on {outcome.host}: "
    hint = outcome.hint
    if outcome.code == FAILED and (folder / "recipe.yaml").is_file() and "resume" not in hint:
        hint = f"{hint}; `unlearn resume {shlex.quote(str(folder))}` goes on".removeprefix("; ")
    return Explained(outcome.code, where + outcome.message, hint)


def _lower_memory(resume: str) -> str:
    settings = (
        "lower training.per_device_train_batch_size and raise gradient_accumulation_steps, "
        "set training.gradient_checkpointing=true, or use --lora; see `unlearn plan`"
    )
    return f"{settings}; or free memory and {resume}" if resume else settings


def _usage(error: Any) -> Explained:
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is on the screen already
        return Explained(MISTAKE, "")
    message = error.format_message().replace("Value error, ", "")
    command = getattr(getattr(error, "ctx", None), "command_path", "unlearn")
    return Explained(MISTAKE, message[:1].lower() + message[1:].rstrip("."), f"{command} --help")


def _report(error: BaseException, *, json: bool, debug: bool) -> int:
    """Print an error; an unknown one inside a run leaves its traceback in the run folder."""
    found = explain(error)
    if not found.message:
        return found.code
    if not found.known and isinstance(error, InRun):
        log = error.folder / (f"error-rank{launch.rank()}.log" if launch.rank() else "error.log")
        with suppress(OSError):
            log.write_text("".join(traceback.format_exception(error.cause)), encoding="utf-8")
            found.hint = f"the traceback is in {log}; --debug shows it here"
    if debug:
        traceback.print_exception(error.cause if isinstance(error, InRun) else error)
    left = launch.leave(found.code, found.message, found.hint)
    if left is not None:  # who started us says it, once
        return left
    if launch.rank() > 0 and found.code != FAILED:  # rank 0 says the same
        return found.code
    word = WORDS.get(found.code, WORDS[MISTAKE])
    rank = f"rank {launch.rank()} on {socket.gethostname()}: " if launch.rank() else ""
    print(f"{word}: {rank}{found.message}", file=sys.stderr)
    if found.hint:
        print(f"  hint: {found.hint}", file=sys.stderr)
    if json:
        report = {"kind": word, "message": found.message, "hint": found.hint}
        print(json_module.dumps({"error": report | {"exit_code": found.code}}, ensure_ascii=False))
    return found.code


class Halt(BaseException):
    """SIGINT or SIGTERM outside a run's own handling; nothing but us may catch it."""


@contextmanager
def _stoppable() -> Iterator[None]:
    def halt(number: int, frame: Any) -> None:
        raise Halt

    before = {number: signal.signal(number, halt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Aside(io.TextIOBase):
    """A stdout that sends what libraries print to stderr; ``say`` writes to ``real``."""

    def __init__(self, real: TextIO) -> None:
        self.real = real

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


@contextmanager
def _reserved_stdout() -> Iterator[None]:
    """Keep stdout for ``say`` alone, against Python's print and against writes to descriptor 1."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):  # not a file, as in tests
        with redirect_stdout(_Aside(sys.stdout)):
            yield
        return
    sys.stdout.flush()
    saved = os.dup(number)
    os.dup2(2, number)
    try:
        with open(os.dup(saved), "w", encoding="utf-8") as real, redirect_stdout(_Aside(real)):
            yield
    finally:
        os.dup2(saved, number)
        os.close(saved)


@contextmanager
def stdout_for_children() -> Iterator[None]:
    """Give descriptor 1 back inside the block: a process started there speaks in our place."""
    real = getattr(sys.stdout, "real", None)
    if real is None:
        yield
        return
    aside = os.dup(1)
    os.dup2(real.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(aside, 1)
        os.close(aside)


@contextmanager
def _quiet_libraries(*, debug: bool) -> Iterator[None]:
    """Keep libraries' chatter off the screen; warnings of our own become ``warning: …`` lines."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if debug:
        yield
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for library in ("DeepSpeed", "accelerate", "transformers"):
        logging.getLogger(library).addFilter(_serious)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"unlearn\b")
        warnings.showwarning = _warning_printer()
        _write_anything()
        yield


def _serious(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _warning_printer() -> Callable[..., None]:
    """Give a ``warnings.showwarning`` that prints each text once, as one line."""
    seen: set[str] = set()

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        if str(message) not in seen:
            print(f"warning: {message}", file=sys.stderr)
        seen.add(str(message))

    return show


def _write_anything() -> None:
    """Let a terminal that does not know a character show a question mark instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
