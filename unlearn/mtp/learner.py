"""A mask predictor that learns: one optimiser step at a time, on one rank or several."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unlearn.data.encode import Example
from unlearn.errors import RunFailed
from unlearn.mtp.layout import Blocks, draw_anchors
from unlearn.mtp.passes import Sums, learnt, losses_of, read_text, recomputing
from unlearn.mtp.predictor import MaskPredictor
from unlearn.mtp.settings import TrainSettings
from unlearn.ranks import Ranks


@dataclass(frozen=True)
class Told:
    """What a step tells: mean losses per mask, and the share of masks whose draft was right.

    ``base`` and ``sampler`` in nats, ``lcm`` squared. ``right``: the draft, given the true token
    before, is what the base says with the whole text before it.
    """

    base: float
    sampler: float
    lcm: float
    right: float
    masks: int


@dataclass(frozen=True)
class Row:
    """A sequence of a step, its blocks, and the ordinary positions that the sampler learns at."""

    ids: Tensor
    blocks: Blocks
    ntp: Tensor


class Learner:
    """AdamW on a predictor's own parameters, kept in fp32; the model is never changed."""

    def __init__(
        self, predictor: MaskPredictor, settings: TrainSettings, ranks: Ranks | None = None
    ) -> None:
        self.predictor, self.settings, self.step = predictor, settings, 0
        self.ranks = ranks or Ranks()
        named = predictor.trained()
        if not settings.train_mask_embeddings:
            del named["mask_embeddings"]
            predictor.masks.requires_grad_(False)
        self.parameters = named
        self.optimiser = torch.optim.AdamW(
            list(named.values()), lr=settings.lr, weight_decay=settings.weight_decay
        )

    def learn(self, examples: Sequence[tuple[int, Example]]) -> Told:
        """Take one step on all sequences of it; each rank computes its part of them.

        Examples come with their places, from which anchors are drawn: so neither the number of
        ranks nor a stop changes them.

        Raises:
            RunFailed: the gradient is not finite; nothing was changed by it.
        """
        rows = [self._row(place, example) for place, example in examples]
        masks, sampled = _counts(rows)
        rate = self.settings.learning_rate(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad()
        sums = self._none()
        for row in rows[self.ranks.rank :: self.ranks.size]:
            sums += self._backward(row, masks, sampled)
        norm = self._gather()
        if not math.isfinite(norm):  # alike on every rank: the sum is
            message = f"the gradient of step {self.step + 1} is not finite"
            raise RunFailed(message, "lower lr, or load the model in float32: model.dtype=float32")
        self.optimiser.step()
        self.step += 1
        return self._told(sums, masks, sampled)

    @torch.no_grad()
    def measure(self, examples: Sequence[tuple[int, Example]]) -> Told:
        """Give what sequences that are not learnt from tell; ranks share them."""
        rows = [self._row(place, example) for place, example in examples]
        sums = self._none()
        for row in rows[self.ranks.rank :: self.ranks.size]:
            text = read_text(self.predictor, row.ids)
            with self.predictor.gate.open(row.blocks.positions.numel()):
                found = losses_of(self.predictor, self.settings, text, row.blocks, row.ntp)
            sums += _stacked(found)
        return self._told(sums, *_counts(rows))

    def _none(self) -> Tensor:
        return torch.zeros(4, dtype=torch.float64, device=self.predictor.device)

    def _told(self, sums: Tensor, masks: int, sampled: int) -> Told:
        base, sampler, lcm, right = self.ranks.add(sums).tolist()
        return Told(base / masks, sampler / sampled, lcm / masks, right / masks, masks)

    def _row(self, place: int, example: Example) -> Row:
        device, settings = self.predictor.device, self.settings
        ids, labels = torch.tensor(example.input_ids), torch.tensor(example.labels)
        seed = (settings.seed * 1_000_003 + self.step) * 1_000_003 + place
        generator = torch.Generator().manual_seed(seed % 2**63)
        anchors = draw_anchors(labels, settings.anchors, generator)
        ntp = learnt(labels) if settings.sampler_on_ntp else ids[:0]
        ids, labels, anchors = ids.to(device), labels.to(device), anchors.to(device)
        return Row(ids, Blocks.at(anchors, ids, labels, settings.k), ntp.to(device))

    def _backward(self, row: Row, masks: int, sampled: int) -> Tensor:
        """Add the gradients of a sequence; give its sums of losses and of right drafts."""
        how, predictor = self.settings, self.predictor
        number = row.blocks.positions.numel()
        with recomputing(predictor, on=how.gradient_checkpointing):
            text = read_text(predictor, row.ids)
            with predictor.gate.open(number):
                sums = losses_of(predictor, how, text, row.blocks, row.ntp)
                loss = (how.base_weight * sums.base + how.lcm_weight * sums.lcm) / masks
                loss = loss + how.sampler_weight * sums.sampler / sampled
                loss.backward()
        return _stacked(sums)

    @torch.no_grad()
    def _gather(self) -> float:
        """Add the gradients of all ranks and limit their norm; give it as it was before."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.copy_(self.ranks.add(parameter.grad))
        most = self.settings.max_grad_norm or math.inf
        return float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), most))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Give all that the next steps depend on: tensors, and plain values."""
        found = {f"params.{name}": one.detach() for name, one in self.predictor.trained().items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state[parameter].items():
                found[f"adam.{key}.{name}"] = value
        return found, {"step": self.step}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for name, parameter in self.predictor.trained().items():
            parameter.copy_(tensors[f"params.{name}"])
        for name, parameter in self.parameters.items():
            self.optimiser.state[parameter] = {
                key: _placed(tensors[f"adam.{key}.{name}"], key, parameter)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.step = int(values["step"])


def _counts(rows: Sequence[Row]) -> tuple[int, int]:
    """Count the masks that learn something, and the positions that the sampler learns at."""
    masks = sum(int(row.blocks.pairs.sum()) for row in rows)
    return masks, masks + sum(len(row.ntp) for row in rows)


def _stacked(sums: Sums) -> Tensor:
    told = (sums.base, sums.sampler, sums.lcm, sums.right)
    return torch.stack([one.detach().double() for one in told])


def _placed(value: Tensor, key: str, parameter: Tensor) -> Tensor:
    """AdamW counts its steps on the CPU."""
    return value.clone() if key == "step" else value.to(parameter.device, copy=True)
