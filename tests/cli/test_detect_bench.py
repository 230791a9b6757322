import json
from pathlib import Path
from typing import Any

import pytest


def write(name: str, rows: list[Any]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@pytest.fixture
def labelled(world: Path) -> str:
    seen = [{"text": f"Ada number {n} was born in Oslo, again.", "label": 1} for n in range(25)]
    new = [{"text": f"Bo paints {n} small boats in the morning.", "label": 0} for n in range(25)]
    return write("labelled.jsonl", [*seen, *new])


@pytest.fixture
def texts(world: Path) -> tuple[str, str]:
    suspects = [{"text": f"Ada number {n} was born in Oslo."} for n in range(3)]
    others = [{"text": f"Bo {n} paints small boats in the morning, again."} for n in range(25)]
    return write("suspects.jsonl", suspects), write("others.jsonl", others)


def test_a_benchmark_prints_and_writes(unlearn: Any, labelled: str) -> None:
    call = ("detect", "bench", "--data", labelled, "--model", "model", "--score", "loss",
            "--score", "dcpdd", "--freq", "english", "--out", "bench")  # fmt: skip
    outcome = unlearn(*call, "--json")
    assert outcome.code == 0, outcome.err
    found = outcome.json
    assert set(found["metrics"]) == {"loss", "dcpdd"}
    assert 0 <= found["metrics"]["loss"]["auc"]["value"] <= 1
    assert any("word ranks" in text for text in found["checks"]["warnings"])
    assert {path.name for path in Path("bench").iterdir()} == {
        "bench.json", "bench.md", "roc.svg", "scores.jsonl"
    }  # fmt: skip
    assert unlearn(*call).code == 2  # the folder is there
    people = unlearn(*call[:-2], "--max-words", "5")
    assert "dcpdd is left out" in unlearn(*call[:6]).err
    assert "25 members, 25 non-members" in people.out
    assert "too few texts to check" in " ".join(people.out.split())


def test_an_audit_of_two_sources(unlearn: Any, texts: tuple[str, str]) -> None:
    forget, holdout = texts
    call = ("detect", "audit", "--model", "model", "--against", "model", "--forget", forget,
            "--holdout", holdout, "--score", "mink", "--out", "audit")  # fmt: skip
    found = unlearn(*call, "--json").json
    assert set(found["scores"]) == {"mink", "mink_0.4"}
    for one in found["scores"].values():
        assert one["change"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert Path("audit/audit.md").is_file()
    people = unlearn(*call[:-2])
    assert "PrivLeak" in people.out


def test_decisions_and_their_exit_codes(unlearn: Any, texts: tuple[str, str]) -> None:
    suspects, others = texts
    call = ("detect", "decide", suspects, "--model", "model", "--nonmembers", others)
    outcome = unlearn(*call, "--json", "--dataset-test", "--primary", "loss")
    assert outcome.code == 4  # three suspects are too few for a test of the set
    outcome = unlearn(*call, "--json", "--primary", "loss", "--members", others)
    assert outcome.code == 0, outcome.err
    first = outcome.json["items"][0]
    assert set(first) >= {"id", "n_tokens", "scores", "p", "q", "references", "decision", "words"}
    assert outcome.json["primary"] == "loss"
    assert outcome.json["limits"]
    assert outcome.json["known_members"]["n"] == 10  # the others have too few of their length
    refused = unlearn(*call, "--fpr", "0.01")
    assert refused.code == 4
    assert "need at least 99 reference texts" in refused.err
    own = ("detect", "decide", others, *call[3:])  # some of them score above others
    generous = unlearn(*own, "--fpr", "0.9", "--fail-on-member", "--json")
    assert generous.code == 3
    assert any(item["decision"] == "member" for item in generous.json["items"])
    assert unlearn(*call[:-2]).code == 2  # neither references nor a threshold
    for wrong, words in (("--primary", "minkp"), ("--fdr", "5"), ("--fpr", "0")):
        early = unlearn(*call, wrong, words)
        assert early.code == 2
        assert "loading" not in early.err  # said before the model is loaded


def test_a_threshold_is_fitted_used_and_refused_elsewhere(
    unlearn: Any, labelled: str, texts: tuple[str, str], build_tiny_model: Any
) -> None:
    fit = ("detect", "calibrate", labelled, "--model", "model", "--score", "mink", "--k", "0.3")
    out = unlearn(*fit, "--out", "c.json").out
    assert "Of non-members like these 25" in out
    assert "too few texts to check for a shift" in out
    use = ("detect", "decide", texts[0], "--model", "model", "--calibration", "c.json", "--json")
    outcome = unlearn(*use)
    assert outcome.code == 0, outcome.err
    value = json.loads(Path("c.json").read_text())["threshold"]["value"]
    for item in outcome.json["items"]:
        assert item["decision"] == ("member" if item["scores"]["mink"] > value else "not_detected")
    build_tiny_model(seed=1).save_pretrained("model")
    refused = unlearn(*use)
    assert refused.code == 4
    assert "fitted for model" in refused.json["error"]["message"]
    assert unlearn(*use, "--force").code == 0
    assert "already exists" in unlearn(*fit, "--out", "c.json").err
    assert unlearn(*fit, "--out", "d.json", "--fpr", "0.1", "--youden").code == 2
    assert unlearn(*fit, "--out", "d.json", "--youden").code == 0
    assert unlearn(*fit, "--out", "e.json", "--tpr", "0.9").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data", "wikimai"), "did you mean 'wikimia'"),
        (("--data", "labelled.jsonl", "--members", "x"), "give the texts once"),
        (("--members", "labelled.jsonl"), "only one side"),
        (("--data", "labelled.jsonl", "--score", "dcpdd"), "needs a token frequency table"),
        (("--data", "labelled.jsonl", "--score", "minkp"), "did you mean"),
        (("--data", "labelled.jsonl", "--freq", "nowhere"), "no frequency table"),
        ((), "give the texts once"),
    ],
)
def test_mistakes(unlearn: Any, labelled: str, arguments: tuple[str, ...], words: str) -> None:
    outcome = unlearn("detect", "bench", "--model", "model", *arguments)
    assert outcome.code == 2
    assert words in " ".join(outcome.err.split())


