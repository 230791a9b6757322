"""The benchmark: problems, samples, verdicts, and what they come to."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from unlearn.evals.benchmark import Metric, Progress, Record, Result
from unlearn.evals.reasoning.completions import Completion, Kept, Place
from unlearn.evals.reasoning.options import MathOptions
from unlearn.evals.reasoning.pass_at_k import curve, pass_metrics, sampling_error
from unlearn.evals.reasoning.problems import (
    Problem,
    Prompt,
    fingerprint,
    load_problems,
    local_prompts,
)
from unlearn.evals.reasoning.sampling import sample
from unlearn.evals.reasoning.verify import Judge, check_judge, judging
from unlearn.evals.statistics import mean_with_interval

Tell = Callable[[int, int], None]
Ask = Callable[[Sequence[Place]], Iterable[list[Completion]]]
VERSION = "1"


@dataclass(frozen=True)
class MathProblems:
    """Problems put to a model several times, each answer judged.

    ``math_pass_at_K``: the chance that K samples hold a right one (:func:`pass_at_k`).
    ``math_sampling_error``: standard error of pass@1 over samples. ``math_tokens``: mean length of
    a completion, end token counted, and ``math_truncated``: the share without an end after
    ``max_new_tokens``. Means over problems, each with all its samples.
    """

    problems: Sequence[Problem]
    options: MathOptions
    source: str = ""

    name = "math"
    version = VERSION

    @classmethod
    def load(
        cls,
        source: str,
        options: MathOptions,
        *,
        max_rows: int | None = None,
        offline: bool = False,
    ) -> "MathProblems":
        """Check the settings and read the problems.

        Raises:
            UserError: whatever is wrong with settings, data or judge.
        """
        options.check()
        check_judge(options.verify)
        problems = load_problems(source, max_rows=max_rows, offline=offline)
        return cls(problems, options, source)

    def run(
        self,
        model: Any,
        tokenizer: Any,
        *,
        progress: Progress = lambda stage, done, total: None,
        weights_hash: str | None = None,
    ) -> Result:
        """Evaluate a model in memory; nothing is kept on disk."""
        prompts = self.by_id(local_prompts(self.problems, tokenizer, self.options))
        kept = Kept()
        with judging(self.options.verify) as judge:
            self.fill(
                kept,
                judge,
                lambda places: sample(model, tokenizer, prompts, places, self.options),
                tell=lambda done, total: progress("answering", done, total),
            )
            return self.result(kept, judge)

    def by_id(self, prompts: Sequence[Prompt]) -> dict[str, Prompt]:
        """Give the prompts by their problem's id."""
        return {p.id: prompt for p, prompt in zip(self.problems, prompts, strict=True)}

    def fill(
        self, kept: Kept, judge: Judge, ask: Ask, *, tell: Tell = lambda done, total: None
    ) -> None:
        """Have the samples that are missing written, judge and keep them."""
        missing = kept.missing(self.problems, self.options.n)
        total = len(self.problems) * self.options.n
        answers = {problem.id: problem.answer for problem in self.problems}
        done = total - len(missing)
        tell(done, total)
        for group in ask(missing) if missing else ():
            kept.add([_judged(one, answers[one.problem], judge) for one in group])
            done += len(group)
            tell(done, total)

    def result(self, kept: Kept, judge: Judge) -> Result:
        """Sum up; a record per problem holds all of its samples."""
        table = kept.table(self.problems, self.options.n)
        verdicts = [[one.correct for one in row] for row in table]
        metrics = pass_metrics(verdicts, self.options.ks, seed=self.options.seed)
        error = sampling_error(verdicts)
        if error is not None:
            metrics["math_sampling_error"] = Metric(error, "none", None, self.options.n)
        metrics |= self._lengths(table)
        records = [_record(p, row) for p, row in zip(self.problems, table, strict=True)]
        return Result(self.name, self.version, metrics, records, self._settings(table, judge))

    def _lengths(self, table: Sequence[Sequence[Completion]]) -> dict[str, Metric]:
        found = {}
        seed = self.options.seed
        counts = [[one.tokens for one in row if one.tokens is not None] for row in table]
        if all(len(row) == self.options.n for row in counts):
            means = [sum(row) / len(row) for row in counts]
            found["math_tokens"] = mean_with_interval(Metric.mean(means, "none"), means, seed=seed)
        shares = [sum(one.truncated for one in row) / len(row) for row in table]
        cut = mean_with_interval(Metric.mean(shares, "lower"), shares, seed=seed)
        return found | {"math_truncated": cut}

    def _settings(self, table: Sequence[Sequence[Completion]], judge: Judge) -> dict[str, Any]:
        every = [one for row in table for one in row]
        verdicts = [[one.correct for one in row] for row in table]
        return self.options.decisive() | {
            "k": list(self.options.ks),
            "data": self.source,
            "data_sha256": fingerprint(self.problems),
            "problems": len(self.problems),
            "judge": judge.version,
            "curve": [list(point) for point in curve(verdicts)],
            "without_answer": sum(one.extracted is None for one in every),
            "timed_out": sum(one.timed_out for one in every),
            "notes": notes(self.problems, every, judge),
        }


def notes(problems: Sequence[Problem], every: Sequence[Completion], judge: Judge) -> list[str]:
    """Say what limits the numbers."""
    found = []
    cut, late = sum(one.truncated for one in every), sum(one.timed_out for one in every)
    if cut > 0.05 * len(every):
        found.append(
            f"{cut} of {len(every)} completions were cut before their end and are judged as they "
            "stand: more tokens (--max-new-tokens) may give other numbers"
        )
    if late:
        found.append(f"the judge did not finish with {late} completions: they count as wrong")
    unreadable = [
        problem.row + 1
        for problem in problems
        if not judge(problem.answer, f"\\boxed{{{problem.answer}}}").correct
    ]
    if unreadable:
        listed = ", ".join(map(str, unreadable[:10])) + (" …" if len(unreadable) > 10 else "")
        found.append(
            f"{len(unreadable)} true answers are not found equal to themselves by the judge, so "
            f"that no completion can be right (rows {listed})"
        )
    return found


def _judged(completion: Completion, answer: str, judge: Judge) -> Completion:
    return replace(completion, **judge(answer, completion.text)._asdict())


def _record(problem: Problem, row: Sequence[Completion]) -> Record:
    """Put a problem's samples together; ``generation`` is the first of them."""
    told = {"split": "math", "row": problem.row, "id": problem.id}
    told |= {"question": problem.text, "answer": problem.answer, "generation": row[0].text}
    samples = [asdict(one) for one in row]
    return told | {"samples": [{k: s[k] for k in s if k != "problem"} for s in samples]}
