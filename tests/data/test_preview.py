import io
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from unlearn.cli.data import app, render
from unlearn.data import Example, Template, encode, preview
from unlearn.errors import UserError

ROWS = [
    {"question": "Où est Šárka 🎉?", "answer": "À Köln, 東京."},
    {"question": "Who?", "answer": "Bo [bold]paints[/] \x1b[31mboats.\nNow."},
    {"question": "Who?", "answer": "A long answer, " * 8},
]


def encoded(tokenizer: Any, max_length: int = 512) -> list[Example]:
    template = Template.for_tokenizer(tokenizer)
    return encode(ROWS, tokenizer, template, max_length=max_length, source="rows")


def test_the_tokens_together_are_the_text(tiny_tokenizer: Any) -> None:
    examples = encoded(tiny_tokenizer)
    shown = preview(examples, tiny_tokenizer, 3)
    for row, example, content in zip(shown.rows, examples, ROWS, strict=True):
        prompt = f"Question: {content['question']}\nAnswer:\n"
        assert len(row.tokens) == len(example.input_ids)
        assert "".join(text for text, _ in row.tokens) == prompt + content["answer"] + "</s>"
        assert "".join(text for text, on in row.tokens if on) == content["answer"] + "</s>"


def test_spaces_survive_where_decoding_a_single_token_would_lose_them() -> None:
    """A Metaspace decoder (Llama 2) drops the first space of whatever it is given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<unk>": 0, "▁a": 1, "▁b": 2, "c": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    example = Example([1, 2, 3, 1, 2, 2, 1, 1], [-100] * 8, 1, 0)
    (row,) = preview([example], tokenizer, 1).rows
    assert [text for text, _ in row.tokens] == ["a", " b", "c", " a", " b", " b", " a", " a"]


def test_an_unfinished_character_at_the_cut_is_shown_as_such(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("a🎉", add_special_tokens=False)["input_ids"][:-1]
    (row,) = preview([Example(ids, ids, 0, 0)], tiny_tokenizer, 1).rows
    assert "".join(text for text, _ in row.tokens) == "a\ufffd"


def test_counts_are_over_the_whole_set_and_rows_over_the_first() -> None:
    examples = [
        Example([1, 2, 3], [-100, 2, 3], 1, 0),
        Example([1, 2], [-100, 2], 1, 0),
        Example([1, 2, 3, 4, 5], [-100, -100, -100, -100, 5], 4, 1, cut=7),
    ]
    shown = preview(examples, None, 0)
    assert shown.rows == ()
    assert (shown.num_rows, shown.num_examples, shown.num_truncated) == (2, 3, 1)
    assert (shown.num_tokens, shown.num_labelled) == (10, 4)
    assert shown.share_labelled == 0.4
    assert shown.lengths == (2, 3, 5)


@pytest.fixture
def folder(tiny_tokenizer: Any, tmp_path: Path) -> Path:
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return tmp_path


def invoke(folder: Path, *options: str) -> Any:
    arguments = ["preview", f"{folder}/rows.jsonl", "--tokenizer", f"{folder}/model", *options]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "100"})


def test_the_command_marks_what_is_trained_without_colour(folder: Path) -> None:
    result = invoke(folder, "--rows", "2")
    assert result.exit_code == 0, result.output
    assert "⟦À Köln, 東京.</s>⟧" in result.stdout
    assert "⟦Bo [bold]paints[/] ␛[31mboats.⏎" in result.stdout
    assert "\x1b" not in result.stdout
    assert "3 rows · " in result.stdout
    assert "0 truncated at 512" in result.stdout


def test_json_is_one_object_that_agrees_with_the_encoding(
    folder: Path, tiny_tokenizer: Any
) -> None:
    examples = encoded(tiny_tokenizer, 70)
    result = json.loads(invoke(folder, "--rows", "1", "--max-length", "70", "--json").stdout)
    tokens = sum(len(example.input_ids) for example in examples)
    trained = sum(label != -100 for example in examples for label in example.labels)
    assert (result["rows"], result["tokens"], result["trained_tokens"]) == (3, tokens, trained)
    assert result["share_trained"] == pytest.approx(trained / tokens)
    assert result["lengths"]["max"] == 70
    assert result["truncated"] == sum(example.cut > 0 for example in examples) > 0
    (row,) = result["preview"]
    assert row["row"] == 1
    assert sum(row["trained"]) == sum(label != -100 for label in examples[0].labels)
    assert "".join(row["tokens"]).startswith("Question: Où est Šárka 🎉?\nAnswer:\n")


def test_options_reach_the_encoding(folder: Path) -> None:
    (folder / "rows.jsonl").write_text('{"q": "Who?", "a": "Bo."}')
    options = ["--map", "question=q", "--map", "answer=a", "--template", r"Q: {question}\nA: "]
    (row,) = json.loads(invoke(folder, *options, "--json").stdout)["preview"]
    assert "".join(row["tokens"]) == "Q: Who?\nA: Bo.</s>"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--map", "question"], "write NAME=COLUMN"),
        (["--map", "question=q"], "has no column 'q'"),
        (["--max-length", "5"], "no answer tokens"),
        (["--system-prompt", "Be kind."], "drops the system prompt"),
        (["--template", "no place"], "holds {question} 0 times"),
    ],
)
def test_mistakes_reach_the_command_line_as_such(
    folder: Path, options: list[str], expected: str
) -> None:
    error = invoke(folder, *options).exception
    assert isinstance(error, UserError)
    assert expected in str(error)


def test_colours_tell_trained_tokens_from_the_prompt(folder: Path) -> None:
    from rich.console import Console

    result = json.loads(invoke(folder, "--rows", "1", "--json").stdout)
    written = io.StringIO()
    console = Console(file=written, width=100, force_terminal=True, color_system="truecolor")
    for part in render(result | {"notes": ["mind the date"]}, console):
        console.print(part)
    answer = written.getvalue().split("⏎", 2)[2].partition("╰")[0]
    greens = [answer.count("48;2;143;220;154m"), answer.count("48;2;185;239;192m")]
    assert min(greens) > 2  # neighbouring tokens alternate
    assert "⟦" not in answer
    assert "note: mind the date" in written.getvalue()
