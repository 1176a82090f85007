"""Random graphs × random updates: attach ≡ the eager reference, detach ≡ identity, merge ≡ fold."""

from __future__ import annotations

from typing import Any

import torch
from graph_nets import ALGORITHMS, close, code, equal, run, update_for, wanted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adaptsurgery.graph.attach import attach, detach
from adaptsurgery.graph.find import find_sites
from adaptsurgery.graph.merge import merge
from adaptsurgery.graph.state import adapter_parameters, adapters

WIDTH = 4


class Conv(nn.Module):
    """A convolution over (N, C, L), of any setting that keeps the length."""

    def __init__(self, kernel: int, groups: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, kernel, padding="same", groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return y


class Graph(nn.Module):
    """Steps over (N, L, C): layers, some of them used twice, residuals, reshapes, no_grad."""

    def __init__(self, steps: list[tuple[str, int]], bias: bool) -> None:
        super().__init__()
        self.steps = steps
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(2))
        self.convs = nn.ModuleList([Conv(3, 1, bias), Conv(2, 2, bias)])

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for step, n in self.steps:
            if step == "linear":
                x = self.linears[n](x)
            elif step == "conv":
                x = self.convs[n](x)
            elif step == "residual":
                x = torch.tanh(x) + first
            elif step == "reshape":
                x = self.linears[n](x.flatten(0, 1)).unflatten(0, (-1, x.shape[1]))
            else:
                with torch.no_grad():
                    x = self.linears[n](x)
        return x


STEPS = st.tuples(
    st.sampled_from(["linear", "conv", "residual", "reshape", "guarded"]), st.integers(0, 1)
)


@settings(max_examples=15)
@given(
    steps=st.lists(STEPS, min_size=1, max_size=5),
    bias=st.booleans(),
    kind=st.sampled_from(["program", "module", "symbolic"]),
    mode=st.sampled_from(["auto", "factored", "weight"]),
    first=st.sampled_from(ALGORITHMS),
    seed=st.integers(0, 99),
)
def test_random_graphs(steps: Any, bias: bool, kind: str, mode: Any, first: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = Graph([("linear", 0), *steps], bias).eval()
    g, x = graph_of(model, kind), torch.randn(3, 5, WIDTH)
    sites = [site for site in find_sites(g) if site.adaptable]
    plain, before = run(g, x), code(g)
    updates = {
        s.path: update_for(first, s.shape, bias=bias, seed=seed + n) for n, s in enumerate(sites)
    }
    h = attach(g, updates, mode=mode)
    check(h)
    want = wanted(model, updates, x)
    close(run(h, x), want, 1e-4)
    close(run(merge(h), x), want, 1e-4)
    last = sites[-1].path
    both = attach(h, {last: update_for("hra", sites[-1].shape)}, "other", mode=mode)
    check(both)
    assert adapters(both) == ["default", "other"]
    one = detach(both, "other")
    assert code(one) == code(h) and equal(run(one, x), run(h, x))
    back = detach(one)
    check(back)
    assert code(back) == before and equal(run(back, x), plain)
    assert set(adapter_parameters(h)) == {n for n in state(h) if ".default." in n}


def state(g: Any) -> list[str]:
    return list(g.state_dict if hasattr(g, "graph_signature") else g.state_dict())


def check(g: Any) -> None:
    """Lint clean, nested graphs too."""
    top = getattr(g, "graph_module", g)
    for module in top.modules():
        if isinstance(module, torch.fx.GraphModule):
            module.graph.lint()


def graph_of(model: nn.Module, kind: str) -> Any:
    if kind == "symbolic":
        return torch.fx.symbolic_trace(model)
    sizes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(model, (torch.randn(4, 5, WIDTH),), dynamic_shapes=sizes)
    return program if kind == "program" else program.module()
