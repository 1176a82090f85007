"""Real PEFT and LyCORIS layers give what ours give; and where a peer is wrong, that is pinned.

LyCORIS is asked by ``forward`` only: its get_diff_weight applies the scale twice (pinned below).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptsurgery.algorithms import build
from adaptsurgery.core.geometry import Layer

peft = pytest.importorskip("peft")

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 20), (5, 12)),
    "conv1d": (lambda: nn.Conv1d(12, 16, 3, stride=2, padding=1), (2, 12, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 9)),
    "conv2d1x1": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 5, 5)),
    "conv2d-dilated": (lambda: nn.Conv2d(6, 8, 3, padding=2, dilation=2), (2, 6, 9, 9)),
}


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def peft_layer(config: Any, layer: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """The wrapped model, and its one layer's adapter tensors, all made random."""
    model = peft.get_peft_model(Net(layer), config).eval()
    state = peft.get_peft_model_state_dict(model)
    generator = torch.Generator().manual_seed(0)
    drawn = {k: torch.randn(v.shape, generator=generator) / 2 for k, v in state.items()}
    drawn = {k: v.abs() + 0.5 if "magnitude" in k else v for k, v in drawn.items()}
    peft.set_peft_model_state_dict(model, drawn)
    return model, {k.removeprefix("base_model.model.layer."): v for k, v in drawn.items()}


def same(model: Any, layer: nn.Module, x: Tensor, update: Any) -> None:
    with torch.no_grad():
        wanted = model(x)
        for form in ("auto", "factored", "folded"):
            seen = update.apply(x, Layer.from_module(layer), form)
            error = float((seen - wanted).abs().max() / wanted.abs().max())
            assert error < 1e-5, f"{form}: {error:.1e}"


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "conv2d-dilated"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_peft_lora_and_dora(kind: str, dora: bool) -> None:
    make, shape = LAYERS[kind]
    layer = make()
    config = peft.LoraConfig(target_modules=["layer"], r=3, lora_alpha=5, use_dora=dora)
    model, held = peft_layer(config, layer)
    slots = {"up": held["lora_B.weight"], "down": held["lora_A.weight"]}
    if dora:
        magnitude = held["lora_magnitude_vector"].flatten()
        slots["magnitude"] = magnitude.reshape(-1, *(1,) * (layer.weight.dim() - 1))
    update = build("lora", slots, 5 / 3, tuple(layer.weight.shape))
    same(model, layer, torch.randn(shape), update)


def test_peft_lora_conv_ignores_dilation() -> None:
    """lora_A is made without it (peft#3697): its output does not even fit the layer's."""
    make, shape = LAYERS["conv2d-dilated"]
    layer = make()
    config = peft.LoraConfig(target_modules=["layer"], r=3, lora_alpha=5)
    model, held = peft_layer(config, layer)
    slots = {"up": held["lora_B.weight"], "down": held["lora_A.weight"]}
    x = torch.randn(shape)
    ours = build("lora", slots, 5 / 3).apply(x, Layer.from_module(layer))
    assert ours.shape == layer(x).shape
    with pytest.raises(RuntimeError, match="must match the size"):
        model(x)


def test_peft_lora_embedding() -> None:
    layer = nn.Embedding(11, 6)
    config = peft.LoraConfig(target_modules=["layer"], r=3, lora_alpha=5)
    model, held = peft_layer(config, layer)
    slots = {"up": held["lora_embedding_B"], "down": held["lora_embedding_A"]}
    same(model, layer, torch.randint(0, 11, (2, 5)), build("lora", slots, 5 / 3, (6, 11)))


def test_peft_lora_on_transformers_conv1d() -> None:
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(20, 12)
    config = peft.LoraConfig(target_modules=["layer"], r=3, lora_alpha=5, fan_in_fan_out=True)
    model, held = peft_layer(config, layer)
    slots = {"up": held["lora_B.weight"], "down": held["lora_A.weight"]}
    same(model, layer, torch.randn(5, 12), build("lora", slots, 5 / 3, (20, 12)))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("tucker", [False, True], ids=["flat", "tucker"])
