"""Texts put in front of a text, for ReCaLL and Con-ReCaLL."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unlearn.data import IGNORE, Example, tokenize
from unlearn.detect.text import cleaned
from unlearn.detect.tokens import TextTokenizer, context
from unlearn.errors import UserError


@dataclass(frozen=True)
class Prefix:
    """The ids of a prefix, the same for every text.

    Rows that begin with it share it: it goes through the model once per batch.
    """

    ids: list[int]
    shots: int

    @classmethod
    def of(
        cls, texts: Sequence[str], tokenizer: TextTokenizer, model: Any, *, shots: int
    ) -> "Prefix":
        """Join as many of the first ``shots`` texts as fit before the longest text that is scored.

        Raises:
            UserError: not even one fits.
        """
        room = context(model) - tokenizer.max_tokens
        for count in range(min(shots, len(texts)), 0, -1):
            (joined,) = tokenize(
                tokenizer.tokenizer, [cleaned("".join(texts[:count]))], adds_special=False
            )
            ids = [*tokenizer.front, *joined]
            if len(ids) <= room:
                return cls(ids, count)
        raise UserError(
            f"no text of the prefix fits before texts of {tokenizer.max_tokens} tokens "
            f"in a context of {context(model)}",
            "lower max_tokens, or give shorter texts for the prefix",
        )

    def before(self, ids: Sequence[int]) -> Example:
        """Put the prefix in front of a text; the text's first token stays without a label.

        The text keeps what its tokenizer puts in front of it, as in the code of ReCaLL.
        """
        labels = [IGNORE] * (len(self.ids) + 1) + list(ids[1:])
        return Example([*self.ids, *ids], labels, len(self.ids), 0)
