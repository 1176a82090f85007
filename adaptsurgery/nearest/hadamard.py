"""The nearest Hadamard product of two low-rank matrices: D ≈ (A1·B1ᵀ) ∘ (A2·B2ᵀ), m×n of rank r each.

A side is a tensor (2, m, r): both halves' factors, so D[o, n] ≈ Σ A1[o,p] A2[o,q] B1[n,p] B2[n,q].
The problem is not convex. What is done about it:

- Alternating least squares. With the columns' side fixed each row is its own small problem,
  bilinear in a1 and a2, and all rows are solved at once; then the sides change places. Compressed:
  with C = KhatriRao(B1, B2) (n, r²) all that touches D is P = D·C, once for both halves, and
  Q = CᵀC replaces C. Where r⁴ outgrows that, each half is solved from D itself.
- Lift: the unconstrained (r, r) solution of a row, P·Q⁻¹, cut to its leading singular pair. It does
  not start from where the row is, and so leaves basins that alternation alone would stay in.
- Extrapolation along the last step (as Ang and Gillis, Neural Computation 31, 2019), taken back
  where it did not pay.
- Starts: the truncated SVD times ones, which is the LoRA of the same rank, so that no result is
  worse; and where D's singular values fall off past r², as those of any true product do, random
  ones inside that space, where a sweep costs next to nothing. Up to STARTS times those that came
  nearest set out again with some rows made new, which finds in three rounds what fresh starts
  alone miss in sixteen.
- Judgement on D itself: the least residual of the factors in D's dtype, among those whose terms do
  not cancel.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from adaptsurgery.nearest.lanczos import Leading, leading

SWEEPS = 80
LIFTED = 4
GAIN = 1e-4  # of the squared error: three sweeps in a row that gain less are the last
STARTS = 16  # rounds of them, one after the other
TOGETHER = 1 << 20  # numbers of D in as many starts as are one, up to STARTS
CLOSE = 1e-8  # of ‖D‖²: a start that is there arrives
START_SWEEPS = 40
FEW = 4  # of so many that set out together the nearest one sets out again, where there are as many
FRESH = 0.3  # of the rows of those that came nearest, which are where the next set out from
CLIFF = 1.25  # singular values r² and r² + 1 differ by that where D came from a product
NOTHING_LEFT = 1e-14  # of ‖D‖²: nothing to gain in float32
ROUNDING = 1e-10  # of ‖D‖²: what float32 leaves outside of an exact product's space
CANCELLING = 1e3  # of ‖D‖: terms as large as that leave nothing of the result in low precision
UNSOUND = 1e4  # of ‖D‖²: the same, in the sum of the squares, while the search is on
MOST = 64  # ranks beyond are written as the LoRA that they start from
FINE = 1 << 16  # numbers of a D that is worked on in float64
BLOCK = 1 << 20  # numbers of D that are looked at together


class Product(NamedTuple):
    """Sides (2, m, r) and (2, n, r) in float64; D's leading singular values; and notes on a
    search that did not go as usual."""

    rows: Tensor
    columns: Tensor
    spectrum: Tensor
    notes: tuple[str, ...] = ()


def khatri_rao(side: Tensor) -> Tensor:
    """(…, 2, m, r) → (…, m, r²): row by row the outer product of both halves."""
    first, second = side.unbind(-3)
    return (first[..., :, None] * second[..., None, :]).flatten(-2)


def product(rows: Tensor, columns: Tensor) -> Tensor:
    """(A1·B1ᵀ) ∘ (A2·B2ᵀ), (m, n)."""
    return (rows @ columns.mT).prod(-3)


class Difference(ABC):
    """D as a sweep sees it: its products with columns, and its transpose."""

    square: float  # ‖D‖²
    ridge: float  # what is added to a diagonal, of its mean

    @abstractmethod
    def times(self, columns: Tensor) -> Tensor:
        """D·columns, in float64."""

    @abstractmethod
    def flipped(self) -> Difference:
        """The same view of Dᵀ."""


class DenseDifference(Difference):
    """D as it is, a dense matrix."""

    def __init__(self, matrix: Tensor, square: float | None = None) -> None:
        self.matrix = matrix
        self.ridge = 1e-6 if matrix.dtype == torch.float32 else 1e-10
        norm = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
        self.square = norm**2 if square is None else square

    def times(self, columns: Tensor) -> Tensor:
        return (self.matrix @ columns.to(self.matrix)).double()

    def flipped(self) -> DenseDifference:
        return DenseDifference(self.matrix.t(), self.square)


class Factored(Difference):
    """D = left (m, k) · right (n, k)ᵀ, in float64."""

    ridge = 1e-10

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right
        self.square = float(((left.t() @ left) * (right.t() @ right)).sum())

    def times(self, columns: Tensor) -> Tensor:
        return self.left @ (self.right.t() @ columns)

    def flipped(self) -> Factored:
        return Factored(self.right, self.left)


class _Rows:
    """The least squares of every row, given the other side: fQfᵀ − 2⟨p, f⟩ with f = a1 ⊗ a2."""

    def __init__(self, target: Difference, other: Tensor) -> None:
        c = khatri_rao(other)
        r = other.shape[-1]
        self.rank, self.ridge = r, target.ridge
        self.p, self.q = target.times(c), c.mT @ c
        whole = self.q.reshape(*self.q.shape[:-2], r, r, r, r)
        # (q, q') → (p, p') for a1 given a2, and the other way round.
        self.tables = (
            whole.movedim((-3, -1), (-4, -3)).flatten(-4, -3).flatten(-2),
            whole.movedim((-4, -2), (-4, -3)).flatten(-4, -3).flatten(-2),
        )

    def _squares(self, rows: Tensor) -> Tensor:
        """(…, r²) → (…, r, r)."""
        return rows.reshape(*rows.shape[:-1], self.rank, self.rank)

    def value(self, own: Tensor) -> Tensor:
        """The least squares of every row, less its part of ‖D‖²."""
        f = khatri_rao(own)
        return ((f @ self.q - 2 * self.p) * f).sum(-1)

    def terms(self, own: Tensor) -> Tensor:
        """Σ of the squared norms of the r² products of rank one that D̂ is the sum of."""
        return (khatri_rao(own).square() @ self.q.diagonal(dim1=-2, dim2=-1)[..., None]).sum(
            (-1, -2)
        )

    def solved(self, own: Tensor) -> Tensor:
        """a1 given a2, then a2 given that; both of one norm."""
        sides = self._squares(self.p)
        first, second = own.unbind(-3)
        first = self._solve(self.tables[0], sides, first, second)
        second = self._solve(self.tables[1], sides.mT, second, first)
        return _evened(first, second)

    def _solve(self, table: Tensor, sides: Tensor, own: Tensor, other: Tensor) -> Tensor:
        squares = (other[..., :, None] * other[..., None, :]).flatten(-2)
        normal = self._squares(squares @ table)
        return _ridged(normal, (sides @ other[..., None])[..., 0], own, self.ridge)

    def lifted(self, own: Tensor) -> Tensor:
        """The leading pair of each row's P·Q⁻¹, by power iteration from where the row is."""
        damped = self.q.clone()
        diagonal = damped.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(1e-8 * diagonal.mean(-1, keepdim=True) + _TINY)
        factor, _ = torch.linalg.cholesky_ex(damped)
        free = self._squares(torch.cholesky_solve(self.p.mT, factor).mT.contiguous())
        before = own.select(-3, 0)
        first = _unit(before + 1e-3 * before.norm(dim=-1, keepdim=True))
        for _ in range(6):
            second = _unit((free.mT @ first[..., None])[..., 0])
            grown = (free @ second[..., None])[..., 0]
            first = _unit(grown)
        # The sign of a pair is free: the one nearer to the last, so that a step has a direction.
        turned = torch.where((first * before).sum(-1, keepdim=True) < 0, -1.0, 1.0)
        return self.solved(_evened(grown * turned, second * turned))


