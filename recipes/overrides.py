"""Changes to a recipe before it is checked: nested keys, and ``--set KEY=VALUE`` texts.

Keys are dotted (``training.learning_rate``). A term is named by its place or its stream
(``terms.0.beta``, ``terms.retain.objective``; ``terms.forget`` also finds a term on other answers
to the forget rows). As in open-unlearning, ``gamma`` is the weight of the forget term and ``alpha``
that of the retain term, or, to post-train on pairs, of the term on rejected answers; a bare
hyperparameter such as ``beta`` means the one that is written in the recipe. Terms of the first
stage are named alike: ``first.terms.chosen.weight``.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from unlearn.data.pairs import POST_TRAINING
from unlearn.errors import UserError
from unlearn.recipes.mistakes import Mistake, RecipeError, section_type, unknown_key
from unlearn.recipes.schema import Recipe
from unlearn.recipes.terms import Term, rows_of
from unlearn.recipes.yaml_text import Location, Tree, parse

ALIASES = {"gamma": "terms.forget.weight", "alpha": "terms.retain.weight"}
POST_TRAINING_ALIASES = {"alpha": "terms.rejected.weight"}
FREE = ("columns", "template_args", "constraints")
"""Sections whose keys are the user's own."""


def overlay(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Tree:
    """Give a copy of ``base`` with ``changes`` on top: groups of keys merge, values replace."""
    merged = copy.deepcopy(dict(base))
    for key, value in changes.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, dict):
            merged[key] = overlay(below, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def apply_overrides(tree: Mapping[str, Any], overrides: Iterable[str]) -> Tree:
    """Give a copy of ``tree`` with every ``KEY=VALUE`` applied, in order.

    Raises:
        RecipeError: names every override that cannot be applied.
    """
    changed, mistakes = overridden(tree, overrides)
    if mistakes:
        raise RecipeError("--set", mistakes)
    return changed


def overridden(tree: Mapping[str, Any], overrides: Iterable[str]) -> tuple[Tree, list[Mistake]]:
    """Apply what can be applied; give the changed copy and what could not be applied."""
    changed, mistakes = copy.deepcopy(dict(tree)), []
    for text in overrides:
        key, equals, value = text.partition("=")
        try:
            if not equals or not key.strip():
                raise UserError(f"'{text}' is not KEY=VALUE")
            _set(changed, locate(changed, key.strip()), value)
        except UserError as error:
            mistakes.append(Mistake((f"--set {text}",), str(error)))
    return changed, mistakes


def locate(tree: Tree, key: str) -> Location:
    """Turn a key as users write it into its place in the recipe.

    Raises:
        UserError: no such key, or more than one term could be meant.
    """
    key = (POST_TRAINING_ALIASES if _posttrains(tree) else ALIASES).get(key, key)
    if "." not in key and key not in Recipe.model_fields:
        return _hyperparameter(tree, key)
    parts = key.split(".")
    if parts[0] == "terms" and len(parts) > 1:
        return "terms", _term_index(tree, parts[1]), *parts[2:]
    if parts[:2] == ["first", "terms"] and len(parts) > 2:
        first = tree.get("first")
        index = _term_index(first if isinstance(first, dict) else {}, parts[2])
        return "first", "terms", index, *parts[3:]
    _check_known(parts)
    return tuple(parts)


def _hyperparameter(tree: Tree, key: str) -> Location:
    written = [
        index
        for index, term in enumerate(_terms(tree))
        if key in term and key not in Term.model_fields
    ]
    if len(written) == 1:
        return "terms", written[0], key
    if written:
        places = " or ".join(f"terms.{index}.{key}" for index in written)
        raise UserError(f"'{key}' is written in {len(written)} terms; say {places}")
    raise UserError(unknown_key((key,), Recipe.model_fields))


def _posttrains(tree: Tree) -> bool:
    return any(term.get("on") in POST_TRAINING for term in _terms(tree))


def _terms(tree: Tree) -> list[dict[str, Any]]:
    terms = tree.get("terms")
    if not isinstance(terms, list):
        return []
    return [term if isinstance(term, dict) else {} for term in terms]


def _term_index(tree: Tree, name: str) -> int:
    terms = _terms(tree)
    listed = ", ".join(
        f"terms.{index} ({term.get('objective')} on {term.get('on')})"
        for index, term in enumerate(terms)
    )
    if name.isdecimal():
        found = [int(name)] if int(name) < len(terms) else []
    else:
        found = [index for index, term in enumerate(terms) if term.get("on") == name]
        found = found or [i for i, term in enumerate(terms) if _about(term) == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{len(found)} terms are on {name}; say which: {listed}")
    what = "no such term" if name.isdecimal() else f"no term is on '{name}'"
    raise UserError(f"{what}; there is {listed or 'none'}")


def _about(term: dict[str, Any]) -> str:
    """Name the rows that a term is about: a term on refusals is about the forget set."""
    return rows_of(str(term.get("on")))


def _check_known(parts: list[str]) -> None:
    """Refuse a key that the schema does not have; extra keys of ``training`` are checked later."""
    section: type[BaseModel] | None = Recipe
    for depth, part in enumerate(parts):
        if section is None:
            raise UserError(f"'{'.'.join(parts[:depth])}' is a value and has no keys below it")
        if part not in section.model_fields:
            if section.model_config.get("extra") == "allow" and depth == len(parts) - 1:
                return
            raise UserError(unknown_key(tuple(parts[: depth + 1]), section.model_fields))
        if part in FREE:
            return
        section = section_type(section.model_fields[part].annotation)


def _set(tree: Tree, at: Location, text: str) -> None:
    value = _value(at, text)
    holder: Any = tree
    for depth, part in enumerate(at[:-1]):
        if isinstance(holder, dict) and holder.get(part) is None:
            holder[part] = {}
        holder = holder[part]
        if not isinstance(holder, dict | list):
            where = ".".join(map(str, at[: depth + 1]))
            raise UserError(f"'{where}' holds {holder!r}, which has no keys below it")
    last: Any = at[-1]
    if _in_term(at) and last == "objective" and value != holder.get(last):
        for key in set(holder) - set(Term.model_fields):
            del holder[key]
    holder[last] = value


def _value(at: Location, text: str) -> Any:
    """Read a value as YAML; a key that holds text takes it as it stands, unless it is quoted."""
    try:
        value = parse(text)
    except ValueError as error:
        if _holds_text(at):
            return text
        raise UserError(f"the value is not valid YAML: {error}") from None
    quoted = text.lstrip()[:1] in ("'", '"')
    return text if _holds_text(at) and value is not None and not quoted else value


def _in_term(at: Location) -> int:
    """Give how many keys lead to a term, when a location is inside one; else 0."""
    return 3 if at[:2] == ("first", "terms") else 2 if at[0] == "terms" else 0


def _holds_text(at: Location) -> bool:
    inside = _in_term(at)
    section: type[BaseModel] | None = Term if inside else Recipe
    for part in at[inside:-1]:
        if section is None or part not in section.model_fields:
            return False
        section = section_type(section.model_fields[str(part)].annotation)
    field = section.model_fields.get(str(at[-1])) if section else None
    return field is not None and str in (field.annotation, *get_args(field.annotation))
