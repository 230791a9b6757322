"""Is a written answer the true one: the judges, and the answer they have read out of a text."""

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from importlib import metadata
from importlib.util import find_spec
from typing import IO, NamedTuple, Protocol

from unlearn.errors import RunFailed, UserError, unknown
from unlearn.evals.reasoning.options import VERIFIERS
from unlearn.evals.reasoning.problems import boxed

SECONDS = 15.0
"""Time for one verdict; an answer that takes longer counts as wrong, and is counted as such."""
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:\s*/\s*\d+)?")


class Verdict(NamedTuple):
    """Whether a text gives the true answer, and the answer that was read out of it."""

    correct: bool
    extracted: str | None
    timed_out: bool = False


class Judge(Protocol):
    """Compares the answer in a text with the true one."""

    @property
    def version(self) -> str:
        """Name what decides: another version may decide otherwise."""
        ...

    def __call__(self, answer: str, text: str) -> Verdict: ...


@contextmanager
def judging(verify: str) -> Iterator[Judge]:
    """Give a judge: ``exact``, or ``math`` for the math-verify library.

    Raises:
        UserError: there is no such judge, or its library is not installed.
    """
    check_judge(verify)
    if verify == "exact":
        yield Exact()
        return
    judge = MathVerify()
    try:
        yield judge
    finally:
        judge.close()


def check_judge(verify: str) -> None:
    """Refuse a judge that is not there; loads nothing.

    Raises:
        UserError: as said.
    """
    if verify not in VERIFIERS:
        raise unknown("--verify", verify, VERIFIERS)
    if verify == "math" and find_spec("math_verify") is None:
        raise UserError(
            "judging mathematical answers needs math-verify, which is not installed",
            "pip install 'unlearn-llm[math]', or --verify exact, which compares numbers and texts",
        )


class Exact:
    r"""Equal as numbers (``1/2`` and ``0.5``), or as texts up to case, spaces and ``$``.

    The answer of a text is its last ``\boxed{}``; without one its last number; without any the
    whole text. For toys and plain numbers: it knows no algebra.
    """

    version = "exact 1"

    def __call__(self, answer: str, text: str) -> Verdict:
        found = boxed(text)
        if found is None:
            numbers = _NUMBER.findall(text)
            found = numbers[-1].strip().rstrip(".,") if numbers else text.strip() or None
        return Verdict(found is not None and _same(answer, found), found)


@dataclass
class MathVerify:
    """The math-verify library in a process of its own, which is ended when it takes too long.

    The library stops itself by a signal, which works in a program's main thread alone and not
    inside one long operation; a process of its own can always be stopped, from any thread, and its
    memory is bounded. It evaluates no text as a program: see :mod:`unlearn.evals.reasoning.judge`.
    """

    seconds: float = SECONDS
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def version(self) -> str:
        return f"math-verify {metadata.version('math-verify')}"

    def __call__(self, answer: str, text: str) -> Verdict:
        asked = json.dumps({"answer": answer, "text": text}).encode() + b"\n"
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(asked)
            process.stdin.flush()
            line = _line(process.stdout, time.monotonic() + self.seconds)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            self.close()
            return Verdict(correct=False, extracted=boxed(text), timed_out=True)
        return Verdict(**json.loads(line))

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        self._process.kill()
        self._process.communicate()
        self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        # what this process can import, the other one can; stopped by us, not by the terminal
        places = os.pathsep.join(place for place in sys.path if place)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "unlearn.evals.reasoning.judge"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": places},
            start_new_session=True,
        )
        assert self._process.stdout is not None
        if _line(self._process.stdout, time.monotonic() + 60) != b"ready\n":
            self.close()
            raise RunFailed(
                "the judge's process did not start", "try `python -c 'import math_verify'`"
            )
        return self._process


def _line(stream: IO[bytes], until: float) -> bytes:
    """Read one line; what there is when time or the process has ended."""
    found = b""
    while not found.endswith(b"\n"):
        left = until - time.monotonic()
        if left <= 0 or not select.select([stream], [], [], left)[0]:
            return found
        part = os.read(stream.fileno(), 65536)
        if not part:
            return found
        found += part
    return found


def _same(answer: str, found: str) -> bool:
    one, other = _plain(answer), _plain(found)
    if not other:
        return False
    numbers = _fraction(one), _fraction(other)
    return numbers[0] == numbers[1] if None not in numbers else one == other


def _plain(text: str) -> str:
    text = re.sub(r"\\[,;!: ]|[$\s]", "", text)
    return text.strip().rstrip(".").lower()


def _fraction(text: str) -> Fraction | None:
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text).removeprefix("+")
    text = re.sub(r"^(-?)\\d?frac\{(-?\d+)\}\{(\d+)\}$", r"\1\2/\3", text)
    if len(text) > 100 or re.search(r"[eE]", text):  # 1e999999999 would fill the memory
        return None
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None
