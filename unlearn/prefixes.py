"""Rows that begin alike, without computing their beginning twice.

Rows are laid out as a tree of tokens: what several rows start with is there once, and every token
stands at the position it had in its row. A causal model says the same about a token whatever
follows it, so one pass over the tree says what separate passes over the rows would, up to rounding.
Every layer then works on the tree's tokens alone; just around the attention product each row is put
together in full. For scoring only: no gradient flows through a tree.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unlearn.packing import SHORTEST, row_attention

KEYS_PER_TOKEN = 4
"""Most places laid out for keys at once, per token of the tree: bounds the memory of attention."""


@dataclass(frozen=True)
class Branch:
    """Ends of rows that attend together: each of their tokens to its whole row up to itself.

    ``keys`` names the token at each place of [rows, width], ``queries`` at each of [rows, ends]
    (any token after a row's end). ``places`` says where in the latter each of ``tokens`` is read.
    Without ``mask`` the ends are whole rows.
    """

    keys: Int[Tensor, "rows width"]
    queries: Int[Tensor, "rows ends"]
    places: Int[Tensor, " own"]
    tokens: Int[Tensor, " own"]
    mask: Bool[Tensor, "rows 1 ends width"] | None = None

    @classmethod
    def of(cls, rows: Sequence[tuple[np.ndarray, int]], device: torch.device | str) -> "Branch":
        """Lay out paths, longest first, with the place at which the end of each begins."""
        starts = np.array([start for _, start in rows])
        lengths = np.array([len(path) for path, _ in rows]) - starts
        keys = _padded([path for path, _ in rows])
        queries = _padded([path[start:] for path, start in rows])
        places = np.flatnonzero(np.arange(queries.shape[1]) < lengths[:, None])
        found = [keys, queries, places, queries.reshape(-1)[places]]
        if starts.any():
            last = starts[:, None, None] + np.arange(queries.shape[1])[:, None]
            found.append((np.arange(keys.shape[1]) <= last)[:, None])
        return cls(*(torch.from_numpy(part).to(device) for part in found))

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, **arguments: Any
    ) -> Tensor:
        """[token, heads, size] of the whole tree -> the same of :attr:`tokens`."""
        rows = (_take(query, self.queries), _take(key, self.keys), _take(value, self.keys))
        attended = row_attention(module, *rows, self.mask, **arguments)
        return attended.flatten(0, 1).index_select(0, self.places)


@dataclass(frozen=True)
class TokenTree:
    """The distinct tokens of some rows; two are the same when the tokens up to them are too.

    ``paths`` names the tokens of each row, in the order the rows were given.
    """

    ids: Int[Tensor, "1 token"]
    positions: Int[Tensor, "1 token"]
    paths: tuple[Int[np.ndarray, " _"], ...]
    branches: tuple[Branch, ...]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> "TokenTree":
        """Lay out rows of token ids."""
        paths = _paths(rows)
        size = 1 + max(int(path[-1]) for path in paths)
        ids, positions = np.zeros((2, 1, size), dtype=np.int64)
        for row, path in zip(rows, paths, strict=True):
            ids[0, path] = row
            positions[0, path] = np.arange(len(row))
        branches = tuple(_branches(paths, size, device))
        tokens, places = (torch.from_numpy(part).to(device) for part in (ids, positions))
        return cls(tokens, places, tuple(paths), branches)

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, **arguments: Any
    ) -> Tensor:
        """Let every token attend within its row; inputs are [1, heads, token, size]."""
        parts = [part[0].transpose(0, 1) for part in (query, key, value)]
        output = query.new_empty(len(parts[0]), query.shape[1], value.shape[-1])
        for branch in self.branches:
            output.index_copy_(0, branch.tokens, branch.attend(module, *parts, **arguments))
        return output[None]


def _paths(rows: Sequence[Sequence[int]]) -> list[Int[np.ndarray, " _"]]:
    """Number the distinct tokens; in sorted order, rows that begin alike are neighbours."""
    paths = [np.empty(0, dtype=np.int64)] * len(rows)
    before: Sequence[int] = ()
    path = paths[0]
    size = 0
    for place in sorted(range(len(rows)), key=lambda place: list(rows[place])):
        row = rows[place]
        shared = _num_shared(before, row)
        path = np.concatenate([path[:shared], np.arange(size, size + len(row) - shared)])
        size += len(row) - shared
        paths[place], before = path, row
    return paths


def _num_shared(one: Sequence[int], two: Sequence[int]) -> int:
    pairs = enumerate(zip(one, two, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(two)))


def _branches(
    paths: Sequence[Int[np.ndarray, " _"]], size: int, device: torch.device | str
) -> Iterator[Branch]:
    """Give every token to the longest row it stands in, and rows of similar length to a branch.

    A branch ends where a row falls below :data:`SHORTEST` of its longest. Whole rows stay apart
    from ends of rows: they need no mask. A row that ends inside another one attends nowhere.
    """
    seen = np.zeros(size, dtype=bool)
    whole: list[tuple[np.ndarray, int]] = []
    ends: list[tuple[np.ndarray, int]] = []
    for path in sorted(paths, key=len, reverse=True):
        start = int(seen[path].sum())
        if start < len(path):
            (ends if start else whole).append((path, start))
            seen[path] = True
    for rows in (whole, ends):
        branch: list[tuple[np.ndarray, int]] = []
        for path, start in rows:
            longest = len(branch[0][0]) if branch else 0
            too_many = longest * (len(branch) + 1) > KEYS_PER_TOKEN * size
            if branch and (too_many or len(path) < SHORTEST * longest):
                yield Branch.of(branch, device)
                branch = []
            branch.append((path, start))
        if branch:
            yield Branch.of(branch, device)


def _padded(rows: Sequence[np.ndarray]) -> Int[np.ndarray, "rows width"]:
    padded = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for row, path in enumerate(rows):
        padded[row, : len(path)] = path
    return padded


def _take(tokens: Tensor, places: Int[Tensor, "rows width"]) -> Tensor:
    """[token, heads, size] -> [rows, heads, width, size]."""
    return tokens.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)
