"""Layers within no_grad, autocast and cond: parameters are led in through every branch."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_nets import close, code, equal, exported_as, run, updates_for, wanted
from torch import Tensor, nn

from adaptsurgery.graph.attach import attach, detach
from adaptsurgery.graph.merge import merge
from adaptsurgery.graph.state import adapters
from adaptsurgery_formats.errors import ValueRefused


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


class Alone(nn.Module):
    """All that is adapted stands within no_grad, or autocast, or both branches of a cond."""

    def __init__(self, within: str) -> None:
        super().__init__()
        self.a, self.within = nn.Linear(6, 6), within

    def forward(self, x: Tensor) -> Tensor:
        if self.within == "cond":
            first = lambda y: torch.tanh(self.a(y))  # noqa: E731
            y: Tensor = torch.cond(x.sum() > 0, first, lambda y: self.a(y), (x,))
            return torch.relu(y)
        around = (
            torch.no_grad() if self.within == "no_grad" else torch.autocast("cpu", enabled=False)
        )
        with around:
            x = self.a(x)
        return torch.relu(x)


def again(h: Any, x: Tensor) -> Any:
    return torch.export.export(h.module(), (x,))


def reloaded(h: Any) -> Any:
    file = io.BytesIO()
    torch.export.save(h, file)
    file.seek(0)
    return torch.export.load(file)


AGAIN: dict[str, Callable[[Any, Tensor], Any]] = {
    "exported": again,
    "exported twice": lambda h, x: again(again(h, x), x),
    "decomposed": lambda h, _: h.run_decompositions(),
    "loaded and decomposed": lambda h, _: reloaded(h).run_decompositions(),
}


@pytest.mark.parametrize("way", AGAIN)
@pytest.mark.parametrize("within", ["no_grad", "autocast"])
def test_an_adapter_whose_notes_torch_drops_is_not_forgotten(within: str, way: str) -> None:
    """Its numbers hold; what needs the notes refuses, though none of them is left."""
    torch.manual_seed(1)
    model, x = Alone(within).eval(), torch.randn(4, 6)
    updates = updates_for(model, "hra")
    h = attach(exported_as(model, "program", x), updates)
    new = AGAIN[way](h, x)
    close(run(new, x), wanted(model, updates, x))
    for refused in (adapters, detach, merge, lambda g: attach(g, updates, "other")):
        with pytest.raises(ValueRefused) as raised:
            refused(new)
        assert raised.value.code == "notes-lost" and "0 of 1" in raised.value.seen
    bare = detach(h)
    nodes = [n for m in bare.graph_module.modules() if hasattr(m, "graph") for n in m.graph.nodes]
    assert not any("adaptsurgery" in key for n in nodes for key in n.meta.get("custom", {}))
    assert adapters(AGAIN[way](bare, x)) == []
    assert adapters(AGAIN[way](merge(h), x)) == []


@pytest.mark.parametrize("way", AGAIN)
def test_a_cond_keeps_its_notes(way: str) -> None:
    torch.manual_seed(1)
    model, x = Alone("cond").eval(), torch.randn(4, 6)
    updates = updates_for(model, "hra")
    new = AGAIN[way](attach(exported_as(model, "program", x), updates), x)
    assert adapters(new) == ["default"]
    close(run(detach(new), x), wanted(model, {}, x))
    close(run(merge(new), x), wanted(model, updates, x))
