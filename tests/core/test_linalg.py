"""Truncations reach the dense optimum (Eckart–Young), and say by how much they miss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import numbers, seeds

from adaptsurgery.core.linalg import Approximation, optimal_lora, truncate_factors
from adaptsurgery_formats.errors import ShapeError


def optimum(matrix: torch.Tensor, rank: int) -> float:
    s = torch.linalg.svd(matrix.double()).S
    return float(s[rank:].norm() / s.norm())


def check(found: Approximation, matrix: torch.Tensor, rank: int) -> None:
    best = optimum(matrix, rank)
    missed = float((matrix - found.up @ found.down).norm() / matrix.norm())
    assert found.up.shape[1] <= rank
    assert abs(found.error - best) < 1e-10
    assert abs(missed - best) < 1e-10


@given(seeds, st.integers(1, 24), st.integers(1, 24), st.integers(1, 26))
def test_optimal_lora_is_the_svd(seed: int, o: int, i: int, rank: int) -> None:
    matrix = numbers(seed, o, i)
    check(optimal_lora(matrix, rank), matrix, rank)


@given(seeds, st.integers(1, 24), st.integers(1, 24), st.integers(1, 9), st.integers(1, 10))
def test_truncated_factors_are_the_svd(seed: int, o: int, i: int, r: int, rank: int) -> None:
    up, down = numbers(seed, o, r), numbers(seed + 1, r, i)
    check(truncate_factors(up, down, rank), up @ down, rank)


@pytest.mark.parametrize("fall", [0.5, 0.1, 1e-3])
def test_a_spectrum_that_falls_below_the_square_root_of_eps(fall: float) -> None:
    """Squaring the matrix loses what is below 1e-8: no more than that is lost in the result."""
    left, _ = torch.linalg.qr(numbers(1, 40, 20))
    right, _ = torch.linalg.qr(numbers(2, 30, 20))
    matrix = left * fall ** torch.arange(20, dtype=torch.float64) @ right.t()
    for rank in (1, 3, 10):
        found = optimal_lora(matrix, rank)
        assert abs(found.error - optimum(matrix, rank)) < 1e-10


def test_zero_and_bad_ranks() -> None:
    assert optimal_lora(torch.zeros(3, 4), 2).error == 0.0
    assert truncate_factors(torch.zeros(3, 2), torch.zeros(2, 4), 1).error == 0.0
    for rank in (0, -1):
        with pytest.raises(ShapeError):
            optimal_lora(torch.ones(3, 4), rank)
        with pytest.raises(ShapeError):
            truncate_factors(torch.ones(3, 1), torch.ones(1, 4), rank)
