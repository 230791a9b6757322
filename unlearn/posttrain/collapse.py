"""Collapse of training on pairs: the right answers become unlikely together with the wrong ones.

A slow decline of both is normal while wrong answers are pushed down (REDI, arXiv:2505.24850,
section 4); a fast one is the model falling apart.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

WATCHED = "chosen/nll"
"""The reading that is watched: mean loss of the chosen answers, nats per token."""


@dataclass
class CollapseGuard(TrainerCallback, ExportableState):
    """Warns once, and with ``stop`` ends the training, when chosen answers have become unlikely.

    Their loss, averaged over the last ``window`` steps, is compared with that over the first ones.
    ``read`` gives the readings of the step just taken, equal on all ranks. Both averages travel in
    the checkpoints.
    """

    emit: Callable[[dict[str, Any]], None]
    read: Callable[[], Mapping[str, float]]
    drop: float = 1.0
    window: int = 10
    stop: bool = False
    begun: list[float] = field(default_factory=list)
    recent: deque[float] = field(default_factory=deque)
    told: bool = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the averages from the checkpoint that is resumed (or those that there are)."""
        kept = state.stateful_callbacks[type(self).__name__]["attributes"]
        self.begun, self.recent = list(kept["begun"]), deque(kept["recent"])
        self.told = bool(kept["told"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lost = self.after_step(self.read().get(WATCHED, math.nan))
        if lost <= self.drop:
            return
        if not self.told:
            self.told = True
            then = "training stops here" if self.stop else "training goes on"
            self.emit(
                {
                    "event": "warning",
                    "message": f"after {state.global_step} steps chosen answers have lost "
                    f"{lost:.2f} nats per token, more than {self.drop:g}: the model is collapsing; "
                    f"{then} (training.collapse). A smaller learning rate, or a smaller weight of "
                    "the rejected answers, would keep it",
                }
            )
        if self.stop:
            control.should_training_stop = control.should_save = True

    def after_step(self, loss: float) -> float:
        """Take in a step's loss; give how much it has risen, or 0 before there are two windows."""
        if len(self.begun) < self.window:
            self.begun.append(loss)
            return 0.0
        self.recent.append(loss)
        if len(self.recent) > self.window:
            self.recent.popleft()
        if len(self.recent) < self.window:
            return 0.0
        return (math.fsum(self.recent) - math.fsum(self.begun)) / self.window

    def state(self) -> dict[str, Any]:
        """Give what both averages are made of."""
        kept = {"begun": self.begun, "recent": list(self.recent), "told": self.told}
        return {"args": {}, "attributes": kept}
