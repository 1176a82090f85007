"""The nearest Kronecker product: D ≈ w1 ⊗ w2, either factor whole, of a low rank, or a Tucker core.

Van Loan and Pitsianis (Linear Algebra for Large Scale and Real-Time Applications, 1993): with
R[(a, c), (b, d, k)] = D[(a, b), (c, d), k] a Kronecker product is an outer product,
‖D − w1 ⊗ w2‖ = ‖R − vec(w1)·vec(w2)ᵀ‖, so the leading singular pair of R is the best one of all.
Where a factor must be of a low rank, two half-steps alternate: the best w2 for this w1 is
vec(w1)ᵀ·R cut to its rank, and the other way round. What is captured never falls.

Products with R run in its own dtype and are summed in float64; everything small is float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adaptsurgery.nearest.lanczos import leading

STEPS = 30  # pairs of half-steps
GAIN = 1e-8  # of ‖R‖²: a step that captures no more than that is the last
LANCZOS = 400
CONVERGED = 1e-7  # of σ1²
SMALL = 256  # sides of R up to this: the Gram matrix, solved outright
SMALL_SIDE = 96  # sides of a factor up to this: cut by an exact decomposition at every step
CHUNK = 8192  # numbers of a float32 sum, at most


def rearranged(delta: Tensor, a: int, c: int) -> Tensor:
    """R (a·c, b·d·∏k) of D (a·b, c·d, *k)."""
    split = delta.reshape(a, delta.shape[0] // a, c, delta.shape[1] // c, -1)
    return split.permute(0, 2, 1, 3, 4).reshape(a * c, -1)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix (p, q) · vector (q,) in float64, from products of the matrix's dtype."""
    narrow = vector.to(matrix.dtype)
    out = matrix.new_zeros(matrix.shape[0], dtype=torch.float64)
    for part, piece in zip(torch.split(matrix, CHUNK, 1), torch.split(narrow, CHUNK)):
        out += part.mv(piece)
    return out


def leading_vector(matrix: Tensor, seed: int = 0) -> Tensor:
    """The leading left singular vector (p,) of a matrix (p, q), in float64; σ1² to 1e-6 or better.

    The eigenvector of the small Gram matrix where a side is short; else Golub–Kahan–Lanczos with
    the whole basis kept orthogonal (Golub and Van Loan, Matrix Computations, 10.4).
    """
    p, q = matrix.shape
    if p <= SMALL or p <= q:
        return _top(matrix) if p <= SMALL else _lanczos(matrix, seed)
    right = _top(matrix.t()) if q <= SMALL else _lanczos(matrix.t(), seed)
    return _unit(times(matrix, right))


def outer_error(matrix: Tensor, left: Tensor, norm: float) -> float:
    """‖R − left·(Rᵀ·left)ᵀ‖/‖R‖ for a unit ``left``, from the residual itself."""
    right = times(matrix.t(), left).to(matrix)
    missing = 0.0
    for rows, part in zip(torch.split(matrix, 64), torch.split(left.to(matrix), 64)):
        missing += float(torch.linalg.vector_norm(rows.addr(part, right, alpha=-1))) ** 2
    return math.sqrt(missing) / norm


def _top(matrix: Tensor) -> Tensor:
    """The leading vector by the Gram matrix (p, p), for few rows."""
    gram = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
    for part in torch.split(matrix, CHUNK, 1):
        gram += part @ part.t()
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, -1]


