"""What a model will be trained on, token by token, before any time is spent on it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from unlearn.data.encode import IGNORE, Example

WINDOW = 4  # tokens decoded together, so that word-initial spaces and split characters come out


class Token(NamedTuple):
    """One token as text, and whether it is trained. Split characters sit in their last token."""

    text: str
    labelled: bool


@dataclass(frozen=True)
class PreviewRow:
    """One example; ``row`` is its row's index, ``cut`` the tokens lost to ``max_length``."""

    row: int
    tokens: tuple[Token, ...]
    cut: int


@dataclass(frozen=True)
class Preview:
    """The first rows in full, and counts over the whole set.

    ``lengths`` holds the shortest, the median and the longest example, in tokens after truncation.
    ``num_labelled`` counts the tokens that are trained, each end-of-answer token included.
    """

    rows: tuple[PreviewRow, ...]
    num_rows: int
    num_examples: int
    num_tokens: int
    num_labelled: int
    num_truncated: int
    lengths: tuple[int, float, int]

    @property
    def share_labelled(self) -> float:
        """The share of all tokens that is trained, between 0 and 1."""
        return self.num_labelled / self.num_tokens


def preview(examples: Sequence[Example], tokenizer: Any, n: int) -> Preview:
    """Describe a set of examples (at least one), the first ``n`` of them token by token."""
    lengths = [len(example.input_ids) for example in examples]
    labelled = [sum(label != IGNORE for label in example.labels) for example in examples]
    return Preview(
        rows=tuple(_preview_row(example, tokenizer) for example in examples[:n]),
        num_rows=len({example.row for example in examples}),
        num_examples=len(examples),
        num_tokens=sum(lengths),
        num_labelled=sum(labelled),
        num_truncated=sum(example.cut > 0 for example in examples),
        lengths=(min(lengths), median(lengths), max(lengths)),
    )


def _preview_row(example: Example, tokenizer: Any) -> PreviewRow:
    texts = _token_texts(example.input_ids, tokenizer)
    tokens = zip(texts, example.labels, strict=True)
    return PreviewRow(
        example.row, tuple(Token(text, label != IGNORE) for text, label in tokens), example.cut
    )


def _token_texts(ids: Sequence[int], tokenizer: Any) -> Iterator[str]:
    """Give what each token adds to the text; joined, they are the text.

    A token that holds only the first bytes of a character adds nothing; the token that completes
    the character adds all of it.
    """

    def decode(start: int, stop: int) -> str:
        text: str = tokenizer.decode(
            ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    done = 0
    for stop in range(1, len(ids) + 1):
        start = max(0, done - WINDOW)
        known, text = decode(start, done), decode(start, stop)
        incomplete = text.endswith("\ufffd") and stop < len(ids) and stop - done < WINDOW
        if incomplete:
            yield ""
            continue
        yield text[len(known) :]
        done = stop
