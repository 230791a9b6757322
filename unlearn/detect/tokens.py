"""From texts to the ids that are scored: what stands in front, what is cut, what is cleaned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from unlearn.data import tokenize
from unlearn.detect.text import cleaned
from unlearn.errors import UserError

Bos = Literal["auto", "always", "never"]
CHARACTERS_PER_TOKEN = 16
"""Characters read for each token wanted, at first: longer tokens are rare."""
LEAST_SHARE = 0.9
"""Share of the model's tokens that its own tokenizer has: models pad theirs by a few per cent."""
MARGIN = 16
"""Tokens before a cut that may have been other ones, had the text gone on."""


@dataclass(frozen=True)
class Encoded:
    """The ids of one text; ``text`` is exactly what they stand for, the front left out."""

    ids: list[int]
    text: str
    truncated: bool = False
    cleaned: bool = False


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer with what it puts in front of a text and how many ids a text may have.

    ``bos``: ``auto`` is what the tokenizer does of its own accord, ``always`` adds BOS (or EOS, if
    there is no BOS) where it does not, ``never`` adds nothing. The first id is never scored: with
    nothing in front that is the first token of the text. ``known`` is the number of ids that the
    model has embeddings for.
    """

    tokenizer: Any
    front: tuple[int, ...]
    max_tokens: int
    known: int

    @classmethod
    def of(
        cls, tokenizer: Any, model: Any, *, max_tokens: int | None = None, bos: Bos = "auto"
    ) -> "TextTokenizer":
        """Take the model's context as the limit, or ``max_tokens`` when that is less."""
        limit = min(max_tokens or context(model), context(model))
        if limit < 2:
            raise UserError(f"max_tokens={limit} leaves no token to predict", "give 2 or more")
        known = model.get_input_embeddings().weight.shape[0]
        return cls(tokenizer, tuple(_front(tokenizer, bos)), limit, known)

    def __call__(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokenise many texts in one call; long ones only as far as they are scored."""
        room = self.max_tokens - len(self.front)
        most = (room + MARGIN) * CHARACTERS_PER_TOKEN
        clean = [cleaned(text) for text in texts]
        found = tokenize(self.tokenizer, [text[:most] for text in clean], adds_special=False)
        encoded = []
        for given, text, ids in zip(texts, clean, found, strict=True):
            size = most
            while size < len(text) and len(ids) < room + MARGIN:
                size *= 4
                (ids,) = tokenize(self.tokenizer, [text[:size]], adds_special=False)
            kept = text if len(ids) <= room else self.start_of(text[:size], ids[:room])
            row = [*self.front, *ids[:room]]
            encoded.append(Encoded(row, kept, len(ids) > room, text != given))
        self.check_ids([id_ for row in encoded for id_ in row.ids])
        return encoded

    def check_ids(self, ids: Sequence[int]) -> None:
        """Refuse ids that the model does not know.

        Raises:
            UserError: names the largest id and how many the model knows.
        """
        largest = max(ids, default=0)
        if largest >= self.known:
            raise UserError(
                f"the tokenizer writes token {largest}, but the model knows {self.known} tokens",
                "give the tokenizer and the model of one folder that was saved together",
            )

    @property
    def warnings(self) -> list[str]:
        """Say that the model has many more tokens than the tokenizer can write."""
        size = len(self.tokenizer)
        if size >= LEAST_SHARE * self.known:
            return []
        return [
            f"the tokenizer has {size:,} tokens and the model {self.known:,}: do they belong "
            "together? With another model's tokenizer every score is meaningless"
        ]

    def start_of(self, text: str, ids: list[int]) -> str:
        """Give the characters that the first ids of a text stand for."""
        if not getattr(self.tokenizer, "is_fast", False):
            return str(self.tokenizer.decode(ids))
        spans = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        return text[: spans[len(ids) - 1][1]]


def context(model: Any) -> int:
    """Give the most tokens that the model takes at once."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048)


def _front(tokenizer: Any, bos: Bos) -> list[int]:
    found = [] if bos == "never" else tokenize(tokenizer, [""], adds_special=True)[0]
    if found or bos != "always":
        return found
    token = tokenizer.bos_token_id
    token = tokenizer.eos_token_id if token is None else token
    if token is None:
        raise UserError("the tokenizer has neither BOS nor EOS", "use bos=auto or bos=never")
    return [int(token)]