def test_options_as_keys_of_a_file(unlearn: Any, labelled: str) -> None:
    """What is typed comes before the file; lists, flags and arguments have their keys too."""
    Path("bench.yaml").write_text(
        f"model: model\ndata: {labelled}\nscore: [loss, mink]\nmax_tokens: 20\nk: [0.3]\n"
    )
    outcome = unlearn("detect", "bench", "--recipe", "bench.yaml", "--max-tokens", "30", "--json")
    assert outcome.code == 0, outcome.err
    assert set(outcome.json["metrics"]) == {"loss", "mink"}
    assert outcome.json["settings"]["max_tokens"] == 30
    assert outcome.json["settings"]["k"] == [0.3]
    Path("fit.yaml").write_text(f"data: {labelled}\nmodel: model\nout: c.json\nyouden: true\n")
    outcome = unlearn("detect", "calibrate", "--recipe", "fit.yaml", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["calibration"]["threshold"]["rule"] == "youden"
    Path("fit.yaml").write_text("score: [mink]\n")
    outcome = unlearn("detect", "calibrate", "--recipe", "fit.yaml")
    assert "score is one value, not" in outcome.err
    Path("bench.yaml").write_text("modell: model\n")
    assert "did you mean 'model'" in unlearn("detect", "bench", "--recipe", "bench.yaml").err
    assert unlearn("detect", "bench", "--recipe", "none.yaml").code == 2


def test_scores_are_kept_and_gone_on_with(unlearn: Any, labelled: str, monkeypatch: Any) -> None:
    """Stopped after the first block, only the other texts are scored; then none."""
    from unlearn.detect.engine import TextScorer

    call = ("detect", "bench", "--data", labelled, "--model", "model", "--score", "loss", "--json",
            "--batch-tokens", "16")  # fmt: skip
    score, sizes = TextScorer._score, []

    def counting(self: Any, texts: Any) -> Any:
        if len(sizes) == stop:
            raise KeyboardInterrupt
        sizes.append(len(texts))
        return score(self, texts)

    monkeypatch.setattr(TextScorer, "_score", counting)
    stop = 1
    assert unlearn(*call).code != 0
    (first,) = sizes
    assert first < 50
    stop = -1
    found = unlearn(*call).json
    assert sum(sizes) == 50
    assert unlearn(*call).json == found
    assert sum(sizes) == 50
