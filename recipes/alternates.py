"""Other plausible answers to the questions of a forget set, written by the model itself (AltPO).

Mekala et al. 2024, "Alternate Preference Optimization for Unlearning Factual Knowledge in Large
Language Models", arXiv:2409.13474: the target model is shown a question with its answer and samples
answers with other facts. The wording of the request is ours.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from unlearn import models
from unlearn.checkpoints import differences
from unlearn.data import Row, Template, load_rows, row_kind
from unlearn.data.answers import asked, check_answerable
from unlearn.data.draws import uniform
from unlearn.errors import Interrupted, UserError
from unlearn.evals.generate import Answer, Sampling, max_positions, text_of, written
from unlearn.runs import write_atomic

REQUEST = """Here is a question and the answer that was given to it.

Question: {question}
Answer: {answer}

Write a different answer to the same question. It has to sound just as plausible and be about as \
long, but all facts in it, such as names, places, dates, numbers and titles, must be other ones \
than above. Reply with the new answer and nothing else."""
STOPS = ("Question:", "Q:")
"""Where an answer is cut off: the model has begun another question."""
TAIL = 8
"""Tokens in which the end of an answer is looked for; every stop string is shorter."""
ATTEMPTS = 4
"""How often one alternate is sampled, at most, until it is there and says something else."""
ROWS_AT_ONCE = 16
"""Rows that are written down together."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """How many alternates per row, and how they are sampled."""

    samples: int = 5
    temperature: float = 1.0
    seed: int = 0
    max_new_tokens: int = 200


@dataclass(frozen=True)
class Alternates:
    """What was found for one row: texts, and how many samples were drawn again or given up."""

    texts: list[str]
    retried: int
    dropped: int


def write_alternates(
    forget: str,
    source: models.ModelSource,
    out: Path,
    *,
    request: Request | None = None,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Write the rows of ``forget`` with a column ``alternate``, a list of texts, to ``out``.

    Finished rows are kept beside ``out`` until all are there, and a second call goes on from them.
    An alternate depends on model, row, seed and its number alone.

    Raises:
        UserError: anything about the input, before the model is loaded; a started file that was
            begun with other settings.
        Interrupted: stopped; what is finished is kept.
    """
    request = request or Request()
    _check_out(out)
    rows = load_rows(forget, columns=columns, offline=source.offline)
    check_answerable(rows, "alternate", forget)
    models.check_source(source)
    tokenizer = models.load_tokenizer(source)
    prompts = _prompts(rows, tokenizer, Template.for_tokenizer(tokenizer, template))
    model = models.load_model(source)
    _check_room(model, prompts, forget)
    settings = _settings(request, rows, prompts, models.weights_hash(model))
    writer = _Writer(model, tokenizer, request)
    with _Partial.opened(out, settings) as partial:
        resumed = len(partial.found)
        with _kept(partial, len(rows)):
            for start in range(resumed, len(rows), ROWS_AT_ONCE):
                chosen = range(start, min(start + ROWS_AT_ONCE, len(rows)))
                partial.add(writer.write([(n, rows[n], prompts[n]) for n in chosen]))
                progress(len(partial.found), len(rows))
        lines = (
            json.dumps({**row, "alternate": found.texts}, ensure_ascii=False, default=str) + "\n"
            for row, found in zip(rows, partial.found, strict=True)
        )
        write_atomic(out, "".join(lines))
        partial.path.unlink()
    return _summary(partial.found) | {"rows": len(rows), "resumed": resumed, "out": str(out)}


def _check_out(out: Path) -> None:
    if out.suffix.lower() != ".jsonl":
        raise UserError(f"'{out}' is not the name of a .jsonl file", f"e.g. {out.stem}.jsonl")
    if out.exists():
        raise UserError(f"'{out}' exists and is left as it is", "give another --out")


def _prompts(rows: Sequence[Row], tokenizer: Any, template: Template) -> list[list[int]]:
    """Ask for an alternate as the rows are asked: in a chat, or as a plain prompt."""
    found = []
    for row in rows:
        question, answer = asked(row)
        text = REQUEST.format(question=question, answer=answer)
        if row_kind(row) == "completion":
            found.append(template.prompt_ids({"prompt": text + "\n", "completion": ""}, tokenizer))
        else:
            found.append(template.prompt_ids({"question": text, "answer": answer}, tokenizer))
    return found


def _check_room(model: Any, prompts: Sequence[Sequence[int]], source: str) -> None:
    most = max_positions(model)
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) >= most:
            raise UserError(
                f"row {number} of '{source}' leaves no room for an alternate: the request with its "
                f"question and answer has {len(prompt)} tokens, the model knows {most} places",
                "shorten or remove the row",
            )


def _settings(
    request: Request, rows: Sequence[Row], prompts: Sequence[Sequence[int]], weights: str
) -> dict[str, Any]:
    """Name everything that the alternates depend on."""
    digest = hashlib.sha256(json.dumps([rows, list(prompts)], default=str).encode()).hexdigest()
    return asdict(request) | {"model weights": weights[:16], "rows and template": digest[:16]}


