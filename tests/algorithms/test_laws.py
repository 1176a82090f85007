"""The laws, for every algorithm on every kind of layer and every stored form.

apply(x, layer with W) == layer with fold(W) (x)        unfold(fold(W)) == W
dense, rows, factored forms == the definition in float64 (tests/reference.py)
"""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import ALGORITHMS, DTYPES, KINDS, Case, cases
from torch import Tensor

from adaptsurgery.core.cost import ApplyForm
from adaptsurgery.core.update import Delta, Renorm
from adaptsurgery_formats.errors import InexactError, ShapeError

DELTAS = ("lora", "loha", "lokr", "full")
EVERYWHERE = [(algorithm, kind) for algorithm in ALGORITHMS for kind in KINDS]
EPS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def near(seen: Tensor, wanted: Tensor, eps: float, scale: Tensor | float = 0.0) -> None:
    """Equal up to ``eps`` of the largest number that entered the sums."""
    assert seen.shape == wanted.shape
    seen, wanted = seen.detach(), wanted.detach()
    if wanted.numel():
        size = max(float(wanted.abs().max()), float(torch.as_tensor(scale).abs().max()), 1e-3)
        error = float((seen.double() - wanted.double()).abs().max())
        assert error <= 32 * eps * size, f"off by {error / size:.1e} of {size:.3g}"


def weight_size(case: Case) -> float:
    """How large an output's terms may be: every number of W and W' summed with the largest x."""
    x = 1.0 if case.x.dtype == torch.int64 or not case.x.numel() else float(case.x.abs().max())
    rows = (case.weight.double().abs() + case.reference_fold().abs()).flatten(1).sum(1)
    return float(rows.max()) * x


@pytest.mark.parametrize(("algorithm", "kind"), EVERYWHERE)
@given(st.data())
def test_apply_is_the_layer_with_the_folded_weight(
    algorithm: str, kind: str, data: st.DataObject
) -> None:
    case = data.draw(cases(algorithm, kind))
    form: ApplyForm = data.draw(st.sampled_from(["auto", "factored", "folded"]))
    layer, update = case.layer, case.update
    seen = update.apply(case.x, layer, form)
    bias = update.fold_bias(layer.bias)
    near(
        seen, layer.forward(case.x, update.fold(layer.canonical()), bias), 1e-12, weight_size(case)
    )
    near(seen, case.reference_output(), 1e-12, weight_size(case))


@pytest.mark.parametrize(("algorithm", "kind"), EVERYWHERE)
@given(st.data())
def test_fold_is_the_definition_and_unfold_its_inverse(
    algorithm: str, kind: str, data: st.DataObject
) -> None:
    case = data.draw(cases(algorithm, kind))
    update, weight = case.update, case.weight
    folded = update.fold(weight)
    near(folded, case.reference_fold(), 1e-13)
    assert not folded.requires_grad
    if isinstance(update, Renorm):
        with pytest.raises(InexactError, match="no-inverse"):
            update.unfold(folded)
    else:
        near(update.unfold(folded), weight, 1e-13, folded)


@pytest.mark.parametrize(("algorithm", "kind"), [(a, k) for a in DELTAS for k in KINDS])
@given(st.data())
def test_dense_and_rows_are_the_definition(algorithm: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(algorithm, kind))
    update, wanted = case.update, case.reference_delta()
    assert isinstance(update, Delta)
    assert update.shape == case.shape and update.dense().shape == case.shape
    near(update.dense(), wanted, 1e-13)
    start = data.draw(st.integers(0, case.shape[0]))
    stop = data.draw(st.integers(start, case.shape[0]))
    near(update.rows(start, stop), wanted[start:stop].flatten(1), 1e-13, wanted)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@given(st.data())
def test_low_precision_folds_round_once(
    dtype: torch.dtype, algorithm: str, data: st.DataObject
) -> None:
    """A fold is the definition's W' but for one rounding (and float32's own error)."""
    kind = data.draw(st.sampled_from(KINDS))
    case = data.draw(cases(algorithm, kind, dtype))
    exact = case.reference_fold()
    folded = case.update.fold(case.weight)
    assert folded.dtype == dtype and folded.shape == exact.shape
    half_ulp = torch.finfo(dtype).eps / 2 * exact.abs()
    slack = 1e-4 * exact.abs().max() if dtype != torch.float64 else 0
    assert bool(((folded.double() - exact).abs() <= half_ulp * 1.01 + slack).all())
    in_float64 = case.update.fold(case.weight, compute=torch.float64)
    assert bool(((in_float64.double() - exact).abs() <= half_ulp * 1.001 + 1e-7).all())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@given(st.data())
def test_low_precision_apply(dtype: torch.dtype, algorithm: str, data: st.DataObject) -> None:
    case = data.draw(cases(algorithm, data.draw(st.sampled_from(KINDS)), dtype))
    case.slots = {
        name: tensor / 4 if name != "magnitude" else tensor for name, tensor in case.slots.items()
    }
    seen = case.update.apply(case.x, case.layer)
    assert seen.dtype == dtype
    near(seen, case.reference_output(), torch.finfo(dtype).eps, weight_size(case))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("held", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@given(st.data())
def test_an_adapter_of_another_dtype_follows_x(
    held: torch.dtype, algorithm: str, data: st.DataObject
) -> None:
    case = data.draw(cases(algorithm, data.draw(st.sampled_from(KINDS)), torch.float32))
    case.slots = {name: tensor.to(held) for name, tensor in case.slots.items()}
    seen = case.update.apply(case.x, case.layer)
    assert seen.dtype == torch.float32
    near(seen, case.reference_output(), 1e-5, weight_size(case))


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "full"])
@given(st.data())
def test_every_form_gives_the_same_output_and_gradients(
    algorithm: str, data: st.DataObject
) -> None:
    case = data.draw(cases(algorithm, data.draw(st.sampled_from(KINDS)), groups=False))
    case.slots = {name: t.clone().requires_grad_() for name, t in case.slots.items()}
    forms = [f for f in get_args(ApplyForm) if f != "bilinear" or _bilinear(case)]
    found = []
    for form in forms:
        y = case.update.apply(case.x, case.layer, form)
        leaves = list(case.slots.values())
        grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
        found.append((y, [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads)]))
    for y, grads in found[1:]:
        near(y, found[0][0], 1e-11, weight_size(case))
        for seen, wanted in zip(grads, found[0][1]):
            near(seen, wanted, 1e-10, weight_size(case) ** 2)


def _bilinear(case: Case) -> bool:
    return case.algorithm == "loha" and case.layer.kind == "linear"


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "hra", "full", "dora"])
@given(st.data())
def test_an_update_for_another_weight_is_refused(algorithm: str, data: st.DataObject) -> None:
    case = data.draw(cases(algorithm, "linear"))
    o, i = case.shape
    other = torch.zeros(o + 1, i + 1, dtype=torch.float64)
    with pytest.raises(ShapeError):
        case.update.fold(other)
    with pytest.raises(ShapeError):
        case.update.unfold(other) if algorithm != "dora" else case.update.fold(other)
