"""How fast a model writes with drafts, and that it writes the same: against plain decoding.

Every prompt is continued twice, greedily, once token by token and once with drafts, in turns (which
comes first alternates), on the same machine and in the same process.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.ticker import MaxNLocator
from transformers import DynamicCache

from unlearn import models
from unlearn.errors import RunFailed, UserError
from unlearn.evals.generate import Progress, stop_ids
from unlearn.evals.questions import Questions
from unlearn.evals.report.plots import LINES, Plot, drawing, tidy, to_plot
from unlearn.kinds import load_config
from unlearn.models import ModelSource
from unlearn.mtp.decode import Drafting, Written, decode
from unlearn.mtp.predictor import MaskPredictor, context_of
from unlearn.mtp.storage import Stored, base_of, load_predictor
from unlearn.runs import write_atomic, write_json

Emit = Callable[[dict[str, Any]], None]

COLUMNS = (
    "rows need question and answer, prompt and completion, messages or text: rename the columns, "
    "or give a .txt file, a prompt per line"
)
FEWEST, TITLE = 5, "How often each draft is right"
TIE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Logits closer than this may change places by rounding: other shapes, other sums."""


@dataclass(frozen=True)
class Measured:
    """One prompt, continued in both ways."""

    domain: str
    drafted: Written
    plain_seconds: float
    drafted_seconds: float
    tied: bool
    """The texts part where two tokens were equally likely up to rounding."""
    cut: bool = False
    """The model's context ended the text, before the most tokens asked for."""

    @property
    def speedup(self) -> float:
        """Give the tokens per second with drafts, as a multiple of those without."""
        return self.plain_seconds / self.drafted_seconds


@torch.inference_mode()
def plain_decode(
    model: Any, prompt: Sequence[int], *, max_new_tokens: int, stops: frozenset[int]
) -> list[int]:
    """Write a greedy continuation token by token with a cache, as everyone does."""
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    tokens: list[int] = []
    while len(tokens) < max_new_tokens:
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids = output.logits[0, -1].argmax()[None, None]
        tokens.append(int(ids))
        if tokens[-1] in stops:
            break
    return tokens


def measure_drafts(
    predictor: MaskPredictor,
    tokenizer: Any,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    *,
    max_new_tokens: int,
    drafting: Drafting | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Measured]:
    """Continue all prompts, by domain, in both ways.

    Raises:
        RunFailed: a text is not what plain decoding writes, and not by a tie up to rounding.
        UserError: no prompts.
    """
    if not any(prompts.values()):
        raise UserError("there is nothing to continue", "give prompts")
    model = predictor.model
    stops, most = stop_ids(model, tokenizer), context_of(model)
    for several in prompts.values():
        require_room(several, most, "the model")
    found: list[Measured] = []
    every = [(domain, prompt) for domain, several in prompts.items() for prompt in several]
    for turn, (domain, prompt) in enumerate(every):
        room = min(max_new_tokens, most - len(prompt))
        both = _Both(predictor, prompt, room, stops, drafting)
        if turn == 0:  # what is done once only is not measured
            both.plain(), both.drafted()
        if turn % 2:
            (told, seconds), (written, faster) = both.plain(), both.drafted()
        else:
            (written, faster), (told, seconds) = both.drafted(), both.plain()
        tied = _compare(predictor, prompt, written.tokens, told, place=turn + 1)
        cut = room < max_new_tokens and is_cut(written.tokens, room, stops)
        found.append(Measured(domain, written, seconds, faster, tied, cut))
        progress(turn + 1, len(every))
    return found


def require_room(prompts: Sequence[Sequence[int]], most: int, whose: str) -> None:
    """Refuse prompts that fill the context, ``most`` tokens: nothing could be written.

    Raises:
        UserError: names the first one.
    """
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) >= most:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, but the context of {whose} is {most}, "
                "prompt and text together",
                "shorten the prompt",
            )


def is_cut(tokens: Sequence[int], room: int, stops: frozenset[int]) -> bool:
    """Tell whether a text ended because it had no more room, not of itself."""
    return len(tokens) == room and tokens[-1] not in stops


