"""What is installed: the packages, the wheel, the commands, and how quickly they start."""

import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LINKS = ("cli", "evals", "recipes")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def call(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    words = [str(argument) for argument in arguments]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stderr
    return done


# Declared and real


def test_every_package_is_declared() -> None:
    """A forgotten folder would be missing from the wheel; the search follows the links."""
    from setuptools import find_packages

    declared = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(declared) == sorted(find_packages(str(ROOT), include=["unlearn*"]))


def test_every_direct_dependency_is_pinned() -> None:
    project = PROJECT["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[^\w.-]", one, maxsplit=1)[0].lower().replace("_", "-") for one in needed}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert names <= pins
    assert "torch==2.13.0" in lines


def test_versions_agree() -> None:
    import unlearn

    assert unlearn.__version__ == PROJECT["project"]["version"]


# The wheel


def wheel_of(source: Path, out: Path) -> Path:
    quiet = ("-q", "--disable-pip-version-check", "--no-deps", "--no-build-isolation")
    call(sys.executable, "-m", "pip", "wheel", *quiet, "-w", out, source)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: Any) -> Path:
    """Give a copy of what a wheel is made from, so that building leaves the project alone."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("unlearn", *LINKS):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=skip)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: Any) -> Path:
    return wheel_of(checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: Any) -> Path:
    folder = Path(tmp_path_factory.mktemp("site"))
    quiet = ("-q", "--disable-pip-version-check", "--no-deps", "--no-index")
    call(sys.executable, "-m", "pip", "install", *quiet, "--target", folder, wheel)
    return folder


def contents(path: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(path).namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_module_and_every_file_it_reads(wheel: Path) -> None:
    found = contents(wheel)
    modules = {
        path.relative_to(ROOT).as_posix()
        for folder in ("unlearn", *(f"unlearn/{name}" for name in LINKS))
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in found if name.endswith(".py")} == modules
    data = {
        path.relative_to(ROOT).as_posix()
        for folder, kinds in (
            ("recipes", ["*.yaml"]),
            ("evals", ["*.j2"]),
            ("jobs", ["*.j2"]),
            ("data/demo", ["*.*"]),
            ("data", ["refusals.txt"]),
            ("detect", ["*.txt"]),
        )
        for kind in kinds
        for path in (ROOT / "unlearn" / folder).rglob(kind)
    }
    named = {"unlearn/recipes/npo.yaml", "unlearn/recipes/tofu-tiny/npo.yaml",
             "unlearn/data/demo/target/model.safetensors",
             "unlearn/evals/report/report.html.j2"}  # fmt: skip
    assert named <= data
    assert {name for name in found if not name.endswith(".py")} == data | {"unlearn/py.typed"}


def test_the_wheel_has_both_commands_and_the_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entries,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    text = archive.read(entries).decode()
    assert "unlearn = unlearn.cli.main:main" in text
    assert "detect-pretraining = unlearn.cli.detect:main" in text
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_the_demo_models_are_small(wheel: Path) -> None:
    sizes = [info.file_size for info in zipfile.ZipFile(wheel).infolist()
             if info.filename.endswith(".safetensors")]  # fmt: skip
    assert len(sizes) == 2
    assert sum(sizes) < 6 * 2**20


def test_a_checkout_without_links_gives_the_same_wheel(
    wheel: Path, checkout: Path, tmp_path: Path
) -> None:
    """A zip or a Windows checkout has small text files where the links are."""
    copy = Path(shutil.copytree(checkout, tmp_path / "flat", symlinks=True))
    for name in LINKS:
        (copy / "unlearn" / name).unlink()
        (copy / "unlearn" / name).write_text(f"../{name}")
    shutil.rmtree(copy / "build", ignore_errors=True)
    assert contents(wheel_of(copy, tmp_path / "wheel")) == contents(wheel)


def outside(installed: Path, *arguments: Any, cwd: Path) -> str:
    """Run the installed package from a folder that is not the checkout, offline."""
    environment = os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    return call(*arguments, cwd=cwd, env=environment).stdout


def test_the_installed_package_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = "import unlearn.recipes.files as module; print(module.__file__)"
    origin = outside(installed, sys.executable, "-c", where, cwd=tmp_path)
    assert origin.strip() == str(installed / "unlearn" / "recipes" / "files.py")
    listed = outside(
        installed, sys.executable, "-m", "unlearn.cli", "recipes", "list", "--json", cwd=tmp_path
    )
    assert {"npo", "grad_ascent", "tofu-tiny/npo"} <= set(re.findall(r'"([\w/-]+)"', listed))


def test_the_installed_commands_run(installed: Path, tmp_path: Path) -> None:
    for name, line in (("unlearn", "quickstart"), ("detect-pretraining", "--model")):
        assert line in outside(installed, installed / "bin" / name, "--help", cwd=tmp_path)


def test_the_installed_demo_is_a_model(installed: Path, tmp_path: Path) -> None:
    code = """
import sys
from unlearn.data.people import demo_folder
from unlearn.detect.run import score_texts
print(demo_folder())
print(score_texts(str(demo_folder() / "target"), ["Where was he born?"])[0]["scores"]["loss"])
"""
    folder, number = outside(installed, sys.executable, "-c", code, cwd=tmp_path).split()
    assert folder == str(installed / "unlearn" / "data" / "demo")
    assert -20 < float(number) < 0


# Starting

HEAVY = {"torch", "transformers", "datasets", "numpy", "pandas", "matplotlib", "scipy", "peft"}
LOADED = """
import json, sys
from unlearn.cli.main import main
sys.argv = ["unlearn", *sys.argv[1:]]
try:
    main()
except SystemExit as leaving:
    assert not leaving.code, leaving.code
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("run", "--help"),
        ("recipes", "list"),
        ("data", "--help"),
        ("detect", "--help"),
        ("detect", "score", "--help"),
        ("sae", "train", "--help"),
    ],
    ids=" ".join,
)
def test_what_needs_no_model_loads_no_library(arguments: tuple[str, ...]) -> None:
    loaded = json.loads(call(sys.executable, "-c", LOADED, *arguments).stdout.splitlines()[-1])
    assert "typer" in loaded
    assert HEAVY.isdisjoint(loaded)


def test_help_is_quick() -> None:
    """Under half a second: the median of five, in processor time, as others may be at work here."""
    command = [str(Path(sys.executable).parent / "unlearn"), "--help"]

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert 0.01 < statistics.median(seconds() for _ in range(5)) < 0.5


# The names of the package


def test_importing_the_package_loads_nothing_installed() -> None:
    code = """
import sys
before = set(sys.modules)
import unlearn
new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert new == {"unlearn"}, new
assert {"run", "Scores"} <= set(dir(unlearn))
"""
    call(sys.executable, "-c", code)


def test_the_public_names_are_the_real_ones() -> None:
    import unlearn
    from unlearn.objectives import batch_loss
    from unlearn.recipes.files import load
    from unlearn.recipes.run import run
    from unlearn.scores import Scorer, Scores

    real = {"Scorer": Scorer, "Scores": Scores, "batch_loss": batch_loss,
            "load_recipe": load, "run": run}  # fmt: skip
    assert {name: getattr(unlearn, name) for name in unlearn.__all__} == real
    with pytest.raises(AttributeError, match="'unlearn' has no attribute 'Score'"):
        unlearn.Score  # noqa: B018
