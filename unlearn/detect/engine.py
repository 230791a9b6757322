"""Many texts, one forward pass each: a stream of texts in, their scores out in the same order.

Texts are read a block at a time. Within a block texts of similar length go through the model
together, at most ``batch_tokens`` tokens at once, so memory is bounded whatever the length of the
stream. Every score of :mod:`~unlearn.detect.single_pass` comes from the same pass; scores that need
other wordings or prefixes put these through the same batches.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from unlearn.data import IGNORE, Example, pad_token_id
from unlearn.detect import single_pass
from unlearn.detect.prefixes import Prefix
from unlearn.detect.settings import SINGLE_PASS, Settings
from unlearn.detect.several_passes import (
    con_recall,
    lowercase_ratio,
    neighbour_difference,
    pac,
    recall,
    reference_difference,
    swapped_words,
)
from unlearn.detect.single_pass import TokenFrequencies
from unlearn.detect.text import ScoredText, Text
from unlearn.detect.tokens import Encoded, TextTokenizer
from unlearn.packing import can_pack, packable
from unlearn.scores import Scorer, Scores
from unlearn.scoring import CPU_TOKENS, scored

LOOK_AHEAD = 16
"""Batches' worth of text that is read before any of it is scored, to find similar lengths."""
CHARACTERS = 4
"""Characters of a token, to guess how much text that is."""


