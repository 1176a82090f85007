"""New adapters: PEFT's shapes and initial values, on real layers of PEFT."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import numbers
from torch import Tensor, nn

from adaptsurgery.algorithms import DoRA, HRAConfig, LoHaConfig, LoKrConfig, LoraConfig
from adaptsurgery.core.config import AdapterConfig, tensors_of
from adaptsurgery.core.geometry import Layer
from adaptsurgery_formats.errors import ShapeError, ValueRefused

PAIRS: dict[str, tuple[Any, Any, Any]] = {
    "lora": (LoraConfig, peft.LoraConfig, peft.LoraModel),
    "loha": (LoHaConfig, peft.LoHaConfig, peft.LoHaModel),
    "lokr": (LoKrConfig, peft.LoKrConfig, peft.LoKrModel),
    "hra": (HRAConfig, peft.HRAConfig, peft.HRAModel),
}
SLOTS = {
    "lora_A": "down", "lora_B": "up", "lora_embedding_A": "down", "lora_embedding_B": "up",
    "lora_magnitude_vector": "magnitude", **{f"hada_{s}": s for s in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{s}": s for s in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}, "hra_u": "u",
}  # fmt: skip


def theirs(algorithm: str, module: nn.Module, options: dict[str, Any]) -> dict[str, Tensor]:
    """A new adapter of PEFT on ``module``: its tensors by our slots."""
    _, config, model = PAIRS[algorithm]
    wrapped = model(nn.Sequential(module), config(target_modules=["0"], **options), "default")
    found = {}
    for key, value in wrapped.state_dict().items():
        parts = key.replace("lora_B.default.bias", "up_bias").split(".")
        slot = next((SLOTS.get(p, p) for p in parts if p in SLOTS or p == "up_bias"), None)
        if slot:
            found[slot] = value
    return found


MODULES: dict[str, Any] = {
    "linear": lambda o, i, k, g: nn.Linear(i, o),
    "conv1d": lambda o, i, k, g: nn.Conv1d(i * g, o * g, k[0], groups=g),
    "conv2d": lambda o, i, k, g: nn.Conv2d(i * g, o * g, k, groups=g),
    "conv3d": lambda o, i, k, g: nn.Conv3d(i * g, o * g, (k[0], *k)),
    "embedding": lambda o, i, k, g: nn.Embedding(i, o),
}
TAKEN = {
    "lora": ["linear", "conv1d", "conv2d", "conv3d", "embedding"],
    "loha": ["linear", "conv1d", "conv2d"], "lokr": ["linear", "conv1d", "conv2d"], "hra": ["linear", "conv2d"],
}  # fmt: skip
sizes = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 24, 31, 48])


@pytest.mark.parametrize("algorithm", PAIRS)
@given(data=st.data())
def test_shapes_are_pefts(algorithm: str, data: st.DataObject) -> None:
    draw = data.draw
    kind, rank = draw(st.sampled_from(TAKEN[algorithm])), draw(st.integers(1, 6))
    options: dict[str, Any] = {"r": rank}
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    groups = draw(st.sampled_from([1, 2])) if algorithm in ("loha", "lokr") else 1
    if algorithm in ("loha", "lokr"):
        options["use_effective_conv2d"] = draw(st.booleans())
    if algorithm == "lokr":
        options["decompose_both"] = draw(st.booleans())
        options["decompose_factor"] = draw(st.sampled_from([-2, -1, 0, 1, 2, 4, 7, 16]))
    if algorithm == "lora" and kind != "embedding":
        options["lora_bias"] = draw(st.booleans())
        options["use_dora"] = not options["lora_bias"] and draw(st.booleans())
    if algorithm == "hra":
        kernel = (kernel[0], kernel[0])  # PEFT's takes no other
    module = MODULES[kind](draw(sizes), draw(sizes), kernel, groups)
    layer = Layer.from_module(module)
    ours = PAIRS[algorithm][0](**options).shapes(layer.shape, rank, kind)
    wanted = {name: tuple(t.shape) for name, t in theirs(algorithm, module, options).items()}
    for name in ("t1", "t2"):  # PEFT pads a Conv1d's core
        if name in wanted and kind == "conv1d":
            wanted[name] = wanted[name][:-1]
    if "magnitude" in wanted:
        wanted["magnitude"] = (math.prod(wanted["magnitude"]), *[1] * (len(layer.shape) - 1))
    assert ours == wanted


STARTS: dict[str, list[dict[str, Any]]] = {
    "lora": [{}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": False}, {"init_lora_weights": "orthogonal"}],
    "loha": [{}, {"init_weights": False}, {"use_effective_conv2d": True}, {"use_effective_conv2d": True, "init_weights": False}],
    "lokr": [{}, {"init_weights": False}, {"init_weights": "lycoris"}, {"decompose_both": True},
             {"decompose_both": True, "init_weights": "lycoris", "use_effective_conv2d": True}],
    "hra": [{}, {"init_weights": False}, {"init_weights": False, "apply_GS": True}],
}  # fmt: skip
CASES = [(a, o) for a, each in STARTS.items() for o in each]


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
@pytest.mark.parametrize(("algorithm", "options"), CASES, ids=str)
def test_initial_values_are_pefts(algorithm: str, options: dict[str, Any], kind: str) -> None:
    """The same zeros, and the same reach and spread of all else."""
    config = PAIRS[algorithm][0](r=8, **options)
    if kind not in config.kinds or (kind != "linear" and "orthogonal" in options.values()):
        pytest.skip("no such layer")
    module = MODULES[kind](600, 400, (3, 3), 1)
    layer = Layer.from_module(module)
    theirs_ = theirs(algorithm, module, {"r": 8, **options})
    generator = torch.Generator().manual_seed(3)
    update = config.fresh(layer.shape, kind=kind, generator=generator)
    for name, mine in tensors_of(update).items():
        other = theirs_[name]
        assert mine.numel() == other.numel(), name
        assert bool(mine.any()) == bool(other.any()), name
        if mine.numel() > 2000 or not mine.any():
            assert mine.std().item() == pytest.approx(other.std().item(), rel=0.1), name
            assert mine.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.35), name  # fmt: skip


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv3d", "embedding"])
@pytest.mark.parametrize(("algorithm", "options"), CASES, ids=str)
def test_a_fresh_adapter_leaves_the_layer_as_it_is(
    algorithm: str, options: dict[str, Any], kind: str
) -> None:
    config: AdapterConfig = PAIRS[algorithm][0](r=4, **options)
    if kind not in config.kinds or (kind.startswith("conv") and "orthogonal" in options.values()):
        pytest.skip("no such layer")
    layer = Layer.from_module(MODULES[kind](12, 10, (3, 3), 1))
    weight = layer.canonical().detach().double()
    update = config.fresh(layer.shape, kind=kind, dtype=torch.float64)
    change = (update.fold(weight) - weight).abs().max().item()
    still = options.get("init_weights", options.get("init_lora_weights", True)) is not False
    assert (change < 1e-6) == still, change  # QR is float32's


def test_lycoris_values_for_a_loha() -> None:
    """LyCORIS: w*_b normal, w1_a a tenth of it, w2_a zero."""
    update = LoHaConfig(init_weights="lycoris").fresh((500, 400), rank=16)
    stds = {name: tensor.std().item() for name, tensor in tensors_of(update).items()}
    wanted = {"w1_a": 0.1, "w1_b": 1.0, "w2_a": 0.0, "w2_b": 1.0}
    assert stds == pytest.approx(wanted, rel=0.05)


def test_a_doras_norms_are_the_weights() -> None:
    weight = numbers(1, 6, 5).float()
    config = LoraConfig(use_dora=True, r=2)
    update = config.fresh((6, 5), weight=weight)
    assert isinstance(update, DoRA)
    assert torch.allclose(update.fold(weight), weight, atol=1e-6)
    assert torch.allclose(update.magnitude.flatten(), weight.norm(dim=1))
    with pytest.raises(ValueRefused, match="pass weight"):
        config.fresh((6, 5))
    table = config.fresh((6, 5), kind="embedding", weight=weight)
    assert isinstance(table, DoRA) and torch.equal(table.magnitude, update.magnitude)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (HRAConfig(r=3), "determinant"),
        (HRAConfig(apply_GS=True), "I − 2QQᵀ"),
        (LoraConfig(init_lora_weights="orthogonal", r=3), "even rank"),
        (LoraConfig(init_lora_weights="eva"), "needs data"),
    ],
    ids=str,
)
def test_no_start_at_the_identity_says_why(config: AdapterConfig, reason: str) -> None:
    with pytest.raises(ValueRefused) as refusal:
        config.fresh((8, 8))
    assert reason in str(refusal.value)
    assert tensors_of(config.blank((8, 8)))  # to be loaded into


def test_pefts_hra_with_gram_schmidt_does_not_start_at_the_identity() -> None:
    """PEFT divides rounding noise by its own norm there: the output is far off at the start."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 32))
    x = torch.randn(4, 32)
    before = base(x)
    config = peft.HRAConfig(r=8, apply_GS=True, target_modules=["0"])
    after = peft.HRAModel(base, config, "default")(x)
    assert (after - before).abs().max() > 0.1


