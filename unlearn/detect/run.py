"""Score texts with one call: load a model, score, give one row per text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from unlearn.detect.engine import TextScorer
from unlearn.detect.settings import Settings
from unlearn.detect.text import Text
from unlearn.models import ModelSource, load_model, load_tokenizer


def score_texts(
    model_path: str,
    texts: Sequence[str],
    *,
    settings: Settings | None = None,
    k: float | None = None,
    offline: bool = False,
) -> list[dict[str, Any]]:
    """Give one row per text: ``id`` (its place), ``n_tokens``, ``status`` and ``scores`` by name.

    ``k`` is short for the settings' share. For more (a reference model, a stream that does not fit
    into memory) use :class:`~unlearn.detect.engine.TextScorer`.

    Raises:
        UserError: a setting is wrong or the model cannot be loaded.
    """
    settings = settings or Settings()
    settings = settings if k is None else replace(settings, k=(k,))
    source = ModelSource(model_path, offline=offline)
    scorer = TextScorer.of(load_model(source), load_tokenizer(source), settings)
    rows = (Text(place, text) for place, text in enumerate(texts))
    return [row.as_json() for row in scorer(rows)]
