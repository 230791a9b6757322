"""Problems, samples, verdicts and what they come to."""

import json
import math
import threading
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evals.math_server import Served, serving
from unlearn.errors import RunFailed, UserError
from unlearn.evals.generate import Sampling
from unlearn.evals.reasoning.benchmark import MathProblems
from unlearn.evals.reasoning.completions import Completion, Kept, kept
from unlearn.evals.reasoning.endpoint import Endpoint
from unlearn.evals.reasoning.options import MathOptions
from unlearn.evals.reasoning.pass_at_k import curve, pass_at_k, pass_metrics, sampling_error
from unlearn.evals.reasoning.problems import boxed, chat_prompts, load_problems, local_prompts
from unlearn.evals.reasoning.sampling import Numbers, sample
from unlearn.evals.reasoning.verify import Exact, MathVerify, judging

TOY = MathOptions(n=3, verify="exact", max_new_tokens=12, instruction="")
SETTINGS = {"seed": 0}


def write(folder: Path, rows: list[Any]) -> str:
    file = folder / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def sums(folder: Path, count: int = 3) -> str:
    rows = [{"problem": f"What is {a} + {2 * a}?", "answer": 3 * a} for a in range(1, count + 1)]
    return write(folder, rows)


@pytest.fixture
def toy(tmp_path: Path) -> MathProblems:
    return MathProblems.load(sums(tmp_path), TOY)


