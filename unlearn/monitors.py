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

from unlearn.errors import Interrupted, RunFailed

Emit = Callable[[dict[str, Any]], None]

PROBE = 64
"""How many elements of a tensor are watched: those with the largest gradient."""
PATIENCE = 3
"""Steps a tensor may wait for its first gradient: a LoRA A matrix gets none while B is zero."""


def peak_memory_bytes() -> int:
    """Give the most memory this process has held: device memory on CUDA, resident memory else."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


@dataclass
class UpdateCheck(TrainerCallback):
    """Checks once that training reaches every trainable tensor.

    After the first step with a learning rate above zero each trainable tensor must have moved. A
    tensor whose gradient is exactly zero is given :data:`PATIENCE` steps. What did not move is
    named in an ``unmoved`` event.
    """

    emit: Emit
    steps: int = 0
    pending: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, tuple[Tensor, Tensor] | None] = field(default_factory=dict)
    done: bool = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.pending = {name: tensor for name, tensor in named if tensor.requires_grad}
        self.done = state.global_step > 0  # a resumed run was checked before

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.done and kwargs["optimizer"].param_groups[0]["lr"] > 0:
            self.before = {name: _largest(tensor) for name, tensor in self.pending.items()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.done or not self.before:
            return
        self.steps += 1
        stuck = {n: t for n, t in self.pending.items() if not _moved(t, self.before[n])}
        if self.steps == 1 and len(stuck) == len(self.pending):
            raise RunFailed(
                "the first optimiser step moved no weight at all",
                "raise training.learning_rate, or use float32: bfloat16 rounds small steps away",
            )
        patient = self.steps < PATIENCE
        self.pending = {n: t for n, t in stuck.items() if patient and not _has_gradient(t)}
        self.before = {}
        self.done = not self.pending
        if unmoved := [name for name in stuck if name not in self.pending]:
            step = state.global_step + 1
            self.emit({"event": "unmoved", "step": step, "tensors": unmoved})


def require_finite_gradients(model: Any) -> None:
    """Raise :class:`RunFailed` naming trainable tensors whose gradient is missing or not finite.

    Must be called before clipping, which spreads one NaN over all tensors.
    """
    tensors = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    missing = [name for name, tensor in tensors.items() if tensor.grad is None]
    if missing:
        raise RunFailed(
            _named("no gradient reached", missing), "freeze them or change the objective"
        )
    bad = [n for n, t in tensors.items() if t.grad is not None and not t.grad.isfinite().all()]
    if bad:
        hint = "lower training.learning_rate, or train in float32"
        raise RunFailed(_named("the gradient is not finite in", bad), hint)


def _named(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{what} {len(names)} trainable tensors: {', '.join(names[:5])}{more}"


def _has_gradient(tensor: Tensor) -> bool:
    return tensor.grad is not None and bool(tensor.grad.any())


def _largest(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Give the places of the largest gradients and the values there, before the step."""
    if tensor.grad is None:
        return None
    flat = tensor.grad.detach().abs().flatten()
    places = flat.topk(min(PROBE, len(flat))).indices
    return places, tensor.detach().flatten()[places].clone()


def _moved(tensor: Tensor, probe: tuple[Tensor, Tensor] | None) -> bool:
    if probe is None:
        return False
    places, values = probe
    return not torch.equal(tensor.detach().flatten()[places], values)


@dataclass
class StepEvents(TrainerCallback):
    """Emits one ``step`` event per optimiser step with every reading, the rate and the pace."""

    emit: Emit
    readings: Callable[[], Mapping[str, Tensor]]
    tokens: Callable[[], int] = lambda: 0
    started: float = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        event: dict[str, Any] = {"event": "step", "step": state.global_step + 1}
        event["of"] = state.max_steps
        event |= {name: float(value) for name, value in self.readings().items()}
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

    Outside training there is nothing to finish: the signal raises :class:`Interrupted` at once. A
    second signal stops immediately.
    """

    requested: bool = False
    in_step: bool = False

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
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if self.requested or not self.in_step:
            raise Interrupted("stopped on request")
        self.requested = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_step = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.requested:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_step = False
