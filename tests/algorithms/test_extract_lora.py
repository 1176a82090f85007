"""Extracted LoRAs are the truncated SVD of the difference, and their errors those of the fold."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import numbers, seeds
from torch import Tensor

from adaptsurgery.algorithms import extract, lora
from adaptsurgery.algorithms.lora import LoRA
from adaptsurgery.nearest.goal import Fit, Goal
from adaptsurgery_formats.errors import ShapeError, ValueRefused

shapes = st.one_of(
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
)
kernels = st.tuples(
    st.integers(2, 9), st.integers(2, 9), st.integers(2, 3), st.integers(1, 3)
)  # fmt: skip


def pair(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A weight, and the same with a difference of a falling spectrum."""
    change = numbers(seed + 1, *shape)
    change[0] *= 4.0
    return numbers(seed, *shape).to(dtype), (numbers(seed, *shape) + 0.1 * change).to(dtype)


def tails(base: Tensor, tuned: Tensor) -> list[float]:
    """The least error of ranks 0, 1, …, by the whole SVD in float64."""
    s = torch.linalg.svdvals((tuned.double() - base.double()).flatten(1))
    return [float(s[k:].norm() / s.norm()) for k in range(len(s) + 1)]


def measured(base: Tensor, tuned: Tensor, found: Fit) -> float:
    wide = tuned.double()
    change = float((wide - base.double()).norm())
    return float((wide - found.update.fold(base.double())).norm()) / change


@settings(max_examples=80)
@given(seeds, shapes, st.integers(1, 24))
def test_the_error_is_the_optimum(seed: int, shape: tuple[int, ...], rank: int) -> None:
    base, tuned = pair(seed, *shape)
    found = lora.fit(base, tuned, Goal(rank=rank))
    least = tails(base, tuned)
    kept = min(rank, len(least) - 1)
    assert found.error == pytest.approx(least[kept], rel=1e-6, abs=1e-9)
    assert measured(base, tuned, found) == pytest.approx(found.error, rel=1e-6, abs=1e-9)
    assert found.rank == found.update.rank == kept
    assert found.parameters == kept * (shape[0] + math.prod(shape[1:]))
    assert found.norm == pytest.approx(float((tuned - base).norm()))
    assert bool(found.notes) == (kept < rank)
    assert found.update.scale == 1.0 and found.update.shape == shape
    assert float(found.update.up.norm()) == pytest.approx(float(found.update.down.norm()))


@settings(max_examples=60)
@given(seeds, shapes, st.floats(0.01, 0.99), st.booleans())
def test_the_least_rank_for_an_error(
    seed: int, shape: tuple[int, ...], most: float, as_energy: bool
) -> None:
    base, tuned = pair(seed, *shape)
    goal = Goal(energy=1 - most**2) if as_energy else Goal(max_error=most)
    found, least = lora.fit(base, tuned, goal), tails(base, tuned)
    assert found.error <= most + 1.1e-6
    assert found.rank == 1 or least[found.rank - 1] > most - 1e-8


@settings(max_examples=40)
@given(seeds, shapes, st.integers(1, 300), st.booleans())
def test_the_largest_rank_for_a_budget(
    seed: int, shape: tuple[int, ...], budget: int, tucker: bool
) -> None:
    base, tuned = pair(seed, *shape)
    try:
        found = lora.fit(base, tuned, Goal(budget=budget), tucker=tucker)
    except ValueRefused as refused:
        assert refused.code == "budget-too-small"
        assert lora.fit(base, tuned, Goal(rank=1), tucker=tucker).parameters > budget
        return
    assert found.parameters <= budget
    larger = lora.fit(base, tuned, Goal(rank=found.rank + 1), tucker=tucker)
    assert larger.rank == found.rank or larger.parameters > budget


def test_all_of_it() -> None:
    base, tuned = pair(0, 20, 30)
    found = lora.fit(base.float(), tuned.float(), Goal(energy=1.0))
    assert found.rank == 20 and found.error < 1e-6
    changed = base + numbers(2, 20, 3) @ numbers(3, 3, 30)
    found = lora.fit(base, changed, Goal(energy=1.0))
    assert found.rank == 3 and found.error < 1e-10


def test_the_error_falls_with_the_rank() -> None:
    for tucker in (False, True):
        base, tuned = pair(4, 24, 18, 3, 3)
        errors = [
            lora.fit(base, tuned, Goal(rank=r), tucker=tucker).error for r in (1, 2, 4, 8, 16)
        ]
        assert all(b < a for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 60), (300, 200), (20, 12, 3, 3)])
