"""TOFU's questions and answers as tokens: what is scored and what is asked, each exactly once."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unlearn.data import IGNORE, Example, Row, Template, encode, load_rows, tokenize
from unlearn.errors import UserError

Kind = Literal["answer", "para", "pert", "para_question", "satimp"]
Asked = Literal["answer", "para_question", "jailbreak"]
Rows = Mapping[str, Sequence[Row]]

LEAD_IN = "Sure, here is the answer:"
"""What the jailbreak probe puts into the model's mouth (OpenUnlearning, arXiv:2506.12618)."""
SATIMP_TEMPLATE = "### Question: {question}\n ### Answer: "
"""SatImp's raw template for extraction strength, used for chat models too, without EOS.

Many tokenizers join its last space with the answer's first word, which then counts as prompt.
"""
BLOCKS = {
    "forget": "{split}_perturbed",
    "retain": "retain_perturbed",
    "ra": "real_authors_perturbed",
    "wf": "world_facts_perturbed",
}
"""Block -> configuration of the dataset."""
PARAPHRASED = ("forget", "retain")
"""Blocks whose truth ratio compares with a paraphrase of the answer instead of the answer."""


@dataclass(frozen=True)
class Item:
    """Which text a scored sequence stands for: ``number`` counts the perturbed answers of a row."""

    split: str
    row: int
    kind: Kind
    number: int = 0


@dataclass(frozen=True)
class Prompt:
    """A question the model answers by itself."""

    split: str
    row: int
    kind: Asked
    ids: list[int]


@dataclass(frozen=True)
class Sheet:
    """Everything one model is given: ``items[i]`` is what ``examples[i]`` stands for.

    ``skipped``: per block the rows that have no answer tokens in some text that was to be scored.
    """

    items: list[Item]
    examples: list[Example]
    prompts: list[Prompt]
    skipped: dict[str, list[int]] = field(default_factory=dict)

    def tokens(self) -> set[int]:
        """Give every token id a model must know."""
        found = {token for example in self.examples for token in example.input_ids}
        return found | {token for prompt in self.prompts for token in prompt.ids}


def load_blocks(data: str, split: str, *, offline: bool = False) -> dict[str, list[Row]]:
    """Read the four blocks, all rows in the dataset's order.

    Raises:
        UserError: a configuration is missing (the error names those there are) or a row lacks what
            the truth ratio needs.
    """
    found = {}
    for block, config in BLOCKS.items():
        name = config.format(split=split)
        spec = source_of(data, name)
        try:
            found[block] = load_rows(spec, offline=offline)
        except UserError as error:
            raise _no_block(error, data, name) from error
        _check_variants(found[block], block, spec)
    return found


def load_holdout(
    data: str, split: str, holdout: str | None, *, offline: bool = False
) -> tuple[list[Row], str]:
    """Read the rows that no model saw: (rows, ""), or ([], the reason why there are none).

    Raises:
        UserError: ``holdout`` was named and cannot be read.
    """
    if holdout is not None:
        return load_rows(holdout, offline=offline), ""
    config = re.sub(r"^forget", "holdout", split)
    try:
        return load_rows(source_of(data, config), offline=offline), ""
    except UserError:
        return [], (
            f"no membership inference (mia_*, privleak, s_mia_*): '{data}' has no {config}; name "
            "text that no model saw with --holdout SOURCE"
        )


def source_of(data: str, config: str) -> str:
    """Name one configuration: the file of that name in a folder, else ``DATA#CONFIG``."""
    for suffix in (".json", ".jsonl"):
        file = Path(data).expanduser() / f"{config}{suffix}"
        if file.is_file():
            return str(file)
    return f"{data}#{config}"


def sheet_of(
    blocks: Rows,
    tokenizer: Any,
    template: Template,
    *,
    probes: bool = False,
    satimp: bool = False,
    second_eos: bool = False,
) -> Sheet:
    """Tokenise every (question, answer variant) and every prompt once.

    ``probes`` adds paraphrased questions and the jailbreak lead-in, ``satimp`` the sequences of
    SatImp's extraction strength; ``second_eos`` ends texts as open-unlearning does.
    """
    sheet = Sheet([], [], [])
    limit = max_tokens(tokenizer)
    for block, rows in blocks.items():
        wanted = list(_texts(block, rows, probes=probes))
        pairs = [{"question": question, "answer": answer} for _, question, answer in wanted]
        encoded = encode_answered(pairs, tokenizer, template, max_length=limit, source=block)
        if second_eos:
            encoded = with_everything_labelled(pairs, encoded, tokenizer, template)
        sheet.items.extend(wanted[one.row][0] for one in encoded)
        sheet.examples.extend(encoded)
        missing = {wanted[place][0].row for place in set(range(len(wanted))).difference(
            one.row for one in encoded)}  # fmt: skip
        if missing:
            sheet.skipped[block] = sorted(missing)
        if block != "holdout":
            sheet.prompts.extend(_prompts(block, rows, tokenizer, template, probes=probes))
    if satimp:
        _add_satimp(sheet, blocks["forget"], tokenizer)
    return sheet


def encode_answered(
    pairs: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    template: Template,
    *,
    max_length: int,
    source: str,
) -> list[Example]:
    """Tokenise rows as :func:`unlearn.data.encode` does, but leave out rows without an answer.

    An answer is missing where it is blank or where its tokens merge with the prompt's. ``row`` of
    an example still is its place in ``pairs``.
    """
    try:
        return encode(pairs, tokenizer, template, max_length=max_length, source=source)
    except UserError:
        kept = [place for place, has in enumerate(_answered(pairs, tokenizer, template)) if has]
        if not kept or len(kept) == len(pairs):
            raise
        chosen = [pairs[place] for place in kept]
        found = encode(chosen, tokenizer, template, max_length=max_length, source=source)
        return [_moved(one, kept[one.row]) for one in found]


