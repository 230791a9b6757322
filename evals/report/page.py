"""Templates become pages. Whatever a model wrote or a user named is text and nothing else."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from unlearn.evals.report.evidence import percent
from unlearn.evals.report.table import number

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~!&]|:(?=//)|(?<=www)\.)")


def render(name: str, context: Mapping[str, Any]) -> str:
    """Fill a template of this folder; ``….html.j2`` escapes every value it is given."""
    return _environment().get_template(name).render(context)


@cache
def _environment() -> Environment:
    """Set up templates once: compiling them takes longer than filling them."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if hasattr(value, "__html__") else printable(value),
    )
    environment.filters |= {"number": number, "percent": percent, "markdown": markdown}
    environment.filters["breakable"] = breakable
    return environment


def printable(value: Any) -> str:
    """Replace what a page cannot show, or what would reorder the text around it."""
    return _UNPRINTABLE.sub("\ufffd", str(value).replace("\r\n", "\n"))


def breakable(name: Any) -> Markup:
    """Let a long name break after its underscores."""
    return Markup("_<wbr>").join(escape(part) for part in printable(name).split("_"))


def markdown(value: Any) -> str:
    """Escape text so that Markdown shows it as it is, on one line: no links, images or HTML."""
    return _MARKDOWN.sub(r"\\\1", printable(value)).replace("\n", " ↵ ")
