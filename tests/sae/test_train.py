"""Training: planted directions are found, a stop changes no bit, two ranks do what one does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from unlearn.errors import Interrupted, RunFailed, UserError
from unlearn.sae.corpus import Corpus, apart
from unlearn.sae.dictionary import KINDS, Dictionary
from unlearn.sae.learner import Learner
from unlearn.sae.measure import fidelity
from unlearn.sae.settings import TrainSettings
from unlearn.sae.stream import Activations
from unlearn.sae.train import Training, train_dictionary

PROGRAM = Path(__file__).with_name("on_ranks.py")
TRUE, WIDTH, ACTIVE = 32, 16, 3


def planted(seed: int = 0) -> tuple[torch.Tensor, Any]:
    """32 directions in 16 dimensions; each vector adds up 3 of them, with strengths of 1 to 2."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(TRUE, WIDTH, generator=generator), dim=1)

    def draw(number: int) -> torch.Tensor:
        chosen = torch.rand(number, TRUE, generator=generator).topk(ACTIVE).indices
        strengths = 1 + torch.rand(number, ACTIVE, generator=generator)
        return torch.zeros(number, TRUE).scatter(1, chosen, strengths) @ directions

    return directions, draw


def learnt(steps: int = 600, batch: int = 512, **changes: Any) -> tuple[Learner, torch.Tensor, Any]:
    directions, draw = planted()
    settings: Any = {"layer": 0, "features": 64, "k": ACTIVE, "lr": 3e-3, "warmup_steps": 50}
    learner = Learner(TrainSettings(**settings | changes, steps=steps, batch=batch), WIDTH)
    learner.begin(draw(batch))
    for _ in range(steps):
        learner.learn(draw(batch), batch)
    return learner, directions, draw


def best_cosines(found: Dictionary, directions: torch.Tensor) -> torch.Tensor:
    """For each true direction the cosine with the closest learnt one."""
    return (directions @ (found.w_dec / found.norms()[:, None]).t()).amax(1)


@pytest.mark.parametrize(
    ("kind", "cosine"), [("topk", 0.95), ("batchtopk", 0.9), ("mutual", 0.9), ("feature", 0.9)]
)
def test_planted_directions_are_found(kind: str, cosine: float) -> None:
    learner, directions, draw = learnt(kind=kind)
    found = learner.dictionary()
    told = fidelity(found, [draw(2000)])
    assert float(best_cosines(found, directions).mean()) > cosine
    assert told.variance_explained > 0.75
    assert told.l0 == pytest.approx(ACTIVE, rel=0.35)
    torch.testing.assert_close(found.norms(), torch.ones(64))
    if kind == "topk":
        assert told.l0 == ACTIVE
        assert found.k == ACTIVE
    else:
        assert found.kind == "jumprelu"
        assert found.threshold is not None
        assert float(found.threshold.min()) >= 0


def test_feature_choice_leaves_no_latent_dead() -> None:
    learner, _, draw = learnt(kind="feature")
    assert learner.zipf is not None
    assert not learner.dead.any()
    places = learner._choose(learner._view().pre(draw(512)), 512)
    assert len(places.latents.unique()) > 0.95 * 64


@pytest.mark.parametrize(("kind", "sparsity"), [("relu", 0.3), ("gated", 0.3), ("jumprelu", 0.1)])
def test_penalised_kinds_explain_and_are_sparse(kind: str, sparsity: float) -> None:
    learner, _, draw = learnt(kind=kind, sparsity=sparsity, bandwidth=0.2, theta=0.1)
    told = fidelity(learner.dictionary(), [draw(2000)])
    assert told.variance_explained > 0.75
    assert told.l0 < 32


@pytest.mark.parametrize("aux", [0.0, 1 / 32])
def test_dead_latents_learn_from_what_is_left_over_and_from_nothing_else(aux: float) -> None:
    """Half the latents are far below the k largest, yet positive at times: only AuxK moves them."""
    _, draw = planted()
    settings = TrainSettings(layer=0, features=64, k=ACTIVE, lr=3e-3, steps=20, batch=256,
                             aux=aux, dead_tokens=512, warmup_steps=0)  # fmt: skip
    learner = Learner(settings, WIDTH)
    with torch.no_grad():
        learner.params["b_enc"][32:] = -1.2
    before = {name: one.detach().clone() for name, one in learner.params.items()}
    shares = [learner.learn(draw(256), 256).dead for _ in range(6)]
    assert shares[:1] == [0.0]
    assert shares[-1] == pytest.approx(0.5, abs=0.1)
    moved = (learner.params["w_dec"] - before["w_dec"]).norm(dim=1)
    assert bool((moved[:32] > 1e-4).all())
    dead = learner.silent >= 6 * 256
    assert int(dead.sum()) > 20
    assert bool((moved[dead] > 1e-4).any()) == (aux > 0)


