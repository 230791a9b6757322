"""The embedded default: a tiny model forgets a few made-up people, offline."""

import time
from collections.abc import Iterable
from pathlib import Path

from unlearn.data.people import demo_folder, write_people
from unlearn.recipes.files import load
from unlearn.recipes.schema import Recipe
from unlearn.runs import cache_folder


def quickstart_recipe(out: Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """Write the made-up people to the cache and give the recipe that forgets some of them."""
    people = cache_folder() / "quickstart-people"
    write_people(people)
    models = demo_folder()
    changes = {
        "model": {"path": str(models / "target"), "retain_model": str(models / "retain")},
        "data": {"forget": f"{people}#forget", "retain": f"{people}#retain"},
        "out": str(out or Path("runs") / time.strftime("quickstart-%Y%m%d-%H%M%S")),
    }
    return load("demo/npo", overrides, changes)
