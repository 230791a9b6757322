"""From rows to token ids and labels: which tokens a model is trained and judged on.

The whole text is tokenised as one string; its first ``len(prompt ids)`` tokens are not labelled.
The token that ends the answer (EOS) is labelled, once. Masks come from lengths alone, so a
tokenizer that pads with EOS loses nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from unlearn.data.annotations import (
    character_spans,
    has_annotations,
    mark_tokens,
    token_offsets,
)
from unlearn.data.rows import COLUMNS, Kind, row_kind
from unlearn.data.templates import Rendered, Template, tokenize
from unlearn.errors import UserError

IGNORE = -100  # the label of a token that is neither trained nor scored (PyTorch's ignore_index)
NUM_NAMED_ROWS = 5


@dataclass(frozen=True)
class Example:
    """One sequence as a model sees it.

    ``labels`` are unshifted: ``labels[t]`` is ``input_ids[t]`` or -100. ``prompt_length`` counts
    the tokens before the first labelled one, ``row`` is the index of the row it came from, ``cut``
    counts the tokens dropped from the right to fit ``max_length``. ``important`` marks labelled
    tokens that the row's column ``important`` names; None when no row has one.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    row: int
    cut: int = 0
    important: tuple[bool, ...] | None = None

    def hashed(self) -> list[Any]:
        """Give all that a training may depend on, as JSON values."""
        marks = [] if self.important is None else [self.important]
        return [self.input_ids, self.labels, *marks]


def encode(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    template: Template,
    *,
    max_length: int,
    source: str,
) -> list[Example]:
    """Tokenise rows of one kind and label their answers.

    One example per row, in order; a ``text`` row gives one per window of ``max_length`` tokens.
    ``source`` is what error messages call the rows.

    Raises:
        UserError: rows that no template fits, or without a token to learn.
    """
    if not rows:
        raise UserError(f"'{source}' has no rows", "give a source that is not empty")
    if max_length < 2:
        raise UserError(f"max_length={max_length} leaves no token to predict", "give 2 or more")
    kind = row_kind(rows[0])
    rendered = list(_render(rows, template, kind, source))
    if kind == "text":
        examples = _encode_text(rendered, tokenizer, max_length)
    else:
        examples = _encode_answers(rendered, tokenizer, max_length, source)
    ends = set() if kind == "text" else {tokenizer.eos_token_id}
    poor = [one for one in examples if _is_poor(one, rows[one.row], ends)]
    if poor:
        raise _without_answer(poor, examples, len(rows), source, max_length)
    check_labels(examples, kind)
    if kind != "text" and has_annotations(rows):
        return list(_annotated(examples, rows, rendered, tokenizer, source))
    return examples


def _annotated(
    examples: Sequence[Example],
    rows: Sequence[Mapping[str, Any]],
    rendered: Sequence[Rendered],
    tokenizer: Any,
    source: str,
) -> Iterator[Example]:
    """Mark the tokens that the rows name as important."""
    front = len(tokenize(tokenizer, [""], adds_special=rendered[0].adds_special)[0])
    for example, row, one in zip(examples, rows, rendered, strict=True):
        with _blaming(example.row, source):
            spans = character_spans(row, one)
            offsets = token_offsets(tokenizer, one, front) if spans else []
            labelled = [label != IGNORE for label in example.labels]
            marks = mark_tokens(spans, offsets, labelled, cut=example.cut > 0)
        yield replace(example, important=tuple(marks))


def check_labels(examples: Sequence[Example], kind: Kind) -> None:
    """Refuse a set in which nothing is labelled, or everything that was not meant to be.

    A sequence's first token does not count: nothing comes before it to predict it from.
    """
    if all(label == IGNORE for example in examples for label in example.labels[1:]):
        raise UserError(
            "no token of the whole set is labelled: nothing would be trained",
            "check the template and the answers with 'unlearn data preview'",
        )
    if kind != "text" and all(IGNORE not in example.labels[1:] for example in examples):
        raise UserError(
            "every token of the whole set is labelled, prompts included",
            "check the template and that the prompts are not empty; to train on whole texts, give "
            "them as a 'text' column",
        )


