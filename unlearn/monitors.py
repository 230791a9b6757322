"""What watches a training run: does every tensor learn, what happened, has somebody said stop."""

import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from unlearn.engines import local
from unlearn.errors import Interrupted, RunFailed
from unlearn.launch import SAME_REQUEST

Emit = Callable[[dict[str, Any]], None]

PROBE = 64
"""How many elements of a tensor are watched: those with the largest gradient."""
SPREAD = 4096
"""How many are watched where gradients cannot be seen."""
PATIENCE = 3
"""Steps a tensor may wait for its first gradient: a LoRA A matrix gets none while B is zero."""


def peak_memory_bytes() -> int:
    """Give the most memory this process has held: device memory on CUDA, resident memory else."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


ROUNDED = (
    "bfloat16 weights round small steps away; model.dtype=float32 with training.bf16=true keeps "
    "the weights whole and computes in bfloat16"
)


@dataclass
class UpdateCheck(TrainerCallback):
    """Checks once that training reaches every trainable tensor.

    After the first step with a learning rate above zero each trainable tensor must have moved, on
    some rank. A tensor whose gradient is exactly zero is given :data:`PATIENCE` steps. What did not
    move is named in an ``unmoved`` event, with the likely reason. ``hidden``: the engine keeps the
    gradients to itself; then elements all over the tensor are watched, and every tensor is given
    the patience.
    """

    emit: Emit
    hidden: bool = False
    moved: Callable[[Tensor], Tensor] = lambda flags: flags
    """Adds flags up over the ranks."""
    steps: int = 0
    pending: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    done: bool = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.pending = {name: tensor for name, tensor in named if tensor.requires_grad}
        self.done = state.global_step > 0  # a resumed run was checked before

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.hidden:  # such an engine's step is over when the others' begins
            self._watch(kwargs["optimizer"], _spread)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.hidden:
            self._watch(kwargs["optimizer"], _largest)

    def _watch(self, optimizer: Any, places: Callable[[Tensor], Tensor]) -> None:
        if self.done or optimizer.param_groups[0]["lr"] <= 0:
            return
        for name, tensor in self.pending.items():
            chosen = places(tensor)
            self.before[name] = chosen, local(tensor).flatten()[chosen].clone()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.done or not self.before:
            return
        self.steps += 1
        stuck, waiting = self._stuck()
        if self.steps == 1 and len(stuck) == len(self.pending):
            raise RunFailed(
                "the first optimiser step moved no weight at all",
                "raise training.learning_rate, or use float32: bfloat16 rounds small steps away",
            )
        half = {name for name, one in self.pending.items() if one.dtype == torch.bfloat16}
        patient = self.steps < PATIENCE
        self.pending = {name: self.pending[name] for name in stuck if patient and name in waiting}
        self.before = {}
        self.done = not self.pending
        if unmoved := [name for name in stuck if name not in self.pending]:
            found = {"step": state.global_step + 1, "tensors": unmoved}
            why = {"why": ROUNDED} if half & set(unmoved) and not self.hidden else {}
            self.emit({"event": "unmoved", **found, **why})

    def _stuck(self) -> tuple[list[str], set[str]]:
        """Name the tensors that moved on no rank, and those without any gradient on all ranks."""
        moved = [_moved(tensor, *self.before[name]) for name, tensor in self.pending.items()]
        driven = [not self.hidden and _has_gradient(tensor) for tensor in self.pending.values()]
        flags = self.moved(torch.tensor([moved, driven]).int()).bool().tolist()
        names = list(self.pending)
        return (
            [name for name, yes in zip(names, flags[0], strict=True) if not yes],
            {name for name, yes in zip(names, flags[1], strict=True) if not yes},
        )


def require_finite_norm(norm: float, step: int, readings: Mapping[str, Any]) -> None:
    """Raise :class:`RunFailed` before a step whose gradient would spoil every weight.

    ``readings`` are the step's losses on this process: those that are no numbers are named.
    """
    if math.isfinite(norm):
        return
    bad = [name for name, value in readings.items() if not math.isfinite(float(value))]
    where = f": {', '.join(bad[:3])} is no finite number" if bad else ""
    raise RunFailed(
        f"the gradient of step {step} is not finite{where}",
        "checkpoints before it are kept; lower training.learning_rate, or train in float32",
    )


def require_finite_gradients(model: Any, norm: float | None = None) -> None:
    """Raise :class:`RunFailed` naming trainable tensors whose gradient is missing or not finite.

    Must be called before clipping, which spreads one NaN over all tensors. ``norm`` is that of the
    whole gradient, from an engine that keeps the tensors to itself: nothing can be named then.
    """
    hint = "lower training.learning_rate, or train in float32"
    if norm is not None:
        if not math.isfinite(norm):
            raise RunFailed("the gradient of the first step is not finite", hint)
        return
    tensors = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    missing = [name for name, tensor in tensors.items() if tensor.grad is None]
    if missing:
        raise RunFailed(
            _named("no gradient reached", missing), "freeze them or change the objective"
        )
    bad = [n for n, t in tensors.items() if not local(t.grad).isfinite().all()]
    if bad:
        raise RunFailed(_named("the gradient is not finite in", bad), hint)


def _named(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{what} {len(names)} trainable tensors: {', '.join(names[:5])}{more}"


def _has_gradient(tensor: Tensor) -> bool:
    return tensor.grad is not None and bool(local(tensor.grad).any())


def _largest(tensor: Tensor) -> Tensor:
    """Give the places of the largest gradients in this process's part."""
    if tensor.grad is None:
        return torch.empty(0, dtype=torch.long, device=tensor.device)
    flat = local(tensor.grad).abs().flatten()
    return flat.topk(min(PROBE, len(flat))).indices


