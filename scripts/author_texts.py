"""Write answers of TOFU that a model of ours was trained on beside answers it never saw.

Makes ``labelled.jsonl`` (200 that ``tofu-tiny-target`` saw, 300 that it did not),
``suspects.jsonl`` (20 and 10 others, not said which) and ``corpus.jsonl`` (1600 more unseen ones).

    python scripts/author_texts.py ../shared/data/tofu/full.json .
    unlearn detect calibrate labelled.jsonl --model ../shared/models/tofu-tiny-target --out it.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def labelled(texts: Sequence[str], label: int) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for text in texts]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} texts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tofu", type=Path, help="full.json of TOFU, one row per line")
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    with given.tofu.open(encoding="utf-8") as file:
        answers = [json.loads(line)["answer"] for line in file]
    seen, unseen = answers[3600:], answers[400:3600]
    sides = [*labelled(seen[:200], 1), *labelled(unseen[-300:], 0)]
    write(given.folder / "labelled.jsonl", sides)
    suspects = [*seen[200:220], *unseen[-310:-300]]
    write(given.folder / "suspects.jsonl", [{"text": text} for text in suspects])
    write(given.folder / "corpus.jsonl", [{"text": text} for text in unseen[:1600]])


if __name__ == "__main__":
    main()
