"""What the real PEFT trained and merged is found again, and PEFT makes the same weight of what we found."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from strategies import numbers
from torch import Tensor, nn

from adaptsurgery.algorithms import extract

peft = pytest.importorskip("peft")

# PEFT's HRA takes a kernel for a square one.
SQUARE = ["linear", "conv2d"]
LAYERS = {
    "linear": lambda: nn.Linear(24, 20),
    "conv2d": lambda: nn.Conv2d(6, 10, 3),
    "conv 5×1": lambda: nn.Conv2d(6, 10, (5, 1)),
}


def merged(layer: nn.Module, config: Any, tensors: dict[str, Tensor]) -> Tensor:
    """The layer's weight once PEFT has merged an adapter of these tensors into it."""
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    held = dict(model.named_parameters())
    with torch.no_grad():
        for part, tensor in tensors.items():
            (name,) = (name for name in held if part in name)
            held[name].copy_(tensor.reshape(held[name].shape))
    weight: Tensor = model.merge_and_unload()[0].weight.detach()
    return weight


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rank", [1, 4])
def test_lora(kind: str, rank: int) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    base = layer.weight.detach()
    o, n = base.flatten(1).shape
    config = peft.LoraConfig(r=rank, lora_alpha=3, target_modules=["0"])
    factors = {"lora_A": numbers(1, rank, n), "lora_B": numbers(2, o, rank)}
    tuned = merged(layer, config, factors)
    found = extract("lora", base, tuned, rank=rank)
    close = {"rtol": 1e-6, "atol": 1e-6 * float(tuned.abs().max())}
    assert torch.allclose(found.fold(base), tuned, **close)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    again = merged(layer, config, {"lora_A": found.down, "lora_B": found.up})
    assert torch.allclose(again, found.fold(base), **close)


@pytest.mark.parametrize("kind", SQUARE)
@pytest.mark.parametrize("rank", [2, 4])
def test_hra(kind: str, rank: int) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    base = layer.weight.detach()
    n = base.flatten(1).shape[1]
    config = peft.HRAConfig(r=rank, target_modules=["0"])
    tuned = merged(layer, config, {"hra_u": numbers(1, n, rank)})
    found = extract("hra", base, tuned, rank=rank)
    assert torch.allclose(found.fold(base), tuned, atol=5e-7)
    again = merged(layer, config, {"hra_u": found.u})
    assert float((again - found.fold(base)).norm() / (tuned - base).norm()) < 1e-5


@pytest.mark.parametrize("kind", SQUARE)
def test_approximations_too(kind: str) -> None:
    """A change that no adapter made: PEFT's weight is ours, so the error that is told is its too."""
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    base = layer.weight.detach()
    tuned = base + 0.1 * numbers(1, *base.shape).float()
    size = float((tuned - base).norm())
    found = extract("lora", base, tuned, rank=4)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"])
    again = merged(layer, config, {"lora_A": found.down, "lora_B": found.up})
    assert float((again - found.fold(base)).norm()) / size < 1e-6
    turned = extract("hra", base, tuned, rank=4)
    again = merged(layer, peft.HRAConfig(r=4, target_modules=["0"]), {"hra_u": turned.u})
    assert float((again - turned.fold(base)).norm()) / size < 1e-5
