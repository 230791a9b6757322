"""One detection: which texts, under which model, with which scores; and how it is carried out.

The keys are those of the command `detect-pretraining`; a YAML file of them is its `--recipe`. What
is left out takes the default of :class:`unlearn.detect.settings.Settings` and its neighbours.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import Field, ValidationError

from unlearn.errors import UserError, did_you_mean
from unlearn.recipes.section import Section

SAMPLE = 200
"""Texts at the start of the input that are compared with a frequency table."""
PARTED_BY = ("mode", "format", "text_field", "id_field", "encoding", "max_words")
"""Keys that say how the input is parted into texts."""
Emit = Callable[[dict[str, Any]], None]
Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
Shares = Annotated[tuple[float, ...], Field(strict=False, min_length=1)]

DEFAULT_MODEL = (
    "no --model was given: the toy model that comes with the package is used. It has read nothing "
    "but made-up people, so it can tell whether a text is about them, and nothing about the "
    "training data of any other model; its scores only show how the command works"
)


class Detection(Section):
    """Keys of a detection."""

    input: str | None = None
    """File, folder, or - for standard input."""
    model: str | None = None
    """Folder or hub name; null takes the toy model of the package."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the weights; scores are computed in float32."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    scores: Names | None = None
    """Names of scores, or `all`; null takes those of one pass that nothing is missing for."""
    k: Shares | None = None
    """Shares of lowest tokens for mink, minkpp and gapk; the first one has the plain name."""
    mode: Literal["auto", "rows", "paragraphs", "document"] | None = None
    """How files are parted into texts; auto: a text file is one document, others have rows."""
    format: Literal["txt", "jsonl", "json", "csv", "tsv", "parquet"] | None = None
    """What the input is, when its name does not say."""
    text_field: str | None = None
    """Column with the text; null takes input, text, snippet, content or document."""
    id_field: str | None = None
    """Column that names the texts; null counts them from 0."""
    encoding: str | None = None
    """What text files are written in; null is UTF-8."""
    max_words: int | None = Field(default=None, ge=1)
    """Words kept of each text."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Tokens kept of each text; null is 512."""
    min_tokens: int | None = Field(default=None, ge=1)
    """Texts with fewer are marked `short`; null is 16."""
    bos: Literal["auto", "always", "never"] | None = None
    """Whether a start token stands before each text; auto: as the tokenizer does."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per forward pass; null is 8192, on a CPU at most 2048."""
    gap_window: int | None = Field(default=None, ge=1)
    """Tokens that Gap-K% averages; null is 3."""
    clip: float | None = Field(default=None, gt=0)
    """Most that one token adds to DC-PDD; null is 0.01."""
    gamma: float | None = None
    """Weight of the members' pass in Con-ReCaLL; null is 0.5."""
    shots: int | None = Field(default=None, ge=1)
    """Most texts in a prefix; null is 7."""
    seed: int | None = None
    """Of the words that PAC swaps."""
    reference: str | None = None
    """Model for the score `ref`."""
    frequencies: str | None = None
    """Folder of a token frequency table, for dcpdd; null is `english`, a rough one."""
    prefix: str | None = None
    """File with texts that are surely no members: the prefix of recall and conrecall."""
    member_prefix: str | None = None
    """File with texts that surely are: the other prefix of conrecall."""
    nonmembers: str | None = None
    """File or folder of documents that are surely no members: gives windows their p-values."""
    window: int = Field(default=128, ge=1)
    """Tokens of a window of a document."""
    stride: int = Field(default=64, ge=1)
    """Tokens from one window to the next."""
    context: int | None = Field(default=None, ge=4)
    """Tokens of a document that the model reads at once; null is its own, at most 1024."""


def load_detection(path: str | None, changes: Mapping[str, Any]) -> Detection:
    """Read a file of keys, if there is one, and put changes on top.

    Raises:
        UserError: the file cannot be read, or names every wrong key.
    """
    from unlearn.recipes.files import read  # noqa: PLC0415 - reads YAML, which most calls do not

    given = dict(read(_found(path))) if path else {}
    given |= {key: value for key, value in changes.items() if value is not None}
    try:
        return Detection(**given)
    except ValidationError as error:
        raise UserError("; ".join(_mistakes(error)), "see the keys in docs/detection.md") from error


