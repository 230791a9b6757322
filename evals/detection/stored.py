"""Scores of texts under a model, kept in a folder: computed once, gone on with after a stop."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unlearn.detect.engine import Side, TextScorer
from unlearn.detect.output import Busy, output
from unlearn.detect.text import ScoredText, Text
from unlearn.models import tokenizer_sha256, weights_hash

LAYOUT = "detect scores 1"
"""Changes whenever a score does, so that no old file is taken for a new one."""
Row = dict[str, Any]


def stored_blocks(
    scorer: TextScorer, texts: Sequence[Text], folder: Path | None
) -> Iterator[list[Row]]:
    """Give the scores of texts block by block, from ``folder`` as far as they are there.

    Rows have ``n_tokens``, ``status`` and ``scores``. The folder only saves time: without one, with
    one that cannot be written and while another process fills the same file, all are computed.
    """
    if folder is None:
        yield from _computed(scorer, texts)
        return
    key = _key(scorer, texts)
    path = folder / "detect" / f"{key}.jsonl"
    if path.is_file():
        yield [json.loads(line) for line in path.read_bytes().splitlines()]
        return
    done = 0
    try:
        with output(path, {"key": key}) as file:
            done = file.done
            yield list(file.rows())
            for block in _computed(scorer, texts[done:]):
                file.append(block)
                done += len(block)
                yield block
    except (Busy, OSError):
        yield from _computed(scorer, texts[done:])


def _computed(scorer: TextScorer, texts: Sequence[Text]) -> Iterator[list[Row]]:
    for block in scorer.blocks(texts):
        yield [_row(one) for one in block]


def _row(one: ScoredText) -> Row:
    return {"n_tokens": one.num_tokens, "status": one.status, "scores": one.scores}


def _key(scorer: TextScorer, texts: Sequence[Text]) -> str:
    """Hash all that the scores depend on: models, tokenizers, settings, tables, texts."""
    table = scorer.frequencies
    parts = {
        "layout": LAYOUT,
        "sides": [_side(side) for side in (scorer.side, scorer.reference) if side is not None],
        "settings": asdict(scorer.settings),
        "prefixes": {name: prefix.ids for name, prefix in scorer.prefixes.items()},
        "table": hashlib.sha256(table.probabilities.numpy().tobytes()).hexdigest()
        if table is not None
        else None,
        "texts": [[text.text, *text.neighbours] for text in texts],
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _side(side: Side) -> list[str]:
    config = side.model.config.to_json_string()
    return [weights_hash(side.model), config, tokenizer_sha256(side.tokenizer.tokenizer)]
