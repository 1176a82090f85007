"""The same forward on fx proxies and under torch.export, with sizes left open."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptsurgery.algorithms import HRA, DoRA, LoHa, LoKr, LoRA
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.update import Update, compose

MAKERS: dict[str, Any] = {
    "lora": (LoRA, {"up": (8, 2), "down": (2, 6)}),
    "loha": (LoHa, {"w1_a": (8, 2), "w1_b": (2, 6), "w2_a": (8, 2), "w2_b": (2, 6)}),
    "lokr": (LoKr, {"w1": (2, 3), "w2_a": (4, 1), "w2_b": (1, 2)}),
    "hra": (HRA, {"u": (6, 3)}),
}


class Adapted(nn.Module):
    """A layer with adapters over it whose tensors are parameters."""

    def __init__(self, layer: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.layer, self.names = layer, names
        self.slots = nn.ModuleDict()
        spread = layer.weight[0, 0].numel()
        for name in names:
            shapes = MAKERS[name][1]
            wide = {n: (s[0] * spread, s[1]) if n == "u" else s for n, s in shapes.items()}
            wide = {
                n: (s[0], s[1] * spread) if n in ("down", "w1_b", "w2_b") else s
                for n, s in wide.items()
            }
            self.slots[name] = nn.ParameterDict(
                {n: nn.Parameter(torch.randn(s)) for n, s in wide.items()}
            )

    def update(self) -> Update:
        return compose([MAKERS[n][0](**dict(self.slots[n].items())) for n in self.names])

    def forward(self, x: Tensor) -> Tensor:
        return self.update().apply(x, Layer.from_module(self.layer), "factored")


class Fixed(nn.Module):
    """The same with its update built ahead: a symbolic trace has no shapes to check."""

    def __init__(self, model: Adapted) -> None:
        super().__init__()
        self.model = model
        self.held = (model.update(), Layer.from_module(model.layer))

    def forward(self, x: Tensor) -> Tensor:
        update, layer = self.held
        return update.apply(x, layer, "factored")


LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (4, 6)),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2), 2, 1, padding_mode="circular"), (4, 6, 7, 7)),
}
NAMES = [["lora"], ["loha"], ["lokr"], ["hra"], ["lora", "hra", "lokr"]]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("names", NAMES, ids=str)
def test_symbolic_trace(kind: str, names: list[str]) -> None:
    make, shape = LAYERS[kind]
    model = Adapted(make(), names)
    graph = torch.fx.symbolic_trace(Fixed(model))
    for batch in (shape[0], 3):
        x = torch.randn(batch, *shape[1:])
        torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("names", NAMES, ids=str)
def test_export_with_an_open_batch(kind: str, names: list[str]) -> None:
    make, shape = LAYERS[kind]
    model = Adapted(make(), names).eval()
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (torch.randn(shape),), dynamic_shapes=sizes)
    x = torch.randn(7, *shape[1:])
    torch.testing.assert_close(program.module()(x), model(x))
    held = {name for name in program.state_dict if name.startswith("slots.")}
    assert len(held) == len([n for n in model.state_dict() if n.startswith("slots.")])


def test_symbolic_trace_of_a_dora() -> None:
    layer = Layer("linear", torch.randn(8, 6), torch.randn(8))
    update = DoRA(LoRA(torch.randn(8, 2), torch.randn(2, 6)), torch.rand(8, 1))
    graph = torch.fx.symbolic_trace(lambda x: update.apply(x, layer, "factored"))
    x = torch.randn(3, 6)
    torch.testing.assert_close(graph(x), update.apply(x, layer))
