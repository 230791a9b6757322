"""From the options of a command about runs to the checked recipe."""

from typing import Any

from unlearn.cli.data import columns_of


def changes_of(map_: list[str] | None, **given: Any) -> dict[str, Any]:
    """Give the recipe keys that the options about what is run change."""
    places = {
        "model": ("model", "path"),
        "forget": ("data", "forget"),
        "retain": ("data", "retain"),
        "pairs": ("data", "pairs"),
        "text": ("data", "text"),
    }
    changes: dict[str, Any] = {"data": {"columns": columns_of(map_)}} if map_ else {}
    for name, value in given.items():
        if value is None:
            continue
        if name in places:
            section, key = places[name]
            changes.setdefault(section, {})[key] = value
        else:
            changes[name] = str(value)
    return changes


def resolve(
    method: str,
    preset: str | None,
    changes: dict[str, Any],
    overrides: list[str],
    lora: bool,
    *,
    here: bool = True,
) -> Any:
    """Give the checked recipe; ``here``: it is run on this machine, whose files are looked at."""
    from unlearn.errors import UserError, unknown
    from unlearn.recipes.files import find, load, read, recipe_names
    from unlearn.recipes.inputs import check_early

    if preset and method not in recipe_names():
        raise unknown("method", method, (name for name in recipe_names() if "/" not in name))
    if preset and (meant := read(find(preset)).get("method")) != method:
        message = f"recipe '{preset}' is for method '{meant}', not '{method}'"
        raise UserError(message, f"unlearn run {meant} --recipe {preset} …")
    if here:
        check_early(preset or method, overrides, changes)
    return load(preset or method, overrides, changes, lora=lora)