def _found(path: str) -> Path:
    if not Path(path).is_file():
        raise UserError(f"no file '{path}'", "give a YAML file with keys of a detection")
    return Path(path)


def _mistakes(error: ValidationError) -> Iterator[str]:
    for one in error.errors():
        key = ".".join(map(str, one["loc"]))
        if one["type"] == "extra_forbidden":
            yield f"unknown key '{key}'{did_you_mean(key, Detection.model_fields)}"
        else:
            yield f"{key}: {one['msg'][:1].lower()}{one['msg'][1:]}"


@dataclass(frozen=True)
class Prepared:
    """A detection whose texts and model are at hand."""

    detection: Detection
    inputs: Any
    scorer: Any
    strides: Any
    is_document: bool
    references: Mapping[str, Any] = field(default_factory=dict)
    """By score, the scores of windows of texts that are surely no members."""


def check_early(detection: Detection, stream: IO[bytes] | None = None) -> Any:
    """Find the texts and refuse what is wrong, before any model is loaded; give the inputs.

    Raises:
        UserError: no input, no such file or model folder, settings out of bounds.
    """
    from unlearn.detect.inputs import Inputs  # noqa: PLC0415
    from unlearn.recipes.inputs import check_model_folder  # noqa: PLC0415

    if detection.input is None:
        raise UserError("no texts were given", "name a file, a folder, or - for standard input")
    given = {name: getattr(detection, name) for name in PARTED_BY}
    wanted = {name: value for name, value in given.items() if value is not None}
    neighbours = "neighbour" in (detection.scores or ())
    inputs = Inputs(detection.input, neighbours=neighbours, stream=stream, **wanted)
    for path in (detection.model, detection.reference):
        check_model_folder(path)
    settings_of(detection)
    inputs.check()
    if detection.nonmembers is not None:
        if not is_document(inputs):
            raise UserError(
                "nonmembers give p-values to windows of documents, and these texts are rows",
                "`unlearn detect decide FILE --nonmembers FILE` judges rows",
            )
        Inputs(detection.nonmembers, mode="document").check()
    return inputs


def settings_of(detection: Detection) -> Any:
    """Give the settings of the scores; `all` and null take what there is the input for."""
    from unlearn.detect.settings import DEFAULT, SCORES, Settings  # noqa: PLC0415

    given = {
        "ref": detection.reference is not None,
        "dcpdd": True,  # there is always the rough table of English
        "recall": detection.prefix is not None,
        "conrecall": None not in (detection.prefix, detection.member_prefix),
        "neighbour": False,
    }
    asked = detection.scores
    if asked is None:
        asked = (*DEFAULT, *(name for name, there in given.items() if there))
    elif "all" in asked:
        asked = tuple(name for name in SCORES if given.get(name, True))
    names = {one.name for one in fields(Settings)} - {"scores"}
    values = {name: getattr(detection, name) for name in names}
    changes = {name: value for name, value in values.items() if value is not None}
    return replace(Settings(), scores=asked, **changes)


def prepare(detection: Detection, inputs: Any, *, emit: Emit, offline: bool) -> Prepared:
    """Load the model and everything else that the scores need.

    Raises:
        UserError: a model, a prefix or a table is missing or does not fit.
    """
    from unlearn.data.people import demo_folder  # noqa: PLC0415
    from unlearn.detect.settings import SINGLE_PASS  # noqa: PLC0415
    from unlearn.detect.windows import Strides  # noqa: PLC0415
    from unlearn.evals.detection.scorer import Extras, load_scorer  # noqa: PLC0415
    from unlearn.models import ModelSource  # noqa: PLC0415

    settings = settings_of(detection)
    strides = Strides(detection.window, detection.stride, detection.context)
    in_windows = is_document(inputs)
    if in_windows and detection.scores is None:
        chosen = tuple(name for name in settings.scores if name in SINGLE_PASS)
        settings = replace(settings, scores=chosen)
    if detection.model is None:
        emit({"event": "warning", "message": DEFAULT_MODEL})
    for file, reason in inputs.left_out().items():
        emit({"event": "warning", "message": f"'{file}' is left out: {reason}"})
    emit({"event": "stage", "stage": "load"})
    source = ModelSource(
        detection.model or str(demo_folder() / "target"),
        dtype=detection.dtype,
        revision=detection.revision,
        trust_remote_code=detection.trust_remote_code,
        offline=offline,
    )
    scorer, warnings = load_scorer(
        source,
        settings,
        Extras(detection.frequencies, detection.reference),
        _sample(inputs, in_windows) if "dcpdd" in settings.scores else (),
        nonmembers=_shots(detection.prefix, settings.shots),
        members=_shots(detection.member_prefix, settings.shots),
    )
    for warning in warnings:
        emit({"event": "warning", "message": warning})
    references = _references(detection, scorer, strides, emit)
    return Prepared(detection, inputs, scorer, strides, in_windows, references)


