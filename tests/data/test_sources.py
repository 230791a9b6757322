import csv
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from unlearn.data.sources import Source, load_rows, row_kind
from unlearn.errors import UserError

QA = [{"question": f"q{n}", "answer": f"a{n}", "wrong": [f"w{n}", "x"]} for n in range(10)]


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def mistake(spec: str, **options: Any) -> str:
    """Give the whole message of the mistake; nothing of pyarrow may reach the first line."""
    with pytest.raises(UserError) as caught:
        load_rows(spec, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("people.jsonl", ("people.jsonl", None, None)),
        ("people.jsonl:[:100]", ("people.jsonl", None, "[:100]")),
        ("people.jsonl:train[:10%]", ("people.jsonl", None, "train[:10%]")),
        ("../data/tofu#forget10", ("../data/tofu", "forget10", None)),
        ("../data/tofu#full:train[:400]", ("../data/tofu", "full", "train[:400]")),
        ("locuslab/TOFU#forget10:train+test", ("locuslab/TOFU", "forget10", "train+test")),
        (r"C:\data\people.csv", (r"C:\data\people.csv", None, None)),
        (r"C:\data\people.csv:train", (r"C:\data\people.csv", None, "train")),
    ],
)
def test_a_source_is_taken_apart(spec: str, parts: tuple[str, str | None, str | None]) -> None:
    assert Source.parse(spec) == Source(*parts)


def test_a_file_name_with_marks_is_taken_as_it_is(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a#b:c.jsonl", QA)
    assert load_rows(path) == QA


@pytest.mark.parametrize("spec", ["x.jsonl:", "x#", "#full", "x#full:"])
def test_an_empty_part_is_refused(spec: str) -> None:
    assert "a part of it is empty" in mistake(spec)


@pytest.mark.parametrize("split", ["train[:1", "train[3]", "train[a:b]", "train+", "a b"])
def test_an_unreadable_split_is_refused(split: str) -> None:
    assert f"cannot read the split '{split}'" in mistake(f"x.jsonl:{split}")


@pytest.mark.parametrize("spec", ["x" * 5000, "~nobody-at-all/x.jsonl"])
def test_an_impossible_path_is_refused(spec: str) -> None:
    assert "cannot use the source" in mistake(spec)


def test_every_form_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    lines = write_jsonl(tmp_path / "lines.jsonl", QA)
    lines_in_json = write_jsonl(tmp_path / "lines.json", QA)
    array = tmp_path / "array.json"
    array.write_text("\ufeff" + json.dumps(QA, indent=2), encoding="utf-8")
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(QA), table)
    for path in (lines, lines_in_json, str(array), str(table)):
        assert load_rows(path) == QA, path


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows = [{"question": "year?", "answer": "1984", "note": "a, b\nc"},
            {"question": "code?", "answer": "007", "note": "x" * 200_000}]  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer", "note"])
        writer.writeheader()
        writer.writerows(rows)
    assert load_rows(str(path)) == rows
    assert csv.field_size_limit() == 131_072


def test_a_line_separator_inside_a_json_string_does_not_end_the_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"question": "one\u2028two\x85", "answer": "a"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_rows(str(path)) == [row]


