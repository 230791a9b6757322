"""Work of test_train.py on one of several processes: a mask predictor trained together."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from unlearn.data.encode import Example
from unlearn.models import load_model
from unlearn.mtp.settings import TrainSettings
from unlearn.mtp.train import train_predictor


def rows(number: int = 30) -> list[Example]:
    """Draw texts of 6 to 20 random tokens, the first two a prompt."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for place in range(number):
        length = int(torch.randint(6, 21, (), generator=generator))
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        found.append(Example(ids, [-100, -100, *ids[2:]], 2, place))
    return found


def work(folder: Path, name: str) -> None:
    """Train for some steps of five sequences; write what was learnt."""
    how = TrainSettings(k=2, rank=3, steps=6, batch=5, anchors=5, lr=3e-3, sampler_on_ntp=True)
    model = load_model(str(folder), device="cpu")
    trained = train_predictor(model, rows(), how)
    values = {name: one.detach().contiguous() for name, one in trained.predictor.trained().items()}
    figures = torch.tensor([trained.metrics[key] for key in ("base", "sampler", "lcm", "right")])
    save_file({**values, "figures": figures}, folder / name)