def identity(prepared: Prepared) -> dict[str, Any]:
    """Give all that the rows of an output depend on, by name."""
    from unlearn.kinds import weight_files  # noqa: PLC0415
    from unlearn.models import ModelSource  # noqa: PLC0415

    detection, settings = prepared.detection, prepared.scorer.settings
    weights = {}
    for name in ("model", "reference"):
        path = getattr(detection, name)
        files = weight_files(ModelSource(path)) if path and Path(path).is_dir() else []
        sizes = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        weights[name] = [path, detection.revision if name == "model" else None, sizes]
    inputs = prepared.inputs
    given = {name: getattr(inputs, name) for name in ("path", *PARTED_BY)}
    others = ("frequencies", "prefix", "member_prefix", "nonmembers", "dtype")
    return {
        **weights,
        **asdict(settings),
        **given,
        **{name: getattr(detection, name) for name in others},
        "input": inputs.fingerprint(),
        "windows": asdict(prepared.strides) if prepared.is_document else None,
    }


def is_document(inputs: Any) -> bool:
    """Whether texts are read as documents, in windows."""
    if inputs.mode != "auto":
        return bool(inputs.mode == "document")
    if inputs.is_stream:
        return False
    from unlearn.data.readers import kind_of  # noqa: PLC0415

    kinds = {inputs.format or kind_of(file) for file in inputs.files()}
    if kinds == {"txt"}:
        return True
    if "txt" in kinds:
        others = ", ".join(sorted(str(kind) for kind in kinds - {"txt"}))
        raise UserError(
            f"'{inputs.path}' holds text files and files with rows ({others})",
            "choose --mode rows, paragraphs or document for all of them",
        )
    return False


def _shots(path: str | None, most: int) -> list[str]:
    """Give the first texts of a file for a prefix."""
    if path is None:
        return []
    from itertools import islice  # noqa: PLC0415

    from unlearn.detect.inputs import Inputs  # noqa: PLC0415

    return [text.text for text in islice(Inputs(path, mode="rows").texts(), most)]


def _sample(inputs: Any, in_windows: bool) -> list[str]:
    """Give some of the texts, to be compared with a frequency table; a stream is left alone."""
    from itertools import islice  # noqa: PLC0415

    if inputs.is_stream:
        return []
    if in_windows:
        return ["".join(islice(pieces, 1)) for _, pieces in islice(inputs.documents(), 4)]
    return [text.text for text in islice(inputs.texts(), SAMPLE)]


def _references(
    detection: Detection, scorer: Any, strides: Any, emit: Emit
) -> dict[str, list[float]]:
    """Score the windows of documents that are surely no members.

    Raises:
        UserError: they are too few to give small p-values.
    """
    from unlearn.detect.conformal import check_enough  # noqa: PLC0415
    from unlearn.detect.inputs import Inputs  # noqa: PLC0415
    from unlearn.detect.spans import FPR  # noqa: PLC0415
    from unlearn.detect.windows import score_windows  # noqa: PLC0415

    if detection.nonmembers is None:
        return {}
    emit({"event": "stage", "stage": "references"})
    found: dict[str, list[float]] = {}
    for _, pieces in Inputs(detection.nonmembers, mode="document").documents():
        for windows in score_windows(scorer, pieces, strides):
            for one in windows:
                for name, value in one.scores.items():
                    if name != "ppl" and value is not None and one.num_tokens == strides.window:
                        found.setdefault(name, []).append(value)
    check_enough(min(map(len, found.values()), default=0), FPR)
    return found