_TINY = torch.finfo(torch.float64).tiny


def _unit(rows: Tensor) -> Tensor:
    unit: Tensor = rows / rows.norm(dim=-1, keepdim=True).clamp_min(_TINY)
    return unit


def _evened(first: Tensor, second: Tensor) -> Tensor:
    """The same outer products, row by row, from rows of one norm: a side (…, 2, m, r)."""
    side = torch.stack([first, second], -3)
    norms = side.norm(dim=-1, keepdim=True).clamp_min(_TINY)
    evened: Tensor = side / norms * norms.prod(-3, keepdim=True).sqrt()
    return evened


def _ridged(normal: Tensor, right: Tensor, own: Tensor, ridge: float) -> Tensor:
    """The solution (…, m, r) of systems (r, r), drawn a little to ``own``: near singular ones stay."""
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    extra = ridge * diagonal.mean(-1, keepdim=True) + _TINY
    diagonal.add_(extra)
    factor, _ = torch.linalg.cholesky_ex(normal)
    return torch.cholesky_solve((right + extra * own)[..., None], factor)[..., 0]


def _side(target: Difference, other: Tensor, own: Tensor, lift: bool) -> tuple[Tensor, Tensor]:
    """A better ``own`` side, and ‖D − D̂‖² of it."""
    r = own.shape[-1]
    if isinstance(target, DenseDifference) and 4 * r * r > min(target.matrix.shape):
        return _uncompressed(target.matrix, other, own, target.ridge)
    rows = _Rows(target, other)
    new = rows.solved(own)
    value = rows.value(new)
    if lift:
        tried = rows.lifted(own)
        reached = rows.value(tried)
        better = reached < value
        new = torch.where(better[..., None, :, None], tried, new)
        value = torch.where(better, reached, value)
    left = (target.square + value.sum(-1)).clamp_min(0)
    # Where large terms cancel, the sum above has lost its digits, and the sides are of no use.
    return new, left.masked_fill(rows.terms(new) > UNSOUND * target.square, math.inf)


