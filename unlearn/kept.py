"""A training on disk: one file with all that its next step depends on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unlearn.errors import UserError
from unlearn.runs import contents, open_tensors, write_tensors


@dataclass(frozen=True)
class Kept:
    """Where a training is kept, as what ``form``; ``what`` names it in messages."""

    path: Path
    form: str
    what: str

    def write(
        self,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        identity: Mapping[str, Any],
    ) -> None:
        """Write the file anew, completely or not at all."""
        about = {
            "format": self.form,
            "values": json.dumps(dict(values)),
            "identity": json.dumps(dict(identity)),
        }
        found = {name: one.cpu().contiguous() for name, one in tensors.items()}
        write_tensors(self.path, found, about)

    def read(self, identity: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Give what was kept last; None where there is no file.

        Raises:
            UserError: it cannot be read, or belongs to another training.
        """
        if not self.path.is_file():
            return None
        fresh = f"remove '{self.path}' to train from the beginning, or choose another --out"
        with open_tensors(self.path, self.form, self.what, fresh) as (file, about):
            _require_same(self.path, json.loads(about["identity"]), identity, fresh)
            return contents(file), json.loads(about["values"])


def _require_same(
    path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any], hint: str
) -> None:
    for key, ours in wanted.items():
        if stored.get(key) != ours:
            theirs = stored.get(key)
            told = (
                f"{key} {theirs}, not {ours}" if len(f"{theirs}{ours}") < 80 else f"another {key}"
            )
            raise UserError(f"'{path}' is of a training with {told}", hint)
