"""Cuts of dimensions against both libraries' own functions, and the search for a factor."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lycoris.functional.general import factorization as lycoris
from peft.tuners.lokr.layer import factorization as peft

from adaptsurgery_formats.lokr_cuts import (
    lycoris_factorization,
    peft_decompose_factor,
    peft_factorization,
)

SIZES = st.integers(1, 5000)
FACTORS = st.one_of(st.just(-1), st.integers(1, 200))


@given(SIZES, FACTORS)
def test_the_cuts_are_the_peers_own(size: int, factor: int) -> None:
    assert peft_factorization(size, factor) == peft(size, factor)
    assert lycoris_factorization(size, factor) == lycoris(size, factor)


@pytest.mark.parametrize(
    ("size", "factor", "cut"),
    [(320, -1, (16, 20)), (320, 32, (10, 32)), (1000, 7, (5, 200)), (128, 64, (2, 64))],
)
def test_lycoris_sorts_what_peft_does_not(size: int, factor: int, cut: tuple[int, int]) -> None:
    assert lycoris_factorization(size, factor) == cut
    assert sorted(peft_factorization(size, factor)) == list(cut)


@given(st.lists(SIZES, min_size=1, max_size=5), FACTORS)
def test_a_factor_is_found_wherever_there_is_one(sizes: list[int], factor: int) -> None:
    cuts = [peft_factorization(s, factor) for s in sizes]
    found = peft_decompose_factor(cuts)
    assert found is not None
    assert [peft_factorization(s, found) for s in sizes] == cuts


def test_no_factor_makes_unlike_cuts() -> None:
    assert peft_decompose_factor([(3, 4), (4, 3)]) is None
