"""The adapted layer against the float64 definition, on every kind and setting; PEFT's wrong cases."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import reference
import strategies as S
import torch
from hypothesis import given
from hypothesis import strategies as st
from live_nets import both, configs
from torch import Tensor, nn

from adaptsurgery import LoraConfig, get_peft_model
from adaptsurgery.core.update import compose
from adaptsurgery.modules.layer import AdaptedLayer
from adaptsurgery_formats.errors import ShapeError

KINDS = ("linear", "Conv1D", "conv1d", "conv2d", "conv3d")
PAIRS = [*((a, k) for a in ("lora", "loha", "lokr", "hra") for k in KINDS), ("lora", "embedding")]


def adapted(case: S.Case) -> AdaptedLayer:
    layer = AdaptedLayer(copy.deepcopy(case.module)).eval()
    layer.add("a", case.update)
    layer.active = ("a",)
    return layer


@pytest.mark.parametrize("algorithm, kind", PAIRS)
@given(data=st.data())
def test_forward_merge_and_back_are_the_definition(algorithm: str, kind: str, data: Any) -> None:
    case = data.draw(S.cases(algorithm, kind))
    if "mid" in case.slots:  # a file's, which PEFT has no place for
        case.slots = {n: t for n, t in case.slots.items() if n != "mid"}
        case.slots["down"] = S.numbers(1, case.slots["up"].shape[1], *case.shape[1:])
    layer = adapted(case)
    wanted = case.reference_output()
    torch.testing.assert_close(layer(case.x), wanted, rtol=1e-9, atol=1e-9)
    if kind == "embedding" and "up_bias" in case.slots:
        return
    before = copy.deepcopy(layer.base_layer.state_dict())
    layer.merge(["a"])
    torch.testing.assert_close(layer.base_layer(case.x), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer(case.x), wanted, rtol=1e-9, atol=1e-9)
    layer.unmerge()
    after = layer.base_layer.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@given(data=st.data())
def test_several_on_one_layer_follow_the_law(data: Any) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    case = data.draw(S.modules(kind))
    layer, weight = AdaptedLayer(copy.deepcopy(case.module)).eval(), case.weight.double()
    algorithms = data.draw(st.permutations(["lora", "hra", "lokr", "hra"]))
    deltas = torch.zeros_like(weight)
    for n, algorithm in enumerate(algorithms):
        slots, rank = data.draw(S.slots(algorithm, case.shape))
        slots = {k: v for k, v in slots.items() if k not in ("mid", "up_bias")}
        if algorithm == "lora":
            slots["down"] = S.numbers(n, slots["up"].shape[1], *case.shape[1:])
        scale = 1.0 if algorithm == "hra" else 0.7 / rank
        one = S.Case(case.module, case.x, algorithm, slots, scale)
        layer.add(f"a{n}", one.update)
        if algorithm == "hra":
            weight = reference.rotated(weight, reference.rotation(slots["u"]))
        else:
            deltas += one.scale * one.reference_delta()
    layer.active = tuple(layer.settings)
    wanted = S.with_weight(case.module, weight + deltas, None)(case.x)
    torch.testing.assert_close(layer(case.x), wanted, rtol=1e-8, atol=1e-8)
    for name in layer.active:  # one after the other is as all at once
        layer.merge([name])
    torch.testing.assert_close(layer.base_layer(case.x), wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("algorithm, kind", PAIRS)
@given(data=st.data())
def test_gradients_are_those_of_the_folded_weight(algorithm: str, kind: str, data: Any) -> None:
    case = data.draw(S.cases(algorithm, kind))
    if "mid" in case.slots or case.x.numel() == 0:
        return
    layer = adapted(case)
    held = list(layer.tensors("a").values())
    wanted_of = layer.layer()
    update = compose([layer.update("a")])
    bias = update.fold_bias(wanted_of.bias, wanted_of.weight.dtype)
    plain = wanted_of.forward(case.x, update.folded(wanted_of.canonical()), bias)
    mine = torch.autograd.grad(layer(case.x).square().sum(), held)
    wanted = torch.autograd.grad(plain.square().sum(), held)
    torch.testing.assert_close(mine, wanted, rtol=1e-7, atol=1e-7)


# --- where PEFT is wrong -------------------------------------------------------------------------


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


WRONG: dict[str, tuple[str, Any, tuple[int, ...], dict[str, Any]]] = {
    "a Conv1d LoKr with a full w2 is scrambled": (
        "lokr", lambda: nn.Conv1d(4, 6, 3), (2, 4, 8), {"r": 8},
    ),
    "an HRA ignores dilation": ("hra", lambda: nn.Conv2d(3, 4, 3, dilation=2), (2, 3, 9, 9), {"r": 2}),
    "an HRA ignores padding_mode": (
        "hra", lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 7, 7), {"r": 2},
    ),
    "an HRA takes the first stride for all": (
        "hra", lambda: nn.Conv2d(3, 4, 3, stride=(1, 2)), (2, 3, 9, 9), {"r": 2},
    ),
    "an HRA crashes on padding 'same'": (
        "hra", lambda: nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 7, 7), {"r": 2},
    ),
    "an HRA crashes on a kernel that is no square": (
        "hra", lambda: nn.Conv2d(3, 4, (3, 2)), (2, 3, 7, 7), {"r": 2},
    ),
    "an HRA is not for groups": ("hra", lambda: nn.Conv2d(4, 4, 3, groups=2), (2, 4, 7, 7), {"r": 2}),
    "a LoHa ignores padding_mode": (
        "loha", lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 7, 7), {"r": 2},
    ),
    "a LoKr ignores padding_mode": (
        "lokr", lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 7), {"r": 2},
    ),
    "a LoRA with groups is no change of the weight": (
        "lora", lambda: nn.Conv2d(4, 4, 3, groups=2), (2, 4, 7, 7), {"r": 2},
    ),
}  # fmt: skip


def folded_output(mine: Any, x: Tensor) -> Tensor:
    """The base module itself, in float64, with W' by the definition for its weight."""
    layer = mine.base_model.model.layer
    setting, update = layer.settings["default"], layer.update("default")
    weight = layer.layer().canonical().detach().double()
    if setting.algorithm == "hra":
        weight = reference.rotated(weight, reference.rotation(update.u.detach()))
    else:
        slots = {name: t.detach() for name, t in update.tensors().items()}
        delta = reference.delta(setting.algorithm, slots, layer.shape)
        weight = weight + update.scale * delta
    return S.with_weight(layer.base_layer, weight, layer.base_layer.bias.detach().double())(
        x.double()
    )