# What verdicts come to


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n: int) -> None:
    """All ways to draw k of n samples, counted."""
    for correct in range(n + 1):
        samples = [i < correct for i in range(n)]
        for k in range(1, n + 1):
            draws = list(combinations(samples, k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_of_many_samples_stays_a_probability() -> None:
    assert pass_at_k(10_000, 3, 5_000) == pytest.approx(1 - 0.5**3, abs=1e-3)
    with pytest.raises(ValueError, match="pass@3 with 0 of 2"):
        pass_at_k(2, 0, 3)


def test_figures_by_hand() -> None:
    """Two problems, two samples: 1 and 1 right, then 1 and 0.

    The samples score 2/2 and 1/2: mean 3/4, deviation sqrt(2 (1/4)^2 / 1) = 0.3536, over sqrt(2)
    0.25. The problems score 1 and 1/2: standard error 0.3536 / sqrt(2) = 0.25. pass@2 is 1.
    """
    verdicts = [[True, True], [True, False]]
    assert sampling_error(verdicts) == pytest.approx(0.25)
    found = pass_metrics(verdicts, (1, 2), seed=3)
    one, two = found["math_pass_at_1"], found["math_pass_at_2"]
    assert (one.value, one.standard_error, one.n) == (0.75, pytest.approx(0.25), 2)
    assert (one.low, one.high) == (0.5, 1.0)  # a resample holds either problem alone, or both
    assert (two.value, two.low, two.high) == (1.0, 1.0, 1.0)
    assert curve(verdicts) == [(1, 0.75), (2, 1.0)]
    assert sampling_error([[True], [False]]) is None


def test_the_interval_is_of_problems_and_repeats_with_its_seed() -> None:
    verdicts = [[i % 3 == 0, i % 2 == 0, i < 30] for i in range(60)]
    first, again, other = (
        pass_metrics(verdicts, (1,), seed=seed)["math_pass_at_1"] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first.low is not None
    assert first.high is not None
    assert first.standard_error is not None
    assert first.high - first.low == pytest.approx(2 * 1.96 * first.standard_error, rel=0.1)


# Sampling


def test_the_nucleus_is_the_fewest_tokens_with_that_much_probability() -> None:
    shares = torch.tensor([[0.15, 0.5, 0.05, 0.3]], dtype=torch.float64)

    def kept_of(top_p: float, temperature: float = 1.0) -> list[int]:
        found = Sampling(temperature, [], top_p=top_p).probabilities(shares.log())
        return found[0].nonzero().flatten().tolist()

    assert kept_of(0.4) == [1]
    assert kept_of(0.79) == [1, 3]
    assert kept_of(0.81) == [0, 1, 3]
    assert kept_of(0.97) == kept_of(1.0) == [0, 1, 2, 3]
    # at temperature 2 the square roots count: 0.21, 0.38, 0.12, 0.29
    assert kept_of(0.81, 2.0) == [0, 1, 3]
    assert kept_of(0.6, 2.0) == [1, 3]
    assert kept_of(0.6, 1.0) == [1, 3]
    assert kept_of(0.68, 2.0) == [0, 1, 3]


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    """Of 0.5 and 0.3 within the nucleus, 5 in 8 draws over an even grid of numbers."""
    from unlearn.evals.generate import Answer

    grid = [[(i + 0.5) / 800] for i in range(800)]
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(800, -1)
    answers = [Answer([1], 1, frozenset(), place=i) for i in range(800)]
    drawn = Sampling(1.0, grid, top_p=0.79).draw(logits, answers)
    assert drawn.flatten().bincount(minlength=4).tolist() == [0, 500, 0, 300]


def test_numbers_depend_on_seed_problem_and_sample_only() -> None:
    first = Numbers(0, ("a", 0), 600)
    backwards = Numbers(0, ("a", 0), 600)
    assert backwards[599] == first[:][599]
    assert first[:] == backwards[:]
    assert all(0 <= number < 1 for number in first)
    others = [Numbers(1, ("a", 0), 9), Numbers(0, ("b", 0), 9), Numbers(0, ("a", 1), 9)]
    assert len({first[0], *(other[0] for other in others)}) == 4
    with pytest.raises(IndexError):
        first[600]


@pytest.fixture
def lively(tiny_model: Any) -> Any:
    """Make answers differ, and some of them end early."""
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.mul_(3)
        tiny_model.lm_head.weight[2] += 0.25
    return tiny_model.double()


def texts_of(found: Any) -> dict[Any, tuple[str, int | None, bool]]:
    return {one.place: (one.text, one.tokens, one.truncated) for group in found for one in group}


def test_a_sample_does_not_depend_on_batch_order_or_company(
    lively: Any, tiny_tokenizer: Any, toy: MathProblems
) -> None:
    prompts = toy.by_id(local_prompts(toy.problems, tiny_tokenizer, TOY))
    places = Kept().missing(toy.problems, TOY.n)

    def written(places: list[Any], size: int, seed: int = 0) -> dict[Any, Any]:
        options = replace(TOY, batch_size=size, seed=seed)
        return texts_of(sample(lively, tiny_tokenizer, prompts, places, options))

    alone = written(places, 1)
    assert len(alone) == 9
    assert len({text for text, _, _ in alone.values()}) > 5
    assert len({cut for _, _, cut in alone.values()}) == 2  # some end, some are cut
    assert written(places, 4) == written(places[::-1], 9) == alone
    assert written(places[4:6], 2) == {place: alone[place] for place in places[4:6]}
    assert written(places, 4, seed=1) != alone


def test_cut_is_what_has_no_end_token(lively: Any, tiny_tokenizer: Any, toy: MathProblems) -> None:
    prompts = toy.by_id(local_prompts(toy.problems, tiny_tokenizer, TOY))
    places = Kept().missing(toy.problems, TOY.n)
    short = texts_of(
        sample(lively, tiny_tokenizer, prompts, places, replace(TOY, max_new_tokens=4))
    )
    long = texts_of(
        sample(lively, tiny_tokenizer, prompts, places, replace(TOY, max_new_tokens=60))
    )
    for place in places:
        (text, tokens, cut), (whole, length, _) = short[place], long[place]
        assert length is not None
        assert (tokens, cut) == (min(length, 4), length > 4)
        assert whole.startswith(text) or "\ufffd" in text  # cut within a character


def test_greedy_needs_no_numbers(lively: Any, tiny_tokenizer: Any, toy: MathProblems) -> None:
    options = replace(TOY, n=1, temperature=0.0)
    first = replace(toy, options=options).run(lively, tiny_tokenizer)
    other = replace(toy, options=replace(options, seed=5)).run(lively, tiny_tokenizer)
    assert [r["generation"] for r in first.records] == [r["generation"] for r in other.records]
    assert "math_sampling_error" not in first.metrics


# Prompts


def test_prompts(tmp_path: Path, build_tiny_tokenizer: Any) -> None:
    problems = load_problems(write(tmp_path, [{"question": "2 + 2?", "answer": "4"}]))
    options = MathOptions(instruction="Box it.", force_prefix="<think>\n")
    chat, plain = build_tiny_tokenizer(), build_tiny_tokenizer(chat=False)

    def prompt(tokenizer: Any, **changes: Any) -> str:
        found = local_prompts(problems, tokenizer, replace(options, **changes))[0]
        assert found.prefix == "<think>\n"
        text: str = tokenizer.decode(found.ids)
        return text

    assert prompt(chat) == "Question: 2 + 2?\n\nBox it.\nAnswer:\n<think>\n"
    assert prompt(plain) == "2 + 2?\n\nBox it.\n<think>\n"
    assert prompt(plain, instruction="") == "2 + 2?\n<think>\n"
    assert prompt(plain, instruction="Solve {problem} now") == "Solve 2 + 2? now\n<think>\n"
    assert prompt(chat, template="Q: {question} A: ") == "Q: 2 + 2?\n\nBox it. A: <think>\n"
    # a template that begins to think by itself is not made to begin twice
    chat.chat_template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}"
    chat.chat_template += "<think>\n{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    assert prompt(chat) == "2 + 2?\n\nBox it.<think>\n"
    turns = chat_prompts(problems, replace(options, system_prompt="Be brief."))[0].messages
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant"]


def test_answers_are_found_in_solutions(tmp_path: Path) -> None:
    rows = [
        {"problem": "a", "solution": "Once \\boxed{1}, then \\boxed{\\frac{1}{2}}."},
        {"question": "b", "answer": "She has 3 + 4.\n#### 1,234"},
        {"prompt": "c", "answer": "x \\in \\{1\\}"},
        {"problem": "a", "answer": 7},
    ]
    found = load_problems(write(tmp_path, rows))
    assert [one.answer for one in found] == ["\\frac{1}{2}", "1,234", "x \\in \\{1\\}", "7"]
    assert len({one.id for one in found}) == 4  # the same text twice is two problems
    again = load_problems(write(tmp_path, rows[2:]))
    assert again[0].id == found[2].id  # an id comes from the text, not from its place


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("\\boxed{3}", "3"),
        ("\\boxed {3} or \\fbox{4}", "4"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{3} and \\boxed{4", "3"),
        ("nothing", None),
        ("\\boxed", None),
    ],
)
def test_boxed(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


# Judges


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("1/2", "so \\boxed{0.5}", True),
        ("1,000", "It is 1000.", True),
        ("3", "\\boxed{\\frac{6}{2}}", True),
        ("-3", "x = -3", True),
        ("yes", "Yes.", True),
        ("x+1", "$\\boxed{x + 1}$", True),
        ("12", "12, hence 13", False),
        ("12", "\\boxed{12} and not 13", True),
        ("x+1", "\\boxed{1+x}", False),
        ("5", "", False),
        ("1e5", "1e999999999", False),
    ],
)
def test_exact(answer: str, text: str, right: bool) -> None:
    assert Exact()(answer, text).correct is right


def library(folder: Path, monkeypatch: Any) -> None:
    """Put a stand-in for math-verify in the way: it may take long, need memory or fall over."""
    package = folder / "math_verify"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import time\n"
        "class LatexExtractionConfig:\n    def __init__(self, **told): pass\n"
        "ExprExtractionConfig = LatexExtractionConfig\n"
        "def parse(text, configs):\n"
        "    if 'long' in text: time.sleep(60)\n"
        "    if 'much' in text: bytearray(2**34)\n"
        "    if 'exit' in text: import os; os._exit(3)\n"
        "    if 'print' in text: print('noise')\n"
        "    return [text, text.split('{')[-1].strip('}')]\n"
        "def verify(true, found): return true[-1] == found[-1]\n"
    )
    (package / "errors.py").write_text("class TimeoutException(BaseException): pass\n")
    told = folder / "math_verify-9.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: math-verify\nVersion: 9\n")
    monkeypatch.syspath_prepend(str(folder))


