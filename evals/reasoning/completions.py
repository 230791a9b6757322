"""What a model has written about each problem, kept so that a second call goes on."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unlearn.errors import UserError
from unlearn.evals.reasoning.problems import Problem, asked
from unlearn.runs import RunFolder, write_json

Place = tuple[str, int]
"""A problem's id and the number of the sample."""


@dataclass(frozen=True)
class Completion:
    """One sample: the text, its forced prefix included, its verdict and its length.

    ``tokens`` counts what the model wrote, its end token included; None where an endpoint does not
    say. ``truncated``: it came to no end within the tokens allowed.
    """

    problem: str
    sample: int
    text: str
    tokens: int | None
    truncated: bool
    extracted: str | None = None
    correct: bool = False
    timed_out: bool = False

    @property
    def place(self) -> Place:
        return self.problem, self.sample


@dataclass
class Kept:
    """Completions by place; with a ``folder`` each is on disk as soon as it is there."""

    folder: Path | None = None
    found: dict[Place, Completion] = field(default_factory=dict)

    @property
    def file(self) -> Path | None:
        return self.folder / "completions.jsonl" if self.folder else None

    def missing(self, problems: Sequence[Problem], n: int) -> list[Place]:
        """List the samples that are still to be written."""
        every = [(problem.id, sample) for problem in problems for sample in range(n)]
        return [place for place in every if place not in self.found]

    def add(self, completions: Iterable[Completion]) -> None:
        """Keep completions, in memory and on disk."""
        lines = b""
        for completion in completions:
            self.found[completion.place] = completion
            lines += json.dumps(asdict(completion), ensure_ascii=False).encode("utf-8", "replace")
            lines += b"\n"
        if self.file:
            with self.file.open("ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())

    def of(self, problem: Problem) -> list[Completion]:
        """Give the samples of a problem, in order."""
        return [self.found[place] for place in sorted(self.found) if place[0] == problem.id]

    def table(self, problems: Sequence[Problem], n: int) -> list[list[Completion]]:
        """Give [problem, sample]."""
        return [[self.found[problem.id, j] for j in range(n)] for problem in problems]


def check_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder that holds something else, or samples of other settings.

    Settings that are not known yet are left out of ``settings``. Writes nothing.

    Raises:
        UserError: names a setting that differs.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (file := folder / "sampling.json").is_file():
        RunFolder.create(folder)  # refuses it
    stored = json.loads(file.read_text(encoding="utf-8"))
    asked = json.loads(json.dumps(dict(settings)))
    for name, value in asked.items():
        if stored.get(name) != value:
            raise UserError(
                f"'{folder}' holds samples with {name} {_short(stored.get(name))}, not "
                f"{_short(value)}",
                "choose another --out, or give the settings of sampling.json there",
            )


@contextmanager
def kept(folder: Path | None, settings: Mapping[str, Any]) -> Iterator[Kept]:
    """Open the completions of a folder, held against a second writer; None keeps nothing on disk.

    Raises:
        UserError: another process writes there, or it holds samples of other settings.
    """
    if folder is None:
        yield Kept()
        return
    check_folder(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    with RunFolder(folder).locked():
        write_json(folder / "sampling.json", dict(settings))
        found = Kept(folder)
        assert found.file is not None
        found.found = {one.place: one for one in _read(found.file)}
        yield found


def to_traces(
    problems: Sequence[Problem], table: Sequence[Sequence[Completion]], instruction: str
) -> str:
    """Write one line per problem, as ``unlearn data pairs --verdict correct`` reads them.

    ``question`` is the problem with the ``instruction`` it was put with.
    """
    lines = []
    for problem, row in zip(problems, table, strict=True):
        told: dict[str, Any] = {"id": problem.id, "problem": problem.text}
        told |= {"question": asked(problem, instruction), "answer": problem.answer}
        told["generations"] = [one.text for one in row]
        for name in ("correct", "truncated", "tokens", "extracted"):
            told[name] = [getattr(one, name) for one in row]
        lines.append(json.dumps(told, ensure_ascii=False) + "\n")
    return "".join(lines).encode("utf-8", "replace").decode()


def _read(file: Path) -> list[Completion]:
    """Read what is there; a torn last line (power loss) is cut off."""
    if not file.exists():
        return []
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with file.open("r+b") as torn:
            torn.truncate(len(whole))
    return [Completion(**json.loads(line)) for line in whole.splitlines()]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
