"""The process in which math-verify runs: one question a line on stdin, one verdict on stdout.

What is read here was written by a model. The library parses LaTeX with a grammar; its reader of
plain expressions passes on digits and operators alone. Time is bounded by whoever started this
process, memory here.
"""

import json
import logging
import os
import resource
import sys
from typing import Any

MEMORY = 4 * 2**30
"""Bytes that the process may take: a tower of powers would fill any memory."""


def judged(answer: str, text: str) -> dict[str, Any]:
    r"""Compare the answer in ``text`` with ``answer``, both as math-verify reads them.

    A ``\boxed{}`` goes before anything else, as in REDI's evaluation; without one the library's
    order holds.
    """
    from math_verify import (  # noqa: PLC0415 - an extra
        ExprExtractionConfig,
        LatexExtractionConfig,
        parse,
        verify,
    )
    from math_verify.errors import TimeoutException  # noqa: PLC0415

    latex = LatexExtractionConfig(boxed_match_priority=0)
    try:
        true = parse(f"\\boxed{{{answer}}}", [latex])
        found = parse(text, [latex, ExprExtractionConfig()])
        read = next((part for part in reversed(found) if isinstance(part, str)), None)
        correct = bool(found and verify(true, found))
    except (Exception, TimeoutException):  # whatever a text does to a parser, it is not right
        return {"correct": False, "extracted": None}
    return {"correct": correct, "extracted": read}


def main() -> None:
    """Answer until the other end goes away."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        sys.stdout = sys.stderr  # whatever a library prints is no verdict
        judged("1", "1")  # the slow imports
        print("ready", file=replies, flush=True)
        for line in sys.stdin:
            print(json.dumps(judged(**json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
