"""The same questions answered by several models, next to each other."""

from collections.abc import Iterator, Mapping
from typing import Any

PER_SPLIT = 8


def side_by_side(
    found: Mapping[str, Mapping[str, Any]], *, per_split: int = PER_SPLIT
) -> list[dict[str, Any]]:
    """Join the records of stored results (by model name) on split and row; the first of each split.

    Rows without a written answer (plain text, or ``generate: false``) are left out.
    """
    answers = {name: dict(_answers(result["records"])) for name, result in found.items()}
    shown: dict[str, int] = {}
    joined = []
    for record in next(iter(found.values()))["records"]:
        split, place = record["split"], (record["split"], record["row"])
        if any(place not in answers[name] for name in found):
            continue
        shown[split] = shown.get(split, 0) + 1
        if shown[split] <= per_split:
            texts = {key: record[key] for key in ("split", "question", "answer")}
            joined.append(texts | {name: answers[name][place] for name in found})
    return joined


def _answers(records: Any) -> Iterator[tuple[tuple[str, int], str]]:
    for record in records:
        if record.get("generation") is not None:
            yield (record["split"], record["row"]), record["generation"]
