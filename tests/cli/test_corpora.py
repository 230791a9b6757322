"""Unlearning from corpora of plain text, in the three forms in which WMDP's come."""

import json
from pathlib import Path
from typing import Any

TEXTS = [f"Bo number {n} paints small boats in the morning, again and again." for n in range(12)]


def test_a_run_on_strings_and_plain_text(world: Path, run_npo: Any) -> None:
    """JSON strings to forget, a text file to keep: texts are trained on whole, nothing is asked."""
    Path("corpus.jsonl").write_text("".join(json.dumps(text) + "\n" for text in TEXTS))
    Path("wiki.txt").write_text("\n\n".join(TEXTS) + "\n")
    outcome = run_npo(options=("--json",), forget="corpus.jsonl", retain="wiki.txt")
    assert outcome.code == 0, outcome.err
    assert outcome.json["provenance"]["forget"]["rows"] == len(TEXTS)
    assert outcome.json["provenance"]["retain"]["rows"] == len(TEXTS)
    assert outcome.json["metrics"]["after"]["forget_Q_A_Prob"] is not None
    assert outcome.json["examples"] == []


def test_a_run_on_objects_and_bare_lines(world: Path, run_npo: Any) -> None:
    papers = [{"title": f"T{n}", "abstract": "A", "text": text} for n, text in enumerate(TEXTS)]
    Path("bio.jsonl").write_text("".join(json.dumps(paper) + "\n" for paper in papers))
    Path("bare.jsonl").write_text("\n".join(TEXTS) + "\n")
    outcome = run_npo(options=("--json",), forget="bio.jsonl", retain="bare.jsonl")
    assert outcome.code == 0, outcome.err
    assert "warning: 'bare.jsonl' holds no JSON: each line is read as one text" in outcome.err


def test_a_damaged_line_makes_no_text(world: Path, run_npo: Any) -> None:
    lines = [json.dumps(text) for text in TEXTS]
    Path("torn.jsonl").write_text("\n".join([*lines, '{"text": "half a li']) + "\n")
    outcome = run_npo(options=("--json",), forget="torn.jsonl")
    assert outcome.code == 2
    assert "line 13 is not JSON" in outcome.err
    assert not Path("out").exists()
