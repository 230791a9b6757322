from pathlib import Path
from typing import Any

import pytest

from unlearn.data.templates import Template, tokenize
from unlearn.errors import UserError

QA = {"question": "Who {are} you?", "answer": "Bo."}
CHAT = {
    "messages": [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Ann."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "Oslo."},
        {"role": "user", "content": "Thanks"},
    ]
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}"
)
DATED += "{% endif %}{{ date_string }}: " + CHATML


def build(chat: str | None = CHATML, *, adds: str = "", eos: str = "<|im_end|>") -> Any:
    """Build a byte-level tokenizer; ``adds`` names the special tokens it adds by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    if adds:
        names = [(token, vocabulary[token]) for token in special if token in adds]
        core.post_processor = processors.TemplateProcessing(single=adds, special_tokens=names)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token=eos
    )
    tokenizer.chat_template = chat
    return tokenizer


def test_the_chat_template_writes_prompt_and_answer() -> None:
    rendered = Template.for_tokenizer(build()).render(QA)
    prompt = "<|im_start|>user\nWho {are} you?<|im_end|>\n<|im_start|>assistant\n"
    assert rendered.prompts == (prompt,)
    assert rendered.text == prompt + "Bo.<|im_end|>\n"
    assert not rendered.adds_special


def test_a_system_prompt_comes_first_and_gives_way_to_the_rows_own() -> None:
    template = Template.for_tokenizer(build(), system_prompt="Be kind.")
    own = {"messages": [{"role": "system", "content": "Mine."}, *CHAT["messages"]]}
    assert template.prompt(QA).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>u")
    assert template.prompt(CHAT).startswith("<|im_start|>system\nBe kind.<|im_end|>\n")
    assert "Be kind." not in template.prompt(own)


def test_every_assistant_turn_is_found_and_what_follows_the_last_is_left_out() -> None:
    rendered = Template.for_tokenizer(build()).render(CHAT)
    first, second = rendered.prompts
    assert first.endswith("Who?<|im_end|>\n<|im_start|>assistant\n")
    assert (
        second == rendered.ends[0] + "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered.ends[1] == rendered.text
    assert "Thanks" not in rendered.text
    assert CHAT["messages"][-1]["content"] == "Thanks"  # the row itself is untouched


def test_an_explicit_template_puts_the_answer_right_after_the_prompt() -> None:
    template = Template.for_tokenizer(build(), "{x} Question: {question}\nAnswer: ")
    rendered = template.render(QA)
    assert template.prompt(QA) == "{x} Question: Who {are} you?\nAnswer: "
    assert rendered.text == "{x} Question: Who {are} you?\nAnswer: Bo."
    assert rendered.adds_special


def test_completions_and_texts_are_used_as_they_are() -> None:
    template = Template.for_tokenizer(build(), system_prompt="Be kind.")
    assert template.prompt({"prompt": "Once", "completion": " upon"}) == "Once"
    assert template.render({"prompt": "Once", "completion": " upon"}).text == "Once upon"
    assert template.prompt({"text": "Once"}) == ""
    assert template.render({"text": "Once"}).prompts == ()


@pytest.mark.parametrize(
    ("adds", "front"), [("", []), ("<s> $A", [1]), ("<s> $A </s>", [1]), ("$A </s>", [])]
)
def test_prompts_begin_as_the_tokenizer_begins_and_never_end_with_eos(
    adds: str, front: list[int]
) -> None:
    tokenizer = build(adds=adds, eos="</s>")
    template = Template.for_tokenizer(tokenizer, "{question}")
    body = tokenizer("Hi", add_special_tokens=False)["input_ids"]
    assert template.prompt_ids({"question": "Hi", "answer": "!"}, tokenizer) == front + body
    assert tokenize(tokenizer, ["Hi", "Hi"], adds_special=True) == [front + body] * 2
    assert tokenize(tokenizer, [], adds_special=True) == []


def test_a_chat_template_that_writes_bos_gets_no_second_one() -> None:
    tokenizer = build("{{ bos_token }}" + CHATML, adds="<s> $A")
    ids = Template.for_tokenizer(tokenizer).prompt_ids(QA, tokenizer)
    assert ids.count(1) == 1
    assert ids[0] == 1


def test_template_arguments_reach_the_template() -> None:
    tokenizer = build(DATED)
    template = Template.for_tokenizer(tokenizer, template_args={"date_string": "10 Apr 2025"})
    assert template.prompt(QA).startswith("<s>10 Apr 2025: <|im_start|>")
    assert not template.writes_todays_date
    assert Template.for_tokenizer(tokenizer).writes_todays_date
    assert not Template.for_tokenizer(build()).writes_todays_date


def test_the_fingerprint_changes_with_all_that_changes_the_text() -> None:
    prints = [
        Template.for_tokenizer(build()),
        Template.for_tokenizer(build(CHATML + " ")),
        Template.for_tokenizer(build(), system_prompt="Be kind."),
        Template.for_tokenizer(build(), "{question}"),
        Template.for_tokenizer(build(), "{question} "),
        Template.for_tokenizer(build(DATED)),
        Template.for_tokenizer(build(DATED), template_args={"date_string": "1"}),
        Template.for_tokenizer(build(DATED), template_args={"date_string": "2"}),
    ]
    assert len({template.fingerprint() for template in prints}) == len(prints)
    assert prints[0].fingerprint() == Template.for_tokenizer(build()).fingerprint()


@pytest.mark.parametrize(
    ("chat", "options", "expected"),
    [
        (CHATML, {"template": "Question: "}, "holds {question} 0 times, not once"),
        (CHATML, {"template": "{question}{question}"}, "holds {question} 2 times, not once"),
        (CHATML, {"template": "{question}{answer}"}, "holds {answer}"),
        (CHATML, {"template": "{question}", "system_prompt": "x"}, "system_prompt has no effect"),
        (CHATML, {"template": "{question}", "template_args": {"a": 1}}, "template_args has no"),
        (DATED, {"template_args": {"date_strng": "1"}}, "did you mean 'date_string'?"),
        ("{{ messages[-1].content }}", {"system_prompt": "x"}, "drops the system prompt"),
        (None, {"system_prompt": "x"}, "the tokenizer has no chat template"),
        ({"a": CHATML, "b": CHATML}, {}, "several chat templates"),
    ],
)
def test_a_setting_without_effect_is_refused(
    chat: Any, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        Template.for_tokenizer(build(chat), **options)
    assert expected in str(caught.value)


def test_a_missing_chat_template_matters_only_to_rows_that_need_it() -> None:
    template = Template.for_tokenizer(build(None))
    assert template.prompt({"prompt": "p", "completion": "c"}) == "p"
    with pytest.raises(UserError, match="no chat template"):
        template.prompt(QA)
    with pytest.raises(UserError, match="messages need a chat template"):
        Template.for_tokenizer(build(), "{question}").prompt(CHAT)


def test_a_refusal_written_into_the_template_is_passed_on() -> None:
    strict = "{{ raise_exception('System role not supported') if messages[0].role == 'system' }}"
    with pytest.raises(UserError, match="System role not supported"):
        Template.for_tokenizer(build(strict + CHATML), system_prompt="x")


def test_a_prompt_that_changes_once_answered_is_refused() -> None:
    moody = "{{ messages | length }}: {{ messages[-1].content }}"
    with pytest.raises(UserError, match="writes the prompt differently"):
        Template.for_tokenizer(build(moody)).render(QA)


def test_the_tofu_fixture_asks_its_questions_plainly(shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models/tofu-tiny-target")
    template = Template.for_tokenizer(tokenizer)
    assert template.prompt({"question": "Who?", "answer": "Bo."}) == "Question: Who?\nAnswer:\n"
