"""Truncations reach the dense optimum (Eckart–Young), and say by how much they miss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import numbers, seeds

from adaptsurgery.core.linalg import Approximation, truncate_factors
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


@given(seeds, st.integers(1, 24), st.integers(1, 24), st.integers(1, 9), st.integers(1, 10))
def test_truncated_factors_are_the_svd(seed: int, o: int, i: int, r: int, rank: int) -> None:
    up, down = numbers(seed, o, r), numbers(seed + 1, r, i)
    check(truncate_factors(up, down, rank), up @ down, rank)


def test_zero_and_bad_ranks() -> None:
    assert truncate_factors(torch.zeros(3, 2), torch.zeros(2, 4), 1).error == 0.0
    for rank in (0, -1):
        with pytest.raises(ShapeError):
            truncate_factors(torch.ones(3, 1), torch.ones(1, 4), rank)
