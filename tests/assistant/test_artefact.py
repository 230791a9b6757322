"""The folder of a composition: it comes back as it was, or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from unlearn import models
from unlearn.assistant import artefact
from unlearn.assistant.artefact import load_composed, save_composed
from unlearn.errors import UserError
from unlearn.evals.answers import Evaluator
from unlearn.kinds import base_of, require_plain
from unlearn.models import ModelSource, load_model, load_tokenizer, weights_hash

IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(build_assisted, build_tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """Give a function that saves base and composition and gives the latter."""
    monkeypatch.chdir(tmp_path)

    def save(combine: str = "subtract", dtype: str = "float32") -> torch.nn.Module:
        build_tiny_model(num_hidden_layers=3).save_pretrained("base")
        tiny_tokenizer.save_pretrained("base")
        source = ModelSource("base", dtype=dtype)
        model = build_assisted(combine, base=load_model(source, device="cpu"))
        Path("composed").mkdir()
        save_composed(model, tiny_tokenizer, Path("composed"), source)
        return model

    return save


@pytest.mark.parametrize("combine", ["subtract", "offset", "suppress"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_loaded_says_what_was_saved(saved, combine, dtype):
    model = saved(combine, dtype)
    again = load_model(ModelSource("composed", dtype=dtype), device="cpu")
    for use_cache in (False, True):
        assert torch.equal(
            again(IDS, use_cache=use_cache).logits, model(IDS, use_cache=use_cache).logits
        )
    assert weights_hash(again) == weights_hash(model)
    assert not any(p.requires_grad for p in again.parameters())
    files = {str(path.relative_to("composed")) for path in Path("composed").rglob("*.safetensors")}
    assert files == {"adapter/adapter_model.safetensors"}


def test_transformers_does_not_load_it_as_an_unedited_base(saved):
    saved()
    for folder in ("composed", "composed/adapter"):
        with pytest.raises((OSError, ValueError, AttributeError)):
            AutoModelForCausalLM.from_pretrained(folder)


def test_a_base_that_has_moved_can_be_named(saved):
    model = saved()
    shutil.move("base", "elsewhere")
    with pytest.raises(UserError, match=r"needs its base: no model folder .*set base_model in"):
        models.check_source(ModelSource("composed"))
    with pytest.raises(UserError, match="needs its base"):
        load_model("composed")
    again = load_composed("composed", base="elsewhere", device="cpu")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_base_with_other_weights_is_refused(saved, build_tiny_model):
    saved()
    build_tiny_model(seed=1, num_hidden_layers=3).save_pretrained("base")
    with pytest.raises(UserError, match="does not hold the weights that 'composed' was made for"):
        load_model("composed", device="cpu")


def test_a_base_with_another_tokenizer_is_refused(saved, build_tiny_tokenizer):
    saved()
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_tokens(["Ada"])
    tokenizer.save_pretrained("base")
    with pytest.raises(UserError, match=r"the tokenizer of '.*base' is not the one"):
        load_model("composed", device="cpu")


@pytest.mark.parametrize(
    "change",
    [{"combine": "multiply"}, {"format": 9}, {"layers": 7}, {"weight": -1}, {"weight": "x"}, None],
)
def test_a_damaged_folder_is_named(saved, change):
    saved()
    path = Path("composed/uld_config.json")
    content = json.loads(path.read_text())
    path.write_text("{" if change is None else json.dumps(content | change))
    with pytest.raises(
        UserError, match=r"unknown rule|later version|has 3 layers|is damaged|weight is (-1|.x.)"
    ):
        load_model("composed", device="cpu")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_adapter_is_named(saved, name):
    saved()
    (Path("composed/adapter") / name).unlink()
    with pytest.raises(UserError, match=name):
        models.check_source(ModelSource("composed"))


def test_checks_look_through_to_the_base(saved):
    saved()
    source = ModelSource("composed")
    models.check_source(source)
    models.check_finite_weights(source)
    models.check_vocabulary(source, {299})
    with pytest.raises(UserError, match="knows 300 tokens"):
        models.check_vocabulary(source, {300})
    assert Path(base_of(source).path).name == "base"
    assert load_tokenizer(source).get_vocab() == load_tokenizer("base").get_vocab()
    with pytest.raises(UserError, match=r"cannot be changed again \(give its base, .*base\)"):
        require_plain(source)
    with pytest.raises(UserError, match="4 bits"):
        artefact.check(ModelSource("composed", quantize="nf4"))


def test_the_evaluator_writes_by_the_rule_for_writing(saved, tiny_tokenizer):
    """Known right predictions are those of scoring, so they are not taken for written tokens."""
    model = saved()
    evaluator = Evaluator(model, tiny_tokenizer, max_new_tokens=4)
    prompt = IDS[0].tolist()
    ids = model.generate(
        input_ids=IDS[:1], attention_mask=torch.ones(1, 9), max_new_tokens=4, do_sample=False
    )
    expected = tiny_tokenizer.decode(ids[0, 9:], skip_special_tokens=True).strip()
    wrong = next(t for t in range(3, 300) if t != ids[0, 9])
    assert evaluator.write([prompt], known=[[wrong]]) == [expected]


def test_lm_eval_takes_it(saved, tiny_tokenizer):
    from lm_eval.api.instance import Instance

    from unlearn.evals.harness.model import HarnessModel

    model = saved()
    harness = HarnessModel(model, tiny_tokenizer, batch_size=2, progress=lambda *_: None)
    request = Instance("loglikelihood", {}, ("Where was Ada born?", " Oslo."), 0)
    ((found, _),) = harness.loglikelihood([request])
    start, end = (tiny_tokenizer(text)["input_ids"] for text in request.args)
    log_probs = model(torch.tensor([start + end])).logits[0].log_softmax(-1)
    expected = sum(log_probs[len(start) - 1 + at, token] for at, token in enumerate(end))
    assert found == pytest.approx(float(expected), abs=1e-4)
    ask = Instance(
        "generate_until", {}, ("Where was Ada born?", {"until": ["\n\n"], "max_gen_toks": 5}), 0
    )
    ids = torch.tensor([start])
    said = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
    )
    (text,) = harness.generate_until([ask])
    assert text == tiny_tokenizer.decode(said[0, len(start) :], skip_special_tokens=True)
