"""How a row becomes text: the tokenizer's chat template, or an explicit string with ``{question}``.

Templates change scores more than most methods do, so nothing is silently dropped here: a system
prompt or an argument that the template ignores is refused.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from unlearn.data.rows import row_kind
from unlearn.errors import UserError, did_you_mean

QUESTION = "{question}"
EXPLICIT_HINT = "e.g. 'Question: {question}\\nAnswer: '; the answer follows it directly"
Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Rendered:
    r"""One row as text, cut where the assistant (or the answer) begins and ends.

    ``prompts[k]`` is the start of ``text`` up to assistant turn ``k``, ``ends[k]`` the start up to
    that turn's end. ``adds_special`` asks for the tokenizer's own leading tokens (BOS): a chat
    template writes them itself.
    """

    text: str
    prompts: tuple[str, ...]
    ends: tuple[str, ...]
    adds_special: bool


@dataclass(frozen=True)
class Template:
    """A way to write rows; build it with :meth:`for_tokenizer`."""

    explicit: str | None = None
    chat: str | None = None
    system_prompt: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: Any,
        template: str | None = None,
        system_prompt: str | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> "Template":
        """Use ``template``, or without one the tokenizer's chat template.

        A tokenizer without a chat template is only refused when a row needs one.

        Raises:
            UserError: no ``{question}`` in ``template``; a setting that would have no effect.
        """
        args = dict(template_args or {})
        if template is not None:
            _check_explicit(template, system_prompt, args)
            return cls(explicit=template, tokenizer=tokenizer)
        built = cls(None, _chat_source(tokenizer), system_prompt, args, tokenizer)
        built._check_settings_matter()
        return built

    @property
    def writes_todays_date(self) -> bool:
        """Whether the chat template would put the current date into every prompt (Llama 3)."""
        return "strftime_now" in (self.chat or "") and "date_string" not in self.template_args

    def fingerprint(self) -> str:
        """Identify everything here that decides what a row looks like (sha256, for caches)."""
        parts = [self.explicit, self.chat, self.system_prompt, dict(self.template_args)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def render(self, row: Mapping[str, Any]) -> Rendered:
        """Write a row in full: question, answer and, in a chat, whatever ends the turn."""
        kind = row_kind(row)
        if kind == "text":
            return Rendered(row["text"], (), (), adds_special=True)
        if kind == "completion":
            return _joined(row["prompt"], row["completion"])
        if kind == "qa" and self.explicit is not None:
            return _joined(self.explicit.replace(QUESTION, row["question"]), row["answer"])
        return self._render_turns(self._turns(row))

    def prompt(self, row: Mapping[str, Any]) -> str:
        """Write a row up to its last answer, as a model is asked for it (nothing for text rows)."""
        prompts = self.render(row).prompts
        return prompts[-1] if prompts else ""

    def prompt_ids(self, row: Mapping[str, Any], tokenizer: Any) -> list[int]:
        """Give the token ids that a model answers from, BOS included where the model has one."""
        rendered = self.render(row)
        prompt = rendered.prompts[-1] if rendered.prompts else ""
        return tokenize(tokenizer, [prompt], adds_special=rendered.adds_special)[0]

    def _turns(self, row: Mapping[str, Any]) -> Turns:
        if row_kind(row) == "qa":
            turns = [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ]
        else:
            turns = list(row["messages"])
            while turns and turns[-1]["role"] != "assistant":  # nothing after it is trained
                turns.pop()
        if self.system_prompt is not None and turns and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        return turns

    def _render_turns(self, turns: Turns) -> Rendered:
        text = self._apply(turns)
        places = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
        prompts = tuple(self._apply(turns[:place], generation=True) for place in places)
        ends = (*(self._apply(turns[: place + 1]) for place in places[:-1]), text)
        if not all(text.startswith(prompt) for prompt in prompts):
            raise UserError(
                "the chat template writes the prompt differently once an answer follows it, "
                "so the answer's tokens cannot be told apart",
                "give an explicit template, " + EXPLICIT_HINT,
            )
        return Rendered(text, prompts, ends, adds_special=False)

    def _apply(self, turns: Turns, *, generation: bool = False) -> str:
        if self.explicit is not None:
            raise UserError(
                "rows of messages need a chat template, not an explicit one",
                "leave the template out, or give rows of question and answer",
            )
        if self.chat is None:
            raise UserError(
                "the tokenizer has no chat template",
                f"give one with --template (data.template in a recipe), {EXPLICIT_HINT}",
            )
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns,
                chat_template=self.chat,
                tokenize=False,
                add_generation_prompt=generation,
                **self.template_args,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise UserError(
                f"the chat template refuses this conversation: {error}",
                "check the roles and their order, or give an explicit template",
            ) from error
        return text

    def _check_settings_matter(self) -> None:
        """Refuse arguments that the chat template never reads and a system prompt that it drops."""
        for name in self.template_args:
            if not re.search(rf"\b{re.escape(name)}\b", self.chat or ""):
                guess = did_you_mean(name, set(re.findall(r"[a-z]\w{3,}", self.chat or "")))
                raise UserError(
                    f"the chat template has no argument '{name}'{guess}", "remove or rename it"
                )
        if self.system_prompt is None:
            return
        probe = self._apply(self._turns({"question": "?", "answer": "!"})[:-1], generation=True)
        if self.system_prompt.strip() not in probe:
            raise UserError(
                "the chat template drops the system prompt",
                "leave the system prompt out, or write it into an explicit template",
            )


def tokenize(tokenizer: Any, texts: Sequence[str], *, adds_special: bool) -> list[list[int]]:
    """Turn many texts into ids in one call; ``adds_special`` puts the tokenizer's BOS in front.

    Tokens that a tokenizer would add at the end (EOS) are left out: whether a text ends there is
    for :mod:`unlearn.data.encode` to say.
    """
    if not texts:
        return []
    front = _leading_special_ids(tokenizer) if adds_special else []
    ids = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    return [front + list(row) for row in ids] if front else list(ids)


def _leading_special_ids(tokenizer: Any) -> list[int]:
    probe = tokenizer("a", add_special_tokens=True, return_special_tokens_mask=True)
    mask = probe["special_tokens_mask"]
    return list(probe["input_ids"][: mask.index(0) if 0 in mask else 0])


def _joined(prompt: str, answer: str) -> Rendered:
    return Rendered(prompt + answer, (prompt,), (prompt + answer,), adds_special=True)


def _chat_source(tokenizer: Any) -> str | None:
    if not tokenizer.chat_template:
        return None
    try:
        source: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(
            "the tokenizer has several chat templates and none is called 'default'",
            "give an explicit template, " + EXPLICIT_HINT,
        ) from error
    return source


def _check_explicit(template: str, system_prompt: str | None, args: Mapping[str, Any]) -> None:
    times = template.count(QUESTION)
    if times != 1:
        raise UserError(
            f"the template {template!r} holds {QUESTION} {times} times, not once",
            EXPLICIT_HINT,
        )
    if "{answer}" in template:
        raise UserError(
            f"the template {template!r} holds {{answer}}",
            f"leave it out, {EXPLICIT_HINT}",
        )
    ignored = "system_prompt" if system_prompt is not None else "template_args" if args else None
    if ignored:
        raise UserError(
            f"{ignored} has no effect on an explicit template",
            "write it into the template, or leave the template out to use the chat template",
        )
