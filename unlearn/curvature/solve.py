"""Damped inverses of the curvature of one layer, and its product with a change of the weight."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from unlearn.curvature.blocks import Blocks
from unlearn.curvature.damping import Damping, factored
from unlearn.curvature.factors import LayerCurvature
from unlearn.errors import RunFailed

RESIDUAL = 1e-3
"""Largest relative residual of a solution; above it the solution is worked out in fp64."""
RAISES = 6
"""How often the damping of a matrix that is not positive definite is multiplied by 10."""

SPARE, ROUNDS = 4, 20
"""Vectors beyond those asked for, and products, when the largest eigenvalues are looked for."""

Weight = Float[Tensor, "out in"]


@runtime_checkable
class Inverse(Protocol):
    """The damped inverse of one layer's block H of the curvature.

    ``damping`` is λ. ``solve`` gives (H + λI)⁻¹g, ``product`` Hδ without the damping, ``damped``
    (H + λI)δ, all as [out, in]. ``bend`` is the number δᵀHδ.
    """

    @property
    def damping(self) -> float: ...
    def solve(self, grad: Weight) -> Weight: ...
    def product(self, change: Weight) -> Weight: ...
    def damped(self, change: Weight) -> Weight: ...
    def bend(self, change: Weight) -> float: ...


def inverse(layer: LayerCurvature, damping: Damping) -> Inverse:
    """Factorise a layer's curvature: by Cholesky where damping keeps the product form, else eigen.

    A layer whose curvature is 0 has no finite step: it is left alone, with a warning.
    """
    if _is_zero(layer):
        warnings.warn("a layer has no curvature at all: it is left as it is", stacklevel=2)
        return Nothing()
    if layer.eigenvalues is not None:
        amount = damping.amount(trimmed_mean(layer.eigenvalues.flatten(), damping.trim))
        return EigenInverse(layer.eigenvalues, layer.output_basis, layer.input_basis, amount)
    assert layer.inputs is not None
    if layer.outputs is None:
        amount = damping.amount(mean_eigenvalue(layer.inputs, damping.trim))
        return KroneckerInverse.of(layer.inputs, None, amount, 0.0, amount)
    outputs, correction = layer.outputs, trace_correction(layer)
    if correction != 1.0:
        outputs = outputs.mapped(lambda part: part * correction)
    mean_in, mean_out = (mean_eigenvalue(one, damping.trim) for one in (layer.inputs, outputs))
    amount = damping.amount(mean_in * mean_out)
    if damping.kind == "factored":
        added = factored(mean_in, mean_out, damping.c)
        return KroneckerInverse.of(layer.inputs, outputs, *added, amount)
    return eigen_inverse(layer.inputs, outputs, amount)


def trace_correction(layer: LayerCurvature) -> float:
    """Give tr(H) / (tr(A) tr(G)) where the trace of the block is known, else 1."""
    if layer.trace is None or layer.inputs is None or layer.outputs is None:
        return 1.0
    return layer.trace / (layer.inputs.trace() * layer.outputs.trace())


def trimmed_mean(values: Float[Tensor, " size"], trim: int) -> float:
    """Give the mean of values without the ``trim`` largest, of which one at least is left."""
    trim = min(trim, len(values) - 1)
    total = values.double().sum() - values.topk(trim).values.double().sum()
    return max(float(total), 0.0) / (len(values) - trim)


def mean_eigenvalue(factor: Blocks, trim: int) -> float:
    """Give the mean of a factor's eigenvalues without the ``trim`` largest."""
    if not trim:
        return factor.trace() / factor.size
    tops = [_largest(part, min(trim, len(part))) for part in factor.parts]
    rest = torch.cat(tops).topk(min(trim, factor.size - 1)).values
    return max(factor.trace() - float(rest.sum()), 0.0) / (factor.size - len(rest))


def _largest(part: Float[Tensor, "size size"], number: int) -> Float[Tensor, " number"]:
    """Give the largest eigenvalues by subspace iteration, from a fixed start."""
    draw = torch.Generator().manual_seed(0)
    ahead = torch.randn(len(part), min(len(part), number + SPARE), generator=draw).to(part)
    for _ in range(ROUNDS):
        ahead = torch.linalg.qr(part @ ahead)[0]
    return torch.linalg.eigvalsh((ahead.t() @ part @ ahead).double()).flip(0)[:number]


