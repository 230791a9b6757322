"""A sweep: recipes times a grid of settings times seeds, each cell an ordinary run folder."""

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from unlearn.errors import UserError
from unlearn.recipes.files import find, load, read
from unlearn.recipes.inputs import absolute, check_inputs
from unlearn.recipes.mistakes import RecipeError
from unlearn.recipes.overrides import overlay
from unlearn.recipes.schema import Recipe
from unlearn.recipes.section import Section
from unlearn.runs import RunFolder

RECORD = "sweep.json"
LONGEST = 120
"""Characters of a folder's name; file systems allow 255 bytes."""
Text = Annotated[tuple[str, ...], Field(strict=False)]
State = Literal["new", "begun", "complete"]


class Sweep(Section):
    """What is swept; as YAML a file of these keys, in which `recipes` must be given."""

    recipes: Annotated[Text, Field(min_length=1)]
    """Methods, presets or files; each is run with every setting and seed."""
    grid: dict[str, Annotated[tuple[Any, ...], Field(strict=False, min_length=1)]] = Field(
        default_factory=dict
    )
    """Recipe key -> its values; all combinations are run."""
    seeds: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] | None = None
    """Seeds of every combination; null takes the recipe's own."""
    random: int | None = Field(default=None, ge=1)
    """Run so many combinations only, drawn once and for all with seed 0."""
    set: Text = ()
    """`KEY=VALUE` texts for all cells."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Keys of a recipe, laid over all recipes: `{model: {path: …}, data: {forget: …}}`."""
    lora: bool = False
    """Train adapters alone in all cells."""
    out: str = Field(min_length=1)
    """Folder of the sweep; each cell is a folder in it."""

    @model_validator(mode="after")
    def _nothing_twice(self) -> Self:
        lists = {"recipes": self.recipes, "seeds": self.seeds or (), **self.grid}
        for name, values in lists.items():
            texts = [value_text(value) for value in values]
            if twice := next((text for text in texts if texts.count(text) > 1), None):
                raise ValueError(f"{name}: {twice} is given twice")
        if self.seeds and "seed" in self.grid:
            raise ValueError("grid: seed is given with seeds; give one of them")
        return self


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: its name, what was set, and the checked recipe."""

    name: str
    settings: Mapping[str, str]
    seed: int
    recipe: Recipe

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(str(self.recipe.out)))

    @property
    def state(self) -> State:
        """Say whether the run is complete, was begun, or is still to be started."""
        if self.folder.results.is_file():
            return "complete"
        return "begun" if self.folder.recipe.is_file() else "new"


def sweep_of(given: Mapping[str, Any]) -> Sweep:
    """Check the keys of a sweep.

    Raises:
        UserError: names every mistake.
    """
    try:
        return Sweep.model_validate(given)
    except ValidationError as error:
        lines = []
        for one in error.errors(include_url=False):
            at = ".".join(map(str, one["loc"]))
            known = f"; one of {', '.join(Sweep.model_fields)}"
            text = str(one.get("ctx", {}).get("error", one["msg"]))
            text = f"unknown key{known}" if one["type"] == "extra_forbidden" else text
            lines.append(f"{at}: {text}" if at else text)
        raise UserError("\n  ".join(["the sweep cannot run:", *lines])) from None


def is_sweep_file(name: str) -> bool:
    """Tell a file that describes a sweep from a recipe: it has the key ``recipes``."""
    path = Path(name).expanduser()
    return path.suffix in (".yaml", ".yml") and path.is_file() and "recipes" in read(path)


def find_sweep(name: str) -> dict[str, Any]:
    """Read a file that describes a sweep, unchecked; its first comment may be the command."""
    return dict(read(Path(name).expanduser()))


def value_text(value: Any) -> str:
    """Write a value as one would after ``--set KEY=``."""
    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("...").strip()


def cells_of(sweep: Sweep) -> list[Cell]:
    """Give every cell with its checked recipe, seeds of one setting side by side.

    Raises:
        UserError: names the mistakes of all cells, each once.
    """
    cells, mistakes = [], dict[str, list[str]]()
    for recipe, settings in _combinations(sweep):
        for seed in sweep.seeds or (None,):
            name = _name(recipe, settings, seed, sweep)
            try:
                cells.append(_cell(sweep, recipe, settings, seed, name))
            except RecipeError as error:
                for mistake in error.mistakes:
                    mistakes.setdefault(f"{recipe}: {mistake}", []).append(name)
            except UserError as error:
                mistakes.setdefault(str(error), []).append(name)
    if mistakes:
        raise UserError("\n  ".join([_counted(len(mistakes)), *_told(mistakes)]))
    names = [cell.name for cell in cells]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two cells would be called '{twice}'", "give fewer or shorter values")
    return cells


def _counted(mistakes: int) -> str:
    return f"the sweep has {mistakes} mistake{'s' if mistakes > 1 else ''}; nothing was started:"


def _told(mistakes: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for text, names in mistakes.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{text} (in {names[0]}{more})"


def _combinations(sweep: Sweep) -> list[tuple[str, dict[str, str]]]:
    values = [[(key, value_text(v)) for v in many] for key, many in sweep.grid.items()]
    found = [
        (recipe, dict(chosen)) for recipe in sweep.recipes for chosen in itertools.product(*values)
    ]
    if sweep.random is None or sweep.random >= len(found):
        return found
    drawn = random.Random(0).sample(range(len(found)), sweep.random)
    return [found[place] for place in sorted(drawn)]


def _cell(
    sweep: Sweep, recipe: str, settings: Mapping[str, str], seed: int | None, name: str
) -> Cell:
    overrides = [*sweep.set, *(f"{key}={text}" for key, text in settings.items())]
    changes = overlay(sweep.base, {"out": str(Path(sweep.out) / name)})
    if seed is not None:
        changes["seed"] = seed
    resolved = load(recipe, overrides, changes, lora=sweep.lora)
    resolved.require_runnable()
    return Cell(name, settings, resolved.seed, resolved)


def _name(recipe: str, settings: Mapping[str, str], seed: int | None, sweep: Sweep) -> str:
    """Name a cell for people: ``npo_learning_rate=1e-5_seed=0``."""
    path = Path(recipe)
    parts = [path.stem if path.suffix in (".yaml", ".yml") else recipe.replace("/", "-")]
    parts += [f"{_short(key, sweep.grid)}={text}" for key, text in settings.items()]
    parts += [] if seed is None else [f"seed={seed}"]
    return re.sub(r"[^\w.=+-]+", "-", "_".join(parts))[:LONGEST].strip("-.") or "cell"


def _short(key: str, grid: Mapping[str, Any]) -> str:
    """Give the last part of a key, or all of it where another key ends alike."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in grid) == 1 else key


