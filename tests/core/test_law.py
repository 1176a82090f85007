"""The order of several updates is each one's own, and what has no place in it is refused everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import Any, ClassVar

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases
from torch import Tensor, nn

import adaptsurgery
from adaptsurgery.algorithms import HRA, DoRA, LoRA, LoraConfig
from adaptsurgery.core.blocks import Placed, check_places, edit_of
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.law import Order, in_order
from adaptsurgery.core.update import Composition, Scaling, Update, compose, parts_of
from adaptsurgery.graph.attach import attach
from adaptsurgery_formats.errors import InexactError, ShapeError, SurgeryError, ValueRefused

OUT, IN = 6, 4


@dataclass(frozen=True, eq=False, kw_only=True)
class Gains(Scaling):
    """A factor an output or an input, as it is."""

    gains: Tensor
    along: int = 0

    name: ClassVar[str] = "gains"

    @property
    def axis(self) -> int:
        return self.along

    def less_one(self) -> Tensor:
        return self.gains - 1


class Stranger(Update):
    """W' = −W: an update of a kind that nothing knows."""

    name = "stranger"

    def folded(self, weight: Tensor, gate: Tensor | None = None) -> Tensor:
        return -weight

    def apply(self, x: Tensor, layer: Layer, *rest: Any, **more: Any) -> Tensor:
        return -layer.forward(x)


class Misplaced(Stranger):
    """One that claims a place which belongs to another kind."""

    name, order = "misplaced", Order.ADD


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def lora(rank: int = 2) -> LoRA:
    return LoRA(random(OUT, rank), random(rank, IN), up_bias=random(OUT), scale=0.7)


def by_hand(weight: Tensor, updates: list[Update]) -> Tensor:
    """Turns, scalings, sums, a renorm: each sort in the order given, in float64."""
    for update in updates:
        if isinstance(update, HRA):
            weight = reference.rotated(weight, reference.rotation(update.u))
    for update in updates:
        if isinstance(update, Gains):
            factors = 1 + update.scale * (update.gains - 1)
            weight = weight * (factors[:, None] if update.along == 0 else factors[None])
    for update in updates:
        if isinstance(update, (LoRA, DoRA)):
            delta = update if isinstance(update, LoRA) else update.inner
            weight = weight + delta.scale * delta.up @ delta.down  # type: ignore[attr-defined]
    for update in updates:
        if isinstance(update, DoRA):
            weight = reference.renormed(weight, update.magnitude)
    return weight


def several() -> list[Update]:
    dora = DoRA(LoRA(random(OUT, 1), random(1, IN)), random(OUT, 1).abs())
    scalings = [Gains(gains=random(OUT)), Gains(gains=random(IN), along=1, scale=0.5)]
    return [dora, lora(), scalings[0], HRA(random(IN, 2)), scalings[1], HRA(random(IN, 1)), lora(1)]


def in_blocks(places: list[Placed], stored: Tensor, inverse: bool = False, rows: int = 1) -> Tensor:
    out = stored.clone().contiguous()
    edit = edit_of(places, tuple(stored.shape), torch.float64, inverse=inverse)
    matrix, step = out.view(edit.rows, edit.columns), rows * edit.unit
    for start in range(0, edit.rows, step):
        edit.apply(matrix[start : start + step], start)
    return out


