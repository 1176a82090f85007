"""Layers within no_grad, autocast and cond: parameters are led in through every branch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_nets import close, code, equal, exported_as, run, updates_for, wanted
from torch import Tensor, nn

from adaptsurgery.graph.attach import attach, detach
from adaptsurgery.graph.merge import merge


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.both = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        def one(y: Tensor) -> Tensor:
            return self.both(torch.tanh(self.left(y)))

        def other(y: Tensor) -> Tensor:
            return self.both(self.right(y))

        y: Tensor = torch.cond(x.sum() > 0, one, other, (x,))
        return y


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = self.a(x)
        y: Tensor = self.b(x)
        return y


@pytest.mark.parametrize("kind", ["program", "module"])
@pytest.mark.parametrize("algorithm", ["lora", "hra"])
@pytest.mark.parametrize("net", [Branches, Autocast])
def test_nested(net: type[nn.Module], algorithm: str, kind: Any) -> None:
    torch.manual_seed(1)
    model = net().eval()
    g = exported_as(model, kind, torch.randn(4, 6))
    updates = updates_for(model, algorithm)
    h = attach(g, updates)
    for x in (torch.randn(4, 6).abs(), -torch.randn(4, 6).abs()):
        close(run(h, x), wanted(model, updates, x))
        close(run(merge(h), x), wanted(model, updates, x))
        assert equal(run(detach(h), x), run(g, x))
    assert code(detach(h)) == code(g)
