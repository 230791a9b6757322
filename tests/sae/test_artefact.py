"""The folder of a clamped model: it comes back as it was, or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from unlearn import models
from unlearn.edits.weightless import weightless
from unlearn.errors import UserError
from unlearn.kinds import base_of, kind_in_memory, require_plain
from unlearn.models import ModelSource, load_model, load_tokenizer, weights_hash
from unlearn.runs import staged
from unlearn.sae import artefact
from unlearn.sae.artefact import load_composed, save_composed
from unlearn.sae.clamp import Clamp
from unlearn.sae.clamped import install
from unlearn.sae.dictionary import Dictionary

IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def draw_dictionary(kind):
    torch.manual_seed(0)
    w = torch.randn(32, 64) * 0.3
    found = {"w_enc": w, "b_enc": torch.zeros(64), "w_dec": w.t().contiguous()}
    found |= {"b_dec": torch.randn(32) * 0.001}
    if kind == "jumprelu":
        found["threshold"] = torch.full((64,), 0.005)
    if kind == "gated":
        found |= {"r_mag": torch.ones(64), "b_mag": torch.zeros(64)}
    return Dictionary(kind, **found, k=5 if kind == "topk" else None)


@pytest.fixture
def saved(build_tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """Give a function that saves base and clamped model and gives the latter."""
    monkeypatch.chdir(tmp_path)

    def save(kind: str = "jumprelu", dtype: str = "float32") -> torch.nn.Module:
        build_tiny_model().save_pretrained("base")
        tiny_tokenizer.save_pretrained("base")
        source = ModelSource("base", dtype=dtype)
        model = load_model(source, device="cpu")
        found = draw_dictionary(kind)
        clamps = [Clamp.of(found, [3, 60, 8], layer=layer, c=2.0) for layer in (0, 1)]
        install(model, clamps, front=[1])
        with staged(Path("clamped")) as folder:
            save_composed(model, tiny_tokenizer, folder, source)
        return model

    return save


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated", "topk"])
def test_what_is_loaded_says_what_was_saved(saved, kind, dtype):
    model = saved(kind, dtype)
    source = ModelSource("clamped", dtype=dtype)
    again, base = load_model(source, device="cpu"), load_model("base", device="cpu")
    for use_cache in (False, True):
        said = again(IDS, use_cache=use_cache).logits
        assert torch.equal(said, model(IDS, use_cache=use_cache).logits)
    assert not torch.equal(said.float(), base(IDS).logits)
    assert weights_hash(again) == weights_hash(model)
    assert again.config.to_json_string() == model.config.to_json_string()
    asked = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(again.generate(IDS, **asked), model.generate(IDS, **asked))
    assert kind_in_memory(again) is artefact
    assert kind_in_memory(base) is None
    names = {path.name for path in Path("clamped").glob("*.safetensors")}
    assert names == {"sae_clamp.safetensors"}


def test_only_the_rows_of_the_features_are_there(saved):
    """3 features of 2 layers: encoder, bias, threshold, direction and the decoder's bias, fp32."""
    saved()
    size = Path("clamped/sae_clamp.safetensors").stat().st_size
    assert 2 * 4 * (3 * (32 + 1 + 1 + 32) + 32) < size < 4096


def test_transformers_does_not_load_it_as_an_unedited_base(saved):
    saved()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained("clamped")


def test_a_base_that_has_moved_can_be_named(saved):
    model = saved()
    shutil.move("base", "elsewhere")
    with pytest.raises(UserError, match=r"needs its base: no model folder .*set base_model in"):
        models.check_source(ModelSource("clamped"))
    again = load_composed("clamped", base="elsewhere", device="cpu")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_another_base_is_refused(saved, build_tiny_model, build_tiny_tokenizer):
    saved()
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_tokens(["Ada"])
    tokenizer.save_pretrained("base")
    with pytest.raises(UserError, match=r"the tokenizer of '.*base' is not the one"):
        load_model("clamped", device="cpu")
    build_tiny_model(seed=1).save_pretrained("base")
    with pytest.raises(UserError, match="does not hold the weights that 'clamped' was made for"):
        load_model("clamped", device="cpu")


def test_a_clamped_model_is_no_base(saved):
    saved()
    path = Path("clamped/sae_clamp.json")
    content = json.loads(path.read_text())
    shutil.copytree("clamped", "twice")
    path.write_text(json.dumps(content | {"base_model": str(Path("twice").absolute())}))
    with pytest.raises(UserError, match=r"the base of 'clamped', '.*twice', is no plain model"):
        models.check_source(ModelSource("clamped"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "later version"),
        ({"layers": [{"kind": "relu"}]}, "is damaged"),
        ({"clamps_sha256": "0"}, r"have changed since they were written"),
        (None, "is damaged"),
        ("weights", r"has no sae_clamp\.safetensors"),
        ("cut", "is truncated"),
    ],
)
def test_a_damaged_folder_is_named(saved, change, message):
    saved()
    path, weights = Path("clamped/sae_clamp.json"), Path("clamped/sae_clamp.safetensors")
    if change == "weights":
        weights.unlink()
    elif change == "cut":
        weights.write_bytes(weights.read_bytes()[:-5])
    else:
        content = json.loads(path.read_text())
        path.write_text("{" if change is None else json.dumps(content | change))
    with pytest.raises(UserError, match=message):
        load_model("clamped", device="cpu")


def test_a_clamp_that_was_weakened_by_hand_is_refused(saved):
    saved()
    path = Path("clamped/sae_clamp.json")
    content = json.loads(path.read_text())
    content["layers"][0]["offset"] = 0.0
    path.write_text(json.dumps(content))
    base = content["base_model"]
    for given in (None, base):
        with pytest.raises(UserError, match="have changed since they were written"):
            load_composed("clamped", given, device="cpu")


def test_checks_look_through_to_the_base(saved):
    saved()
    source = ModelSource("clamped")
    models.check_source(source)
    models.check_finite_weights(source)
    models.check_vocabulary(source, {299})
    assert Path(base_of(source).path).name == "base"
    assert load_tokenizer(source).get_vocab() == load_tokenizer("base").get_vocab()
    for refuse in (require_plain, weightless):
        with pytest.raises(
            UserError,
            match=r"is a base with clamped features .*, which cannot be changed again \(give its",
        ):
            refuse(source)


@torch.no_grad()
def test_lm_eval_takes_it(saved, tiny_tokenizer):
    from lm_eval.api.instance import Instance

    from unlearn.evals.harness.model import HarnessModel

    model = saved()
    harness = HarnessModel(model, tiny_tokenizer, batch_size=2, progress=lambda *_: None)
    request = Instance("loglikelihood", {}, ("Where was Ada born?", " Oslo."), 0)
    ((value, _),) = harness.loglikelihood([request])
    start, end = (tiny_tokenizer(text)["input_ids"] for text in request.args)
    log_probs = model(torch.tensor([start + end])).logits[0].log_softmax(-1)
    expected = sum(log_probs[len(start) - 1 + at, token] for at, token in enumerate(end))
    assert value == pytest.approx(float(expected), abs=1e-4)
