"""``--recipe FILE``: the options of a command as keys of a YAML file; what is typed comes first."""

from pathlib import Path
from typing import Annotated, Any

import typer

NOT_KEYS = frozenset(("recipe", "help"))


def take_recipe(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make the values of a file the defaults of the command's options and arguments.

    Keys are the names of options with underscores (``text_field``), and those of arguments.

    Raises:
        UserError: no such file, or a key that the command has not.
    """
    from unlearn.errors import UserError, did_you_mean
    from unlearn.recipes.files import read

    if path is None:
        return None
    if not path.is_file():
        raise UserError(f"no file '{path}'", "give a YAML file with this command's options as keys")
    keys, found = _keys(ctx.command), {}
    for key, value in read(path).items():
        if key not in keys:
            raise UserError(
                f"'{path}': unknown key '{key}'{did_you_mean(key, keys)}",
                f"one of {', '.join(sorted(keys))}",
            )
        found[keys[key].name] = _fitting(path, key, value, keys[key])
    ctx.default_map = found
    return path


def _fitting(path: Path, key: str, value: Any, parameter: Any) -> Any:
    """Let one value stand for a list of one; refuse a list where one value is meant."""
    from unlearn.errors import UserError

    several = parameter.multiple
    if several and not isinstance(value, list):
        return [value]
    if isinstance(value, list | dict) and not several:
        raise UserError(f"'{path}': {key} is one value, not {value}", f"write {key}: VALUE")
    return value


def _keys(command: Any) -> dict[str, Any]:
    """Map what people write to the parameter that it is for."""
    keys = {}
    for parameter in command.params:
        long = next((name for name in parameter.opts if name.startswith("--")), parameter.name)
        keys[long.removeprefix("--").replace("-", "_")] = parameter
    return {key: one for key, one in keys.items() if one.name not in NOT_KEYS}


RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        help="YAML file with these options as keys.",
        is_eager=True,
        callback=take_recipe,
    ),
]
