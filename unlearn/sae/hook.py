"""Where in a model a dictionary reads: the names that public files give, as layer and site."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

Site = Literal["resid_post", "resid_pre", "resid_mid", "mlp_out", "attn_out", "attn_z"]
SITES: tuple[str, ...] = get_args(Site)
_LENS = re.compile(r"blocks\.(\d+)\.(?:hook_(\w+)|attn\.hook_(z))")
_MODULE = re.compile(r"(?:\w+\.)*?(?:layers|h|blocks)\.(\d+)(?:\.output)?")
_MODULE_MLP = re.compile(r"(?:\w+\.)*?(?:layers|h|blocks)\.(\d+)\.mlp(?:\.output)?")


@dataclass(frozen=True)
class Hook:
    """A place in a model: what is read at decoder layer number ``layer`` (0 is the first).

    ``resid_post`` leaves the layer, ``resid_pre`` enters it, ``mlp_out`` leaves its feed-forward
    block, ``attn_z`` enters the last projection of its attention.
    """

    layer: int
    site: Site = "resid_post"

    @classmethod
    def parse(cls, name: str) -> "Hook | None":
        """Read a TransformerLens name (``blocks.5.hook_resid_pre``) or that of a module.

        ``layers.5`` and ``model.layers.5.output`` are what leaves layer 5. None for other places.
        """
        if found := _LENS.fullmatch(name):
            layer, site = int(found[1]), "attn_z" if found[3] else found[2]
            return cls(layer, site) if site in SITES else None  # type: ignore[arg-type]
        if found := _MODULE.fullmatch(name):
            return cls(int(found[1]))
        if found := _MODULE_MLP.fullmatch(name):
            return cls(int(found[1]), "mlp_out")
        return None

    @property
    def leaves(self) -> int | None:
        """Give the decoder layer whose output is read; None when it is no layer's output.

        What enters layer 5 has left layer 4. (Hugging Face's ``hidden_states[5]`` is that, too.)
        """
        if self.site == "resid_post":
            return self.layer
        return self.layer - 1 if self.site == "resid_pre" and self.layer else None

    def __str__(self) -> str:
        return f"blocks.{self.layer}." + ("attn.hook_z" if self.site == "attn_z" else self._plain)

    @property
    def _plain(self) -> str:
        return f"hook_{self.site}"
