"""How frequent each token is in a reference corpus: tables for DC-PDD, built once, kept on disk.

A table belongs to one tokenizer: its hash is stored, and another tokenizer's table is refused. The
counts are kept as integers and read from disk as they are needed.
"""

import hashlib
import json
import math
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from unlearn.data import tokenize
from unlearn.detect.single_pass import TokenFrequencies
from unlearn.detect.text import cleaned
from unlearn.errors import RunFailed, UserError
from unlearn.models import tokenizer_sha256
from unlearn.runs import staged, write_json

FORMAT = "unlearn token frequencies 1"
COUNTS, ABOUT = "counts.npy", "table.json"
MAX_TOKENS = 1024
"""Tokens counted of each document, as in DC-PDD's own code."""
CHARACTERS_PER_TOKEN = 16
CHUNK = 2**20
"""Characters that a process counts at once."""
FEW_TOKENS = 10**6
"""Below this many tokens a table says little about words that are not common."""
MOST_EXCESS = 1.0
"""Nats per token by which texts may surprise a table more than its own corpus does."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Corpus:
    """What a corpus is called and, in words for readers of the table, what it is of."""

    name: str
    language: str = ""
    domain: str = ""


@dataclass(frozen=True)
class About:
    """Where the counts of a table come from.

    ``corpus_sha256`` is that of the documents' texts, whatever file they came in; None for the
    generic table. ``max_tokens``: tokens counted of each document.
    """

    corpus: str
    corpus_sha256: str | None
    tokenizer: str
    tokenizer_sha256: str
    vocabulary: int
    tokens: int
    documents: int
    max_tokens: int | None
    language: str = ""
    domain: str = ""
    generic: bool = False


@dataclass(frozen=True)
class FrequencyTable:
    """Counts of every token in a corpus, ``counts[id]``; possibly a view of a file."""

    counts: Int[ndarray, " vocab"]
    about: About

    def probabilities(self) -> Float[ndarray, " vocab"]:
        """Give every token's frequency, Laplace-smoothed: (c + 1) / (sum of c + V).

        Source: Zhang et al. 2024, DC-PDD, arXiv:2409.14781, section 3.2.
        """
        counts = np.asarray(self.counts, float)
        return (counts + 1) / (counts.sum() + counts.size)

    def frequencies(self) -> TokenFrequencies:
        """Give what DC-PDD reads."""
        known = torch.from_numpy(np.asarray(self.counts) > 0)
        return TokenFrequencies(torch.from_numpy(self.probabilities()).float(), known)

    def own_surprise(self) -> float:
        """Give the mean of -log f over the table's own corpus, in nats per token."""
        f = self.probabilities()
        counts = np.asarray(self.counts, float)
        return float(-(counts @ np.log(f)) / max(1.0, counts.sum()))

    def surprise(self, ids: Int[ndarray, " token"]) -> float:
        """Give the mean of -log f over other tokens, in nats per token; NaN without any."""
        if not ids.size:
            return math.nan
        return float(-np.log(self.probabilities()[ids]).mean())

    def unknown_share(self, ids: Int[ndarray, " token"]) -> float:
        """Give the share of tokens that the corpus does not hold, in [0, 1]."""
        return float((np.asarray(self.counts)[ids] == 0).mean()) if ids.size else math.nan

    def save(self, folder: Path) -> None:
        """Write the counts and where they come from into a new folder."""
        check_new_folder(folder)
        with staged(folder) as staging:
            np.save(staging / COUNTS, np.asarray(self.counts, np.int64))
            write_json(staging / ABOUT, {"format": FORMAT, **asdict(self.about)})


def check_new_folder(folder: Path) -> None:
    """Refuse to write over anything.

    Raises:
        UserError: the folder exists.
    """
    if folder.exists():
        raise UserError(f"'{folder}' already exists", "choose another --out, or remove it")