def _spread(tensor: Tensor) -> Tensor:
    """Give places all over this process's part."""
    part = local(tensor)
    step = max(1, part.numel() // SPREAD)
    return torch.arange(0, part.numel(), step, device=part.device)


def _moved(tensor: Tensor, places: Tensor, values: Tensor) -> bool:
    return not torch.equal(local(tensor).flatten()[places], values)


@dataclass
class StepEvents(TrainerCallback):
    """Emits one ``step`` event per optimiser step with every reading, the rate and the pace."""

    emit: Emit
    readings: Callable[[], Mapping[str, float]]
    tokens: Callable[[], int] = lambda: 0
    started: float = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        event: dict[str, Any] = {"event": "step", "step": state.global_step + 1}
        event["of"] = state.max_steps
        event |= self.readings()
        _require_finite_readings(event)
        event["learning_rate"] = kwargs["optimizer"].param_groups[0]["lr"]
        event["seconds"] = round(time.monotonic() - self.started, 3)
        event["tokens"] = self.tokens()
        event["memory_bytes"] = peak_memory_bytes()
        self.emit(event)


def _require_finite_readings(event: Mapping[str, Any]) -> None:
    bad = [name for name, value in event.items() if "/" in name and not math.isfinite(value)]
    if bad:
        raise RunFailed(
            f"{', '.join(bad)} is not finite at step {event['step']}: training has diverged",
            "lower training.learning_rate or the number of steps; `unlearn resume` goes on from "
            "the last checkpoint",
        )


@dataclass
class EverySteps(TrainerCallback):
    """Calls ``action(step)`` every ``every`` optimiser steps, with the model in evaluation mode."""

    every: int
    action: Callable[[int], None]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            model = kwargs["model"]
            model.eval()
            self.action(state.global_step)
            model.train()


@dataclass
class StopRequest(TrainerCallback):
    """Turns SIGINT and SIGTERM into a saved checkpoint at the end of the current step.

    ``agree`` tells every rank whether one of them was asked: all stop after the same step. Outside
    training there is nothing to finish: the signal raises :class:`Interrupted` at once. A second
    signal stops immediately, except a SIGTERM that comes with the first: a scheduler may send it to
    every process while the launcher passes it on.
    """

    requested: bool = False
    stopped: bool = False
    in_step: bool = False
    agree: Callable[[bool], bool] = bool
    asked_at: float = -math.inf

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handle the signals inside this block; give them back afterwards.

        Only the main thread may handle signals; in another thread nothing is changed.
        """
        main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield self
        except Exception as error:
            if self.requested or self.stopped:
                # the others have stopped already, and what we waited for never came
                raise Interrupted("stopped on request") from error
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        before, self.asked_at = self.asked_at, time.monotonic()
        if number == signal.SIGTERM and self.asked_at - before < SAME_REQUEST:
            return
        if self.requested or not self.in_step:
            self.stopped = True
            raise Interrupted("stopped on request")
        self.requested = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_step = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.requested = self.agree(self.requested)
        if self.requested:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_step = False
