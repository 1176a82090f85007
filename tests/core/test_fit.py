"""Goals, the rank that each asks for, and the difference of two weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptsurgery.nearest.goal import SLACK, Goal, cut_down, difference, rank_for
from adaptsurgery_formats.errors import ShapeError, SurgeryError, ValueRefused


def find(goal: Goal, errors: list[float], step: int = 1, price: int = 7) -> tuple[int, list[int]]:
    """The rank found, and the ranks at which the error was asked for; errors[k] is at (k+1)·step."""
    asked = []

    def error_at(rank: int) -> float:
        asked.append(rank)
        return errors[rank // step - 1]

    most = len(errors) * step
    return rank_for(
        goal, most=most, parameters=lambda r: price * r, error_at=error_at, step=step
    ), asked


falling = st.lists(st.floats(0, 0.99), min_size=1, max_size=40).map(lambda x: sorted(x)[::-1])


@given(falling, st.floats(1e-6, 0.99), st.sampled_from([1, 2, 3]), st.booleans())
def test_the_least_rank_that_is_good_enough(
    errors: list[float], most_error: float, step: int, as_energy: bool
) -> None:
    goal = Goal(energy=1 - most_error**2) if as_energy else Goal(max_error=most_error)
    good = [k for k, error in enumerate(errors, 1) if goal.met_by(error)]
    if not good:
        with pytest.raises(ValueRefused) as refused:
            find(goal, errors, step)
        assert refused.value.code == "out-of-reach"
        return
    rank, asked = find(goal, errors, step)
    assert rank == good[0] * step
    assert len(asked) == len(set(asked)) <= 2 * len(errors).bit_length() + 1
    assert max(asked) < 2 * max(rank, step) + step, "no probe far above the answer"


@given(falling, st.integers(1, 400), st.sampled_from([1, 2]), st.integers(1, 9))
def test_the_largest_rank_within_a_budget(
    errors: list[float], budget: int, step: int, price: int
) -> None:
    fits = [k for k in range(step, len(errors) * step + 1, step) if k * price <= budget]
    if not fits:
        with pytest.raises(ValueRefused) as refused:
            find(Goal(budget=budget), errors, step, price)
        assert refused.value.code == "budget-too-small"
        return
    rank, asked = find(Goal(budget=budget), errors, step, price)
    assert rank == fits[-1] and not asked


def test_a_rank_is_cut_down_and_said() -> None:
    assert find(Goal(rank=3), [0.5] * 4) == (3, [])
    assert find(Goal(rank=30), [0.5] * 4) == (4, [])
    assert cut_down(Goal(rank=3), 3) == () == cut_down(Goal(energy=0.5), 3)
    assert "30" in cut_down(Goal(rank=30), 4)[0]


def test_what_an_energy_allows() -> None:
    assert Goal(energy=0.75).most_error == 0.5
    assert Goal(max_error=0.5).least_energy == 0.75
    assert Goal(rank=1).most_error is None is Goal(budget=9).least_energy
    assert Goal(rank=1).met_by(2.0)
    assert Goal(energy=1.0).met_by(SLACK) and not Goal(energy=1.0).met_by(3 * SLACK)


@pytest.mark.parametrize(
    "wrong",
    [{}, {"rank": 1, "energy": 0.5}, {"rank": 0}, {"rank": 1.5}, {"energy": 0.0}, {"energy": 1.1},
     {"max_error": 1.0}, {"max_error": float("nan")}, {"budget": 0}, {"rank": True}],
)  # fmt: skip
def test_no_goal(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueRefused):
        Goal(**wrong)  # type: ignore[arg-type]


def test_differences_are_wide() -> None:
    base, tuned = torch.full((2, 3), 256.0).bfloat16(), torch.full((2, 3), 1.0)
    assert difference(base, tuned).dtype == torch.float32
    assert torch.equal(difference(base, tuned), torch.full((2, 3), -255.0))
    assert difference(base.double(), tuned).dtype == torch.float64


@pytest.mark.parametrize(
    ("base", "tuned"),
    [
        (torch.ones(2, 3), torch.ones(3, 2)),
        (torch.ones(2), torch.ones(2)),
        (torch.ones(0, 2), torch.ones(0, 2)),
        (torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 2, dtype=torch.int8)),
        (torch.ones(2, 2), torch.full((2, 2), float("nan"))),
        (torch.full((2, 2), float("inf")), torch.full((2, 2), float("inf"))),
        (torch.full((2, 2), -3e38), torch.full((2, 2), 3e38)),
    ],
)
def test_no_difference(base: torch.Tensor, tuned: torch.Tensor) -> None:
    with pytest.raises(SurgeryError) as refused:
        difference(base, tuned)
    assert isinstance(refused.value, (ShapeError, ValueRefused))