@pytest.mark.parametrize("seed", range(12))
def test_the_order_given_says_nothing_between_kinds(seed: int) -> None:
    torch.manual_seed(seed)
    updates, weight = several(), random(OUT, IN)
    shuffled = [updates[n] for n in torch.randperm(len(updates)).tolist()]
    wanted = by_hand(weight, shuffled)
    torch.testing.assert_close(compose(shuffled).fold(weight), wanted, rtol=1e-10, atol=1e-10)
    for transposed in (False, True):
        stored = weight.t().contiguous() if transposed else weight
        places = [Placed(update, transposed=transposed) for update in shuffled]
        seen = in_blocks(places, stored)
        seen = seen.t() if transposed else seen
        torch.testing.assert_close(seen, wanted, rtol=1e-10, atol=1e-10)
    x = random(3, IN)
    layer = Layer("linear", weight, bias=random(OUT))
    bias = compose(shuffled).fold_bias(layer.bias)
    out = compose(shuffled).apply(x, layer)
    torch.testing.assert_close(out, x @ wanted.t() + bias, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_what_went_in_by_the_law_comes_out_again(seed: int) -> None:
    torch.manual_seed(seed)
    updates = several()[1:]
    weight = random(OUT, IN)
    whole = compose(updates)
    torch.testing.assert_close(whole.unfold(whole.fold(weight)), weight, rtol=1e-9, atol=1e-9)
    places = [Placed(update) for update in updates]
    back = in_blocks(places, in_blocks(places, weight), inverse=True)
    torch.testing.assert_close(back, weight, rtol=1e-9, atol=1e-9)


def test_sorting_is_stable() -> None:
    updates = several()
    for some in permutations(updates[:5]):
        kinds = [u.order for u in in_order(some)]
        assert kinds == sorted(kinds)  # type: ignore[type-var]
    turned = [u for u in parts_of(compose(updates)) if u.order is Order.TURN]
    assert turned == [updates[3], updates[5]]


@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv1d", "conv2d", "conv3d", "embedding"])
@given(st.data())
def test_factors_on_every_kind_of_layer(kind: str, along: int, data: st.DataObject) -> None:
    case = data.draw(cases("lora", kind))
    weight, layer = case.weight, case.layer
    update = Gains(gains=torch.linspace(-1, 2, weight.shape[along]).double() + 0.1, along=along)
    update = update.scaled(data.draw(st.sampled_from([1.0, 0.5, -2.0])))
    factors = 1 + update.scale * (update.gains - 1)
    wanted = weight * factors.view([-1 if d == along else 1 for d in range(weight.dim())])
    torch.testing.assert_close(update.fold(weight), wanted, rtol=1e-11, atol=1e-11)
    bias = layer.bias
    if bias is not None:
        shifted = bias * factors if along == 0 else bias
        torch.testing.assert_close(update.fold_bias(bias), shifted, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(
            update.unfold_bias(bias * 1), bias / factors if along == 0 else bias
        )
    place = Placed(update, transposed=layer.transposed)
    stored = layer.weight.detach()
    seen = in_blocks([place], stored, rows=data.draw(st.integers(1, 9)))
    torch.testing.assert_close(layer.canonical(seen), wanted, rtol=1e-11, atol=1e-11)
    for form in ("auto", "factored", "folded"):
        out = update.apply(case.x, layer, form)  # type: ignore[arg-type]
        told = layer.forward(case.x, wanted, update.fold_bias(bias))
        torch.testing.assert_close(out, told, rtol=1e-9, atol=1e-9)


def test_factors_on_a_part_of_a_fused_weight_and_its_bias() -> None:
    weight, bias, gains = random(OUT, IN), random(OUT), random(OUT)
    update = Gains(gains=gains)
    fused = in_blocks([Placed(update, rows=(2, 8))], torch.cat([random(2, IN), weight]))
    torch.testing.assert_close(fused[2:], weight * gains[:, None])
    part = in_blocks([Placed(update, source=(2, 5))], weight[2:5])
    torch.testing.assert_close(part, (weight * gains[:, None])[2:5])
    both = [Placed(lora_ := lora(), bias=True), Placed(update, bias=True)]
    wanted = bias * gains + lora_.scale * lora_.up_bias
    torch.testing.assert_close(in_blocks(both, bias), wanted)
    torch.testing.assert_close(in_blocks(both, wanted, inverse=True), bias)
    inputs = Gains(gains=random(IN), along=1)
    with pytest.raises(ShapeError):
        edit_of([Placed(inputs)], (OUT, IN + 1))
    with pytest.raises(ShapeError):
        edit_of([Placed(update, rows=(0, 3))], (OUT, IN))


def test_a_factor_of_zero_does_not_come_out_again() -> None:
    update = Gains(gains=torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 1.0]))
    weight = random(OUT, IN)
    assert not update.fold(weight)[1].any()
    for undo in (
        lambda: update.unfold(weight),
        lambda: edit_of([Placed(update)], (OUT, IN), inverse=True),
        lambda: compose([update, lora()]).unfold(weight),
    ):
        with pytest.raises(InexactError) as raised:
            undo()
        assert raised.value.code == "no-inverse"


def test_gates_on_factors() -> None:
    """W + g·(W∘l − W), and the update's own input beside the base's."""
    weight, bias, gate = random(OUT, IN), random(OUT), random(OUT)
    layer = Layer("linear", weight, bias=bias)
    x, other = random(3, IN), random(3, IN)
    for update in (Gains(gains=random(OUT)), Gains(gains=random(IN), along=1)):
        change = update.fold(weight) - weight
        shifted = update.fold_bias(bias, None, gate)
        wanted = x @ weight.t() + other @ (gate[:, None] * change).t() + shifted
        torch.testing.assert_close(update.apply(x, layer, "auto", gate, other), wanted)
        both = compose([update, lora()])
        seen = both.apply(x, layer, "auto", [gate, None], [other, None])
        alone = parts_of(both)[1].apply(x, Layer("linear", weight), "auto")
        assert isinstance(both, Composition)
        torch.testing.assert_close(seen, wanted + alone - x @ weight.t(), rtol=1e-9, atol=1e-9)


STRANGE = [Stranger, Misplaced]


@pytest.mark.parametrize("strange", STRANGE)
def test_an_unknown_kind_is_refused_and_never_dropped(strange: Callable[[], Update]) -> None:
    """Alone and beside a known one, on blocks, in a model's weights, in a graph, in layers."""
    update = strange()
    model = nn.Sequential(nn.Linear(IN, OUT).double())
    before = model[0].weight.detach().clone()  # type: ignore[union-attr]
    graph = torch.fx.symbolic_trace(model)

    def inject() -> None:
        live = adaptsurgery.get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
        live.base_model.get_submodule("0").add("other", update)  # type: ignore[operator]

    attempts: dict[str, Callable[[], object]] = {
        "block": lambda: edit_of([Placed(update)], (OUT, IN)),
        "block beside": lambda: edit_of([Placed(lora()), Placed(update)], (OUT, IN)),
        "bias": lambda: edit_of([Placed(update, bias=True)], (OUT,)),
        "check": lambda: check_places([Placed(update)], (OUT, IN)),
        "fold": lambda: adaptsurgery.fold(model, {"0": update}),
        "unfold": lambda: adaptsurgery.unfold(model, {"0": update}),
        "graph": lambda: attach(graph, {"0": update}),
        "live": inject,
    }
    for where, attempt in attempts.items():
        with pytest.raises(SurgeryError) as raised:
            attempt()
        assert raised.value.code == "unknown-update", where
    assert torch.equal(before, model[0].weight)  # type: ignore[union-attr,arg-type]


def test_what_says_no_place_is_in_no_composition() -> None:
    for updates in ([Stranger()], [lora(), Stranger()], [Stranger(), HRA(random(IN, 1))]):
        with pytest.raises(ValueRefused) as raised:
            compose(updates)
        assert raised.value.code == "unknown-update" and "stranger" in str(raised.value)
