"""What a recipe measures: its benchmarks, loaded and checked before any weights are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn.data import Template
from unlearn.errors import UserError
from unlearn.evals.benchmark import Benchmark, Progress, Result
from unlearn.evals.detection.familiarity import Familiarity
from unlearn.evals.forget_retain import ForgetRetain, Split
from unlearn.evals.posttraining import PostTraining
from unlearn.evals.reasoning.benchmark import MathProblems
from unlearn.evals.reasoning.options import INSTRUCTION, MathOptions
from unlearn.evals.retain_kl import RetainKl
from unlearn.evals.statistics import RetainSide
from unlearn.evals.tofu.benchmark import Tofu, TofuOptions
from unlearn.evals.tofu.compare import (
    check_rows,
    compare_with_retain,
    open_unlearning_aggregate,
)
from unlearn.evals.tofu.logs import read_retain_logs, retain_side
from unlearn.recipes.measuring import HarnessSection
from unlearn.recipes.schema import Recipe


@dataclass(frozen=True)
class Measures:
    """The benchmarks of a recipe; ``logs`` stands for a retain model that is not evaluated here."""

    benchmarks: tuple[Benchmark, ...]
    logs: RetainSide | None = None

    def run(
        self,
        model: Any,
        tokenizer: Any,
        *,
        progress: Progress,
        retain: Result | None = None,
        target: Mapping[str, float | None] | None = None,
        weights_hash: str | None = None,
    ) -> Result:
        """Measure a model.

        ``retain`` is what the same benchmarks found about the retain model, ``target`` the values
        of the model before unlearning. ``weights_hash`` lets results be found again by other runs.
        """
        found = []
        for benchmark in self.benchmarks:
            result = benchmark.run(model, tokenizer, progress=progress, weights_hash=weights_hash)
            if isinstance(benchmark, Tofu):
                result = self._compared(result, retain)
                result = open_unlearning_aggregate(result, target) if target else result
            found.append(result)
        return Result.joined(found)

    def as_retain_model(self, result: Result) -> Result:
        """Add what the retain model scores in comparison with itself."""
        has_tofu = any(isinstance(benchmark, Tofu) for benchmark in self.benchmarks)
        return compare_with_retain(result, retain_side(result)) if has_tofu else result

    def _compared(self, result: Result, retain: Result | None) -> Result:
        side = retain_side(retain) if retain else self.logs
        return compare_with_retain(result, side, retain) if side else result


def find_measures(
    recipe: Recipe,
    splits: Mapping[str, Split],
    template: Template,
    *,
    offline: bool,
    load_start: Callable[[], Any],
) -> Measures:
    """Load the data of every benchmark that the recipe asks for.

    ``load_start`` gives the model before unlearning, to the benchmark that compares with it.

    Raises:
        UserError: a dataset, a task or a log is missing or wrong.
    """
    evals = recipe.evals
    more = (
        *_distance(recipe, splits, load_start),
        *_harness(evals.lm_eval, offline),
        *_familiarity(recipe, offline),
        *_math(recipe, offline),
    )
    if recipe.posttrains:
        return Measures((_post_training(recipe, splits), *more))
    if evals.tofu is None:
        return Measures((_plain(recipe, splits), *more))
    tofu = Tofu.load(_tofu_options(recipe), offline=offline)
    tofu.prepare(template.tokenizer)
    return Measures((tofu, *more), _logs(recipe, tofu))


def _distance(
    recipe: Recipe, splits: Mapping[str, Split], load_start: Callable[[], Any]
) -> tuple[Benchmark, ...]:
    evals = recipe.evals
    if not evals.retain_kl:
        return ()
    return (RetainKl(splits["retain"], load_start, evals.max_rows, evals.batch_tokens),)


def _familiarity(recipe: Recipe, offline: bool) -> tuple[Benchmark, ...]:
    section, forget = recipe.evals.familiarity, recipe.data.forget
    if section is None or forget is None:
        return ()
    found = Familiarity.load(
        forget,
        section.holdout,
        text_field=section.text_field,
        rows_per_cluster=section.rows_per_cluster,
        max_rows=recipe.evals.max_rows,
        offline=offline,
        seed=recipe.seed,
    )
    return (found,)


def _math(recipe: Recipe, offline: bool) -> tuple[Benchmark, ...]:
    section, data = recipe.evals.math, recipe.data
    if section is None:
        return ()
    told = section.model_dump(exclude={"data", "max_rows", "instruction"})
    options = MathOptions(
        **told,
        instruction=INSTRUCTION if section.instruction is None else section.instruction,
        template=data.template,
        system_prompt=data.system_prompt,
        template_args=dict(data.template_args),
        seed=recipe.seed,
    )
    found = MathProblems.load(section.data, options, max_rows=section.max_rows, offline=offline)
    return (found,)


def _plain(recipe: Recipe, splits: Mapping[str, Split]) -> ForgetRetain:
    evals = recipe.evals
    return ForgetRetain(
        **splits,
        max_rows=evals.max_rows,
        generate=evals.generate,
        max_new_tokens=evals.max_new_tokens,
        batch_tokens=evals.batch_tokens,
    )


def _post_training(recipe: Recipe, splits: Mapping[str, Split]) -> PostTraining:
    """Measure all that the recipe names; text that stands for chosen answers is measured once."""
    evals = recipe.evals
    own = {name: one for name, one in splits.items() if name != "text" or recipe.data.text}
    return PostTraining(
        own,
        max_rows=evals.max_rows,
        generate=evals.generate,
        max_new_tokens=evals.max_new_tokens,
        batch_tokens=evals.batch_tokens,
    )


def _tofu_options(recipe: Recipe) -> TofuOptions:
    section, evals, data = recipe.evals.tofu, recipe.evals, recipe.data
    assert section is not None
    return TofuOptions(
        **section.model_dump(exclude={"retain_logs"}),
        max_rows=evals.max_rows,
        generate=evals.generate,
        max_new_tokens=evals.max_new_tokens,
        batch_tokens=evals.batch_tokens,
        template=data.template,
        system_prompt=data.system_prompt,
        template_args=dict(data.template_args),
        seed=recipe.seed,
    )


def _logs(recipe: Recipe, tofu: Tofu) -> RetainSide | None:
    section = recipe.evals.tofu
    if section is None or section.retain_logs is None:
        return None
    if recipe.model.retain_model:
        message = "evals.tofu.retain_logs and model.retain_model are both given"
        raise UserError(message, "give one: the comparison is with one retain model")
    side = read_retain_logs(Path(section.retain_logs), truth_ratio=section.truth_ratio)
    rows, given = len(tofu.blocks["forget"]), tofu.given["forget"]
    check_rows(side, evaluated=rows, given=given, split=section.split)
    return side


@dataclass(frozen=True)
class _Harness:
    """Tasks of lm-eval as one benchmark."""

    measure: Callable[..., Result]
    limit: int | None
    name: str = "lm_eval"
    version: str = "1"

    def run(
        self,
        model: Any,
        tokenizer: Any,
        *,
        progress: Progress = lambda stage, done, total: None,
        weights_hash: str | None = None,
    ) -> Result:
        from unlearn.evals.harness.tasks import HarnessSettings  # noqa: PLC0415

        settings = HarnessSettings(limit=self.limit)
        return self.measure(model, tokenizer, settings, progress=progress)


def _harness(section: HarnessSection | None, offline: bool) -> tuple[Benchmark, ...]:
    if section is None:
        return ()
    # lm-eval takes seconds to import, and only recipes with its tasks need it
    from unlearn.evals.harness.tasks import find_tasks  # noqa: PLC0415
    from unlearn.evals.harness.wmdp import Wmdp  # noqa: PLC0415

    names = section.tasks
    own = all(name == "mmlu" or name.startswith("wmdp") for name in names)
    if section.data or own:
        folder = Path(section.data) if section.data else None
        found = Wmdp.find(",".join(names), data=folder, offline=offline)
        return (_Harness(found.run, section.limit),)
    return (_Harness(find_tasks(names, offline=offline).run, section.limit),)
