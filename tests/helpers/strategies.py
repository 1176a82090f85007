"""Hypothesis strategies: layers of every kind and setting, and adapters of every stored form."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import reference
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

from adaptsurgery.algorithms import build
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.update import Update

ALGORITHMS = ("lora", "loha", "lokr", "hra", "full", "dora")
KINDS = ("linear", "Conv1D", "conv1d", "conv2d", "conv3d", "embedding")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Conv1D(nn.Module):
    """transformers' Conv1D, as its documentation has it: weight (in, out), y = x·W + b."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@dataclass
class Case:
    """A module with an input, and an adapter for it by slot."""

    module: nn.Module
    x: Tensor
    algorithm: str = ""
    slots: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def layer(self) -> Layer:
        return Layer.from_module(self.module)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layer.shape

    @property
    def weight(self) -> Tensor:
        return self.layer.canonical().detach()

    @property
    def update(self) -> Update:
        return build(self.algorithm, self.slots, self.scale, self.shape, **self.options)

    def reference_delta(self) -> Tensor:
        return reference.delta(self.algorithm, self.slots, self.shape)

    def reference_fold(self, weight: Tensor | None = None) -> Tensor:
        """W' in float64, by the definition."""
        weight = (self.weight if weight is None else weight).double()
        if self.algorithm == "hra":
            return reference.rotated(weight, reference.rotation(self.slots["u"], **self.options))
        weight = weight + self.scale * self.reference_delta()
        if "magnitude" in self.slots:
            return reference.renormed(weight, self.slots["magnitude"])
        return weight

    def reference_output(self) -> Tensor:
        """The module itself, in float64, with W' and b' put into it."""
        x = self.x if self.x.dtype == torch.int64 else self.x.double()
        bias = self._reference_bias()
        out: Tensor = with_weight(self.module, self.reference_fold(), bias)(x).detach()
        return out if bias is None or not isinstance(self.module, nn.Embedding) else out + bias

    def _reference_bias(self) -> Tensor | None:
        change = reference.bias_delta(self.algorithm, self.slots)
        bias = getattr(self.module, "bias", None)
        if change is None:
            return None if bias is None else bias.detach().double()
        return self.scale * change + (0 if bias is None else bias.detach().double())


def with_weight(module: nn.Module, canonical: Tensor, bias: Tensor | None) -> nn.Module:
    """A float64 copy of a module with another weight and bias."""
    out = copy.deepcopy(module).double()
    stored = canonical.t() if Layer.from_module(module).transposed else canonical
    out.weight = nn.Parameter(stored.contiguous())
    if bias is not None:
        out.bias = nn.Parameter(bias)
    return out


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(1, 9)
composites = st.sampled_from([1, 2, 3, 4, 6, 8, 9, 10, 12, 15])


@st.composite
def modules(
    draw: st.DrawFn, kind: str, dtype: torch.dtype = torch.float64, groups: bool = True
) -> Case:
    """A module of ``kind`` with random numbers, and an input for it."""
    seed = draw(seeds)
    if kind in ("linear", "Conv1D", "embedding"):
        module, x = _matrix_module(draw, kind, seed)
    else:
        module, x = _convolution(draw, int(kind[4]), seed, groups)
    module = module.to(dtype)
    for n, parameter in enumerate(module.parameters()):
        parameter.data = numbers(seed + n, *parameter.shape, dtype=dtype)
    return Case(module, x if x.dtype == torch.int64 else x.to(dtype))


def _matrix_module(draw: st.DrawFn, kind: str, seed: int) -> tuple[nn.Module, Tensor]:
    out, into = draw(composites), draw(composites)
    lead = draw(st.sampled_from([(), (1,), (5,), (2, 3), (0,), (40,)]))
    if kind == "embedding":
        generator = torch.Generator().manual_seed(seed)
        return nn.Embedding(into, out), torch.randint(0, into, lead, generator=generator)
    x = numbers(seed + 7, *lead, into)
    if kind == "Conv1D":
        return Conv1D(out, into), x
    return nn.Linear(into, out, bias=draw(st.booleans())), x


def _convolution(draw: st.DrawFn, dims: int, seed: int, grouped: bool) -> tuple[nn.Module, Tensor]:
    each = lambda strategy: tuple(draw(strategy) for _ in range(dims))  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 2, 3])) if grouped else 1
    channels = st.integers(1, 6) if dims < 3 else st.sampled_from([1, 2, 4])
    into, out = groups * draw(channels), groups * draw(channels)
    kernel, dilation = each(st.integers(1, 3)), each(st.integers(1, 2))
    mode = draw(st.sampled_from(PADDING_MODES))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel)]
    size = [r + 1 + draw(st.integers(0, 3)) for r in reach]
    style = draw(st.sampled_from(["numbers", "same", "valid"]))
    stride = (1,) * dims if style == "same" else each(st.integers(1, 2))
    padding = tuple(draw(st.integers(0, min(2, s - 1))) for s in size)
    module = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        into, out, kernel, stride, padding if style == "numbers" else style, dilation, groups,
        bias=draw(st.booleans()), padding_mode=mode,
    )  # fmt: skip
    batched = mode != "zeros" or draw(st.booleans())
    lead = (draw(st.integers(1, 3)),) if batched else ()
    return module, numbers(seed + 7, *lead, into, *size)


