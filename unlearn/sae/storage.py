"""Dictionaries on disk: our own safetensors file, and whatever public format is found in its place.

Nothing is ever unpickled.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from unlearn.errors import UserError, unknown
from unlearn.runs import write_tensors
from unlearn.sae import formats
from unlearn.sae.dictionary import KINDS, TENSORS, Dictionary, built
from unlearn.sae.hook import Hook

FORMAT = "unlearn-sae-1"
FILE = "sae.safetensors"
KNOWN = (
    "sae.safetensors of `unlearn sae train`, or a folder as SAELens, sparsify, "
    "dictionary_learning, Gemma Scope (1 and 2) or Llama Scope publish it"
)
PUBLIC: dict[str, Callable[[Path], Dictionary]] = {
    "sae_weights.safetensors": formats.saelens,
    "params.npz": formats.gemma_scope,
    "params.safetensors": formats.gemma_scope_2,
    "checkpoints/final.safetensors": formats.llama_scope,
    "sae.safetensors": formats.sparsify,
    "ae.pt": formats.dictionary_learning,
}
"""Readers of public formats, by the file that tells them apart; each is given the folder."""


def save_dictionary(dictionary: Dictionary, path: Path) -> None:
    """Write a dictionary to one file, completely or not at all."""
    about = {
        "kind": dictionary.kind,
        "k": dictionary.k,
        "centred": dictionary.centred,
        "hook": dictionary.hook and asdict(dictionary.hook),
        "model": dictionary.model,
        "about": dict(dictionary.about),
    }
    weights = {name: one.cpu().contiguous() for name, one in dictionary.tensors().items()}
    write_tensors(path, weights, {"format": FORMAT, "dictionary": json.dumps(about)})


def load_dictionary(path: Path | str, *, device: str = "cpu") -> Dictionary:
    """Read a dictionary in float32: a file of ours, or a public format's file or folder.

    Raises:
        UserError: nothing of the kind, pickled, damaged, or weights that do not fit together.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"no dictionary '{path}'", f"give {KNOWN}")
    name, folder = _found(path)
    if name == FILE and _is_ours(folder / FILE):
        found = _ours(folder / FILE)
    elif path.is_file() and path.suffix == ".safetensors" and _is_ours(path):
        found = _ours(path)
    elif name is None:
        raise _unknown(path)
    else:
        found = PUBLIC[name](folder)
    return found.to(device)


def _found(path: Path) -> tuple[str | None, Path]:
    """Give the name that tells a format, and the folder it counts from."""
    if path.is_dir():
        return next((name for name in PUBLIC if (path / name).is_file()), None), path
    for name in PUBLIC:
        if path.as_posix().endswith(f"/{name}") or path.as_posix() == name:
            return name, path.parents[name.count("/")]
    return None, path.parent


def _unknown(path: Path) -> UserError:
    if path.suffix in (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt"):
        return UserError(
            f"'{path}' is named as a pickle, which may run code when it is opened: it is not read",
            "save the weights as safetensors; of pickles only dictionary_learning's ae.pt is "
            "taken, with weights alone",
        )
    what = "folder" if path.is_dir() else "file"
    names = sorted(one.name for one in path.iterdir())[:5] if path.is_dir() else []
    holds = f" (it holds {', '.join(names) or 'nothing'})" if path.is_dir() else ""
    return UserError(f"'{path}' is no {what} of a known format{holds}", f"give {KNOWN}")


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return bool((file.metadata() or {}).get("format") == FORMAT)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read '{path}': {error}", "copy or download it again") from error


def _ours(path: Path) -> Dictionary:
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})["dictionary"])
        weights: dict[str, Tensor] = {n: file.get_tensor(n).float() for n in file.keys()}  # noqa: SIM118
    hook = about.pop("hook")
    if about["kind"] not in KINDS:
        raise unknown("kind of dictionary", about["kind"], KINDS)
    tensors = {name: one for name, one in weights.items() if name in TENSORS}
    return built(
        str(path), about.pop("kind"), tensors, hook=Hook(**hook) if hook else None, **about
    )
