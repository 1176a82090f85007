"""Extracted HRAs: exact where the change is one, never past the orthogonal limit, never worse than nothing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import numbers, seeds
from torch import Tensor

from adaptsurgery.algorithms import extract, hra
from adaptsurgery.algorithms.hra import HRA
from adaptsurgery.nearest.goal import Fit, Goal
from adaptsurgery.nearest.procrustes import Procrustes, reflections
from adaptsurgery_formats.errors import ShapeError, ValueRefused

shapes = st.one_of(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
)


def measured(base: Tensor, tuned: Tensor, found: Fit) -> float:
    change = float((tuned.double() - base.double()).norm())
    return float((found.update.fold(base.double()) - tuned.double()).norm()) / change


def nearest_orthogonal(base: Tensor, tuned: Tensor) -> float:
    base, tuned = base.double().flatten(1), tuned.double().flatten(1)
    left, _, right = torch.linalg.svd(base.t() @ tuned)
    return float((base @ left @ right - tuned).norm() / (tuned - base).norm())


@settings(max_examples=60)
@given(seeds, shapes, st.integers(1, 8), st.booleans())
def test_a_chain_comes_out_as_it_went_in(
    seed: int, shape: tuple[int, ...], rank: int, paired: bool
) -> None:
    """Of any length, odd or even, started in pairs or not, and asked for with room to spare."""
    base = numbers(seed, *shape)
    u = numbers(seed + 1, math.prod(shape[1:]), rank)
    if paired:
        u = u.repeat_interleave(2, 1) + 0.1 * numbers(seed + 2, u.shape[0], 2 * rank)
    tuned = HRA(u).fold(base)
    assume(not torch.equal(base, tuned))
    found = hra.fit(base, tuned, Goal(rank=u.shape[1] + seed % 3))
    far = float((tuned - base).norm() / base.norm())
    assert found.error * far < 1e-7
    assert found.error == pytest.approx(measured(base, tuned, found), abs=1e-12)


@pytest.mark.parametrize("shape", [(64, 48), (256, 256), (60, 300), (16, 12, 3, 3)])
@pytest.mark.parametrize("rank", [2, 4, 8])
def test_exact_in_float32(shape: tuple[int, ...], rank: int) -> None:
    base = numbers(0, *shape).float()
    tuned = HRA(numbers(1, math.prod(shape[1:]), rank)).fold(base)
    found = hra.fit(base, tuned, Goal(rank=rank))
    assert found.error < 8e-7 and found.rank == rank and not found.notes
    assert found.update.u.dtype == torch.float32
    assert found.limit is not None and found.limit <= found.error


@pytest.mark.parametrize("angle", [1e-1, 1e-2])
def test_small_angles(angle: float) -> None:
    """PEFT's chains start as pairs that cancel; training turns them apart by a little."""
    base = numbers(0, 300, 256).float()
    u = numbers(1, 256, 4).repeat_interleave(2, 1) + angle * numbers(2, 256, 8)
    tuned = HRA(u).fold(base.double()).float()
    assert hra.fit(base, tuned, Goal(rank=8)).error < 2e-5


@settings(max_examples=40, deadline=None)
@given(seeds, shapes, st.integers(1, 14), st.floats(0.01, 3.0))
def test_between_the_limit_and_nothing(
    seed: int, shape: tuple[int, ...], rank: int, size: float
) -> None:
    base = numbers(seed, *shape)
    tuned = base + size * numbers(seed + 1, *shape)
    found = hra.fit(base, tuned, Goal(rank=rank))
    assert found.error == pytest.approx(measured(base, tuned, found), abs=1e-9)
    assert found.error <= 1 + 1e-9
    least = nearest_orthogonal(base, tuned)
    assert found.error >= least - 1e-7
    assert found.limit == pytest.approx(least, abs=1e-6)
    assert found.parameters == found.update.u.numel() == math.prod(shape[1:]) * found.rank
    assert found.rank <= max(rank, 2)
    assert bool(found.notes) == (found.rank != rank)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (9, 40)])
def test_at_full_length_it_is_the_limit(shape: tuple[int, int]) -> None:
    base, tuned = numbers(0, *shape), numbers(0, *shape) + 0.3 * numbers(1, *shape)
    found = hra.fit(base, tuned, Goal(rank=100))
    assert found.error == pytest.approx(nearest_orthogonal(base, tuned), abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 9), (2, 9), (20, 16)])
def test_inputs_that_are_dead_cost_no_reflection(shape: tuple[int, int]) -> None:
    """Where W0 is blind to a direction, its sign is free: the chain keeps the length asked for."""
    base = numbers(0, *shape)
    base[:, 5:] = 0
    tuned = base + 0.5 * numbers(1, *shape) * (base != 0)
    for rank in (2, 4, 6):
        found = hra.fit(base, tuned, Goal(rank=rank))
        assert found.rank == min(rank, 2 * shape[0]) and found.error < 1


def test_the_climb_leaves_every_start_behind() -> None:
    """On a change that no rotation made: better than the row space of D, and a point of rest."""
    base, tuned = numbers(0, 60, 50), numbers(0, 60, 50) + 0.2 * numbers(1, 60, 50)
    problem = Procrustes(base, tuned)
    found = problem.best(8)
    starts = [problem._plane(problem.change, 8, 0), *problem._starts(8, 0)]
    assert found.gain > 1.02 * max(problem.within(plane).gain for plane in starts)
    assert float(problem._slope(found).norm()) < 0.05 * float(
        problem._slope(problem.within(starts[0])).norm()
    )


