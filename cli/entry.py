"""What every command shares: exit codes, the --json and --offline options, one way to print.

Exit codes: 0 ok, 1 failed, 2 user mistake, 75 interrupted and resumable.
"""

import json as json_module
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Offline = Annotated[bool, typer.Option("--offline", help="Open no socket: local files only.")]

OK, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 75


def go_offline(offline: bool) -> None:
    """Tell Hugging Face libraries not to use the network; must run before they are imported."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"


def say(value: Any, *, json: bool, people: Callable[[Any], None]) -> None:
    """Print a result: as one JSON object, or as text for people."""
    if json:
        print(json_module.dumps(value, indent=2, ensure_ascii=False, default=str))
    else:
        people(value)


def guarded(app: Callable[[], None]) -> None:
    """Run an application and exit: user mistakes and known failures are one line, no traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    try:
        app()
    except KeyboardInterrupt:
        _leave(INTERRUPTED, "interrupted", "`unlearn resume FOLDER` continues a run that had begun")
    except Exception as error:
        if os.environ.get("UNLEARN_DEBUG"):
            traceback.print_exc()
        code, message, hint = explain(error)
        if code == FAILED and not hint and not os.environ.get("UNLEARN_DEBUG"):
            traceback.print_exc()
        _leave(code, message, hint)


def explain(error: BaseException) -> tuple[int, str, str]:
    """Give exit code, cause and what to do for an exception."""
    from unlearn.errors import Interrupted, RunFailed, UserError

    if isinstance(error, UserError):
        return MISTAKE, error.message, error.hint
    if isinstance(error, Interrupted):
        return INTERRUPTED, str(error), "continue with `unlearn resume FOLDER`"
    if isinstance(error, RunFailed):
        return FAILED, error.message, error.hint
    if "No space left on device" in str(error):
        hint = "free some space or move --out, then `unlearn resume FOLDER`"
        return FAILED, f"the disk is full: {error}", hint
    if type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower():
        hint = (
            "lower training.per_device_train_batch_size and raise gradient_accumulation_steps, "
            "set training.gradient_checkpointing=true, or use --lora; see `unlearn plan`"
        )
        return FAILED, "out of memory", hint
    return FAILED, f"{type(error).__name__}: {error}", ""


def _leave(code: int, message: str, hint: str) -> None:
    word = {MISTAKE: "error", FAILED: "failed", INTERRUPTED: "interrupted"}[code]
    print(f"{word}: {message}", file=sys.stderr)
    if hint:
        print(f"  hint: {hint}", file=sys.stderr)
    if "--json" in sys.argv:
        report = {"error": {"kind": word, "message": message, "hint": hint, "exit_code": code}}
        print(json_module.dumps(report, ensure_ascii=False))
    raise SystemExit(code)