@dataclass(frozen=True)
class _Both:
    """The two ways to continue a prompt, each with its seconds."""

    predictor: MaskPredictor
    prompt: Sequence[int]
    room: int
    stops: frozenset[int]
    drafting: Drafting | None

    def plain(self) -> tuple[list[int], float]:
        model = self.predictor.model
        with self.predictor.detached():
            return _timed(
                self.predictor.device,
                lambda: plain_decode(
                    model, self.prompt, max_new_tokens=self.room, stops=self.stops
                ),
            )

    def drafted(self) -> tuple[Written, float]:
        return _timed(
            self.predictor.device,
            lambda: decode(
                self.predictor,
                self.prompt,
                max_new_tokens=self.room,
                stops=self.stops,
                drafting=self.drafting,
            ),
        )


def _timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float]:
    """Give what the work gives, and its seconds; a GPU has nothing to do before and after."""
    _finish(device)
    begun = time.perf_counter()
    found = work()
    _finish(device)
    return found, time.perf_counter() - begun


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _compare(
    predictor: MaskPredictor,
    prompt: Sequence[int],
    ours: list[int],
    theirs: list[int],
    *,
    place: int,
) -> bool:
    """Tell whether texts part at a tie; they may part nowhere else."""
    if ours == theirs:
        return False
    pairs = zip(ours, theirs, strict=False)
    least = min(len(ours), len(theirs))
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), least)
    gap = float("inf")
    if at < least:
        gap = _gap(predictor, [*prompt, *theirs[:at]], theirs[at], ours[at])
    if abs(gap) > TIE[predictor.dtype]:
        raise RunFailed(
            f"prompt {place}: token {at + 1} is {ours[at : at + 1]} with drafts, "
            f"{theirs[at : at + 1]} without, whose logit is higher by {gap:.3g}",
            "drafts must not change the text: please report this model",
        )
    return True


@torch.inference_mode()
def _gap(predictor: MaskPredictor, text: Sequence[int], one: int, other: int) -> float:
    """Give how far the logit of one token is above that of another after a text."""
    with predictor.detached():
        ids = torch.tensor([list(text)], device=predictor.device)
        logits = predictor.model(input_ids=ids, logits_to_keep=1).logits[0, -1]
    return float(logits[one]) - float(logits[other])


def summary(found: Sequence[Measured]) -> dict[str, Any]:
    """Put prompts together: figures over all of them, and of every domain.

    ``tokens_per_step``: all tokens over all forward passes. ``acceptance``: for draft 1, 2, …, how
    often it was right where it was checked and those before it were. ``speedup``: median over
    prompts of the ratio of seconds; ``tokens_per_second``: all tokens over all seconds.
    """
    domains = list(dict.fromkeys(one.domain for one in found))
    parts = {name: _figures([one for one in found if one.domain == name]) for name in domains}
    return {"all": _figures(found), "domains": parts}


def _figures(found: Sequence[Measured]) -> dict[str, Any]:
    tokens = sum(len(one.drafted.tokens) for one in found)
    steps = sum(one.drafted.steps for one in found)
    together = Written(kept=[pair for one in found for pair in one.drafted.kept])
    positions = together.by_position()
    return {
        "prompts": len(found),
        "tokens": tokens,
        "tokens_per_step": tokens / steps,
        "acceptance": [right / checked for checked, right in positions],
        "checked": [checked for checked, _ in positions],
        "tokens_per_second": tokens / sum(one.drafted_seconds for one in found),
        "plain_tokens_per_second": tokens / sum(one.plain_seconds for one in found),
        "speedup": median(one.speedup for one in found),
        "identical": sum(not one.tied for one in found),
        "tied": sum(one.tied for one in found),
        "ended_by_context": sum(one.cut for one in found),
    }