def test_peft_loha(kind: str, tucker: bool) -> None:
    make, shape = LAYERS[kind]
    layer = make()
    config = peft.LoHaConfig(target_modules=["layer"], r=3, alpha=5, use_effective_conv2d=tucker)
    model, held = peft_layer(config, layer)
    slots = {name.replace("hada_", ""): tensor for name, tensor in held.items()}
    slots = {
        n: t.flatten(2) if n in ("t1", "t2") and kind == "conv1d" else t for n, t in slots.items()
    }
    same(model, layer, torch.randn(shape), build("loha", slots, 5 / 3, tuple(layer.weight.shape)))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("both", [False, True], ids=["w1", "w1_a·w1_b"])
@pytest.mark.parametrize(("rank", "tucker"), [(1, False), (2, True), (8, False)])
def test_peft_lokr(kind: str, both: bool, rank: int, tucker: bool) -> None:
    if kind == "conv1d" and rank == 8:
        pytest.skip("not a Kronecker product there: the next test")
    make, shape = LAYERS[kind]
    layer = make()
    config = peft.LoKrConfig(
        target_modules=["layer"], r=rank, alpha=5, decompose_both=both, decompose_factor=2,
        use_effective_conv2d=tucker,
    )  # fmt: skip
    model, held = peft_layer(config, layer)
    slots = {name.replace("lokr_", ""): tensor for name, tensor in held.items()}
    slots = {n: t.flatten(2) if n == "t2" and kind == "conv1d" else t for n, t in slots.items()}
    update = build("lokr", slots, 5 / rank, tuple(layer.weight.shape))
    same(model, layer, torch.randn(shape), update)


def test_peft_lokr_conv1d_with_full_w2_is_no_kronecker_product() -> None:
    """PEFT unsqueezes w1 for a 4-D w2 only: kron of a matrix and a 3-D tensor aligns wrong axes."""
    layer = nn.Conv1d(6, 8, 3)
    config = peft.LoKrConfig(target_modules=["layer"], r=8, alpha=8, decompose_factor=2)
    model, held = peft_layer(config, layer)
    slots = {name.replace("lokr_", ""): tensor for name, tensor in held.items()}
    assert slots["w2"].dim() == 3
    x = torch.randn(2, 6, 11)
    ours = build("lokr", slots, 1.0, (8, 6, 3)).apply(x, Layer.from_module(layer))
    with torch.no_grad():
        assert float((model(x) - ours).abs().max()) > 0.1


