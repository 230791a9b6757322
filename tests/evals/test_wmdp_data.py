"""Local questions: every form of file gives the same rows, and a wrong row is named."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from unlearn.errors import UserError
from unlearn.evals.harness.wmdp_data import chosen, read_questions

ROWS = [
    {"question": f"What is {n}?", "choices": [f"{n}a", f"{n}b", "c, d", "e"], "answer": n % 4}
    for n in range(5)
]


def write(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows([row | {"choices": json.dumps(row["choices"])} for row in rows])
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def mistake(folder: Path, *names: str, required: bool = True) -> str:
    with pytest.raises(UserError) as caught:
        read_questions(folder, names, required=required)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "name",
    [
        "wmdp-bio.jsonl",
        "wmdp_bio.json",
        "bio.csv",
        "wmdp-bio.parquet",
        "wmdp-bio/test-00000-of-00001.parquet",
        "wmdp-bio/test.jsonl",
        "bio/questions.json",
    ],
)
def test_every_place_and_form_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, ROWS)
    assert read_questions(tmp_path, ["bio"], required=True) == {"bio": ROWS}


def test_mmlu_as_on_the_hub_is_read_once(tmp_path: Path) -> None:
    """The hub has all subjects under ``all`` and once more each; dev and validation stay out."""
    anatomy = [row | {"subject": "anatomy"} for row in ROWS]
    write(tmp_path / "mmlu/all/test-00000-of-00001.parquet", anatomy)
    write(tmp_path / "mmlu/all/dev-00000-of-00001.parquet", anatomy[:1])
    write(tmp_path / "mmlu/anatomy/test-00000-of-00001.parquet", anatomy)
    assert read_questions(tmp_path, ["mmlu"], required=True) == {"mmlu": anatomy}


def test_a_letter_is_an_answer_too(tmp_path: Path) -> None:
    letters = [row | {"answer": "ABCD"[row["answer"]]} for row in ROWS]
    write(tmp_path / "bio.jsonl", letters)
    assert read_questions(tmp_path, ["bio"], required=True) == {"bio": ROWS}


def test_a_set_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "wmdp-bio.jsonl", ROWS)
    found = read_questions(tmp_path, ["bio", "mmlu"], required=False)
    assert list(found) == ["bio"]
    message = mistake(tmp_path, "bio", "mmlu")
    assert "has no questions for mmlu; it holds wmdp-bio.jsonl (name the files mmlu." in message
    assert "has no questions for chem" in mistake(tmp_path, "chem", required=False)
    write(tmp_path / "wmdp-chen.jsonl", ROWS)
    assert "did you mean 'wmdp-chen'?" in mistake(tmp_path, "chem")
    assert "no folder" in mistake(tmp_path / "none", "bio")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no question": ({"question": None}, "row 2 of 'FILE': 'question' is None"),
    "blank question": ({"question": " "}, "'question' is ' '"),
    "three choices": ({"choices": ["a", "b", "c"]}, "'choices' is a list of 3, not a list of 4"),
    "choices as text": ({"choices": "a, b, c, d"}, "'choices' is 'a, b, c, d', not a list of 4"),
    "a number as choice": ({"choices": ["a", "b", "c", 4]}, "holds something that is no text"),
    "answer 4": ({"answer": 4}, "row 2 of 'FILE': 'answer' is 4, not one of 0 to 3"),
    "answer -1": ({"answer": -1}, "'answer' is -1"),
    "answer E": ({"answer": "E"}, "'answer' is 'E'"),
    "answer true": ({"answer": True}, "'answer' is True"),
    "answer missing": ({"answer": None}, "'answer' is None"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_row_is_named(tmp_path: Path, name: str) -> None:
    change, words = BAD[name]
    path = tmp_path / "wmdp-bio.jsonl"
    write(path, [ROWS[0], ROWS[1] | change, *ROWS[2:]])
    assert words.replace("FILE", str(path)) in mistake(tmp_path, "bio")


def test_a_column_with_another_name_is_named(tmp_path: Path) -> None:
    write(tmp_path / "bio.jsonl", [{"qestion": "q", "choices": ["a"] * 4, "answer": 0}])
    assert "there is no 'question'; did you mean 'qestion'?" in mistake(tmp_path, "bio")


def test_mmlu_needs_subjects(tmp_path: Path) -> None:
    write(tmp_path / "mmlu.jsonl", ROWS)
    assert "row 1 of" in mistake(tmp_path, "mmlu")
    assert "there is no 'subject'" in mistake(tmp_path, "mmlu")


def test_files_that_could_both_be_meant(tmp_path: Path) -> None:
    write(tmp_path / "bio.jsonl", ROWS)
    write(tmp_path / "bio.json", ROWS)
    assert "has both bio.json and bio.jsonl" in mistake(tmp_path, "bio")
    for name in ("one.jsonl", "two.jsonl"):
        write(tmp_path / "chem" / name, ROWS)
    assert "which are the test questions is not clear" in mistake(tmp_path, "chem")


def test_names_of_tasks() -> None:
    assert chosen(None) == ("bio", "chem", "cyber", "mmlu")
    assert chosen("cyber, wmdp_bio,wmdp-bio") == ("cyber", "bio")
    assert chosen("mmlu,wmdp") == ("mmlu", "bio", "chem", "cyber")
    with pytest.raises(UserError, match="unknown task 'chen'; did you mean 'chem'"):
        chosen("bio,chen")
