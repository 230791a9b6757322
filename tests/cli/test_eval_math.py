"""``unlearn eval math`` from the command line, pairs of its samples, and its place in a run."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import settings, write_rows
from tests.evals.math_server import serving
from unlearn.evals.reasoning.options import MathOptions

LOCAL = ("eval", "math", "--model", "model", "--data", "sums.jsonl", "--verify", "exact")
FEW = ("--n", 2, "--max-new-tokens", 5)


@pytest.fixture
def problems(world: Path) -> Path:
    rows = [{"problem": f"What is {a} + {2 * a}?", "answer": 3 * a} for a in range(1, 7)]
    write_rows(world / "sums.jsonl", rows)
    return world


@pytest.fixture
def server() -> Any:
    with serving() as served:
        yield served


def refused(outcome: Any, *words: str) -> None:
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err


def test_a_model_here(problems: Path, unlearn: Callable[..., Any]) -> None:
    done = unlearn(*LOCAL, *FEW, "--force-prefix", "<think>\\n", "--out", "m", "--json")
    assert done.code == 0, done.err
    found = done.json
    assert list(found["metrics"]) == [
        "math_pass_at_1", "math_pass_at_2", "math_sampling_error", "math_tokens", "math_truncated",
    ]  # fmt: skip
    assert found["settings"]["force_prefix"] == "<think>\n"
    samples = [json.loads(line) for line in Path("m/completions.jsonl").read_text().splitlines()]
    assert len(samples) == 12
    assert all(one["text"].startswith("<think>") for one in samples)
    stored = json.loads(Path("m/results.json").read_text())
    assert stored["metrics"]["after"] == found["metrics"]
    page = Path("m/report.html").read_text()
    assert "pass@1 is" in page
    assert "<svg" in page
    assert "What is 1 + 2?" in page
    before = Path("m/completions.jsonl").read_bytes()
    again = unlearn(*LOCAL, *FEW, "--force-prefix", "<think>\\n", "--out", "m", "--k", "1",
                    "--batch-size", 1)  # fmt: skip
    assert again.code == 0, again.err
    assert "pass@1" in again.out
    assert "pass@2" not in again.out
    assert Path("m/completions.jsonl").read_bytes() == before  # nothing was written again
    other = unlearn(*LOCAL, *FEW, "--out", "m", "--seed", 1)
    refused(other, "samples with", "choose another --out")
    assert unlearn("report", "m").code == 0
    assert "Post-training report" in Path("m/report.html").read_text()


def test_samples_of_a_server_become_pairs(
    problems: Path, unlearn: Callable[..., Any], server: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    asked = ("eval", "math", "--data", "sums.jsonl", "--verify", "exact", "--n", 6, "--endpoint",
             server.url, "--endpoint-model", "adder")  # fmt: skip
    done = unlearn(*asked, "--out", "m", "--json")
    assert done.code == 0, done.err
    share = sum(body["seed"] % 2 == 0 for body in server.bodies) / 36
    assert done.json["metrics"]["math_pass_at_1"] == pytest.approx(share)
    assert done.json["metrics"]["math_tokens"] == 9
    assert set(server.keys) == {"Bearer secret"}
    assert not any("secret" in file.read_text() for file in Path("m").glob("*.*"))
    made = unlearn("data", "pairs", "m/traces.jsonl", "--verdict", "correct", "--out", "pairs",
                   "--json")  # fmt: skip
    assert made.code == 0, made.err
    pairs = [json.loads(line) for line in Path("pairs/pairs.jsonl").read_text().splitlines()]
    assert pairs
    for pair in pairs:
        one, other = (
            int(word.strip("?")) for word in pair["question"].split() if word[0].isdigit()
        )
        assert f"{{{one + other}}}" in pair["chosen"]
        assert f"{{{one + other + 1}}}" in pair["rejected"]
    # without the bare problem, pairs ask as the model was asked
    traces = [json.loads(line) for line in Path("m/traces.jsonl").read_text().splitlines()]
    write_rows(Path("asked.jsonl"), [{k: row[k] for k in row if k != "problem"} for row in traces])
    made = unlearn("data", "pairs", "asked.jsonl", "--verdict", "correct", "--out", "asked")
    assert made.code == 0, made.err
    sent = {body["messages"][-1]["content"] for body in server.bodies}
    put = [json.loads(line) for line in Path("asked/pairs.jsonl").read_text().splitlines()]
    assert len(put) == len(pairs)
    assert {pair["question"] for pair in put} <= sent
    assert not {pair["question"] for pair in pairs} & sent


def test_a_stop_says_how_to_go_on(
    problems: Path, unlearn: Callable[..., Any], monkeypatch: Any
) -> None:
    from unlearn.evals.reasoning.completions import Kept

    first = Kept.add

    def stop(self: Any, completions: Any) -> None:
        first(self, completions)
        raise KeyboardInterrupt

    monkeypatch.setattr(Kept, "add", stop)
    stopped = unlearn(*LOCAL, *FEW, "--batch-size", 1, "--out", "m")
    assert stopped.code == 75
    assert "the same command goes on" in stopped.err
    assert not Path("m/results.json").exists()
    monkeypatch.undo()
    monkeypatch.chdir(problems)
    done = unlearn(*LOCAL, *FEW, "--out", "m")
    assert done.code == 0, done.err
    assert "answering 0/12" not in done.err


def test_one_line_each(problems: Path, unlearn: Callable[..., Any], monkeypatch: Any) -> None:
    from unlearn.evals.reasoning import verify

    write_rows(problems / "bare.jsonl", [{"problem": "2 + 2?"}])
    (problems / "empty.jsonl").touch()
    data = ("--data", "sums.jsonl")
    url = ("--endpoint", "http://127.0.0.1:1/v1")
    ask = ("eval", "math")
    refused(unlearn(*ask, *data), "no model was given")
    refused(unlearn(*ask, *data, *url), "give --endpoint-model NAME")
    refused(unlearn(*ask, *data, *url, "--endpoint-model", "m", "--offline"), "--offline and")
    refused(unlearn(*ask, *data, "--model", "./none"), "./none")
    refused(unlearn(*LOCAL, "--k", "1,two"), "cannot read --k 1,two")
    refused(unlearn(*LOCAL, "--n", 2, "--k", 4), "pass@4 of 2 samples")
    refused(unlearn(*LOCAL, "--temperature", 0), "give --n 1")
    refused(unlearn(*LOCAL[:-1], "guess"), "guess")
    local = (*ask, "--model", "model", "--verify", "exact")
    refused(unlearn(*local, "--data", "bare.jsonl"), "row 1 of 'bare.jsonl' has no answer")
    refused(unlearn(*local, "--data", "empty.jsonl"), "empty.jsonl")
    refused(unlearn(*LOCAL, "--out", "model"), "already exists")
    monkeypatch.setattr(verify, "find_spec", lambda name: None)
    refused(unlearn(*LOCAL[:-1], "math"), "needs math-verify", "pip install 'unlearn-llm[math]'")


WRONG_FLAGS = """
import sys
from unlearn.cli.main import main
for given in (["--k", "1,4", "--n", "2"], ["--temperature", "0", "--n", "4"], ["--k", "0"],
              ["--top-p", "0"], ["--out", "model"]):
    sys.argv = ["unlearn", "eval", "math", "--model", "model", "--data", "none.jsonl",
                "--verify", "exact", *given]
    try:
        main()
    except SystemExit as end:
        print(end.code)
