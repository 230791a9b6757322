"""Carrying out a detection: rows in the order of the texts, windows of documents, resumable."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from unlearn.detect.decisions import judge_file
from unlearn.detect.engine import number
from unlearn.detect.output import Output, output
from unlearn.detect.spans import FPR, Profile, primary_score
from unlearn.detect.verdict import of_file
from unlearn.detect.windows import Window, score_windows
from unlearn.recipes.detection import Emit, Prepared, identity

MAP_CHARACTERS = 2_000_000
"""Most characters of a document that are kept for its heat map."""
Show = Callable[[dict[str, Any], str], None]
"""What is done with a row besides writing it: it gets the row and the text it is about."""


@dataclass
class Document:
    """What a heat map of one document is drawn from; ``text`` is its first part."""

    id: str | int
    profile: Profile
    text: str = ""
    size: int = 0

    def heard(self, pieces: Iterator[str]) -> Iterator[str]:
        """Pass a text on and keep its beginning."""
        for piece in pieces:
            self.text += piece[: max(0, MAP_CHARACTERS - len(self.text))]
            self.size += len(piece)
            yield piece


@dataclass
class Summary:
    """What a detection came to; ``units`` are texts or windows, ``rows`` also end documents."""

    rows: int = 0
    units: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    documents: list[Document] = field(default_factory=list)

    def count(self, row: Mapping[str, Any]) -> None:
        """Take a row into account."""
        self.rows += 1
        self.units += "spans" not in row
        status = row.get("status", "ok")
        self.statuses[status] = self.statuses.get(status, 0) + 1
        for note in row.get("notes", ()):
            self.notes[note] = self.notes.get(note, 0) + 1

    @property
    def nothing(self) -> bool:
        """Say whether no text had a score."""
        return not self.statuses.get("ok") and not self.statuses.get("short")


def detect(
    prepared: Prepared,
    *,
    emit: Emit = lambda event: None,
    out: Path | None = None,
    show: Show = lambda row, text: None,
    keep: bool = False,
) -> Summary:
    """Score all texts; rows go to ``show`` as they come, and to ``out`` as JSON lines.

    Stopped, the same call goes on with the same ``out``: finished rows are not computed again (nor
    shown). ``keep`` keeps what heat maps need.
    """
    summary = Summary()
    progress = Progress(prepared, emit)
    with output(out, identity(prepared)) if out else nullcontext() as file:
        begun = {"resumed_from": f"row {file.done + 1}"} if file and file.done else {}
        emit({"event": "stage", "stage": "score", **begun})
        if prepared.is_document:
            blocks = _documents(prepared, progress, summary, file, keep)
        else:
            blocks = _texts(prepared, progress, file, summary)
        for block in blocks:
            if file is not None:
                file.append([row for row, _ in block])
            for row, text in block:
                summary.count(row)
                show(row, text)
            progress.tell(summary.units)
    progress.tell(summary.units, end=True)
    return summary


Block = list[tuple[dict[str, Any], str]]


def _texts(
    prepared: Prepared, progress: "Progress", file: Output | None, summary: Summary
) -> Iterator[Block]:
    texts = prepared.inputs.texts(progress.watch)
    if file is not None:
        for row in file.rows():
            summary.count(row)
        for _ in islice(texts, file.done):
            pass
    for block in prepared.scorer.blocks(texts):
        yield [(one.as_json(), one.text) for one in block]


def _documents(
    prepared: Prepared,
    progress: "Progress",
    summary: Summary,
    file: Output | None,
    keep: bool,
) -> Iterator[Block]:
    scorer = prepared.scorer
    score = primary_score(scorer.settings.columns)
    before = _stored(file, summary, score)
    for id_, pieces in prepared.inputs.documents(progress.watch):
        profile, finished = before.get(id_, (Profile(score), False))
        document = Document(id_, profile)
        heard = document.heard(pieces)
        windows = score_windows(
            scorer, heard, prepared.strides, references=prepared.references, skip=len(profile.rows)
        )
        if finished:
            for _ in heard if keep else ():
                pass
            windows = iter(())
        for some in windows:
            document.profile.add(some)
            yield [({"id": id_} | one.as_json(), "") for one in some]
        if not finished:
            yield [
                (_closing(document, scorer.settings.min_tokens) | _judged(document, prepared), "")
            ]
        if keep:
            summary.documents.append(document)


def _stored(
    file: Output | None, summary: Summary, score: str
) -> dict[str | int, tuple[Profile, bool]]:
    """Give the profile of every document that is begun already, and whether it is complete."""
    found: dict[str | int, tuple[Profile, bool]] = {}
    for row in file.rows() if file is not None else ():
        summary.count(row)
        profile, _ = found.setdefault(row["id"], (Profile(score), False))
        if "spans" in row:
            found[row["id"]] = (profile, True)
            continue
        place = (row["start_token"], row["n_tokens"], row["start_char"], row["end_char"])
        profile.add([Window(*place, row["scores"], row.get("p", {}))])
    return found


def _closing(document: Document, min_tokens: int) -> dict[str, Any]:
    """Give the row that ends a document: how long it is, and which passages stand out."""
    profile = document.profile
    return {
        "id": document.id,
        "status": _status(profile, min_tokens),
        "n_tokens": profile.num_tokens,
        "n_windows": len(profile.rows),
        "judged_by": profile.score,
        "basis": profile.basis,
        "spans": [span.as_json() for span in profile.spans()],
    }


def _status(profile: Profile, min_tokens: int) -> str:
    if not len(profile.rows):
        return "too_short"
    return "ok" if profile.num_tokens >= min_tokens else "short"


def _judged(document: Document, prepared: Prepared) -> dict[str, Any]:
    """Say what the windows say together, where there are references: p-value and words.

    Only windows that do not overlap are compared, with references that do not either.
    """
    score, strides = document.profile.score, prepared.strides
    if score not in prepared.references:
        return {}
    apart = -(-strides.window // strides.stride)
    windows = document.profile.rows[::apart, 4]
    found = judge_file(windows, prepared.references[score][::apart])
    return {
        "p": number(found.p),
        "median_p": number(found.median_p),
        "verdict": of_file(found, fpr=FPR),
    }


class Progress:
    """Tells how many texts are done and how much of the files is read."""

    def __init__(self, prepared: Prepared, emit: Emit) -> None:
        self.emit = emit
        self.size = prepared.inputs.size
        self.what = "windows" if prepared.is_document else "texts"
        self.before = 0
        self.source: Any = None

    def watch(self, source: Any) -> None:
        """Note that another file has been opened."""
        self.before += self.source.length if self.source is not None else 0
        self.source = source

    def tell(self, units: int, *, end: bool = False) -> None:
        """Emit one event; a stream has no known end."""
        event = {"event": "progress", "what": f"{units:,} {self.what}"}
        if self.size is None:
            self.emit(event | {"done": units, "total": 0})
            return
        read = self.size if end or self.source is None else self.before + self.source.position
        self.emit(event | {"done": min(read, self.size), "total": self.size, "unit": "bytes"})
