"""The family of weighted, distilled and constrained losses: numbers by hand and equivalences."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from unlearn.objectives import OBJECTIVES, batch_loss
from unlearn.objectives.dual import StepMeans, pdu_retain
from unlearn.objectives.weighting import chosen, draws, group_means
from unlearn.scores import Scorer, Scores


def scores_of(log_probs: list[list[float]], important: list[list[int]] | None = None) -> Scores:
    """Rows with these token log-probs; 0 is a position that is not labelled."""
    values = torch.tensor(log_probs, dtype=torch.float64).requires_grad_()
    mask = values != 0
    tokens = torch.arange(values.numel()).reshape(values.shape).masked_fill(~mask, -100)
    marks = None if important is None else torch.tensor(important).bool()
    real = mask | (mask.cumsum(-1) == 0)
    return Scores(values, mask, real, next_tokens=tokens, important=marks)


def random_scores(seed: int = 0, rows: int = 4, width: int = 20) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, width, 9, generator=generator, dtype=torch.float64)
    other = torch.randn(rows, width, 9, generator=generator, dtype=torch.float64)
    labels = torch.randint(9, (rows, width), generator=generator)
    labels[:, :3] = -100
    labels[min(1, rows - 1), -6:] = -100
    return logits.requires_grad_(), other, labels


def gradient(name: str, logits: Any, labels: Any, other: Any = None, **hyper: Any) -> Any:
    reference = None if other is None else Scores.from_logits(other, labels)
    loss = batch_loss(name, Scores.from_logits(logits, labels), reference, **hyper)
    return torch.autograd.grad(loss, logits)[0]


def frozen(scores: Scores) -> Scores:
    """The same numbers, as a reference that gives no gradient."""
    parts = {name: getattr(scores, name) for name in ("logits", "labelled")}
    parts = {name: part.detach() for name, part in parts.items() if part is not None}
    return replace(scores, log_probs=scores.log_probs.detach(), **parts)


HALF, QUARTER = math.log(0.5), math.log(0.25)


def test_weights_by_hand() -> None:
    """One answer of two tokens, p = 1/2 and 1/4, so the log-probs are -ln 2 and -2 ln 2."""
    one, ln2 = scores_of([[HALF, QUARTER, 0.0]]), math.log(2)
    wanted = {
        ("wga", (("beta", 1.0),)): -(0.5 + 0.25 * 2) / 2 * ln2,
        ("simsat", (("beta", 2.0),)): -(0.25 + 0.0625 * 2) / 2 * ln2,
        ("simimp", (("beta", 1.0),)): -(0.5 + 0.75 * 2) / 2 * ln2,
        ("satimp", (("beta1", 1.0), ("beta2", 1.0))): -(0.25 + 0.1875 * 2) / 2 * ln2,
        # the whole answer: p = 1/8, log p = -3 ln 2
        ("simsat", (("beta", 1.0), ("granularity", "instance"))): -3 / 8 * ln2,
        ("simimp", (("beta", 1.0), ("granularity", "instance"))): -3 * 7 / 8 * ln2,
        ("satimp", (("beta1", 1.0), ("beta2", 1.0), ("granularity", "instance"))): -21 / 64 * ln2,
        # one group of both tokens: its mean weight is 3/8
        ("simsat", (("beta", 1.0), ("granularity", "group"), ("group_size", 2))): -9 / 16 * ln2,
    }
    for (name, hyper), expected in wanted.items():
        assert batch_loss(name, one, **dict(hyper)).item() == pytest.approx(expected), (name, hyper)


def test_batch_granularity_by_hand() -> None:
    """Answers with p = 1/2 and 1/4: the weight of both is 3/8, the mean log p is -1.5 ln 2."""
    two = scores_of([[HALF, 0.0], [QUARTER, 0.0]])
    loss = batch_loss("simsat", two, beta=1.0, granularity="batch")
    assert loss.item() == pytest.approx(-3 / 8 * 1.5 * math.log(2))


def test_groups_are_sorted_and_end_with_the_answer() -> None:
    """Sorted 9 7 5 | 3 1: means 7 and 2, back in the places they came from; no token at 0."""
    weights = torch.tensor([[1.0, 9.0, 0.0, 5.0, 3.0, 7.0, 0.0]])
    mask = torch.tensor([[True, True, False, True, True, True, False]])
    expected = torch.tensor([[2.0, 7.0, 0.0, 7.0, 2.0, 7.0, 0.0]])
    torch.testing.assert_close(group_means(weights, mask, 3), expected)


def test_hard_sampling_by_hand() -> None:
    """Losses 1 2 3 4 5: the median is 3, above it are 4 and 5, below it 1 and 2."""
    one = scores_of([[-1.0, -2.0, -3.0, -4.0, -5.0, 0.0]])
    top, low = chosen(one, "topk", 0.5, 0), chosen(one, "bottomk", 0.5, 0)
    assert top.tolist() == [[False, False, False, True, True, False]]
    assert low.tolist() == [[True, True, False, False, False, False]]
    hard = batch_loss("ga_sampled", one, sampling="topk", fraction=0.5)
    assert hard.item() == pytest.approx(-9 / 5)
    soft = batch_loss("ga_sampled", one, sampling="topk", fraction=0.5, soft=0.75)
    assert soft.item() == pytest.approx(-(0.75 * 9 + 0.25 * 6) / 5)
    half = batch_loss("ga_sampled", one, sampling="random", soft=0.5)
    assert half.item() == pytest.approx(-1.5)


@pytest.mark.parametrize("sampling", ["topk", "bottomk", "random"])
def test_about_the_fraction_is_chosen(sampling: Any) -> None:
    """Of 97 tokens the 0.2 with the highest draw lie above the 0.8 quantile: 19 or 20."""
    values = -torch.rand(50, 97, generator=torch.Generator().manual_seed(1)) - 0.1
    counts = chosen(scores_of(values.tolist()), sampling, 0.2, 3).sum(-1)
    assert set(counts.tolist()) <= {19, 20}


def test_random_choices_depend_on_seed_and_answer_alone() -> None:
    logits, _, labels = random_scores(rows=6, width=40)
    whole = Scores.from_logits(logits, labels)
    expected = draws(whole, 5)
    assert 0.4 < expected[whole.mask].mean() < 0.6
    assert expected[whole.mask].unique().numel() == whole.mask.sum()
    for rows in ([3], [4, 0], [5, 3, 1]):
        part = Scores.from_logits(torch.randn_like(logits[rows]), labels[rows])
        assert torch.equal(draws(part, 5)[part.mask], expected[rows][whole.mask[rows]])
    longer = torch.nn.functional.pad(labels, (2, 3), value=-100)  # a longer prompt, and padding
    wide = Scores.from_logits(torch.zeros(6, 45, 9, dtype=torch.float64), longer)
    assert torch.equal(draws(wide, 5)[wide.mask], expected[whole.mask])
    assert not torch.equal(draws(whole, 6), expected)


def test_annotated_tokens_by_hand() -> None:
    """Losses 1 2 4, the last two important: weights 0.9 on them, 0.1 on the first."""
    one = scores_of([[-1.0, -2.0, -4.0]], [[0, 1, 1]])
    found = batch_loss("ga_annotated", one, important_weight=0.9)
    assert found.item() == pytest.approx(-(0.1 + 0.9 * 6) / 3)
    start = scores_of([[-1.0, -1.0, -1.0]])
    found = batch_loss("npo_annotated", one, start, beta=0.5)
    ratio = -(2.0 + 4.0) + 2.0  # of the important tokens alone
    assert found.item() == pytest.approx(4 * math.log(1 + math.exp(0.5 * ratio)))


def test_npo_forms_agree_where_they_must() -> None:
    logits, other, labels = random_scores()
    policy, reference = (Scores.from_logits(one, labels) for one in (logits, other))
    every = {"sampling": "topk", "fraction": 0.3}
    chosen_share = [
        batch_loss("npo_sampled", policy, reference, soft=s, **every) for s in (0.0, 1.0)
    ]
    assert chosen_share[0] != chosen_share[1]
    both = batch_loss("npo_sampled", policy, reference, soft=0.5, beta=0.2, **every)
    torch.testing.assert_close(both * 2, batch_loss("npo", policy, reference))  # half the ratio
    marked = replace(policy, important=policy.mask)
    found = batch_loss("npo_annotated", marked, reference)
    torch.testing.assert_close(found, batch_loss("npo", policy, reference))
    short = scores_of([[-4.0, -2.0]])
    start = scores_of([[-1.0, -1.0]])
    found = batch_loss("npo", short, start, length_norm=True, beta=0.5)  # ratio -4 / 2 tokens
    assert found.item() == pytest.approx(4 * math.log(1 + math.exp(-1.0)))


def test_limits_of_the_weighted_ascents() -> None:
    """WGA at beta 0 is gradient ascent; SatImp without importance is WGA, without both is GA."""
    logits, other, labels = random_scores()
    ascent = gradient("grad_ascent", logits, labels)
    for name, hyper in {
        "wga": {"beta": 0.0},
        "simsat": {"beta": 0.0},
        "simimp": {"beta": 0.0},
        "satimp": {"beta1": 0.0, "beta2": 0.0},
    }.items():
        torch.testing.assert_close(gradient(name, logits, labels, **hyper), ascent)
    wga = gradient("wga", logits, labels, beta=5.0)
    torch.testing.assert_close(gradient("satimp", logits, labels, beta1=5.0, beta2=0.0), wga)
    torch.testing.assert_close(gradient("simsat", logits, labels, beta=5.0), wga)
    tnpo = gradient("tnpo", logits, labels, other, beta=4.0)
    torch.testing.assert_close(gradient("wtnpo", logits, labels, other, extra=0.0), tnpo)


def test_tnpo_at_the_start_is_gradient_ascent_on_known_tokens() -> None:
    """At policy = reference and p near 1 the weight 2 p / (p + p) is 1."""
    labels = torch.tensor([[-100, 1, 2, 3]])
    known = 12.0 * torch.nn.functional.one_hot(torch.tensor([[1, 2, 3, 0]]), 9).double()
    known.requires_grad_()
    found = gradient("tnpo", known, labels, known.detach())
    torch.testing.assert_close(found, gradient("grad_ascent", known, labels), rtol=1e-4, atol=0)


def test_simnpo_of_uniform_logits() -> None:
    """The mean loss is ln V, so the value is -(2 / beta) log sigmoid(beta ln V)."""
    labels = torch.tensor([[-100, 1, 2, 3]])
    found = batch_loss("simnpo", Scores.from_logits(torch.zeros(1, 4, 9), labels), beta=2.0)
    assert found.item() == pytest.approx(math.log(1 + 9**-2.0))


def test_undial_without_strength_is_still_at_the_start() -> None:
    logits, _, labels = random_scores()
    for name in ("undial", "undial_all_positions"):
        still = gradient(name, logits, labels, logits.detach(), beta=0.0)
        torch.testing.assert_close(still, torch.zeros_like(still), rtol=0, atol=1e-12)
        moved = gradient(name, logits, labels, logits.detach(), beta=3.0)
        assert moved.abs().max() > 1e-3


def test_undial_over_the_whole_input_counts_prompts_but_no_padding() -> None:
    """At a prompt position whose next token is known its logit is lowered too."""
    logits, _, labels = random_scores(rows=1)
    ids = labels.clamp_min(0)
    attended = torch.ones_like(ids)
    attended[:, -2:] = 0  # four more positions are real, but not labelled
    labels = labels.masked_fill(attended == 0, -100)
    batch = {"labels": labels, "input_ids": ids, "attention_mask": attended}
    known = Scores.from_logits(logits, labels, attended)
    tokens = Scores.from_log_probs(known.log_probs, batch).next_tokens
    known = replace(known, next_tokens=tokens)
    loss = batch_loss("undial_all_positions", known, frozen(known), beta=3.0)
    (found,) = torch.autograd.grad(loss, logits)
    moved = found[0].abs().sum(-1) > 1e-9
    assert moved.tolist() == [True] * 17 + [False] * 3  # the last real position predicts nothing


def test_ceu_gradient_by_hand() -> None:
    """It sums to 0 over the vocabulary; at the true token it is p / N, N = 2 later tokens."""
    logits = torch.randn(1, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits.requires_grad_()
    labels = torch.tensor([[-100, 1, 2, 3]])
    found = gradient("ceu", logits, labels)[0]
    torch.testing.assert_close(found.sum(-1), torch.zeros(4, dtype=torch.float64))
    probs = logits.softmax(-1)[0].detach()
    assert (found[0] == 0).all()
    for place, token in ((1, 2), (2, 3)):
        assert found[place, token].item() == pytest.approx(probs[place, token].item() / 2)


def test_max_entropy_and_pdu_by_hand() -> None:
    """KL(uniform || (1/4, 3/4)) = ln(4/3) / 2; logits 3 0 0 have maximum 3 and mean 1."""
    labels = torch.tensor([[-100, 1]])
    skewed = torch.log(torch.tensor([[[0.25, 0.75]] * 2], dtype=torch.float64))
    found = batch_loss("max_entropy", Scores.from_logits(skewed, labels))
    assert found.item() == pytest.approx(math.log(4 / 3) / 2)
    peak = torch.tensor([[[3.0, 0.0, 0.0]] * 2])
    assert batch_loss("pdu", Scores.from_logits(peak, labels)).item() == pytest.approx(4.0)
    flat = Scores.from_logits(torch.full((1, 2, 3), 7.0), labels)
    assert batch_loss("pdu", flat).item() == 0.0
    assert batch_loss("max_entropy", flat).item() == pytest.approx(0.0, abs=1e-6)


def test_the_multiplier_by_hand() -> None:
    """Bound 1.1 * 2 = 2.2; then 10 + 5 (3 - 2.2) = 14, and 14 + 5 (-1 - 2.2) < 0 stays at 0."""
    loss = pdu_retain(multiplier=10.0, step_size=5.0, warmup_epochs=1.0)
    loss.after_step(StepMeans(0.0, 2.0, epoch=0.5))
    assert loss.state_dict() == {"multiplier": 10.0, "bound": 2.2}
    loss.after_step(StepMeans(0.0, 3.0, epoch=1.0))
    assert loss.multiplier == 10.0  # the warm-up includes its last step
    loss.after_step(StepMeans(0.0, 3.0, epoch=1.5))
    assert loss.multiplier == pytest.approx(14.0)
    loss.after_step(StepMeans(0.0, -1.0, epoch=2.0))
    assert loss.multiplier == 0.0
    given = pdu_retain(epsilon=0.3)
    given.after_step(StepMeans(0.0, 2.0, epoch=0.5))
    assert given.bound == 0.3


@pytest.mark.parametrize(
    "name", [name for name, objective in OBJECTIVES.items() if objective.reads == "labelled"]
)
def test_labelled_positions_alone_give_what_whole_logits_give(
    name: str, build_tiny_model: Any
) -> None:
    """Through a model: same value, same gradient of the head, and no [batch, seq, vocab]."""
    model = build_tiny_model().double()
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 300, (3, 9), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 7:] = -100
    attention = torch.ones_like(ids)
    attention[1, 7:] = 0
    batch = {"input_ids": ids, "labels": labels, "attention_mask": attention}
    scorer, found = Scorer.for_model(model), []
    for want in ("labelled", "logits"):
        scores = scorer(model, batch, want={want})
        assert (scores.logits is None) == (want == "labelled")
        reference = frozen(scores) if OBJECTIVES[name].uses_reference else None
        loss = batch_loss(name, scores, reference)
        found.append((loss, torch.autograd.grad(loss, model.lm_head.weight)[0]))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(
        scorer(model, batch, want={"labelled"}).log_probs, scorer(model, batch).log_probs
    )