def _uncompressed(
    matrix: Tensor, other: Tensor, own: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """Both halves from D: the normal matrix of a row is Bᵀ·diag(w²)·B, w its row of the other half."""
    narrow = other.to(matrix)
    r, left = other.shape[2], 0.0
    pairs = [khatri_rao(torch.stack([half, half])) for half in narrow]
    done = []
    step = max(1, BLOCK // max(matrix.shape[1], r * r))
    for start in range(0, len(matrix), step):
        part, block = own[:, start : start + step], matrix[start : start + step]
        for half in (0, 1):
            weights = part[1 - half].to(matrix) @ narrow[1 - half].t()
            normal = (weights.square() @ pairs[half]).double().view(-1, r, r)
            right = ((block * weights) @ narrow[half]).double()
            new = _ridged(normal, right, part[half], ridge)
            part = torch.stack([new, part[1]] if half == 0 else [part[0], new])
        done.append(_evened(*part))
        missing = block - product(done[-1].to(matrix), narrow)
        left += float(torch.linalg.vector_norm(missing, dtype=torch.float64)) ** 2
    return torch.cat(done, 1), own.new_tensor(left)


def refine(
    target: Difference,
    rows: Tensor,
    columns: Tensor,
    sweeps: int,
    *,
    gain: float = GAIN,
    lifted: int = LIFTED,
    enough: float = NOTHING_LEFT,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best sides of some sweeps from a start, and their ‖D − D̂‖²/‖D‖².

    Several starts (s, 2, …) run at once, until one is good ``enough`` or all stall.
    The first ``lifted`` sweeps and every eighth lift.
    """
    flipped, best = target.flipped(), (rows, columns)
    least = rows.new_full(rows.shape[:-3], math.inf)
    stride, idle = torch.full_like(least, 0.5), torch.zeros_like(least)
    for sweep in range(sweeps):
        lift = sweep < lifted or sweep % 8 == 0
        rows, _ = _side(target, columns, rows, lift)
        columns, left = _side(flipped, rows, columns, lift)
        left = left / target.square
        better = left < least
        idle = torch.where(better, torch.where(least - left < gain * least, idle + 1, 0), idle)
        least = torch.where(better, left, least)
        wide, step = better[..., None, None, None], stride[..., None, None, None]
        kept = [torch.where(wide, new, old) for new, old in zip((rows, columns), best)]
        rows, columns = (
            new + step * (new - old) for new, old in zip(kept, best)
        )  # 0 if not better
        best = kept[0], kept[1]
        stride = torch.where(better, (1.05 * stride).clamp_max(1), stride / 2)
        if bool((least <= enough).any() or ((idle >= 3) | (stride < 1e-3)).all()):
            break
    return *best, least


@torch.no_grad()
def nearest_product(delta: Tensor, rank: int, seed: int = 0) -> Product:
    """A product of ``rank`` r ≤ min(m, n) near a matrix (m, n), at least as near as its rank-r SVD.

    One seed gives the same bits on one machine with one number of threads.
    """
    matrix = delta.double() if delta.numel() <= FINE else delta
    wanted = rank * rank + 2 if _may_fall_off(matrix, rank) else rank
    svd = leading(matrix, wanted, seed=seed, tol=1e-4)
    lora = _from_svd(svd.cut(rank))
    if rank == 1:  # a product of rank 1 too
        return Product(*lora, svd.s)
    if not svd.norm or rank > MOST:
        much = f"rank {rank} is above {MOST}: written as the LoRA of that rank, times ones"
        return Product(*lora, svd.s, (much,) if svd.norm else ())
    generator = torch.Generator().manual_seed(seed)
    tried, target = [], DenseDifference(matrix)
    inside = _inside(matrix, svd, rank, generator) if wanted > rank else None
    if inside is not None:
        tried.append(inside.sides)
        if inside.outside > ROUNDING:
            tried.append(refine(target, *inside.sides, START_SWEEPS)[:2])
    if inside is None or inside.left > inside.enough:
        tried.append(refine(target, *_stirred(*lora, generator), SWEEPS)[:2])
    best = _judged(delta, tried, lora)
    alike = "no product is nearer than the LoRA of its rank, times ones"
    return Product(*best, svd.s, (alike,) if best is lora else ())


def _may_fall_off(matrix: Tensor, rank: int) -> bool:
    """Whether singular values past r² exist, and cost little to look at."""
    short = min(matrix.shape)
    return rank * rank < short and (short <= 1024 or 8 * (rank * rank + 1) <= short)


def _from_svd(svd: Leading) -> tuple[Tensor, Tensor]:
    """The truncated SVD times ones: the second half is one column of ones, and zeros."""
    root = svd.s.sqrt()
    sides = []
    for basis in (svd.u, svd.vt.t()):
        ones = torch.zeros_like(basis)
        ones[:, 0] = 1
        sides.append(torch.stack([basis * root, ones]))
    return sides[0], sides[1]


def _stirred(rows: Tensor, columns: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same product, with random numbers in one factor where both were 0, and no way led on."""
    noise = torch.randn(columns.shape[1:], generator=generator, dtype=torch.float64)
    stirred = columns.clone()
    stirred[1, :, 1:] = noise[:, 1:].to(columns)
    return rows, stirred


class _Inside(NamedTuple):
    """The best ``sides`` of some starts in D's leading space of r².

    As parts of ‖D‖²: ``left`` is what they miss of D there, ``outside`` is what lies outside that
    space, and ``enough`` what a product with noise all around would miss: no more is tried then.
    """

    sides: tuple[Tensor, Tensor]
    left: float
    outside: float
    enough: float


def _inside(matrix: Tensor, svd: Leading, rank: int, generator: torch.Generator) -> _Inside | None:
    """The best product in D's leading space of r²; None where D has no cliff after r².

    Where the next step is more than half as steep the search makes one round of starts only: the
    values behind a product's own would be noise's, which are much alike.
    """
    k = rank * rank
    ends = [float(svd.s[at]) if at < len(svd.s) else 0.0 for at in (0, k - 1, k, k + 1)]
    noisy = ends[2] > 1e-6 * ends[0]
    if noisy and ends[2] * CLIFF > ends[1]:
        return None
    falling = noisy and ends[3] > 0 and ends[2] ** 3 > ends[1] * ends[3] ** 2
    wide = matrix.double()
    left: Tensor = torch.linalg.qr(wide @ svd.vt[:k].t()).Q
    target = Factored(left, wide.t() @ left)
    outside = 1 - target.square / float(wide.square().sum())
    m, n = matrix.shape
    enough = max(NOTHING_LEFT, outside * min(1.0, 2 * k * (m + n) / (m * n)))
    at_once = max(1, min(STARTS, TOGETHER // (m * n)))
    lifted = START_SWEEPS if at_once > 1 else LIFTED  # few rows: more basins, and cheap to leave
    best: tuple[Tensor, Tensor] | None = None
    least = math.inf
    start = _random(target, at_once, rank, generator)
    for _ in range(1 if falling else STARTS):
        *sides, reached = refine(
            target, *start, START_SWEEPS, gain=1e-3, lifted=lifted, enough=enough
        )
        at = int(reached.argmin())
        if float(reached[at]) < least:
            best, least = (sides[0][at], sides[1][at]), float(reached[at])
        if least <= max(CLOSE, enough):
            break
        start = fresh = _random(target, at_once, rank, generator)
        if at_once >= FEW:
            ahead = reached.argsort()[: at_once // FEW].repeat(at_once)[:at_once]
            start = (
                _mixed(sides[0][ahead], fresh[0], generator),
                _mixed(sides[1][ahead], fresh[1], generator),
            )
    assert best is not None
    if least > NOTHING_LEFT:  # slow is not stuck
        *sides, reached = refine(target, *best, 4 * START_SWEEPS, gain=1e-3)
        best, least = (sides[0], sides[1]), float(reached)
    return _Inside(best, least, outside, enough)


def _random(
    target: Factored, count: int, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    rows, columns = (
        torch.randn(count, 2, len(basis), rank, generator=generator, dtype=torch.float64).to(basis)
        for basis in (target.left, target.right)
    )
    return rows, columns


def _mixed(side: Tensor, fresh: Tensor, generator: torch.Generator) -> Tensor:
    """A side with a FRESH part of its rows random: where most rows have settled, rightly or not,
    the others are what a start from there still decides."""
    size = side.square().mean((-3, -2, -1), keepdim=True).sqrt()
    chosen = torch.rand(*side.shape[:-3], 1, side.shape[-2], 1, generator=generator) < FRESH
    return torch.where(chosen, fresh * size, side)


def _judged(
    delta: Tensor, tried: list[tuple[Tensor, Tensor]], lora: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The sides nearest to D, in D's dtype, of those whose terms do not cancel; else the LoRA's."""
    best, least = lora, _measured(delta, *lora)[0]
    for sides in tried:
        rows, columns = balanced(*sides)
        missing, terms, total = _measured(delta, rows, columns)
        if missing < least and terms <= CANCELLING**2 * total:
            best, least = (rows, columns), missing
    return best


def _measured(delta: Tensor, rows: Tensor, columns: Tensor) -> tuple[float, float, float]:
    """‖D − D̂‖², ‖(|A1|·|B1|ᵀ) ∘ (|A2|·|B2|ᵀ)‖² and ‖D‖², of sides in the dtype of D."""
    rows, columns = rows.to(delta), columns.to(delta)
    sums = [0.0, 0.0, 0.0]
    step = max(1, BLOCK // delta.shape[1])
    for start in range(0, len(delta), step):
        part, block = rows[:, start : start + step], delta[start : start + step]
        terms = product(part.abs(), columns.abs())
        for at, matrix in enumerate((block - product(part, columns), terms, block)):
            sums[at] += float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    return sums[0], sums[1], sums[2]


def balanced(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, its factors' columns of one mean square on both sides."""
    above, below = (side.square().mean(1, keepdim=True).sqrt() for side in (rows, columns))
    held = (above > 0) & (below > 0)
    ratio = torch.where(held, below / torch.where(held, above, 1.0), 1.0).sqrt()
    return rows * ratio, columns / ratio
