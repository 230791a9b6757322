from pathlib import Path
from typing import Any

import pytest

from unlearn.data.encode import IGNORE, Example, check_labels, encode, pad_token_id
from unlearn.data.sources import load_rows
from unlearn.data.templates import Template
from unlearn.errors import UserError

PLAIN = "Question: {question}\nAnswer: "
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Ann."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "Oslo."},
]


def build(
    chat: str | None = None,
    *,
    eos: str | None = "</s>",
    pad: str | None = "<pad>",
    bos: bool = False,
    adds_eos: bool = False,
    merges: tuple[tuple[str, str], ...] = (),
) -> Any:
    """Build a byte-level tokenizer with chosen merges: one character is one token otherwise."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(m) for m in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocabulary, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    single = ("<s> " if bos else "") + "$A" + (" </s>" if adds_eos else "")
    core.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "eos_token": eos, "pad_token": pad}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, **{name: token for name, token in names.items() if token}
    )
    tokenizer.chat_template = chat
    return tokenizer


def run(rows: list[Any], tokenizer: Any, template: str | None = None, **options: Any) -> Any:
    options = {"max_length": 512, "source": "rows"} | options
    return encode(rows, tokenizer, Template.for_tokenizer(tokenizer, template), **options)


def labelled(example: Example, tokenizer: Any) -> str:
    """Decode what is trained, with a bar between runs of labels."""
    text = ""
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, IGNORE)
        text += tokenizer.decode([token]) if label != IGNORE else "|"
    while "||" in text:
        text = text.replace("||", "|")
    return text


def qa(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"question": question, "answer": answer} for question, answer in pairs]


def test_the_answer_and_one_eos_are_labelled() -> None:
    tokenizer = build()
    (example,) = run(qa(("Who?", "Bo.")), tokenizer, PLAIN)
    prompt = "Question: Who?\nAnswer: "
    assert tokenizer.decode(example.input_ids) == prompt + "Bo.</s>"
    assert example.prompt_length == len(prompt)
    assert example.labels == [IGNORE] * len(prompt) + example.input_ids[len(prompt) :]
    assert (example.row, example.cut) == (0, 0)


@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
def test_padding_with_eos_changes_nothing(pad: str | None) -> None:
    rows = qa(("A</s>B?", "Bo."))  # an EOS inside the prompt stays, unlabelled
    (example,) = run(rows, build(pad=pad), PLAIN)
    assert example == run(rows, build(), PLAIN)[0]
    assert example.labels.count(2) == 1
    assert example.input_ids.count(2) == 2


@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_bos_comes_from_the_tokenizer_and_eos_only_once(bos: bool, adds_eos: bool) -> None:
    (example,) = run(qa(("Who?", "Bo.")), build(bos=bos, adds_eos=adds_eos), PLAIN)
    assert example.input_ids[: int(bos)] == [1] * bos
    assert example.input_ids.count(1) == bos
    assert example.labels[-1] == 2
    assert example.input_ids.count(2) == 1
    assert example.prompt_length == bos + len("Question: Who?\nAnswer: ")


def test_an_answer_that_brings_its_eos_gets_no_second() -> None:
    tokenizer = build()
    (example,) = run(qa(("Who?", "Bo.</s>")), tokenizer, PLAIN)
    assert labelled(example, tokenizer) == "|Bo.</s>"


def test_a_merge_across_the_border_shifts_the_split_by_a_token() -> None:
    """The prompt alone is 'x ', two tokens; in the full text ' B' is one: labels begin after it."""
    tokenizer = build(merges=(("Ġ", "B"),))
    (example,) = run(qa(("x", "Bo.")), tokenizer, "{question} ")
    assert [tokenizer.decode([token]) for token in example.input_ids] == [
        "x", " B", "o", ".", "</s>",
    ]  # fmt: skip
    assert labelled(example, tokenizer) == "|o.</s>"
    assert example.prompt_length == 2


def test_what_a_template_writes_after_the_end_of_turn_is_dropped() -> None:
    """Qwen's template ends in '<|im_end|>\\n': no newline is trained and no second EOS appended."""
    tokenizer = build(CHATML, eos="<|im_end|>")
    (example,) = run(qa(("Who?", "Bo.")), tokenizer)
    assert labelled(example, tokenizer) == "|Bo.<|im_end|>"
    assert example.input_ids[-1] == 4


