"""LoHa: Δ = (w1_a·w1_b) ∘ (w2_a·w2_b), the Hadamard product of two low-rank matrices.

FedPara (arXiv 2108.06098), as LyCORIS (arXiv 2309.14859) and PEFT write it:

    flat    w1_a, w2_a (o, r)    w1_b, w2_b (r, i·∏k)
    tucker  w1_a, w2_a (r, o)    w1_b, w2_b (r, i)       t1, t2 (r, r, *k)      (FedPara, prop. 3)
            half[o, i, k] = Σ t[p, q, k] a[p, o] b[q, i]

With P[o, (p, q)] = w1_a[o, p]·w2_a[o, q] and Q[(p, q), n] = w1_b[p, n]·w2_b[q, n] (Khatri–Rao)
Δ = P·Q exactly: a LoRA of rank r².

``fit`` and ``extract`` find a LoHa near the difference of two weights (nearest/hadamard.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from adaptsurgery.algorithms.lora import LoRA, Truncation
from adaptsurgery.core.config import LycorisConfig, Shapes, kaiming_
from adaptsurgery.core.cost import ApplyForm, price
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.update import Delta
from adaptsurgery.nearest.goal import Fit, Goal, cut_down, difference, error_of, rank_for
from adaptsurgery.nearest.hadamard import nearest_product
from adaptsurgery.nearest.scaling import full_norm, in_range, powers

HALF = 128 * 1024  # numbers of each half of Δ that are built at a time


@dataclass(frozen=True, eq=False)
class LoHa(Delta):
    """Δ = (w1_a·w1_b) ∘ (w2_a·w2_b); see the module's docstring for the shapes."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None

    name: ClassVar[str] = "loha"

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def extent(self) -> tuple[int, int]:
        if self.t1 is None:
            return self.w1_a.shape[0], self.w1_b.shape[1]
        return self.w1_a.shape[1], self.w1_b.shape[1] * self.t1.shape[2:].numel()

    @property
    def kernel(self) -> tuple[int, ...] | None:
        if self.t1 is not None:
            return tuple(self.t1.shape[2:])
        return self.weight_shape[2:] if self.weight_shape else None

    def misfit(self) -> str:
        if (self.t1 is None) != (self.t2 is None):
            return "t1 and t2 stand together or not at all"
        if {self.w1_a.dim(), self.w1_b.dim(), self.w2_a.dim(), self.w2_b.dim()} != {2}:
            return "w*_a and w*_b are matrices"
        if self.w1_a.shape != self.w2_a.shape or self.w1_b.shape != self.w2_b.shape:
            return "the halves w1_a·w1_b and w2_a·w2_b differ in shape"
        if self.w1_a.shape[0 if self.t1 is not None else 1] != self.rank:
            return "w*_a (o, r), or (r, o) beside t*, and w*_b (r, n) differ in r"
        if self.t1 is not None and self.t2 is not None:
            square = self.t1.shape[:2] == (self.rank, self.rank)
            if not square or self.t1.shape != self.t2.shape:
                return "t1 and t2 are not both (r, r, *k)"
        return ""

    def flat(self) -> LoHa:
        """The same Δ without Tucker cores, at the same rank, exactly: t folded into b, a turned."""
        if self.t1 is None:
            return self
        assert self.t2 is not None
        w1_b = torch.einsum("pq...,qi->pi...", self.t1, self.w1_b).flatten(1)
        w2_b = torch.einsum("pq...,qi->pi...", self.t2, self.w2_b).flatten(1)
        return LoHa(
            self.w1_a.t(), w1_b, self.w2_a.t(), w2_b, scale=self.scale, weight_shape=self.shape
        )

    def matrix(self) -> Tensor:
        flat = self.flat()
        return (flat.w1_a @ flat.w1_b) * (flat.w2_a @ flat.w2_b)

    def add_rows_(self, block: Tensor, start: int, stop: int, factor: float) -> None:
        """Some rows at a time: both halves of Δ stay in cache, in memory that is used again."""
        step = max(1, min(HALF // max(block.shape[1], 1), stop - start))
        halves = block.new_empty((2, step, block.shape[1]))
        for at in range(start, stop, step):
            rows = slice(at, min(at + step, stop))
            first, second = halves[:, : rows.stop - at]
            torch.mm(self.w1_a[rows], self.w1_b, out=first)
            torch.mm(self.w2_a[rows], self.w2_b, out=second)
            block[at - start : rows.stop - start].addcmul_(first, second, value=factor)

    def transposed(self) -> LoHa:
        flat = self.flat()
        factors = (flat.w1_b, flat.w1_a, flat.w2_b, flat.w2_a)
        return LoHa(*(factor.t().contiguous() for factor in factors), scale=self.scale)

    def khatri_rao(self) -> tuple[Tensor, Tensor]:
        """P (o, r²), Q (r², i·∏k) with P·Q = Δ."""
        flat = self.flat()
        up = (flat.w1_a.unsqueeze(2) * flat.w2_a.unsqueeze(1)).flatten(1)
        down = (flat.w1_b.unsqueeze(1) * flat.w2_b).flatten(0, 1)
        return up, down

    def delta(self, x: Tensor, layer: Layer, form: ApplyForm = "factored") -> Tensor:
        """Δ·x by Khatri–Rao factors; "bilinear" (linear layers, few tokens) builds not even those:

        y[o] = Σ w1_a[o, p] M[p, q] w2_a[o, q] with M = w1_b·diag(x)·w2_bᵀ, one (r, r) a token.
        """
        ready = self.like(layer.sample(x)).flat()
        if form == "bilinear":
            between = (x.unsqueeze(-2) * ready.w1_b) @ ready.w2_b.t()
            return (torch.matmul(ready.w1_a, between) * ready.w2_a).sum(-1)
        up, down = ready.khatri_rao()
        return layer.low_rank(x, up, down.reshape(self.rank**2, *layer.shape[1:]))

    def prices(self, positions: int, layer: Layer, training: bool) -> dict[ApplyForm, int]:
        r, (o, n) = self.rank, self.extent
        factors = r * r * (o + n)
        prices: dict[ApplyForm, int] = {
            "factored": price(factors * (1 + positions), 2 * factors + positions * (2 * r * r + o)),
            "folded": self.folding_price((2 * r + 1) * o * n, positions, training),
        }
        if layer.kind == "linear":
            products = r * n + r * r * n + r * r * o + r * o
            prices["bilinear"] = price(positions * products, positions * r * (n + 2 * o))
        return prices

    def to_lora(self) -> LoRA:
        """The LoRA of rank r² that is this Δ exactly, at the same scale (so alpha grows with it)."""
        return LoRA.of_factors(*self.khatri_rao(), self.shape, self.scale)

    def truncated(self, rank: int, dtype: torch.dtype | None = None) -> Truncation:
        """The nearest LoRA of ``rank``, through the exact one of rank r²."""
        return self.cast(torch.float64).to_lora().truncated(rank, dtype or self.wide_dtype())


@dataclass(kw_only=True)
class LoHaConfig(LycorisConfig):
    """PEFT's LoHaConfig: scale alpha/r.

    ``init_weights``: True, w2_b = 0 and the rest as FedPara has it; "lycoris", w2_a = 0 and normal
    numbers, as LyCORIS; False, nothing 0.
    """

    algorithm: ClassVar[str] = "loha"

    @property
    def dropout_scaled(self) -> bool:
        return True

    def shapes(self, shape: tuple[int, ...], rank: int, kind: str = "linear") -> Shapes:
        o, i, *k = shape
        if self.tucker(shape):
            halves = {"a": (rank, o), "b": (rank, i)}
            cores: Shapes = {"t1": (rank, rank, *k), "t2": (rank, rank, *k)}
        else:
            halves, cores = {"a": (o, rank), "b": (rank, i * math.prod(k))}, {}
        return {f"w{n}_{side}": s for n in (1, 2) for side, s in halves.items()} | cores

    def assembled(self, tensors: dict[str, Tensor], scale: float, shape: tuple[int, ...]) -> LoHa:
        return LoHa(**tensors, scale=scale, weight_shape=shape)

    def initialise(
        self, tensors: dict[str, Tensor], kind: str, generator: torch.Generator | None
    ) -> None:
        for name, tensor in tensors.items():
            if self.init_weights == "lycoris":
                std = 1.0 if name.endswith("_b") else 0.1
                nn.init.normal_(tensor, std=std, generator=generator)
            else:
                kaiming_(tensor, generator)
        if self.init_weights:
            nn.init.zeros_(tensors["w2_a" if self.init_weights == "lycoris" else "w2_b"])


def fit(base: Tensor, tuned: Tensor, goal: Goal, *, seed: int = 0) -> Fit:
    """A LoHa near W1 − W0, of the goal's size; convolutions flat, (o, i·∏k), at scale 1.

    It is never farther than the LoRA of its rank. A product of rank r is found again where r² is at most a
    quarter of the shorter of o and i·∏k; above it not always, and from that side on hardly ever: the
    search has then no smaller space to go through. The best one cannot be told, so a rank found
    for ``energy`` or ``max_error`` is the least of those tried, by doubling and bisection. Raises
    ShapeError, ValueRefused.
    """
    delta, exponent = in_range(difference(base, tuned))
    fits: dict[int, Fit] = {}

    def at(rank: int) -> Fit:
        if rank not in fits:
            fits[rank] = _fitted(delta, exponent, rank, seed)
        return fits[rank]

    matrix = delta.flatten(1)
    rank = rank_for(
        goal,
        most=min(matrix.shape),
        parameters=lambda rank: 2 * rank * sum(matrix.shape),
        error_at=lambda rank: at(rank).error,
    )
    return replace(at(rank), notes=(*cut_down(goal, rank), *at(rank).notes))


def _fitted(delta: Tensor, exponent: int, rank: int, seed: int) -> Fit:
    """The Fit of one rank to D, searched for at ``delta`` = D·2⁻ᵉ, of ``in_range``."""
    product = nearest_product(delta.flatten(1), rank, seed)
    columns = product.columns.transpose(1, 2)
    factors = (product.rows[0], columns[0], product.rows[1], columns[1])
    slots = [factor.to(delta).contiguous() for factor in factors]
    shape = tuple(delta.shape)
    error = error_of(LoHa(*slots, weight_shape=shape), delta)
    grown = [slot * power for slot, power in zip(slots, powers(exponent, 4))]
    norm, (low, high) = full_norm(delta, exponent), powers(exponent, 2)
    return Fit(
        update=LoHa(*grown, weight_shape=shape),
        error=error,
        norm=norm,
        rank=rank,
        parameters=sum(slot.numel() for slot in slots),
        spectrum=product.spectrum * low * high,
        notes=product.notes if norm else ("the two weights are equal: Δ is zero",),
    )
