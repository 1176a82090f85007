"""The leading singular triples against the whole SVD in float64, and where such methods go wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import numbers, seeds

from adaptsurgery.nearest.lanczos import SMALL, Leading, leading, leading_until, truncate
from adaptsurgery_formats.errors import ShapeError


def with_spectrum(seed: int, o: int, i: int, s: torch.Tensor) -> torch.Tensor:
    """A float32 matrix (o, i) of the singular values ``s``."""
    left = torch.linalg.qr(numbers(seed, o, len(s))).Q
    right = torch.linalg.qr(numbers(seed + 1, i, len(s))).Q
    return (left * s @ right.t()).float()


def truncated(found: Leading) -> torch.Tensor:
    return found.u * found.s @ found.vt


def check(matrix: torch.Tensor, found: Leading, rank: int, excess: float) -> None:
    """‖D − D̂‖ is within ``excess`` of the optimum, it is what is told, and U and V are orthonormal."""
    exact = matrix.double()
    s = torch.linalg.svdvals(exact)
    best = float(s[rank:].norm() / s.norm())
    missed = float((exact - truncated(found)).norm() / exact.norm())
    assert len(found.s) == min(rank, *matrix.shape)
    assert best - 1e-10 <= missed <= best * (1 + excess) + 3e-7
    assert found.errors()[-1] == pytest.approx(missed, rel=1e-5, abs=3e-7)
    assert found.norm == pytest.approx(float(exact.norm()), rel=1e-7)
    alive = found.s > 1e-5 * found.s[0]
    one = torch.eye(int(alive.sum()), dtype=torch.float64)
    assert (found.u[:, alive].t() @ found.u[:, alive] - one).abs().max() < 1e-4
    assert (found.vt[alive] @ found.vt[alive].t() - one).abs().max() < 1e-4


FALLS = {
    "flat": lambda k: torch.ones_like(k),
    "slow": lambda k: k**-0.6,
    "fast": lambda k: k**-2.0,
    "cliff": lambda k: torch.where(k <= 12, 1.0, 1e-4),
    "geometric": lambda k: 2.0**-k,
    "twins": lambda k: ((k + 1) // 2) ** -0.5,
}


@pytest.mark.parametrize("fall", FALLS)
@pytest.mark.parametrize(("o", "i", "rank"), [(300, 260, 16), (200, 520, 1), (420, 180, 20)])
@pytest.mark.parametrize("seed", [0, 1])
def test_lanczos_reaches_the_optimum(fall: str, o: int, i: int, rank: int, seed: int) -> None:
    assert min(o, i) > SMALL and 8 * rank <= min(o, i), "small ones do not go this way"
    s = FALLS[fall](torch.arange(1, min(o, i) + 1, dtype=torch.float64))
    matrix = with_spectrum(seed, o, i, s)
    check(matrix, leading(matrix, rank, seed=seed), rank, 1e-4 if fall == "geometric" else 1e-5)


@pytest.mark.parametrize("shape", [(300, 300), (200, 700)])
def test_random_numbers_are_the_flattest_spectrum(shape: tuple[int, int]) -> None:
    matrix = numbers(3, *shape).float()
    check(matrix, leading(matrix, 16), 16, 2e-5)


@settings(max_examples=60)
@given(seeds, st.integers(1, 24), st.integers(1, 24), st.integers(1, 26))
def test_small_matrices_are_exact(seed: int, o: int, i: int, rank: int) -> None:
    matrix = numbers(seed, o, i)
    found = truncate(matrix, rank)
    s = torch.linalg.svdvals(matrix)
    best = float(s[rank:].norm() / s.norm())
    missed = float((matrix - found.up @ found.down).norm() / matrix.norm())
    assert found.up.shape[1] == min(rank, o, i)
    assert abs(found.error - best) < 1e-10 and abs(missed - best) < 1e-10


@pytest.mark.parametrize("fall", [0.5, 0.1, 1e-3])
def test_a_spectrum_that_falls_below_the_square_root_of_eps(fall: float) -> None:
    """Squaring the matrix loses what is below 1e-8: no more than that is lost in the result."""
    left, _ = torch.linalg.qr(numbers(1, 40, 20))
    right, _ = torch.linalg.qr(numbers(2, 30, 20))
    matrix = left * fall ** torch.arange(20, dtype=torch.float64) @ right.t()
    s = torch.linalg.svdvals(matrix)
    for rank in (1, 3, 10):
        assert abs(truncate(matrix, rank).error - float(s[rank:].norm() / s.norm())) < 1e-10


@pytest.mark.parametrize("shape", [(300, 200), (40, 30)])
@pytest.mark.parametrize("true", [0, 1, 5, 16, 20])
def test_a_low_rank_is_found_and_no_garbage_with_it(shape: tuple[int, int], true: int) -> None:
    """Past the true rank a Krylov space is rounding noise; unguarded it is taken for signal."""
    o, i = shape
    matrix = (numbers(1, o, true) @ numbers(2, true, i)).float()
    found = leading(matrix, 16)
    assert torch.isfinite(found.u).all() and torch.isfinite(found.vt).all()
    left = matrix.double() - truncated(found)
    s = torch.linalg.svdvals(matrix.double())
    assert float(left.norm()) <= float(s[16:].norm()) * (1 + 1e-5) + 3e-7 * float(s.norm())
    assert (found.s[true:] <= 1e-6 * s[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e-250, 1e250])
@pytest.mark.parametrize("shape", [(180, 200), (20, 30)])
def test_any_scale(dtype: torch.dtype, scale: float, shape: tuple[int, int]) -> None:
    if dtype == torch.float32 and not 1e-38 < scale < 1e38:
        pytest.skip("beyond float32")
    matrix = numbers(1, *shape).to(dtype)
    plain, found = leading(matrix, 4), leading(matrix * scale, 4)
    assert torch.allclose(found.s / scale, plain.s, rtol=1e-5, atol=0.0)
    assert found.errors()[-1] == pytest.approx(plain.errors()[-1], rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 400)])
def test_thin_ones(shape: tuple[int, int]) -> None:
    matrix = numbers(1, *shape).float()
    check(matrix, leading(matrix, 5), 5, 1e-6)


def test_the_same_bits_for_one_seed_and_close_ones_for_another() -> None:
    matrix = numbers(1, 300, 260).float()
    first, again, other = (leading(matrix, 8, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3]))
    assert not torch.equal(first.u, other.u)
    assert torch.allclose(first.s, other.s, rtol=1e-5)


@settings(max_examples=40)
@given(seeds, st.integers(1, 24), st.integers(1, 24), st.floats(1e-3, 0.999))
def test_the_fewest_that_are_enough(seed: int, o: int, i: int, most: float) -> None:
    matrix = numbers(seed, o, i)
    s = torch.linalg.svdvals(matrix)
    tails = [float(s[k:].norm() / s.norm()) for k in range(len(s) + 1)]
    k = len(leading_until(matrix, lambda error: error <= most).s)
    assert tails[k] <= most + 1e-8 and (k == 1 or tails[k - 1] > most - 1e-8)


def test_the_fewest_of_many() -> None:
    s = torch.arange(1, 401, dtype=torch.float64) ** -0.7
    matrix = with_spectrum(0, 400, 500, s)
    for k in (3, 17, 60, 250):
        most = float(s[k:].norm() / s.norm()) * (1 + 1e-3)
        assert len(leading_until(matrix, lambda error, most=most: error <= most).s) == k
    assert len(leading_until(matrix, lambda error: False).s) == 400


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(2, 2, 2), torch.ones(0, 3)])
def test_no_matrix(wrong: torch.Tensor) -> None:
    with pytest.raises(ShapeError):
        leading(wrong, 1)
    with pytest.raises(ShapeError):
        leading(torch.ones(3, 3), 0)


def test_a_falling_spectrum_is_as_good_as_its_svd() -> None:
    """A step more costs little where each gains a tenth of the last: on to float32's rounding."""
    left, right = (torch.linalg.qr(numbers(k, 400, 400)).Q for k in (0, 1))
    values = torch.arange(1.0, 401, dtype=torch.float64) ** -0.6
    matrix = ((left * values) @ right).float()
    found = leading(matrix, 16)
    told = matrix.double() - (found.u * found.s) @ found.vt
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    theirs = matrix.double() - (u[:, :16] * s[:16]).double() @ vt[:16].double()
    assert float(told.norm()) <= float(theirs.norm()) * (1 + 1e-9)