def test_the_slope_is_the_gains_derivative() -> None:
    problem = Procrustes(numbers(0, 30, 20), numbers(1, 30, 20))
    here = problem.within(torch.linalg.qr(numbers(2, 20, 4)).Q)
    way = numbers(3, 20, 4)
    way -= here.plane @ (here.plane.t() @ way)
    ahead, behind = (
        problem.within(torch.linalg.qr(here.plane + h * way).Q).gain for h in (1e-5, -1e-5)
    )
    assert (ahead - behind) / 2e-5 == pytest.approx(
        2 * float((problem._slope(here) * way).sum()), rel=1e-5
    )


def test_the_error_falls_with_the_rank() -> None:
    base, tuned = numbers(0, 40, 32), numbers(0, 40, 32) + 0.2 * numbers(1, 40, 32)
    errors = [hra.fit(base, tuned, Goal(rank=r)).error for r in (2, 4, 8, 16, 32)]
    assert all(b < a for a, b in itertools.pairwise(errors))


@settings(max_examples=60)
@given(seeds, st.integers(1, 9), st.booleans())
def test_reflections_of_an_orthogonal_matrix(seed: int, size: int, near: bool) -> None:
    """As many as its determinant allows, and their product is the matrix."""
    some = numbers(seed, size, size)
    inner = torch.linalg.matrix_exp(1e-6 * (some - some.t())) if near else torch.linalg.qr(some).Q
    u = reflections(inner)
    product = torch.eye(size, dtype=torch.float64)
    for column in u.t():
        product = product - 2 * torch.outer(product @ column, column)
    assert torch.allclose(product, inner, atol=1e-12)
    assert u.shape[1] <= size and round(float(torch.linalg.det(inner))) == (-1) ** u.shape[1]


@settings(max_examples=40, deadline=None)
@given(seeds, shapes, st.integers(2, 9))
def test_the_whole_rank_where_all_have_to_be_there(
    seed: int, shape: tuple[int, ...], rank: int
) -> None:
    """And no turn of its determinant is nearer than what a climb from the free one's plane finds."""
    base, tuned = numbers(seed, *shape), numbers(seed + 1, *shape)
    free = hra.fit(base, tuned, Goal(rank=rank))
    found = hra.fit(base, tuned, Goal(rank=rank), whole=True)
    assert found.rank == rank and found.error <= 1 + 1e-9
    assert found.error == pytest.approx(measured(base, tuned, found), abs=1e-12)
    if free.rank == rank:
        assert torch.equal(free.update.u, found.update.u)


def test_the_whole_rank_climbs_on_among_its_determinant() -> None:
    better = 0
    for seed in range(8):
        base = numbers(seed, 30, 20)
        tuned = HRA(numbers(seed + 1, 20, 3)).fold(base) + 0.5 * numbers(seed + 2, 30, 20)
        problem = Procrustes(base, tuned)
        free = problem.best(4)
        if round(float(torch.linalg.det(free.inner))) == 1:
            continue
        flipped, climbed = problem.within(free.plane, 1), problem.best(4, whole=True)
        assert round(float(torch.linalg.det(climbed.inner))) == 1
        assert flipped.gain <= climbed.gain
        better += climbed.gain > flipped.gain * (1 + 1e-6)
    assert better


def test_goals_find_even_ranks() -> None:
    base = numbers(0, 40, 33)
    tuned = HRA(numbers(1, 33, 6)).fold(base) + 1e-3 * numbers(2, 40, 33)
    assert hra.fit(base, tuned, Goal(max_error=0.05)).rank == 6
    assert hra.fit(base, tuned, Goal(energy=0.99)).rank == 6
    assert hra.fit(base, tuned, Goal(budget=33 * 5 + 1)).rank == 4
    with pytest.raises(ValueRefused) as refused:
        hra.fit(base, tuned, Goal(budget=33))
    assert refused.value.code == "budget-too-small"
    with pytest.raises(ValueRefused) as refused:
        hra.fit(base, base + numbers(3, 40, 33), Goal(max_error=0.01))
    assert refused.value.code == "out-of-reach"


@pytest.mark.parametrize("shape", [(6, 7), (3, 40), (4, 5, 3, 3), (5, 1)])
@pytest.mark.parametrize("goal", [Goal(rank=4), Goal(energy=0.9), Goal(budget=1000)])
def test_no_change_is_a_chain_that_cancels(shape: tuple[int, ...], goal: Goal) -> None:
    base = numbers(0, *shape).float()
    found = hra.fit(base, base.clone(), goal)
    assert found.error == 0.0 == found.limit
    assert torch.allclose(found.update.fold(base), base, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_scale(scale: float) -> None:
    base, tuned = numbers(0, 20, 16).float(), numbers(1, 20, 16).float()
    plain = hra.fit(base, tuned, Goal(rank=4))
    found = hra.fit(base * scale, tuned * scale, Goal(rank=4))
    assert found.error == pytest.approx(plain.error, rel=1e-3)


def test_one_seed_gives_the_same_bits() -> None:
    base, tuned = numbers(0, 200, 180).float(), numbers(1, 200, 180).float()
    first, again = (extract("hra", base, tuned, rank=4, seed=2) for _ in range(2))
    assert torch.equal(first.u, again.u)


def test_what_is_no_pair_or_no_goal() -> None:
    one = torch.ones(3, 4)
    with pytest.raises(ShapeError):
        extract("hra", one, one.t(), rank=2)
    with pytest.raises(ValueRefused):
        extract("hra", one, one * float("inf"), rank=2)
    with pytest.raises(ValueRefused):
        extract("hra", one, one)