@st.composite
def cases(
    draw: st.DrawFn,
    algorithm: str,
    kind: str,
    dtype: torch.dtype = torch.float64,
    groups: bool = True,
) -> Case:
    """A module of ``kind`` and an adapter of ``algorithm`` that fits it; alpha is rarely the rank."""
    case = draw(modules(kind, dtype, groups))
    case.algorithm = algorithm
    if algorithm == "dora":
        case.algorithm = draw(st.sampled_from(["lora", "loha", "lokr", "full"]))
    case.slots, rank = draw(slots(case.algorithm, case.shape, dtype))
    if algorithm == "hra":
        case.options = {"apply_gs": draw(st.booleans()) and _independent(case.slots["u"])}
    else:
        case.scale = draw(st.sampled_from([0.5, 1.0, 3.0, 7.5, -2.0])) / rank
    if algorithm == "dora":
        case.slots = {k: v for k, v in case.slots.items() if k not in ("up_bias", "diff_b")}
        case.slots["magnitude"] = draw(magnitudes(case.shape, dtype))
        if case.algorithm == "full" and "diff" not in case.slots:
            case.slots["diff"] = numbers(draw(seeds), *case.shape, dtype=dtype)
        assume(_has_directions(case))
    return case


def _has_directions(case: Case) -> bool:
    """Whether no row or column of W + sΔ all but cancels: one of zeros has no direction to keep."""
    weight, delta = case.weight.double(), case.scale * case.reference_delta()
    others = [d for d in range(weight.dim()) if case.slots["magnitude"].shape[d] == 1]
    left = (weight + delta).pow(2).sum(others)
    return bool((left > 0.01 * (weight.pow(2) + delta.pow(2)).sum(others)).all())


def _independent(u: Tensor) -> bool:
    unit = u.double() / u.double().norm(dim=0)
    return u.shape[1] <= u.shape[0] and bool(torch.linalg.svdvals(unit).min() > 1e-2)


@st.composite
def magnitudes(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    axis = draw(st.sampled_from([0, 1]))
    sides = [size if dim == axis else 1 for dim, size in enumerate(shape)]
    return (numbers(draw(seeds), *sides).abs() + 0.1).to(dtype)


@st.composite
def slots(
    draw: st.DrawFn, algorithm: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], int]:
    """An algorithm's tensors in any of its stored forms, and their rank."""
    rank, seed = draw(st.integers(1, 4)), draw(seeds)
    tucker = len(shape) > 2 and draw(st.booleans())
    shapes = _SHAPES[algorithm](draw, shape, rank, tucker)
    held = {name: numbers(seed + n, *s, dtype=dtype) for n, (name, s) in enumerate(shapes.items())}
    if algorithm == "hra" and rank % 2 == 0 and draw(st.booleans()):
        held["u"] = held["u"][:, : rank // 2].repeat_interleave(2, dim=1)  # PEFT's initial value
    return held, rank


Shapes = dict[str, tuple[int, ...]]


def _lora(draw: st.DrawFn, shape: tuple[int, ...], r: int, tucker: bool) -> Shapes:
    o, i, *k = shape
    ones = (1,) * len(k)
    bias: Shapes = {"up_bias": (o,)} if draw(st.booleans()) else {}
    if tucker:
        return {"up": (o, r, *ones), "down": (r, i, *ones), "mid": (r, r, *k), **bias}
    return {"up": (o, r, *ones), "down": (r, i, *k), **bias}


def _loha(draw: st.DrawFn, shape: tuple[int, ...], r: int, tucker: bool) -> Shapes:
    o, i, *k = shape
    if tucker:
        halves = {"w1_a": (r, o), "w1_b": (r, i), "w2_a": (r, o), "w2_b": (r, i)}
        return {**halves, "t1": (r, r, *k), "t2": (r, r, *k)}
    n = math.prod(shape[1:])
    return {"w1_a": (o, r), "w1_b": (r, n), "w2_a": (o, r), "w2_b": (r, n)}


def _lokr(draw: st.DrawFn, shape: tuple[int, ...], r: int, tucker: bool) -> Shapes:
    o, i, *k = shape
    a, c = draw(_divisors(o)), draw(_divisors(i))
    b, d = o // a, i // c
    left: Shapes = {"w1": (a, c)} if draw(st.booleans()) else {"w1_a": (a, r), "w1_b": (r, c)}
    if tucker:
        return {**left, "t2": (r, r, *k), "w2_a": (r, b), "w2_b": (r, d)}
    right: list[Shapes] = [
        {"w2": (b, d, *k)},
        {"w2_a": (b, r), "w2_b": (r, d * math.prod(k))},
        {"w2_a": (b, r), "w2_b": (r, d, *k)},
    ]
    return {**left, **draw(st.sampled_from(right))}


def _divisors(n: int) -> st.SearchStrategy[int]:
    return st.sampled_from([m for m in range(1, n + 1) if n % m == 0])


def _hra(draw: st.DrawFn, shape: tuple[int, ...], r: int, tucker: bool) -> Shapes:
    return {"u": (math.prod(shape[1:]), r)}


def _full(draw: st.DrawFn, shape: tuple[int, ...], r: int, tucker: bool) -> Shapes:
    both: Shapes = {"diff": shape, "diff_b": shape[:1]}
    kept = draw(st.sampled_from([("diff",), ("diff", "diff_b"), ("diff_b",)]))
    return {name: both[name] for name in kept}


_SHAPES = {"lora": _lora, "loha": _loha, "lokr": _lokr, "hra": _hra, "full": _full}