def test_schedules_by_hand() -> None:
    """Of 100 steps: 10 to rise (a tenth, not 1000), 20 to fall; 2e-4 / sqrt(1/16) = 8e-4."""
    how = TrainSettings(layer=0, steps=100, batch=50)
    rates = [how.learning_rate(step, 1024) for step in range(100)]
    assert rates[0] == pytest.approx(8e-5)
    assert rates[9:80] == pytest.approx([8e-4] * 71)
    assert rates[90] == pytest.approx(8e-4 * 10 / 20)
    assert rates[99] == pytest.approx(8e-4 / 20)
    assert [how.sparsity_at(step) for step in (0, 4, 50)] == pytest.approx([0.2, 1.0, 1.0])
    assert (how.dead_after, how.threshold_step, how.choice_step) == (500, 50, 30)
    assert TrainSettings(layer=0, choice_warmup=0.0).choice_step == 1
    long = TrainSettings(layer=0, steps=100_000)
    assert (long.dead_after, long.threshold_step) == (10_000_000, 1000)


def test_a_step_is_adam_on_the_mean_loss_with_directions_kept_at_length_1() -> None:
    """Against autograd and torch's Adam on the loss written out."""
    _, draw = planted()
    settings = TrainSettings(
        layer=0, features=20, k=4, lr=1e-2, steps=10, warmup_steps=0, decay=0.0
    )
    learner, x = Learner(settings, WIDTH), draw(30)
    copies = {name: one.detach().clone().requires_grad_() for name, one in learner.params.items()}
    adam = torch.optim.Adam(list(copies.values()), lr=1e-2)
    pre = (x - copies["b_dec"]) @ copies["w_enc"] + copies["b_enc"]
    best = pre.topk(4)
    latents = torch.zeros_like(pre).scatter(1, best.indices, best.values.relu())
    error = x - latents @ copies["w_dec"] - copies["b_dec"]
    error.square().sum(1).mean().backward()
    rows = copies["w_dec"]
    rows.grad -= (rows.grad * rows.data).sum(1, keepdim=True) * rows.data
    adam.step()
    rows.data /= rows.data.norm(dim=1, keepdim=True)
    told = learner.learn(x, 30)
    assert told.error == pytest.approx(float(error.detach().square().sum(1).mean()), rel=1e-5)
    for name, one in copies.items():
        torch.testing.assert_close(learner.params[name], one, rtol=1e-4, atol=1e-6)


# From a model


def texts(number: int = 60) -> Corpus:
    draw = np.random.default_rng(0)
    rows = [draw.integers(3, 300, int(draw.integers(8, 30))).tolist() for _ in range(number)]
    return apart(rows, front=[1], context=32)


