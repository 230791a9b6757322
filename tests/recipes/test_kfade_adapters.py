"""A run whose edit changes adapters: what it leaves, what is planned, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unlearn.curvature.damping import Damping
from unlearn.curvature.spectrum import spectra
from unlearn.edits import EDITS
from unlearn.edits.update import load_update, reapply
from unlearn.errors import UserError
from unlearn.models import load_model
from unlearn.recipes.curvature import fit
from unlearn.recipes.mistakes import find_mistakes
from unlearn.recipes.plan import plan_run
from unlearn.recipes.prepare import prepare
from unlearn.recipes.run import resume, run
from unlearn.recipes.sections import CHANGE_ADAPTERS
from unlearn.recipes.yaml_text import parse_tree
from unlearn.runs import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore:.*loss tokens for factors")
KFADE = "{name: kfade, retain_kl: 1.0}\n"
LORA = "model.lora={rank: 4, alpha: 8.0}"
GOAL = ("edit.forget_nll=8.0", "edit.retain_kl=5.0", "edit.steps=2", LORA)


def weights(out):
    return load_file(f"{out}/model/model.safetensors")


def test_a_run_leaves_a_merged_model_its_adapter_and_an_update(recipe):
    """Adapters lie on all linear layers; the edit's default, feed-forward layers, changes."""
    results = run(recipe("kfade", *GOAL, "training.gradient_checkpointing=true"))
    after, before = (results["metrics"][name]["forget_Q_A_Prob"] for name in ("after", "before"))
    assert after < before
    edited, start = weights("out"), load_file("model/model.safetensors")
    changed = {name for name, one in edited.items() if not torch.equal(one, start[name])}
    assert edited.keys() == start.keys()
    assert changed == {name for name in start if ".mlp." in name}
    assert Path("out/adapter/adapter_config.json").is_file()
    assert not Path("out/steps.safetensors").exists()
    update = load_update(Path("out/update.safetensors"))
    assert set(update.weights) == changed
    again = reapply(load_model("model", device="cpu"), update, scale=1.0)
    assert all(torch.equal(one, edited[name]) for name, one in again.state_dict().items())
    size = Path("out/update.safetensors").stat().st_size
    assert size < 0.5 * sum(start[name].nbytes for name in changed)


def test_a_stopped_run_goes_on_with_the_adapters_it_began_with(recipe):
    run(recipe("kfade", *GOAL, out="whole"))

    def stop(event):
        if event["event"] == "step":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe("kfade", *GOAL, out="stopped"), emit=stop)
    torch.manual_seed(99)
    resume(recipe("kfade", *GOAL, out="stopped"), RunFolder(Path("stopped")))
    ours, theirs = weights("whole"), weights("stopped")
    assert all(torch.equal(one, theirs[name]) for name, one in ours.items())


def test_factors_are_fitted_ahead_to_the_adapters_of_the_run(recipe):
    place = Path("factors.safetensors")
    found = fit(recipe("kfade", *GOAL), place)
    assert {name.split(".")[-2] for name in found.layers} == {"lora_A", "lora_B"}
    for one in spectra(found, Damping.parse("factored:1e-3")):
        assert (one.trace == 0) == (".lora_A." in one.name)
    run(recipe("kfade", *GOAL, out="without"))
    run(recipe("kfade", *GOAL, f"edit.factors={place}", out="with"))
    ours, theirs = weights("without"), weights("with")
    assert all(torch.equal(one, theirs[name]) for name, one in ours.items())


def test_a_plan_counts_the_matrices_of_adapters(recipe):
    """[out, in] = [48, 32] twice and [32, 48] per block: A is [4, in] and B [out, 4].

    Factors per layer in² + 4² and 4² + out²; start, steps and gradient 4 (in + out) values each.
    """
    planned = plan_run(prepare(recipe("kfade", *GOAL)))
    parts = {part["part"]: part for part in planned["memory"]}
    matrices, factors = 2 * 3 * 4 * (48 + 32), 2 * 3 * (48**2 + 32**2 + 2 * 4**2)
    assert parts["start and steps"]["bytes"] == parts["gradient"]["bytes"] == 4 * 2 * matrices
    assert parts["curvature"]["bytes"] == 4 * factors
    assert "12 adapter matrices" in parts["curvature"]["why"]
    sizes = {file["path"]: file["bytes"] for file in planned["files"]}
    assert sizes["update.safetensors"] == sizes["adapter/"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{KFADE}model: {{lora: {{dropout: 0.1}}}}\n", "model.lora.dropout: 0.1 given"),
        (f"{KFADE}model: {{lora: {{}}, quantize: nf4}}\n", "model.quantize: nf4 given"),
        ("{name: reapply, scale: 0.5}\nmodel: {lora: {}}\n", "edit reapply changes the weights"),
    ],
)
def test_what_adapters_cannot_be_combined_with_is_named(text, message):
    (found,) = map(str, find_mistakes(parse_tree(f"method: a\nedit: {text}", "a.yaml")))
    assert message in found


def test_layers_without_adapters_are_refused_before_anything_is_written(recipe):
    with pytest.raises(UserError, match=r"no adapter lies on such a layer.*on: q_proj"):
        run(recipe("kfade", *GOAL, "model.lora.targets=[q_proj]"))
    assert not Path("out").exists()


def test_edits_that_change_adapters_are_in_the_table():
    assert set(CHANGE_ADAPTERS) <= set(EDITS)