@dataclass(frozen=True)
class Side:
    """A model with its tokenizer and how it is scored."""

    model: Any
    tokenizer: TextTokenizer
    scorer: Scorer
    pad_id: int
    batch_tokens: int

    @classmethod
    def of(cls, model: Any, tokenizer: Any, settings: Settings) -> "Side":
        """Check the model once, so that no block has to."""
        texts = TextTokenizer.of(tokenizer, model, max_tokens=settings.max_tokens, bos=settings.bos)
        on_cpu = next(model.parameters()).device.type == "cpu"
        tokens = min(settings.batch_tokens, CPU_TOKENS) if on_cpu else settings.batch_tokens
        return cls(model, texts, Scorer.for_model(model), pad_token_id(tokenizer), tokens)

    def groups(
        self, rows: Sequence[Example], want: Sequence[str]
    ) -> Iterator[tuple[list[int], Scores]]:
        """Score rows in batches."""
        return scored(
            self.model,
            rows,
            scorer=self.scorer,
            pad_id=self.pad_id,
            batch_tokens=self.batch_tokens,
            want=want,
        )

    def means(self, rows: Sequence[Example]) -> list[float]:
        """Give the mean log-probability per labelled token of every row; NaN without one."""
        found = [math.nan] * len(rows)
        for places, scores in self.groups(rows, ()):
            for place, value in zip(places, single_pass.loss(scores).tolist(), strict=True):
                found[place] = value
        return found

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Let the model take packed batches for as long as the block lasts, where it can."""
        with ExitStack() as stack:
            if self.scorer.head is not None and can_pack(self.model):
                stack.enter_context(packable(self.model))
            yield


@dataclass(frozen=True)
class TextScorer:
    """Scores texts under one model; call it with a stream of :class:`Text`."""

    settings: Settings
    side: Side
    reference: Side | None = None
    frequencies: TokenFrequencies | None = None
    prefixes: Mapping[str, Prefix] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: Any,
        settings: Settings | None = None,
        *,
        reference: tuple[Any, Any] | None = None,
        frequencies: TokenFrequencies | None = None,
        nonmembers: Sequence[str] = (),
        members: Sequence[str] = (),
    ) -> "TextScorer":
        """Check that every score has what it needs and prepare what does not depend on the texts.

        ``reference`` is another model with its tokenizer, ``nonmembers`` and ``members`` are texts
        for the prefixes of ReCaLL and Con-ReCaLL.

        Raises:
            UserError: a score lacks its reference, table or prefix.
        """
        settings = settings or Settings()
        given = {
            "ref": reference is not None,
            "dcpdd": frequencies is not None,
            "recall": bool(nonmembers),
            "conrecall": bool(nonmembers) and bool(members),
        }
        settings.check_inputs(given)
        side = Side.of(model, tokenizer, settings)
        prefixes = {
            name: Prefix.of(texts, side.tokenizer, model, shots=settings.shots)
            for name, texts in (("nonmembers", nonmembers), ("members", members))
            if name in settings.prefixes
        }
        other = Side.of(*reference, settings) if reference and "ref" in settings.scores else None
        return cls(settings, side, other, frequencies, prefixes)

    def __call__(self, texts: Iterable[Text]) -> Iterator[ScoredText]:
        """Give the scores of every text, in the order of the texts."""
        return chain.from_iterable(self.blocks(texts))

    def blocks(self, texts: Iterable[Text]) -> Iterator[list[ScoredText]]:
        """Give the scores block by block; where a block ends depends on the texts alone."""
        characters = LOOK_AHEAD * CHARACTERS * self.side.batch_tokens
        longest = self.side.tokenizer.max_tokens * CHARACTERS
        with ExitStack() as stack:
            for side in filter(None, (self.side, self.reference)):
                stack.enter_context(side.ready())
            for block in _blocks(texts, characters, longest):
                yield self._score(block)

    @torch.no_grad()
    def _score(self, texts: Sequence[Text]) -> list[ScoredText]:
        encoded = self.side.tokenizer([text.text for text in texts])
        found: list[dict[str, float]] = [{} for _ in texts]
        self._single_pass(encoded, found)
        compared = [row for row, one in enumerate(encoded) if len(one.ids) > 1]
        if compared:
            self._several_passes(texts, encoded, compared, found)
        return [self._result(*row) for row in zip(texts, encoded, found, strict=True)]

    def _single_pass(self, encoded: Sequence[Encoded], found: list[dict[str, float]]) -> None:
        """Fill in what the pass over the texts themselves tells."""
        rows = [labelled(one.ids, row) for row, one in enumerate(encoded)]
        for places, scores in self.side.groups(rows, self.settings.readings):
            columns = self.columns(scores, [encoded[place].text for place in places])
            for name, column in columns.items():
                for place, value in zip(places, column.tolist(), strict=True):
                    found[place][name] = value

    def columns(self, scores: Scores, texts: Sequence[str]) -> dict[str, Tensor]:
        """Give one value per row for every score of one pass, and what later ones are made of."""
        chosen, settings = self.settings.scores, self.settings
        found = {"mean": single_pass.loss(scores)}
        simple = {
            "loss": lambda: found["mean"],
            "ppl": lambda: single_pass.perplexity(scores),
            "zlib": lambda: single_pass.zlib_ratio(scores, texts),
        }
        found |= {name: compute() for name, compute in simple.items() if name in chosen}
        shares = {
            "mink": single_pass.min_k,
            "minkpp": single_pass.min_k_plus_plus,
            "gapk": lambda scores, *, k: single_pass.gap_k(scores, k=k, window=settings.gap_window),
        }
        for name, function in shares.items():
            if name in chosen:
                found |= {settings.named(name, k): function(scores, k=k) for k in settings.k}
        if "dcpdd" in chosen:
            assert self.frequencies is not None
            found["dcpdd"] = single_pass.dc_pdd(scores, self.frequencies, clip=settings.clip)
            found["coverage"] = single_pass.coverage(scores, self.frequencies)
        if "pac" in chosen:
            found["distance"] = single_pass.polarized_distance(scores)
        return found

    def _several_passes(
        self,
        texts: Sequence[Text],
        encoded: Sequence[Encoded],
        rows: Sequence[int],
        found: list[dict[str, float]],
    ) -> None:
        """Fill in the scores that compare passes, for rows that have a token to score."""
        chosen = set(self.settings.scores) - SINGLE_PASS
        main = torch.tensor([found[row]["mean"] for row in rows])
        kept = [encoded[row].text for row in rows]
        columns: dict[str, Tensor] = {}
        if "lowercase" in chosen:
            columns["lowercase"] = lowercase_ratio(main, self._lowered(kept, main))
        if "ref" in chosen:
            assert self.reference is not None
            other = self.reference.tokenizer(kept)
            means = self.reference.means([labelled(one.ids, 0) for one in other])
            columns["ref"] = reference_difference(main, torch.tensor(means))
        if self.prefixes:
            after = {
                name: torch.tensor(self.side.means([prefix.before(encoded[r].ids) for r in rows]))
                for name, prefix in self.prefixes.items()
            }
            if "recall" in chosen:
                columns["recall"] = recall(main, after["nonmembers"])
            if "conrecall" in chosen:
                columns["conrecall"] = con_recall(
                    main, after["nonmembers"], after["members"], gamma=self.settings.gamma
                )
        if "neighbour" in chosen:
            others = [texts[row].neighbours for row in rows]
            values = self._each(others, single_pass.loss)
            columns["neighbour"] = neighbour_difference(main, values)
        if "pac" in chosen:
            others = [tuple(swapped_words(text, seed=self.settings.seed)) for text in kept]
            distance = torch.tensor([found[row]["distance"] for row in rows])
            columns["pac"] = pac(distance, self._each(others, single_pass.polarized_distance))
        for name, column in columns.items():
            for row, value in zip(rows, column.tolist(), strict=True):
                found[row][name] = value

    def _lowered(self, texts: Sequence[str], main: Tensor) -> Tensor:
        """Give the means of the texts in small letters; those without capitals need no pass."""
        lowered = [text.lower() for text in texts]
        places = [place for place, text in enumerate(texts) if text != lowered[place]]
        found = main.clone()
        if places:
            encoded = self.side.tokenizer([lowered[place] for place in places])
            means = self.side.means([labelled(one.ids, 0) for one in encoded])
            found[places] = torch.tensor(means)
        return found

    def _each(self, texts: Sequence[Sequence[str]], read: Any) -> Tensor:
        """Give [text, wording] of one number per wording; NaN where a text has fewer wordings."""
        flat = [(row, place) for row, some in enumerate(texts) for place in range(len(some))]
        found = torch.full((len(texts), max(1, *map(len, texts))), math.nan)
        if flat:
            encoded = self.side.tokenizer([texts[row][place] for row, place in flat])
            rows = [labelled(one.ids, 0) for one in encoded]
            for places, scores in self.side.groups(rows, ()):
                for place, value in zip(places, read(scores).tolist(), strict=True):
                    found[flat[place]] = value
        return found

    def _result(self, text: Text, encoded: Encoded, found: Mapping[str, float]) -> ScoredText:
        size = max(0, len(encoded.ids) - 1)
        names = self.settings.columns
        finite = size > 0 and math.isfinite(found["mean"])
        status = "ok" if size >= self.settings.min_tokens else "short"
        status = status if finite else "nan" if size else "too_short"
        scores = {name: number(found.get(name, math.nan)) if finite else None for name in names}
        notes = [name for name in ("truncated", "cleaned") if getattr(encoded, name)]
        if "lowercase" in names and encoded.text == encoded.text.lower():
            notes.append("no_capitals")
        covered = number(found["coverage"]) if finite and "coverage" in found else None
        return ScoredText(text.id, size, status, scores, tuple(notes), covered, encoded.text)


def number(value: float) -> float | None:
    """Give a single-precision number with the digits it has; None for what JSON cannot say."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def labelled(ids: list[int], row: int) -> Example:
    """Make every id after the first one count."""
    return Example(ids or [0], [IGNORE, *ids[1:]], min(1, len(ids)), row)


def _blocks(texts: Iterable[Text], characters: int, longest: int) -> Iterator[list[Text]]:
    """Part a stream where enough text has come together; of a long text only its start counts."""
    block: list[Text] = []
    size = 0
    for text in texts:
        block.append(text)
        size += min(len(text.text), longest) + CHARACTERS
        if size >= characters:
            yield block
            block, size = [], 0
    if block:
        yield block
