"""Results of evaluations kept on disk, so that the same question is never asked twice.

One SQLite file per model holds what it said: the scores of token sequences and the answers to
prompts, under a hash of everything they depend on. Each entry carries a checksum, so a damaged one
is computed again. Whatever goes wrong with the file costs a warning and time, never a number.
"""

import hashlib
import json
import sqlite3
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unlearn.data.encode import Example
from unlearn.head import plain
from unlearn.ranks import Ranks
from unlearn.scoring import num_labelled

LAYOUT = 1
"""Raise when the meaning of what is stored changes."""
CHECKSUM = 16
AT_ONCE = 500
"""Keys per query: SQLite takes 999 values at most in its oldest builds."""
PATIENCE = 30.0
"""Seconds to wait for another process that is writing."""


def model_key(model: Any, weights_hash: str) -> str:
    """Hash all that decides a model's numbers: weights, architecture, precision, adapters."""
    adapters = {
        name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()
    }
    off = any(getattr(module, "disable_adapters", False) is True for module in model.modules())
    active = None if off else getattr(model, "active_adapters", None)
    parts = [LAYOUT, weights_hash, str(model.dtype), plain(model).config.to_json_string()]
    text = json.dumps([*parts, adapters, active], sort_keys=True, default=_in_order)
    return hashlib.sha256(text.encode()).hexdigest()


def _in_order(value: object) -> object:
    """Write what JSON does not know; a set in another process has another order."""
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)


def sequence_key(example: Example) -> bytes:
    """Identify a sequence and which of its tokens are labelled."""
    return _digest("sequence", example.input_ids, example.labels)


def answer_key(prompt: Sequence[int], max_new_tokens: int, stops: Collection[int]) -> bytes:
    """Identify a prompt and what ends its answer."""
    return _digest("answer", prompt, [max_new_tokens, *sorted(stops)])


def _digest(kind: str, *lists: Sequence[int]) -> bytes:
    return hashlib.sha256(json.dumps([kind, *map(list, lists)]).encode()).digest()


@dataclass
class Store:
    """The file of one model's results; :meth:`find` and :meth:`keep` never fail.

    ``warned`` names what went wrong: ``read``, ``write``, ``damaged``.
    """

    path: Path
    warned: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, folder: Path, model: Any, weights_hash: str) -> "Store":
        """Name the file for a model; nothing is opened yet."""
        return cls(folder / "evaluations" / f"{model_key(model, weights_hash)}.sqlite")

    def find(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Give what is stored under each key, None where there is nothing sound."""
        found: dict[bytes, bytes] = {}
        if "read" not in self.warned and self.path.exists():
            try:
                found = self._read(keys)
            except (sqlite3.Error, OSError) as error:
                self._give_up("read", error)
        return [found.get(key) for key in keys]

    def keep(self, entries: Mapping[bytes, bytes]) -> None:
        """Store entries; those already there are replaced."""
        rows = [(key, _checksum(key, value) + value) for key, value in entries.items()]
        if not rows or "write" in self.warned:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._open()) as connection, connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS entries"
                    " (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"
                )
                connection.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?)", rows)
        except (sqlite3.Error, OSError) as error:
            self._give_up("write", error)

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=PATIENCE)
        connection.execute("PRAGMA synchronous = OFF")  # what a power cut damages, a checksum shows
        return connection

    def _read(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        found = {}
        with closing(self._open()) as connection:
            table = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'entries'")
            if table.fetchone() is None:  # another process has only just made the file
                return {}
            for start in range(0, len(keys), AT_ONCE):
                part = keys[start : start + AT_ONCE]
                marks = ",".join("?" * len(part))
                query = f"SELECT key, value FROM entries WHERE key IN ({marks})"
                for key, value in connection.execute(query, part):
                    if isinstance(value, bytes) and value[:CHECKSUM] == _checksum(
                        key, value[CHECKSUM:]
                    ):
                        found[key] = value[CHECKSUM:]
        return found

    def _give_up(self, what: str, error: Exception) -> None:
        """Warn and try no more; only a file that is no database makes room for another."""
        problem = f"cannot {what} {self.path}"
        if type(error) is sqlite3.DatabaseError:
            what, problem = "damaged", f"{self.path} is damaged and is begun anew"
            with suppress(OSError):
                self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)
                self.path.unlink(missing_ok=True)
        if what not in self.warned:
            self.warned.add(what)
            warnings.warn(f"results are not reused: {problem}: {error}", stacklevel=4)


def _checksum(key: bytes, value: bytes) -> bytes:
    return hashlib.blake2b(key + value, digest_size=CHECKSUM).digest()


@dataclass(frozen=True)
class Recall:
    """What is known of a model from earlier evaluations: nothing without a store.

    With several ranks, the first one reads and writes; all of them know what it found.
    """

    store: Store | None
    ranks: Ranks

    def scores(self, examples: Sequence[Example], columns: int, dtype: torch.dtype) -> list[Any]:
        """Give [column, labelled token] of each example, None where it is to be scored."""
        found: list[Tensor | None] = []
        keys = [sequence_key(example) for example in examples] if self.store else []
        for example, stored in zip(examples, self._find(keys, len(examples)), strict=True):
            size = columns * num_labelled(example) * dtype.itemsize
            whole = stored is not None and len(stored) == size
            found.append(_unpack(stored, columns, dtype) if stored is not None and whole else None)
        return found

    def keep_scores(self, examples: Sequence[Example], values: Sequence[Tensor]) -> None:
        """Store [column, labelled token] of each example, unless a value is not a finite number."""
        if self._writes:
            pairs = zip(examples, values, strict=True)
            sound = [(one, found) for one, found in pairs if found.isfinite().all()]
            self._keep({sequence_key(one): found.numpy().tobytes() for one, found in sound})

    def answers(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stops: Collection[int]
    ) -> list[list[int] | None]:
        """Give the tokens of the answer to each prompt, None where it is to be written."""
        keys = [answer_key(p, max_new_tokens, stops) for p in prompts] if self.store else []
        found = self._find(keys, len(prompts))
        return [None if stored is None else _tokens(stored) for stored in found]

    def keep_answers(
        self,
        answers: Mapping[tuple[int, ...], Sequence[int]],
        max_new_tokens: int,
        stops: Collection[int],
    ) -> None:
        """Store the tokens of the answer to each prompt."""
        if self._writes:
            self._keep(
                {
                    answer_key(prompt, max_new_tokens, stops): np.array(answer, "<i8").tobytes()
                    for prompt, answer in answers.items()
                }
            )

    @property
    def _writes(self) -> bool:
        return self.store is not None and self.ranks.rank == 0

    def _keep(self, entries: Mapping[bytes, bytes]) -> None:
        assert self.store is not None
        self.store.keep(entries)

    def _find(self, keys: Sequence[bytes], num: int) -> list[bytes | None]:
        if self.store is None:
            return [None] * num
        return self.ranks.share(self.store.find(keys) if self.ranks.rank == 0 else [None] * num)


def _unpack(stored: bytes, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(stored), dtype=dtype).view(columns, -1)


def _tokens(stored: bytes) -> list[int]:
    return [int(token) for token in np.frombuffer(stored, dtype="<i8")]