def _is_zero(layer: LayerCurvature) -> bool:
    if layer.eigenvalues is not None:
        return not bool(layer.eigenvalues.any())
    return any(one is not None and one.trace() <= 0 for one in (layer.inputs, layer.outputs))


@dataclass(frozen=True)
class Nothing:
    """The inverse that gives no step."""

    damping: float = 0.0

    def solve(self, grad: Weight) -> Weight:
        return torch.zeros_like(grad)

    def product(self, change: Weight) -> Weight:
        return torch.zeros_like(change)

    def damped(self, change: Weight) -> Weight:
        return torch.zeros_like(change)

    def bend(self, change: Weight) -> float:
        return 0.0


@dataclass(frozen=True)
class EigenInverse:
    """H = Q diag(Λ) Qᵀ with Q = Q_G ⊗ Q_A; without bases H is Λ itself, weight by weight."""

    eigenvalues: Weight
    output_basis: Blocks | None
    input_basis: Blocks | None
    damping: float

    def solve(self, grad: Weight) -> Weight:
        return self._scaled(grad, lambda values: values / (self.eigenvalues + self.damping))

    def product(self, change: Weight) -> Weight:
        return self._scaled(change, lambda values: values * self.eigenvalues)

    def damped(self, change: Weight) -> Weight:
        return self._scaled(change, lambda values: values * (self.eigenvalues + self.damping))

    def bend(self, change: Weight) -> float:
        """Σ Λ(Qᵀδ)²: half of the products that Hδ takes."""
        if self.output_basis is not None and self.input_basis is not None:
            change = both_sides(change, self.output_basis, self.input_basis)
        return float((self.eigenvalues * change.square()).sum(dtype=torch.float64))

    def _scaled(self, weight: Weight, scale: Callable[[Tensor], Tensor]) -> Weight:
        if self.output_basis is None or self.input_basis is None:
            return scale(weight)
        turned = both_sides(weight, self.output_basis, self.input_basis)
        back = [one.mapped(torch.t) for one in (self.output_basis, self.input_basis)]
        return both_sides(scale(turned), *back)


def both_sides(weight: Weight, left: Blocks, right: Blocks) -> Weight:
    """Give Lᵀ W R."""
    return left.after(right.after(weight).t()).t()


def eigen_inverse(inputs: Blocks, outputs: Blocks, damping: float) -> EigenInverse:
    """Turn G ⊗ A into its eigenbasis; λ is added to the product of the eigenvalues."""
    values_in, basis_in = eigen(inputs)
    values_out, basis_out = eigen(outputs)
    return EigenInverse(values_out[:, None] * values_in, basis_out, basis_in, damping)


def eigen(factor: Blocks) -> tuple[Float[Tensor, " size"], Blocks]:
    """Give the eigenvalues, not below 0, and eigenvectors of every block."""
    values = [eigenvectors(part) for part in factor.parts]
    spectrum = [
        (basis * (part @ basis)).sum(0).clamp_min(0)
        for basis, part in zip(values, factor.parts, strict=True)
    ]
    return torch.cat(spectrum), Blocks(tuple(values))


def eigenvectors(part: Float[Tensor, "size size"]) -> Float[Tensor, "size size"]:
    """Give the eigenvectors of a symmetric matrix, worked out in fp64.

    In fp32 the solvers of CUDA fail on large matrices of low rank. Where fp64 fails too, the CPU
    is asked.
    """
    if part.device.type == "cpu":
        return _eigenvectors_on_cpu(part)
    try:
        return torch.linalg.eigh(part.double())[1].to(part)
    except LinAlgError:
        return _eigenvectors_on_cpu(part).to(part)


def _eigenvectors_on_cpu(part: Tensor) -> Tensor:
    """Ask SciPy's LAPACK: up to 1.6 times as fast as torch's on AMD, and in one matrix less."""
    double = part.to("cpu", torch.float64, copy=True).numpy()
    # transposed it is in Fortran's order, and is overwritten where it lies
    _, found = scipy.linalg.eigh(double.T, driver="evd", overwrite_a=True, check_finite=False)
    return torch.from_numpy(found).to(part.dtype).contiguous()