def load_table(folder: Path, tokenizer: Any = None) -> FrequencyTable:
    """Open a table without reading its counts; with a tokenizer, make sure it is its own.

    Raises:
        UserError: no table, a damaged one, or one of another tokenizer.
    """
    made = "build one with `unlearn detect freq build`"
    if not (folder / ABOUT).is_file():
        raise UserError(f"no frequency table in '{folder}'", made)
    try:
        found = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if found.pop("format") != FORMAT:
            raise UserError(f"'{folder}' holds a table of another version", made)
        about = About(**{field.name: found[field.name] for field in fields(About)})
        counts = np.load(folder / COUNTS, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise UserError(f"the frequency table '{folder}' is damaged", made) from error
    if counts.shape != (about.vocabulary,) or counts.dtype != np.int64:
        raise UserError(f"the frequency table '{folder}' is damaged", made)
    table = FrequencyTable(counts, about)
    if tokenizer is not None:
        check_tokenizer(table, tokenizer, source=str(folder))
    return table


def check_tokenizer(table: FrequencyTable, tokenizer: Any, *, source: str) -> None:
    """Refuse a table of another tokenizer: its numbers stand for other words.

    Raises:
        UserError: the tokenizers differ.
    """
    if tokenizer_sha256(tokenizer) != table.about.tokenizer_sha256:
        raise UserError(
            f"the frequency table '{source}' was built with another tokenizer "
            f"('{table.about.tokenizer}')",
            "build one with this model's: `unlearn detect freq build CORPUS --tokenizer MODEL`",
        )


def build_table(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    corpus: Corpus,
    vocabulary: int = 0,
    max_tokens: int | None = MAX_TOKENS,
    workers: int = 1,
    progress: Progress = lambda documents, tokens: None,
) -> FrequencyTable:
    """Count the tokens of a stream of documents, in constant memory, with several processes.

    Of each document the first ``max_tokens`` tokens count (None: all), without special tokens.
    ``vocabulary`` may be larger than the tokenizer's, as a model's padded one is. The same texts
    give the same table for any number of processes.

    Raises:
        UserError: the documents hold no token.
        RunFailed: a process died, as without memory.
    """
    size = max(vocabulary, len(tokenizer))
    counts, documents, digest = np.zeros(size, np.int64), 0, hashlib.sha256()
    chunks = _hashed(_chunks(texts, max_tokens), digest)
    for found, chunk in _counted(chunks, tokenizer, size, max_tokens, workers):
        counts += found
        documents += chunk
        progress(documents, int(counts.sum()))
    if not counts.any():
        raise UserError(f"'{corpus.name}' holds no token", "give a corpus with text in it")
    about = About(
        corpus.name,
        digest.hexdigest(),
        str(tokenizer.name_or_path),
        tokenizer_sha256(tokenizer),
        size,
        int(counts.sum()),
        documents,
        max_tokens,
        corpus.language,
        corpus.domain,
    )
    return FrequencyTable(counts, about)


def _chunks(texts: Iterable[str], max_tokens: int | None) -> Iterator[list[str]]:
    """Part a stream where enough text has come together; of a long text only its start counts."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        kept = text if max_tokens is None else text[: max_tokens * CHARACTERS_PER_TOKEN]
        chunk.append(cleaned(kept))
        size += len(kept)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _hashed(chunks: Iterable[list[str]], digest: Any) -> Iterator[list[str]]:
    for chunk in chunks:
        for text in chunk:
            digest.update(text.encode("utf-8", "surrogatepass") + b"\x00")
        yield chunk


def count_tokens(
    texts: Sequence[str], tokenizer: Any, vocabulary: int, max_tokens: int | None
) -> Int[ndarray, " vocab"]:
    """Count every token of some texts, each up to ``max_tokens``."""
    rows = tokenize(tokenizer, texts, adds_special=False)
    ids = np.concatenate([np.asarray(row[:max_tokens], np.int64) for row in rows])
    return np.bincount(ids, minlength=vocabulary)


def _counted(
    chunks: Iterator[list[str]],
    tokenizer: Any,
    vocabulary: int,
    max_tokens: int | None,
    workers: int,
) -> Iterator[tuple[ndarray, int]]:
    """Give the counts and the number of documents of every chunk."""
    if workers < 2:
        for chunk in chunks:
            yield count_tokens(chunk, tokenizer, vocabulary, max_tokens), len(chunk)
        return
    ahead: deque[tuple[Future[ndarray], int]] = deque()
    settings = (tokenizer, vocabulary, max_tokens)
    context = multiprocessing.get_context("spawn")  # a fork would share locks of running threads
    try:
        with ProcessPoolExecutor(workers, context, _begin, settings) as pool:
            for chunk in chunks:
                ahead.append((pool.submit(_count, chunk), len(chunk)))
                if len(ahead) > 2 * workers:
                    future, size = ahead.popleft()
                    yield future.result(), size
            for future, size in ahead:
                yield future.result(), size
    except BrokenProcessPool as error:
        raise RunFailed("a process that counts tokens died", "try --workers 1") from error


_settings: tuple[Any, int, int | None]
"""What a counting process works with; set once, when it starts."""


def _begin(tokenizer: Any, vocabulary: int, max_tokens: int | None) -> None:
    global _settings
    _settings = (tokenizer, vocabulary, max_tokens)


def _count(chunk: list[str]) -> ndarray:
    return count_tokens(chunk, *_settings)