def test_where_the_template_ends_turns_with_another_token_eos_is_appended() -> None:
    tokenizer = build(CHATML, eos="</s>")
    (example,) = run(qa(("Who?", "Bo.")), tokenizer)
    assert labelled(example, tokenizer) == "|Bo.<|im_end|>\n</s>"


@pytest.mark.parametrize(
    ("eos", "expected"),
    [
        ("<|im_end|>", "|Ann.<|im_end|>|Oslo.<|im_end|>"),
        ("</s>", "|Ann.<|im_end|>\n|Oslo.<|im_end|>\n</s>"),
    ],
)
def test_every_assistant_turn_is_labelled(eos: str, expected: str) -> None:
    tokenizer = build(CHATML, eos=eos)
    (example,) = run([{"messages": [*TURNS, {"role": "user", "content": "Bye"}]}], tokenizer)
    assert labelled(example, tokenizer) == expected
    start = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(example.input_ids[: example.prompt_length]) == start


def test_a_template_that_rewrites_earlier_turns_still_works_where_turns_end_with_eos() -> None:
    """Qwen 3 writes an empty thought before the last answer only."""
    thinking = CHATML.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' and loop.last %}<think>{% endif %}{{ m.content }}",
    )
    tokenizer = build(thinking, eos="<|im_end|>")
    (example,) = run([{"messages": TURNS}], tokenizer)
    assert labelled(example, tokenizer) == "|Ann.<|im_end|>|<think>Oslo.<|im_end|>"
    with pytest.raises(UserError, match=r"row 1 of 'rows': .*turn 1 differently"):
        run([{"messages": TURNS}], build(thinking, eos="</s>"))


def test_completions_are_raw() -> None:
    tokenizer = build(CHATML, bos=True)
    (example,) = run([{"prompt": "Once", "completion": " upon"}], tokenizer)
    assert tokenizer.decode(example.input_ids) == "<s>Once upon</s>"
    assert labelled(example, tokenizer) == "| upon</s>"


@pytest.mark.parametrize("max_length", [2, 3, 4, 7, 10, 11, 12, 100])
def test_windows_label_every_token_but_the_first_exactly_once(max_length: int) -> None:
    tokenizer = build(adds_eos=True)
    texts = ["abcdefghijk", "lm", "<s>no</s>"]
    rows = [{"text": text} for text in texts]
    examples = run(rows, tokenizer, max_length=max_length)
    for row, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        mine = [example for example in examples if example.row == row]
        assert [label for one in mine for label in one.labels if label != IGNORE] == ids[1:]
        assert all(2 <= len(one.input_ids) <= max_length for one in mine)
        assert all(one.labels[0] == IGNORE and one.prompt_length == 1 for one in mine)
        assert mine[0].input_ids == ids[:max_length]  # no EOS appended
    assert [example.row for example in examples] == sorted(example.row for example in examples)


def test_bos_is_the_only_unlabelled_token_of_a_text() -> None:
    tokenizer = build(bos=True)
    (example,) = run([{"text": "abc"}], tokenizer)
    assert labelled(example, tokenizer) == "|abc"
    assert example.input_ids[0] == 1


def test_truncation_is_from_the_right_and_counted() -> None:
    tokenizer = build()
    rows = qa(("Who?", "Bo."), ("Who?", "Bo and Ann."))
    whole = run(rows, tokenizer, "{question}")
    cut = run(rows, tokenizer, "{question}", max_length=8)
    assert cut[0] == whole[0]
    assert cut[1].input_ids == whole[1].input_ids[:8]
    assert cut[1].labels == whole[1].labels[:8]
    assert (cut[0].cut, cut[1].cut) == (0, 8)
    assert labelled(cut[1], tokenizer) == "|Bo a"