def check_cells(cells: Sequence[Cell], out: Path, *, offline: bool) -> None:
    """Refuse a folder that is not this sweep's, and inputs that would fail a cell later.

    Raises:
        UserError: names what is wrong.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"'{out}' is a file", "choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file():
        raise UserError(f"'{out}' holds something that is no sweep", "choose another --out")
    for cell in cells:
        if cell.state != "new":
            _require_same(cell)
    waiting = [cell for cell in cells if cell.state != "complete"]
    for recipe in {_inputs(cell.recipe): cell.recipe for cell in waiting}.values():
        check_inputs(recipe.model_copy(update={"out": None}))
    _check_prepared(waiting, offline=offline)


def _inputs(recipe: Recipe) -> str:
    """Give what is read before any weights are, as one text."""
    parts = recipe.model_dump(mode="json")
    return repr([parts[name] for name in ("model", "data", "evals")])


def _check_prepared(cells: Sequence[Cell], *, offline: bool) -> None:
    if not cells:
        return
    from unlearn.recipes.prepare import prepare  # noqa: PLC0415 - imports torch
    from unlearn.recipes.selectors import check_choice  # noqa: PLC0415 - imports torch

    seen: dict[str, Any] = {}
    for cell in cells:
        data = cell.recipe.data.model_copy(update={"select": None})
        key = _inputs(cell.recipe.model_copy(update={"data": data}))
        if key not in seen:
            seen[key] = prepare(cell.recipe, offline=offline)
        check_choice(_with(seen[key], cell.recipe))


def _with(prepared: Any, recipe: Recipe) -> Any:
    from dataclasses import replace  # noqa: PLC0415

    return replace(prepared, recipe=recipe)


def _require_same(cell: Cell) -> None:
    """Refuse a folder that holds a run of another recipe.

    Raises:
        UserError: names the settings that differ.
    """
    stored = load(str(cell.folder.recipe), (), {"out": cell.recipe.out})
    ours, theirs = (absolute(one).model_dump(mode="json") for one in (cell.recipe, stored))
    if keys := list(_different(ours, theirs)):
        raise UserError(
            f"'{cell.folder.path}' holds a run with another {', '.join(keys[:4])}",
            "choose another --out, or remove the folder",
        )


def _different(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in dict.fromkeys([*ours, *theirs]):
            yield from _different(ours.get(key), theirs.get(key), f"{path}.{key}".strip("."))
    elif ours != theirs:
        yield path


def method_of(recipe: str) -> str:
    """Give the method of a recipe by its name or file."""
    return str(read(find(recipe)).get("method", recipe))


def split_values(text: str) -> list[str]:
    """Cut ``1,[2,3],"a,b"`` at the commas that stand outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += letter in "[{" and not quote
        depth -= letter in "]}" and not quote
        if letter == "," and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]
