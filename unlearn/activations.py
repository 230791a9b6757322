"""What leaves a layer inside the model: the other thing, beside scores, that an objective may read.

The forward pass ends at that layer: the layers above it are taken out of the model for its length.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from unlearn.errors import UserError
from unlearn.forward import hidden_states
from unlearn.head import plain, upcast
from unlearn.scores import IGNORE, join_streams
from unlearn.thinning import decoder_layers


@dataclass(frozen=True)
class Activations:
    """The residual stream after one decoder layer.

    ``hidden[i, t]`` belongs to token t itself, in fp32 (fp64 for fp64 models). ``mask`` marks
    labelled tokens (at their own place, unlike in :class:`~unlearn.scores.Scores`), ``attended``
    real ones.
    """

    hidden: Float[Tensor, "batch seq width"]
    mask: Bool[Tensor, "batch seq"]
    attended: Bool[Tensor, "batch seq"]

    @classmethod
    def of(cls, hidden: Tensor, batch: Mapping[str, Tensor]) -> "Activations":
        """Build activations from hidden states and the batch they belong to."""
        return cls(upcast(hidden), batch["labels"] != IGNORE, batch["attention_mask"].bool())


def read_layer(
    model: Any, batches: Mapping[str, Mapping[str, Tensor]], layer: int
) -> dict[str, Activations]:
    """Give what leaves layer number ``layer`` (0 is the first), for several streams in one pass.

    Batches are right-padded. Layers above are not run.
    """
    ids, widths = join_streams([batch["input_ids"] for batch in batches.values()], 0)
    attended, _ = join_streams([batch["attention_mask"] for batch in batches.values()], 0)
    with cut_after(model, layer) as last:
        hidden = hidden_states(model, ids, attended.bool(), last)
    rows = hidden.split([len(batch["input_ids"]) for batch in batches.values()])
    return {
        name: Activations.of(part[:, :width], batch)
        for (name, batch), part, width in zip(batches.items(), rows, widths, strict=True)
    }


def check_layer(model: Any, layer: int) -> None:
    """Refuse a layer that the model does not have.

    Raises:
        UserError: no list of layers can be found, or it is shorter.
    """
    _, layers = _layers(model)
    if not 0 <= layer < len(layers):
        raise UserError(
            f"layer={layer} given, but the model has {len(layers)} layers",
            f"give 0 to {len(layers) - 1}; about a third of the way up is usual",
        )


def _layers(model: Any) -> tuple[str, nn.ModuleList]:
    found = decoder_layers(model)
    if found is None:
        raise UserError(
            f"{type(plain(model)).__name__} keeps its layers where they are not found",
            "use an objective that reads scores",
        )
    return found


@contextmanager
def cut_after(model: Any, layer: int) -> Iterator[nn.Module]:
    """Take the layers above ``layer`` out of the model inside the block; give that layer."""
    name, layers = _layers(model)
    decoder = plain(model).get_decoder()
    setattr(decoder, name, nn.ModuleList(list(layers)[: layer + 1]))
    try:
        yield layers[layer]
    finally:
        setattr(decoder, name, layers)
