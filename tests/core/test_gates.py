"""Dropouts as data flow: gates and inputs of their own, in every form, against the definition."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import KINDS, Case, cases, numbers
from torch import Tensor, nn

from adaptsurgery.algorithms import HRAConfig, LoHaConfig, LoKrConfig, LoraConfig
from adaptsurgery.core.update import Update, compose, parts_of
from adaptsurgery_formats.errors import ShapeError

FORMS = ("auto", "factored", "folded")


def expected(case: Case, new: Tensor, gate: Tensor | None, seen: Tensor) -> Tensor:
    """W·x + b + g·((W' − W)·seen + Δb), in float64."""
    layer, weight = case.layer, case.weight
    added = layer.forward(seen, new, None) - layer.forward(seen, weight, None)
    change = reference.bias_delta(case.algorithm, case.slots)
    if change is not None:
        added = added + case.scale * layer.over_channels(change)
    gate = torch.ones((), dtype=torch.float64) if gate is None else gate
    return layer.forward(case.x) + layer.over_channels(gate) * added


@st.composite
def gates(draw: st.DrawFn, outputs: int) -> Tensor | None:
    which = draw(st.sampled_from(["none", "one", "rows"]))
    seed = draw(st.integers(0, 99))
    if which == "none":
        return None
    drawn = numbers(seed, outputs).round(decimals=1)
    return drawn[0] if which == "one" else drawn


def other_input(case: Case, draw: Any) -> Tensor | None:
    if case.layer.kind == "embedding" or draw(st.booleans()):
        return None
    return numbers(draw(st.integers(0, 99)), *case.x.shape)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "hra", "full", "dora"])
@given(data=st.data())
def test_one_update(algorithm: str, kind: str, form: Any, data: st.DataObject) -> None:
    case = data.draw(cases(algorithm, kind))
    gate, seen = data.draw(gates(case.shape[0])), other_input(case, data.draw)
    y = case.update.apply(case.x, case.layer, form, gate, seen)
    wanted = expected(case, case.reference_fold(), gate, case.x if seen is None else seen)
    assert torch.allclose(y, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
@given(data=st.data())
def test_several_updates(kind: str, form: Any, data: st.DataObject) -> None:
    """Each part goes from the weight that the parts before it made, ungated where they are not."""
    first = data.draw(cases("hra", kind))
    layer = first.layer
    generator = torch.Generator().manual_seed(4)
    made = [
        config.fresh(layer.shape, kind=layer.kind, dtype=torch.float64, generator=generator)
        for config in (LoraConfig(r=2, init_lora_weights=False), LoraConfig(r=1, init_lora_weights=False))
    ]  # fmt: skip
    both: Update = compose([made[0], first.update, made[1]])
    parts = parts_of(both)
    each = [data.draw(gates(layer.shape[0])) for _ in parts]
    inputs = [None, *(other_input(first, data.draw) for _ in parts[1:])]
    weight, wanted = first.weight, layer.forward(first.x)
    for update, gate, seen in zip(parts, each, inputs):
        new = update.fold(weight)
        change = new - weight if gate is None else (new - weight) * gate.view(-1, *[1] * (new.dim() - 1))  # fmt: skip
        wanted = wanted + layer.forward(first.x if seen is None else seen, change, None)
        weight = weight + change
    y = both.apply(first.x, layer, form, each, inputs)
    assert torch.allclose(y, wanted, rtol=1e-9, atol=1e-9)


def test_as_many_gates_as_parts() -> None:
    layer = Case(nn.Linear(4, 4).double(), numbers(1, 2, 4)).layer
    update = LoraConfig(r=1).fresh((4, 4), dtype=torch.float64)
    with pytest.raises(ShapeError, match="2 gates"):
        update.apply(numbers(1, 2, 4), layer, gate=[None, None])
    with pytest.raises(ShapeError, match="3 gates"):
        compose([update, update]).apply(numbers(1, 2, 4), layer, gate=[None] * 3)


# --- what is drawn ---------------------------------------------------------------------------------


def test_nothing_is_drawn_without_a_dropout() -> None:
    like = torch.zeros(1)
    for config in (LoraConfig(), LoHaConfig(), LoKrConfig(), HRAConfig()):
        assert config.gate(5, like) is None and config.seen(like) is None


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (LoHaConfig(rank_dropout=0.25), 1.0),
        (LoKrConfig(rank_dropout=0.25), 0.75),
        (LoKrConfig(rank_dropout=0.25, rank_dropout_scale=True), 1.0),
        (LoHaConfig(module_dropout=0.25), 0.75),
        (LoKrConfig(module_dropout=0.25, rank_dropout=0.25), 0.75**2),
    ],
    ids=str,
)
def test_the_share_that_stays(config: Any, kept: float) -> None:
    torch.manual_seed(0)
    drawn = torch.stack([config.gate(200, torch.zeros(())).expand(200) for _ in range(3000)])
    assert drawn.mean().item() == pytest.approx(kept, rel=0.04)


