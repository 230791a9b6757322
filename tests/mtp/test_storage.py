"""The folder of a predictor: read back whole, inert for others, refused where it does not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unlearn.errors import RunFailed, UserError
from unlearn.kinds import base_of, require_plain
from unlearn.models import ModelSource, check_source, load_model
from unlearn.mtp.layout import step_layout
from unlearn.mtp.predictor import MaskPredictor
from unlearn.mtp.settings import Shape
from unlearn.mtp.storage import described, load_predictor, save_predictor


@pytest.fixture
def stored(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> tuple[Path, Any]:
    """A base in a folder, and a predictor of random parts beside it in another."""
    base = tmp_path / "base"
    tiny_model.save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    model = load_model(str(base), device="cpu")
    predictor = MaskPredictor(model, Shape(k=2, rank=3, alpha=6.0))
    for parameter in predictor.trained().values():
        parameter.data += 0.2 * torch.randn_like(parameter)
    save_predictor(predictor, tmp_path / "mtp", ModelSource(str(base)), tiny_tokenizer)
    return tmp_path / "mtp", predictor


def states(predictor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    offsets, sees, which = step_layout(5, ((4, 2),))
    embedded = torch.cat([predictor.embed(torch.arange(5, 10)), predictor.masks[which]])
    with torch.no_grad(), predictor.gate.open(2):
        hidden = predictor.read(embedded, offsets, sees, None)
        return hidden, predictor.draft(torch.tensor(7), hidden[5:])


def test_what_is_stored_is_read_back(stored: Any) -> None:
    folder, predictor = stored
    again = load_predictor(folder, device="cpu")
    for name, value in again.trained().items():
        assert torch.equal(value, predictor.trained()[name])
    (ours, drafts), (theirs, again_drafts) = states(predictor), states(again)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert torch.equal(drafts, again_drafts)
    assert again.shape == predictor.shape
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "mtp.safetensors", "mtp_config.json",
    ]  # fmt: skip
    assert described(folder)["k"] == 2


def test_peft_alone_gets_the_base_unchanged(stored: Any) -> None:
    """Fails safe: without offsets nothing is switched on, though the LoRA is far from 0."""
    from peft import PeftModel

    folder, _ = stored
    base = load_model(str(folder.parent / "base"), device="cpu")
    ids = torch.arange(5, 15)[None]
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        assert torch.equal(adapted(ids).logits, before)
        assert torch.equal(adapted(ids, alora_offsets=[0]).logits, before)


def test_activated_lora_of_peft_gives_what_our_gate_gives(stored: Any) -> None:
    """Its offsets are the number of tokens at the end that are switched on."""
    from peft import PeftModel

    folder, predictor = stored
    base = load_model(str(folder.parent / "base"), device="cpu")
    adapted = PeftModel.from_pretrained(base, str(folder)).eval()
    offsets, sees, which = step_layout(5, ((4, 2),))
    embedded = torch.cat([predictor.embed(torch.arange(5, 10)), predictor.masks[which]])
    with torch.no_grad():
        theirs = adapted(
            inputs_embeds=embedded[None],
            attention_mask=sees[None, None],
            position_ids=offsets[None],
            alora_offsets=[2],
        ).logits[0]
        ours = predictor.head.logits(states(predictor)[0])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_peft_refuses_to_merge_it(stored: Any) -> None:
    from peft import PeftModel

    folder, _ = stored
    adapted = PeftModel.from_pretrained(
        load_model(str(folder.parent / "base"), device="cpu"), str(folder)
    )
    with pytest.raises(Exception, match=r"(?i)merg"):
        adapted.merge_and_unload()


def test_as_a_model_folder_it_is_its_base(stored: Any) -> None:
    folder, _ = stored
    source = ModelSource(str(folder))
    check_source(source)
    assert base_of(source).path == str(folder.parent / "base")
    ids = torch.arange(5, 15)[None]
    base = load_model(str(folder.parent / "base"), device="cpu")
    assert torch.equal(load_model(source, device="cpu")(ids).logits, base(ids).logits)
    with pytest.raises(UserError, match="cannot be changed again"):
        require_plain(source)


def test_another_base_is_refused(stored: Any, build_tiny_model: Any, tiny_tokenizer: Any) -> None:
    folder, _ = stored
    other = folder.parent / "other"
    build_tiny_model(seed=1).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match="does not hold the weights"):
        load_predictor(folder, ModelSource(str(other)))


def test_a_tokenizer_of_another_size_is_refused(stored: Any) -> None:
    folder, _ = stored
    base = folder.parent / "base"
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        {**tokenizer["added_tokens"][0], "id": 300, "content": "<more>"}
    )
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="tokenizer"):
        load_predictor(folder)


def test_damaged_folders_are_refused(stored: Any) -> None:
    folder, _ = stored
    tensors = load_file(folder / "mtp.safetensors")
    save_file({**tensors, "mask_embeddings": torch.zeros(3, 32)}, folder / "mtp.safetensors")
    with pytest.raises(UserError, match=r"mask_embeddings of shape \(3, 32\)"):
        load_predictor(folder)
    save_file({"other": torch.zeros(1)}, folder / "mtp.safetensors")
    with pytest.raises(UserError, match="has no counterpart"):
        load_predictor(folder)
    (folder / "mtp.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no mtp\.safetensors"):
        load_predictor(folder)
    config = json.loads((folder / "mtp_config.json").read_text())
    (folder / "mtp_config.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(UserError, match="later version"):
        load_predictor(folder)
    (folder / "mtp_config.json").write_text(json.dumps(config | {"shape": {"k": 0}}))
    with pytest.raises(UserError, match="is damaged"):
        load_predictor(folder)
    (folder / "mtp_config.json").unlink()
    with pytest.raises(UserError, match=r"no mtp_config\.json: it holds no mask predictor"):
        load_predictor(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("file", ["mtp.safetensors", "adapter_model.safetensors"])
def test_what_is_not_finite_is_refused(stored: Any, file: str, value: float) -> None:
    folder, _ = stored
    tensors = load_file(folder / file)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / file)
    with pytest.raises(UserError) as refused:
        load_predictor(folder)
    assert f"{folder / file}' has NaN or infinity" in refused.value.message
    assert f"{name} is not finite" in refused.value.message


def test_a_spoiled_predictor_is_not_saved(stored: Any, tiny_tokenizer: Any) -> None:
    folder, predictor = stored
    predictor.masks.data[0, 0] = float("nan")
    with pytest.raises(RunFailed, match="mask_embeddings is not finite"):
        save_predictor(predictor, folder.parent / "new", ModelSource("base"), tiny_tokenizer)
    assert not (folder.parent / "new").exists()


def test_damage_is_told_in_words(stored: Any) -> None:
    folder, _ = stored
    path = folder / "mtp_config.json"
    config = json.loads(path.read_text())
    for content, message in [
        ("{", "it is not JSON from line 1, column 2 on"),
        ("[]", "a value is of another kind than it should be"),
        (json.dumps({**config, "shape": {"k": "x"}}), "shape.k is 'x'"),
        (json.dumps({**config, "base_model": 5}), r"base_model is a number \(5\)"),
        (json.dumps({key: config[key] for key in config if key != "layers"}), "has no 'layers'"),
    ]:
        path.write_text(content)
        with pytest.raises(UserError, match=message) as refused:
            load_predictor(folder)
        assert "Error(" not in refused.value.message


def test_the_folder_that_is_meant_is_named(stored: Any) -> None:
    folder, _ = stored
    run = folder.parent / "run"
    run.mkdir()
    folder.rename(run / "model")
    with pytest.raises(UserError, match="is the folder of a run") as refused:
        load_predictor(run)
    assert refused.value.hint == f"give its predictor: {run / 'model'}"
    with pytest.raises(UserError, match="no folder"):
        load_predictor(folder.parent / "nowhere")


def test_another_base_that_was_given_is_not_to_be_written_down(
    stored: Any, build_tiny_model: Any, tiny_tokenizer: Any
) -> None:
    folder, _ = stored
    other = folder.parent / "other"
    build_tiny_model(seed=1).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    with pytest.raises(UserError) as refused:
        load_predictor(folder, ModelSource(str(other)))
    assert refused.value.hint == f"give the model it was made from: {folder.parent / 'base'}"
