"""Score texts with every detector in one pass over the model."""

from collections.abc import Sequence
from typing import Any

from unlearn.data import Template, encode, pad_token_id
from unlearn.detect import loss, min_k, zlib_ratio
from unlearn.errors import UserError
from unlearn.models import ModelSource, load_model, load_tokenizer
from unlearn.scoring import scored


def score_texts(
    model_path: str, texts: Sequence[str], *, k: float = 0.2, offline: bool = False
) -> list[dict[str, Any]]:
    """Give one row per text: its number of scored tokens and the value of every detector.

    Texts longer than the model's context are scored on their first window.

    Raises:
        UserError: ``k`` is not a share, a text has nothing to score, or the model cannot be loaded.
    """
    if not 0 < k <= 1:
        raise UserError(f"k={k} is not a share of the tokens", "give more than 0 and at most 1")
    source = ModelSource(model_path, offline=offline)
    model, tokenizer = load_model(source), load_tokenizer(source)
    limit = int(getattr(model.config.get_text_config(), "max_position_embeddings", 2048))
    template = Template.for_tokenizer(tokenizer, None, None, {})
    rows = [{"text": text} for text in texts]
    encoded = encode(rows, tokenizer, template, max_length=limit, source="the file")
    first = {example.row: example for example in reversed(encoded)}
    examples = [first[row] for row in range(len(texts))]
    found: list[dict[str, Any]] = [{}] * len(texts)
    for group, scores in scored(model, examples, pad_id=pad_token_id(tokenizer)):
        chosen = [texts[row] for row in group]
        columns = {"loss": loss(scores, chosen), "zlib": zlib_ratio(scores, chosen)}
        columns["min_k"] = min_k(scores, chosen, k=k)
        for place, row in enumerate(group):
            values = {name: float(column[place]) for name, column in columns.items()}
            tokens = int(scores.num_tokens[place])
            found[row] = {"line": row + 1, "tokens": tokens, **values, "text": texts[row]}
    return found
