"""What an extraction is asked for, and what one layer's extraction found.

D = W1 − W0 is the change that a fine-tune made, D̂ what an update makes of it. Every algorithm's
file has the same two doors: ``fit(base, tuned, goal, *, seed=0, …) -> Fit`` and
``extract(base, tuned, *, rank=…, …) -> Update``; weights are canonical, (o, i, *k).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from adaptsurgery.core.update import Update
from adaptsurgery_formats.errors import ValueRefused


@dataclass(frozen=True, kw_only=True)
class Goal:
    """How large, or how good, an extracted update is to be; exactly one of the four.

    ``rank``: of the update. ``energy`` in (0, 1]: the least rank with ‖D̂‖² ≥ energy·‖D‖² (of the
    best approximation; 1 − error² for any other). ``max_error`` in (0, 1): the least rank with
    ‖D − D̂‖ ≤ max_error·‖D‖. ``budget``: the best update of at most so many parameters.
    Raises ValueRefused.
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
        if self.max_error is not None:
            return 1 - self.max_error**2
        return self.energy


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
