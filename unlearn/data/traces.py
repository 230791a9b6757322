"""Pairs and plain rows out of many answers per problem whose verdicts are known.

Construction of REDI (arXiv:2505.24850, section 2): right answers make the rows to train on first, a
right and a wrong answer to one problem make a pair. Deviations: ids are hashes of content, problems
are told apart by their text, and the order is a hash of seed and id, so that the same input gives
the same bytes.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from unlearn.data.rows import Row
from unlearn.data.verdicts import Verdict
from unlearn.errors import UserError, did_you_mean

PROBLEM = ("problem", "question", "prompt")
"""Columns with the problem, the first that is there."""
OPENS, CLOSES = "<think>", "</think>"
GRAM = 8
"""Words in a row that two texts must share to count as the same question."""


@dataclass(frozen=True)
class How:
    """Settings of :func:`build_pairs`.

    ``keep`` and ``drop`` name columns and the value a row must, or must not, have (upper and lower
    case alike). ``negative``: an answer is wrong when it is not right, or only when every verdict
    says no. ``per_problem``: pairs made of a problem, and right answers trained on first; None
    takes all.
    ``unterminated`` keeps answers that begin to think and never stop: as wrong answers they teach
    never to. Lengths are in tokens of ``count``.
    """

    verdict: Verdict
    generations: str = "generations"
    negative: Literal["not_positive", "all_false"] = "not_positive"
    per_problem: int | None = 1
    keep: Mapping[str, str] = field(default_factory=dict)
    drop: Mapping[str, str] = field(default_factory=dict)
    unterminated: bool = False
    max_prompt: int | None = None
    max_response: int | None = None
    seed: int = 0
    count: Callable[[Sequence[str]], list[int]] | None = None


@dataclass(frozen=True)
class Built:
    """Rows to train on first, pairs, and how many rows every filter left out, in order."""

    rows: list[Row]
    pairs: list[Row]
    counts: dict[str, int]


@dataclass
class _Work:
    """What is built so far, and how many rows and answers were left out for which reason."""

    how: How
    found: dict[str, int]
    plain: list[Row] = field(default_factory=list)
    pairs: list[Row] = field(default_factory=list)

    def add(self, what: str) -> None:
        self.found[what] = self.found.get(what, 0) + 1

    def take(self, problem: str, right: Sequence[str], wrong: Sequence[str]) -> None:
        """Add the rows and pairs of a problem."""
        most = self.how.per_problem
        self.plain += [_plain(problem, answer) for answer in right[:most]]
        matched = list(zip(right, wrong, strict=False))[:most]
        both = product(right, wrong) if most is None else matched
        self.pairs += [_pair(problem, one, other) for one, other in both]
        if not right:
            self.add("no right answer")
        elif not wrong:
            self.add("no wrong answer (trained on first, no pair)")


def build_pairs(
    rows: Sequence[Row], how: How, *, against: Sequence[str] = (), source: str = "the rows"
) -> Built:
    """Build plain rows and pairs.

    ``against`` are questions of evaluations: a problem that shares eight words in a row with one of
    them is left out.

    Raises:
        UserError: no problem, answers or verdicts in the rows, or nothing is left.
    """
    work = _Work(how, {"rows": len(rows)})
    banned = {gram for text in against for gram in grams(text)}
    seen: set[str] = set()
    for number, row in enumerate(rows, start=1):
        problem = _usable(row, work, f"row {number} of '{source}'")
        if problem is None:
            continue
        if normal(problem) in seen:
            work.add("the same problem again")
            continue
        seen.add(normal(problem))
        if banned and not banned.isdisjoint(grams(problem)):
            work.add("shares words with an evaluation")
            continue
        work.take(problem, *_judged(row, work))
    plain, pairs = _fitting(work.plain, work), _fitting(work.pairs, work)
    if not pairs:
        listed = "; ".join(f"{what}: {number}" for what, number in work.found.items())
        raise UserError(
            f"no pair is left of '{source}' ({listed})",
            "a pair needs a right and a wrong answer to one problem: see the counts",
        )
    work.found |= {"rows to train on first": len(plain), "pairs": len(pairs)}
    return Built(_shuffled(plain, how.seed), _shuffled(pairs, how.seed), work.found)


def _shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """Put rows into an order that looks random and depends on the seed and their content alone."""
    return sorted(rows, key=lambda row: _hash(str(seed), row["id"]))


def _usable(row: Row, work: _Work, place: str) -> str | None:
    """Give the problem of a row that can be used; count why another cannot."""
    how = work.how
    for name, value in how.keep.items():
        if _text(row, name, place) != value.lower():
            work.add(f"{name} is not {value}")
            return None
    for name, value in how.drop.items():
        if _text(row, name, place) == value.lower():
            work.add(f"{name} is {value}")
            return None
    problem = next((row[name] for name in PROBLEM if row.get(name) is not None), None)
    if how.generations not in row:
        guess = did_you_mean(how.generations, row)
        raise UserError(
            f"{place} has no column '{how.generations}'{guess}", "name it with --generations"
        )
    answers, lists = row[how.generations], how.verdict.lists(row, place)
    if isinstance(answers, str):
        raise UserError(
            f"{place}: '{how.generations}' is a text, no list of answers",
            "give the answers to a problem as a list, also when there is one",
        )
    if not isinstance(problem, str) or not problem.strip():
        work.add("no problem")
    elif not isinstance(answers, list) or not answers:
        work.add("no answers")
    elif any(len(values) != len(answers) for values in lists.values()):
        work.add("verdicts of another number than answers")
    else:
        return problem
    return None


def _text(row: Row, name: str, place: str) -> str:
    if name not in row:
        raise UserError(
            f"{place} has no column '{name}'{did_you_mean(name, row)}", "check its name"
        )
    return str(row[name]).strip().lower()


def _judged(row: Row, work: _Work) -> tuple[list[str], list[str]]:
    """Give the right and the wrong answers of a row, each text once, in order."""
    how = work.how
    lists, right, wrong = how.verdict.lists(row, ""), [], []
    for at, answer in enumerate(row[how.generations]):
        if not isinstance(answer, str) or not answer.strip():
            work.add("empty answers")
        elif not how.unterminated and OPENS in answer and CLOSES not in answer:
            work.add("answers without an end")
        elif how.verdict.right(lists, at):
            right.append(answer)
        elif how.negative == "not_positive" or not any(values[at] for values in lists.values()):
            wrong.append(answer)
        else:
            work.add("answers that verdicts disagree on")
    right = list(dict.fromkeys(right))
    return right, [answer for answer in dict.fromkeys(wrong) if answer not in right]


def _plain(problem: str, answer: str) -> Row:
    return {"id": _hash(problem, answer), "question": problem, "answer": answer}


def _pair(problem: str, chosen: str, rejected: str) -> Row:
    return {
        "id": _hash(problem, chosen, rejected),
        "question": problem,
        "chosen": chosen,
        "rejected": rejected,
        "chosen_id": _hash(problem, chosen),
        "rejected_id": _hash(problem, rejected),
    }


def _fitting(rows: list[Row], work: _Work) -> list[Row]:
    """Leave out what is too long; note the lengths of the others."""
    how = work.how
    if how.count is None:
        return rows
    columns = ("question", "answer", "chosen", "rejected")
    names = [name for name in columns if rows and name in rows[0]]
    lengths = {name: how.count([row[name] for row in rows]) for name in names}
    kept = []
    for at, row in enumerate(rows):
        tokens = {name: lengths[name][at] for name in names}
        if how.max_prompt and tokens["question"] > how.max_prompt:
            work.add(f"problem above {how.max_prompt} tokens")
        elif how.max_response and any(
            number > how.max_response for name, number in tokens.items() if name != "question"
        ):
            work.add(f"answer above {how.max_response} tokens")
        else:
            kept.append(row | {f"{name}_tokens": number for name, number in tokens.items()})
    return kept


def normal(text: str) -> str:
    """Give a text in lower case without punctuation, words apart by one space."""
    return " ".join(re.findall(r"\w+", text.lower()))


def grams(text: str) -> Iterator[str]:
    """Give every run of eight words; a shorter text counts as one."""
    words = normal(text).split()
    for start in range(max(1, len(words) - GRAM + 1)):
        yield " ".join(words[start : start + GRAM])


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return digest.hexdigest()[:24]
