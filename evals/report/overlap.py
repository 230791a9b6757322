"""Which words of an answer also stand in the true answer: the words that ROUGE-L counts, shown."""

import re
from dataclasses import dataclass

from rouge_score.tokenizers import DefaultTokenizer

_WORD = re.compile(r"[A-Za-z0-9]+")
_ROUGE = DefaultTokenizer(use_stemmer=True)


@dataclass(frozen=True)
class Piece:
    """A stretch of text; ``shared`` says that its words stand in the true answer too."""

    text: str
    shared: bool


def shared_pieces(truth: str, answer: str) -> list[Piece]:
    """Cut an answer into stretches that are, or are not, in its longest common word sequence.

    Words are compared as ROUGE-L does: letters and digits, case ignored, Porter-stemmed.
    """
    words = list(_WORD.finditer(answer))
    matched = _common(_stems(truth), [_stem(word.group()) for word in words])
    pieces: list[Piece] = []
    end = 0
    for place, word in enumerate(words):
        gap = answer[end : word.start()]
        both = place in matched and place - 1 in matched
        _add(pieces, gap, shared=both)
        _add(pieces, word.group(), shared=place in matched)
        end = word.end()
    _add(pieces, answer[end:], shared=False)
    return pieces


def _add(pieces: list[Piece], text: str, *, shared: bool) -> None:
    if text and pieces and pieces[-1].shared == shared:
        pieces[-1] = Piece(pieces[-1].text + text, shared)
    elif text:
        pieces.append(Piece(text, shared))


def _common(truth: list[str], answer: list[str]) -> set[int]:
    """Give the places in ``answer`` of one longest common subsequence (earliest matches first)."""
    rows, columns = len(truth), len(answer)
    longest = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in reversed(range(rows)):
        for j in reversed(range(columns)):
            longest[i][j] = (
                longest[i + 1][j + 1] + 1
                if truth[i] == answer[j]
                else max(longest[i + 1][j], longest[i][j + 1])
            )
    found, i, j = set(), 0, 0
    while i < rows and j < columns:
        if truth[i] == answer[j]:
            found.add(j)
            i, j = i + 1, j + 1
        elif longest[i + 1][j] >= longest[i][j + 1]:
            i += 1
        else:
            j += 1
    return found


def _stems(text: str) -> list[str]:
    return [_stem(word) for word in _WORD.findall(text)]


def _stem(word: str) -> str:
    return str(_ROUGE.tokenize(word)[0])
