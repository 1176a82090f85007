"""Adapters on programs as they are met: core ATen, int8 weights, open batch and sequence, to ONNX."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
import zoo
from graph_nets import (
    Convs,
    Mlp,
    close,
    code,
    equal,
    example,
    exported,
    exported_as,
    made,
    run,
    update_for,
    updates_for,
    wanted,
)
from strategies import Conv1D
from test_find import Quantised
from test_graph_models import assert_same, live, outputs
from test_graph_models import updates_for as random_updates
from torch import Tensor, nn

from adaptsurgery import graph
from adaptsurgery.algorithms import LoRA
from adaptsurgery_formats.errors import ValueRefused

FOUR = ("lora", "loha", "lokr", "hra")


@pytest.mark.parametrize("algorithm", FOUR)
@pytest.mark.parametrize("net", [Mlp, Convs])
def test_a_core_aten_base(net: type[torch.nn.Module], algorithm: str) -> None:
    """Linears are addmm and mm between views there, convolutions one op: at another size too."""
    model = made(net)
    core, x = exported(model).run_decompositions(), example(model, 7)
    updates = updates_for(model, algorithm)
    h = graph.attach(core, updates)
    close(run(h, x), wanted(model, updates, x))
    close(run(graph.merge(h), x), wanted(model, updates, x))
    back = graph.detach(h)
    assert code(back) == code(core) and equal(run(back, x), run(core, x))


class Apart(nn.Module):
    """Products without a bias argument: a node behind adds one, which one layer has for itself."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.a, self.b = Conv1D(6, 6), Conv1D(6, 6)
        for layer in (self.a, self.b):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
        if shared:
            self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.tanh(self.a(x)))
        return y


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["program", "module", "traced"])
@pytest.mark.parametrize("on", [["a"], ["b"], ["a", "b"]])
def test_a_bias_that_is_added_apart_is_merged_once(on: list[str], kind: str, shared: bool) -> None:
    torch.manual_seed(3)
    model, x = Apart(shared).eval(), torch.randn(3, 5, 6)
    g = torch.fx.symbolic_trace(model) if kind == "traced" else exported_as(model, kind, x)
    updates = {path: update_for("lora", (6, 6), bias=True, seed=n) for n, path in enumerate(on)}
    h = graph.attach(g, updates)
    want = wanted(model, updates, x)
    close(run(h, x), want)
    merged = graph.merge(h)
    close(run(merged, x), want)
    if not shared:
        assert code(merged) == code(g)  # the numbers alone are others


class Otherwise(nn.Module):
    """A bias that is not simply the layer's: nothing reads it, it is not in all, or it goes elsewhere."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.way = nn.Linear(6, 6), way
        nn.init.normal_(self.a.bias)

    def product(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.a.weight)

    def forward(self, x: Tensor) -> Tensor:
        y, b = self.product(x), self.a.bias
        ways = {
            "unread": lambda: 2 * y,
            "beside": lambda: (y + b) * y,
            "twice": lambda: y + b + b,
            "scaled": lambda: 2 * y + b,
            "again": lambda: (y + b) * b,
            "both": lambda: (y + b) * torch.tanh(y + b),
        }
        return ways[self.way]()


@pytest.mark.parametrize("way", ["unread", "beside", "twice", "scaled", "again", "both"])
@pytest.mark.parametrize("decomposed", [False, True])
def test_what_is_added_to_a_bias_reaches_all_that_reads_the_layer(
    way: str, decomposed: bool
) -> None:
    torch.manual_seed(5)
    model, x = Otherwise(way).eval(), torch.randn(3, 6)
    program = torch.export.export(model, (x,))
    program = program.run_decompositions() if decomposed else program
    update = update_for("lora", (6, 6), bias=True, seed=1)
    assert isinstance(update, LoRA)
    h = graph.attach(program, {"a": update})
    folded = update.fold(model.a.weight.detach().double()), update.fold_bias(None, torch.float64)
    exact = copy.deepcopy(model).double()
    exact.product = lambda x: nn.functional.linear(x, *folded)  # type: ignore[method-assign]
    want = exact(x.double()).detach()
    close(run(h, x), [want])
    close(run(graph.merge(h), x), [want])


def test_an_int8_base() -> None:
    """The adapter stands around the layer's boundary; merging has no parameter to go into."""
    model, x = Quantised().eval(), 1e-3 * torch.randn(2, 3, 4)  # the tanh behind it is not full
    program = torch.export.export(model, (x,))
    site = next(s for s in graph.find_sites(program) if s.adaptable and not s.weight)
    o, i = site.shape
    update = LoRA(30 * torch.randn(o, 2), torch.randn(2, i), scale=1.5)
    hooked = model.get_submodule(site.path).register_forward_hook(
        lambda _, given, out: out + 1.5 * (given[0] @ update.down.t() @ update.up.t())
    )
    expected = model(x)
    hooked.remove()
    h = graph.attach(program, {site.path: update})
    close(run(h, x), [expected.detach().double()])
    assert (run(h, x)[0] - run(program, x)[0]).abs().max() > 1e-2
    assert code(graph.detach(h)) == code(program)
    with pytest.raises(ValueRefused) as caught:
        graph.merge(h)
    assert site.path in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["lokr", "hra"])
def test_open_batch_and_sequence_as_far_as_onnxruntime(algorithm: str, tmp_path: Path) -> None:
    """attach → save → load → ONNX → a longer text in a larger batch than was traced."""
    found, program = zoo.entry("llama-tied"), zoo.program("llama-tied")
    sites = graph.find_sites(program)
    updates = random_updates(sites, algorithm)
    expected = outputs(live(found.model, sites, updates), found.other)
    torch.export.save(graph.attach(program, updates), tmp_path / "h.pt2")
    h = torch.export.load(tmp_path / "h.pt2")
    assert_same(outputs(h.module(), found.other), expected)
    graph.export_onnx(h, tmp_path / "h.onnx")
    session = ort.InferenceSession(tmp_path / "h.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"input_ids": found.other["input_ids"].numpy()})[:1]
    assert got.shape[:2] == (3, 9)
    assert_same(torch.from_numpy(np.asarray(got)), expected)
