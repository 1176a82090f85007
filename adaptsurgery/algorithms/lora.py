"""LoRA: Δ = up·down (arXiv 2106.09685), on convolutions as LoCon, with a Tucker core as LyCORIS's.

linear     up (o, r)            down (r, i)
conv       up (o, r[, 1, …])    down (r, i, *k)
tucker     up (o, p[, 1, …])    mid (p, q, *k)    down (q, i[, 1, …])
           Δ[o, i, k] = Σ up[o, p] mid[p, q, k] down[q, i]      (LyCORIS, arXiv 2309.14859)
embedding  up (dim, r)          down (r, vocab)
up_bias    (o,), scaled as Δ is (PEFT's lora_bias)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptsurgery.core.cost import ApplyForm
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.linalg import Approximation, split, truncate_factors
from adaptsurgery.core.update import Delta, axis_norms
from adaptsurgery.nearest.goal import Fit, Goal, cut_down, difference, error_of, norm_of, rank_for
from adaptsurgery.nearest.lanczos import Leading, leading, leading_until

SWEEPS, SETTLED = 20, 1e-5  # of the Tucker iteration: at most; a gain of ‖D‖² that ends it


class Truncation(NamedTuple):
    """A LoRA, and ‖Δ − Δ̂‖ / ‖Δ‖ of its exact numbers, before they were rounded to its dtype."""

    lora: LoRA
    error: float


@dataclass(frozen=True, eq=False)
class LoRA(Delta):
    """Δ = up·down; see the module's docstring for the shapes. Raises ShapeError where they misfit."""

    up: Tensor
    down: Tensor
    mid: Tensor | None = None
    up_bias: Tensor | None = None

    name: ClassVar[str] = "lora"

    @classmethod
    def of_factors(
        cls, up: Tensor, down: Tensor, shape: tuple[int, ...], scale: float = 1.0
    ) -> LoRA:
        """The LoRA of two matrices (o, r), (r, i·∏k) for a weight ``shape`` (o, i, *k)."""
        ones = (1,) * (len(shape) - 2)
        return cls(
            up.reshape(*up.shape, *ones), down.reshape(down.shape[0], *shape[1:]), scale=scale
        )

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def extent(self) -> tuple[int, int]:
        kernel = () if self.mid is None else self.mid.shape[2:]
        return self.up.shape[0], math.prod(self.down.shape[1:]) * math.prod(kernel)

    @property
    def kernel(self) -> tuple[int, ...] | None:
        return tuple((self.down if self.mid is None else self.mid).shape[2:])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight_shape or (self.up.shape[0], self.down.shape[1], *(self.kernel or ()))

    def misfit(self) -> str:
        if self.up.dim() < 2 or self.down.dim() < 2 or set(self.up.shape[2:]) > {1}:
            return "up is (o, r[, 1, …]) and down (r, i, *k)"
        if self.mid is None:
            if self.up.shape[1] != self.down.shape[0]:
                return "up (o, r) and down (r, i, *k) differ in r"
        elif self.mid.shape[:2] != (self.up.shape[1], self.down.shape[0]):
            return "mid is not (p, q, *k) between up (o, p) and down (q, i)"
        elif math.prod(self.down.shape[2:]) != 1:
            return "down beside mid is (r, i[, 1, …])"
        if self.up_bias is not None and self.up_bias.shape != (self.up.shape[0],):
            return "up_bias is not (o,)"
        return ""

    def flat(self) -> LoRA:
        """The same Δ without a Tucker core: mid folded into down, exactly. down (r, i, *k)."""
        if self.mid is None:
            return self
        down = torch.einsum("pq...,qi->pi...", self.mid, self.down.flatten(1))
        return replace(self, down=down, mid=None, weight_shape=self.shape)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Two matrices (o, r), (r, i·∏k) whose product is Δ."""
        flat = self.flat()
        return flat.up.flatten(1), flat.down.flatten(1)

    def matrix(self) -> Tensor:
        up, down = self.factors()
        return up @ down

    def add_rows_(self, block: Tensor, start: int, stop: int, factor: float) -> None:
        block.addmm_(self.up[start:stop], self.down, alpha=factor)

    def prepared(self, dtype: torch.dtype, device: torch.device | None = None) -> LoRA:
        """The same Δ, cast, as two matrices."""
        up, down = self.cast(dtype, device).factors()
        return LoRA(up, down, scale=self.scale, up_bias=self.up_bias)

    def transposed(self) -> LoRA:
        up, down = self.factors()
        return LoRA(down.t().contiguous(), up.t().contiguous(), scale=self.scale)

    def bias_delta(self) -> Tensor | None:
        return self.up_bias

    def delta(self, x: Tensor, layer: Layer, form: ApplyForm = "factored") -> Tensor:
        """Two layers, down with the layer's geometry and up pointwise; three with a Tucker core."""
        ready = self.like(layer.sample(x))
        kernel = layer.shape[2:]
        up = ready.up.flatten(1)
        if ready.mid is None:
            down = (
                ready.down.reshape(self.rank, *layer.shape[1:]) if kernel else ready.down.flatten(1)
            )
            return layer.low_rank(x, up, down)
        mid = ready.mid.reshape(*ready.mid.shape[:2], *kernel)
        return layer.low_rank(x, up, ready.down.flatten(1), mid)

    def norms(self, weight: Tensor, axis: int) -> Tensor:
        """The norms from Gram matrices: ‖W‖² + 2s⟨W, Δ⟩ + s²‖Δ‖², each over one axis, Δ never built."""
        up, down = self.like(weight).factors()
        wide = weight.flatten(1)
        if axis == 0:
            cross, own = F.linear(down, wide).t() * up, up @ (down @ down.t()) * up
        else:
            cross, own = (up.t() @ wide * down).t(), ((up.t() @ up) @ down * down).t()
        per_line = (2 * self.scale * cross + self.scale**2 * own).sum(1)
        added = (
            per_line if axis == 0 else torch.unflatten(per_line, 0, (weight.shape[1], -1)).sum(1)
        )
        return (axis_squares(weight, axis) + added).clamp_min(0).sqrt()

    def to_lora(self) -> LoRA:
        """A LoRA without a Tucker core."""
        return self.flat()

    def truncated(self, rank: int, dtype: torch.dtype | None = None) -> Truncation:
        """The nearest LoRA of ``rank`` (Eckart–Young), by QR of both factors. Keeps the scale.

        It has the factors' dtype, float32 at least, unless ``dtype`` says. ShapeError for rank < 1.
        """
        approximation = truncate_factors(*self.cast(torch.float64).factors(), rank)
        return truncation(approximation, self, dtype, self.up_bias)


