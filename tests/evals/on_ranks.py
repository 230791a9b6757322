"""Work of test_ranks.py on one of several processes: a saved model evaluated together."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from unlearn.data.encode import Example
from unlearn.evals.answers import Evaluator
from unlearn.models import load_model, load_tokenizer
from unlearn.reference import score_rows
from unlearn.scores import Scorer

NAMES = ("log_probs", "mask", "correct", "mean", "variance")


def evaluate(folder: Path, name: str, weights_hash: str | None, *, wrapped: bool = False) -> None:
    """Evaluate the folder's model on its rows and write what was found."""
    model = load_model(str(folder), device="cpu")
    given = json.loads((folder / "rows.json").read_text())
    rows = [Example(**row) for row in given["rows"]]
    whole = torch.nn.parallel.DistributedDataParallel(model) if wrapped else model
    evaluator = Evaluator(
        model,
        load_tokenizer(str(folder)),
        batch_tokens=40,
        max_new_tokens=12,
        weights_hash=weights_hash,
    )
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    scores = evaluator.score(rows)
    answers = evaluator.write(given["prompts"], known=given["known"])
    tensors = {key: getattr(scores, key).contiguous() for key in NAMES}
    asked = len(passes)
    reference = score_rows(Scorer.for_model(model), whole, rows, batch_tokens=40)
    save_file(tensors | {"reference": torch.cat(reference)}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps({"answers": answers, "passes": asked}))


def work(folder: Path, name: str) -> None:
    """Evaluate twice, the second time with everything stored; alone once, and nothing stored."""
    if name == "alone":
        evaluate(folder, name, None)
        return
    evaluate(folder, f"first-{name}", "weights", wrapped=True)
    evaluate(folder, f"second-{name}", "weights")
