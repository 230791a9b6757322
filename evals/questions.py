"""The same prompts put to several models: what each of them writes, next to each other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unlearn import models
from unlearn.data import Row, Template, load_rows, pad_token_id, row_kind
from unlearn.errors import UserError
from unlearn.evals.answers import Evaluator
from unlearn.evals.metrics import rouge_l_recall
from unlearn.evals.report.page import markdown

Emit = Callable[[dict[str, Any]], None]
Texts = dict[str, str | None]

NAMES = {"target": "target", "unlearned": "unlearned", "retain_model": "retain model"}
"""Who is asked, in this order: the model before, the model after, one that never saw the data."""


@dataclass(frozen=True)
class Questions:
    """Prompts and how they are put; ``system_prompt`` goes into the chat template."""

    rows: Sequence[Row]
    template: str | None = None
    system_prompt: str | None = None
    max_new_tokens: int = 200

    @classmethod
    def gather(
        cls, prompts: Sequence[str], source: str | None, *, offline: bool = False, **how: Any
    ) -> "Questions":
        """Take prompts as given and those of a data source; lines of plain text are prompts.

        Raises:
            UserError: there is none, or the source cannot be read.
        """
        if any(not prompt.strip() for prompt in prompts):
            raise UserError("a --prompt is empty", "give the text that the model should answer")
        rows: list[Row] = [{"text": prompt} for prompt in prompts]
        rows += load_rows(source, offline=offline) if source else []
        if not rows:
            raise UserError("there is nothing to ask", "give --prompt TEXT or --prompts SOURCE")
        if how.get("max_new_tokens", 1) < 1:
            raise UserError("an answer of no tokens was asked for", "--max-new-tokens 1 or more")
        return cls(rows, **how)

    def ids(self, source: models.ModelSource, tokenizer: Any) -> list[list[int]]:
        """Tokenise the prompts for one model.

        A plain prompt is a question where there is a template for questions; where there is none
        the model goes on from its text.

        Raises:
            UserError: the template does not fit, or a token is not the model's.
        """
        template = Template.for_tokenizer(tokenizer, self.template, self.system_prompt, {})
        asks = template.explicit is not None or template.chat is not None
        found = [template.prompt_ids(_as_asked(row, asks=asks), tokenizer) for row in self.rows]
        models.check_vocabulary(
            source, {pad_token_id(tokenizer), *(t for ids in found for t in ids)}
        )
        return found


def ask(
    sources: Mapping[str, models.ModelSource],
    questions: Questions,
    *,
    emit: Emit = lambda event: None,
) -> dict[str, Any]:
    """Let every model answer, greedily; one model is in memory at a time.

    ``rows`` holds question, true answer (None where there is none) and, by model, its answer and
    the answer's ROUGE-L recall of the true one, in [0, 1].

    Raises:
        UserError: whatever is wrong with a model or the prompts, before weights are loaded.
    """
    ready = {}
    for who, source in sources.items():
        models.check_source(source)
        tokenizer = models.load_tokenizer(source)
        ready[who] = (source, tokenizer, questions.ids(source, tokenizer))
    rows: list[dict[str, Any]] = [
        {"question": question, "answer": answer, "answers": {}, "rouge_l_recall": {}}
        for question, answer in map(_texts, questions.rows)
    ]
    for who, (source, tokenizer, prompts) in ready.items():
        for row, text in zip(
            rows, _answers(source, tokenizer, prompts, questions, emit), strict=True
        ):
            _add(row, who, text)
    return {
        "models": {who: source.path for who, source in sources.items()},
        "settings": {k: v for k, v in vars(questions).items() if k != "rows"},
        "rows": rows,
    }


def to_markdown(found: Mapping[str, Any]) -> str:
    """Write the answers as a document; nothing a model wrote can act as Markdown."""
    parts = ["# Answers side by side\n"]
    parts += [f"- {NAMES[who]}: {markdown(path)}" for who, path in found["models"].items()]
    for number, row in enumerate(found["rows"], start=1):
        parts.append(f"\n## {number}. {markdown(row['question'])}\n")
        if row["answer"] is not None:
            parts.append(f"- **true answer**: {markdown(row['answer'])}")
        for who, text in row["answers"].items():
            parts.append(f"- **{NAMES[who]}**: {markdown(text) or '(nothing)'}")
    return "\n".join(parts) + "\n"


def _answers(
    source: models.ModelSource,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    questions: Questions,
    emit: Emit,
) -> list[str]:
    """Load one model, let it write, and free it."""
    emit({"event": "stage", "stage": "load", "name": source.path})
    model = models.load_model(source)
    _require_room(model, source, prompts)
    emit({"event": "stage", "stage": "benchmark", "name": source.path})

    def progress(done: int, total: int) -> None:
        emit({"event": "progress", "what": "answering", "done": done, "total": total})

    evaluator = Evaluator(model, tokenizer, max_new_tokens=questions.max_new_tokens)
    evaluator.check_finite(name=f"'{source.path}'")
    texts = evaluator.write(prompts, progress=progress)
    del evaluator, model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return texts


def _require_room(model: Any, source: models.ModelSource, prompts: Sequence[Sequence[int]]) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for number, prompt in enumerate(prompts, start=1):
        if limit and len(prompt) >= limit:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, '{source.path}' takes {limit}",
                "shorten it",
            )


def _as_asked(row: Row, *, asks: bool) -> Row:
    if row_kind(row) != "text":
        return row
    if asks:
        return {"question": row["text"], "answer": ""}
    return {"prompt": row["text"], "completion": ""}


def _texts(row: Row) -> tuple[str, str | None]:
    """Give what is asked and the true answer."""
    kind = row_kind(row)
    if kind == "text":
        return row["text"], None
    if kind == "messages":
        last = max(n for n, turn in enumerate(row["messages"]) if turn["role"] == "assistant")
        asked = [turn["content"] for turn in row["messages"][:last] if turn["role"] == "user"]
        return (asked or [""])[-1], row["messages"][last]["content"]
    names = ("question", "answer") if kind == "qa" else ("prompt", "completion")
    return row[names[0]], row[names[1]]


def _add(row: dict[str, Any], who: str, text: str) -> None:
    row["answers"][who] = text
    if row["answer"] is not None:
        row["rouge_l_recall"][who] = rouge_l_recall(row["answer"], text)


def writable(out: Path) -> Path:
    """Check a file that is to be written: ``.md`` or ``.json``, not there yet.

    Raises:
        UserError: as said, or its folder does not exist.
    """
    if out.suffix.lower() not in (".md", ".json"):
        raise UserError(
            f"cannot write '{out}': unknown kind '{out.suffix}'", "name it .md or .json"
        )
    if out.exists():
        raise UserError(f"'{out}' already exists", "choose another --out")
    if not out.parent.is_dir():
        raise UserError(f"cannot write '{out}': no folder '{out.parent}'", "make it first")
    return out