def truncation(
    approximation: Approximation,
    source: Delta,
    dtype: torch.dtype | None,
    up_bias: Tensor | None = None,
) -> Truncation:
    """Factors found for ``source``, as a LoRA of its shape and scale."""
    lora = LoRA.of_factors(approximation.up, approximation.down, source.shape, source.scale)
    lora = lora.cast(dtype or source.wide_dtype())
    return Truncation(replace(lora, up_bias=up_bias), approximation.error)


def axis_squares(weight: Tensor, axis: int) -> Tensor:
    """The squared norm of every output (``axis`` 0) or input (1) of a weight (o, i, *k)."""
    norms: Tensor = axis_norms(weight, axis)  # without a squared copy of the weight
    return norms.square()


def fit(base: Tensor, tuned: Tensor, goal: Goal, *, seed: int = 0, tucker: bool = False) -> Fit:
    """The best LoRA of D = W1 − W0 by its truncated SVD (Eckart–Young), and its error.

    Scale 1 (alpha = rank), up and down of equal norms, nothing clamped; in float32, float64 where a
    weight is. A kernel is part of down (o, r) · (r, i·∏k), or with ``tucker`` in a core of its own,
    by higher-order orthogonal iteration (De Lathauwer et al., SIAM J. Matrix Anal. Appl. 21, 2000):
    fewer numbers a rank, and at equal numbers a larger error. Raises what ``difference`` and
    ``rank_for`` do.
    """
    delta = difference(base, tuned)
    if tucker and math.prod(delta.shape[2:]) > 1:
        return _fit_tucker(delta, goal, seed)
    matrix = delta.flatten(1)
    o, n = matrix.shape
    if goal.most_error is not None:
        triples = leading_until(matrix, goal.met_by, seed=seed)
    else:
        rank = rank_for(goal, most=min(o, n), parameters=lambda r: r * (o + n), error_at=_unasked)
        triples = leading(matrix, rank, seed=seed)
    up, down, _ = split(triples.u, triples.s, triples.vt, 0.0)
    lora = LoRA.of_factors(up, down, tuple(delta.shape)).cast(delta.dtype)
    notes = (*cut_down(goal, lora.rank), *_zeros(triples))
    if tucker:
        notes = (*notes, "a kernel of one position has no Tucker core: this is a plain LoRA")
    return _as_fit(lora, delta, triples.s, notes)


