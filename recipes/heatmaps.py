"""Heat maps of the documents of a detection."""

from pathlib import Path
from typing import Any

from unlearn.errors import UserError
from unlearn.recipes.detection import Prepared, is_document
from unlearn.recipes.detection_run import Summary


def check_html(html: Path | None, inputs: Any) -> None:
    """Refuse a map that could not be drawn, before any model is loaded.

    Raises:
        UserError: texts are not read as documents, or the file is there.
    """
    if html is None:
        return
    if not is_document(inputs):
        raise UserError(
            "a heat map shows documents, and these texts are rows", "add --mode document"
        )
    if html.exists():
        raise UserError(f"'{html}' already exists", "choose another --html, or remove it")


def write_heatmaps(html: Path, prepared: Prepared, summary: Summary) -> list[Path]:
    """Write one page per document; several documents get numbered names."""
    from unlearn.evals.report.heatmap import write_heatmap  # noqa: PLC0415

    found = []
    several = len(summary.documents) > 1
    for number, document in enumerate(summary.documents, start=1):
        path = html.with_stem(f"{html.stem}-{number}") if several else html
        write_heatmap(
            path,
            name=str(document.id),
            text=document.text,
            size=document.size,
            profile=document.profile,
            about=_about(prepared),
        )
        found.append(path)
    return found


def _about(prepared: Prepared) -> list[tuple[str, Any]]:
    strides = prepared.strides
    return [
        ("Model", prepared.detection.model or "the toy model of the package"),
        ("Input", prepared.inputs.path),
        ("Window", f"{strides.window} tokens every {strides.stride}"),
        ("Context", f"{strides.context_of(prepared.scorer.side.model)} tokens read at once"),
        ("Start token", prepared.scorer.settings.bos),
    ]
