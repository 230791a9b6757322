"""Program of test_ranks.py: one of several processes that evaluate a saved model together."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed

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


def main() -> None:
    """Take part as one rank: twice, the second time with everything stored."""
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size
    )
    evaluate(folder, f"first-{rank}", "weights", wrapped=True)
    evaluate(folder, f"second-{rank}", "weights")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
