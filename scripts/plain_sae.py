"""Training a dictionary as it is written down first: the other side of ``bench_sae.py``.

Every step runs the whole model, head included, on the rows of its batch and keeps one layer's
states; nothing is shuffled or kept. The dictionary's step is dense: all latents are decoded and get
gradients, AuxK as well. The formulas and the first weights are those of :mod:`unlearn.sae`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from unlearn.sae.corpus import Corpus, Reader, kept_positions
from unlearn.sae.learner import Learner
from unlearn.sae.settings import TrainSettings


class PlainLearner:
    """The dense step of ``topk`` and ``batchtopk``; parameters are copied from ours at first."""

    def __init__(self, start: Learner) -> None:
        self.how, self.width, self.latents = start.settings, start.width, start.latents
        self.params = {n: p.detach().clone().requires_grad_() for n, p in start.params.items()}
        self.optimiser = torch.optim.Adam(list(self.params.values()))
        self.silent, self.step = torch.zeros(self.latents, dtype=torch.int64), 0

    def learn(self, x: Tensor) -> float:
        """Take one step; give the squared error per token."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.how.learning_rate(self.step, self.latents)
        w_enc, b_enc, w_dec, b_dec = (
            self.params[name] for name in ("w_enc", "b_enc", "w_dec", "b_dec")
        )
        pre = (x - b_dec) @ w_enc + b_enc
        a = self._chosen(pre)
        error = x - (a @ w_dec + b_dec)
        told = error.square().sum(-1).mean()
        dead = self.silent >= self.how.dead_after
        loss = told + self.how.aux * self._aux_k(error, pre, w_dec, dead) if dead.any() else told
        self.optimiser.zero_grad()
        loss.backward()
        with torch.no_grad():
            w_dec.grad -= (w_dec.grad * w_dec).sum(1, keepdim=True) * w_dec
            self.optimiser.step()
            w_dec /= w_dec.norm(dim=1, keepdim=True)
        self.silent = torch.where((a > 0).any(0), 0, self.silent + len(x))
        self.step += 1
        return float(told.detach())

    def _chosen(self, pre: Tensor) -> Tensor:
        if self.how.kind == "topk":
            best = pre.topk(self.how.k, dim=-1)
            return torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
        flat = pre.relu().flatten()
        best = flat.topk(self.how.k * len(pre))
        return torch.zeros_like(flat).scatter(0, best.indices, best.values).view_as(pre)

    def _aux_k(self, error: Tensor, pre: Tensor, w_dec: Tensor, dead: Tensor) -> Tensor:
        k_aux = min(self.width // 2, int(dead.sum()))
        best = pre.masked_fill(~dead, -torch.inf).topk(k_aux, dim=-1)
        a = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
        share = min(1.0, float(dead.sum()) / (self.width // 2))
        return share * (a @ w_dec - error.detach()).square().sum(-1).mean()


class PlainTraining:
    """Reads rows, runs the model on them, learns: one after the other."""

    def __init__(self, model: Any, corpus: Corpus, settings: TrainSettings, width: int) -> None:
        self.model, self.corpus, self.how, self.width = model, corpus, settings, width
        self.learner: PlainLearner | None = None
        self.scale = 1.0
        longest = int((corpus.starts[1:] - corpus.starts[:-1]).max())
        self.rows = self._rows(-(-settings.batch // (longest - corpus.front)))

    def _rows(self, number: int) -> Iterator[list[int]]:
        every, _ = self.corpus.split(self.how.held_out, self.how.seed)
        return iter(Reader(self.corpus, every, self.how.seed, number))

    def activations(self) -> Tensor:
        """Give the next batch of what leaves the layer, or a little less where rows are short."""
        batch = self.corpus.batch(next(self.rows))
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            states = self.model(**inputs, output_hidden_states=True).hidden_states
        return states[self.how.layer + 1][kept_positions(batch)][: self.how.batch]

    def step(self) -> None:
        """Take one step."""
        x = self.activations()
        if self.learner is None:
            self.scale = self.width**0.5 / float(x.norm(dim=1).mean())
            start = Learner(self.how, self.width)
            start.begin(x * self.scale)
            self.learner = PlainLearner(start)
        self.learner.learn(x * self.scale)
