"""The rotation of few dimensions that best turns one matrix's rows into another's.

A product of r reflections is Q = I + V(R − I)Vᵀ with V (n, r) orthonormal and R (r, r) orthogonal.
With M = W0ᵀW1 and A = VᵀMV,

    ‖W1 − W0·Q‖² = ‖W1 − W0‖² − gain(V),    gain = 2(‖A‖_* − tr A)

at the R that is best for V, the polar factor of A (Schönemann, Psychometrika 31, 1966). V climbs
on the Grassmann manifold from there, and needs M alone. All in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptsurgery.nearest.lanczos import leading

STEPS, PATIENCE = 300, 12  # of the ascent: in all, and without gain
NEAR = 1e-3  # an error below which the row space of D is the place to climb from
LYING = 1e-11  # the distance from its axis within which a column of R lies on it
LARGE = 2048  # columns up to which whole eigen-decompositions are worth their time


@dataclass(frozen=True, eq=False)
class Turn:
    """V (n, r) and R (r, r) of Q = I + V(R − I)Vᵀ, the ‖W1 − W0‖² that Q accounts for, and MᵀV."""

    plane: Tensor
    inner: Tensor
    gain: float
    turned: Tensor


class Procrustes:
    """W0 and W1 (m, n), as far as rotations from one to the other go.

    Where n > 2m, all of it happens in the row space of both, whose basis is ``lift`` (n, 2m).
    """

    def __init__(self, base: Tensor, tuned: Tensor) -> None:
        self.base, self.tuned, self.lift = base.double(), tuned.double(), None
        if base.shape[1] > 2 * base.shape[0]:
            rows = torch.cat([self.base, self.tuned - self.base])
            self.lift = torch.linalg.qr(rows.t()).Q
            self.base, self.tuned = self.base @ self.lift, self.tuned @ self.lift
        self.change = self.tuned - self.base
        self.norm = float(torch.linalg.vector_norm(self.change))
        self.moment = self.base.t() @ self.tuned
        self._skew: Tensor | None = None

    @property
    def size(self) -> int:
        """The dimensions that there are to turn in."""
        return self.moment.shape[0]

    def limit(self) -> float | None:
        """The least ‖W1 − W0·Q‖/‖D‖ of any orthogonal Q; None for more than LARGE columns."""
        if not self.norm:
            return 0.0
        if self.size > LARGE:
            return None
        core = self.moment
        if self.size > self.base.shape[0]:
            left, right = (torch.linalg.qr(w.t()).R for w in (self.base, self.tuned))
            core = left @ right.t()
        nuclear = float(torch.linalg.svdvals(core).sum())
        return self.error(2 * (nuclear - float(self.moment.trace())))

    def error(self, gain: float) -> float:
        """‖W1 − W0·Q‖/‖D‖."""
        return math.sqrt(max(0.0, 1 - gain / self.norm**2)) if self.norm else 0.0

    def best(self, rank: int, seed: int = 0, whole: bool = False) -> Turn:
        """The best turn in ``rank`` dimensions that a climb finds; exact where an exact one exists.

        Its determinant is that of ``rank`` reflections, where that costs next to nothing, and in
        any case where all, the ``whole`` of the rank, have to be there.
        """
        if rank >= self.size:
            everything = self.within(torch.eye(self.size, dtype=self.moment.dtype))
            return self._of_parity(everything, rank, whole)
        best = self.within(self._plane(self.change, rank, seed))
        if self.norm and self.error(best.gain) > NEAR:
            starts = [self.within(plane) for plane in self._starts(rank, seed)]
            best = max(best, *starts, key=lambda turn: turn.gain)
        return self._of_parity(self._climb(best) if self.norm else best, rank, whole)

    def _of_parity(self, turn: Turn, rank: int, whole: bool) -> Turn:
        """The turn with the determinant (−1)^rank, by way of the least singular value of A; where
        that would add more than a hundredth to its squared error, the turn as it is, or, where the
        ``whole`` rank is asked for, what a climb among those of that determinant finds.

        A chain of ``rank`` reflections has that determinant, and one of fewer may have the other.
        """
        other, total = self.within(turn.plane, (-1) ** rank), self.norm**2
        if turn.gain - other.gain <= 0.01 * max(total - turn.gain, 1e-10 * total):
            return other
        if not whole:
            return turn
        return self._climb(other, (-1) ** rank) if rank < self.size else other

    def _plane(self, matrix: Tensor, rank: int, seed: int) -> Tensor:
        """The leading right singular vectors, and rows of W0 where there are too few."""
        rows = leading(matrix, rank, seed=seed).vt
        return _orthonormal(torch.cat([rows, self.base[: rank - len(rows)]]))

    def within(self, plane: Tensor, sign: int = 0) -> Turn:
        """The best turn in the span of V; where ``sign`` is ±1, the best of that determinant."""
        turned = self.moment.t() @ plane
        inner = turned.t() @ plane
        left, s, right = torch.linalg.svd(inner)
        if sign * float(torch.linalg.det(left @ right)) < 0:
            left[:, -1] *= -1
            s[-1] *= -1
        return Turn(plane, left @ right, 2 * float(s.sum() - inner.trace()), turned)

    def _starts(self, rank: int, seed: int) -> list[Tensor]:
        """Two planes, where the small rotation e^S ≈ I + S nearest to D turns most and moves W0 most."""
        if self._skew is None:
            self._skew = self._small_rotation()
        seen = (self._skew, self.base @ self._skew)
        return [self._plane(matrix, rank, seed) for matrix in seen]

    def _small_rotation(self) -> Tensor:
        """The skew S that minimises ‖D − W0·S‖: W0ᵀW0·S + S·W0ᵀW0 = W0ᵀD − DᵀW0 (Lyapunov).

        For more than LARGE columns it is the right side alone, the steepest direction.
        """
        slope = self.moment - self.moment.t()
        if self.size > LARGE:
            return slope
        weights, basis = torch.linalg.eigh(self.base.t() @ self.base)
        weights = weights.clamp_min(1e-10 * max(float(weights[-1]), 1e-300))
        turned = (basis.t() @ slope @ basis) / (weights[:, None] + weights)
        small: Tensor = basis @ turned @ basis.t()
        return small

    def _slope(self, turn: Turn) -> Tensor:
        """The gain's gradient in V, tangent to the manifold: M·V·Cᵀ + Mᵀ·V·C with C = R − I."""
        plane, inner = turn.plane, turn.inner.clone()
        inner.diagonal().sub_(1)
        slope = self.moment @ (plane @ inner.t()) + turn.turned @ inner
        return slope - plane @ (plane.t() @ slope)

    def _climb(self, start: Turn, sign: int = 0) -> Turn:
        """Barzilai–Borwein steps with a QR back to the manifold; a step that loses much is halved."""
        best = here = start
        slope = self._slope(here)
        step = 0.1 * math.sqrt(slope.shape[1]) / max(float(slope.norm()), 1e-300)
        recent, since = [here.gain], 0
        for _ in range(STEPS):
            there = self.within(_orthonormal((here.plane + step * slope).t()), sign)
            if there.gain < min(recent[-5:]):
                step, since = step / 4, since + 1
            else:
                new = self._slope(there)
                step = _barzilai_borwein(there.plane - here.plane, new - slope, step)
                here, slope = there, new
                recent.append(here.gain)
                since = 0 if here.gain > best.gain + 1e-8 * self.norm**2 else since + 1
                best = max(best, here, key=lambda turn: turn.gain)
            if since >= PATIENCE:
                break
        return best


def reflections(inner: Tensor) -> Tensor:
    """Unit columns (r, c), c ≤ r, with R = H1·H2·…·Hc: one column of R after the other is turned
    onto its axis; one that lies there already costs nothing.
    """
    left, mirrors = inner.clone(), []
    axes = torch.eye(inner.shape[0], dtype=inner.dtype)
    for column, axis in enumerate(axes):
        mirror = left[:, column] - axis
        size = torch.linalg.vector_norm(mirror)
        if size > LYING:
            mirror = mirror / size
            left = left - 2 * torch.outer(mirror, mirror @ left)
            mirrors.append(mirror)
    return torch.stack(mirrors, dim=1) if mirrors else inner[:, :0]


def _orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal columns that span ``rows``."""
    basis: Tensor = torch.linalg.qr(rows.t()).Q
    return basis


def _barzilai_borwein(moved: Tensor, changed: Tensor, step: float) -> float:
    along = abs(float((moved * changed).sum()))
    return float((moved * moved).sum()) / along if along else step
