"""The updates that are fitted to each layer, of which the best is taken.

One algorithm asked for is one candidate, but for a LoKr in PEFT, which has one decompose_factor
for all layers: there each factor is a candidate. ``auto`` has a candidate of each algorithm that
can be held, all at one number of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adaptsurgery.jobs.extract.recipe import ExtractRecipe
from adaptsurgery.jobs.extract.selection import Chosen
from adaptsurgery.jobs.options.extraction import AUTO, extractable
from adaptsurgery_formats import Note
from adaptsurgery_formats.errors import ValueRefused
from adaptsurgery_formats.lokr_cuts import peft_factorization
from adaptsurgery_formats.patterns import Matcher

FACTORS = (-1, 2, 4, 8, 16, 32)  # of PEFT's decompose_factor, tried where none is given
SAME = "same"  # the goal of what is compared: the parameters that the candidate taken has


@dataclass(frozen=True)
class Candidate:
    """An algorithm with its goal for one layer. ``compared``: measured, and not kept."""

    algorithm: str
    goal: str
    value: float
    factor: int | None = None
    compared: bool = False


def candidates_of(
    chosen: Sequence[Chosen], options: ExtractRecipe, notes: list[Note]
) -> dict[str, tuple[Candidate, ...]]:
    """Each layer's candidates, by its label.

    Raises ValueRefused ("budget-too-small") where the whole budget is below the least adapter.
    """
    ranks = _given_ranks(chosen, options, notes)
    shares = _Shares([c for c in chosen if c.label not in ranks], options)
    factors = _factors(chosen, options)
    candidates: dict[str, tuple[Candidate, ...]] = {}
    for c in chosen:
        mine = [
            Candidate(algorithm, *shares.goal(c, algorithm, ranks.get(c.label)), factor)
            for algorithm in c.algorithms
            for factor in (factors if algorithm == "lokr" else (None,))
        ]
        rest = [a for a in extractable() if options.compare and a not in c.algorithms]
        candidates[c.label] = (*mine, *(Candidate(a, SAME, 0, compared=True) for a in rest))
    return candidates


def _given_ranks(
    chosen: Sequence[Chosen], options: ExtractRecipe, notes: list[Note]
) -> dict[str, int]:
    """Ranks that --rank-pattern or --conv-rank give, by label."""
    matcher = Matcher([c.path for c in chosen], "--rank-pattern")
    keys = matcher.first_keys(options.ranks)
    for key in options.ranks.keys() - set(keys.values()):
        notes.append(Note("pattern-without-effect", "--rank-pattern", f"`{key}` matches no layer"))
    ranks = {c.label: options.ranks[keys[c.path]] for c in chosen if c.path in keys}
    if options.conv_rank is not None:
        wide = [c for c in chosen if any(k != 1 for k in c.shape[2:])]
        if not wide:
            text = "no layer is a convolution with a kernel other than 1"
            notes.append(Note("option-without-effect", "--conv-rank", text))
        ranks = {c.label: options.conv_rank for c in wide} | ranks
    return ranks


class _Shares:
    """What the goal of the whole adapter is for one layer.

    A budget is dealt out by o + i·∏k, so that a LoRA has one rank everywhere. PEFT's HRA, which
    must have one, gets the rank that spends it.
    """

    def __init__(self, chosen: Sequence[Chosen], options: ExtractRecipe) -> None:
        self.options = options
        self.sides = sum(c.sides for c in chosen)
        self.inputs = sum(c.sides - c.shape[0] for c in chosen)
        if options.goal == "budget" and self.sides:
            self._check(int(options.value))

    def _check(self, budget: int) -> None:
        least = {"loha": 2 * self.sides, "hra": 2 * self.inputs}.get(
            self.options.algorithm, self.sides
        )
        if budget < least and self.options.algorithm not in ("lokr", AUTO):
            raise ValueRefused(
                f"a budget of {budget} parameters is below the least {self.options.algorithm}",
                seen=f"{least} parameters at the least rank everywhere",
                next=f"--budget {least} or more, or fewer layers by --include",
                code="budget-too-small",
            )

    def goal(self, c: Chosen, algorithm: str, given: int | None) -> tuple[str, float]:
        options = self.options
        if given is None and options.exact_goal:
            return options.goal, options.value
        if given is None and options.goal == "budget":
            return self._dealt(int(options.value), c, algorithm)
        rank = int(options.value) if given is None else given
        if options.algorithm != AUTO:
            return "rank", rank
        total = rank * (self.sides if given is None else c.sides)
        return self._dealt(total, c, algorithm, alone=given is not None)

    def _dealt(
        self, budget: int, c: Chosen, algorithm: str, alone: bool = False
    ) -> tuple[str, float]:
        """A layer's part of a budget, all of it where the layer is ``alone``."""
        inputs, sides = (c.sides - c.shape[0], c.sides) if alone else (self.inputs, self.sides)
        if algorithm == "hra":
            return "rank", max(2, budget // inputs // 2 * 2)
        return "budget", max(1, budget * c.sides // sides)


def _factors(chosen: Sequence[Chosen], options: ExtractRecipe) -> tuple[int | None, ...]:
    """The decompose_factors to try: the given one; one that PEFT can have for all; or any."""
    if options.factor is not None or options.to != "peft":
        return (options.factor,)
    if options.goal == "rank" and options.algorithm != AUTO:
        return (-1,)
    seen: dict[tuple[tuple[int, int], ...], int] = {}
    for factor in FACTORS:
        cuts = tuple(peft_factorization(n, factor) for c in chosen for n in c.shape[:2])
        seen.setdefault(cuts, factor)
    return tuple(seen.values())