def test_scales_and_own_ranks() -> None:
    lora = LoraConfig(r=4, lora_alpha=6, use_rslora=True)
    assert lora.fresh((8, 8)).scale == pytest.approx(3.0)
    assert lora.fresh((8, 8), rank=9, alpha=3).scale == pytest.approx(1.0)
    lokr = LoKrConfig(r=64, alpha=16).fresh((8, 8))
    assert lokr.scale == 0.25 and lokr.w1 is not None and lokr.w2 is not None


def test_a_seed_a_dtype_a_device() -> None:
    one, two = (
        LoKrConfig(r=2).fresh((8, 6), generator=torch.Generator().manual_seed(5), dtype=torch.bfloat16)
        for _ in range(2)
    )  # fmt: skip
    for name, tensor in tensors_of(one).items():
        assert torch.equal(tensor, tensors_of(two)[name]) and tensor.dtype == torch.bfloat16
    meta = HRAConfig().fresh((8, 6), device="meta")
    assert all(t.is_meta for t in tensors_of(meta).values())


def test_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="conv2d"):
        LoHaConfig().fresh((8, 8), kind="conv2d")
    with pytest.raises(ValueRefused, match="embedding"):
        LoHaConfig().fresh((8, 8), kind="embedding")
    with pytest.raises(ValueRefused, match="`r` is 0"):
        LoHaConfig().fresh((8, 8), rank=0)
