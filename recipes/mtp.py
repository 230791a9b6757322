"""Mask predictors from models and texts named by their places: ``unlearn run mtp``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator

from unlearn.errors import UserError, did_you_mean, unknown
from unlearn.recipes.section import Section
from unlearn.recipes.sections import LaunchSection
from unlearn.recipes.yaml_text import parse, parse_tree, to_text

METHOD = "mtp"
SECTIONS = ("model", "data", "mtp", "launch")
RECIPE, MODEL = "recipe.yaml", "model"
OURS = {RECIPE, MODEL}
"""What a run writes beside what :mod:`unlearn.recipes.training_folder` names."""
TEXTS = ("data.template", "data.system_prompt")
"""Keys that are text as it stands, with \\n for a new line: YAML would read its colons."""
KEYS = "the keys are method, model, data, mtp, launch and out"
Emit = Callable[[dict[str, Any]], None]


class MtpModel(Section):
    """The frozen model, and how it is loaded."""

    path: str | None = Field(default=None, min_length=1)
    """Folder or hub name. Required to run."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the weights; auto is bfloat16 on CUDA and float32 elsewhere."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    quantize: Literal["nf4"] | None = None
    """Load the frozen weights in 4 bits."""


class MtpData(Section):
    """The texts that are learnt from, and how a row becomes text."""

    train: str | None = Field(default=None, min_length=1)
    """FILE or FOLDER or hub dataset, then #CONFIG and :SPLIT. Required to run."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Standard name -> column in the file."""
    template: str | None = None
    """Prompt text with {question}; the answer follows directly. null: the chat template."""
    system_prompt: str | None = None
    """System message put before every prompt."""


class MtpRecipe(Section):
    """One training of a mask predictor: ``mtp`` holds the settings of unlearn.mtp.settings."""

    method: Literal["mtp"] = "mtp"
    model: MtpModel = MtpModel()
    data: MtpData = MtpData()
    mtp: dict[str, Any] = Field(default_factory=dict)
    """See docs/mtp.md; what is not given is as by default."""
    launch: LaunchSection = LaunchSection()
    out: str | None = None
    """New folder for the run. Required to run."""

    @field_validator("launch")
    @classmethod
    def _whole_model_each(cls, launch: LaunchSection) -> LaunchSection:
        if launch.chosen not in ("none", "ddp"):
            message = (
                f"engine {launch.chosen} given, but every process holds the whole frozen model"
            )
            raise ValueError(f"{message}: use ddp, or leave it out")
        return launch

    @property
    def settings(self) -> Any:
        """Give the settings with their defaults filled in.

        Raises:
            UserError: every mistake at once.
        """
        from unlearn.mtp.settings import TrainSettings  # noqa: PLC0415 - only where they are used

        known, mistakes = TrainSettings.__dataclass_fields__, []
        for key in self.mtp:
            if key not in known:
                mistakes.append(f"unknown setting 'mtp.{key}'{did_you_mean(key, known)}")
        given = {key: value for key, value in self.mtp.items() if key in known}
        try:
            found = TypeAdapter(TrainSettings).validate_python(given, strict=False)
        except ValidationError as error:
            for one in error.errors():
                cause = one.get("ctx", {}).get("error", one["msg"])
                mistakes.append(
                    f"mtp.{'.'.join(map(str, one['loc']))} is {one['input']!r}: {cause}"
                )
        if mistakes:
            raise UserError("; ".join(mistakes), f"the settings are {', '.join(known)}")
        return found

    def require_runnable(self) -> None:
        """Refuse a recipe that does not say what is trained on what or where to, or by too many.

        Raises:
            UserError: names the options.
        """
        given = {"--model": self.model.path, "--data": self.data.train, "--out": self.out}
        missing = [option for option, value in given.items() if not value]
        if missing:
            raise UserError(f"{' and '.join(missing)} not given", "unlearn run mtp needs all three")
        from unlearn.mtp.settings import require_share  # noqa: PLC0415 - only where it is used

        require_share(self.settings, self.launch.processes)


def require_no_run(path: str) -> None:
    """Refuse the folder of a run where the model or predictor in it is meant.

    Raises:
        UserError: names the folder that is meant.
    """
    inner = Path(path).expanduser() / MODEL
    if (Path(path).expanduser() / RECIPE).is_file() and inner.is_dir():
        raise UserError(f"'{path}' is the folder of a run", f"give what it made: {inner}")


def is_mtp(method: str) -> bool:
    """Tell whether a method's name, or a recipe file, is of this kind."""
    if method == METHOD:
        return True
    path = Path(method).expanduser()
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return False
    try:
        return parse_tree(path.read_text(encoding="utf-8"), str(path)).get("method") == METHOD
    except (OSError, UnicodeDecodeError, UserError):
        return False


def load_mtp(
    method: str, preset: str | None, changes: Mapping[str, Any], overrides: list[str]
) -> MtpRecipe:
    """Give the checked recipe: of a file or a preset's settings, with changes on top.

    ``preset``: a name of unlearn.mtp.settings.PRESETS, or a recipe file. ``overrides`` are
    ``KEY=VALUE`` texts; a key without a dot is one of ``mtp``.

    Raises:
        UserError: whatever is wrong.
    """
    tree = _tree(method, preset)
    for section, values in changes.items():
        if isinstance(values, Mapping):
            tree[section] = {**(tree.get(section) or {}), **values}
        else:
            tree[section] = values
    for text in overrides:
        _set(tree, text)
    try:
        recipe = MtpRecipe.model_validate(tree)
    except ValidationError as error:
        told = (
            f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}"
            for one in error.errors()
        )
        raise UserError("; ".join(told), KEYS) from error
    _ = recipe.settings
    return recipe


def _tree(method: str, preset: str | None) -> dict[str, Any]:
    from unlearn.mtp.settings import PRESETS  # noqa: PLC0415 - only where they are used

    if method != METHOD:
        return dict(parse_tree(Path(method).expanduser().read_text(encoding="utf-8"), method))
    if preset in PRESETS:
        return {"mtp": dict(PRESETS[preset])}
    if preset is None:
        return {}
    if not is_mtp(preset):
        raise unknown("preset of mtp", preset, PRESETS)
    return _tree(preset, None)


def _set(tree: dict[str, Any], text: str) -> None:
    key, mark, value = text.partition("=")
    section, dot, name = key.strip().partition(".")
    if not mark or not key.strip() or (dot and section not in SECTIONS):
        raise UserError(
            f"--set {text}: write KEY=VALUE", "KEY is a setting, model.KEY, data.KEY or launch.KEY"
        )
    place = tree.setdefault(section if dot else "mtp", {})
    try:
        place[name if dot else section] = _text(value) if key.strip() in TEXTS else parse(value)
    except ValueError as error:
        raise UserError(f"--set {text}: the value is not valid YAML: {error}") from None


def _text(value: str) -> Any:
    if value.strip() == "null" or value.strip()[:1] in ("'", '"'):
        return parse(value)
    return value.replace("\\n", "\n")


def dump(recipe: MtpRecipe) -> str:
    """Write a recipe with all its values as YAML; it opens with the command that repeats it."""
    from dataclasses import asdict  # noqa: PLC0415

    tree = recipe.model_dump(mode="json") | {"mtp": asdict(recipe.settings)}
    return f"# unlearn run {recipe.out}/{RECIPE} --out {recipe.out}-again\n{to_text(tree)}"