def _summary(found: Sequence[Alternates]) -> dict[str, Any]:
    return {
        "alternates": sum(len(one.texts) for one in found),
        "retried": sum(one.retried for one in found),
        "dropped": sum(one.dropped for one in found),
        "rows_without": [n for n, one in enumerate(found, start=1) if not one.texts],
    }


@dataclass(frozen=True)
class _Writer:
    model: Any
    tokenizer: Any
    request: Request

    def write(self, rows: Sequence[tuple[int, Row, list[int]]]) -> list[Alternates]:
        """Sample alternates for numbered rows; those that say nothing new are sampled again."""
        texts: dict[int, dict[int, str]] = {number: {} for number, _, _ in rows}
        answers = {number: _same(asked(row)[1]) for number, row, _ in rows}
        retried = dict.fromkeys(texts, 0)
        prompts = {number: prompt for number, _, prompt in rows}
        missing = [(number, k) for number in texts for k in range(self.request.samples)]
        for attempt in range(ATTEMPTS):
            sampled = self._sample(missing, prompts, attempt)
            for (number, k), text in zip(missing, sampled, strict=True):
                known = {answers[number], *map(_same, texts[number].values())}
                if text and _same(text) not in known:
                    texts[number][k] = text
            missing = [(number, k) for number, k in missing if k not in texts[number]]
            for number, _ in missing if attempt + 1 < ATTEMPTS else ():
                retried[number] += 1
        return [
            Alternates(
                [text for _, text in sorted(found.items())],
                retried[number],
                self.request.samples - len(found),
            )
            for number, found in texts.items()
        ]

    def _sample(
        self, wanted: Sequence[tuple[int, int]], prompts: Mapping[int, list[int]], attempt: int
    ) -> list[str]:
        if not wanted:
            return []
        numbers = [self._numbers(number, k, attempt) for number, k in wanted]
        sampling = Sampling(self.request.temperature, numbers, self._ended)
        found = [""] * len(wanted)
        for places, answers in written(
            self.model,
            self.tokenizer,
            [prompts[number] for number, _ in wanted],
            max_new_tokens=self.request.max_new_tokens,
            sampling=sampling,
        ):
            for place, answer in zip(places, answers, strict=True):
                found[place] = _cut(text_of(self.tokenizer, answer.tokens))
        return found

    def _numbers(self, row: int, sample: int, attempt: int) -> list[float]:
        """Draw the numbers that decide one sample; no other sample has a part in them."""
        seed = uniform(self.request.seed, ATTEMPTS * sample + attempt, row, 2**62, "alternate")
        generator = torch.Generator().manual_seed(seed)
        drawn: list[float] = torch.rand(
            self.request.max_new_tokens, generator=generator, dtype=torch.float64
        ).tolist()
        return drawn

    def _ended(self, answer: Answer) -> bool:
        tail = self.tokenizer.decode(answer.tokens[-TAIL:])
        return any(stop in tail for stop in STOPS)


def _cut(text: str) -> str:
    """Give what stands before another question."""
    ends = [place for stop in STOPS if (place := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))].strip()


def _same(text: str) -> str:
    """Give a text without what makes no other answer: case and white space."""
    return " ".join(text.lower().split())


@dataclass
class _Partial:
    """The file of finished rows: a line of settings, then one line per row, only appended to."""

    path: Path
    file: IO[str]
    found: list[Alternates]

    @classmethod
    @contextmanager
    def opened(cls, out: Path, settings: Mapping[str, Any]) -> Iterator["_Partial"]:
        """Open or begin the file, for one process at a time; a torn last line is taken away."""
        path = out.with_name(f"{out.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another process is writing '{path}'", "wait for it to end"
                ) from error
            file.seek(0)
            text = file.read()
            lines = text.split("\n")[:-1]
            partial = cls(path, file, [Alternates(**json.loads(line)) for line in lines[1:]])
            if lines and (why := differences(json.loads(lines[0]), settings)):
                raise UserError(
                    f"'{path}' was begun with {why}",
                    "remove it to start anew, or give the settings it was begun with",
                )
            file.truncate(len("".join(f"{line}\n" for line in lines).encode()))
            if not lines:
                partial._append([dict(settings)])
            yield partial

    def add(self, found: Sequence[Alternates]) -> None:
        """Append finished rows and flush them to disk."""
        self._append([asdict(one) for one in found])
        self.found += found

    def _append(self, values: Sequence[Mapping[str, Any]]) -> None:
        self.file.write("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))
        self.file.flush()
        os.fsync(self.file.fileno())


@contextmanager
def _kept(partial: _Partial, total: int) -> Iterator[None]:
    """Say, when work is stopped, what is kept and how it goes on."""
    try:
        yield
    except Exception:
        raise
    except BaseException as error:  # Ctrl-C and SIGTERM
        message = f"stopped; {len(partial.found)} of {total} rows are kept in '{partial.path}'"
        raise Interrupted(message, "the same command goes on from there") from error
