"""The last layer's feed-forward block at the positions that are read, and at no others.

After the last attention no position sees another, and what a model says of prompts and padding is
not read: there most of the last layer would be computed for nothing. So that block, which works
token by token, is given the read positions alone; to the others it adds 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from unlearn.head import plain
from unlearn.packing import Packing, gather, scatter

Hidden = Float[Tensor, "batch seq width"]


@dataclass(frozen=True)
class Thinning:
    """Which positions of a padded batch are read, and the block that is to skip the others."""

    block: nn.Module
    read: Bool[Tensor, "batch seq"]

    def forward(self, packing: Packing | None) -> Callable[[Hidden], Hidden]:
        """Give the block's forward pass at read positions, in a padded batch or a packed one."""
        whole = self.block.forward
        flat = self.read.flatten()
        places = (flat if packing is None else flat[packing.places]).nonzero()[:, 0]

        def at_places(hidden: Hidden) -> Hidden:
            tokens = hidden.flatten(0, 1)
            found = whole(gather(tokens, places)[None])[0]
            return scatter(found, places, len(tokens)).view_as(hidden)

        return at_places


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList] | None:
    """Give a model's layers and the name of their list in the decoder; None when not found."""
    base = plain(model)
    decoder, depth = base.get_decoder(), base.config.get_text_config().num_hidden_layers
    for name, module in decoder.named_children():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    return None


def last_feed_forward(model: Any) -> nn.Module | None:
    """Find the feed-forward block of the last layer: ``mlp`` in nearly every decoder."""
    found = decoder_layers(model)
    block = getattr(found[1][-1], "mlp", None) if found else None
    return block if isinstance(block, nn.Module) else None


def is_recomputed(model: Any) -> bool:
    """Tell whether layers run again in the backward pass, where nothing may have changed."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