def pad_token_id(tokenizer: Any) -> int:
    """Give the id to pad with: the tokenizer's pad token, else its EOS."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    raise UserError(
        "the tokenizer has neither a pad token nor an EOS token",
        'set one in tokenizer_config.json, e.g. "pad_token": "<pad>"',
    )


@contextmanager
def _blaming(row: int, source: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        message = f"row {row + 1} of '{source}': {error.message}"
        raise UserError(message, error.hint) from error


def _render(
    rows: Sequence[Mapping[str, Any]], template: Template, kind: Kind, source: str
) -> Iterator[Rendered]:
    for row, content in enumerate(rows):
        with _blaming(row, source):
            if row_kind(content) != kind:
                raise UserError(
                    f"it is a {row_kind(content)} row, the first is a {kind} row",
                    "give rows of one kind",
                )
            yield template.render(content)


def _encode_text(rendered: Sequence[Rendered], tokenizer: Any, max_length: int) -> list[Example]:
    """Cut texts into windows that share one token, so each token but the first is learnt once."""
    examples = []
    texts = [one.text for one in rendered]
    for row, ids in enumerate(tokenize(tokenizer, texts, adds_special=True)):
        for start in range(0, max(len(ids) - 1, 1), max_length - 1):
            window = ids[start : start + max_length]
            examples.append(Example(window, [IGNORE, *window[1:]], min(1, len(window)), row))
    return examples


def _encode_answers(
    rendered: Sequence[Rendered], tokenizer: Any, max_length: int, source: str
) -> list[Example]:
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no EOS token, so answers would have no end to learn",
            "set eos_token in tokenizer_config.json, or give the rows as a 'text' column",
        )
    special = rendered[0].adds_special
    texts = tokenize(tokenizer, [one.text for one in rendered], adds_special=special)
    prompts = [prompt for one in rendered for prompt in one.prompts]
    starts = iter(tokenize(tokenizer, prompts, adds_special=special))
    examples = []
    for row, (one, ids) in enumerate(zip(rendered, texts, strict=True)):
        begins = [len(next(starts)) for _ in one.prompts]
        with _blaming(row, source):
            ids, labels = _label_turns(ids, begins, one, tokenizer)
        cut = max(0, len(ids) - max_length)
        examples.append(Example(ids[:max_length], labels[:max_length], begins[0], row, cut))
    return examples


def _label_turns(
    ids: list[int], begins: Sequence[int], rendered: Rendered, tokenizer: Any
) -> tuple[list[int], list[int]]:
    """Label every assistant turn up to and including its EOS; end the sequence with the last one.

    What a template writes after the last EOS (Qwen: a newline) is dropped; where it writes no EOS
    at all, one is appended.
    """
    eos = tokenizer.eos_token_id
    labels = [IGNORE] * len(ids)
    for turn, begin in enumerate(begins):
        last = turn == len(begins) - 1
        limit = len(ids) if last else begins[turn + 1]
        end = next((place + 1 for place in range(begin, limit) if ids[place] == eos), None)
        if last and end is None:
            return [*ids, eos], [*labels[:begin], *ids[begin:], eos]
        if end is None:
            end = _end_of_turn(rendered, turn, tokenizer)
        labels[begin:end] = ids[begin:end]
    return ids[:end], labels[:end]


def _end_of_turn(rendered: Rendered, turn: int, tokenizer: Any) -> int:
    """Find where a turn ends when the template closes it with something other than EOS."""
    text = rendered.ends[turn]
    if not rendered.text.startswith(text):
        raise UserError(
            f"the chat template writes assistant turn {turn + 1} differently once others follow it",
            "give rows with one assistant turn each",
        )
    return len(tokenize(tokenizer, [text], adds_special=rendered.adds_special)[0])


def _is_poor(example: Example, row: Mapping[str, Any], ends: set[int]) -> bool:
    """Say whether no answer is left: blank, merged into the prompt or cut by ``max_length``."""
    return {IGNORE, *ends}.issuperset(example.labels) or not any(map(str.strip, _answers(row)))


def _answers(row: Mapping[str, Any]) -> list[str]:
    kind = row_kind(row)
    if kind == "messages":
        return [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
    return [row[COLUMNS[kind][-1]]]


def _without_answer(
    poor: Sequence[Example],
    examples: Sequence[Example],
    num_rows: int,
    source: str,
    max_length: int,
) -> UserError:
    numbers = sorted({example.row + 1 for example in poor})
    named = ", ".join(map(str, numbers[:NUM_NAMED_ROWS]))
    more = ", …" if len(numbers) > NUM_NAMED_ROWS else ""
    have = "rows have" if len(numbers) > 1 else "row has"
    hint = "fill in the answers or remove the rows"
    if any(example.cut for example in poor):
        needed = max(len(example.input_ids) + example.cut for example in examples)
        hint = f"max_length={max_length} cuts the answers away; the longest row needs {needed}"
    return UserError(
        f"{len(numbers)} {have} no answer tokens, of {num_rows} in '{source}' (row {named}{more})",
        hint,
    )