@pytest.mark.parametrize("case", WRONG)
def test_what_peft_is_wrong_about(case: str) -> None:
    algorithm, make, shape, said = WRONG[case]
    torch.manual_seed(0)
    model, x = One(make()), torch.randn(shape)
    ours, theirs = configs(algorithm, target_modules=["layer"], alpha=3, **said)
    mine = get_peft_model(copy.deepcopy(model), ours)
    torch.testing.assert_close(mine(x).double(), folded_output(mine, x), rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            mine, peer = both(model, ours, theirs)
            got = peer(x)
        except (RuntimeError, NotImplementedError, ValueError, TypeError, ShapeError):
            return  # it cannot do it at all, or keeps tensors of other shapes
    wanted = folded_output(mine, x)
    right = got.shape == wanted.shape and torch.allclose(got.double(), wanted, atol=1e-3)
    assert not right, "PEFT is right now"


def test_peft_s_gradients_of_a_tucker_loha_mix_its_halves() -> None:
    """Its own backward takes hada_t2 and w2_b for the gradient of w1_a, and hada_t1 for w2_a's."""
    said = {"r": 2, "alpha": 3, "target_modules": ["layer"], "use_effective_conv2d": True}
    mine, peer = both(One(nn.Conv2d(3, 4, 3)), *configs("loha", **said))
    x, layer = torch.randn(2, 3, 7, 7), mine.base_model.model.layer
    torch.testing.assert_close(mine(x), peer(x))
    held = {
        n: t.detach().double().requires_grad_()
        for n, t in layer.update("default").tensors().items()
    }
    weight = layer.base_layer.weight.double() + 1.5 * reference.delta("loha", held, layer.shape)
    plain = nn.functional.conv2d(x.double(), weight, layer.base_layer.bias.double())
    wanted = torch.autograd.grad(plain.square().mean(), list(held.values()))
    wrong = {}
    for model in (mine, peer):
        model(x).square().mean().backward()
    for slot, gradient in zip(held, wanted):
        name = f"base_model.model.layer.hada_{slot}.default"
        torch.testing.assert_close(
            mine.get_parameter(name).grad, gradient.float(), rtol=1e-4, atol=1e-6
        )
        theirs = peer.get_parameter(name).grad
        wrong[slot] = not torch.allclose(theirs, gradient.float(), rtol=1e-2, atol=1e-5)
    assert wrong["w1_a"] and wrong["w2_a"], "PEFT is right now"


@pytest.mark.parametrize("algorithm", ["loha", "lokr"])
def test_all_rows_dropped_add_nothing_where_peft_has_nan(algorithm: str) -> None:
    said = {"rank_dropout_scale": True} if algorithm == "lokr" else {}
    ours, theirs = configs(algorithm, target_modules=["layer"], rank_dropout=1.0, **said)
    mine, peer = both(One(nn.Linear(4, 3)), ours, theirs)
    x = torch.randn(5, 4)
    assert torch.equal(mine.train()(x), mine.base_model.model.layer.base_layer(x))
    assert peer.train()(x).isnan().any()


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
def test_dropouts_have_peft_s_mean(algorithm: str) -> None:
    """Over many draws: the same expected output as PEFT's, and none of it in a merge."""
    drops = (
        {"lora_dropout": 0.4}
        if algorithm == "lora"
        else {"rank_dropout": 0.3, "module_dropout": 0.2}
    )
    ours, theirs = configs(algorithm, target_modules=["layer"], r=2, alpha=4, **drops)
    mine, peer = both(One(nn.Linear(3, 12)), ours, theirs)
    x = torch.randn(2, 3)
    with torch.no_grad():
        means = [torch.stack([m.train()(x) for _ in range(3000)]).mean(0) for m in (mine, peer)]
        change = (mine.eval()(x) - mine.base_model.model.layer.base_layer(x)).abs().max()
    assert (means[0] - means[1]).abs().max() < 0.12 * change
    inner = mine.base_model.model.layer
    wanted = inner.update("default").fold(inner.base_layer.weight)
    mine.train()
    assert torch.equal(mine.merge_and_unload().layer.weight, wanted)


def test_a_layer_with_a_forward_of_its_own_is_given_the_new_weight() -> None:
    """Scaled embeddings, standardised convolutions: by definition, and where PEFT adds Δ beside."""

    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return nn.functional.conv2d(x, w, self.bias)

    model, x = One(Standardised(3, 4, 2)), torch.randn(2, 3, 5, 5)
    mine = get_peft_model(
        model, LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
    ).eval()
    before = mine(x)
    torch.testing.assert_close(mine.merge_and_unload()(x), before)


def test_hooks_of_the_base_layer_run() -> None:
    model, x = One(nn.Linear(3, 3)), torch.randn(9, 3)
    seen = []
    model.layer.register_forward_hook(lambda *_: seen.append(1))
    get_peft_model(model, LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))(x)
    assert seen == [1]


@pytest.mark.parametrize("target", ["linear1", "out_proj"])
def test_fast_paths_that_read_the_weight_see_the_new_one(target: str) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    mine = get_peft_model(
        model, LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    ).eval()
    slow = mine(x)
    with torch.no_grad():
        fast = mine(x)
        with mine.disable_adapter():
            base = mine(x)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(fast, base, atol=1e-3)
