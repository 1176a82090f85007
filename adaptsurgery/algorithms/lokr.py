"""LoKr: Δ = w1 ⊗ w2, a Kronecker product (KronA, arXiv 2212.10650; LyCORIS, arXiv 2309.14859).

With o = a·b and i = c·d:

    w1  (a, c), or w1_a (a, r) · w1_b (r, c)
    w2  (b, d, *k), or w2_a (b, r) · w2_b (r, d·∏k) [or (r, d, *k)],
        or tucker  w2_a (r, b)   w2_b (r, d)   t2 (r, r, *k):  w2[b, d, k] = Σ t2[p, q, k] w2_a[p, b] w2_b[q, d]
    Δ[(a, b), (c, d), k] = w1[a, c] · w2[b, d, k]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from adaptsurgery.algorithms.lora import LoRA, Truncation, truncation
from adaptsurgery.core.config import LycorisConfig, Shapes, kaiming_
from adaptsurgery.core.cost import Form, price
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.linalg import check_rank, factor_svd, split, tail_error
from adaptsurgery.core.update import Delta
from adaptsurgery_formats.kronecker import peft_factorization


@dataclass(frozen=True, eq=False)
class LoKr(Delta):
    """Δ = w1 ⊗ w2; see the module's docstring for the shapes."""

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None

    name: ClassVar[str] = "lokr"

    def misfit(self) -> str:
        for whole, left, right in (("w1", "w1_a", "w1_b"), ("w2", "w2_a", "w2_b")):
            present = tuple(getattr(self, slot) is not None for slot in (whole, left, right))
            if present not in ((True, False, False), (False, True, True)):
                return f"{whole} is stored whole or as {left} · {right}, not both and not half"
        if min(tensor.dim() for tensor in self.tensors().values()) < 2:
            return "every factor has two dimensions or more"
        if self.w1_a is not None and self.w1_b is not None:
            if self.w1_a.shape[1] != self.w1_b.shape[0]:
                return "w1_a (a, r) and w1_b (r, c) differ in r"
        if self.t2 is not None:
            if self.w2_a is None or self.w2_b is None:
                return "t2 stands beside w2_a and w2_b"
            if self.t2.shape[:2] != (self.w2_a.shape[0], self.w2_b.shape[0]):
                return "t2 (p, q, *k), w2_a (p, b) and w2_b (q, d) differ in p or q"
        elif self.w2_a is not None and self.w2_b is not None:
            if self.w2_a.shape[1] != self.w2_b.shape[0]:
                return "w2_a (b, r) and w2_b (r, d·∏k) differ in r"
        return ""

    @property
    def outer_shape(self) -> tuple[int, int]:
        """(a, c), the shape of w1."""
        if self.w1 is not None:
            return self.w1.shape[0], self.w1.shape[1]
        assert self.w1_a is not None and self.w1_b is not None
        return self.w1_a.shape[0], self.w1_b.shape[1]

    @property
    def inner_shape(self) -> tuple[int, int]:
        """(b, d·∏k), the shape of w2 as a matrix."""
        if self.w2 is not None:
            return self.w2.shape[0], self.w2.shape[1:].numel()
        assert self.w2_a is not None and self.w2_b is not None
        if self.t2 is not None:
            return self.w2_a.shape[1], self.w2_b.shape[1] * self.t2.shape[2:].numel()
        return self.w2_a.shape[0], self.w2_b.shape[1:].numel()

    @property
    def extent(self) -> tuple[int, int]:
        (a, c), (b, columns) = self.outer_shape, self.inner_shape
        return a * b, c * columns

    @property
    def kernel(self) -> tuple[int, ...] | None:
        for tensor in (self.t2, self.w2, self.w2_b):
            if tensor is not None and tensor.dim() > 2:
                return tuple(tensor.shape[2:])
        return self.weight_shape[2:] if self.weight_shape else None

    def outer(self) -> Tensor:
        """w1 (a, c)."""
        if self.w1 is not None:
            return self.w1
        assert self.w1_a is not None and self.w1_b is not None
        return self.w1_a @ self.w1_b

    def inner_factors(self) -> tuple[Tensor, Tensor] | None:
        """w2 as two matrices (b, r), (r, d·∏k), a Tucker core folded in; None where it is whole."""
        if self.w2_a is None or self.w2_b is None:
            return None
        if self.t2 is None:
            return self.w2_a, self.w2_b.flatten(1)
        down = torch.einsum("pq...,qd->pd...", self.t2, self.w2_b)
        return self.w2_a.t(), down.flatten(1)

    def inner(self) -> Tensor:
        """w2 as a matrix (b, d·∏k)."""
        if self.w2 is not None:
            return self.w2.flatten(1)
        pair = self.inner_factors()
        assert pair is not None
        return pair[0] @ pair[1]

    def flat(self) -> LoKr:
        """The same Δ with both factors whole; w2 a matrix (b, d·∏k)."""
        if self.w1 is not None and self.w2 is not None and self.w2.dim() == 2:
            return self
        whole = {"w1": self.outer(), "w2": self.inner()}
        shape = None if self.kernel is None else self.shape
        return LoKr(**whole, scale=self.scale, weight_shape=shape)

    def without_core(self) -> LoKr:
        """The same Δ without a Tucker core, at the same rank, exactly: w2_a (b, r), w2_b (r, d, *k)."""
        pair = self.inner_factors()
        if self.t2 is None or pair is None:
            return self
        up, down = pair
        shaped = down.reshape(down.shape[0], -1, *self.t2.shape[2:])
        slots = {"w1": self.w1, "w1_a": self.w1_a, "w1_b": self.w1_b, "w2_a": up, "w2_b": shaped}
        return LoKr(**slots, scale=self.scale, weight_shape=self.weight_shape)

    def matrix(self) -> Tensor:
        return kron(self.outer(), self.inner())

    def add_rows_(self, block: Tensor, start: int, stop: int, factor: float) -> None:
        """One broadcast product for all whole rows of w1, one for each that is cut."""
        w1, w2 = self.w1, self.w2
        assert w1 is not None and w2 is not None
        (b, columns), c = w2.shape, w1.shape[1]
        at = start
        while at < stop:
            row, within = divmod(at, b)
            count = (stop - at) // b if not within else 0  # rows of w1 that are all here
            end = at + count * b if count else min(stop, at - within + b)
            inner = w2 if count else w2[within : within + end - at]
            view = block[at - start : end - start].view(-1, len(inner), c, columns)
            outer = w1[row : row + len(view), None, :, None]
            view.addcmul_(outer, inner[:, None, :], value=factor)
            at = end

    def transposed(self) -> LoKr:
        w1, w2 = self.outer().t().contiguous(), self.inner().t().contiguous()
        return LoKr(w1=w1, w2=w2, scale=self.scale)

    def delta(self, x: Tensor, layer: Layer, form: Form = "factored") -> Tensor:
        """x as (…, c, d): w2 along d, with the layer's geometry, and w1 along c; w1⊗w2 never built.

        Whichever of the two costs less goes first. Channels c go with the batch of a convolution.
        """
        ready = self.like(layer.sample(x))
        if layer.kind == "embedding":
            return ready._looked_up(x)
        a, c = self.outer_shape
        early = self._mixing()[0] == "before"
        batched = layer.batched(x)
        axis = 1 if layer.dims else -1
        y = torch.unflatten(x if batched else x[None], axis, (c, -1))
        y = _mix(ready.outer(), y, layer) if early else y
        y = ready._along_d(y, layer, a if early else c)
        y = y if early else _mix(ready.outer(), y, layer)
        y = y.flatten(1, 2) if layer.dims else y.flatten(-2)
        return y if batched else y[0]

    def _along_d(self, y: Tensor, layer: Layer, groups: int) -> Tensor:
        """The layer with the weight w2, on each of ``groups`` slices of the channels."""
        pair = self.inner_factors()
        b, columns = self.inner_shape
        kernel = layer.shape[2:]
        y = y.flatten(0, 1) if layer.dims else y
        if pair is None or pair[0].shape[1] * (b + columns) >= b * columns:
            y = layer.forward(y, self.inner().reshape(b, -1, *kernel), None)
        else:
            y = layer.low_rank(y, pair[0], pair[1].reshape(pair[1].shape[0], -1, *kernel))
        return torch.unflatten(y, 0, (-1, groups)) if layer.dims else y

    def _looked_up(self, x: Tensor) -> Tensor:
        """Rows of an embedding: column (c, d) of Δ is w1[:, c] ⊗ w2[:, d]."""
        w1, w2 = self.outer(), self.inner()
        left = torch.nn.functional.embedding(x // w2.shape[1], w1.t())
        right = torch.nn.functional.embedding(x % w2.shape[1], w2.t())
        return (left[..., :, None] * right[..., None, :]).flatten(-2)

    def _mixing(self) -> tuple[str, int, int]:
        """Whether w1 goes before or after w2; multiplications and numbers streamed, a position."""
        (a, c), (b, columns) = self.outer_shape, self.inner_shape
        r = self.w2_b.shape[0] if self.w2_b is not None else columns
        inner = min(b * columns, r * (b + columns))
        after, before = c * inner + a * c * b, a * c * columns + a * inner
        return ("after", after, c * b) if after <= before else ("before", before, a * columns)

    def prices(self, positions: int, layer: Layer, training: bool) -> dict[Form, int]:
        o, n = self.extent
        _, products, between = self._mixing()
        return {
            "factored": price(positions * products, positions * (between + o)),
            "folded": self.folding_price(o * n, positions, training),
        }

    def to_lora(self) -> LoRA:
        """The LoRA that is this Δ exactly, of the least rank that the stored shapes show.

        (u1·d1) ⊗ (u2·d2) = (u1 ⊗ u2)·(d1 ⊗ d2), with each factor split as it is stored or against
        the identity on its shorter side: ranks min(a, c, r1) · min(b, d·∏k, r2).
        """
        stored = None if self.w1_a is None or self.w1_b is None else (self.w1_a, self.w1_b)
        up1, down1 = _shortest(self.outer(), stored)
        up2, down2 = _shortest(self.inner(), self.inner_factors())
        return LoRA.of_factors(kron(up1, up2), kron(down1, down2), self.shape, self.scale)

    def truncated(self, rank: int, dtype: torch.dtype | None = None) -> Truncation:
        """The nearest LoRA of ``rank``: SVD(w1) ⊗ SVD(w2) is Δ's SVD, of which the top products stay.

        O of the factors' SVDs; ShapeError for rank < 1.
        """
        check_rank(rank)
        wide = self.cast(torch.float64)
        stored = None if wide.w1_a is None or wide.w1_b is None else (wide.w1_a, wide.w1_b)
        u1, s1, v1 = factor_svd(*_shortest(wide.outer(), stored))
        u2, s2, v2 = factor_svd(*_shortest(wide.inner(), wide.inner_factors()))
        s, order = torch.outer(s1, s2).flatten().sort(descending=True)
        first, second = order[:rank] // len(s2), order[:rank] % len(s2)
        up = (u1[:, None, first] * u2[None, :, second]).flatten(0, 1)
        down = (v1[first][:, :, None] * v2[second][:, None, :]).flatten(1)
        found = split(up, s[:rank], down, tail_error(s, rank))
        return truncation(found, self, dtype)


def kron(left: Tensor, right: Tensor) -> Tensor:
    """left (a, c) ⊗ right (b, d) = (a·b, c·d), by one broadcast product."""
    return (left[:, None, :, None] * right[None, :, None, :]).flatten(2).flatten(0, 1)


def _mix(w1: Tensor, y: Tensor, layer: Layer) -> Tensor:
    """w1 (a, c) along the c of y: (…, c, d) → (…, a, d), or (N, c, d, *s) → (N, a, d, *s)."""
    return torch.einsum("ac,nc...->na...", w1, y) if layer.dims else torch.matmul(w1, y)


def _shortest(whole: Tensor, stored: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """(m, r), (r, n) with the product ``whole`` (m, n) and the least r: as stored, or with I."""
    rows, columns = whole.shape
    if stored is not None and stored[0].shape[1] < min(rows, columns):
        return stored
    one = torch.eye(min(rows, columns), dtype=whole.dtype, device=whole.device)
    return (one, whole) if rows <= columns else (whole, one)


@dataclass(kw_only=True)
class LoKrConfig(LycorisConfig):
    """PEFT's LoKrConfig: scale alpha/r, also where both factors are whole.

    ``decompose_factor`` cuts o = a·b and i = c·d: a and c are the factor where it divides, else the
    largest divisor up to it, -1 for no limit, that brings the two closest. w2 is w2_a·w2_b where
    r < max(b, d)/2; w1 likewise, with ``decompose_both``. ``init_weights``: True, w1 (w1_a) = 0;
    "lycoris", w2 (w2_b) = 0; False, neither. ``rank_dropout_scale`` divides by the share kept.
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False

    algorithm: ClassVar[str] = "lokr"

    def shapes(self, shape: tuple[int, ...], rank: int, kind: str = "linear") -> Shapes:
        o, i, *k = shape
        (a, b), (c, d) = (peft_factorization(n, self.decompose_factor) for n in (o, i))
        if self.decompose_both and 2 * rank < max(a, c):
            slots: Shapes = {"w1_a": (a, rank), "w1_b": (rank, c)}
        else:
            slots = {"w1": (a, c)}
        if 2 * rank >= max(b, d):
            return slots | {"w2": (b, d, *k)}
        if self.tucker(shape):
            return slots | {"w2_a": (rank, b), "w2_b": (rank, d), "t2": (rank, rank, *k)}
        return slots | {"w2_a": (b, rank), "w2_b": (rank, d * math.prod(k))}

    def assembled(self, tensors: dict[str, Tensor], scale: float, shape: tuple[int, ...]) -> LoKr:
        return LoKr(**tensors, scale=scale, weight_shape=shape)

    def initialise(
        self, tensors: dict[str, Tensor], kind: str, generator: torch.Generator | None
    ) -> None:
        for tensor in tensors.values():
            kaiming_(tensor, generator)
        if self.init_weights:
            zero = ("w2", "w2_b") if self.init_weights == "lycoris" else ("w1", "w1_a")
            nn.init.zeros_(next(tensors[name] for name in zero if name in tensors))