def test_the_judge_is_stopped_wherever_it_is_called(tmp_path: Path, monkeypatch: Any) -> None:
    library(tmp_path, monkeypatch)
    judge = MathVerify(seconds=2.0)
    assert judge.version == "math-verify 9"
    found: list[Any] = []

    def ask() -> None:
        found.extend(judge("3", text) for text in ("{3}", "long", "{4} print", "much", "{3}"))

    thread = threading.Thread(target=ask)
    begun = time.monotonic()
    thread.start()
    thread.join(30)
    assert time.monotonic() - begun < 30
    assert [one.correct for one in found] == [True, False, False, False, True]
    assert [one.timed_out for one in found] == [False, True, False, False, False]
    assert found[2].extracted == "4} print"
    assert judge("3", "exit").timed_out  # a judge that has died is replaced
    assert judge("3", "{3}").correct
    judge.close()


def test_math_verify_reads_mathematics(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    bomb = f"__import__('os').mknod('{tmp_path}/made')"
    with judging("math") as judge:
        for answer, text, right in (
            ("\\frac{1}{2}", "so it is $\\boxed{0.5}$", True),
            ("x+1", "\\boxed{1 + x}", True),
            ("42", "The answer is 42.", True),
            ("12", "\\boxed{13}", False),
            ("3", f"the answer is {bomb}", False),
            ("3", f"\\boxed{{{bomb}}}", False),
        ):
            assert judge(answer, text).correct is right, text
    assert not (tmp_path / "made").exists()


# Kept on disk


def canned(places: Any, *, stop: int | None = None) -> Any:
    for number, (problem, at) in enumerate(places):
        if number == stop:
            raise KeyboardInterrupt
        yield [Completion(problem, at, f"\\boxed{{{3 * (at + 1)}}}", 5 + at, at == 2)]


def test_a_stop_loses_nothing_and_nothing_is_asked_twice(tmp_path: Path, toy: MathProblems) -> None:
    folder, judge, asked = tmp_path / "out", Exact(), []
    with pytest.raises(KeyboardInterrupt), kept(folder, SETTINGS) as found:
        toy.fill(found, judge, lambda places: canned(places, stop=4))
    with (folder / "completions.jsonl").open("a") as file:
        file.write('{"problem": "torn')

    def rest(places: Any) -> Any:
        asked.extend(places)
        return canned(places)

    with kept(folder, SETTINGS) as found:
        toy.fill(found, judge, rest)
        result = toy.result(found, judge)
    assert len(asked) == 5
    assert len((folder / "completions.jsonl").read_text().splitlines()) == 9
    at_once = Kept()
    toy.fill(at_once, judge, canned)
    assert toy.result(at_once, judge) == result
    # sample j says 3 (j + 1), which is right of problem j: one in three
    assert result.metrics["math_pass_at_1"].value == pytest.approx(1 / 3)
    assert result.metrics["math_pass_at_3"].value == 1
    assert result.metrics["math_sampling_error"].value == 0  # every sample number scores 1/3
    assert result.metrics["math_tokens"].value == 6
    assert result.metrics["math_truncated"].value == pytest.approx(1 / 3)
    assert "3 of 9 completions were cut" in result.settings["notes"][0]


def test_other_settings_and_other_folders_are_refused(tmp_path: Path) -> None:
    with kept(tmp_path / "out", SETTINGS) as found:
        found.add([Completion("a", 0, "x", 1, False)])
        with (
            pytest.raises(UserError, match="is being written by"),
            kept(tmp_path / "out", SETTINGS),
        ):
            pass
    with (
        pytest.raises(UserError, match="samples with seed 0, not 1"),
        kept(tmp_path / "out", {"seed": 1}),
    ):
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="already exists"), kept(tmp_path / "other", SETTINGS):
        pass


