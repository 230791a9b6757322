"""Remove data from language models and show evidence a reader can check.

The public names are loaded on first use, so that importing the package stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlearn.objectives import batch_loss
    from unlearn.recipes.files import load as load_recipe
    from unlearn.recipes.run import run
    from unlearn.scores import Scorer, Scores

__version__ = "0.1.0"
__all__ = ["Scorer", "Scores", "batch_loss", "load_recipe", "run"]

_PLACES = {
    "Scorer": ("unlearn.scores", "Scorer"),
    "Scores": ("unlearn.scores", "Scores"),
    "batch_loss": ("unlearn.objectives", "batch_loss"),
    "load_recipe": ("unlearn.recipes.files", "load"),
    "run": ("unlearn.recipes.run", "run"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
