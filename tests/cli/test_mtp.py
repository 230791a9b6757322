"""``unlearn run mtp``, ``generate`` and ``eval mtp``, from the command line."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

SMALL = tuple(
    part
    for text in ("k=2", "rank=3", "steps=6", "batch=4", "anchors=6", "held_out=3", "save_steps=2")
    for part in ("--set", text)
)


@pytest.fixture
def train(world: Path, unlearn: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function that trains a small predictor on the rows to forget."""

    def call(*words: object, out: str = "mtp", data: str = "forget.jsonl") -> Any:
        given = ("--model", "model", "--data", data, "--out", out)
        return unlearn("run", "mtp", *given, *SMALL, *words)

    return call


def test_a_predictor_is_trained_written_with_and_measured(
    train: Callable[..., Any], unlearn: Callable[..., Any]
) -> None:
    done = train("--json")
    assert done.code == 0, done.err
    assert 0 <= done.json["metrics"]["right"] <= 1
    assert "step 6/6" in done.err
    names = sorted(path.name for path in Path("mtp").iterdir())
    assert names == ["events.jsonl", "model", "recipe.yaml", "results.json"]
    asked = ("--prompts", "forget.jsonl:[:2]", "--max-new-tokens", 9, "--json")
    plain = unlearn("generate", "model", *asked).json
    for words in (("model", "--mtp", "mtp/model"), ("mtp/model", "--layout", "linear", "--k", 1)):
        drafted = unlearn("generate", *words, *asked)
        assert drafted.code == 0, drafted.err
        assert drafted.json["rows"] == plain["rows"]
        assert drafted.json["tokens_per_step"] >= 1
    assert plain["tokens_per_step"] is None
    drawn = unlearn("generate", "mtp/model", *asked, "--temperature", 1.5, "--seed", 3)
    again = unlearn("generate", "mtp/model", *asked, "--temperature", 1.5, "--seed", 3)
    assert drawn.json["rows"] == again.json["rows"] != plain["rows"]
    told = unlearn("eval", "mtp", "mtp/model", "--prompts", "born=forget.jsonl:[:2]", "--prompts",
                   "retain.jsonl:[:1]", "--max-new-tokens", 8, "--out", "told")  # fmt: skip
    assert told.code == 0, told.err
    assert "3 texts identical to plain decoding" in told.out
    results = json.loads(Path("told/results.json").read_text())
    assert list(results["domains"]) == ["born", "retain"]
    assert results["all"]["identical"] == len(results["rows"]) == 3
    assert results["drafting"] == {
        "layout": "quadratic", "k": 2, "masks": None, "shortlist": 256,
    }  # fmt: skip
    assert Path("told/acceptance.svg").read_text().startswith("<svg")


def flat(text: str) -> str:
    return " ".join(text.split())


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_recipe_of_a_run_repeats_it(
    train: Callable[..., Any], unlearn: Callable[..., Any]
) -> None:
    assert train("--set", "sampler=none").code == 0
    again = unlearn("run", "mtp/recipe.yaml", "--out", "again")
    assert again.code == 0, again.err
    first, second = (load_file(f"{name}/model/mtp.safetensors") for name in ("mtp", "again"))
    assert set(first) == {"mask_embeddings"}
    assert torch.equal(first["mask_embeddings"], second["mask_embeddings"])