def _unasked(rank: int) -> float:
    raise AssertionError("a rank and a budget ask for no error")


def _zeros(triples: Leading) -> tuple[str, ...]:
    """A note where D has a lower rank than the LoRA."""
    alive = int((triples.s > 1e-6 * triples.s[0]).sum())
    if alive in (0, len(triples.s)):
        return ()
    return (f"the difference has rank {alive} up to rounding: a larger one adds nothing",)


def _as_fit(lora: LoRA, delta: Tensor, spectrum: Tensor, notes: tuple[str, ...]) -> Fit:
    parameters = sum(t.numel() for t in lora.tensors().values())
    return Fit(
        lora, error_of(lora, delta), norm_of(delta), lora.rank, parameters, spectrum, notes=notes
    )


def _fit_tucker(delta: Tensor, goal: Goal, seed: int) -> Fit:
    """The Tucker LoRA for a goal, with one rank on both sides, as the layouts have it."""
    o, i, k = delta.shape[0], delta.shape[1], math.prod(delta.shape[2:])
    spectrum = leading(delta.flatten(1), min(64, o, i * k), seed=seed).s

    @cache
    def attempt(rank: int) -> Fit:
        return _as_fit(_tucker(delta, rank, seed), delta, spectrum, cut_down(goal, rank))

    rank = rank_for(
        goal,
        most=max(min(o, i * k), min(i, o * k)),
        parameters=lambda r: r * (o + i) + r * r * k,
        error_at=lambda r: attempt(r).error,
    )
    return attempt(rank)


@torch.no_grad()
def _tucker(delta: Tensor, rank: int, seed: int) -> LoRA:
    """Higher-order orthogonal iteration: each side's best space, given the other's, in turn.

    It starts from the one-shot decomposition (HOSVD) and no step captures less. A side that has
    fewer than ``rank`` channels gets zeros, so that the core is square. Three factors of equal norm.
    """
    cube = delta.flatten(2)
    left = leading(cube.flatten(1), rank, seed=seed).u.to(cube)
    right = leading(cube.transpose(0, 1).flatten(1), rank, seed=seed).u.to(cube)
    total, captured = norm_of(cube) ** 2, 0.0
    for _ in range(SWEEPS):
        half = torch.einsum("oik,iq->oqk", cube, right)
        left = leading(half.flatten(1), rank, seed=seed).u.to(cube)
        half = torch.einsum("oik,op->ipk", cube, left)
        step = leading(half.flatten(1), rank, seed=seed)
        right, before, captured = step.u.to(cube), captured, float(step.s.square().sum())
        if captured - before <= SETTLED * total:
            break
    core = torch.einsum("ipk,iq->pqk", half.double(), right.double())
    parts = [_padded(left, rank), _padded(right, rank).t()]
    mid = F.pad(core, (0, 0, 0, rank - core.shape[1], 0, rank - core.shape[0]))
    up, down, mid = _balanced(parts[0], parts[1], mid)
    ones = (1,) * (delta.dim() - 2)
    return LoRA(
        up.reshape(-1, rank, *ones),
        down.reshape(rank, -1, *ones),
        mid.reshape(rank, rank, *delta.shape[2:]),
    ).cast(delta.dtype)


def _padded(columns: Tensor, rank: int) -> Tensor:
    wide: Tensor = F.pad(columns.double(), (0, rank - columns.shape[1]))
    return wide


def _balanced(*factors: Tensor) -> list[Tensor]:
    """The factors at one norm, their product the same."""
    norms = [norm_of(factor) for factor in factors]
    if not all(norms):
        return list(factors)
    mean = math.exp(sum(map(math.log, norms)) / len(norms))
    return [factor * (mean / norm) for factor, norm in zip(factors, norms)]
