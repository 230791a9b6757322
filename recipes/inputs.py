"""What a recipe names on disk: found early, and named so that it is found again from anywhere.

Nothing here imports torch: a wrong path is reported before the slow imports.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from unlearn.data.answers import BELONGS, alternates_of, check_answerable, read_refusals
from unlearn.data.pairs import sides_of
from unlearn.data.readers import kind_of
from unlearn.data.rows import Row, rename_columns
from unlearn.data.sources import Source, load_any_rows, load_rows, load_variants
from unlearn.errors import UserError
from unlearn.recipes.files import find, overlay, read
from unlearn.recipes.measuring import EvalsSection
from unlearn.recipes.overrides import overridden
from unlearn.recipes.schema import DataSection, Recipe
from unlearn.recipes.sections import EditSection
from unlearn.recipes.terms import Term
from unlearn.runs import RunFolder

EDIT_FILES = ("factors", "update", "dictionary", "selected")
"""Hyperparameters of edits that name a file, or a list of them."""
SOURCES = ("forget", "retain", "unseen", "pairs", "text", "heldout")
"""Keys under ``data`` that name rows."""
LARGEST_EARLY = 2**26
"""Files above this many bytes are not read twice."""


def check_early(name: str, overrides: Iterable[str], changes: Mapping[str, Any]) -> None:
    """Refuse what is missing or wrong on disk, if the recipe's keys are right at first sight.

    A recipe that is not right is left to ``unlearn.recipes.files.load``, which names every mistake.

    Raises:
        UserError: a required key is missing, a file or folder is not there or not usable.
    """
    tree, mistakes = overridden(overlay(read(find(name)), changes), overrides)
    if mistakes:
        return
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError:
        return
    recipe.require_runnable()
    check_inputs(recipe)


def check_inputs(recipe: Recipe) -> None:
    """Refuse an output folder in use, model folders that are not there and unusable data files."""
    if recipe.out:
        check_new(Path(recipe.out))
    for path in (recipe.model.path, recipe.model.retain_model):
        check_model_folder(path)
    check_update_file(update_of(recipe))
    check_dictionary_files(recipe)
    if any(stream.endswith("refusal") for stream in recipe.read_streams()):
        read_refusals(recipe.data.refusals)
    for name in ("forget", "retain", "unseen"):
        spec = getattr(recipe.data, name)
        rows = _check_source(spec, recipe.data.columns) if spec else []
        for stream in sorted(recipe.read_streams()):
            if BELONGS.get(stream) == name and rows:
                check_answerable(rows, stream, spec)
                if stream == "alternate":
                    alternates_of(rows, spec)
    if (pairs := recipe.data.pairs) and _is_small_file(pairs):
        columns = recipe.data.columns
        sides_of(rename_columns(load_any_rows(pairs), columns, pairs), pairs)
    for spec in filter(None, (recipe.data.text, recipe.data.heldout)):
        _check_source(spec, recipe.data.columns)
    _check_more(recipe.data)


def _check_more(data: DataSection) -> None:
    """Check files that add rows, or name rows."""
    for extra in (*data.forget_extra, *data.retain_extra):
        if _is_small_file(extra.source):
            load_variants(extra.source, columns=extra.columns, take=extra.take)
    select = data.select
    if select and select.manifest and not Path(select.manifest).is_file():
        hint = "make one with `unlearn data select`"
        raise UserError(f"no selection file '{select.manifest}'", hint)


def check_model_folder(path: str | None) -> None:
    """Refuse a model folder that is not there; hub names and None pass."""
    if path and is_path(path) and not Path(path).exists():
        raise UserError(f"no model folder '{path}'", "give a folder or a hub name owner/name")


def update_of(recipe: Recipe) -> str | None:
    """Give the file of the update that the recipe's edit adds again; None for other recipes."""
    found = recipe.edit.hyper.get("update") if recipe.edit else None
    return found if isinstance(found, str) else None


def check_update_file(path: str | None) -> None:
    """Refuse an update that is not there; None passes."""
    if path is not None and not Path(path).is_file():
        hint = "name the update.safetensors of a run, or make one: unlearn edit diff"
        raise UserError(f"no update file '{path}'", hint)


def dictionaries_of(recipe: Recipe) -> list[str]:
    """Give the files of the dictionaries that the recipe's edit reads; none for other recipes."""
    found = recipe.edit.hyper.get("dictionary") if recipe.edit else None
    return [found] if isinstance(found, str) else list(found or ())


def check_dictionary_files(recipe: Recipe) -> None:
    """Refuse dictionaries, or a file of chosen features, that are not there."""
    for path in dictionaries_of(recipe):
        if not Path(path).expanduser().exists():
            hint = "give what `unlearn sae train` wrote, or a public dictionary"
            raise UserError(f"no dictionary '{path}'", hint)
    selected = recipe.edit.hyper.get("selected") if recipe.edit else None
    if isinstance(selected, str) and not Path(selected).is_file():
        raise UserError(f"no file of features '{selected}'", "make one with `unlearn sae select`")


