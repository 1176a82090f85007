"""The nearest matrix of a rank to a product of factors: Eckart–Young without dense detours.

The nearest to a dense matrix is nearest/lanczos.py's work.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adaptsurgery_formats.errors import ShapeError


class Approximation(NamedTuple):
    """up (o, n) and down (n, i) in float64, and ‖Δ − up·down‖ / ‖Δ‖ (0 where Δ is 0)."""

    up: Tensor
    down: Tensor
    error: float


def factor_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD U (o, p), s (p,), Vᵀ (p, i) of up (o, r) · down (r, i), in float64.

    QR of both factors leaves an SVD no larger than (r, r): O((o + i) r²).
    """
    left, upper = torch.linalg.qr(up.double())
    right, lower = torch.linalg.qr(down.double().t())
    u, s, vt = torch.linalg.svd(upper @ lower.t(), full_matrices=False)
    return left @ u, s, vt @ right.t()


def truncate_factors(up: Tensor, down: Tensor, rank: int) -> Approximation:
    """The best rank-``rank`` approximation of up·down; never an SVD of the product.

    The result has rank min(rank, r, o, i). Raises ShapeError for a rank below 1.
    """
    check_rank(rank)
    u, s, vt = factor_svd(up, down)
    return split(u[:, :rank], s[:rank], vt[:rank], tail_error(s, rank))


def split(u: Tensor, s: Tensor, vt: Tensor, error: float) -> Approximation:
    """U·diag(s)·Vᵀ as two factors of equal norms."""
    root = s.sqrt()
    return Approximation(u * root, root[:, None] * vt, error)


def tail_error(s: Tensor, rank: int) -> float:
    """√(Σ of the squared singular values past ``rank``, over all of them); s in falling order."""
    total = float(torch.linalg.vector_norm(s))
    return float(torch.linalg.vector_norm(s[rank:])) / total if total else 0.0


def check_rank(rank: int) -> None:
    if rank < 1:
        raise ShapeError(f"no LoRA has rank {rank}", next="a rank of at least 1")
