"""From rows to labelled tokens: sources, templates, label masks and a preview of the result."""

from unlearn.data.encode import IGNORE, Example, check_labels, encode, pad_token_id
from unlearn.data.preview import Preview, preview
from unlearn.data.rows import Kind, Row, row_kind
from unlearn.data.sources import Source, load_rows, load_variants
from unlearn.data.templates import Template, tokenize

__all__ = [
    "IGNORE",
    "Example",
    "Kind",
    "Preview",
    "Row",
    "Source",
    "Template",
    "check_labels",
    "encode",
    "load_rows",
    "load_variants",
    "pad_token_id",
    "preview",
    "row_kind",
    "tokenize",
]
