"""Recipes on disk. The folder is the registry: ``npo.yaml`` is a method, ``tofu/….yaml`` a preset.

Read, change, check and write them. A recipe is a file with changes on top: first the flags, then
``--set``. Everything wrong with the result is reported at once.
"""

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from unlearn.errors import UserError, did_you_mean
from unlearn.recipes.mistakes import Mistake, RecipeError, find_mistakes
from unlearn.recipes.overrides import apply_overrides, overlay, overridden
from unlearn.recipes.schema import Recipe
from unlearn.recipes.yaml_text import (
    Flow,
    Location,
    Tree,
    line_numbers,
    parse_tree,
    to_text,
)

__all__ = [
    "apply_overrides",
    "dump",
    "find",
    "json_schema",
    "load",
    "method_names",
    "overlay",
    "preset_names",
    "read",
    "recipe_names",
]

FOLDER = Path(__file__).resolve().parent
SUFFIXES = (".yaml", ".yml")


def method_names() -> list[str]:
    """Name the methods: the recipes at the top of the folder."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def preset_names() -> list[str]:
    """Name the presets, ``folder/name``: methods set up for one benchmark and model."""
    return sorted(f"{path.parent.name}/{path.stem}" for path in FOLDER.glob("*/*.yaml"))


def recipe_names() -> list[str]:
    """Name everything that ships: methods, then presets."""
    return method_names() + preset_names()


def find(name_or_path: str | Path) -> Path:
    """Give the file of a method, a preset or a path.

    Raises:
        UserError: no such recipe; names the closest one.
    """
    name = str(name_or_path)
    if name in recipe_names():
        return FOLDER / f"{name}.yaml"
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        hint = f"give the file: {path / 'recipe.yaml'}" if (path / "recipe.yaml").is_file() else ""
        raise UserError(f"'{name}' is a folder, not a recipe", hint or "give a YAML file")
    if path.suffix in SUFFIXES:
        raise UserError(f"no recipe file '{name}'", "`unlearn recipes list` shows what ships")
    raise UserError(
        f"unknown method or recipe '{name}'{did_you_mean(name, recipe_names())}",
        f"a method ({', '.join(method_names())}), a preset (`unlearn recipes list`) or a YAML file",
    )


def read(path: Path) -> Tree:
    """Read a recipe file as nested keys, unchecked.

    Raises:
        UserError: unreadable, not YAML (with the line), empty, a key given twice.
    """
    return parse_tree(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Read a recipe file as it stands.

    Raises:
        UserError: unreadable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"'{path}' is not UTF-8 text", "a recipe is a YAML text file") from None


def load(
    name_or_path: str | Path,
    overrides: Iterable[str] = (),
    changes: Mapping[str, Any] | None = None,
    *,
    lora: bool = False,
) -> Recipe:
    """Give the checked recipe of a file with changes on top.

    Args:
        name_or_path: a method, a preset or a YAML file.
        overrides: ``KEY=VALUE`` texts, applied last.
        changes: nested keys laid over the file, as flags give them.
        lora: train adapters; keeps the recipe's adapter settings where it has some.

    Raises:
        RecipeError: a :class:`UserError` with one line for every mistake.
    """
    path = find(name_or_path)
    text = read_text(path)
    written = parse_tree(text, str(path))
    tree, mistakes = overridden(overlay(written, changes or {}), overrides)
    if lora and isinstance(tree.get("model", {}), dict) and not tree.get("model", {}).get("lora"):
        tree = overlay(tree, {"model": {"lora": {}}})
    mistakes += _with_lines(find_mistakes(tree), text, written, tree)
    if mistakes:
        raise RecipeError(str(name_or_path), mistakes)
    return Recipe.model_validate(tree)


def _with_lines(mistakes: Iterable[Mistake], text: str, written: Tree, tree: Tree) -> list[Mistake]:
    """Add line numbers to mistakes that stand in the file, not in a flag or an override."""
    lines, found = line_numbers(text), []
    for mistake in mistakes:
        at, from_file = mistake.at, _at(written, mistake.at) == _at(tree, mistake.at)
        while at and at not in lines:  # a missing key: the line of the group it belongs to
            at = at[:-1]
        found.append(replace(mistake, line=lines[at] if at and from_file else None))
    return sorted(found, key=lambda mistake: mistake.line or 0)


def _at(tree: Any, at: Location) -> Any:
    for part in at:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def dump(recipe: Recipe) -> str:
    """Write a recipe with all its values as YAML; it opens with the command that repeats it."""
    tree = recipe.model_dump(mode="json")
    for stage in (tree, tree["first"] or {}):
        if "terms" in stage:
            stage["terms"] = [Flow(term) for term in stage["terms"]]
    return f"# {command(recipe)}\n{to_text(tree)}"


def command(recipe: Recipe) -> str:
    """Give the command that runs a recipe (again), in a new folder."""
    if recipe.out is None:
        parts = ["unlearn", "run", "RECIPE.yaml", "--out", f"runs/{recipe.method}"]
    else:
        out = recipe.out.rstrip("/")
        parts = ["unlearn", "run", f"{out}/recipe.yaml", "--out", f"{out}-again"]
    return "".join(c if c.isprintable() else "?" for c in shlex.join(parts))


def json_schema() -> dict[str, Any]:
    """Give the JSON Schema of a recipe, for editors: keys, values, bounds, explanations.

    Objectives, their hyperparameters and the fields of TrainingArguments are in it, so this imports
    torch.
    """
    from unlearn.recipes.editor import schema_for_editors  # noqa: PLC0415 - imports torch

    return schema_for_editors()
