"""The leading singular triples of a dense matrix, without its SVD.

Block Golub–Kahan Lanczos (Golub, Luk & Overton, ACM TOMS 7, 1981): an orthonormal basis K of the
Krylov space of D·Dᵀ, from D times random numbers on; Z = DᵀK; the eigenpairs of the Gram matrix
ZᵀZ = KᵀDDᵀK, in float64, are the Ritz values σ² and what turns K into U. What U·Uᵀ·D keeps of
‖D‖² is their sum, exactly, so the error of a truncation is known without building it.

Small matrices, and ranks near the full one, go by the eigenvectors of their Gram matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from adaptsurgery.core.linalg import Approximation, check_rank, split
from adaptsurgery.nearest.scaling import in_range, powers
from adaptsurgery_formats.errors import ShapeError

TOL = 1e-5  # a step that gains less than 2·TOL of what is left is the last,
FALLING, FINE = 0.1, 1e-8  # unless it is less than so much of the one before: on then to 2·FINE
LEAST, MOST = 3, 16  # blocks in the basis
SMALL = 160  # up to this many rows or columns the Gram matrix is the quicker way
APART = 1e-4  # the largest cosine between vectors that count as orthogonal
CLEAN = 1e-2  # below this error float32's rounding shows, and float64 has the last word


class Leading(NamedTuple):
    """D ≈ U·diag(s)·Vᵀ in float64: u (o, k), s (k,) in falling order, vt (k, i); ``norm`` is ‖D‖."""

    u: Tensor
    s: Tensor
    vt: Tensor
    norm: float

    def errors(self) -> list[float]:
        """‖D − D̂‖/‖D‖ of ranks 0, 1, …, k (1 at 0; 0 everywhere where D is 0)."""
        if not self.norm:
            return [0.0] * (len(self.s) + 1)
        kept = (self.s / self.norm).square().cumsum(0).tolist()
        return [1.0, *(math.sqrt(max(0.0, 1 - share)) for share in kept)]

    def cut(self, rank: int) -> Leading:
        return Leading(self.u[:, :rank], self.s[:rank], self.vt[:rank], self.norm)


def truncate(matrix: Tensor, rank: int, *, seed: int = 0) -> Approximation:
    """The best rank-``rank`` approximation of a dense (o, i) matrix, its error measured on it."""
    triples = leading(matrix, rank, seed=seed)
    up, down, _ = split(triples.u, triples.s, triples.vt, 0.0)
    missing = float(torch.linalg.vector_norm(torch.addmm(matrix.double(), up, down, alpha=-1)))
    return Approximation(up, down, missing / triples.norm if triples.norm else 0.0)


@torch.no_grad()
def leading(matrix: Tensor, rank: int, *, seed: int = 0, tol: float = TOL) -> Leading:
    """The leading min(rank, o, i) singular triples of a matrix (o, i).

    The error of the truncation exceeds the optimum by a part of ``tol`` or so on a flat spectrum
    (4e-6 of it on random numbers, 1280², rank 16; a whole SVD does not), on one that falls by
    float32's rounding. One seed gives the same bits on one machine with one number of threads. Any
    finite scale will do; the matrix may be zero or of a lower rank: then singular values are zero,
    and their vectors any or zero. Raises ShapeError.
    """
    check_rank(rank)
    if matrix.dim() != 2 or 0 in matrix.shape:
        raise ShapeError("singular values are of a matrix (o, i)", seen=str(list(matrix.shape)))
    scaled, exponent = _in_range(matrix)
    tall = matrix.shape[0] > matrix.shape[1]
    wide = scaled.t() if tall else scaled
    rank = min(rank, wide.shape[0])
    short = wide.shape[0] <= SMALL or 8 * rank > wide.shape[0]
    u, s, vt, norm = _by_gram(wide, rank) if short else _by_lanczos(wide, rank, seed, tol)
    missing = rank - len(s)  # D's rank is lower, and its space was all there was to find
    u, s, vt = pad(u, (0, missing)), pad(s, (0, missing)), pad(vt, (0, 0, 0, missing))
    u, vt = (vt.t(), u.t()) if tall else (u, vt)
    low, high = powers(exponent, 2)
    return Leading(u, s * low * high, vt, norm * low * high)


def leading_until(
    matrix: Tensor, enough: Callable[[float], bool], *, seed: int = 0, tol: float = TOL
) -> Leading:
    """The fewest leading triples whose truncation has an ``enough`` relative error.

    They are all where no truncation has. The number asked of ``leading`` doubles each time.
    """
    most, probe = min(matrix.shape), 16
    while True:
        triples = leading(matrix, probe, seed=seed, tol=tol)
        good = [k for k, error in enumerate(triples.errors()) if k and enough(error)]
        if good or probe >= most:
            return triples.cut(good[0]) if good else triples
        probe *= 2


def _in_range(matrix: Tensor) -> tuple[Tensor, int]:
    """The matrix as it is where its squares stay in the range of its dtype; else ``in_range``."""
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    largest = max(abs(float(end)) for end in torch.aminmax(matrix))
    reach = 1e100 if matrix.dtype == torch.float64 else 1e10
    return (matrix, 0) if 1 / reach < largest < reach else in_range(matrix)


def _by_gram(wide: Tensor, rank: int) -> Leading:
    """The leading triples by the eigenvectors of D·Dᵀ and one pass through D itself.

    Thanks to that pass squaring D costs no accuracy down to 1e-8 of its largest singular value.
    """
    wide = wide.double()
    spare = min(wide.shape[0], rank + 8)
    space = torch.linalg.eigh(wide @ wide.t()).eigenvectors[:, -spare:]
    return _through(wide, wide.t() @ space, rank)


def _through(wide: Tensor, rows: Tensor, rank: int) -> Leading:
    """The leading triples of what D does on the span of ``rows`` (i, p), in float64."""
    wide, right = wide.double(), torch.linalg.qr(rows.double()).Q
    u, s, vt = torch.linalg.svd(wide @ right, full_matrices=False)
    norm = float(torch.linalg.vector_norm(wide))
    return Leading(u, s, vt @ right.t(), norm).cut(rank)


def _by_lanczos(wide: Tensor, rank: int, seed: int, tol: float) -> Leading:
    """Blocks are added until a step captures next to nothing more, or finds nothing new."""
    block = max(16, 8 * math.ceil(rank / 16))
    generator = torch.Generator().manual_seed(seed)
    ahead = torch.randn(wide.shape[1], block, generator=generator).to(wide)
    norm = float(torch.linalg.vector_norm(wide, dtype=torch.float64))
    basis = wide.new_empty(wide.shape[0], MOST * block)
    images = wide.new_empty(wide.shape[1], MOST * block, dtype=torch.float64)
    gram, held, captured, gained = images.new_empty(0, 0), 0, 0.0, math.inf
    while held < basis.shape[1]:
        fresh = _orthonormal(wide @ ahead, basis[:, :held])
        if fresh is None:  # an invariant space, of a low rank or of equal singular values
            ahead = torch.randn(ahead.shape, generator=generator).to(wide)
            fresh = _orthonormal(wide @ ahead, basis[:, :held])
        if fresh is None:
            break
        image = wide.t() @ fresh
        basis[:, held : held + block], images[:, held : held + block] = fresh, image
        held += block
        gram = _grown(gram, images[:, :held])
        if held >= LEAST * block:
            before, captured = captured, float(torch.linalg.eigvalsh(gram)[-rank:].sum())
            last, gained = gained, captured - before
            least = tol if gained > FALLING * last else min(tol, FINE)
            if gained <= 2 * least * max(norm**2 - captured, 0.0):
                break
        ahead = torch.linalg.qr(image).Q
    triples = _ritz(basis[:, :held], images[:, :held], gram, rank, norm)
    clean = triples.errors()[-1] < CLEAN and wide.dtype != torch.float64
    return _through(wide, images[:, :held], rank) if clean else triples


def _grown(gram: Tensor, images: Tensor) -> Tensor:
    """ZᵀZ, of which all but the last block's rows and columns are known."""
    held = gram.shape[0]
    edge = images.t() @ images[:, held:]
    grown = edge.new_empty(edge.shape[0], edge.shape[0])
    grown[:held, :held], grown[:, held:], grown[held:, :held] = gram, edge, edge[:held].t()
    return grown


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor | None:
    """A basis of what ``block`` adds to ``basis``; None where that is rounding noise.

    Noise comes of an invariant subspace (D has a low rank). A block that is in the span but for a
    few columns loses their orthogonality in the first pass; the later ones restore it, or give up.
    """
    size = torch.linalg.vector_norm(block)
    noise = 8 * torch.finfo(block.dtype).eps * size
    for _ in range(4):
        block = block - basis @ (basis.t() @ block)
        block = block - basis @ (basis.t() @ block)
        if bool(torch.linalg.vector_norm(block) <= noise):
            return None
        block, noise = torch.linalg.qr(block).Q, noise * 0
        if not basis.shape[1] or bool((basis.t() @ block).abs().max() < APART):
            return block
    return None


def _ritz(basis: Tensor, images: Tensor, gram: Tensor, rank: int, norm: float) -> Leading:
    """U = K·X and Vᵀ = (Z·X)ᵀ/s, for the leading eigenvectors X of ZᵀZ."""
    values, vectors = torch.linalg.eigh(gram)
    values, turn = values[-rank:].flip(0), vectors[:, -rank:].flip(1)
    s = values.clamp_min(0).sqrt()
    vt = (images @ turn).t() / torch.where(s > 0, s, 1)[:, None]
    return Leading(basis.double() @ turn, s, vt, norm)
