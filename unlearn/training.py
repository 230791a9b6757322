"""One trainer for every method: the loss is a weighted sum of terms over the whole optimiser step.

A term's objective gives one loss per token, sequence or position. The trainer counts those units in
all micro-batches and on all ranks before the first forward pass and divides once, so neither
gradient accumulation nor the number of ranks changes the step.
"""

import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from unlearn import checkpoints
from unlearn.activations import read_layer
from unlearn.data.collate import EpochSampler
from unlearn.data.pairs import SIDES
from unlearn.monitors import require_finite_gradients, require_finite_norm
from unlearn.objectives import Said
from unlearn.objectives.dual import Stateful, StepMeans
from unlearn.passes import Slopes, along, more_to_come, same_dice_later, slopes_of
from unlearn.posttrain.memory import Memory
from unlearn.posttrain.pruning import PrunedSampler, Pruner
from unlearn.posttrain.readings import pair_readings
from unlearn.posttrain.reweigher import rows_of
from unlearn.posttrain.reweighting import Rows
from unlearn.posttrain.weighing import Weighing
from unlearn.ranks import Ranks
from unlearn.reference import LiveReference
from unlearn.scores import Scorer, Scores
from unlearn.scoring import evaluation_mode
from unlearn.terms import Reads, Term, reads_of

Batch = Mapping[str, Tensor]