def test_a_lora_comes_out_as_it_went_in(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    base = numbers(0, *shape).to(dtype)
    known = LoRA.of_factors(
        numbers(1, shape[0], 4), numbers(2, 4, math.prod(shape[1:])), shape, 0.5
    )
    tuned = known.fold(base)
    found = lora.fit(base, tuned, Goal(rank=4))
    step = torch.finfo(dtype).eps * (8 if dtype == torch.float64 else 1)  # sums are rounded too
    again = found.update.fold(base)
    assert found.error < 4 * max(step, 2**-24)
    assert float((again.double() - tuned.double()).abs().max()) <= 2 * step * float(
        tuned.abs().max()
    )
    assert found.update.up.dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_a_kernel_is_a_matrix_of_its_columns() -> None:
    base, tuned = pair(7, 12, 5, 3, 2)
    conv = extract("lora", base, tuned, rank=3)
    flat = extract("lora", base.flatten(1), tuned.flatten(1), rank=3)
    assert conv.up.shape == (12, 3, 1, 1) and conv.down.shape == (3, 5, 3, 2)
    assert torch.equal(conv.up.flatten(1), flat.up) and torch.equal(conv.down.flatten(1), flat.down)


def one_shot(change: Tensor, rank: int) -> float:
    """The error of the truncated higher-order SVD, as LyCORIS takes it."""
    cube = change.flatten(2)
    left = torch.linalg.svd(cube.flatten(1), full_matrices=False).U[:, :rank]
    right = torch.linalg.svd(cube.transpose(0, 1).flatten(1), full_matrices=False).U[:, :rank]
    core = torch.einsum("oik,op,iq->pqk", cube, left, right)
    return math.sqrt(max(0.0, 1 - float(core.norm() / cube.norm()) ** 2))


@settings(max_examples=60)
@given(seeds, kernels, st.integers(1, 9))
def test_tucker_is_no_worse_than_one_shot(
    seed: int, shape: tuple[int, int, int, int], rank: int
) -> None:
    base, tuned = pair(seed, *shape)
    found = lora.fit(base, tuned, Goal(rank=rank), tucker=True)
    assert found.error <= one_shot(tuned - base, rank) + 1e-9
    assert found.error >= tails(base, tuned)[min(rank, shape[0], math.prod(shape[1:]))] - 1e-9
    assert measured(base, tuned, found) == pytest.approx(found.error, rel=1e-6, abs=1e-9)
    r = found.rank
    assert found.update.mid is not None and found.update.mid.shape == (r, r, *shape[2:])


def test_tucker_is_better_than_one_shot() -> None:
    base, tuned = pair(3, 40, 32, 3, 3)
    ours, theirs = lora.fit(base, tuned, Goal(rank=4), tucker=True).error, one_shot(tuned - base, 4)
    assert (1 - ours**2) > 1.02 * (1 - theirs**2), "it captures more"


def test_a_tucker_lora_comes_out_as_it_went_in() -> None:
    base = numbers(0, 10, 14, 3, 3)
    known = LoRA(numbers(1, 10, 3, 1, 1), numbers(2, 3, 14, 1, 1), numbers(3, 3, 3, 3, 3))
    assert lora.fit(base, known.fold(base), Goal(rank=3), tucker=True).error < 1e-7
    found = lora.fit(base, known.fold(base), Goal(max_error=1e-4), tucker=True)
    assert found.rank == 3


def test_a_kernel_of_one_position_needs_no_core() -> None:
    base, tuned = pair(3, 6, 5, 1, 1)
    found = lora.fit(base, tuned, Goal(rank=2), tucker=True)
    assert found.update.mid is None and "core" in found.notes[0]


@pytest.mark.parametrize("shape", [(300, 260), (40, 60), (20, 12, 3, 3)])
@pytest.mark.parametrize("tucker", [False, True])
def test_one_seed_gives_the_same_bits(shape: tuple[int, ...], tucker: bool) -> None:
    base, tuned = pair(5, *shape, dtype=torch.float32)
    first, again = (extract("lora", base, tuned, rank=8, seed=3, tucker=tucker) for _ in range(2))
    pairs = zip(first.tensors().values(), again.tensors().values())
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("shape", [(6, 7), (4, 5, 3, 3), (200, 300)])
@pytest.mark.parametrize("goal", [Goal(rank=2), Goal(energy=0.9), Goal(max_error=0.1)])
def test_no_change_is_no_error(shape: tuple[int, ...], tucker: bool, goal: Goal) -> None:
    base = numbers(0, *shape).float()
    found = lora.fit(base, base.clone(), goal, tucker=tucker)
    assert found.error == 0.0 == found.norm
    assert torch.equal(found.update.fold(base), base)


def test_a_constant_change() -> None:
    base = numbers(0, 200, 300).float()
    found = lora.fit(base, base + 0.25, Goal(rank=16))
    assert found.error < 1e-6 and "rank 1" in found.notes[0]
    assert lora.fit(base, base + 0.25, Goal(max_error=0.01)).rank == 1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("shape", [(40, 30), (6, 5, 3, 3), (200, 180)])
@pytest.mark.parametrize("tucker", [False, True])
def test_any_scale(scale: float, shape: tuple[int, ...], tucker: bool) -> None:
    base, tuned = torch.zeros(shape), pair(1, *shape, dtype=torch.float32)[1]
    plain = lora.fit(base, tuned, Goal(rank=3), tucker=tucker)
    found = lora.fit(base, tuned * scale, Goal(rank=3), tucker=tucker)
    assert found.error == pytest.approx(plain.error, rel=1e-5)
    assert found.norm == pytest.approx(plain.norm * scale, rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (1, 400), (1, 1, 3, 3)])
def test_thin_weights(shape: tuple[int, ...]) -> None:
    base, tuned = pair(1, *shape)
    for tucker in (False, True):
        assert lora.fit(base, tuned, Goal(rank=16), tucker=tucker).error < 1e-9


def test_what_is_no_pair_or_no_goal() -> None:
    one = torch.ones(3, 4)
    with pytest.raises(ShapeError):
        extract("lora", one, one.t(), rank=1)
    with pytest.raises(ValueRefused):
        extract("lora", one, one * float("nan"), rank=1)
    with pytest.raises(ValueRefused):
        extract("lora", one, one, rank=1, energy=0.5)