# A server


@pytest.fixture
def server() -> Any:
    with serving() as served:
        yield served


def endpoint(server: Served, **changes: Any) -> Endpoint:
    return replace(Endpoint(server.url, "adder", concurrency=3, pause=0.01), **changes)


def test_a_server_is_asked_for_every_sample(server: Served, toy: MathProblems) -> None:
    options = replace(TOY, force_prefix="<think>\n", max_new_tokens=50)
    toy = replace(toy, options=options)
    prompts = toy.by_id(chat_prompts(toy.problems, options))
    server.failures = [503, 429]
    one = endpoint(server, api_key="secret")
    one.check()
    found = Kept()
    toy.fill(found, Exact(), lambda places: one.sample(prompts, places, options))
    table = found.table(toy.problems, 3)
    assert len(server.bodies) == 9
    assert set(server.keys) == {"Bearer secret"}
    assert "secret" not in repr(one)
    body = server.bodies[0]
    assert body["messages"][-1] == {"role": "assistant", "content": "<think>\n"}
    assert body["continue_final_message"] is True
    assert body["add_generation_prompt"] is False
    assert len({body["seed"] for body in server.bodies}) == 9
    seeds = {json.dumps(b["messages"][0]): 0 for b in server.bodies}
    assert len(seeds) == 3
    right = sum(body["seed"] % 2 == 0 for body in server.bodies)
    assert 0 < right < 9
    assert sum(one.correct for row in table for one in row) == right
    assert all(one.text.startswith("<think>\nI add") and one.tokens == 9 for one in table[0])


