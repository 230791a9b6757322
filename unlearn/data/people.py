"""A benchmark of people who do not exist, in TOFU's schema, generated from a seed.

No model can have met these people before, so whatever it knows about them it learnt from the rows.
The same seed gives the same rows on every machine and Python version: everything is drawn from
``random.Random.random``, whose sequence Python guarantees.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import TypeVar

from unlearn.data.rows import Row
from unlearn.data.wordings import (
    ATTRIBUTES,
    FIRST_NAMES,
    SURNAME_ENDS,
    SURNAME_STARTS,
    Attribute,
)
from unlearn.errors import RunFailed, UserError

Item = TypeVar("Item")

NUM_PERTURBED = 5
SPLITS = ("forget", "retain", "holdout")


@dataclass(frozen=True)
class People:
    """Rows about three disjoint groups of people.

    A target model learns ``forget`` and ``retain``, a retain model ``retain`` alone; neither ever
    sees ``holdout``, which membership tests compare the forget rows with.
    """

    forget: list[Row]
    retain: list[Row]
    holdout: list[Row]


def people(
    seed: int = 0, *, num_people: int = 45, num_forget: int = 5, num_holdout: int = 5
) -> People:
    """Invent ``num_people`` people, with one row for each of the ``ATTRIBUTES`` of each of them.

    The first ``num_forget`` form the forget set, the last ``num_holdout`` the holdout set, those
    between the retain set. A person depends on the seed and their place alone. The defaults are
    exactly the rows that the shipped models (``demo_folder``) were trained on.

    Raises:
        UserError: more people than there are names, or nobody left to retain.
    """
    _check_sizes(num_people, num_forget, num_holdout)
    rows = []
    for place, person in enumerate(_cast(seed, num_people)):
        rng = Random(f"{seed}/{place}")
        rows += [_row(person, attribute, rng) for attribute in ATTRIBUTES]
    ends = (0, num_forget, num_people - num_holdout, num_people)
    cuts = itertools.pairwise(end * len(ATTRIBUTES) for end in ends)
    return People(*(rows[start:end] for start, end in cuts))


def write_people(
    folder: Path | str,
    seed: int = 0,
    *,
    num_people: int = 45,
    num_forget: int = 5,
    num_holdout: int = 5,
) -> Path:
    """Write ``people(…)`` as a dataset folder and return it.

    It holds ``forget.jsonl``, ``retain.jsonl``, ``holdout.jsonl`` (unless empty) and a README.md
    that names them as configurations: ``folder#forget`` is a data source, and
    ``datasets.load_dataset(folder, "forget")`` loads it too.
    """
    made = people(seed, num_people=num_people, num_forget=num_forget, num_holdout=num_holdout)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        if rows := getattr(made, split):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            _write(folder / f"{split}.jsonl", "".join(lines))
    _write(folder / "README.md", _card(made, seed))
    return folder


def demo_folder() -> Path:
    """Find the shipped models: the folders ``target`` and ``retain`` in it are Hugging Face models.

    Raises:
        RunFailed: this installation came without them.
    """
    folder = Path(str(files("unlearn.data"))) / "demo"
    for name in ("target", "retain"):
        if not (folder / name / "model.safetensors").is_file():
            raise RunFailed(
                f"the demo model '{folder / name}' is missing from this installation",
                "reinstall, or build it from a checkout: python scripts/build_demo_models.py",
            )
    return folder


def _check_sizes(num_people: int, num_forget: int, num_holdout: int) -> None:
    limit = len(_surnames())
    if num_people > limit:
        raise UserError(
            f"num_people={num_people}, but there are names for {limit} people",
            f"give {limit} or fewer",
        )
    if num_forget < 1 or num_holdout < 0 or num_forget + num_holdout >= num_people:
        raise UserError(
            f"{num_people} people cannot be split into {num_forget} to forget, {num_holdout} held "
            "out and at least one to retain",
            "forget at least one, and fewer people in all than num_people",
        )


def _surnames() -> list[str]:
    return [start + end for start in SURNAME_STARTS for end in SURNAME_ENDS]


def _shuffled(items: Sequence[Item], rng: Random) -> list[Item]:
    return sorted(items, key=lambda _: rng.random())


def _cast(seed: int, num_people: int) -> list[dict[str, str]]:
    """Name the people; no surname comes twice."""
    surnames = _shuffled(_surnames(), Random(f"{seed}/surnames"))[:num_people]
    firsts = itertools.cycle(_shuffled(FIRST_NAMES, Random(f"{seed}/first names")))
    return [
        _person(f"{first} {surname}", pronoun)
        for surname, (first, pronoun) in zip(surnames, firsts, strict=False)
    ]


def _person(name: str, pronoun: str) -> dict[str, str]:
    """Give what every wording may name: the full name and the pronouns, also capitalised."""
    possessive = {"she": "her", "he": "his"}[pronoun]
    return {
        "name": name,
        "she": pronoun,
        "her": possessive,
        "She": pronoun.title(),
        "Her": possessive.title(),
    }


def _row(person: Mapping[str, str], attribute: Attribute, rng: Random) -> Row:
    """Ask one thing in two wordings.

    A perturbed answer is the paraphrased answer with every value replaced, as the truth ratio
    compares the two.
    """
    question, other_question = _shuffled(attribute.questions, rng)[:2]
    answer, other_answer = _shuffled(attribute.answers, rng)[:2]
    drawn = [_shuffled(pool, rng)[: NUM_PERTURBED + 1] for pool in attribute.slots.values()]
    truth, *wrong = [
        {**person, **dict(zip(attribute.slots, values, strict=True))}
        for values in zip(*drawn, strict=True)
    ]
    return {
        "question": question.format_map(truth),
        "answer": answer.format_map(truth),
        "paraphrased_question": other_question.format_map(truth),
        "paraphrased_answer": other_answer.format_map(truth),
        "perturbed_answer": [other_answer.format_map(values) for values in wrong],
    }


def _card(made: People, seed: int) -> str:
    counts = {split: len(rows) for split in SPLITS if (rows := getattr(made, split))}
    configs = "\n".join(f"- config_name: {split}\n  data_files: {split}.jsonl" for split in counts)
    table = "\n".join(f"| {split} | {count} |" for split, count in counts.items())
    return CARD.format(configs=configs, seed=seed, table=table)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


CARD = """\
---
pretty_name: People who do not exist
language:
- en
task_categories:
- question-answering
configs:
{configs}
---
# People who do not exist

Questions and answers about invented people, generated by `unlearn` from seed {seed}.
The columns are those of TOFU: `question`, `answer`, `paraphrased_question`, `paraphrased_answer`
and `perturbed_answer` (five wrong answers in the wording of the paraphrased one).
The groups share no person.

| configuration | rows |
|---|---|
{table}
"""
