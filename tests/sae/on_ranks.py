"""Work of test_train.py on one of several processes: dictionaries trained together."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from unlearn.models import load_model
from unlearn.sae.corpus import apart
from unlearn.sae.settings import TrainSettings
from unlearn.sae.train import train_dictionary


def work(folder: Path, name: str) -> None:
    """Train a dictionary of every kind that is asked for; write weights and figures."""
    model = load_model(str(folder), device="cpu")
    draw = np.random.default_rng(0)
    rows = [draw.integers(3, 300, int(draw.integers(8, 30))).tolist() for _ in range(60)]
    corpus, tensors, figures = apart(rows, front=[1], context=32), {}, {}
    for kind in (folder / "kinds").read_text().split(","):
        how: Any = {"layer": 0, "kind": kind, "features": 48, "k": 4, "steps": 10, "batch": 65}
        how |= {"buffer": 256, "model_tokens": 200, "held_out": 4, "dead_tokens": 100}
        trained = train_dictionary(model, corpus, TrainSettings(**how))
        weights = trained.dictionary.tensors()
        tensors |= {f"{kind} {key}": value for key, value in weights.items()}
        told = trained.metrics.items()
        figures[kind] = {key: value for key, value in told if value is not None}
    save_file({key: one.contiguous() for key, one in tensors.items()}, folder / name)
    (folder / f"{name}.json").write_text(json.dumps(figures))
