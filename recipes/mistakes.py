"""Every mistake in a recipe, each as one line: key, what was given, what is allowed."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from unlearn.errors import UserError, did_you_mean
from unlearn.recipes.passthrough import KINDS, passthrough_mistakes
from unlearn.recipes.schema import Recipe, TrainingSection
from unlearn.recipes.sections import NOTHING, EditSection, ExtraSection
from unlearn.recipes.terms import Term
from unlearn.recipes.yaml_text import Location, Tree

OTHER_NAMES = {
    "accumulation": "training.gradient_accumulation_steps",
    "batch_size": "training.per_device_train_batch_size",
    "epochs": "training.num_train_epochs",
    "forget_data": "data.forget",
    "loss": "terms.0.objective",
    "lr": "training.learning_rate",
    "max_new_tokens": "evals.max_new_tokens",
    "model_name_or_path": "model.path",
    "name": "method",
    "output_dir": "out",
    "pretrained_model_name_or_path": "model.path",
    "retain_data": "data.retain",
    "torch_dtype": "model.dtype",
}
"""What other tools call our keys."""

_LIMITS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


@dataclass(frozen=True)
class Mistake:
    """One mistake: where it is, what is wrong, and its line in the file when it came from there."""

    at: Location
    message: str
    line: int | None = None

    @property
    def key(self) -> str:
        """The dotted key path, for instance ``training.learning_rate``."""
        return ".".join(map(str, self.at))

    def __str__(self) -> str:
        text = f"{self.key}: {self.message}" if self.at else self.message
        return f"line {self.line}: {text}" if self.line else text


class RecipeError(UserError):
    """A recipe with mistakes: all of them, as one line each in the message."""

    def __init__(self, name: str, mistakes: Iterable[Mistake]) -> None:
        self.name = name
        self.mistakes = tuple(mistakes)
        lines = [str(mistake) for mistake in self.mistakes]
        body = f" {lines[0]}" if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)
        count = "" if len(lines) == 1 else f" {len(lines)} mistakes"
        super().__init__(f"{name}:{count}{body}", "")


def known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Give the dotted path of every key of the schema.

    Terms are left out (they are a list), and what ``first`` repeats of the recipe's own keys.
    """
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if name != "first" and (section := section_type(field.annotation)):
            keys += known_keys(section, f"{prefix}{name}.")
    return keys


def section_type(annotation: Any) -> type[BaseModel] | None:
    """Give the schema of a nested section, also of an optional one; None for a plain value."""
    if get_origin(annotation) is tuple:
        return None
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind if not issubclass(kind, Term) else None
    return None


def unknown_key(at: Location, siblings: Iterable[str]) -> str:
    """Say that a key does not exist, and which one was probably meant."""
    given, section, names = str(at[-1]), ".".join(map(str, at[:-1])), list(siblings)
    here = {name: f"{section}.{name}" if section else name for name in names}
    anywhere = {key.rpartition(".")[2]: key for key in reversed(known_keys())}
    meant = (
        OTHER_NAMES.get(given)
        or anywhere.get(given)
        or here.get(_closest(given, here))
        or anywhere.get(_closest(given, anywhere))
    )
    return f"unknown key; did you mean '{meant}'?" if meant else f"unknown key; {_one_of(names)}"


def _closest(given: str, allowed: Iterable[str]) -> str:
    return next(iter(difflib.get_close_matches(given, list(allowed), n=1)), "")


def find_mistakes(tree: Tree) -> list[Mistake]:
    """List everything wrong with a recipe's keys and values; an empty list means it is valid."""
    mistakes: dict[Location, Mistake] = {}
    for mistake in (
        *_no_terms(tree),
        *_schema_mistakes(tree),
        *_passthrough(tree),
        *_objectives(tree),
        *_edit(tree),
    ):
        mistakes.setdefault(mistake.at, mistake)
    return list(mistakes.values())


def _no_terms(tree: Tree) -> Iterator[Mistake]:
    """Find a recipe without terms or edit, which the schema finds only when all else is right."""
    if tree.get("terms") == [] and not tree.get("edit"):
        yield Mistake(("terms",), NOTHING)


def _schema_mistakes(tree: Tree) -> Iterator[Mistake]:
    try:
        Recipe.model_validate(tree)
    except ValidationError as error:
        found: dict[Location, list[str]] = {}
        for details in error.errors(include_url=False):
            if details["type"] != "passthrough":
                at = _without_branches(details["loc"])
                if details["type"] == "terms":  # its text begins with the key it is about
                    key, _, text = str(details["ctx"]["why"]).partition(": ")
                    yield Mistake(tuple(key.split(".")), text)
                    continue
                found.setdefault(at, []).append(_describe(at, details))
        for at, messages in found.items():
            yield Mistake(at, _join(messages))


def _without_branches(location: Location) -> Location:
    """Cut off what pydantic adds for the branches of a union: ``literal['all-linear']``."""
    for depth, part in enumerate(location):
        if isinstance(part, str) and part.endswith("]"):
            return location[:depth]
    return location


def _join(messages: list[str]) -> str:
    """Join what the branches of a union say about one value: ``x given; must be a or b``."""
    head, *rest = dict.fromkeys(messages)
    return " or ".join([head, *(text.partition("must be ")[2] or text for text in rest)])