print([name for name in ("torch", "transformers", "scipy") if name in sys.modules])
"""


def test_options_are_refused_before_slow_imports(problems: Path) -> None:
    """What the options alone decide: five refusals of one process, which never imports torch."""
    asked = subprocess.run(
        [sys.executable, "-c", WRONG_FLAGS], capture_output=True, text=True, check=True
    )
    assert asked.stdout.split("\n")[:-1] == ["2"] * 5 + ["[]"]
    messages = [line for line in asked.stderr.splitlines() if line.startswith("error")]
    words = ("pass@4 of 2 samples", "greedy decoding", "pass@0", "--top-p is 0", "already exists")
    assert len(messages) == len(words)
    for word, message in zip(words, messages, strict=True):
        assert word in message


def test_other_settings_are_refused_before_the_data_is_read(
    problems: Path, unlearn: Callable[..., Any]
) -> None:
    kept = MathOptions(verify="exact", n=2, max_new_tokens=5).decisive()
    (problems / "m").mkdir()
    (problems / "m" / "sampling.json").write_text(json.dumps(kept))
    missing = [part if part != "sums.jsonl" else "none.jsonl" for part in LOCAL]
    refused(unlearn(*missing, *FEW, "--seed", 1, "--out", "m"), "holds samples with seed 0, not 1")
    refused(unlearn(*missing, *FEW, "--out", "m"), "none.jsonl")


def test_a_run_measures_before_and_after(problems: Path, unlearn: Callable[..., Any]) -> None:
    math = "evals.math={data: sums.jsonl, n: 2, verify: exact, max_new_tokens: 4}"
    done = unlearn("run", "sft", "--model", "model", "--set", "data.text=retain.jsonl", "--out",
                   "out", *settings(math), "--json")  # fmt: skip
    assert done.code == 0, done.err
    for who in ("before", "after"):
        assert {"math_pass_at_1", "math_pass_at_2", "math_truncated", "text_loss"} <= set(
            done.json["metrics"][who]
        )
    page = Path("out/report.html").read_text()
    assert "Mathematical problems" in page
    assert "pass@2" in page
    assert "(of mathematical problems the first sample)" in page
    wrong = unlearn("run", "sft", "--model", "model", "--set", "data.text=retain.jsonl", "--out",
                    "no", *settings(math.replace("n: 2", "n: 2, k: [4]")))  # fmt: skip
    refused(wrong, "pass@4 of 2 samples")
