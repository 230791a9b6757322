"""Steps that an edit has taken so far, on disk: an interrupted edit goes on after the last one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unlearn.errors import UserError
from unlearn.runs import contents, open_tensors, write_tensors

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
            with open_tensors(self.place, FORMAT, "steps of an edit", "") as (file, about):
                if json.loads(about["identity"]) != dict(self.identity):
                    return None
                return contents(file), json.loads(about["records"])
        except UserError:
            return None

    def save(self, totals: Mapping[str, Tensor], records: list[dict[str, Any]]) -> None:
        """Write the file anew, completely or not at all."""
        about = {
            "format": FORMAT,
            "identity": json.dumps(dict(self.identity)),
            "records": json.dumps(records),
        }
        write_tensors(self.place, {n: one.cpu().contiguous() for n, one in totals.items()}, about)
