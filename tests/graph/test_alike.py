"""Layers that are alike get copies of one emitted adapter: the same graph as without, to the bit."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from graph_nets import code, equal
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from adaptsurgery import graph
from adaptsurgery.algorithms import HRAConfig, LoHaConfig, LoKrConfig, LoraConfig

CONFIGS = {
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", lora_dropout=0.25),
    "dora": LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", use_dora=True),
    "bias": LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", lora_bias=True),
    "loha": LoHaConfig(r=2, alpha=3, target_modules="all-linear", rank_dropout=0.25),
    "lokr": LoKrConfig(r=2, alpha=3, target_modules="all-linear"),
    "hra": HRAConfig(r=4, target_modules="all-linear"),
}


class Tower(nn.Module):
    """Layers of one shape: with bias and without, a weight of two, one called twice, a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.ModuleList(nn.Linear(6, 6, bias=n % 2 == 0) for n in range(5))
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.plain[0].weight
        self.again = nn.Linear(6, 6)
        self.wide = nn.Linear(6, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.plain:
            x = x + layer(layer(torch.tanh(x)) if layer is self.plain[3] else x)
        x = self.again(self.again(self.tied(x)))
        return self.wide(x.double()).float() + self.plain[0](x)[:, :1]


def traced(kind: str) -> ExportedProgram | GraphModule:
    torch.manual_seed(0)
    program = torch.export.export(
        Tower().eval(), (torch.randn(3, 4, 6),), dynamic_shapes=({0: Dim("batch"), 1: Dim("n")},)
    )
    return program if kind == "program" else program.module()


def ran(g: Any, x: Tensor) -> Tensor:
    out: Tensor = (g.module() if isinstance(g, ExportedProgram) else g)(x)
    return out


def shown(g: Any) -> list[tuple[Any, ...]]:
    """Every node by what it is, what it reads, what it gives, and its notes; names aside."""
    module = g.graph_module if isinstance(g, ExportedProgram) else g
    place = {node: n for n, node in enumerate(module.graph.nodes)}
    found = []
    for node in module.graph.nodes:
        value = node.meta.get("val")
        size = (str(value.shape), value.dtype) if isinstance(value, Tensor) else None
        found.append(
            (node.op, str(node.target), [place[n] for n in node.all_input_nodes], size,
             node.meta.get("custom"), str(node.meta.get("nn_module_stack")))
        )  # fmt: skip
    return found


@pytest.mark.parametrize("kind", ["program", "module"])
@pytest.mark.parametrize("name", CONFIGS)
def test_copies_are_what_emitting_gives(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    g, x = traced(kind), torch.randn(2, 7, 6)
    torch.manual_seed(1)
    copied = graph.attach(g, CONFIGS[name])
    copied_twice = graph.attach(copied, CONFIGS["lora"], "second")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["adaptsurgery.graph.attach"], "key", lambda _: None)
        torch.manual_seed(1)
        emitted = graph.attach(g, CONFIGS[name])
        emitted_twice = graph.attach(emitted, CONFIGS["lora"], "second")
    for one, other in ((copied, emitted), (copied_twice, emitted_twice)):
        assert shown(one) == shown(other)
        assert equal(ran(one, x), ran(other, x))
    assert code(graph.detach(copied)) == code(g)


def test_few_layers_run_the_update_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each look: with and without bias, float64, and those that are called more than once."""
    from adaptsurgery.graph import splice

    spliced = []
    own = splice.Splicer.splice

    def counted(self: splice.Splicer, *given: Any) -> Any:
        spliced.append(self.site.path)
        return own(self, *given)

    monkeypatch.setattr(splice.Splicer, "splice", counted)
    plan = graph.plan(traced("program"), CONFIGS["hra"])
    graph.attach(traced("program"), plan)
    assert len(set(spliced)) < len(plan.sites)
    assert len(spliced) == len(set(spliced)) + 3  # plain.0, plain.3 and again are called twice