@pytest.mark.parametrize("gs", [False, True], ids=["plain", "apply_GS"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d1x1"])
def test_peft_hra(kind: str, gs: bool) -> None:
    make, shape = LAYERS[kind]
    layer = make()
    config = peft.HRAConfig(target_modules=["layer"], r=4, apply_GS=gs)
    model, held = peft_layer(config, layer)
    update = build("hra", {"u": held["hra_u"]}, 1.0, tuple(layer.weight.shape), apply_gs=gs)
    same(model, layer, torch.randn(shape), update)
    folded = update.fold(layer.weight)
    merged = model.merge_and_unload().layer.weight
    torch.testing.assert_close(folded, merged.detach(), rtol=1e-4, atol=1e-5)


def test_peft_hra_conv_ignores_dilation() -> None:
    """Its forward runs the turned weight undilated: not even the output's size is the layer's."""
    make, shape = LAYERS["conv2d-dilated"]
    layer = make()
    model, held = peft_layer(peft.HRAConfig(target_modules=["layer"], r=4), layer)
    x = torch.randn(shape)
    update = build("hra", {"u": held["hra_u"]})
    ours = update.apply(x, Layer.from_module(layer))
    assert ours.shape == layer(x).shape
    assert model(x).shape != layer(x).shape


def lycoris_layer(
    algorithm: str, layer: nn.Module, **settings: Any
) -> tuple[Any, dict[str, Tensor]]:
    """A LyCORIS module over ``layer`` with random tensors, and those by slot."""
    modules = pytest.importorskip("lycoris.modules")
    cls = {"lora": modules.locon.LoConModule, "loha": modules.loha.LohaModule, "lokr": modules.lokr.LokrModule}  # fmt: skip
    module = cls[algorithm]("peer", layer, **settings).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) / 2
        parameter.data = drawn.abs() + 0.5 if name == "dora_scale" else drawn
    prefixes = ("hada_", "lokr_", "lora_")
    slots: dict[str, Tensor] = {}
    for key, tensor in module.state_dict().items():
        for prefix in prefixes:
            if key.startswith(prefix):
                slots[key.removeprefix(prefix).removesuffix(".weight")] = tensor
        if key == "dora_scale":
            slots["magnitude"] = tensor
    return module, slots


LYCORIS = [("lora", {}), ("lora", {"use_tucker": True}), ("loha", {}), ("loha", {"use_tucker": True}),
           ("lokr", {}), ("lokr", {"use_tucker": True}), ("lokr", {"decompose_both": True, "factor": 2})]  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("algorithm", "settings"), LYCORIS, ids=str)
@pytest.mark.parametrize("axis", ["", "out", "in"])
def test_lycoris_forward(kind: str, algorithm: str, settings: dict[str, Any], axis: str) -> None:
    make, shape = LAYERS[kind]
    layer = make()
    dora = {"weight_decompose": True, "wd_on_out": axis == "out"} if axis else {}
    module, slots = lycoris_layer(algorithm, layer, lora_dim=2, alpha=3, **settings, **dora)
    full = algorithm == "lokr" and {"w1", "w2"} <= set(slots)
    update = build(algorithm, slots, 1.0 if full else 3 / 2, tuple(layer.weight.shape))
    same(module, layer, torch.randn(shape), update)


@pytest.mark.parametrize("algorithm", ["loha", "lokr"])
def test_lycoris_get_diff_weight_applies_the_scale_twice(algorithm: str) -> None:
    """alpha 3, rank 2: its merge adds s²·Δ where its forward adds s·Δ (s = 3/2)."""
    layer = nn.Linear(12, 20)
    module, slots = lycoris_layer(algorithm, layer, lora_dim=2, alpha=3)
    update = build(algorithm, slots, 3 / 2)
    diff, _ = module.get_diff_weight()
    with torch.no_grad():
        x = torch.randn(5, 12)
        torch.testing.assert_close(update.apply(x, Layer.from_module(layer)), module(x))
        torch.testing.assert_close(diff, update.scale**2 * update.dense())


@pytest.mark.parametrize("form", ["factored", "folded"])
def test_pefts_dora_gradients(form: Any) -> None:
    """Its norm is a constant to the gradient, as in the paper; so is ours, in every form."""
    base = nn.Linear(6, 10)
    config = peft.LoraConfig(target_modules=["0"], r=2, use_dora=True, init_lora_weights=False)
    wrapped = peft.LoraModel(nn.Sequential(base), config, "default")
    named = {"lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "magnitude"}
    theirs = {named[k.split(".")[2]]: p for k, p in wrapped.named_parameters() if "lora" in k}
    ours = {slot: p.detach().clone().requires_grad_() for slot, p in theirs.items()}
    slots = {**ours, "magnitude": ours["magnitude"][:, None]}
    x, layer = torch.randn(3, 6), Layer.from_module(base)
    wrapped(x).square().sum().backward()
    build("lora", slots, 4.0, (10, 6)).apply(x, layer, form).square().sum().backward()
    for slot, parameter in theirs.items():
        assert parameter.grad is not None and ours[slot].grad is not None
        assert torch.allclose(ours[slot].grad, parameter.grad, rtol=1e-4, atol=1e-4), slot