def check_new(out: Path) -> None:
    """Refuse an output folder that has something in it or cannot be written; makes nothing."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        RunFolder.create(out)
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "it cannot be written" if place.is_dir() else "it is a file"
        raise UserError(f"cannot make '{out}' in '{place}': {why}", "choose another --out")


def is_path(model: str) -> bool:
    """Tell a folder from a hub name: the hub's are ``owner/name``."""
    return model.startswith((".", "/", "~")) or model.count("/") != 1


def _check_source(spec: str, columns: Mapping[str, str]) -> list[Row]:
    """Give the rows of a file, once they are checked; none of what is large or no file."""
    return load_rows(spec, columns=columns) if _is_small_file(spec) else []


def _is_small_file(spec: str) -> bool:
    """Tell whether a source names a file that is quickly read, or one that is not there."""
    file = Source.parse(spec).local
    if file.is_file():
        return file.stat().st_size <= LARGEST_EARLY
    return kind_of(file) is not None and not file.exists()


def absolute(recipe: Recipe) -> Recipe:
    """Give the recipe with every path that exists here, and ``out``, made absolute."""
    model, data = recipe.model, recipe.data
    paths = {name: getattr(model, name) for name in ("path", "retain_model")}
    return recipe.model_copy(
        update={
            "model": model.model_copy(update={k: _absolute(v) for k, v in paths.items()}),
            "data": data.model_copy(update=_absolute_data(data)),
            "evals": _absolute_evals(recipe.evals),
            "terms": _absolute_terms(recipe.terms),
            "first": recipe.first
            and recipe.first.model_copy(update={"terms": _absolute_terms(recipe.first.terms)}),
            "edit": recipe.edit and _absolute_edit(recipe.edit),
            "out": recipe.out and str(Path(recipe.out).absolute()),
        }
    )


def absolute_places(model: str | None, data: str | None) -> tuple[str | None, str | None]:
    """Give a model's path and a data source absolute, where they exist here."""
    return _absolute(model), _absolute_spec(data)


def _absolute_edit(edit: EditSection) -> EditSection:
    """Make the files that an edit names absolute, whether they exist yet or not."""
    named = {key: edit.hyper[key] for key in EDIT_FILES if edit.hyper.get(key)}
    places = {
        key: [_place(one) for one in place] if isinstance(place, list) else _place(place)
        for key, place in named.items()
    }
    return type(edit).model_validate({"name": edit.name, **edit.hyper, **places})


def _place(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _absolute_data(data: DataSection) -> dict[str, Any]:
    changes: dict[str, Any] = {name: _absolute_spec(getattr(data, name)) for name in SOURCES}
    changes["refusals"] = _absolute(data.refusals)
    for name in ("forget_extra", "retain_extra"):
        changes[name] = tuple(
            one.model_copy(update={"source": _absolute_spec(one.source)})
            for one in getattr(data, name)
        )
    if data.select and data.select.manifest:
        place = {"manifest": _absolute(data.select.manifest)}
        changes["select"] = data.select.model_copy(update=place)
    return changes


def _absolute_terms(terms: Iterable[Term]) -> tuple[Term, ...]:
    return tuple(_absolute_term(term) for term in terms)


def _absolute_term(term: Term) -> Term:
    file, mark, function = term.objective.rpartition(":")
    found = _absolute(str(Path(file).expanduser())) if mark else None
    return term.model_copy(update={"objective": f"{found}:{function}"}) if found else term


def _absolute_evals(evals: EvalsSection) -> EvalsSection:
    changes: dict[str, Any] = {}
    if tofu := evals.tofu:
        paths = {name: _absolute(getattr(tofu, name)) for name in ("data", "retain_logs")}
        holdout = _absolute_spec(tofu.holdout)
        changes["tofu"] = tofu.model_copy(update=paths | {"holdout": holdout})
    if familiarity := evals.familiarity:
        holdout = _absolute_spec(familiarity.holdout)
        changes["familiarity"] = familiarity.model_copy(update={"holdout": holdout})
    if math := evals.math:
        changes["math"] = math.model_copy(update={"data": _absolute_spec(math.data)})
    if tasks := evals.lm_eval:
        changes["lm_eval"] = tasks.model_copy(update={"data": _absolute(tasks.data)})
    return evals.model_copy(update=changes)


def _absolute(path: str | None) -> str | None:
    if path is None or not Path(path).exists():
        return path
    return str(Path(path).absolute())


def _absolute_spec(spec: str | None) -> str | None:
    source = spec and Source.parse(spec)
    if not spec or not source or not source.local.exists():
        return spec
    found = str(source.local.absolute())
    full = found + spec.removeprefix(source.path)
    # a folder further up may have a # or : in its name, which would be read as part of the source
    return full if Source.parse(full).path == found else spec
