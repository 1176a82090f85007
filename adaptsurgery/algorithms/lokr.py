"""LoKr: Δ = w1 ⊗ w2, a Kronecker product (KronA, arXiv 2212.10650; LyCORIS, arXiv 2309.14859).

With o = a·b and i = c·d:

    w1  (a, c), or w1_a (a, r) · w1_b (r, c)
    w2  (b, d, *k), or w2_a (b, r) · w2_b (r, d·∏k) [or (r, d, *k)],
        or tucker  w2_a (r, b)   w2_b (r, d)   t2 (r, r, *k):  w2[b, d, k] = Σ t2[p, q, k] w2_a[p, b] w2_b[q, d]
    Δ[(a, b), (c, d), k] = w1[a, c] · w2[b, d, k]

``fit`` and ``extract`` find the LoKr nearest to the difference of two weights (nearest/kronecker.py),
in shapes that PEFT or LyCORIS makes again when it loads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from adaptsurgery.algorithms.lora import LoRA, Truncation, truncation
from adaptsurgery.core.config import LycorisConfig, Shapes, kaiming_
from adaptsurgery.core.cost import ApplyForm, price
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.linalg import check_rank, factor_svd, split, tail_error
from adaptsurgery.core.update import Delta, widest
from adaptsurgery.nearest.goal import Fit, Goal, difference, error_of, norm_of, rank_for
from adaptsurgery.nearest.kronecker import (
    CutMatrix,
    LowRankCut,
    Tucker,
    Whole,
    leading_vector,
    nearest_product,
    outer_error,
    rearranged,
)
from adaptsurgery.nearest.scaling import full_norm, in_range, powers
from adaptsurgery_formats.errors import ValueRefused
from adaptsurgery_formats.lokr_cuts import (
    FACTORIZATIONS,
    Storage,
    peft_factorization,
    stored_shapes,
    sweepable_factors,
)


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

    def prepared(self, dtype: torch.dtype, device: torch.device | None = None) -> LoKr:
        """The same Δ cast, both factors whole: multiplied in float64, which at their size is cheap."""
        held = next(iter(self.tensors().values())).device
        return self.cast(widest(device or held)).flat().cast(dtype, device)

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

    def delta(self, x: Tensor, layer: Layer, form: ApplyForm = "factored") -> Tensor:
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
        """Whether w1 goes before or after w2; multiplications and numbers streamed per position."""
        (a, c), (b, columns) = self.outer_shape, self.inner_shape
        r = self.w2_b.shape[0] if self.w2_b is not None else columns
        inner = min(b * columns, r * (b + columns))
        after, before = c * inner + a * c * b, a * c * columns + a * inner
        return ("after", after, c * b) if after <= before else ("before", before, a * columns)

    def prices(self, positions: int, layer: Layer, training: bool) -> dict[ApplyForm, int]:
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

        It costs the factors' SVDs. Raises ShapeError for rank < 1.
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
        approximation = split(up, s[:rank], down, tail_error(s, rank))
        return truncation(approximation, self, dtype)


def kron(left: Tensor, right: Tensor) -> Tensor:
    """left (a, c) ⊗ right (b, d) = (a·b, c·d), by one broadcast product."""
    return (left.unsqueeze(1).unsqueeze(3) * right.unsqueeze(1)).flatten(2).flatten(0, 1)


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

    @property
    def dropout_scaled(self) -> bool:
        return self.rank_dropout_scale

    def shapes(self, shape: tuple[int, ...], rank: int, kind: str = "linear") -> Shapes:
        out, into = (peft_factorization(n, self.decompose_factor) for n in shape[:2])
        both, tucker = self.decompose_both, self.tucker(shape)
        return stored_shapes(out, into, shape[2:], rank, both, tucker)

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


def candidates(shape: tuple[int, ...], loader: str = "peft") -> list[int]:
    """A factor for every way in which a loader can cut a weight (o, i, *k), -1 first.

    One that makes w1 a single number, and so a LoRA of the LoKr, is left out if there are others.
    ``loader`` is "peft" or "lycoris"; ValueRefused for another.
    """
    _check_loader(loader)
    factors = sweepable_factors(shape[0], shape[1], loader)
    crossed = [f for (out, into), f in factors.items() if (out[0], into[0]) != (1, 1)]
    return crossed or [*factors.values()]


def fit(
    base: Tensor,
    tuned: Tensor,
    goal: Goal,
    *,
    seed: int = 0,
    factor: int | None = None,
    decompose_both: bool = False,
    tucker: bool = False,
    loader: str = "peft",
) -> Fit:
    """The LoKr nearest to W1 − W0, of the goal's size, in shapes that ``loader`` makes again.

    Without a ``factor``, ``rank`` goes with -1 (the libraries' default: o and i in two near equal
    parts), ``budget`` with the factor of the least error, ``energy`` and ``max_error`` with that of
    the fewest parameters. As the loaders have it a rank of max(b, d)/2 or more stores w2 whole.
    The scale is 1, so alpha is the rank. ``limit`` is the error of a whole w1 and w2 at that factor.
    Raises ShapeError, ValueRefused ("out-of-reach", "budget-too-small", "not-loadable").
    """
    _check_loader(loader)
    factors = [-1 if factor is None else factor]
    if factor is None and goal.rank is None and base.dim() > 1:
        factors = candidates(tuple(base.shape), loader)
    fits = sweep(
        base, tuned, goal, factors,
        seed=seed, decompose_both=decompose_both, tucker=tucker, loader=loader,
    ).values()  # fmt: skip
    if goal.budget is not None:
        return min(fits, key=lambda one: (one.error, one.parameters))
    return min(fits, key=lambda one: (one.parameters, one.error))


def sweep(
    base: Tensor,
    tuned: Tensor,
    goal: Goal,
    factors: Iterable[int],
    *,
    seed: int = 0,
    decompose_both: bool = False,
    tucker: bool = False,
    loader: str = "peft",
) -> dict[int, Fit]:
    """``fit`` at each of the ``factors`` that meet the goal; those that cut alike share one Fit.

    For whoever needs one factor for many layers: any factor cuts any weight, each in its own way.
    Raises as ``fit`` does where none meets it.
    """
    _check_loader(loader)
    delta, exponent = in_range(difference(base, tuned))
    cut = FACTORIZATIONS[loader]
    met: dict[object, Fit | ValueRefused] = {}
    fits: dict[int, Fit] = {}
    for factor in factors:
        out, into = cut(delta.shape[0], _checked(factor)), cut(delta.shape[1], factor)
        if (out, into) not in met:
            shape = tuple(delta.shape)
            storage = Storage(shape, out, into, decompose_both, tucker, loader)
            met[out, into] = _met(_Search(delta, exponent, storage, seed), goal)
        if isinstance(one := met[out, into], Fit):
            fits[factor] = one
    if not fits:
        raise _none_of([one for one in met.values() if isinstance(one, ValueRefused)])
    return fits


def _met(search: _Search, goal: Goal) -> Fit | ValueRefused:
    try:
        return search.meet(goal)
    except ValueRefused as refusal:
        return refusal


def _none_of(refusals: list[ValueRefused]) -> ValueRefused:
    """The refusals of all factors, as one error."""
    if len(refusals) == 1:
        return refusals[0]
    refusal = next((r for r in refusals if r.code != "not-loadable"), refusals[0])
    seen = sorted({r.seen for r in refusals if r.code == refusal.code})
    return ValueRefused(
        f"{refusal.what}, at any factor", items=seen, next=refusal.next, code=refusal.code
    )


def _check_loader(loader: str) -> None:
    if loader not in FACTORIZATIONS:
        raise ValueRefused(
            f"no loader is called `{loader}`", next=f"one of {', '.join(FACTORIZATIONS)}"
        )


def _checked(factor: int) -> int:
    if factor < 1 and factor != -1:
        raise ValueRefused(f"factor {factor} cuts nothing", next="-1, or a factor of at least 1")
    return factor


@dataclass(eq=False)
class _Search:
    """Fits LoKrs of one cut to one difference, which is ``in_range``, and remembers the fits."""

    delta: Tensor
    exponent: int
    storage: Storage
    seed: int

    def __post_init__(self) -> None:
        self.size = norm_of(self.delta)
        self.fits: dict[int, Fit] = {}

    def meet(self, goal: Goal) -> Fit:
        ranks = [goal.rank] if goal.rank is not None else self.storage.ranks() or [1]
        if wrong := self.storage.refusal(ranks[0]):
            shapes = self.storage.shapes(ranks[0]).items()
            seen = ", ".join(f"{name} {list(shape)}" for name, shape in shapes)
            raise ValueRefused(wrong, seen=seen, next="another factor or rank", code="not-loadable")
        if not goal.met_by(self.limit):
            (a, _), (c, _) = self.storage.out, self.storage.into
            raise ValueRefused(
                f"no LoKr comes within an error of {goal.most_error:g}",
                seen=f"{self.limit:.3g} with w1 ({a}, {c})",
                next="a larger error, or another algorithm",
                code="out-of-reach",
            )
        if goal.rank is not None:
            return self.at(goal.rank)
        chosen = rank_for(
            goal,
            most=len(ranks),
            parameters=lambda k: self.storage.parameters(ranks[k - 1]),
            error_at=lambda k: self.at(ranks[k - 1]).error,
        )
        return self.at(ranks[chosen - 1])

    @cached_property
    def rearranged(self) -> Tensor:
        return rearranged(self.delta, self.storage.out[0], self.storage.into[0])

    @cached_property
    def start(self) -> Tensor:
        return leading_vector(self.rearranged, self.seed)

    @cached_property
    def limit(self) -> float:
        """The error of the best w1 ⊗ w2 with both whole."""
        if not self.size:
            return 0.0
        return outer_error(self.rearranged, self.start, self.size)

    def at(self, rank: int) -> Fit:
        if rank not in self.fits:
            self.fits[rank] = self._solved(rank)
        return self.fits[rank]

    def _solved(self, rank: int) -> Fit:
        shapes = self.storage.shapes(rank)
        factors = self._nearest(rank, shapes)
        slots = {name: t.reshape(shapes[name]).to(self.delta) for name, t in factors.items()}
        error = error_of(self._built(slots), self.delta)
        first = [name for name in slots if name.startswith("w1")]
        second = [name for name in slots if name not in first]
        half = self.exponent // 2
        for own, exponent in ((first, half), (second, self.exponent - half)):
            slots |= {name: slots[name] * p for name, p in zip(own, powers(exponent, len(own)))}
        return Fit(
            update=self._built(slots),
            error=error,
            norm=full_norm(self.delta, self.exponent),
            rank=rank,
            parameters=self.storage.parameters(rank),
            limit=self.limit,
            notes=self._notes(rank, shapes),
        )

    def _built(self, slots: dict[str, Tensor]) -> LoKr:
        return LoKr(**slots, weight_shape=tuple(self.delta.shape))  # type: ignore[arg-type]

    def _nearest(self, rank: int, shapes: Shapes) -> dict[str, Tensor]:
        if not self.size:
            return {name: self.delta.new_zeros(shape) for name, shape in shapes.items()}
        (a, b), (c, d) = self.storage.out, self.storage.into
        cuts: tuple[CutMatrix, CutMatrix] = (
            LowRankCut(rank) if "w1_a" in shapes else Whole(),
            Tucker(rank) if "t2" in shapes else LowRankCut(rank) if "w2_a" in shapes else Whole(),
        )
        sides = (a, c), (b, d, math.prod(self.delta.shape[2:]))
        product = nearest_product(self.rearranged, self.start, sides, cuts)
        return dict(zip(shapes, (*product.first, *product.second)))

    def _notes(self, rank: int, shapes: Shapes) -> tuple[str, ...]:
        if not self.size:
            return ("the two weights are equal: every factor is zero",)
        most = self.storage.expressible(rank)[1]
        if "w2" in shapes or rank <= most:
            return ()
        return (f"w2 has rank {most} at most: the rest of rank {rank} is zero",)
