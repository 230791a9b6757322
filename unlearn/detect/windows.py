"""Long documents: every token scored with enough text before it, and scores of windows of tokens.

The model reads windows of ``context`` tokens that advance by half of it; of each only the tokens
that are new count, so that every token has half a context before it. Scores are then taken over
shorter windows of ``window`` tokens every ``stride`` tokens, from the stored token readings alone.
Memory does not grow with the document. A text scored from its own start has less before it and so
lower scores: windows may only be compared with windows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import ArrayLike
from torch import Tensor

from unlearn.data import IGNORE, Example
from unlearn.detect.conformal import p_values
from unlearn.detect.engine import LOOK_AHEAD, TextScorer, number
from unlearn.detect.settings import SINGLE_PASS
from unlearn.detect.token_stream import Tokens, token_stream
from unlearn.detect.tokens import context
from unlearn.errors import UserError
from unlearn.scores import Scores

READINGS = ("log_probs", "mean", "variance", "top")
AT_ONCE = 4096
"""Windows that are scored together."""
PValues = Callable[[Float[ndarray, " window"]], Float[ndarray, " window"]]
"""From scores of windows to p-values: small for what non-members hardly ever score."""


@dataclass(frozen=True)
class Strides:
    """How a document is read: all in tokens. ``context`` None is the model's, at most 1024."""

    window: int = 128
    stride: int = 64
    context: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.window:
            raise UserError(
                f"stride={self.stride} does not fit window={self.window}",
                "give a stride of at least 1 and at most the window, or tokens would be left out",
            )

    def context_of(self, model: Any) -> int:
        """Give the tokens that the model reads at once."""
        most = context(model)
        found = min(self.context or 1024, most)
        if found < 4:
            raise UserError(f"context={found} is too small", "give 4 tokens or more")
        return found


@dataclass(frozen=True)
class Window:
    """The scores of some neighbouring tokens, and the characters they stand for.

    ``p`` holds p-values of the scores that were calibrated.
    """

    start_token: int
    num_tokens: int
    start: int
    end: int
    scores: dict[str, float | None]
    p: dict[str, float | None]

    def as_json(self) -> dict[str, Any]:
        """Give the row that is printed and stored."""
        row = {
            "start_token": self.start_token,
            "n_tokens": self.num_tokens,
            "start_char": self.start,
            "end_char": self.end,
            "scores": self.scores,
        }
        return row | {"p": self.p} if self.p else row


@dataclass(frozen=True)
class Readings:
    """What the model says of neighbouring tokens; ``values`` is [:data:`READINGS`, token]."""

    tokens: Tokens
    values: Float[Tensor, "reading token"]
    first: int
    """The place of the first of them among all scored tokens of the document."""


def score_windows(
    scorer: TextScorer,
    pieces: Iterable[str],
    strides: Strides | None = None,
    *,
    references: Mapping[str, ArrayLike | PValues] | None = None,
    skip: int = 0,
) -> Iterator[list[Window]]:
    """Score a document that comes in pieces; give its windows in order, some at a time.

    The last window ends with the document, so it may overlap the one before it by more than the
    others do; a document shorter than a window is one window. ``references`` gives, by score, the
    scores of windows of texts that are surely no members, or a function from scores to p-values.
    The first ``skip`` windows are left out, and text that only they need is not read by the model.

    Raises:
        UserError: a score that needs more than one pass was asked for.
    """
    strides = strides or Strides()
    if several := set(scorer.settings.scores) - SINGLE_PASS:
        raise UserError(
            f"windows have no score '{min(several)}': it needs other passes over each text",
            f"windows have {', '.join(sorted(SINGLE_PASS))}",
        )
    cutter = _Cutter(scorer, strides, references or {}, skip)
    with scorer.side.ready():
        needed = max(0, skip - 1) * strides.stride  # the last window begins after all others
        for readings in _readings(scorer, pieces, strides, needed):
            yield from cutter.take(readings)
    yield from cutter.finish()