def small(**changes: Any) -> TrainSettings:
    settings: Any = {"layer": 0, "features": 48, "k": 4, "steps": 12, "batch": 64, "buffer": 256,
                     "model_tokens": 200, "save_steps": 5, "held_out": 4}  # fmt: skip
    return TrainSettings(**settings | changes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_changes_no_bit(kind: Any, tiny_model: Any, tmp_path: Path) -> None:
    """Stopped after step 8, saved after step 5: the next one goes on from there."""
    settings = small(kind=kind, dead_tokens=100)
    whole = train_dictionary(tiny_model, texts(), settings)
    source, place = Activations(tiny_model, texts(), 0), tmp_path / "training"
    Training(source, settings, place).run(until=8)
    events: list[dict[str, Any]] = []
    resumed = train_dictionary(tiny_model, texts(), settings, checkpoint=place, emit=events.append)
    assert events[0] == {"event": "resumed", "step": 5}
    assert resumed.metrics == whole.metrics
    for name, one in whole.dictionary.tensors().items():
        assert torch.equal(resumed.dictionary.tensors()[name], one), name


@pytest.mark.parametrize("step", [7, 12])
def test_a_requested_stop_saves_the_step_it_came_in(
    step: int, tiny_model: Any, tmp_path: Path
) -> None:
    """After step 7 although only each fifth would be saved; after the last one, too."""
    settings, told = small(kind="feature", dead_tokens=100), []
    whole = train_dictionary(tiny_model, texts(), settings)
    place = tmp_path / "training"

    def stop() -> bool:
        told.append(1)
        return len(told) == step

    with pytest.raises(Interrupted, match=f"after step {step}"):
        Training(Activations(tiny_model, texts(), 0), settings, place, stop=stop).run()
    events: list[dict[str, Any]] = []
    resumed = train_dictionary(tiny_model, texts(), settings, checkpoint=place, emit=events.append)
    assert events[0] == {"event": "resumed", "step": step}
    assert resumed.metrics == whole.metrics
    for name, one in whole.dictionary.tensors().items():
        assert torch.equal(resumed.dictionary.tensors()[name], one), name


@pytest.mark.parametrize("kind", ["topk", "gated"])
def test_bfloat16_products_learn_nearly_the_same(kind: Any) -> None:
    """What is done on a GPU, here on the CPU: 8 bits in the products, float32 everywhere else.

    Planted directions are explained as well; parameters and moments stay in float32.
    """
    given: Any = {"kind": kind, "steps": 120, "sparsity": 0.3}
    told = []
    for bf16 in (False, True):
        learner, _, draw = learnt(**given, bf16=bf16)
        told.append(fidelity(learner.dictionary(), [draw(2000)]).variance_explained)
        tensors, _ = learner.state()
        kinds = {one.dtype for name, one in tensors.items() if name.startswith(("par", "adam"))}
        assert kinds == {torch.float32}
    assert told[0] != told[1]
    assert told[1] == pytest.approx(told[0], abs=0.02)


def test_the_seed_decides(tiny_model: Any) -> None:
    first, again, other = (
        train_dictionary(tiny_model, texts(), small(seed=seed)).dictionary for seed in (0, 0, 1)
    )
    assert torch.equal(first.w_enc, again.w_enc)
    assert not torch.equal(first.w_enc, other.w_enc)


def test_another_trainings_checkpoint_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    place = tmp_path / "training"
    Training(Activations(tiny_model, texts(), 0), small(), place).run(until=6)
    with pytest.raises(UserError, match="training with k 4, not 5"):
        train_dictionary(tiny_model, texts(), small(k=5), checkpoint=place)
    with pytest.raises(UserError, match="training with another rows"):
        train_dictionary(tiny_model, texts(50), small(), checkpoint=place)
    place.write_bytes(place.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot read"):
        train_dictionary(tiny_model, texts(), small(), checkpoint=place)


def test_trained_dictionaries_read_plain_activations(tiny_model: Any) -> None:
    """Variance explained on the model's own activations is what the training told."""
    corpus, settings = texts(), small(steps=150, batch=128, lr=3e-3)
    trained = train_dictionary(tiny_model, corpus, settings)
    source = Activations(tiny_model, corpus, 0)
    _, held_out = corpus.split(settings.held_out, settings.seed)
    x = source.of_rows(held_out)
    error = (x - trained.dictionary.reconstruct(x)).square().sum()
    explained = float(1 - error / (x - x.mean(0)).square().sum())
    assert trained.metrics["variance_explained"] == pytest.approx(explained, abs=1e-5)
    assert explained > 0.3
    assert trained.metrics["l0"] == 4


def test_a_loss_that_is_no_number_ends_the_training(tiny_model: Any, tmp_path: Path) -> None:
    training = Training(Activations(tiny_model, texts(), 0), small(), tmp_path / "training")
    with torch.no_grad():
        training.learner.params["w_enc"][0, 0] = torch.inf
    with pytest.raises(RunFailed, match="not finite at step 1"):
        training.run()
    assert not (tmp_path / "training").exists()


def test_too_many_active_latents_are_refused(tiny_model: Any) -> None:
    with pytest.raises(UserError, match="k=49 given for 48 features"):
        train_dictionary(tiny_model, texts(), small(k=49))


@pytest.mark.parametrize("kinds", ["topk,mutual,feature,jumprelu"])
def test_two_processes_learn_what_one_does(
    kinds: str, tmp_path: Path, tiny_model: Any, on_two_ranks: Any
) -> None:
    """Sums come in another order, so not bit for bit; both processes hold the same."""
    tiny_model.save_pretrained(tmp_path)
    (tmp_path / "kinds").write_text(kinds)
    on_two_ranks(PROGRAM, tmp_path)
    expected = load_file(tmp_path / "alone")
    first, second = (load_file(tmp_path / f"rank-{rank}") for rank in range(2))
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=2e-3, atol=2e-4, msg=name)
    told = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "rank-1")]
    for kind, figures in told[0].items():
        assert told[1][kind] == pytest.approx(figures, rel=1e-3), kind


@pytest.mark.slow
def test_a_real_models_activations_are_explained(shared: Path, tmp_path: Path) -> None:
    """At least 70 % of the variance on texts held out, with 16 of 512 latents active."""
    from unlearn.models import ModelSource
    from unlearn.recipes.sae import Texts, settings_of, train

    given = {"layer": 2, "kind": "topk", "features": 512, "k": 16, "steps": 600, "batch": 512,
             "buffer": 16384, "context": 128}  # fmt: skip
    source = ModelSource(str(shared / "models" / "stories260k"), offline=True)
    data = Texts(source, f"{shared / 'data' / 'tofu'}#full:train[:1000]", template="{question} ")
    found = train(data, settings_of(given, []), tmp_path / "sae")
    assert found["metrics"]["variance_explained"] > 0.7
    assert found["metrics"]["ce_recovered"] > 0.7