def _lanczos(matrix: Tensor, seed: int) -> Tensor:
    """K spans the left Krylov space and Z = matrixᵀ·K: ‖Z·x‖² for a unit x is what K·x captures."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], generator=generator, dtype=torch.float64)
    k = _unit(times(matrix, start.to(matrix.device)))
    keys, images, captured = [k], [times(matrix.t(), k)], 0.0
    while True:
        basis, image = torch.stack(keys, 1), torch.stack(images, 1)
        values, vectors = torch.linalg.eigh(image.t() @ image)
        best = float(values[-1])
        if best - captured <= CONVERGED * best or len(keys) >= min(LANCZOS, *matrix.shape):
            return _unit(basis @ vectors[:, -1])
        captured = best
        k = times(matrix, images[-1])
        size = float(k.norm())
        for _ in range(2):  # twice is enough
            k = k - basis @ (basis.t() @ k)
        if float(k.norm()) <= 1e-6 * size:  # the space is invariant: nothing is left to find
            return _unit(basis @ vectors[:, -1])
        keys.append(_unit(k))
        images.append(times(matrix.t(), keys[-1]))


def _unit(vector: Tensor) -> Tensor:
    unit: Tensor = vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny)
    return unit


class CutMatrix(ABC):
    """The set that a factor is taken from; each search starts from the answer of the last."""

    @abstractmethod
    def nearest(self, factor: Tensor) -> Tensor:
        """The member (m, n[, k]) nearest to ``factor``, at least as near as along the last spaces."""

    @abstractmethod
    def tensors(self, factor: Tensor) -> tuple[Tensor, ...]:
        """The stored tensors of a member."""


class Whole(CutMatrix):
    """The set of all matrices; a member is one tensor."""

    def nearest(self, factor: Tensor) -> Tensor:
        return factor

    def tensors(self, factor: Tensor) -> tuple[Tensor, ...]:
        return (factor,)


@dataclass
class LowRankCut(CutMatrix):
    """The matrices (m, n[·k]) of rank ``rank``; a member is (m, r), (r, n·k), zero past m or n."""

    rank: int
    space: Tensor | None = None

    def nearest(self, factor: Tensor) -> Tensor:
        matrix = factor.flatten(1)
        space = self.space = leading_space(matrix, self.rank, self.space)
        return (space @ (space.t() @ matrix)).reshape(factor.shape)

    def tensors(self, factor: Tensor) -> tuple[Tensor, ...]:
        matrix = factor.flatten(1)
        assert self.space is not None
        u, s, vt = torch.linalg.svd(self.space.t() @ matrix, full_matrices=False)
        root = s.sqrt()
        up, down = (self.space @ u) * root, root[:, None] * vt
        return _padded(up, up.shape[0], self.rank), _padded(down, self.rank, down.shape[1])


@dataclass
class Tucker(CutMatrix):
    """The tensors (m, n, k) of multilinear rank (r, r, k), by higher-order orthogonal iteration.

    De Lathauwer, De Moor and Vandewalle, SIAM J. Matrix Anal. Appl. 21 (2000). A member is three
    tensors as LyCORIS stores them: (r, m), (r, n) and the core (r, r, k).
    """

    rank: int
    spaces: list[Tensor | None] = field(default_factory=lambda: [None, None])

    def nearest(self, factor: Tensor) -> Tensor:
        turned = factor.transpose(0, 1)
        if self.spaces[1] is None:
            self.spaces[1] = leading_space(turned.flatten(1), self.rank)
        for _ in range(2):
            for side, (mine, other) in enumerate(((factor, 1), (turned, 0))):
                space = self.spaces[other]
                assert space is not None
                seen = torch.einsum("mnk,nr->mrk", mine, space).flatten(1)
                self.spaces[side] = leading_space(seen, self.rank, self.spaces[side])
        left, right = self._both()
        return torch.einsum("mp,pqk,nq->mnk", left, self._core(factor), right)

    def _both(self) -> tuple[Tensor, Tensor]:
        left, right = self.spaces
        assert left is not None and right is not None
        return left, right

    def _core(self, factor: Tensor) -> Tensor:
        return torch.einsum("mnk,mp,nq->pqk", factor, *self._both())

    def tensors(self, factor: Tensor) -> tuple[Tensor, ...]:
        (left, right), core, r = self._both(), self._core(factor), self.rank
        # Three tensors share the norm: a unit basis with the root of the share that is its due.
        share = float(core.norm().clamp_min(torch.finfo(core.dtype).tiny)) ** (1 / 3)
        whole = core.new_zeros(r, r, core.shape[2])
        whole[: core.shape[0], : core.shape[1]] = core / share**2
        return (
            _padded(left.t() * share, r, left.shape[0]),
            _padded(right.t() * share, r, right.shape[0]),
            whole,
        )


def leading_space(matrix: Tensor, rank: int, warm: Tensor | None = None) -> Tensor:
    """An orthonormal basis (m, r) of the leading left singular space of a float64 matrix (m, n).

    Exact where a side is short, by Lanczos where there is no ``warm`` basis to begin with; else two
    steps of orthogonal iteration from that, which never capture less than it did.
    """
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= SMALL_SIDE:
        return _exact_space(matrix, rank)
    if warm is None:
        return _orthonormal(leading(matrix, rank).u)
    for _ in range(2):
        warm = _orthonormal(matrix @ (matrix.t() @ warm))
    return warm


def _exact_space(matrix: Tensor, rank: int) -> Tensor:
    wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if wide else matrix.t()
    space: Tensor = torch.linalg.eigh(short @ short.t()).eigenvectors[:, -rank:]
    return space if wide else _orthonormal(matrix @ space)


def _orthonormal(matrix: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(matrix).Q
    return basis


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(
        matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])
    )


@dataclass(frozen=True)
class Nearest:
    """Both factors' tensors in float64, and ‖D̂‖²/‖D‖² after each pair of half-steps."""

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    captured: list[float]


def nearest_product(
    r: Tensor,
    start: Tensor,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    cuts: tuple[CutMatrix, CutMatrix],
    steps: int = STEPS,
) -> Nearest:
    """w1 ⊗ w2 near R (a·c, b·d·∏k), from ``start``, R's leading left singular vector.

    ``shapes`` are those of w1 (a, c) and w2 (b, d[, ∏k]). Both factors have elements of one mean
    square in the end.
    """
    (one, two), (left, right) = shapes, cuts
    total = float(torch.linalg.vector_norm(r, dtype=torch.float64)) ** 2
    w1, captured = left.nearest(start.reshape(one)), [0.0]
    whole = isinstance(left, Whole) and isinstance(right, Whole)
    while True:
        w2 = right.nearest(times(r.t(), _unit(w1.flatten())).reshape(two))
        unit = _unit(w2.flatten())
        w1 = left.nearest(times(r, unit).reshape(one))
        captured.append(float(w1.square().sum()) / total)
        if whole or len(captured) > steps or captured[-1] - captured[-2] <= GAIN:
            break
    balance = (w1.norm() / w1.numel() ** 0.5 * unit.numel() ** 0.5).sqrt()
    second = unit.reshape(two) * balance
    return Nearest(left.tensors(w1 / balance), right.tensors(second), captured[1:])