TEXTS = [{"text": "first text"}, {"text": 'said "so"'}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", 'first text\n\nsaid "so"\n'),
        ("x.jsonl", '"first text"\n"said \\"so\\""\n'),
        ("x.jsonl", '{"text": "first text"}\n"said \\"so\\""\n'),
    ],
)
def test_a_corpus_of_texts_is_read_from_every_form(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert load_rows(str(path)) == TEXTS


def test_objects_keep_their_title_and_abstract(tmp_path: Path) -> None:
    row = {"title": "T", "abstract": "A", "text": "the text", "doi": None}
    assert load_rows(write_jsonl(tmp_path / "bio.jsonl", [row])) == [row]


def test_lines_without_any_json_are_texts_and_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "wiki.jsonl"
    path.write_text('first text\nsaid "so"\n')
    with pytest.warns(UserWarning, match="holds no JSON: each line is read as one text"):
        assert load_rows(str(path)) == TEXTS


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(10)),
        ("[:3]", range(3)),
        ("train[-2:]", range(8, 10)),
        ("[:20%]", range(2)),
        ("[50%:]+[:1]", [5, 6, 7, 8, 9, 0]),
        ("[8:99]", range(8, 10)),
    ],
)
def test_files_are_sliced_as_datasets_slices(
    tmp_path: Path, split: str, expected: range | list[int]
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", QA)
    assert load_rows(f"{path}:{split}") == [QA[index] for index in expected]


def test_a_folder_needs_a_choice_only_between_several_splits(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    for path in (one / "train.jsonl", two / "train.jsonl"):
        write_jsonl(path, QA)
    write_jsonl(two / "test.jsonl", QA[:4])
    assert load_rows(str(one)) == QA
    assert load_rows(f"{one}:[:2]") == QA[:2]
    assert load_rows(f"{two}:test+train[:1]") == QA[:4] + QA[:1]
    assert "has 2 splits and none was chosen (append :NAME with one of" in mistake(str(two))
    assert "did you mean 'test'? (one of test, train)" in mistake(f"{two}:tst")


def test_a_folder_with_configurations_needs_a_choice(tmp_path: Path) -> None:
    """A default must never be taken silently: it could be the whole set instead of a part."""
    for name in ("full", "forget10"):
        write_jsonl(tmp_path / f"{name}.json", QA[: 10 if name == "full" else 1])
    header = "configs:\n- config_name: full\n  data_files: full.json\n  default: true\n"
    header += "- config_name: forget10\n  data_files: forget10.json\n"
    (tmp_path / "README.md").write_text(f"---\n{header}---\n")
    assert load_rows(f"{tmp_path}#forget10") == QA[:1]
    assert "append #NAME with one of full, forget10" in mistake(str(tmp_path))
    assert "did you mean 'forget10'? (one of forget10, full)" in mistake(f"{tmp_path}#forgt10")


def test_a_folder_of_save_to_disk_is_read(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(QA)
    data.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"a": data, "b": data}).save_to_disk(str(tmp_path / "splits"))
    assert load_rows(f"{tmp_path}/plain:[:2]") == QA[:2]
    assert load_rows(f"{tmp_path}/splits:b[9:]") == QA[9:]
    assert "append :NAME with one of a, b" in mistake(f"{tmp_path}/splits")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.jsonl", b"", "is empty (0 bytes)"),
        ("x.jsonl", b" \n \n", "has no rows"),
        ("x.json", b"[]", "has no rows"),
        ("x.csv", b"question,answer\n", "has no rows"),
        (
            "x.xls",
            b"hello",
            "extension '.xls' (one of .txt, .md, .jsonl, .json, .csv, .tsv, .parquet)",
        ),
        ("x.txt", b"\n \n", "has no rows"),
        ("x.jsonl", b'"one"\ntwo\n', "line 2 is not JSON: "),
        ("x.jsonl", b'one\n{"text": "two"}\n', "line 1 is not JSON: "),
        ("x.jsonl", b'one\n{"text": "tw', "give a file of plain text the extension .txt"),
        ("x.jsonl", b'"one"\n3\n', "line 2 is a number (3), not an object"),
        ("x.json", b"one\ntwo\n", "line 1 is not JSON: "),
        ("x.jsonl", b'{"question":"q","answer":"a"}\n{"question', "line 2 is not JSON: "),
        ("x.json", b'[{"question":"q"', "damaged JSON"),
        ("x.json", b"[" * 100_000, "damaged JSON"),
        ("x.json", b'["q", "a"]', "entry 1 is a text (q), not an object"),
        ("x.jsonl", b"\xff{", "not UTF-8 text"),
        ("x.jsonl", b"\xff\xfe{", "UTF-16, not UTF-8"),
        ("x.txt.gz", b"no gzip", "is damaged"),
        ("x.parquet", b"PAR1 no", "damaged parquet"),
        ("x.csv", b'question,answer\n"q,a\n', "damaged CSV"),
        ("x.csv", b"question,answer\nq,a,b\n", "line 2 has more cells than the header's 2"),
        ("x.csv", b"question,answer\nq\n", "row 1 of"),
        ("x.csv", b"question,question\nq,a\n", "more than one column 'question'"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = mistake(str(path))
    assert expected in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"questions": "q", "answer": "a"}], "did you mean 'questions'?"),
        ([{"questions": "q", "answer": "a"}], "its columns: answer, questions"),
        ([{"questions": "q", "answer": "a"}], "--map question=COLUMN"),
        ([{"q": "q"}], "rows need question and answer, prompt and completion, messages, or text"),
        ([QA[0], {"text": "t"}], "row 2 of"),
        ([QA[0], {"question": "q", "answer": 3}], "'answer' is a number (3), not a string"),
        ([QA[0], {"question": "q", "answer": 3}], "row 2 of"),
        ([QA[0], QA[0], {"question": None, "answer": "a"}], "'question' is null"),
        ([QA[0], QA[0], {"question": None, "answer": "a"}], "row 3 of"),
        ([{"text": ["a"]}], "'text' is a list (['a']), not a string"),
        ([{"messages": "hi"}], "'messages' is not a list of turns"),
        ([{"messages": [{"role": "asistant", "content": "x"}]}], "did you mean 'assistant'?"),
        ([{"messages": [{"role": "assistant", "content": None}]}], "content is null"),
        ([{"messages": [{"role": "user", "content": "x"}]}], "has no assistant turn"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, rows: list[Any], expected: str) -> None:
    assert expected in mistake(write_jsonl(tmp_path / "x.jsonl", rows))