def _readings(
    scorer: TextScorer, pieces: Iterable[str], strides: Strides, needed: int
) -> Iterator[Readings]:
    """Read a document token by token, from the scored token ``needed`` on (or a little before)."""
    size = strides.context_of(scorer.side.model)
    passes = max(1, LOOK_AHEAD * scorer.side.batch_tokens // size)
    front = list(scorer.side.tokenizer.front)
    room = size - len(front)
    tokens = _Buffer()
    read = 0 if front else 1  # without anything in front the first token has nothing before it
    done = 0
    for some in token_stream(pieces, scorer.side.tokenizer.tokenizer):
        scorer.side.tokenizer.check_ids(some.ids.tolist())
        tokens.add(some)
        while tokens.end - done > room * passes:
            done, rows = _passes(tokens, done, read, room, passes)
            yield from _read(scorer, tokens, rows, front, read, needed)
            tokens.drop(done - room)
    while tokens.end > max(done, read):
        done, rows = _passes(tokens, done, read, room, passes)
        yield from _read(scorer, tokens, rows, front, read, needed)


def _passes(
    tokens: "_Buffer", done: int, read: int, room: int, most: int
) -> tuple[int, list[tuple[int, int, int]]]:
    """Lay the next windows of the model: (first token, first new token, end); ``done`` moves on."""
    rows: list[tuple[int, int, int]] = []
    while len(rows) < most and done < tokens.end:
        end = min(tokens.end, done + (max(1, room // 2) if done else room))
        rows.append((max(0, end - room), max(done, read), end))
        done = end
    return done, rows


def _read(
    scorer: TextScorer,
    tokens: "_Buffer",
    rows: Sequence[tuple[int, int, int]],
    front: list[int],
    read: int,
    needed: int,
) -> Iterator[Readings]:
    rows = [row for row in rows if row[2] - read > needed and row[2] > row[1]]
    if not rows:
        return
    examples = []
    for start, new, end in rows:
        ids = tokens.ids[start - tokens.start : end - tokens.start].tolist()
        fresh = end - new
        labels = [IGNORE] * (len(front) + len(ids) - fresh) + ids[len(ids) - fresh :]
        examples.append(Example([*front, *ids], labels, len(front) + len(ids) - fresh, 0))
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for places, scores in scorer.side.groups(examples, ("statistics",)):
        columns = torch.stack([getattr(scores, name) for name in READINGS])
        for row, place in enumerate(places):
            found[place] = columns[:, row, scores.mask[row]]
    first = rows[0][1]
    yield Readings(tokens.part(first, rows[-1][2]), torch.cat(found, dim=1), first - read)


class _Buffer:
    """The tokens that may still be needed, ``start`` being the place of the first of them."""

    def __init__(self) -> None:
        self.start = 0
        self.ids, self.starts, self.ends = (np.empty(0, dtype=np.int64) for _ in range(3))
        self.text, self.offset = "", 0

    @property
    def end(self) -> int:
        return self.start + len(self.ids)

    def add(self, tokens: Tokens) -> None:
        self.ids = np.concatenate([self.ids, tokens.ids])
        self.starts = np.concatenate([self.starts, tokens.starts])
        self.ends = np.concatenate([self.ends, tokens.ends])
        self.text += tokens.text

    def drop(self, place: int) -> None:
        """Forget the tokens before a place, and their text."""
        count = max(0, min(place - self.start, len(self.ids)))
        if not count:
            return
        until = int(self.ends[count - 1])
        self.text, self.offset = self.text[until - self.offset :], until
        self.ids, self.starts, self.ends = self.ids[count:], self.starts[count:], self.ends[count:]
        self.start += count

    def part(self, first: int, end: int) -> Tokens:
        """Give the tokens between two places with their text."""
        chosen = slice(first - self.start, end - self.start)
        begin = int(self.ends[first - self.start - 1]) if first > self.start else self.offset
        until = int(self.ends[end - self.start - 1])
        text = self.text[begin - self.offset : until - self.offset]
        return Tokens(self.ids[chosen], self.starts[chosen], self.ends[chosen], text, begin)


class _Cutter:
    """Cuts token readings, as they come, into windows and scores these."""

    def __init__(
        self,
        scorer: TextScorer,
        strides: Strides,
        references: Mapping[str, ArrayLike | PValues],
        skip: int,
    ) -> None:
        self.scorer, self.strides = scorer, strides
        self.p_values = {name: _p_values(given) for name, given in references.items()}
        self.next = skip * strides.stride
        self.tokens = _Buffer()
        self.values = torch.empty(len(READINGS), 0)
        self.last_end = (skip - 1) * strides.stride + strides.window if skip else 0

    def take(self, readings: Readings) -> Iterator[list[Window]]:
        """Add readings; give the windows that are complete."""
        if not len(self.tokens.ids):
            self.tokens.start, self.tokens.offset = readings.first, readings.tokens.offset
        self.tokens.add(readings.tokens)
        self.values = torch.cat([self.values, readings.values], dim=1)
        size, stride = self.strides.window, self.strides.stride
        starts = list(range(self.next, self.tokens.end - size + 1, stride))
        for some in range(0, len(starts), AT_ONCE):
            yield self._windows(starts[some : some + AT_ONCE], size)
        if starts:
            self.next, self.last_end = starts[-1] + stride, starts[-1] + size
            kept = max(0, min(self.next, self.tokens.end - size) - self.tokens.start)
            self.tokens.drop(self.tokens.start + kept)
            self.values = self.values[:, kept:]

    def finish(self) -> Iterator[list[Window]]:
        """Give the window that ends with the document, unless it has been given."""
        end, size = self.tokens.end, self.strides.window
        if not len(self.tokens.ids) or end <= self.last_end:
            return
        start = max(self.tokens.start, end - size)
        yield [*self._windows([start], end - start)]

    def _windows(self, starts: Sequence[int], size: int) -> list[Window]:
        places = torch.tensor(starts)[:, None] - self.tokens.start + torch.arange(size)
        columns = {name: column[places] for name, column in zip(READINGS, self.values, strict=True)}
        mask = torch.ones_like(places, dtype=torch.bool)
        ids = torch.from_numpy(self.tokens.ids)[places]
        scores = Scores(mask=mask, attended=mask, next_tokens=ids, **columns)
        spans = [self._span(start - self.tokens.start, size) for start in starts]
        texts = [self.tokens.text[a - self.tokens.offset : b - self.tokens.offset]
                 for a, b in spans]  # fmt: skip
        found = self.scorer.columns(scores, texts)
        names = self.scorer.settings.columns
        values = {name: found[name].double().numpy() for name in names}
        p = {name: of(values[name]) for name, of in self.p_values.items() if name in values}
        return [
            Window(
                start, size, *span,
                {name: number(float(column[row])) for name, column in values.items()},
                {name: number(float(column[row])) for name, column in p.items()},
            )
            for row, (start, span) in enumerate(zip(starts, spans, strict=True))
        ]  # fmt: skip

    def _span(self, place: int, size: int) -> tuple[int, int]:
        return int(self.tokens.starts[place]), int(self.tokens.ends[place + size - 1])


def _p_values(given: ArrayLike | PValues) -> PValues:
    return given if callable(given) else partial(p_values, references=given)