def test_tokens_go_to_completions(server: Served, toy: MathProblems, tiny_tokenizer: Any) -> None:
    options = replace(TOY, n=1, max_new_tokens=3)
    prompts = toy.by_id(local_prompts(toy.problems, tiny_tokenizer, options))
    server.usage = False
    places = Kept().missing(toy.problems, 1)
    found = [one for group in endpoint(server).sample(prompts, places, options) for one in group]
    assert set(server.paths) == {"/v1/completions"}
    ids = {place[0]: list(prompts[place[0]].ids) for place in places}
    assert sorted(body["prompt"] for body in server.bodies) == sorted(ids.values())
    assert all(one.text == f"{len(ids[one.problem])} tokens" for one in found)
    assert all(one.truncated and one.tokens is None for one in found)
    kept_ = Kept(found={one.place: one for one in found})
    result = replace(toy, options=options).result(kept_, Exact())
    assert "math_tokens" not in result.metrics


def test_reasoning_set_apart_is_put_back(server: Served, toy: MathProblems) -> None:
    server.reasoning = "One and two."
    options = replace(TOY, n=1, max_new_tokens=50, force_prefix="<think>\n")
    prompts = toy.by_id(chat_prompts(toy.problems, options))
    places = Kept().missing(toy.problems, 1)[:1]
    (found,) = next(iter(endpoint(server).sample(prompts, places, options)))
    assert found.text.startswith("<think>\nOne and two.\n</think>\n\nI add, which gives \\boxed{")


def test_a_server_that_does_not_help(server: Served, toy: MathProblems) -> None:
    prompts = toy.by_id(chat_prompts(toy.problems, TOY))
    places = Kept().missing(toy.problems, 1)[:1]

    def ask(**changes: Any) -> None:
        list(endpoint(server, **changes).sample(prompts, places, TOY))

    server.failures = [400]
    with pytest.raises(UserError, match=r"status 400.*no luck"):
        ask()
    server.failures = [500, 500]
    with pytest.raises(RunFailed, match=r"after 2 tries: status 500.*no luck"):
        ask(tries=2)
    with pytest.raises(UserError, match="has no model 'other'") as refused:
        endpoint(server, model="other").check()
    assert refused.value.hint == "one of adder"
    with pytest.raises(UserError, match="nobody answers at"):
        Endpoint("http://127.0.0.1:1/v1", "adder").check()
    with pytest.raises(UserError, match="is no address"):
        Endpoint("localhost:8000", "adder").check()


# Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": (5,)}, "pass@5 of 4 samples"),
        ({"k": (0,)}, "pass@0"),
        ({"temperature": 0.0}, "greedy decoding writes the same text"),
        ({"temperature": math.nan}, "--temperature is nan"),
        ({"top_p": 0.0}, "--top-p is 0.0"),
        ({"n": 0}, "--n is 0"),
        ({"verify": "maths"}, "unknown --verify 'maths'; did you mean 'math'?"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        MathOptions(**changes).check()
    assert message in refused.value.message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": "a"}, "row 1 of .* has no answer to compare with"),
        ({"problem": "a", "answer": " "}, "has no answer"),
        ({"problem": "a", "answer": True}, "has no answer"),
        ({"answer": "3"}, "has no problem"),
        ({"problem": 3, "answer": "3"}, r"has no problem, only a number \(3\)"),
        ({"problem": "a", "solution": "It is 3."}, r"has no \\boxed\{\}"),
    ],
)
def test_rows_that_cannot_be(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_problems(write(tmp_path, [row]))


def test_a_true_answer_that_no_judge_can_find_is_told(tmp_path: Path) -> None:
    toy = MathProblems.load(
        write(tmp_path, [{"problem": "a", "answer": "$"}, {"problem": "b", "answer": "4"}]),
        replace(TOY, n=1),
    )
    found = Kept()
    toy.fill(found, Exact(), canned)
    assert any("rows 1)" in note for note in toy.result(found, Exact()).settings["notes"])
