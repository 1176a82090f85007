"""HRA: W' = W·H0·H1···H(r−1), a chain of Householder reflections (arXiv 2405.17484), as PEFT's.

    u (i·∏k, r)     Hj = I − 2·uj·ujᵀ, columns normalised; u0 leftmost

A conv's weight is turned as (o, i·∏k); groups share u. The product has a compact form (Schreiber
and Van Loan's WY, SIAM J. Sci. Stat. Comput. 10, 1989): for unit columns U

    R = I − U·T·Uᵀ,   T = (striu(UᵀU) + ½I)⁻¹

With ``apply_gs`` the columns are first made orthonormal (Gram–Schmidt; here QR, of the same span)
and R = I − 2QQᵀ, its own inverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptsurgery.algorithms.lora import LoRA
from adaptsurgery.core.config import AdapterConfig, Shapes, kaiming_
from adaptsurgery.core.cost import ApplyForm, folding, price
from adaptsurgery.core.exporting import plain_operations
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.update import Rotation, compute_dtype, tracked, widened
from adaptsurgery.nearest.goal import Fit, Goal, difference, norm_of, rank_for
from adaptsurgery.nearest.procrustes import Procrustes, reflections
from adaptsurgery_formats.errors import ShapeError, ValueRefused

# Below this distance (of a unit column, from the span of those before it) float32 Gram–Schmidt
# would turn rounding noise into a direction.
DEPENDENT = 1e-5


@dataclass(frozen=True, eq=False)
class HRA(Rotation):
    """W' = W·R; u (i·∏k, r). ShapeError unless u is a matrix.

    ``check_values`` (called by fold, unfold, to_lora, then, inverse and algorithms.build, never by
    apply) is a ValueRefused for a column of zeros, a number that is not finite, and, under
    ``apply_gs``, columns that depend on each other, such as PEFT's paired initial value.
    """

    u: Tensor
    apply_gs: bool = False

    name: ClassVar[str] = "hra"

    def __post_init__(self) -> None:
        if self.u.dim() != 2 or 0 in self.u.shape:
            raise ShapeError("hra: u is not (i·∏k, r)", seen=f"u {list(self.u.shape)}")

    @property
    def size(self) -> int:
        return self.u.shape[0]

    @property
    def rank(self) -> int:
        return self.u.shape[1]

    def check_values(self) -> None:
        columns = self.u.detach().double()
        norms = torch.linalg.vector_norm(columns, dim=0)
        if not torch.isfinite(norms).all():
            raise ValueRefused("hra: u holds numbers that are not finite", code="non-finite")
        if not norms.all():
            zeros = (norms == 0).nonzero().flatten().tolist()
            raise ValueRefused(
                "hra: a column of zeros reflects nothing",
                seen=f"columns {zeros}",
                code="zero-column",
            )
        if self.apply_gs and self._least_distance(columns / norms) < DEPENDENT:
            raise self._dependent()

    def _dependent(self) -> ValueRefused:
        return ValueRefused(
            "hra: Gram–Schmidt of columns that depend on each other is rounding noise",
            seen=f"u {list(self.u.shape)}",
            next="apply_gs=False, or columns started apart",
            code="dependent-columns",
        )

    def _least_distance(self, unit: Tensor) -> float:
        """How far, at least, a unit column stands from the span of those before it."""
        if self.rank > self.size:
            return 0.0
        return float(torch.linalg.qr(unit).R.diagonal().abs().min())

    def compact(self) -> tuple[Tensor, Tensor]:
        """U (i·∏k, r) and T (r, r) with R = I − U·T·Uᵀ, in float32 at least.

        ValueRefused "dependent-columns" for more columns under Gram–Schmidt than they have numbers.
        """
        if self.apply_gs and self.rank > self.size:
            raise self._dependent()
        wide = widened(self.u).t().contiguous()  # one copy, and all that follows runs along rows
        rows = wide / torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        columns = rows.t()
        one = torch.eye(self.rank, dtype=wide.dtype, device=wide.device)
        plain = plain_operations()
        if self.apply_gs:
            basis = orthonormal(columns) if plain else torch.linalg.qr(columns).Q
            return basis, 2 * one
        above = torch.triu(rows @ columns, 1)
        if plain:
            return columns, inverse_of_half_plus(above, one)
        return columns, torch.linalg.solve_triangular(above + one / 2, one, upper=True)

    def turning(self, sample: Tensor, back: bool = False) -> Callable[[Tensor], Tensor]:
        """rows ↦ rows − ((rows·U)·T)·Uᵀ, or with Tᵀ where ``back``: O(r) a number, R never built."""
        columns, middle = (part.to(sample) for part in self._in(sample.dtype))
        middle = middle if back else middle.t()
        down = columns.t().contiguous()
        if plain_operations():  # and no size of the rows is asked for
            return lambda rows: rows - F.linear(F.linear(F.linear(rows, down), middle), columns)
        less = -middle

        def turn(rows: Tensor) -> Tensor:
            flat = rows.reshape(-1, self.size)
            within = F.linear(F.linear(flat, down), less)
            return torch.addmm(flat, within, down).view_as(rows)  # one pass over what is large

        return turn

    def turning_(self, sample: Tensor, back: bool = False) -> Callable[[Tensor], object]:
        """The same in place: two products of the rank r, T folded into the second.

        U and T are computed in float64 and rounded once, whatever the dtype of ``sample``.
        """
        columns, middle = self._in(torch.float64)
        down = columns.t()
        up = ((middle.t() if back else middle) @ down).to(sample)
        down = down.to(sample).contiguous()
        return lambda rows: rows.addmm_(torch.mm(down, rows.t()).t(), up, alpha=-1)

    def training(self, x: Tensor) -> bool:
        return tracked(x, self.u)

    def change(self, weight: Tensor) -> LoRA:
        """−(W·U·T)·Uᵀ, of rank r."""
        wide = weight.flatten(1).to(compute_dtype(weight))
        columns, middle = (part.to(wide) for part in self._in(wide.dtype))
        down = columns.t()
        up = -(F.linear(down, wide).t() @ middle)
        return LoRA.of_factors(up, down, tuple(weight.shape))

    def prices(self, positions: int, layer: Layer, training: bool) -> dict[ApplyForm, int]:
        r, o, n = self.rank, layer.shape[0], self.size
        into = positions * layer.shape[1]
        factored = r * o * n + positions * r * (n + o)
        return {
            "factored": price(factored, o * n + into + positions * (r + o)),
            "folded": folding(2 * r * o * n, o * n, positions, training),
        }

    def _in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """U and T, computed in ``dtype`` where that is wider than their own."""
        wide = torch.promote_types(dtype, widened(self.u).dtype)
        return HRA(self.u.to(wide), self.apply_gs).compact()

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        """R (i·∏k, i·∏k)."""
        one = torch.eye(self.size, dtype=dtype or widened(self.u).dtype, device=self.u.device)
        return self.turning(one)(one)

    def reflections(self) -> Tensor:
        """Unit columns whose plain product of reflections is R: U, or the Q of Gram–Schmidt."""
        return self.compact()[0]

    def then(self, other: Rotation) -> HRA:
        """R·R_other as one HRA: the columns side by side."""
        if not isinstance(other, HRA) or other.size != self.size:
            raise ShapeError(f"hra: R turns rows of {self.size}, and the other of {other.size}")
        self.check_values()
        other.check_values()
        return HRA(torch.cat([self.reflections(), other.reflections()], dim=1))

    def inverse(self) -> HRA:
        """Rᵀ: the reflections in the opposite order; with Gram–Schmidt R is its own inverse."""
        self.check_values()
        return self if self.apply_gs else HRA(self.u.flip(1))

    def to_lora(self, weight: Tensor) -> LoRA:
        """The LoRA of rank min(r, i·∏k) that does to this canonical ``weight`` what R does: −(W·U·T)·Uᵀ.

        With U = Q·S it is −(W·U·T·Sᵀ)·Qᵀ: near-equal pairs of columns, as PEFT starts them, nearly
        cancel in U·T·Uᵀ, and here they do so before anything is rounded to be stored. In float32 at
        least. It is right for this weight only.
        """
        self.check_fits(weight.shape)
        self.check_values()
        wide = torch.promote_types(compute_dtype(weight), widened(self.u).dtype)
        columns, middle = self._in(wide)
        basis, within = torch.linalg.qr(columns)
        up = -(weight.flatten(1).to(wide) @ columns) @ middle @ within.t()
        return LoRA.of_factors(up, basis.t().contiguous(), tuple(weight.shape))


@dataclass(kw_only=True)
class HRAConfig(AdapterConfig):
    """PEFT's HRAConfig. No alpha: a rotation does not add.

    ``init_weights`` True starts at R = I, by pairs of equal columns, which cancel. There is no such
    start for an odd r, whose R has determinant -1, nor with ``apply_GS``, whose R = I − 2QQᵀ turns r
    directions round whatever Q is: both are refused, and start from a random R with
    ``init_weights=False``. (PEFT warns of the one, and divides rounding noise by itself in the other.)
    """

    apply_GS: bool = False
    bias: str = "none"
    init_weights: bool = True

    algorithm: ClassVar[str] = "hra"
    biases: ClassVar[tuple[str, ...]] = ("none", "all", "hra_only")

    @property
    def options(self) -> dict[str, Any]:
        return {"apply_gs": self.apply_GS}

    def shapes(self, shape: tuple[int, ...], rank: int, kind: str = "linear") -> Shapes:
        return {"u": (math.prod(shape[1:]), rank)}

    def assembled(self, tensors: dict[str, Tensor], scale: float, shape: tuple[int, ...]) -> HRA:
        return HRA(tensors["u"], self.apply_GS)

    def initialise(
        self, tensors: dict[str, Tensor], kind: str, generator: torch.Generator | None
    ) -> None:
        u = tensors["u"]
        if self.init_weights:
            self._check_start(u.shape[1])
            half = torch.empty(u.shape[0], u.shape[1] // 2, dtype=u.dtype, device=u.device)
            kaiming_(half, generator)
            u.copy_(half.repeat_interleave(2, dim=1))
        else:
            kaiming_(u, generator)

    def _check_start(self, rank: int) -> None:
        if self.apply_GS:
            reason = f"with apply_GS R = I − 2QQᵀ turns {rank} directions round"
        elif rank % 2:
            reason = f"{rank} reflections, an odd number, have the determinant -1"
        else:
            return
        raise ValueRefused(
            f"hra: no initial value leaves the layer as it is: {reason}",
            next="an even r without apply_GS; or init_weights=False, for a random R",
            code="no-initial-value",
        )


def inverse_of_half_plus(above: Tensor, one: Tensor) -> Tensor:
    """(½I + N)⁻¹ of a strictly upper triangular N (r, r) by products alone, for export; I is ``one``.

    [A B; 0 C]⁻¹ = [A⁻¹ −A⁻¹BC⁻¹; 0 C⁻¹] on all blocks of one size at once, the size doubling:
    log2(r) steps. Unlike the powers of N, which overflow, it is as accurate as substitution.
    """
    inverse, within = 2 * one, torch.zeros_like(above)
    place = torch.arange(above.shape[0], device=above.device)
    size = 1
    while size < above.shape[0]:
        size *= 2
        block = torch.floor_divide(place, size)
        wider = above * torch.eq(block[:, None], block).to(above.dtype)
        inverse = inverse - inverse @ (wider - within) @ inverse
        within = wider
    return inverse


def orthonormal(columns: Tensor) -> Tensor:
    """Gram–Schmidt of unit columns (n, r) by products alone, for export: halves, each after the other.

    The second half is cleared of the first twice, which is enough.
    """
    count = columns.shape[1]
    if count == 1:
        unit: Tensor = columns / torch.linalg.vector_norm(columns, dim=0)
        return unit
    first = orthonormal(columns[:, : count // 2])
    second = columns[:, count // 2 :]
    for _ in range(2):
        second = second - first @ (first.t() @ second)
    return torch.cat([first, orthonormal(second)], dim=1)


def fit(base: Tensor, tuned: Tensor, goal: Goal, *, seed: int = 0, whole: bool = False) -> Fit:
    """W1 ≈ W0·H1···Hr by a Procrustes problem in r dimensions (nearest/procrustes.py), and its error.

    Exact where ``tuned`` is ``base`` with such a chain in it. No chain, however long, comes nearer
    than ``limit``, the best orthogonal matrix (left out above 2,048 columns, 2·o if that is fewer:
    it costs an SVD). The ranks that goals find are even, as PEFT wants them; a rotation in an odd
    number of dimensions takes one reflection fewer. ``whole`` takes all that were asked for, at
    any cost: PEFT has one rank for all layers. Vectors are in float32, float64 where a weight is.
    Raises what ``difference`` and ``rank_for`` do.
    """
    delta = difference(base, tuned)
    with torch.no_grad():
        problem = Procrustes(base.flatten(1), tuned.flatten(1))
        columns, total = math.prod(delta.shape[1:]), norm_of(delta)

        @cache
        def attempt(rank: int) -> HRA:
            return HRA(_chain(problem, rank, seed, whole).to(delta.dtype))

        def error_at(rank: int) -> float:
            turned = attempt(rank).fold(base.double()) if total else base
            return norm_of(turned.double() - tuned.double()) / total if total else 0.0

        most = max(problem.size, 2)
        if whole and goal.rank is not None:
            most = max(most, goal.rank)
        even = goal.most_error is not None or goal.budget is not None
        rank = rank_for(
            goal,
            most=most - most % 2 if even else most,
            parameters=lambda r: r * columns,
            error_at=cache(error_at),
            step=2,
        )
        update, error = attempt(rank), error_at(rank)
        limit = 0.0 if error < 1e-5 else problem.limit()
    limit = None if limit is None else min(limit, error)
    notes = _rank_note(goal.rank, update.rank)
    return Fit(update, error, total, update.rank, update.u.numel(), limit=limit, notes=notes)


def _rank_note(asked: int | None, rank: int) -> tuple[str, ...]:
    if asked is None or asked == rank:
        return ()
    return (
        f"rank {asked} became {rank}: the nearest rotation takes no other number of reflections",
    )


def _chain(problem: Procrustes, rank: int, seed: int, whole: bool) -> Tensor:
    """The reflections of the best turn in ``rank`` dimensions, and pairs that cancel for the rest."""
    turn = problem.best(rank, seed, whole)
    u = turn.plane @ reflections(turn.inner) if problem.norm else turn.plane[:, :0]
    spare = max(rank, 2) - u.shape[1]
    u = torch.cat([u, turn.plane[:, :1].expand(-1, spare - spare % 2)], dim=1)
    return u if problem.lift is None else problem.lift @ u
