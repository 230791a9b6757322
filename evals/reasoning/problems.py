"""The problems of a reasoning benchmark and what a model is asked about each of them."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unlearn.data import Template, pad_token_id
from unlearn.data.sources import load_any_rows
from unlearn.data.templates import tokenize
from unlearn.data.traces import PROBLEM
from unlearn.errors import UserError, described
from unlearn.evals.reasoning.options import MathOptions

ANSWERS = ("answer", "solution")
PLACE = "{problem}"
"""Where an instruction takes the problem; without it the instruction follows the problem."""
BOXES = ("\\boxed", "\\fbox")
GSM8K = "####"
"""What stands before the final answer of a solution in GSM8K."""


@dataclass(frozen=True)
class Problem:
    """A problem and its true final answer; ``id`` comes from the text, not from its place."""

    id: str
    row: int
    text: str
    answer: str


@dataclass(frozen=True)
class Prompt:
    """What a model is given: ``ids`` for the model here, ``messages`` for a chat endpoint.

    ``prefix`` is what the completion begins with although the model did not write it.
    """

    prefix: str
    ids: tuple[int, ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()


def load_problems(
    source: str, *, max_rows: int | None = None, offline: bool = False
) -> list[Problem]:
    r"""Read problems (``problem``, ``question`` or ``prompt``) with answers.

    The answer is that of ``answer``; without it the last ``\boxed{}`` of ``solution``, or what
    follows ``####`` there.

    Raises:
        UserError: names the row that has no problem or no answer.
    """
    rows = load_any_rows(source, offline=offline)[:max_rows]
    if not rows:
        raise UserError(f"'{source}' has no rows", "give rows with a problem and its answer")
    times: Counter[str] = Counter()
    found = []
    for number, row in enumerate(rows):
        place = f"row {number + 1} of '{source}'"
        text = _text(row, place)
        times[text] += 1
        found.append(Problem(_id(text, times[text]), number, text, _answer(row, place)))
    return found


def fingerprint(problems: Sequence[Problem]) -> str:
    """Identify problems, answers and order (sha256)."""
    told = [[problem.text, problem.answer] for problem in problems]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def boxed(text: str) -> str | None:
    r"""Give what stands in the last closed ``\boxed{…}``; None where there is none."""
    for start in sorted((at for box in BOXES for at in _places(text, box)), reverse=True):
        if (inside := _braced(text, start)) is not None:
            return inside.strip()
    return None


def asked(problem: Problem, instruction: str) -> str:
    """Write a problem with the instruction: at its ``{problem}``, else after the problem."""
    if PLACE in instruction:
        return instruction.replace(PLACE, problem.text)
    return f"{problem.text}\n\n{instruction}" if instruction.strip() else problem.text


def local_prompts(
    problems: Sequence[Problem], tokenizer: Any, options: MathOptions
) -> list[Prompt]:
    """Write the prompts of a tokenizer: chat template, explicit template, or the bare problem.

    A chat template that begins the answer as ``force_prefix`` would (R1's distillations do) is left
    as it is; the completion begins with the prefix all the same.
    """
    template = Template.for_tokenizer(
        tokenizer, options.template, options.system_prompt, dict(options.template_args)
    )
    asks = template.explicit is not None or template.chat is not None
    prefix, texts, special = options.force_prefix, [], True
    for problem in problems:
        text = asked(problem, options.instruction)
        row = (
            {"question": text, "answer": ""} if asks else {"prompt": f"{text}\n", "completion": ""}
        )
        rendered = template.render(row)
        prompt = rendered.prompts[-1]
        begun = rendered.adds_special is False and _begins(prompt, prefix)
        texts.append(prompt if begun else prompt + prefix)
        special = rendered.adds_special
    found = tokenize(tokenizer, texts, adds_special=special)
    return [Prompt(prefix, tuple(ids)) for ids in found]


def chat_prompts(problems: Sequence[Problem], options: MathOptions) -> list[Prompt]:
    """Write the turns that a chat endpoint is sent; its own template makes text of them."""
    system = [{"role": "system", "content": options.system_prompt}] if options.system_prompt else []
    begun = [{"role": "assistant", "content": options.force_prefix}] if options.force_prefix else []
    return [
        Prompt(
            options.force_prefix,
            messages=(
                *system,
                {"role": "user", "content": asked(problem, options.instruction)},
                *begun,
            ),
        )
        for problem in problems
    ]


def tokens_of(prompts: Sequence[Prompt], tokenizer: Any) -> set[int]:
    """Give every token that is sent to the model, padding included."""
    return {pad_token_id(tokenizer), *(token for prompt in prompts for token in prompt.ids)}


def _begins(prompt: str, prefix: str) -> bool:
    return bool(prefix.strip()) and prompt.rstrip().endswith(prefix.strip())


def _text(row: Mapping[str, Any], place: str) -> str:
    text = next((row[name] for name in PROBLEM if row.get(name) is not None), None)
    if not isinstance(text, str) or not text.strip():
        got = "" if text is None else f", only {described(text)}"
        raise UserError(f"{place} has no problem{got}", f"name the column {' or '.join(PROBLEM)}")
    return text.strip()


def _answer(row: Mapping[str, Any], place: str) -> str:
    """Give the final answer of a row, as text."""
    name = next((name for name in ANSWERS if row.get(name) is not None), None)
    value = row[name] if name else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"{place} has no answer to compare with",
            "give a column answer, or solution with the answer in \\boxed{}",
        )
    found = boxed(value)
    if found is None and GSM8K in value:
        found = value.rpartition(GSM8K)[2].strip()
    if not found and name == "solution":
        raise UserError(
            f"the solution in {place} has no \\boxed{{}}: its final answer is not known",
            "give the final answer in a column answer",
        )
    return found or value.strip()


def _id(text: str, times: int) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return digest if times == 1 else f"{digest}-{times}"


def _places(text: str, box: str) -> list[int]:
    """Give where the braces of a command open."""
    found, at = [], text.find(box)
    while at >= 0:
        end = at + len(box)
        opened = end + len(text[end:]) - len(text[end:].lstrip())
        if text[opened : opened + 1] == "{":
            found.append(opened)
        at = text.find(box, end)
    return found


def _braced(text: str, start: int) -> str | None:
    depth = 0
    for at in range(start, len(text)):
        if text[at - 1 : at] != "\\":
            depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start + 1 : at]
    return None
