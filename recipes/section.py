"""What every section of a recipe is: frozen, strict, without unknown keys."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of recipe keys; the text under a key is its explanation."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )
