"""New norms of rows whose squares float32 does not hold, beside float64 numpy from the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from adaptsurgery.algorithms import DoRA, LoRA
from adaptsurgery.core.blocks import Placed, change_rows, edit_of

SIZES = (1.0, 1e22, 1e-26, 3e30, 0.0, 1e-3)


def given(axis: int) -> tuple[torch.Tensor, DoRA]:
    """A weight of lines of very different sizes, one of them all zero, and a DoRA that adds nothing there."""
    generator = torch.Generator().manual_seed(4)
    lines = torch.randn(len(SIZES), 5, generator=generator) * torch.tensor(SIZES)[:, None]
    weight = lines if axis == 0 else lines.t().contiguous()
    up = torch.zeros(weight.shape[0], 2)
    down = torch.randn(2, weight.shape[1], generator=generator)
    if axis == 0:
        up[0] = 0.5
    shape = (-1, 1) if axis == 0 else (1, -1)
    magnitude = torch.linspace(1, 2, len(SIZES)).reshape(shape)
    return weight, DoRA(LoRA(up=up, down=down, scale=0.5), magnitude)


def wanted(weight: torch.Tensor, dora: DoRA) -> Any:
    inner: Any = dora.inner
    wide = weight.double().numpy()
    wide = wide + inner.scale * inner.up.double().numpy() @ inner.down.double().numpy()
    norms = np.sqrt((wide**2).sum(axis=1 - dora.axis, keepdims=True))
    gain = dora.magnitude.double().numpy() / np.where(norms == 0, 1, norms)
    return wide * np.where(norms == 0, 0, gain)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_fold_is_right_where_squares_overflow_or_vanish(axis: int) -> None:
    weight, dora = given(axis)
    got, want = dora.fold(weight).double().numpy(), wanted(weight, dora)
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-37)


def test_a_block_has_the_bytes_of_the_whole() -> None:
    weight, dora = given(0)
    edit = edit_of([Placed(dora)], tuple(weight.shape))
    pieces = []
    for start in range(len(SIZES)):
        target, scratch = torch.empty(1, 5), torch.empty(1, 5)
        change_rows(edit, weight[start : start + 1], target, start, scratch)
        pieces.append(target)
    assert torch.equal(torch.cat(pieces), dora.fold(weight))


def test_a_row_beyond_its_dtype_is_no_row_of_zeros() -> None:
    """A forward keeps float32: its output then is no number, and not one that looks like one."""
    weight, dora = given(0)
    assert torch.isnan(dora.folded(weight)[1]).all()
