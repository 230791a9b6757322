"""What training remembers beyond weights and optimiser, in the checkpoints of transformers."""

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from unlearn.objectives.dual import Stateful


class Memory(TrainerCallback, ExportableState):
    """Tells what remembers (losses with a state, weights of rows) about every step, and keeps it.

    The states travel in the checkpoints.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the states from the checkpoint that is resumed (or those that there are)."""
        kept = state.stateful_callbacks[type(self).__name__]["attributes"]
        for loss, stored in zip(self.trainer.losses, kept["states"], strict=True):
            if isinstance(loss, Stateful):
                loss.load_state_dict(stored)
        self.trainer.weighing.load(kept["weights"])
        if self.trainer.pruner and kept["rows"]:
            self.trainer.pruner.load_state_dict(kept["rows"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.tell_losses()
        self.trainer.weighing.after_step()
        if pruner := self.trainer.pruner:
            pruner.after_step(
                self.trainer.accelerator.gather, self.trainer.args.per_device_train_batch_size
            )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.weighing.after_epoch()

    def state(self) -> dict[str, Any]:
        """Give the state of every loss, in the order of the terms; None for those without."""
        losses = self.trainer.losses
        states = [loss.state_dict() if isinstance(loss, Stateful) else None for loss in losses]
        weights = self.trainer.weighing.state()
        rows = self.trainer.pruner.state_dict() if self.trainer.pruner else None
        return {"args": {}, "attributes": {"states": states, "weights": weights, "rows": rows}}
