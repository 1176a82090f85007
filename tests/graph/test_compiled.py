"""Programs with adapters compiled for real, by inductor, at other sizes than they were traced with.

What eager computes is right by other tests: here inductor's own rewrites may change a result.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from graph_nets import close, folded, update_for, wanted
from strategies import Conv1D
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from zoo import entry, first, ids, program

from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.update import Update, compose
from adaptsurgery.graph.attach import attach
from adaptsurgery.graph.merge import merge

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SIZES = [(2, 5), (3, 8), (7, 3)]  # batch and sequence: as traced, and others


class Net(nn.Module):
    """A layer of each kind; batch and sequence stay open."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.turned = nn.Linear(6, 8), Conv1D(8, 8)
        nn.init.normal_(self.turned.weight, std=0.5)
        nn.init.normal_(self.turned.bias, std=0.5)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.last = nn.Linear(16, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.turned(torch.relu(self.first(x))))
        y = self.conv(y.unflatten(-1, (2, 4)).transpose(1, 2))  # batch, channels, sequence, width
        y = self.last(torch.tanh(y).transpose(1, 2).flatten(2))
        return x + y


def example(batch: int, sequence: int) -> Tensor:
    return torch.randn(batch, sequence, 6, generator=torch.Generator().manual_seed(batch))


def made() -> nn.Module:
    torch.manual_seed(5)
    return Net().eval()


def exported(model: nn.Module) -> ExportedProgram:
    sizes = ({0: Dim("batch", min=2, max=64), 1: Dim("sequence", min=2, max=64)},)
    return torch.export.export(model, (example(*SIZES[0]),), dynamic_shapes=sizes)


def updates_of(model: nn.Module, algorithm: str) -> dict[str, Update]:
    found = {}
    for n, (path, module) in enumerate(model.named_children()):
        bias = path != "last" and algorithm == "lora"
        found[path] = update_for(algorithm, Layer.from_module(module).shape, bias, seed=n)
    return found


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "hra", "dora"])
def test_compiled_by_inductor(algorithm: str) -> None:
    """Two layers with the adapter beside them, two with it in their weights."""
    model = made()
    updates = updates_of(model, algorithm)
    beside = {path: updates.pop(path) for path in ("turned", "conv")}
    h = attach(attach(exported(model), beside, mode="factored"), updates, "more", mode="weight")
    check_compiled(h, model, {**beside, **updates})


def test_merged_and_compiled() -> None:
    """A program whose adapters were folded in, one after the other."""
    model = made()
    hra, lora = (updates_of(model, algorithm) for algorithm in ("hra", "lora"))
    h = merge(attach(attach(exported(model), hra), lora, "more"))
    check_compiled(h, model, {path: compose([hra[path], lora[path]]) for path in hra})


def check_compiled(h: ExportedProgram, model: nn.Module, updates: dict[str, Update]) -> None:
    compiled = torch.compile(h.module(), fullgraph=True, dynamic=True)
    for batch, sequence in SIZES:
        x = example(batch, sequence)
        with torch.no_grad():
            close([compiled(x)], wanted(model, updates, x))


def test_a_llama_by_aot_inductor(tmp_path: Path) -> None:
    """One program of transformers' own, two adapters on the same layers, both sizes open."""
    model = entry("llama-tied").model
    layers = [path for path, m in model.named_modules() if path.endswith(("q_proj", "down_proj"))]
    shapes = {path: Layer.from_module(model.get_submodule(path)).shape for path in layers}
    hra, lora = (
        {
            path: update_for(algorithm, shape, seed=n)
            for n, (path, shape) in enumerate(shapes.items())
        }
        for algorithm in ("hra", "lora")
    )
    h = attach(attach(program("llama-tied"), hra), lora, "lora")
    package = torch._inductor.aoti_compile_and_package(h, package_path=str(tmp_path / "h.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    reference = folded(model, {path: compose([hra[path], lora[path]]) for path in layers})
    for batch, sequence in ((2, 6), (3, 9), (5, 4)):
        given = ids(batch, sequence)
        with torch.no_grad():
            want = first(reference(input_ids=given))
            close([first(compiled(input_ids=given))], [want], 1e-4)