class UnlearningTrainer(Trainer):
    """transformers' Trainer with our loss, our data order and checkpoints that are complete.

    ``readings`` holds this process's share of the last optimiser step's value of every term (before
    its weight) and of the mean token NLL of every stream, in nats; :meth:`summary` adds them up.
    ``apart``: the streams of a micro-batch go through the model one after another.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the units of the whole step itself

    def __init__(
        self,
        *,
        terms: Sequence[Term],
        scorer: Scorer,
        live: LiveReference | None = None,
        keeping: checkpoints.Keeping | None = None,
        pruner: Pruner | None = None,
        apart: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.terms = tuple(terms)
        self.losses = [term.objective.bound(term.hyper) for term in self.terms]
        self.scorer = scorer
        self.live = live
        self.keeping = keeping or checkpoints.Keeping()
        self.pruner = pruner
        self.apart = apart
        self.args._n_gpu = min(self.args.n_gpu, 1)  # one process, one device: never DataParallel
        self.readings: dict[str, Tensor] = {}
        self.grad_norm = 0.0
        self.num_tokens = 0
        self._staging: Path | None = None
        self._slopes: Slopes = {}
        self._sides: dict[str, Scores] = {}
        self._want: dict[str, set[str]] = defaultdict(set)
        for term in self.terms:
            if term.objective.reads in ("labelled", "logits"):
                for stream in term.streams:
                    self._want[stream].add(term.objective.reads)
        self._watched = set(SIDES) & {stream for term in self.terms for stream in term.streams}
        for stream in self._watched:
            self._want[stream].add("statistics")
        self.weighing = Weighing(
            self.terms,
            self.train_dataset.streams,
            rank=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            gather=self.accelerator.gather,
            size=self.args.per_device_train_batch_size,
        )
        if any(self._stateful()) or self.weighing.active or pruner:
            self.add_callback(Memory(self))

    # Data order

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler | PrunedSampler:
        processes = self.accelerator.num_processes  # alone, the last batch may be smaller
        rows = self.args.per_device_train_batch_size * processes if processes > 1 else 1
        if self.pruner:
            return PrunedSampler(self.pruner, multiple=rows)
        size = len(train_dataset or self.train_dataset)
        return EpochSampler(size, seed=self.args.seed, multiple=rows)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Collect the micro-batches of one optimiser step and count the units of every term."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.readings = {}
        counts = self._count(batches)
        self._begin_weighing(batches)
        return batches, counts

    def _begin_weighing(self, batches: Sequence[Mapping[str, Batch]]) -> None:
        """Begin a step; where rows are weighted against all of it, ask for their losses first."""
        progress = self.state.global_step / max(1, self.state.max_steps)
        for place in self.weighing.begin(progress, len(batches)):
            term = self.terms[place]
            self.weighing.plan(place, [self._rows(term, batch[term.on]) for batch in batches])

    def _rows(self, term: Term, batch: Batch) -> Rows:
        """Read the losses of a batch's rows, without gradient."""
        batch = self._prepare_inputs(dict(batch))
        with torch.no_grad(), evaluation_mode(self.model_wrapped), self.accelerator.autocast():
            scores = self.scorer(self.model_wrapped, batch)
        return rows_of(scores, batch, term.objective.unit)

    def _count(self, batches: Sequence[Mapping[str, Batch]]) -> dict[str, Tensor]:
        counts: dict[str, Tensor] = {}
        for term in self.terms:
            counted = (term.objective.count(batch[term.on], term.hyper) for batch in batches)
            counts[term.label] = _total(counted)
        for stream in batches[0] if batches else ():
            labels = (batch[stream]["labels"][:, 1:] for batch in batches)
            counts[stream] = _total((part != -100).sum() for part in labels)
            attended = (batch[stream]["attention_mask"].sum() for batch in batches)
            counts[f"{stream}/tokens"] = _total(attended)
        if set(SIDES) <= self._watched:
            pairs = (batch["chosen"]["attention_mask"].any(-1).sum() for batch in batches)
            counts["pairs"] = _total(pairs)
        totals = self._over_ranks(counts)
        self.num_tokens += sum(int(n) for name, n in totals.items() if name.endswith("/tokens"))
        return totals

    def _over_ranks(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add up over all processes; each names the same values."""
        if not values:
            return {}
        stacked = torch.stack([torch.as_tensor(value) for value in values.values()])
        totals = self.accelerator.reduce(stacked.to(self.args.device), reduction="sum")
        return dict(zip(values, totals, strict=True))

    def summary(self) -> dict[str, float]:
        """Give the last step's readings over all processes and the norm of its gradient.

        All processes must ask.
        """
        readings = {name: float(value) for name, value in self._over_ranks(self.readings).items()}
        states = {
            f"{term.objective.name}.{key}": value
            for term, loss in self._stateful()
            for key, value in loss.state_dict().items()
            if value is not None
        }
        return readings | states | {"grad_norm": self.grad_norm}

    def tell_losses(self) -> None:
        """Let losses with a state see the means of the step that was just taken.

        All processes must ask: the means are those of the whole step, so states stay equal.
        """
        if not any(self._stateful()):
            return
        means = {name: float(value) for name, value in self._over_ranks(self.readings).items()}
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        per_epoch = -(-len(self.train_dataset) // (rows * self.accelerator.num_processes))
        epoch = self.state.global_step / per_epoch
        for term, loss in self._stateful():
            nll = means.get(f"{term.on}/nll", math.nan)
            loss.after_step(StepMeans(means[term.label], nll, epoch))

    def _stateful(self) -> Iterator[tuple[Term, Stateful]]:
        for term, loss in zip(self.terms, self.losses, strict=True):
            if isinstance(loss, Stateful):
                yield term, loss

    # Loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Give the share of the step's loss that these rows have."""
        with self.accelerator.autocast():
            if self._slopes:
                return along(self._policy(model, inputs), self._slopes)
            reference = self._reference(model, inputs)  # first: an engine's last pass is the one
            policy = self._policy(model, inputs)  # that it goes back through
            return self._loss(policy, reference, inputs, num_items_in_batch)

    def _loss(
        self,
        policy: Mapping[Reads, Said],
        reference: Mapping[Reads, Said],
        inputs: Mapping[str, Batch],
        counts: Mapping[str, Tensor],
    ) -> Tensor:
        """Add up the terms on these rows; read what is told of the step."""
        parts = []
        for place, (term, loss) in enumerate(zip(self.terms, self.losses, strict=True)):
            if term.on not in inputs:
                continue
            losses = term.objective.apply(loss, *term.said(policy, reference))
            scores, batch = policy.get((term.on, None)), inputs[term.on]
            losses, told = self.weighing.apply(place, losses, scores, batch)
            for name, value in told.items():
                self._read(name, value)
            part = losses.sum() / counts[term.label].clamp_min(1)
            self._read(term.label, part)
            parts.append(term.weight * part)
        self._tell(policy, inputs, counts)
        # Engines average gradients over ranks, the counts are global: undo the average.
        return torch.stack(parts).sum() * self.accelerator.num_processes

    def _tell(
        self,
        policy: Mapping[Reads, Said],
        inputs: Mapping[str, Batch],
        counts: Mapping[str, Tensor],
    ) -> None:
        """Read off what is watched beside the terms."""
        said = {name: one for (name, _), one in policy.items() if isinstance(one, Scores)}
        if self.pruner and (anchor := self.train_dataset.anchor) in said:
            self.pruner.see(said[anchor], inputs[anchor])
        labels = {term.label for term in self.terms}  # a term may be that very mean
        for stream, read in said.items():
            if f"{stream}/nll" not in labels:
                self._read(f"{stream}/nll", -read.log_probs.sum() / counts[stream])
        self._sides |= {name: said[name].detach() for name in self._watched & said.keys()}
        if self._sides.keys() == self._watched:
            for name, part in pair_readings(self._sides, counts):
                self._read(name, part)
            self._sides = {}

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Do the passes of a micro-batch; check the first step's gradients before clipping."""
        passes = self._one_by_one if self.apart else super().training_step
        loss = passes(model, inputs, num_items_in_batch)
        if self.state.global_step == 0 and self.accelerator.sync_gradients:
            norm = self.is_deepspeed_enabled and self.deepspeed.get_global_grad_norm()
            require_finite_gradients(model, None if norm is False else float(norm))
        return loss

    def _one_by_one(self, model: Any, inputs: Any, counts: Any) -> Tensor:
        """Send one stream after another there and back."""
        coupled = any(term.rejected for term in self.terms)
        value = self._find_slopes(model, inputs, counts) if coupled else None
        read = {stream for term in self.terms for stream in term.streams}
        *early, last = [{name: batch} for name, batch in inputs.items() if name in read]
        losses = []
        for part in early:
            with more_to_come(self.accelerator, model, self.is_deepspeed_enabled):
                losses.append(super().training_step(model, part, counts))
        losses.append(super().training_step(model, last, counts))
        self._slopes = {}
        return torch.stack(losses).sum() if value is None else value

    @torch.no_grad()
    def _find_slopes(self, model: Any, inputs: Any, counts: Any) -> Tensor:
        """Give the loss, and keep how it changes with each log-probability."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        policy: dict[Reads, Any] = {}
        with self.accelerator.autocast():
            reference = self._reference(model, inputs)
            with same_dice_later():
                for name, batch in inputs.items():
                    policy |= self._policy(model, {name: batch})
            with torch.enable_grad():
                loss = partial(self._loss, reference=reference, inputs=inputs, counts=counts)
                value, self._slopes = slopes_of(loss, policy)
        return value

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Keep the norm of the step's whole gradient, before clipping; end where it is none."""
        found = super()._get_grad_norm(model, grad_norm)
        whole = found.full_tensor() if hasattr(found, "full_tensor") else found
        self.grad_norm = float(whole)
        require_finite_norm(self.grad_norm, self.state.global_step + 1, self.readings)
        return self.grad_norm

    def _prepare_input(self, data: Any) -> Any:
        """Move to the device; under DeepSpeed stored log-probs would be rounded to bfloat16."""
        if isinstance(data, Tensor):
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def _policy(self, model: Any, inputs: Mapping[str, Batch]) -> dict[Reads, Said]:
        """Ask the model once for scores, and once per layer for what leaves it."""
        reads = [read for read in reads_of(self.terms) if read[0] in inputs]
        hidden_only = {stream for stream, _ in reads} - {s for s, layer in reads if layer is None}
        asked = {stream: inputs[stream] for stream in inputs if stream not in hidden_only}
        scores = self.scorer.streams(model, asked, want=self._want) if asked else {}
        found: dict[Reads, Said] = {(stream, None): said for stream, said in scores.items()}
        for layer in sorted({layer for _, layer in reads if layer is not None}):
            asked = {stream: inputs[stream] for stream in inputs if (stream, layer) in reads}
            hidden = read_layer(model, asked, layer)
            found |= {(stream, layer): said for stream, said in hidden.items()}
        return found

    def _reference(self, model: Any, inputs: Mapping[str, Batch]) -> dict[Reads, Said]:
        found: dict[Reads, Said] = {}
        asked: dict[int | None, dict[str, Batch]] = defaultdict(dict)
        asking = [t for t in self.terms if t.objective.uses_reference and t.on in inputs]
        asked_whole = {
            stream
            for term in asking
            if term.objective.reads in ("labelled", "logits")
            for stream in term.streams
        }
        for stream, layer in reads_of(asking):
            batch = inputs[stream]
            stored = "reference_log_probs" in batch and stream not in asked_whole
            if layer is None and stored:
                scores = Scores.from_log_probs(batch["reference_log_probs"], batch)
                found[stream, None] = scores
            else:
                asked[layer][stream] = batch
        for layer, batches in asked.items():
            assert self.live is not None
            said = self.live.streams(model, batches, self._want, layer=layer)
            found |= {(stream, layer): value for stream, value in said.items()}
        return found

    def _read(self, name: str, part: Tensor) -> None:
        self.readings[name] = self.readings.get(name, 0.0) + part.detach()

    def floating_point_ops(self, inputs: Any) -> int:
        """Give 0: tokens are counted instead, nested batches have no single input."""
        return 0

    # Checkpoints

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights; DeepSpeed's own part of a checkpoint holds them already."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Write the checkpoint elsewhere, seal it, and only then give it its name."""
        name = f"checkpoint-{self.state.global_step}"
        folder, ranks = Path(self.args.output_dir), Ranks.world()
        if ranks.first(lambda: checkpoints.problem(folder / name, self.keeping.identity) is None):
            return
        self._staging = Path(ranks.first(lambda: str(checkpoints.begin(folder / name))))
        try:
            super()._save_checkpoint(model, trial)
            ranks.barrier()
            ranks.first(lambda: self._seal(folder / name))
        finally:
            if ranks.rank == 0:  # what is left of a save that failed
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def _seal(self, folder: Path) -> None:
        assert self._staging is not None
        written = self._staging / folder.name
        for path in list(written.iterdir()):
            os.rename(path, self._staging / path.name)
        written.rmdir()
        (self._staging / "training_args.bin").unlink(missing_ok=True)  # a pickle nothing reads
        keeping = self.keeping
        checkpoints.seal(self._staging, folder, keeping.identity)
        checkpoints.prune(folder.parent, keeping.newest, best=keeping.best_step())


def _total(parts: Any) -> Tensor:
    return torch.stack(list(parts)).sum()
