"""The exact rewritings: Tucker → flat, LoHa and LoKr and HRA → LoRA, DoRA → a dense difference;
and the truncated ones, against the dense optimum."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import KINDS, Case, cases
from torch import Tensor

from adaptsurgery.algorithms import HRA, DoRA, Full, LoHa, LoKr, LoRA
from adaptsurgery.algorithms.lora import Truncation

kinds = st.sampled_from(KINDS)


def close(seen: Tensor, wanted: Tensor, eps: float = 1e-12) -> None:
    assert seen.shape == wanted.shape
    assert float((seen - wanted).norm()) <= eps * max(float(wanted.norm()), 1e-9)


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
@given(st.data())
def test_to_lora_is_exact(algorithm: str, data: st.DataObject) -> None:
    case = data.draw(cases(algorithm, data.draw(kinds)))
    update = case.update
    assert isinstance(update, LoRA | LoHa | LoKr)
    lora = update.to_lora()
    assert lora.scale == update.scale and lora.mid is None
    assert lora.kernel == case.shape[2:] and lora.down.shape[1:] == case.shape[1:]
    close(lora.dense(), case.reference_delta())
    if isinstance(update, LoHa):
        assert lora.rank == update.rank**2
    if isinstance(update, LoKr):
        assert lora.rank == _least_kronecker_rank(case)


def _least_kronecker_rank(case: Case) -> int:
    update = case.update
    assert isinstance(update, LoKr)
    (a, c), (b, columns) = update.outer_shape, update.inner_shape
    left = min(a, c, update.w1_a.shape[1] if update.w1_a is not None else a)
    right = min(b, columns)
    if update.w2_a is not None:
        right = min(right, update.w2_a.shape[0 if update.t2 is not None else 1])
    return left * right


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
@given(st.data())
def test_flat_keeps_the_difference_and_the_rank(algorithm: str, data: st.DataObject) -> None:
    case = data.draw(cases(algorithm, data.draw(st.sampled_from(["conv1d", "conv2d", "conv3d"]))))
    update = case.update
    assert isinstance(update, LoRA | LoHa | LoKr)
    flat = update.without_core() if isinstance(update, LoKr) else update.flat()
    assert not {"mid", "t1", "t2"} & set(flat.tensors())
    close(flat.dense(), case.reference_delta())
    if not isinstance(update, LoKr):
        assert not isinstance(flat, LoKr) and flat.rank == update.rank
    elif update.t2 is not None and isinstance(flat, LoKr) and flat.w2_b is not None:
        assert flat.w2_b.shape[0] == update.t2.shape[0]


@given(st.data())
def test_hra_to_lora_is_exact_at_its_own_rank_or_the_inputs(data: st.DataObject) -> None:
    case = data.draw(cases("hra", data.draw(kinds)))
    update = case.update
    assert isinstance(update, HRA)
    lora = update.to_lora(case.weight)
    assert lora.rank == min(update.rank, update.size)
    close(case.weight + lora.dense(), case.reference_fold())


@given(st.data())
def test_hra_rotations_form_a_group(data: st.DataObject) -> None:
    first = data.draw(cases("hra", "linear")).update
    assert isinstance(first, HRA)
    u = torch.randn(first.size, data.draw(st.integers(1, 4)), dtype=torch.float64)
    second = HRA(u)
    close(first.then(second).matrix(), first.matrix() @ second.matrix())
    close(second.then(first).matrix(), second.matrix() @ first.matrix())
    close(first.inverse().matrix(), first.matrix().t())
    close(first.matrix() @ first.matrix().t(), torch.eye(first.size, dtype=torch.float64))


@given(st.data())
def test_dora_to_full_is_exact(data: st.DataObject) -> None:
    case = data.draw(cases("dora", data.draw(kinds)))
    update = case.update
    assert isinstance(update, DoRA)
    full = update.to_full(case.weight)
    close(full.fold(case.weight), case.reference_fold())


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "full"])
@given(st.data())
def test_truncation_reaches_the_dense_optimum(algorithm: str, data: st.DataObject) -> None:
    case = data.draw(cases(algorithm, data.draw(kinds)))
    rank = data.draw(st.integers(1, 6))
    update = case.update
    if isinstance(update, Full) and update.diff is None:
        return
    assert isinstance(update, LoRA | LoHa | LoKr | Full)
    found = update.truncated(rank)
    assert found.lora.scale == update.scale
    _optimal(found, case.reference_delta(), rank)


@given(st.data())
def test_dora_truncation_reaches_the_dense_optimum(data: st.DataObject) -> None:
    case = data.draw(cases("dora", data.draw(kinds)))
    rank = data.draw(st.integers(1, 6))
    update = case.update
    assert isinstance(update, DoRA)
    found = update.truncated(case.weight, rank)
    _optimal(found, case.reference_fold() - case.weight, rank)


def _optimal(found: Truncation, delta: Tensor, rank: int) -> None:
    s = torch.linalg.svd(delta.flatten(1)).S
    best = float(s[rank:].norm() / s.norm())
    reached = float((found.lora.dense() - delta).norm() / delta.norm())
    assert found.lora.rank <= rank and found.lora.shape == tuple(delta.shape)
    assert abs(found.error - best) < 1e-8 and abs(reached - best) < 1e-8


def test_a_truncation_is_stored_in_float32_at_least() -> None:
    half = LoRA(torch.randn(6, 3).bfloat16(), torch.randn(3, 5).bfloat16())
    assert half.truncated(2).lora.up.dtype == torch.float32
    assert half.truncated(2, torch.bfloat16).lora.up.dtype == torch.bfloat16


def test_alpha_follows_the_rank_of_an_exact_rewriting() -> None:
    """A LoHa of rank 4 and alpha 2 has s = 1/2; its LoRA of rank 16 needs alpha 8 to say so."""
    loha = LoHa(*(torch.randn(*s) for s in ((6, 4), (4, 5), (6, 4), (4, 5))), scale=2 / 4)
    lora = loha.to_lora()
    assert math.isclose(lora.scale * lora.rank, 8.0)


def test_hra_of_near_equal_pairs_is_a_lora_to_float32_rounding() -> None:
    """A small rotation, as PEFT's paired initial value gives: the factors must not cancel."""
    torch.manual_seed(0)
    half = torch.randn(64, 4, dtype=torch.float64)
    pairs = torch.stack([half, half + 1e-3 * torch.randn_like(half)], dim=2).flatten(1)
    weight = torch.randn(48, 64, dtype=torch.float64)
    delta = HRA(pairs).fold(weight) - weight
    lora = HRA(pairs).to_lora(weight).cast(torch.float32).cast(torch.float64)
    assert float((lora.dense() - delta).norm() / delta.norm()) < 2e-7
