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
        found[keys[key]] = value
    ctx.default_map = found
    return path


def _keys(command: Any) -> dict[str, str]:
    """Map what people write to what the function calls it."""
    keys = {}
    for parameter in command.params:
        long = next((name for name in parameter.opts if name.startswith("--")), parameter.name)
        keys[long.removeprefix("--").replace("-", "_")] = parameter.name
    return {key: name for key, name in keys.items() if name not in NOT_KEYS}


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
