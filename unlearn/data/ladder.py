"""What can be said of pairs by two models before and after they answer. Imports no torch."""

import filecmp
from collections.abc import Mapping
from pathlib import Path

from unlearn.errors import UserError

ENDLESS, EMPTY, SAME = "an answer without an end", "an empty answer", "the same answer twice"
"""Why two answers make no pair."""
WHAT_TO_DO = {
    ENDLESS: "raise --max-new-tokens",
    EMPTY: "take models that answer such prompts",
    SAME: "take models that differ more",
}
WEIGHTS = ("*.safetensors", "*.bin", "adapter_config.json")
"""Files that decide which model a folder holds; an adapter's names its base."""


def check_different(chosen: str, rejected: str) -> None:
    """Refuse one model for both sides: the same name or folder, or folders of the same weights.

    Files of weights are compared byte by byte; of different models they differ near the start.

    Raises:
        UserError: greedy answers of both would be the same, and no pair would be left.
    """
    one, other = Path(chosen).expanduser(), Path(rejected).expanduser()
    same = chosen == rejected or one.resolve() == other.resolve()
    if same or _same_weights(one, other):
        which = f"'{chosen}' is" if same else f"'{chosen}' and '{rejected}' hold the same weights:"
        given = (
            "given as both the chosen and the rejected model" if same else "no pair would differ"
        )
        raise UserError(f"{which} {given}", "give a larger and a smaller model of a family")


def _same_weights(one: Path, other: Path) -> bool:
    ours, theirs = _weights(one), _weights(other)
    if not ours or ours.keys() != theirs.keys():
        return False
    sizes = ((ours[name].stat().st_size, theirs[name].stat().st_size) for name in ours)
    if any(a != b for a, b in sizes):
        return False
    return all(filecmp.cmp(ours[name], theirs[name], shallow=False) for name in ours)


def _weights(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    return {path.name: path for pattern in WEIGHTS for path in sorted(folder.glob(pattern))}


def no_pair_left(source: str, counts: Mapping[str, int]) -> UserError:
    """Say why two models' answers left no pair, and what would help against these causes alone.

    ``counts`` has ``prompts`` and how many of them each of :data:`ENDLESS`, :data:`EMPTY` and
    :data:`SAME` left out.
    """
    causes = [name for name in WHAT_TO_DO if counts.get(name)]
    told = ", ".join(f"{counts[name]} with {name}" for name in causes)
    n = counts["prompts"]
    message = f"no pair is left of '{source}': of {n} prompt{'s' * (n != 1)}, {told}"
    return UserError(message, ", or ".join(WHAT_TO_DO[name] for name in causes))
