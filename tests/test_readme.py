"""README.md: every command, option, recipe, path and Python line in it works as written."""

import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from pydantic import PositiveFloat

from unlearn.cli import detect, entry, main, mtp
from unlearn.cli.data import columns_of
from unlearn.data.people import demo_folder
from unlearn.detect.settings import SCORES
from unlearn.evals.forget_retain import MEASURES
from unlearn.evals.report.table import MEASURES as TOFU_MEASURES
from unlearn.objectives import OBJECTIVES, Objective, batch_loss, token
from unlearn.recipes import files
from unlearn.recipes.detection import load_detection
from unlearn.recipes.mistakes import find_mistakes
from unlearn.recipes.mtp import load_mtp
from unlearn.recipes.overrides import ALIASES, locate
from unlearn.recipes.schema import Recipe
from unlearn.recipes.yaml_text import parse as parse_yaml
from unlearn.recipes.yaml_text import parse_tree
from unlearn.scores import Scores

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join([README, *DOCS])
PROSE = re.sub(r"^```.*?^```", "", TEXT, flags=re.DOTALL | re.MULTILINE)
PROGRAMS = {"unlearn": main.app, "detect-pretraining": detect.app}


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_cells(text: str) -> list[str]:
    """Give the words in backticks of the first column of the tables."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    return [word for row in rows for word in re.findall(r"`([^`]+)`", row)]


def lines() -> list[list[str]]:
    """Give every command line as words, those in running text too."""
    shell = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    inline = [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", PROSE)]
    commands = [shlex.split(text, comments=True) for text in shell if text.strip()]
    commands += [shlex.split(text) for text in inline if text.startswith("unlearn run ")]
    return [words for words in commands if "…" not in words]


SHELL = ("head", "tail", "{", "}")
"""What else a reader is asked to type, to make files that examples need."""
COMMANDS = [words for words in lines() if words[0] in PROGRAMS]


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Let typer parse a command line without running it: its full name and its parameters."""
    name, *rest = words
    command: Any = typer.main.get_command(PROGRAMS[name])
    while hasattr(command, "commands"):
        if rest[0] not in command.commands and isinstance(command, detect.ScoreByDefault):
            rest.insert(0, "score")
        name, word = f"{name} {rest[0]}", rest.pop(0)
        command = command.commands[word]
    return name, command.make_context(name, rest).params


def options(command: Any) -> Iterator[str]:
    for parameter in command.params:
        yield from parameter.opts
    for child in getattr(command, "commands", {}).values():
        yield from options(child)