@pytest.mark.parametrize("config", [LoHaConfig(rank_dropout=1.0), LoKrConfig(rank_dropout=1.0, rank_dropout_scale=True)], ids=str)  # fmt: skip
def test_all_rows_dropped_is_nothing_added(config: Any) -> None:
    gate = config.gate(7, torch.zeros(()))
    assert gate.shape == (7,) and not gate.any()


def test_pefts_mask_of_no_rows_is_nan() -> None:
    """Its rank_dropout divides by the mean of the mask, here 0."""
    config = peft.LoHaConfig(target_modules=["0"], rank_dropout=1.0, init_weights=False)
    model = peft.LoHaModel(nn.Sequential(nn.Linear(4, 4)), config, "default").train()
    assert model(torch.ones(1, 4)).isnan().any()


@pytest.mark.parametrize("algorithm", ["loha", "lokr"])
def test_rank_dropout_is_pefts(algorithm: str) -> None:
    """The same draw drops the same rows by the same factor."""
    config, theirs, model = {
        "loha": (LoHaConfig, peft.LoHaConfig, peft.LoHaModel),
        "lokr": (LoKrConfig, peft.LoKrConfig, peft.LoKrModel),
    }[algorithm]
    options: dict[str, Any] = {"r": 2, "rank_dropout": 0.5, "init_weights": False}
    base = nn.Linear(6, 10)
    wrapped = model(nn.Sequential(base), theirs(target_modules=["0"], **options), "default").train()
    ours = config(**options)
    slots = {k.split(".")[-2].split("_", 1)[1]: v for k, v in wrapped.state_dict().items() if "default" in k}  # fmt: skip
    update = ours.assembled(slots, ours.scale(2, 8.0), (10, 6))
    x = torch.randn(3, 6)
    torch.manual_seed(11)
    torch.rand(1)  # PEFT draws for module_dropout first, also where that is 0
    gate = ours.gate(10, x)
    torch.manual_seed(11)
    wanted = wrapped(x)
    from adaptsurgery.core.geometry import Layer

    y = update.apply(x, Layer("linear", base.weight, base.bias), "factored", gate)
    assert torch.allclose(y, wanted, atol=1e-5) and not gate.all()


def test_lora_dropout_is_pefts() -> None:
    for options in ({}, {"use_dora": True}):
        base = nn.Linear(6, 10)
        theirs = peft.LoraConfig(target_modules=["0"], r=2, lora_dropout=0.5, init_lora_weights=False, **options)  # fmt: skip
        wrapped = peft.LoraModel(nn.Sequential(base), theirs, "default").train()
        named = {"lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "magnitude"}
        slots = {named[k.split(".")[2]]: v for k, v in wrapped.state_dict().items() if "lora" in k}
        if "magnitude" in slots:
            slots["magnitude"] = slots["magnitude"][:, None]
        ours = LoraConfig(r=2, lora_dropout=0.5, **options)
        update = ours.assembled(slots, ours.scale(2, 8.0), (10, 6))
        x = torch.randn(3, 6)
        torch.manual_seed(11)
        seen = ours.seen(x)
        torch.manual_seed(11)
        wanted = wrapped(x)
        from adaptsurgery.core.geometry import Layer

        y = update.apply(x, Layer("linear", base.weight, base.bias), "factored", seen=seen)
        assert torch.allclose(y, wanted, atol=1e-5)