@pytest.mark.parametrize(
    ("rows", "max_length", "expected"),
    [
        (qa(("Who?", "Bo."), ("Long one?", "Ann.")), 9,
         "1 row has no answer tokens, of 2 in 'rows' (row 2) "
         "(max_length=9 cuts the answers away; the longest row needs 14)"),
        (qa(("Who?", ""), ("Who?", "Bo."), ("Who?", " \n")), 99,
         "2 rows have no answer tokens, of 3 in 'rows' (row 1, 3) (fill in the answers"),
        (qa(*[("Who?", "")] * 7), 99, "7 rows have no answer tokens, of 7 in 'rows' "
         "(row 1, 2, 3, 4, 5, …)"),
        ([{"text": "ab"}, {"text": "a"}, {"text": ""}], 99, "2 rows have no answer tokens, of 3"),
        ([{"messages": [TURNS[0], {"role": "assistant", "content": " "}]}], 99, "1 row has no"),
    ],
)  # fmt: skip
def test_rows_without_answer_tokens_are_refused(
    rows: list[Any], max_length: int, expected: str
) -> None:
    template = None if "messages" in rows[0] else "{question}"
    with pytest.raises(UserError) as caught:
        run(rows, build(CHATML), template, max_length=max_length)
    assert expected in str(caught.value)


def test_an_answer_swallowed_by_a_merge_is_refused() -> None:
    with pytest.raises(UserError, match="1 row has no answer tokens"):
        run(qa(("x", "B")), build(merges=(("Ġ", "B"),)), "{question} ")


@pytest.mark.parametrize(
    ("options", "expected"), [({"max_length": 1}, "leaves no token"), ({"rows": []}, "no rows")]
)
def test_impossible_requests_are_refused(options: dict[str, Any], expected: str) -> None:
    arguments = {"rows": qa(("Who?", "Bo.")), "template": PLAIN} | options
    with pytest.raises(UserError, match=expected):
        run(arguments.pop("rows"), build(), **arguments)


def test_a_bad_row_is_named() -> None:
    picky = "{{ raise_exception('too rude') if 'Hey' in messages[0].content }}" + CHATML
    with pytest.raises(UserError, match=r"row 2 of 'rows': .*too rude"):
        run(qa(("Who?", "Bo."), ("Hey?", "Bo.")), build(picky))
    with pytest.raises(UserError, match="row 2 of 'rows': it is a qa row, the first is a text row"):
        run([{"text": "abc"}, *qa(("Who?", "Bo."))], build())


def test_labels_that_make_no_sense_are_refused() -> None:
    nothing = Example([5, 6, 7], [IGNORE] * 3, 3, 0)
    everything = Example([5, 6, 7], [IGNORE, 6, 7], 1, 0)
    sensible = Example([5, 6, 7], [IGNORE, IGNORE, 7], 2, 0)
    with pytest.raises(UserError, match="no token of the whole set is labelled"):
        check_labels([nothing], "qa")
    with pytest.raises(UserError, match="every token of the whole set is labelled"):
        check_labels([everything], "completion")
    check_labels([everything], "text")
    check_labels([everything, sensible, nothing], "qa")


def test_a_set_whose_prompts_are_all_empty_is_refused() -> None:
    with pytest.raises(UserError, match="prompts included"):
        run([{"prompt": "", "completion": "Once"}] * 2, build(bos=True))


def test_padding_falls_back_on_eos() -> None:
    assert pad_token_id(build()) == 0
    assert pad_token_id(build(pad=None)) == 2
    with pytest.raises(UserError, match="neither a pad token nor an EOS token"):
        pad_token_id(build(pad=None, eos=None))
    with pytest.raises(UserError, match="has no EOS token"):
        run(qa(("Who?", "Bo.")), build(eos=None), PLAIN)


def test_many_rows_are_encoded_as_one_by_one() -> None:
    rows = qa(*[(f"Who is {n}?", f"Number {n * n}.") for n in range(50)])
    together = run(rows, build(), PLAIN)
    for index, row in enumerate(rows):
        (alone,) = run([row], build(), PLAIN)
        assert (alone.input_ids, alone.labels) == (
            together[index].input_ids,
            together[index].labels,
        )
        assert together[index].row == index


def test_tofu_is_encoded_as_its_chat_string(shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models/tofu-tiny-target")
    template = Template.for_tokenizer(tokenizer)
    for spec in ("forget10", "full:train[:400]"):
        rows = load_rows(f"{shared}/data/tofu#{spec}")
        examples = encode(rows, tokenizer, template, max_length=512, source=spec)
        assert len(examples) == 400
        for row, example in zip(rows, examples, strict=True):
            prompt = f"Question: {row['question']}\nAnswer:\n"
            text = prompt + row["answer"] + "</s>"
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            assert example.input_ids == ids
            assert example.labels == [IGNORE] * start + ids[start:]
            assert template.prompt_ids(row, tokenizer) == ids[:start]
