"""Steps that an edit has taken so far, on disk: an interrupted edit goes on after the last one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from unlearn.runs import write_tensors

FORMAT = "unlearn-edit-steps-1"


@dataclass(frozen=True)
class Kept:
    """A file with what has been added to each weight, in fp32, and a record of every step.

    ``identity`` names all that the steps depend on; a file of something else is not read.
    """

    place: Path
    identity: Mapping[str, Any]

    def load(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
        """Give what was kept last, or None where nothing of use is there."""
        if not self.place.is_file():
            return None
        try:
            with safe_open(self.place, framework="pt") as file:
                about = file.metadata() or {}
                known = json.loads(about.get("identity", "null"))
                if about.get("format") != FORMAT or known != dict(self.identity):
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        return tensors, json.loads(about["records"])

    def save(self, totals: Mapping[str, Tensor], records: list[dict[str, Any]]) -> None:
        """Write the file anew, completely or not at all."""
        about = {
            "format": FORMAT,
            "identity": json.dumps(dict(self.identity)),
            "records": json.dumps(records),
        }
        write_tensors(self.place, {n: one.cpu().contiguous() for n, one in totals.items()}, about)
