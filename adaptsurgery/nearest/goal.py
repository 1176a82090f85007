"""What an extraction is asked for, and what one layer's extraction found.

D = W1 − W0 is the change that a fine-tune made, D̂ what an update makes of it. Every algorithm's
file has the same two doors: ``fit(base, tuned, goal, *, seed=0, …) -> Fit`` and
``extract(base, tuned, *, rank=…, …) -> Update``; weights are canonical, (o, i, *k).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptsurgery.core.update import Delta, Update, widened
from adaptsurgery_formats.errors import ShapeError, ValueRefused

CHUNK = 256 * 1024  # numbers of D that are compared at a time
SLACK = 1e-6  # of ‖D‖: float32 factors cannot be told from D below it


@dataclass(frozen=True, kw_only=True)
class Goal:
    """How large, or how good, an extracted update is to be; exactly one of the four.

    ``rank``: of the update. ``energy`` in (0, 1]: the least rank with ‖D − D̂‖² ≤ (1 − energy)·‖D‖²
    (for a truncated SVD that is ‖D̂‖² ≥ energy·‖D‖²). ``max_error`` in (0, 1): the least rank with
    ‖D − D̂‖ ≤ max_error·‖D‖. Both up to SLACK, float32's rounding. ``budget``: the best update of
    at most so many parameters. Raises ValueRefused.
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueRefused(
                "an extraction has one goal: rank, energy, max_error or budget",
                seen=", ".join(f"{name} {value}" for name, value in given.items()),
                code="one-goal",
            )
        name, value = next(iter(given.items()))
        whole = name in ("rank", "budget")
        right = value >= 1 if whole else 0 < value <= (1 if name == "energy" else 0.999999)
        if isinstance(value, bool) or (whole and not isinstance(value, int)) or not right:
            raise ValueRefused(
                f"{name} {value} is no goal",
                next=f"{name} is {'a whole number of at least 1' if whole else 'between 0 and 1'}",
                code="bad-goal",
            )

    @property
    def least_energy(self) -> float | None:
        """The share of ‖D‖² that is asked for, by ``energy`` or as 1 − max_error²; else None."""
        return None if self.most_error is None else 1 - self.most_error**2

    @property
    def most_error(self) -> float | None:
        """The relative error that is allowed: ``max_error``, or √(1 − energy); else None."""
        return self.max_error if self.energy is None else math.sqrt(1 - self.energy)

    def met_by(self, error: float) -> bool:
        """Whether a relative error is within the goal; every one is where none was asked for."""
        return self.most_error is None or error <= self.most_error + SLACK


@dataclass(frozen=True, eq=False)
class Fit:
    """An update for one layer, and how well it gives D.

    ``error`` is ‖D − D̂‖/‖D‖, measured on the update itself (0 where D is 0); ``norm`` is ‖D‖;
    ``parameters`` counts the update's numbers; ``spectrum`` holds D's leading singular values in
    falling order where they are known; ``limit`` is the least error that the algorithm could reach
    at any rank, where it has one. ``notes`` are plain sentences: a fall-back, a rank cut down.
    """

    update: Update
    error: float
    norm: float
    rank: int
    parameters: int
    spectrum: Tensor | None = None
    limit: float | None = None
    notes: tuple[str, ...] = ()


def difference(base: Tensor, tuned: Tensor) -> Tensor:
    """D = W1 − W0, in float32 at least: a tensor of its own, (o, i, *k).

    Raises ShapeError for two shapes or a weight that is not (o, i, *k), ValueRefused for one that
    is not floating, or holds numbers that are not finite.
    """
    if base.shape != tuned.shape or base.dim() < 2 or 0 in base.shape:
        raise ShapeError(
            "an extraction is of two weights (o, i, *k) of one shape",
            seen=f"base {list(base.shape)}, tuned {list(tuned.shape)}",
        )
    with torch.no_grad():
        delta = widened(tuned) - widened(base)
        if not all(map(math.isfinite, map(float, torch.aminmax(delta)))):
            raise ValueRefused(
                "a weight, or the difference of the two, is not finite", code="non-finite"
            )
    return delta


def norm_of(tensor: Tensor) -> float:
    """‖D‖, whatever its scale."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


@torch.no_grad()
def error_of(delta: Delta, target: Tensor) -> float:
    """‖D − s·Δ‖/‖D‖ of an update as it is, measured on D, some rows at a time; 0 where D is 0."""
    total = norm_of(target)
    ready, missing = delta.prepared(target.dtype, target.device), 0.0
    step = max(1, CHUNK // max(target[0].numel(), 1))
    for start in range(0, target.shape[0], step):
        block = target[start : start + step].flatten(1).clone()
        ready.add_rows_(block, start, start + block.shape[0], -delta.scale)
        missing = math.hypot(missing, norm_of(block))
    return missing / total if total else 0.0


def rank_for(
    goal: Goal,
    *,
    most: int,
    parameters: Callable[[int], int],
    error_at: Callable[[int], float],
    step: int = 1,
) -> int:
    """The rank that a goal asks for: a multiple of ``step``, between ``step`` and ``most``.

    A ``rank`` is cut down to ``most`` (and to no multiple: the caller knows what to make of it).
    For a ``budget`` it is the largest rank with ``parameters(rank)`` within it; for ``energy`` and
    ``max_error`` the least at which ``error_at(rank)`` meets it, found by doubling and bisection:
    ``parameters`` grows with the rank and ``error_at`` falls; give one that remembers. Raises
    ValueRefused where the budget is below the least update ("budget-too-small"), or not even
    ``most`` is good enough ("out-of-reach").
    """
    if goal.rank is not None:
        return min(goal.rank, most)
    steps = max(most // step, 1)
    if goal.budget is not None:
        budget = goal.budget
        if parameters(step) > budget:
            raise ValueRefused(
                f"{budget} parameters are fewer than the least update has",
                seen=f"{parameters(step)} parameters at rank {step}",
                code="budget-too-small",
            )
        return step * (_first(lambda k: parameters(k * step) > budget, steps + 1) - 1)
    least = _first(lambda k: goal.met_by(error_at(k * step)), steps + 1)
    if least > steps:
        raise ValueRefused(
            f"no rank comes within an error of {goal.most_error:g}",
            seen=f"{error_at(steps * step):.3g} at rank {steps * step}",
            next="a larger error, or another algorithm",
            code="out-of-reach",
        )
    return step * least


def cut_down(goal: Goal, rank: int) -> tuple[str, ...]:
    """A note where a fit's rank is below the one that was asked for."""
    if goal.rank is None or rank >= goal.rank:
        return ()
    return (f"rank {goal.rank} was cut down to {rank}, the most that this weight can use",)


def _first(holds: Callable[[int], bool], end: int) -> int:
    """The least k in 1…end − 1 at which ``holds`` turns true, or ``end``; each is asked once."""
    low, high = 0, 1  # holds(low) is false, holds(high) true once the doubling ends
    while high < end and not holds(high):
        low, high = high, min(2 * high, end)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
