"""Several updates on one layer: one law, W' = W·R1·R2·… + Σ s·Δ, then a Renorm; and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import KINDS, Case, modules, numbers, slots, with_weight
from torch import Tensor

from adaptsurgery.algorithms import HRA, DoRA, LoRA, build
from adaptsurgery.core.cost import ApplyForm
from adaptsurgery.core.rounding import rounded
from adaptsurgery.core.update import Composition, compose
from adaptsurgery_formats.errors import InexactError, ShapeError, ValueRefused


@st.composite
def stacks(draw: st.DrawFn, kind: str, renorm: bool = True) -> tuple[Case, list[Case]]:
    """A layer, and one to four adapters on it in any order; at most one of them a DoRA."""
    base = draw(modules(kind))
    chosen = draw(
        st.lists(st.sampled_from(["lora", "loha", "lokr", "hra", "full"]), min_size=1, max_size=4)
    )
    held = [replace(base, algorithm=a, slots=draw(slots(a, base.shape))[0]) for a in chosen]
    for case in held:
        case.scale = 1.0 if case.algorithm == "hra" else draw(st.sampled_from([0.3, -1.5]))
    if renorm and draw(st.booleans()) and chosen[0] in ("lora", "loha", "lokr"):
        held[0].slots["magnitude"] = numbers(3, base.shape[0], *(1,) * (len(base.shape) - 1)).abs()
    return base, held


def law(base: Case, held: list[Case]) -> Tensor:
    """W·R1·R2·… + Σ s·Δ, then the magnitude, from the definitions."""
    weight = base.weight
    for case in held:
        if case.algorithm == "hra":
            weight = reference.rotated(weight, reference.rotation(case.slots["u"]))
    for case in held:
        if case.algorithm != "hra":
            weight = weight + case.scale * case.reference_delta()
    for case in held:
        if "magnitude" in case.slots:
            weight = reference.renormed(weight, case.slots["magnitude"])
    return weight


def law_bias(base: Case, held: list[Case]) -> Tensor | None:
    parts = [(c.scale, reference.bias_delta(c.algorithm, c.slots)) for c in held]
    shift = [scale * part for scale, part in parts if part is not None]
    bias = base.layer.bias
    if not shift:
        return bias
    return sum(shift, 0 if bias is None else bias.detach())


def close(seen: Tensor, wanted: Tensor, size: Tensor, eps: float = 1e-10) -> None:
    assert seen.shape == wanted.shape
    if seen.numel():
        assert float((seen - wanted).abs().max()) <= eps * (1 + float(size.abs().sum()))


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_several_updates_fold_and_apply_by_the_law(kind: str, data: st.DataObject) -> None:
    base, held = data.draw(stacks(kind))
    form: ApplyForm = data.draw(st.sampled_from(["auto", "factored", "folded"]))
    update, wanted = compose([case.update for case in held]), law(base, held)
    close(update.fold(base.weight), wanted, wanted)
    bias = law_bias(base, held)
    outputs = with_weight(base.module, wanted, bias)(base.x)
    if kind == "embedding" and bias is not None:
        outputs = outputs + bias
    close(update.apply(base.x, base.layer, form).detach(), outputs.detach(), wanted)


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_several_updates_are_taken_out_again(kind: str, data: st.DataObject) -> None:
    base, held = data.draw(stacks(kind, renorm=False))
    update = compose([case.update for case in held])
    folded = update.fold(base.weight)
    close(update.unfold(folded), base.weight, folded)


@given(st.data())
def test_composing_a_composition_is_flat(data: st.DataObject) -> None:
    base, held = data.draw(stacks("linear"))
    updates = [case.update for case in held]
    cut = data.draw(st.integers(1, len(updates)))
    nested = compose([compose(updates[:cut]), *updates[cut:]])
    assert torch.equal(nested.fold(base.weight), compose(updates).fold(base.weight))


def test_a_composition_rounds_once() -> None:
    """Three small steps, each below half a ulp of bf16: together they move the weight."""
    weight = torch.ones(2, 2, dtype=torch.bfloat16)
    step = LoRA(torch.full((2, 1), 0.0015), torch.ones(1, 2))
    assert torch.equal(step.fold(weight), weight)
    assert not torch.equal(compose([step] * 3).fold(weight), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_fold_in_float64_is_rounded_once(dtype: torch.dtype) -> None:
    """Through float32 about one number in 10⁵ would end on the wrong side."""
    torch.manual_seed(0)
    weight = torch.randn(512, 512).to(dtype)
    lora, hra = LoRA(torch.randn(512, 2), torch.randn(2, 512), scale=0.01), HRA(torch.randn(512, 2))
    for update in (lora, hra, DoRA(lora, torch.rand(512, 1)), compose([hra, lora])):
        seen = update.fold(weight, compute=torch.float64)
        assert torch.equal(seen, rounded(update.fold(weight.double()), dtype))
    just_above_half = torch.tensor([[2.0**-8 + 2.0**-40]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    full = build("full", {"diff": just_above_half})
    assert float(full.fold(one, compute=torch.float64)) == 1.0 + 2.0**-7


def test_rotations_keep_their_order() -> None:
    first, second = HRA(torch.randn(4, 1).double()), HRA(torch.randn(4, 1).double())
    weight = torch.randn(3, 4).double()
    wanted = weight @ first.matrix() @ second.matrix()
    torch.testing.assert_close(compose([first, second]).fold(weight), wanted)
    assert not torch.allclose(compose([second, first]).fold(weight), wanted)


def test_weights_scale_deltas_and_only_those() -> None:
    lora = LoRA(torch.randn(3, 2), torch.randn(2, 4), scale=0.5)
    assert lora.scaled(0.5).scale == 0.25
    rotation, dora = HRA(torch.randn(4, 2)), DoRA(lora, torch.ones(3, 1))
    for update in (rotation, dora, compose([lora, rotation])):
        assert update.scaled(1.0).fold(torch.ones(3, 4)).shape == (3, 4)
        with pytest.raises(ValueRefused, match="no-weight"):
            update.scaled(0.5)
    both = compose([lora, lora]).scaled(2.0)
    assert isinstance(both, Composition) and [d.scale for d in both.parts] == [1.0, 1.0]


def test_two_renorms_are_refused() -> None:
    dora = DoRA(LoRA(torch.randn(3, 2), torch.randn(2, 4)), torch.ones(3, 1))
    with pytest.raises(ValueRefused, match="two-renorms"):
        compose([dora, dora])
    with pytest.raises(InexactError, match="no-inverse"):
        compose([dora, HRA(torch.randn(4, 1))]).unfold(torch.ones(3, 4))


def test_weights_that_are_not_floating_are_refused() -> None:
    quantised = torch.zeros(3, 4, dtype=torch.int8)
    lora = LoRA(torch.randn(3, 2), torch.randn(2, 4))
    for update in (
        lora,
        HRA(torch.randn(4, 2)),
        DoRA(lora, torch.ones(3, 1)),
        build("full", {"diff_b": torch.ones(3)}),
    ):
        with pytest.raises(ValueRefused, match="not-floating"):
            update.fold(quantised)


def test_float8_weights_fold_in_float32() -> None:
    weight = torch.randn(3, 4).to(torch.float8_e4m3fn)
    lora = LoRA(torch.randn(3, 2), torch.randn(2, 4))
    wanted = (weight.float() + lora.dense()).to(torch.float8_e4m3fn)
    assert torch.equal(lora.fold(weight).float(), wanted.float())


def test_a_fold_in_blocks_is_the_fold_in_one() -> None:
    """Larger than a block of rows, transposed and not, every algorithm's in-place row step."""
    torch.manual_seed(0)
    o, i = 96, 1200
    held = {
        "lora": {"up": (o, 3), "down": (3, i)},
        "loha": {"w1_a": (o, 3), "w1_b": (3, i), "w2_a": (o, 3), "w2_b": (3, i)},
        "lokr": {"w1": (8, 10), "w2_a": (12, 3), "w2_b": (3, 120)},
        "full": {"diff": (o, i)},
    }
    for algorithm, shapes in held.items():
        tensors = {name: torch.randn(*s).double() for name, s in shapes.items()}
        update = build(algorithm, tensors, 0.7)
        for weight in (torch.randn(o, i).double(), torch.randn(i, o).double().t()):
            torch.testing.assert_close(update.fold(weight), update.folded(weight))
            assert update.fold(weight).stride() == weight.stride()


def test_the_shape_refused_is_told() -> None:
    with pytest.raises(ShapeError, match=r"Δ is \(3, 4\), and the weight is \[3, 5\]"):
        LoRA(torch.randn(3, 2), torch.randn(2, 4)).fold(torch.ones(3, 5))