def with_everything_labelled(
    pairs: Sequence[Mapping[str, Any]],
    examples: Sequence[Example],
    tokenizer: Any,
    template: Template,
) -> list[Example]:
    """Label all that follows the prompt, and end it with EOS once more unless it is the last token.

    What open-unlearning does: after a template that writes ``<|im_end|>`` and a line break (Qwen),
    the line break and a second EOS count as answer tokens.
    """
    rendered = [template.render(pairs[one.row]) for one in examples]
    special = rendered[0].adds_special
    texts = tokenize(tokenizer, [one.text for one in rendered], adds_special=special)
    found = []
    for example, ids in zip(examples, texts, strict=True):
        start = example.prompt_length
        ids = ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
        labels = [IGNORE] * start + ids[start:]
        found.append(Example(ids, labels, start, example.row))
    return found


def max_tokens(tokenizer: Any) -> int:
    """Give the most tokens of a sequence: the tokenizer's, which may know no limit."""
    return int(min(getattr(tokenizer, "model_max_length", None) or 10**9, 10**9))


def _texts(block: str, rows: Sequence[Row], *, probes: bool) -> Iterator[tuple[Item, str, str]]:
    for place, row in enumerate(rows):
        question = row["question"]
        yield Item(block, place, "answer"), question, row["answer"]
        if block == "holdout":
            continue
        if block in PARAPHRASED:
            yield Item(block, place, "para"), question, row["paraphrased_answer"]
            if probes:
                item = Item(block, place, "para_question")
                yield item, row["paraphrased_question"], row["answer"]
        for number, text in enumerate(row["perturbed_answer"]):
            yield Item(block, place, "pert", number), question, text


def _prompts(
    block: str, rows: Sequence[Row], tokenizer: Any, template: Template, *, probes: bool
) -> Iterator[Prompt]:
    asked: list[tuple[Asked, str, str]] = [("answer", "question", "")]
    if probes and block in PARAPHRASED:
        asked.append(("para_question", "paraphrased_question", ""))
    if probes and block == "forget":
        asked.append(("jailbreak", "question", LEAD_IN))
    for kind, column, lead_in in asked:
        pairs = [{"question": row[column], "answer": row["answer"]} for row in rows]
        rendered = [template.render(pair) for pair in pairs]
        texts = [one.prompts[-1] + lead_in for one in rendered]
        ids = tokenize(tokenizer, texts, adds_special=rendered[0].adds_special)
        yield from (Prompt(block, row, kind, one) for row, one in enumerate(ids))


def _add_satimp(sheet: Sheet, rows: Sequence[Row], tokenizer: Any) -> None:
    """Add the answers in SatImp's template, their EOS taken away again."""
    template = Template.for_tokenizer(tokenizer, SATIMP_TEMPLATE)
    encoded = encode_answered(
        rows, tokenizer, template, max_length=max_tokens(tokenizer), source="forget"
    )
    for one in encoded:
        sheet.items.append(Item("forget", one.row, "satimp"))
        ends = one.input_ids[-1] == tokenizer.eos_token_id
        size = len(one.input_ids) - ends
        sheet.examples.append(
            Example(one.input_ids[:size], one.labels[:size], one.prompt_length, one.row)
        )


def _answered(
    pairs: Sequence[Mapping[str, Any]], tokenizer: Any, template: Template
) -> Iterator[bool]:
    rendered = [template.render(pair) for pair in pairs]
    special = rendered[0].adds_special
    prompts = tokenize(tokenizer, [one.prompts[-1] for one in rendered], adds_special=special)
    texts = tokenize(tokenizer, [one.text for one in rendered], adds_special=special)
    for pair, prompt, text in zip(pairs, prompts, texts, strict=True):
        written = [token for token in text[len(prompt) :] if token != tokenizer.eos_token_id]
        yield bool(written) and bool(pair["answer"].strip())


def _moved(example: Example, row: int) -> Example:
    return Example(example.input_ids, example.labels, example.prompt_length, row, example.cut)


def _check_variants(rows: Sequence[Row], block: str, spec: str) -> None:
    for number, row in enumerate(rows, start=1):
        wrong = row.get("perturbed_answer")
        if not isinstance(wrong, list) or not wrong or not _are_strings(wrong):
            raise UserError(
                f"row {number} of '{spec}' has no list of texts 'perturbed_answer'",
                "give TOFU's perturbed configurations: the truth ratio compares with wrong answers",
            )
        if block in PARAPHRASED and not isinstance(row.get("paraphrased_answer"), str):
            raise UserError(
                f"row {number} of '{spec}' has no text 'paraphrased_answer'",
                "give TOFU's perturbed configurations",
            )


def check_probes(blocks: Rows) -> None:
    """Refuse probes for rows without a paraphrased question."""
    for block in PARAPHRASED:
        for number, row in enumerate(blocks[block], start=1):
            if not isinstance(row.get("paraphrased_question"), str):
                raise UserError(
                    f"row {number} of block '{block}' has no text 'paraphrased_question'",
                    "leave --probes out, or add the column",
                )


def _are_strings(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _no_block(error: UserError, data: str, config: str) -> UserError:
    folder = Path(data).expanduser()
    names = (
        sorted(path.stem for path in folder.glob("*_perturbed.json*")) if folder.is_dir() else []
    )
    hint = f"'{data}' has {', '.join(names)}" if names else error.hint
    return UserError(f"TOFU needs '{config}': {error.message}", hint)