@dataclass(frozen=True)
class KroneckerInverse:
    """(G + γI) ⊗ (A + αI), inverted by Cholesky factors; without G it is I ⊗ (A + αI)."""

    inputs: Blocks
    outputs: Blocks | None
    damped_inputs: Blocks
    damped_outputs: Blocks | None
    roots: tuple[Blocks, Blocks | None]
    damping: float

    @classmethod
    def of(
        cls,
        inputs: Blocks,
        outputs: Blocks | None,
        to_inputs: float,
        to_outputs: float,
        damping: float,
    ) -> "KroneckerInverse":
        """Add damping to both factors and factorise them."""
        right, root = positive(inputs, to_inputs)
        left, other = (None, None) if outputs is None else positive(outputs, to_outputs)
        return cls(inputs, outputs, right, left, (root, other), damping)

    def solve(self, grad: Weight) -> Weight:
        """Solve both sides, refine once, and go to fp64 where that is not enough."""
        found = self._once(grad)
        found = found + self._once(grad - self.damped(found))
        if residual(self, found, grad) < RESIDUAL:
            return found
        return self._in_double().solve(grad.double()).to(grad) if _is_single(grad) else found

    def product(self, change: Weight) -> Weight:
        return _sides(change, self.outputs, self.inputs)

    def damped(self, change: Weight) -> Weight:
        return _sides(change, self.damped_outputs, self.damped_inputs)

    def bend(self, change: Weight) -> float:
        return float((change * self.product(change)).sum(dtype=torch.float64))

    def _once(self, grad: Weight) -> Weight:
        right, left = self.roots
        found = _solved(right, grad.t()).t()
        return found if left is None else _solved(left, found)

    def _in_double(self) -> "KroneckerInverse":
        def double(one: Blocks | None) -> Blocks | None:
            return one and one.mapped(Tensor.double)

        right, root = positive(self.damped_inputs.mapped(Tensor.double), 0.0)
        pair: tuple[Blocks | None, Blocks | None] = (None, None)
        if self.damped_outputs is not None:
            pair = positive(self.damped_outputs.mapped(Tensor.double), 0.0)
        inputs = self.inputs.mapped(Tensor.double)
        return KroneckerInverse(
            inputs, double(self.outputs), right, pair[0], (root, pair[1]), self.damping
        )


def positive(factor: Blocks, added: float) -> tuple[Blocks, Blocks]:
    """Give a factor with ``added`` on its diagonal, and the Cholesky factors of its blocks.

    Where rounding has made a block indefinite, what is added is multiplied by 10, with a warning.
    """
    pairs = [_positive_part(part, added) for part in factor.parts]
    return Blocks(tuple(pair[0] for pair in pairs)), Blocks(tuple(pair[1] for pair in pairs))


def _positive_part(part: Tensor, added: float) -> tuple[Tensor, Tensor]:
    floor = float(part.diagonal().double().mean()) * torch.finfo(part.dtype).eps
    for raised in range(RAISES + 1):
        damped = part.clone()
        damped.diagonal().add_(max(added, floor * raised) * 10**raised)
        root, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            if raised:
                warnings.warn(
                    f"damping was multiplied by {10**raised} to invert a factor of size "
                    f"{len(part)}",
                    stacklevel=2,
                )
            return damped, root
    raise RunFailed(f"a factor of size {len(part)} cannot be inverted", "give a larger damping")


def residual(operator: Inverse, found: Weight, grad: Weight) -> float:
    """Give ‖g − (H + λI)δ‖ / ‖g‖; infinite where the solution is not finite."""
    norm = float(grad.double().norm())
    left = float((grad - operator.damped(found)).double().norm())
    if norm == 0:
        return 0.0
    return left / norm if left == left else float("inf")


def _solved(roots: Blocks, right: Float[Tensor, "size other"]) -> Float[Tensor, "size other"]:
    pieces = zip(right.split(roots.widths), roots.parts, strict=True)
    return torch.cat([torch.cholesky_solve(piece, root) for piece, root in pieces])


def _sides(weight: Weight, left: Blocks | None, right: Blocks) -> Weight:
    return right.after(weight) if left is None else both_sides(weight, left, right)


def _is_single(values: Tensor) -> bool:
    return values.dtype == torch.float32
