"""A dictionary that learns: one optimiser step at a time, on one rank or several."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from unlearn.ranks import Ranks
from unlearn.sae import losses
from unlearn.sae.activation import batch_threshold, feature_thresholds, gated, jump
from unlearn.sae.dictionary import OF_BATCH, Dictionary
from unlearn.sae.settings import CHOICE, UNIT, TrainSettings
from unlearn.sae.sparse import Places, combined, entries
from unlearn.sae.zipf import Zipf, budgets, need

Activation = Float[Tensor, "token width"]
Latents = Float[Tensor, "token latent"]
PerLatent = Shaped[Tensor, " latent"]
Terms = dict[str, tuple[float, Tensor]]
SLOW, QUICK = 0.999, 0.99
"""How much of a running mean stays per step: of one threshold for all; of each latent's."""


@dataclass(frozen=True)
class Told:
    """What a step tells: squared error and penalty per token, L0, share of dead latents."""

    error: float
    penalty: float
    auxiliary: float
    l0: float
    dead: float


class Learner:
    """Parameters, Adam's moments and what is known of each latent.

    ``silent``: tokens since a latent last fired. ``frequency``: share of tokens it fires on, a
    running mean. ``threshold``: running mean of the smallest activation that a batch kept.
    """

    def __init__(
        self, settings: TrainSettings, width: int, ranks: Ranks | None = None, device: Any = "cpu"
    ) -> None:
        self.settings, self.ranks, self.step = settings, ranks or Ranks(), 0
        self.width, self.latents = width, settings.latents(width)
        self.bf16 = torch.device(device).type == "cuda" if settings.bf16 is None else settings.bf16
        self.params = _initial(settings, width, self.latents, device)
        parameters = list(self.params.values())
        self.optimiser = torch.optim.Adam(parameters, betas=(0.9, 0.999), fused=True)
        self.silent = torch.zeros(self.latents, dtype=torch.int64, device=device)
        self.frequency = torch.zeros(self.latents, dtype=torch.float64, device=device)
        self.threshold = torch.full((self.latents,), math.nan, device=device)
        self.zipf: Zipf | None = None

    def begin(self, x: Activation) -> None:
        """Put the decoder's bias at the mean of the first activations (sparsify)."""
        with torch.no_grad():
            self.params["b_dec"].copy_(x.mean(0))

    def learn(self, x: Activation, total: int) -> Told:
        """Take one step on this rank's part of a batch of ``total`` activations."""
        self._fit_zipf()
        rate = self.settings.learning_rate(self.step, self.latents)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad()
        fired, terms = self._few(x, total) if self.settings.kind in UNIT else self._all(x)
        weighted = sum(weight * value.sum() for weight, value in terms.values())
        assert isinstance(weighted, Tensor)
        (weighted / total).backward()
        self._move()
        told = self._count(fired, terms, total)
        self.step += 1
        return told

    def dictionary(self) -> Dictionary:
        """Give the dictionary as it is, of scaled inputs.

        Kinds that choose among a batch are ``jumprelu`` here: that is how they read single tokens
        (dictionary_learning, SAELens). Without a threshold yet they keep their kind.
        """
        found: dict[str, Any] = {name: one.detach().clone() for name, one in self.params.items()}
        kind, k = self.settings.kind, self.settings.k if self.settings.kind in UNIT else None
        if kind == "jumprelu":
            found["threshold"] = found.pop("log_theta").exp()
        elif kind in OF_BATCH and not bool(self.threshold.isnan().all()):
            # a latent without a threshold never had a positive value in a batch
            kind, found["threshold"] = "jumprelu", self.threshold.nan_to_num(0.0)
        return Dictionary(kind, **found, k=k)

    @property
    def dead(self) -> Bool[Tensor, " latent"]:
        """Mark the latents that have not fired for too long."""
        return self.silent >= self.settings.dead_after

    def _view(self) -> Dictionary:
        """Give the parameters as a dictionary, through which gradients flow."""
        found: dict[str, Any] = dict(self.params)
        if "log_theta" in found:
            found["threshold"] = found.pop("log_theta").exp()
        return Dictionary(self.settings.kind, **found, k=self.settings.k)

    def _few(self, x: Activation, total: int) -> tuple[PerLatent, Terms]:
        """Give how often each latent fired, and every loss per token with its weight.

        For the kinds that know how many latents are active: only these are worked with.
        """
        view = self._view()
        centred, bias = x - view.b_dec.detach(), self._bias(view)
        with torch.no_grad(), self._products():
            pre = (centred @ view.w_enc).to(x.dtype).add_(bias)
        places = self._choose(pre, total)
        values = entries(view.w_enc, bias, centred, pre, places).relu()
        error = x - combined(values, places, view.w_dec) - view.b_dec
        terms: Terms = {"error": (1.0, error.square().sum(-1))}
        if self.settings.aux and bool((wanted := self._wanted()).any()):
            lost = self._auxiliary(error, centred, wanted, view)
            terms["auxiliary"] = self.settings.aux, lost
        return torch.bincount(places.latents[values > 0], minlength=self.latents), terms

    def _all(self, x: Activation) -> tuple[PerLatent, Terms]:
        """Give the same for the kinds whose penalties look at every latent."""
        view = self._view()
        with self._products():
            pre = ((x - view.b_dec.detach()) @ view.w_enc).to(x.dtype) + self._bias(view)
        latents = self._active(view, pre)
        with self._products():
            reconstruction = view.decode(latents).to(x.dtype)
        terms: Terms = {"error": (1.0, losses.squared_error(x, reconstruction))}
        return (latents > 0).sum(0), terms | self._penalties(x, pre, latents, view)

    def _bias(self, view: Dictionary) -> PerLatent:
        """Give the encoder's bias, with the gradient of the decoder's added to its own.

        What is added is 0. Taken off every input instead, b_dec would have its gradient from that
        of all inputs: a product as large as the encoder's, of which only the sum is wanted.
        """
        return view.b_enc + (view.b_dec.detach() - view.b_dec) @ view.w_enc.detach()

    def _products(self) -> AbstractContextManager[Any]:
        """Let dense products be of bfloat16 numbers inside the block, where that is asked for."""
        device = self.params["w_enc"].device.type
        return torch.autocast(device, torch.bfloat16) if self.bf16 else nullcontext()

    def _penalties(self, x: Activation, pre: Latents, latents: Latents, view: Dictionary) -> Terms:
        """Give what keeps the kinds sparse whose latents are not counted."""
        how, norms, weight = self.settings, view.norms(), self.settings.sparsity_at(self.step)
        if how.kind != "jumprelu":
            terms: Terms = {"penalty": (weight, losses.l1(pre.relu(), norms))}
            if how.kind == "gated":
                terms["auxiliary"] = 1.0, losses.gate_error(x, pre, view.w_dec, view.b_dec)
            return terms
        assert view.threshold is not None
        if how.jump_penalty == "step":
            sparsity = losses.l0(pre, view.threshold, how.bandwidth)
        else:
            sparsity = losses.tanh_l0(latents, norms)
        pulled = losses.pre_activation(pre, view.threshold, norms, self.dead)
        return {"penalty": (weight, sparsity), "auxiliary": (how.pre_act, pulled)}

    def _active(self, view: Dictionary, pre: Latents) -> Latents:
        how = self.settings
        if how.kind == "relu":
            return pre.relu()
        if how.kind == "gated":
            return gated(pre, view.magnitude(pre))
        assert view.threshold is not None
        return jump(pre, view.threshold, how.bandwidth)

    @torch.no_grad()
    def _choose(self, pre: Latents, total: int) -> Places:
        how = self.settings
        if how.kind == "topk":
            return Places.of_top(pre.topk(how.k, sorted=False).indices)
        if how.kind == "feature" and self.zipf:
            counts = budgets(self.zipf.of_latents(self.frequency), how.k * total)
            smallest = feature_thresholds(pre, counts, self.ranks)
            self._raise(smallest, QUICK)
        else:
            smallest = batch_threshold(pre, how.k * total, self.ranks).expand(self.latents)
            self._raise(smallest, SLOW)
        return Places.of_mask(pre >= smallest)

    def _raise(self, smallest: Float[Tensor, " latent"], keep: float) -> None:
        """Let thresholds follow the smallest activation kept; NaN tells nothing.

        A running mean from its first value would hold on to it for ``1 / (1 - keep)`` steps, longer
        than a short training lasts: until then it is the plain mean.
        """
        how = self.settings
        own = how.kind == "feature" and self.zipf
        age = self.step - max(how.threshold_step, how.choice_step if own else 0)
        if age < 0:
            return
        keep = min(keep, age / (age + 1))
        fresh = self.threshold.isnan()
        moved = torch.where(fresh, smallest, keep * self.threshold + (1 - keep) * smallest)
        self.threshold = torch.where(smallest.isnan(), self.threshold, moved)

    def _wanted(self) -> PerLatent:
        """Mark the dead latents; once there is a law, say how much each is to be helped, 0 to 1."""
        if self.zipf is None:
            return self.dead
        expected = (self.settings.k * self.zipf.of_latents(self.frequency)).clamp(max=1.0)
        return need(self.frequency, expected).float()

    def _auxiliary(
        self, error: Activation, centred: Activation, wanted: PerLatent, view: Dictionary
    ) -> Tensor:
        """Give AuxK or aux_zipf, from the latents it is about: the others would add 0."""
        chosen = wanted.nonzero()[:, 0]
        with self._products():
            pre = (centred @ view.w_enc[:, chosen]).to(error.dtype) + self._bias(view)[chosen]
        loss = losses.aux_zipf if self.zipf else losses.aux_k
        k_aux = self.settings.k_aux or max(1, self.width // 2)
        return loss(error, pre, view.w_dec[chosen], wanted[chosen], k_aux)

    def _fit_zipf(self) -> None:
        """Fit the law once the warm-up is over; thresholds of one latent each begin anew."""
        if self.settings.kind in CHOICE and self.step == self.settings.choice_step:
            self.zipf = Zipf.fit(self.frequency[~self.dead])
            if self.settings.kind == "feature":
                self.threshold = torch.full_like(self.threshold, math.nan)

    @torch.no_grad()
    def _move(self) -> None:
        """Add the gradients of all ranks, take Adam's step, keep directions at length 1.

        Before it, what would change their lengths is taken out of the gradient (sparsify).
        """
        for parameter in self.params.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.ranks.size > 1:
                parameter.grad.copy_(self.ranks.add(parameter.grad))
        directions = self.params["w_dec"]
        if self.settings.kind not in UNIT:
            self.optimiser.step()
            return
        assert directions.grad is not None
        along = torch.linalg.vecdot(directions.grad, directions)
        directions.grad.addcmul_(along[:, None], directions, value=-1)
        self.optimiser.step()
        directions /= directions.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def _count(
        self, fired: PerLatent, terms: Mapping[str, tuple[float, Tensor]], total: int
    ) -> Told:
        fired = self.ranks.add(fired)
        self.silent = torch.where(fired > 0, 0, self.silent + total)
        now = fired.double() / total
        self.frequency = now if self.step == 0 else QUICK * self.frequency + (1 - QUICK) * now
        names = ("error", "penalty", "auxiliary")
        sums = [
            terms[n][1].detach().double().sum() if n in terms else now.new_zeros(()) for n in names
        ]
        error, penalty, auxiliary = (self.ranks.add(torch.stack(sums)) / total).tolist()
        l0, dead = float(fired.sum()) / total, float(self.dead.double().mean())
        return Told(error, penalty, auxiliary, l0, dead)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Give all that the next steps depend on: tensors, and plain values."""
        found = {f"params.{name}": one.detach() for name, one in self.params.items()}
        for name, parameter in self.params.items():
            for key, value in self.optimiser.state[parameter].items():
                found[f"adam.{key}.{name}"] = value
        for name in ("silent", "frequency", "threshold"):
            found[name] = getattr(self, name)
        zipf = [self.zipf.alpha, self.zipf.beta] if self.zipf else None
        return found, {"step": self.step, "zipf": zipf}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from a state."""
        with torch.no_grad():
            for name, parameter in self.params.items():
                parameter.copy_(tensors[f"params.{name}"])
                self.optimiser.state[parameter] = {
                    key: tensors[f"adam.{key}.{name}"].to(parameter.device, copy=True)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        for name in ("silent", "frequency", "threshold"):
            setattr(self, name, tensors[name].to(self.silent.device))
        self.step = int(values["step"])
        self.zipf = Zipf(*values["zipf"]) if values["zipf"] else None


def _initial(settings: TrainSettings, width: int, latents: int, device: Any) -> dict[str, Tensor]:
    """Draw directions of length 1; the encoder begins as the decoder's transpose (sparsify)."""
    generator = torch.Generator().manual_seed(settings.seed)
    directions = torch.randn(latents, width, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    found = {
        "w_enc": directions.t().contiguous(),
        "b_enc": torch.zeros(latents),
        "w_dec": directions,
        "b_dec": torch.zeros(width),
    }
    if settings.kind == "jumprelu":
        found["log_theta"] = torch.full((latents,), math.log(settings.theta))
    if settings.kind == "gated":
        found |= {"r_mag": torch.zeros(latents), "b_mag": torch.zeros(latents)}
    return {name: one.clone().to(device).requires_grad_() for name, one in found.items()}