def test_there_is_something_to_check() -> None:
    assert len(COMMANDS) > 10
    assert len(blocks("python", README)) == 3


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_is_understood_and_its_recipe_is_valid(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_loss.py").write_text(blocks("python")[2], encoding="utf-8")
    name, given = parse(words)
    if name not in ("unlearn run", "unlearn plan"):
        return
    if given["method"] == "mtp":
        out = given["out"] or "runs/a"
        named = mtp.changes_of(None, model=given["model"], data=given["data_"], out=out)
        load_mtp("mtp", given["recipe"], named, given["set_"] or []).require_runnable()
        return
    changes: dict[str, Any] = {"out": "runs/a"}
    sections = {name: ("data", name) for name in ("forget", "retain", "pairs", "text")}
    for key, (group, leaf) in (sections | {"model": ("model", "path")}).items():
        if given[key]:
            changes.setdefault(group, {})[leaf] = given[key]
    if given["map_"]:
        changes.setdefault("data", {})["columns"] = columns_of(given["map_"])
    recipe = files.load(
        given["recipe"] or given["method"], given["set_"] or [], changes, lora=given["lora"]
    )
    recipe.require_runnable()
    assert recipe.method == given["method"] or given["method"] in files.preset_names()


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_what_a_command_reads_from_the_shared_folder_is_there(
    words: list[str], shared: Path
) -> None:
    for word in words:
        for place in re.findall(r"\.\./shared/([^#:\s]+)", word):
            assert (shared / place).exists(), place


def test_make_targets_and_scripts_exist() -> None:
    targets = re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in lines():
        launched = words[0] == "torchrun" and set(PROGRAMS) & set(words)
        made = words[0] == "make" and words[1] in targets
        script = words[0] == "python" and (ROOT / words[1]).is_file()
        allowed = launched or made or script or words[0] in SHELL
        assert words[0] in PROGRAMS or allowed, words


def test_options_in_running_text_exist() -> None:
    known = {name for app in PROGRAMS.values() for name in options(typer.main.get_command(app))}
    inline = " ".join(re.findall(r"`([^`]+)`", PROSE))
    mentioned = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", inline))
    assert mentioned
    assert mentioned <= known


def test_recipe_keys_in_running_text_exist() -> None:
    tree = files.read(files.find("npo")) | {"model": {"lora": {}}}
    pattern = r"`((?:model|data|terms|training|evals)\.[a-z_.]+)"
    keys = set(re.findall(pattern, PROSE))
    assert len(keys) > 10
    for key in keys:
        locate(tree, key)


def test_defaults_in_the_table_of_keys_are_those_of_the_schema() -> None:
    tree = files.read(files.find("npo")) | {"model": {"lora": {}}}
    recipe = Recipe.model_validate(tree).model_dump(mode="json")
    table = section("Recipes").split("| key | default | |\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines()[1:]]
    assert len(rows) > 8
    for keys, defaults in rows:
        for key, shown in zip(re.findall(r"`(.+?)`", keys), defaults.split(", "), strict=True):
            value: Any = recipe
            for part in key.split("."):
                value = value[part]
            assert parse_yaml(shown) == value, key


def test_methods_presets_and_short_names_are_those_that_ship() -> None:
    methods = section("Methods")
    table = methods.split("\n\n")[1]
    posttraining = {name for name in files.method_names() if files.load(name).posttrains}
    assert set(first_cells(table)) - {"--set terms.retain.objective=kl"} == (
        set(files.method_names()) - posttraining
    )
    others = section("Methods").partition("### Training on given rows instead")[2]
    assert set(first_cells(others.partition("###")[0])) == posttraining
    variants = re.findall(r"`objective=(\w+)`", methods)
    assert len(variants) == 4
    assert set(variants) <= set(OBJECTIVES)
    terms = {name for row in table.splitlines() if row.startswith("|")
             for cell in row.split("|")[2:4] for name in re.findall(r"`(\w+)`", cell)}  # fmt: skip
    assert terms <= set(OBJECTIVES)
    recipes = first_cells(section("Recipes"))
    tiny = {f"tofu-tiny/{method}" for method in set(files.method_names()) - posttraining}
    named = {name for name in recipes if "/" in name} - {"tofu-tiny/METHOD"}
    assert named | tiny == set(files.preset_names())
    short = {name.removeprefix("--set ").split("=")[0] for name in recipes if "=…" in name}
    assert short == {*ALIASES, "beta"}


def test_metrics_and_exit_codes_are_those_of_the_code() -> None:
    assert first_cells(section("Metrics")) == list(MEASURES)
    codes = re.findall(r"^\| (\d+) \|", section("Interrupted, resumed, automated"), re.MULTILINE)
    known = (entry.OK, entry.FAILED, entry.MISTAKE, entry.INTERRUPTED)
    assert [int(code) for code in codes] == list(known)


def test_the_tree_is_the_tree() -> None:
    folder, shown = ROOT, set()
    for line in blocks("text", section("Where things are"))[0].splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        folder = folder if line.startswith(" ") else ROOT
        shown |= {(folder / name).relative_to(ROOT).as_posix() for name in names}
        for name in names:
            assert (folder / name).exists(), name
        if not line.startswith(" ") and names[0].endswith("/"):
            folder = ROOT / names[0]
    library = {f"unlearn/{path.name}" for path in (ROOT / "unlearn").iterdir()
               if not path.name.startswith("_") and path.name != "py.typed"}  # fmt: skip
    top = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    ignored = {"README.md", "runs", "build", "dist"}
    assert library <= shown
    assert {name for name in top - ignored if not name.endswith(".egg-info")} <= shown


def test_links_lead_somewhere() -> None:
    """Each from the file that it stands in, as a reader's browser takes it."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            there = (page.parent / target.partition("#")[0]).exists()
            assert target.startswith(("https://", "#")) or there, (page.name, target)


def test_python_for_losses_and_metrics_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(blocks("python")[0], names)
    assert names["loss"].isfinite()
    assert capsys.readouterr().out.count("tensor(") == 3


def test_python_for_a_part_of_the_forget_set_runs() -> None:
    names: dict[str, Any] = {}
    exec(blocks("python", (ROOT / "docs" / "selection.md").read_text(encoding="utf-8"))[0], names)
    assert len(names["rows"]) == 20


def test_python_and_yaml_for_detection_work(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "detection.md").read_text(encoding="utf-8")
    exec(blocks("python", text)[0], {})
    assert "'minkpp_0.4': -" in capsys.readouterr().out
    keys = parse_yaml(blocks("yaml", text)[0])
    assert load_detection(None, keys).scores == ("loss", "mink", "minkpp")
    table = text.split("## The scores")[1].split("\n\n(")[0].split("| name |")[1]
    assert first_cells(table) == list(SCORES)


def test_python_for_decisions_runs() -> None:
    names: dict[str, Any] = {}
    exec(blocks("python", (ROOT / "docs" / "calibration.md").read_text(encoding="utf-8"))[0], names)
    assert 0 < names["found"].rows()[0]["p"]["loss"] <= 1


OPTIONAL = {"adapter/", "selection.json", "update.safetensors", "edit-path.svg"}
"""What only some runs have."""


def test_python_for_a_run_runs_and_the_run_folder_is_as_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = blocks("json")[0]
    for name in ("forget", "retain"):
        Path(f"{name}.jsonl").write_text(rows, encoding="utf-8")
    code = blocks("python")[1]
    model = "../shared/models/tofu-tiny-target"
    assert model in code
    names: dict[str, Any] = {}
    exec(code.replace(model, str(demo_folder() / "target")), names)
    assert 0 < names["results"]["metrics"]["after"]["forget_Q_A_Prob"] < 1
    top, *listed = blocks("text", section("What is in a run folder"))[0].splitlines()
    assert top == "runs/r1/"
    places = {line.split()[0] for line in listed}
    written = {path.name + "/" * path.is_dir() for path in Path("runs/from-python").iterdir()}
    assert places == {name for name in written if not name.startswith(".")} | OPTIONAL


def test_the_loss_of_ones_own_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_loss.py").write_text(blocks("python")[2], encoding="utf-8")
    (command,) = [words for words in COMMANDS if any("my_loss" in word for word in words)]
    changes = parse(command)[1]["set_"]
    term = files.load("npo", changes).terms[0]
    assert (term.objective, term.hyper) == ("./my_loss.py:my_loss", {"ceiling": 4.0})


def test_the_worked_example_of_contributing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its function, table row, recipe and test, without touching a file."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    function, imported, row, check, *_ = blocks("python", text)
    table = (ROOT / "unlearn" / "objectives" / "__init__.py").read_text(encoding="utf-8")
    table = table.replace(", wga, tnpo, wtnpo, ga_sampled", "")
    for block in (imported, row):
        assert block.count("clipped_ascent") == 1
        without = block.replace("clipped_ascent, ", "").strip().removeprefix("(").removesuffix(",)")
        assert without in table
    names = vars(token) | {"PositiveFloat": PositiveFloat}
    exec(function, names)
    monkeypatch.setitem(OBJECTIVES, "clipped_ascent", Objective(names["clipped_ascent"], "token"))
    assert not OBJECTIVES["clipped_ascent"].uses_reference
    assert find_mistakes(parse_tree(*blocks("yaml", text), "clipped_ascent.yaml")) == []

    def value(name: str, logits: Any, other: Any, labels: Any, **hyper: Any) -> Any:
        return batch_loss(name, Scores.from_logits(logits, labels), **hyper)

    scope: dict[str, Any] = {"torch": torch, "pytest": pytest, "math": math, "value": value}
    exec(check, scope)
    (test,) = [item for name, item in scope.items() if name.startswith("test_")]
    test()


def test_the_worked_benchmark_of_contributing_works(tiny_model: Any, tiny_tokenizer: Any) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    *_, benchmark, check = blocks("python", text)
    scope: dict[str, Any] = {"torch": torch, "__name__": "first_token"}
    exec(benchmark, scope)
    exec(check, scope)
    (test,) = [item for name, item in scope.items() if name.startswith("test_")]
    test(tiny_model, tiny_tokenizer)


def test_every_metric_is_in_the_documentation() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    named = set(first_cells(text.split("## Every metric")[1]))
    assert named - {"forget_truth_ratio", "retain_", "ra_", "wf_"} == set(TOFU_MEASURES)