@pytest.mark.parametrize("again", ["resume", "run"])
def test_a_stopped_training_is_saved_and_goes_on_to_the_same_bits(
    again: str,
    train: Callable[..., Any],
    unlearn: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Stopped in step 5, which is finished and saved although only each second would be."""
    from unlearn.mtp.train import Training

    assert train(out="whole").code == 0
    before, count = Training._tell, []

    def stopping(self: Training, told: Any) -> None:
        before(self, told)
        count.append(1)
        if len(count) == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Training, "_tell", stopping)
    stopped = train()
    assert stopped.code == 75
    assert "stopped on request after step 5" in stopped.err
    assert "`unlearn resume mtp` continues it" in stopped.err
    assert not Path("mtp/results.json").exists()
    Path("mtp/error.log").write_text("of a failure before")
    before_it = contents_of(Path("mtp"))
    other = train("--set", "rank=4", "--set", "lr=0.5")
    assert other.code == 2
    assert "interrupted training with rank=3, not 4, lr=0.0002, not 0.5" in flat(other.err)
    assert "`unlearn resume mtp` goes on with it" in flat(other.err)
    more = train(data="retain.jsonl")
    assert "interrupted training with other texts" in flat(more.err)
    assert contents_of(Path("mtp")) == before_it
    here = Path.cwd()
    if again == "resume":
        monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    resumed = unlearn("resume", here / "mtp") if again == "resume" else train()
    monkeypatch.chdir(here)
    assert resumed.code == 0, resumed.err
    assert "going on after step 5" in resumed.err
    assert len(count) == 6
    for name in ("mtp.safetensors", "adapter_model.safetensors"):
        first, second = (load_file(f"{out}/model/{name}") for out in ("whole", "mtp"))
        assert all(torch.equal(first[key], second[key]) for key in first)
    metrics = [json.loads(Path(f"{out}/results.json").read_text()) for out in ("whole", "mtp")]
    assert metrics[0]["metrics"] == metrics[1]["metrics"]
    assert not Path("mtp/training.safetensors").exists()
    finished = unlearn("resume", "mtp", "--json")  # nothing is left to do
    assert finished.json["metrics"] == metrics[1]["metrics"]
    assert "keeps its last state only" in unlearn("resume", "mtp", "--from", "checkpoint-2").err


@pytest.mark.slow
def test_several_processes_are_started_by_the_command(
    train: Callable[..., Any], unlearn: Callable[..., Any]
) -> None:
    """With --nproc 2 the command speaks once, and writes what one process does (but rounding)."""
    assert train(out="alone").code == 0
    done = train("--nproc", 2, out="both")
    assert done.code == 0, done.err
    for name in ("mtp.safetensors", "adapter_model.safetensors"):
        first, second = (load_file(f"{out}/model/{name}") for out in ("alone", "both"))
        for key, one in first.items():
            # Adam divides small gradients by their own size: their rounding is as large
            torch.testing.assert_close(second[key], one, rtol=2e-3, atol=2e-4, msg=key)
    events = [json.loads(line) for line in Path("both/events.jsonl").read_text().splitlines()]
    assert [one["step"] for one in events if one["event"] == "learnt"] == [6]
    assert "nproc: 2" in Path("both/recipe.yaml").read_text()
    finished = train("--nproc", 2, out="both")
    assert finished.code == 2
    assert "'both' holds a finished training" in finished.err


def test_the_papers_choices_are_a_preset() -> None:
    from unlearn.recipes.mtp import load_mtp

    recipe = load_mtp("mtp", "paper", {}, ["steps=7", "model.dtype=bfloat16"])
    how = recipe.settings
    assert (how.k, how.rank, how.sampler, how.steps) == (8, 128, "paper", 7)
    assert (how.sampler_on_ntp, how.train_mask_embeddings) == (True, False)
    assert recipe.model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "kk=3", "--set", "lr=-1"), "unknown setting 'mtp.kk'; did you mean 'k'?"),
        (("--set", "kk=3", "--set", "lr=-1"), "mtp.lr is -1"),
        (("--set", "lr"), "write KEY=VALUE"),
        (("--set", "k=1000"), "mtp.k is 1000: Input should be less than or equal to 64"),
        (("--set", "seed=-1"), "mtp.seed is -1"),
        (("--set", "held_out=12"), "held_out=12 given, but there are 12 texts"),
        (("--set", "k=60"), "but the longest text has"),
        (("--set", "data.template=Question:"), "holds {question} 0 times"),
        (("--nproc", 5), "5 processes share 4 sequences"),
        (("--set", "model.pth=x"), "model.pth"),
        (("--set", "targets=q_prj"), "LoRA target q_prj is not in this model"),
        (("--data", "none.jsonl"), "none.jsonl"),
        (("--model", "none"), "no model folder 'none'"),
        (("--out", "model"), "output folder 'model' already exists"),
        (("--recipe", "papr"), "unknown preset of mtp 'papr'; did you mean 'paper'?"),
        (("--nproc", 2, "--engine", "zero3"), "every process holds the whole frozen model"),
        (("--lora",), "--lora given, which mtp does not know"),
        (("--forget", "forget.jsonl"), "--forget given, which mtp does not know"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    words: tuple[object, ...], message: str, train: Callable[..., Any]
) -> None:
    before = {path.name for path in Path().iterdir()}
    done = train(*words)
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert {path.name for path in Path().iterdir()} == before


def test_what_does_not_fit_is_refused(
    train: Callable[..., Any],
    unlearn: Callable[..., Any],
    build_tiny_model: Any,
    build_tiny_tokenizer: Any,
) -> None:
    assert train().code == 0
    build_tiny_model(seed=1).save_pretrained("other")
    build_tiny_tokenizer().save_pretrained("other")
    asked = ("--prompt", "Where?", "--max-new-tokens", 4)

    def refused(*words: object) -> str:
        done = unlearn(*words)
        assert done.code == 2
        return " ".join(done.err.split())

    assert "does not hold the weights" in refused("generate", "other", "--mtp", "mtp/model", *asked)
    assert "k=3 given, but 2 masks" in refused("generate", "mtp/model", "--k", 3, *asked)
    assert "holds no mask predictor" in refused("generate", "model", "--mtp", "other", *asked)
    assert "there is nothing to ask" in refused("generate", "mtp/model")
    again = ("--data", "forget.jsonl", "--out", "again")
    assert "cannot be changed again" in refused("run", "mtp", "--model", "mtp/model", *again)
    assert "holds a finished training" in " ".join(train().err.split())
    data = refused("run", "npo", "--data", "forget.jsonl")
    assert "--data is for method mtp alone" in data
    nothing = flat(refused("run", "mtp", "--model", "model", "--data", "forget.jsonl:[:1]", "--out",
                           "one", *SMALL))  # fmt: skip
    assert "held_out=3 given, but there are 1 texts" in nothing
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"vocab_size": 290}))
    assert "but 'model' knows 290 tokens" in refused("run", "mtp", "--model", "model", *again)


def test_what_cannot_be_written_or_measured_is_refused_before_a_model_is_loaded(
    train: Callable[..., Any], unlearn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from unlearn import models

    assert train().code == 0

    def loaded(*words: Any, **more: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load_model", loaded)
    Path("long.txt").write_text("word " * 3000)
    Path("odd.jsonl").write_text('{"ask": "Where?"}\n')
    Path("good.txt").write_text("Where was 3 born?\n")
    (Path("mtp") / "recipe.yaml").touch()
    here = ("--prompt", "Where?")
    measured = ("eval", "mtp", "mtp/model", "--prompts")
    for words, message in [
        (("generate", "model"), "there is nothing to ask"),
        (("generate", "model", "--prompt", " "), "a --prompt is empty"),
        (("generate", "model", "--prompts", "none.txt"), "none.txt"),
        (("generate", "model", "--prompts", "odd.jsonl"), "rename the columns"),
        (("generate", "model", "--prompts", "long.txt"), "but the context of 'model' is"),
        (("generate", "mtp/model", "--prompts", "long.txt"), "shorten the prompt"),
        (("generate", "model", *here, "--template", "Question"), "holds {question} 0 times"),
        (("generate", "model", *here, "--layout", "linear"), "no predictor is given"),
        (("generate", "model", *here, "--k", 1), "no predictor is given"),
        (("generate", "mtp/model", *here, "--masks", 3), "layout quadratic has its own number"),
        (("generate", "mtp/model", *here, "--k", 3), "k=3 given, but 2 masks"),
        (("generate", "mtp/model", *here, "--temperature", "inf"), "temperature inf given"),
        (("generate", "model", *here, "--temperature", "nan"), "temperature nan given"),
        (("generate", "model", *here, "--temperature", -1), "temperature -1.0 given"),
        (("generate", "model", *here, "--seed", -1), "--seed"),
        (("generate", "mtp", *here), "give what it made: mtp/model"),
        (("generate", "mtp/model", "--mtp", "mtp/model", *here), "leave --mtp out"),
        (("generate", "model", "--mtp", "mtp", *here), "give its predictor: mtp/model"),
        (("generate", "model", "--mtp", "no", *here), "no folder 'no'"),
        ((*measured, "a=good.txt", "--prompts", "a=good.txt"), "are named 'a'"),
        ((*measured, "none.txt"), "none.txt"),
        ((*measured, "odd.jsonl"), "rename the columns"),
        ((*measured, "good.txt", "--k", 3), "k=3 given, but 2 masks"),
        (("eval", "mtp", "model", "--prompts", "good.txt"), "holds no mask predictor"),
        (("recipes", "show", "mtp"), "settings are in docs/mtp.md"),
    ]:
        done = unlearn(*words)
        assert done.code == 2, words
        assert message in flat(done.err), words


def test_a_text_that_the_context_ends_is_told(
    train: Callable[..., Any], unlearn: Callable[..., Any]
) -> None:
    assert train().code == 0
    asked = ("--prompt", "Where was 3 born?", "--max-new-tokens", 2000)
    for words in (("model",), ("mtp/model",)):
        done = unlearn("generate", *words, *asked)
        assert done.code == 0, done.err
        assert "1 of 1 texts ended where the model's context did" in flat(done.out)


def test_a_template_is_given_as_it_stands() -> None:
    from unlearn.recipes.mtp import load_mtp

    for given in (r"Question: {question}\nAnswer: ", r'"Question: {question}\nAnswer: "'):
        recipe = load_mtp("mtp", None, {}, [f"data.template={given}"])
        assert recipe.data.template == "Question: {question}\nAnswer: "
    assert load_mtp("mtp", None, {}, ["data.template=null"]).data.template is None


def test_rows_without_a_template_are_told_how_to_give_one(
    train: Callable[..., Any], build_tiny_tokenizer: Any
) -> None:
    build_tiny_tokenizer(chat=False).save_pretrained("model")
    Path("model/chat_template.jinja").unlink(missing_ok=True)
    done = train()
    assert done.code == 2
    assert r"--set 'data.template=Question: {question}\nAnswer: '" in flat(done.err)
    assert train("--set", r"data.template=Question: {question}\nAnswer: ").code == 0
