"""The marked words of an answer are those that ROUGE-L counts."""

import re

import pytest

from unlearn.evals.metrics import rouge_l_recall
from unlearn.evals.report.overlap import Piece, shared_pieces


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("Ada was born in Oslo.", "Ada was born in Oslo."),
        ("Ada was born in Oslo.", "in Oslo, Ada was  born!"),
        ("She writes novels", "She was writing a novel — again: novels"),
        ("a b c d e f", "f e d c b a c d"),
        ("Ada", ""),
        ("", "Ada"),
        ("Éa’s café", "Éa’s café ☕"),
    ],
)
def test_marked_words_are_those_that_rouge_counts(truth: str, answer: str) -> None:
    pieces = shared_pieces(truth, answer)
    assert "".join(piece.text for piece in pieces) == answer
    marked = sum(len(re.findall("[A-Za-z0-9]+", p.text)) for p in pieces if p.shared)
    total = len(re.findall("[A-Za-z0-9]+", truth))
    assert (marked / total if total else 0.0) == pytest.approx(rouge_l_recall(truth, answer))


def test_words_between_shared_ones_are_not_marked() -> None:
    assert shared_pieces("Ada was born", "Ada, was she born?") == [
        Piece("Ada, was", True),
        Piece(" she ", False),
        Piece("born", True),
        Piece("?", False),
    ]
