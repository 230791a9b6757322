import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from unlearn.cli.recipes import app
from unlearn.errors import UserError
from unlearn.recipes import files


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments])


def call_json(*arguments: str) -> Any:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_list_names_every_recipe_with_its_terms_and_source():
    rows = {row["name"]: row for row in call_json("list")["recipes"]}
    assert list(rows) == files.recipe_names()
    assert rows["npo"]["kind"] == "method"
    assert rows["npo"]["forget"] == [
        {"objective": "npo", "on": "forget", "weight": 1.0, "beta": 0.1}
    ]
    assert [term["objective"] for term in rows["npo"]["retain"]] == ["nll"]
    assert rows["grad_ascent"]["retain"] == []
    assert rows["tofu/npo-llama-2-7b"]["kind"] == "preset"
    assert "arXiv:2404.05868" in rows["npo"]["source"]


def test_list_for_people_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = call("list").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for name in files.recipe_names():
        source = files.read(files.find(name))["source"]
        assert any(line.startswith(f"{name} ") and source in line for line in lines), name


def test_show_prints_the_file_as_it_is():
    on_disk = files.read_text(files.find("tofu/npo-llama-3.2-1b"))
    assert call("show", "tofu/npo-llama-3.2-1b").stdout == on_disk
    assert call_json("show", "npo")["recipe"]["terms"][0]["beta"] == 0.1


def test_show_resolved_fills_in_every_default(tmp_path):
    text = call("show", "npo", "--resolved").stdout
    assert "gradient_accumulation_steps: 4\n" in text
    assert "learning_rate: 1.0e-5\n" in text
    path = tmp_path / "npo.yaml"
    path.write_text(text)
    assert files.load(path) == files.load("npo")


def test_copy_gives_a_recipe_that_runs_under_its_new_name(tmp_path):
    target = tmp_path / "new" / "mine.yaml"
    assert call("copy", "npo", str(target)).exit_code == 0
    assert files.read_text(target).startswith(f"# unlearn run {target} --model")
    assert files.load(target) == files.load("npo")


def test_copy_into_a_folder_keeps_the_name(tmp_path):
    assert call_json("copy", "tofu-tiny/npo", str(tmp_path))["path"] == str(tmp_path / "npo.yaml")


def test_copy_never_overwrites(tmp_path):
    target = tmp_path / "mine.yaml"
    target.write_text("precious")
    result = call("copy", "npo", str(target))
    assert isinstance(result.exception, UserError)
    assert "exists" in result.exception.message
    assert target.read_text() == "precious"


@pytest.mark.parametrize("name", ["mine.txt", "a_file/mine.yaml"])
def test_copy_refuses_names_it_cannot_write(name, tmp_path):
    (tmp_path / "a_file").write_text("")
    result = call("copy", "npo", str(tmp_path / name))
    assert isinstance(result.exception, UserError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_file"]


def test_validate_accepts_what_ships_and_says_what_a_run_needs():
    found = call_json("validate", *files.recipe_names())
    assert found["valid"]
    needs = {result["file"]: result["needs"] for result in found["files"]}
    assert [need.split()[0] for need in needs["tofu/npo-llama-3.2-1b"]] == ["out"]
    assert (
        "a run still needs model.path, data.forget, out" in call("validate", "grad_ascent").stdout
    )


def bad_files(folder: Path) -> list[str]:
    texts = {"a": "method: npo\nseeed: 1\nterms: []\n", "b": "method: [\n"}
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return [str(folder / f"{name}.yaml") for name in texts]


def test_validate_names_every_mistake_of_every_file(tmp_path):
    first, second = bad_files(tmp_path)
    result = call("validate", first, "npo", second)
    assert isinstance(result.exception, UserError)
    message = result.exception.message
    assert f"{first}: 2 mistakes" in message
    assert "line 2: seeed: unknown key; did you mean 'seed'?" in message
    assert "line 3: terms: no term is on forget" in message
    assert f"{second}, line 2:" in message
    assert [line[0] for line in result.stdout.splitlines()] == ["✗", "✓", "✗"]


def test_validate_as_json_is_one_object_and_exit_code_2(tmp_path):
    first, second = bad_files(tmp_path)
    result = call("validate", first, second, "npo", "--json")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert [file["valid"] for file in found["files"]] == [False, False, True]
    assert found["files"][0]["mistakes"][0] == {
        "key": "seeed",
        "line": 2,
        "message": "unknown key; did you mean 'seed'?",
    }


def test_schema_goes_to_stdout_or_a_file(tmp_path):
    path = tmp_path / "recipe.schema.json"
    assert call_json("schema", "--out", str(path)) == {"path": str(path)}
    assert json.loads(path.read_text()) == call_json("schema") == json.loads(call("schema").stdout)
    gone = call("schema", "--out", str(tmp_path / "gone" / "x.json"))
    assert isinstance(gone.exception, UserError)


def test_the_commands_are_imported_without_torch():
    code = (
        "import sys, unlearn.cli.recipes; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