def _describe(at: Location, details: ErrorDetails) -> str:
    kind, given, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown_key(at, _siblings(at))
    if kind == "missing":
        return "missing, and it has no default"
    if kind == "value_error":
        return str(context["error"])
    if "why" in context:  # a mistake of several keys together, which it names
        return str(context["why"])
    if kind == "literal_error":
        allowed = _allowed(at) or [str(context["expected"])]
        close = did_you_mean(given, allowed) if isinstance(given, str) else ""
        return f"{given!r} given; must be {_one_of(allowed)}{close}"
    if kind in _LIMITS:
        limit, words = _LIMITS[kind]
        return f"{given!r} given; must be {words} {context[limit]:g}"
    if kind in ("string_too_short", "too_short"):
        return f"{given!r} given; must not be empty"
    name = kind.removesuffix("_type")
    if name in KINDS:
        return f"{_shown(given)} given; must be {KINDS[name]}"
    return f"{_shown(given)} given; {details['msg'][0].lower()}{details['msg'][1:]}"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _one_of(allowed: list[str]) -> str:
    return allowed[0] if len(allowed) == 1 else f"one of {', '.join(allowed)}"


def _section_at(at: Location) -> type[BaseModel] | None:
    """Give the schema of the section that holds the last key of a location."""
    section: type[BaseModel] | None = Recipe
    for part in at[:-1]:
        if isinstance(part, int):  # an entry of a list
            continue
        if part in LISTED:
            section = LISTED[part]
            continue
        if section is None or part not in section.model_fields:
            return None
        section = section_type(section.model_fields[str(part)].annotation)
    return section


LISTED: dict[str, type[BaseModel]] = {
    "terms": Term,
    "forget_extra": ExtraSection,
    "retain_extra": ExtraSection,
}
"""Keys that hold a list of sections."""


def _siblings(at: Location) -> list[str]:
    section = _section_at(at)
    return list(section.model_fields) if section else []


def _allowed(at: Location) -> list[str]:
    """Give the literal values of a field."""
    section = _section_at(at)
    field = section.model_fields.get(str(at[-1])) if section else None
    return _literals(field.annotation) if field else []


def _literals(annotation: Any) -> list[str]:
    found = []
    for part in get_args(annotation):
        found += [part] if isinstance(part, str) else _literals(part)
    return found


def _stages(tree: Tree) -> Iterator[tuple[Location, Tree]]:
    """Give the recipe and what it trains first, each with the keys that lead there."""
    yield (), tree
    if isinstance(first := tree.get("first"), dict):
        yield ("first",), first


def _passthrough(tree: Tree) -> Iterator[Mistake]:
    for at, stage in _stages(tree):
        for mistake in _passed_through(stage.get("training")):
            yield replace(mistake, at=(*at, *mistake.at))


def _passed_through(training: Any) -> Iterator[Mistake]:
    declared = TrainingSection.model_fields
    if isinstance(training, Mapping):
        extras = {str(key): value for key, value in training.items() if key not in declared}
        for key, message in passthrough_mistakes(extras, declared).items():
            if message.startswith("unknown key") and key in OTHER_NAMES:
                message = f"unknown key; did you mean '{OTHER_NAMES[key]}'?"
            yield Mistake(("training", key), message)


def _objectives(tree: Tree) -> Iterator[Mistake]:
    """Check the terms of all stages against the objectives' signatures."""
    for at, stage in _stages(tree):
        for mistake in _of_terms(stage.get("terms")):
            yield replace(mistake, at=(*at, *mistake.at))


def _of_terms(terms: Any) -> Iterator[Mistake]:
    """Check terms against the objectives' signatures; that needs torch, so only terms do."""
    if not isinstance(terms, list):
        return
    from unlearn.objectives import (  # noqa: PLC0415 - imports torch
        OBJECTIVES,
        check_hyper,
        find,
        pair_mistake,
    )
    from unlearn.objectives.user import is_user_loss  # noqa: PLC0415

    for index, term in enumerate(terms):
        name = term.get("objective") if isinstance(term, dict) else None
        if isinstance(name, str) and is_user_loss(name):
            try:
                find(name)
            except UserError as error:
                yield Mistake(("terms", index, "objective"), str(error))
                continue
        elif isinstance(name, str) and name not in OBJECTIVES:
            close = did_you_mean(name, OBJECTIVES)
            message = f"{name!r} given; must be {_one_of(sorted(OBJECTIVES))}{close}"
            yield Mistake(("terms", index, "objective"), message)
            continue
        if isinstance(name, str):
            if why := pair_mistake(find(name), term.get("rejected")):
                yield Mistake(("terms", index, "rejected"), why)
            extras = {key: value for key, value in term.items() if key not in Term.model_fields}
            for key, value in extras.items():
                misspelt = key not in find(name).hyper and _closest(key, Term.model_fields)
                meant = [f"unknown key; did you mean 'terms.{index}.{misspelt}'?"]
                for why in meant if misspelt else check_hyper(name, {key: value}):
                    yield Mistake(("terms", index, key), why)


def _edit(tree: Tree) -> Iterator[Mistake]:
    """Check an edit against its signature."""
    section = tree.get("edit")
    name = section.get("name") if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(name, str):
        return
    from unlearn.edits import EDITS, check_hyper, terms_mistake  # noqa: PLC0415 - imports torch

    if name not in EDITS:
        message = f"{name!r} given; must be {_one_of(sorted(EDITS))}{did_you_mean(name, EDITS)}"
        yield Mistake(("edit", "name"), message)
        return
    if why := terms_mistake(name, bool(tree.get("terms"))):
        yield Mistake(("terms",), why)
    hyper = {key: value for key, value in section.items() if key not in EditSection.model_fields}
    wrong = [(key, why) for key in hyper for why in check_hyper(name, {key: hyper[key]})]
    for key, why in wrong:
        yield Mistake(("edit", key), why)
    if not wrong and (together := EDITS[name].check(EDITS[name].filled(hyper))):
        yield Mistake(("edit",), together)