def test_a_bad_row_outside_the_slice_does_not_matter(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [*QA, {"question": "q", "answer": 3}])
    assert load_rows(f"{path}:[:10]") == QA


def test_a_folder_with_a_damaged_file_is_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/x.jsonl").write_text('{"question": ')
    assert "JSON parse error" in mistake(str(tmp_path / "x"))
    (tmp_path / "y").mkdir()
    assert "doesn't contain any data files" in mistake(str(tmp_path / "y"))
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_is_told_apart_from_a_hub_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "people.jsonl", QA)
    assert "did you mean 'people.jsonl'?" in mistake(str(tmp_path / "peple.jsonl"))
    assert "does not exist" in mistake(str(tmp_path / "nowhere/people"))
    assert "no file or folder 'data/none.jsonl'" in mistake("data/none.jsonl")


def test_offline_opens_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    message = mistake("nobody/nothing#x:train", offline=True)
    assert "the hub is offline (check the path, or load it once while online)" in message
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_mapped_columns_get_standard_names_and_the_rest_stays(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"q": "Q", "a": "A", "id": 7}])
    expected = {"q": "Q", "a": "A", "id": 7, "question": "Q", "answer": "A"}
    assert load_rows(path, columns={"question": "q", "answer": "a"}) == [expected]


def test_a_mapping_may_replace_a_standard_column(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [QA[0] | {"paraphrased_question": "other"}])
    rows = load_rows(path, columns={"question": "paraphrased_question"})
    assert rows[0]["question"] == "other"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"qestion": "question"}, "unknown standard column 'qestion'; did you mean 'question'?"),
        ({"question": "qustion"}, "did you mean 'question'? (its columns: answer, question"),
        ({"text": "answer"}, "also have question and answer, which are read first"),
    ],
)
def test_a_bad_mapping_is_refused(tmp_path: Path, columns: dict[str, str], expected: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", QA)
    assert expected in mistake(path, columns=columns)


def test_the_kind_of_a_row_is_read_from_its_columns() -> None:
    assert row_kind({"question": "q", "answer": "a", "text": "t"}) == "qa"
    assert row_kind({"prompt": "p", "completion": ""}) == "completion"
    assert row_kind({"messages": [], "question": "q"}) == "messages"
    assert row_kind({"text": "t", "answer": None, "question": "q"}) == "text"
    with pytest.raises(UserError, match="its columns: q"):
        row_kind({"q": "q"})


def test_tofu_loads_with_every_column(shared: Path) -> None:
    tofu = shared / "data/tofu"
    assert len(load_rows(f"{tofu}#forget10")) == 400
    assert load_rows(f"{tofu}#full:train[:400]") == load_rows(f"{tofu}/full.json:[:400]")
    row = load_rows(f"{tofu}#forget10_perturbed:[:1]")[0]
    assert len(row["perturbed_answer"]) == 5
    assert isinstance(row["paraphrased_answer"], str)


def test_packed_files_and_tabs_are_read_too(tmp_path: Path) -> None:
    import gzip

    packed = tmp_path / "x.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(QA[0]).encode()))
    assert load_rows(str(packed)) == QA[:1]
    (tmp_path / "x.tsv").write_text("question\tanswer\nq, q\ta\n")
    assert load_rows(str(tmp_path / "x.tsv")) == [{"question": "q, q", "answer": "a"}]
