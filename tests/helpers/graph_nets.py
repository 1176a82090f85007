"""Small nets for graph surgery, updates for their layers, and the eager reference."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from adaptsurgery.algorithms import HRA, DoRA, Full, LoHa, LoKr, LoRA
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.update import Update

ALGORITHMS = ("lora", "loha", "lokr", "hra", "hra-gs", "dora", "full")


class Mlp(nn.Module):
    """A layer that is called twice, one without a bias, a dropout, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6, bias=False)
        self.drop = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.drop(torch.relu(self.a(x)))
        return self.b(y) + x, self.a(x)


class Guarded(Mlp):
    """The same with one layer under no_grad, which export makes a graph of its own."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.drop(torch.relu(self.a(x)))
        with torch.no_grad():
            z = self.b(y)
        return z + x, self.a(x)


class Convs(nn.Module):
    """Convolutions of every setting, and a linear layer behind them that is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2))
        self.grouped = nn.Conv2d(6, 4, 3, padding="same", groups=2)
        self.round = nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False)
        self.point = nn.Conv2d(6, 4, 1)
        self.out = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.grouped(torch.tanh(self.first(x))))
        x = self.point(torch.tanh(self.round(x)))
        y: Tensor = self.out(x.mean((2, 3)))
        return y


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid = nn.Embedding(10, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.mid(self.embed(ids))))
        return y


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return kind().eval()


def example(model: nn.Module, batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    if isinstance(model, Tied):
        return torch.randint(0, 10, (batch, 5), generator=generator)
    shape = (batch, 4, 9, 8) if isinstance(model, Convs) else (batch, 6)
    return torch.randn(shape, generator=generator)


def exported(model: nn.Module, **options: Any) -> ExportedProgram:
    """With an open batch."""
    sizes = ({0: Dim("batch", min=2, max=64)},)
    return torch.export.export(model, (example(model),), dynamic_shapes=sizes, **options)


def update_for(algorithm: str, shape: tuple[int, ...], bias: bool = False, seed: int = 0) -> Update:
    generator = torch.Generator().manual_seed(seed)

    def t(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator) / 2

    o, i, *k = shape
    n = math.prod(shape[1:])
    ones = (1,) * len(k)
    lora = LoRA(t(o, 3, *ones), t(3, i, *k), scale=0.7, up_bias=t(o) if bias else None)
    return {
        "lora": lambda: lora,
        "loha": lambda: LoHa(t(o, 2), t(2, n), t(o, 2), t(2, n), scale=0.7, weight_shape=shape),
        "lokr": lambda: LoKr(w1=t(2, 1), w2_a=t(o // 2, 2), w2_b=t(2, n), scale=0.7),
        "hra": lambda: HRA(t(n, 4)),
        "hra-gs": lambda: HRA(t(n, 3), apply_gs=True),
        "dora": lambda: DoRA(lora, t(o, 1, *ones).abs() + 0.5),
        "full": lambda: Full(diff=t(*shape), diff_b=t(o) if bias else None),
    }[algorithm]()


def updates_for(
    model: nn.Module, algorithm: str, seed: int = 0, **options: Any
) -> dict[str, Update]:
    layers = (nn.Linear, nn.Conv2d)
    return {
        path: update_for(algorithm, Layer.from_module(m).shape, seed=seed + n, **options)
        for n, (path, m) in enumerate(model.named_modules())
        if isinstance(m, layers)
    }


def folded(model: nn.Module, updates: Mapping[str, Update]) -> nn.Module:
    """The reference: a copy in float64 whose layers have W' and b' for their own."""
    out = copy.deepcopy(model)
    for path, update in updates.items():
        module: Any = out.get_submodule(path)
        layer = Layer.from_module(module)
        with torch.no_grad():
            weight = layer.stored(update.fold(layer.canonical().double())).contiguous()
            bias = None if layer.bias is None else layer.bias.double()
            bias = update.fold_bias(bias, torch.float64)
        module.weight = nn.Parameter(weight)
        module.bias = None if bias is None else nn.Parameter(bias)
    return out.double()


def run(g: Any, x: Tensor) -> list[Tensor]:
    module = g.module() if isinstance(g, ExportedProgram) else g
    out = module(x)
    return [t.detach() for t in (out if isinstance(out, tuple) else (out,))]


def wanted(model: nn.Module, updates: Mapping[str, Update], x: Tensor) -> list[Tensor]:
    return run(folded(model, updates), x.double() if x.is_floating_point() else x)


def code(g: Any) -> str:
    """The code of a graph, nested ones too."""
    top = g.graph_module if isinstance(g, ExportedProgram) else g
    parts = [m.code for m in top.modules() if isinstance(m, torch.fx.GraphModule)]
    return "\n".join(parts)


def close(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def equal(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def exported_as(model: nn.Module, kind: str, x: Tensor) -> Any:
    """A program of fixed sizes, or its module."""
    program = torch.export.export(model, (x,))
    return program if kind == "program" else program.module()