def often_checked(part: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """Give places of drafts, from 1, that were checked at least ``FEWEST`` times; their shares."""
    at = [place for place, number in enumerate(part["checked"], start=1) if number >= FEWEST]
    return at, [part["acceptance"][place - 1] for place in at]


def acceptance_plot(told: Mapping[str, Any]) -> Plot:
    """Draw how often the first, second, … draft is right, one line per domain.

    Shares of fewer than ``FEWEST`` drafts checked say little, and are left out.
    """
    with drawing(2.6) as figure:
        axes = figure.add_subplot()
        for place, (name, part) in enumerate(told["domains"].items()):
            at, shares = often_checked(part)
            label = f"{name} ({max(part['checked'], default=0)} first drafts)"
            axes.plot(at, shares, marker="o", color=LINES[place % len(LINES)], label=label)
        axes.set_ylim(0, 1.02)
        axes.set_title(TITLE)
        axes.set_xlabel(f"draft of a step, all before it right (at least {FEWEST} checked)")
        axes.set_ylabel("share right")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        tidy(axes)
        return to_plot(figure, "acceptance", TITLE)


@dataclass(frozen=True)
class Writing:
    """How prompts are put and continued."""

    max_new_tokens: int = 100
    template: str | None = None
    drafting: Drafting = field(default_factory=Drafting)


def evaluate(
    source: ModelSource,
    prompts: Sequence[str],
    writing: Writing,
    *,
    base: ModelSource | None = None,
    out: Path | None = None,
    emit: Emit = lambda event: None,
) -> dict[str, Any]:
    """Measure the predictor in a folder on prompts, ``NAME=SOURCE`` or ``SOURCE`` per domain.

    ``base``: where its base is, when that is not where the folder says. With ``out``, writes
    ``results.json`` and ``acceptance.svg`` there.

    Raises:
        UserError: whatever is wrong with the folder, its base or the prompts.
        RunFailed: a text is not what plain decoding writes.
    """
    trained = Stored.read(source).shape.k
    writing.drafting.made(trained)
    plain = base or base_of(source)
    how: dict[str, Any] = {"offline": source.offline, "template": writing.template}
    how["max_new_tokens"] = writing.max_new_tokens
    questions = {name: gathered([], place, **how) for name, place in _domains(prompts).items()}
    models.check_source(plain)
    tokenizer = models.load_tokenizer(plain)
    asked = {name: one.ids(plain, tokenizer) for name, one in questions.items()}
    most = context_at(plain)
    for several in asked.values():
        require_room(several, most, f"'{plain.path}'")
    emit({"event": "stage", "stage": "load"})
    predictor = load_predictor(source.path, plain)

    def progress(done: int, total: int) -> None:
        emit({"event": "progress", "what": "writing twice", "done": done, "total": total})

    found = measure_drafts(
        predictor,
        tokenizer,
        asked,
        max_new_tokens=writing.max_new_tokens,
        drafting=writing.drafting,
        progress=progress,
    )
    told = {
        "predictor": source.path,
        "base": plain.path,
        "drafting": writing.drafting.used(trained),
    }
    told |= summary(found) | {"out": str(out) if out else None}
    if out is not None:
        write_json(out / "results.json", told | {"rows": [_row(one) for one in found]})
        write_atomic(out / "acceptance.svg", acceptance_plot(told).standalone())
    return told


def gathered(prompts: Sequence[str], source: str | None, **how: Any) -> Questions:
    """Take prompts as :meth:`Questions.gather` does, without an option to rename columns.

    Raises:
        UserError: as there.
    """
    try:
        return Questions.gather(prompts, source, **how)
    except UserError as error:
        hint = COLUMNS if "--map" in error.hint else error.hint
        raise UserError(error.message, hint) from error


def context_at(source: ModelSource) -> int:
    """Give the most tokens, prompt included, that a model not yet loaded knows places for."""
    config = load_config(source).get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 10**9)


def _domains(specs: Sequence[str]) -> dict[str, str]:
    """Give the source of every domain.

    Raises:
        UserError: two have one name.
    """
    found: dict[str, str] = {}
    for name, place in map(_domain, specs):
        if name in found:
            message = f"two sources of prompts are named '{name}'"
            raise UserError(message, "give each its own: --prompts NAME=SOURCE")
        found[name] = place
    return found


def _domain(spec: str) -> tuple[str, str]:
    """Read ``NAME=SOURCE``; a source alone is named by its file."""
    name, mark, place = spec.partition("=")
    if mark and name.replace("-", "").replace("_", "").isalnum():
        return name, place
    return Path(spec.partition(":")[0]).stem or spec, spec


def _row(one: Measured) -> dict[str, Any]:
    return {
        "domain": one.domain,
        "tokens": len(one.drafted.tokens),
        "steps": one.drafted.steps,
        "seconds": one.drafted_seconds,
        "plain_seconds": one.plain_seconds,
        "tied": one.tied,
    }
