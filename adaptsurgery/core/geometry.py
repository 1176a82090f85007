"""What a layer is, as data: enough to compute it with any weight, and nothing of nn.Module.

A weight is *canonical* when it reads (o, i, *k): o outputs, i = in/groups inputs, k the kernel's
dims. transformers' Conv1D stores (i, o) and an embedding (vocab, dim) = (i, o): those are
``transposed``, and their canonical weight is a view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from adaptsurgery_formats.errors import ShapeError, ValueRefused

KERNEL_DIMS = {"linear": 0, "conv1d": 1, "conv2d": 2, "conv3d": 3, "embedding": 0}
_CONVOLUTIONS: tuple[Any, ...] = (None, F.conv1d, F.conv2d, F.conv3d)
_MODULES: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Linear, "linear"),
    (nn.Conv1d, "conv1d"),
    (nn.Conv2d, "conv2d"),
    (nn.Conv3d, "conv3d"),
    (nn.Embedding, "embedding"),
)


@dataclass(frozen=True, eq=False)
class Layer:
    """A Linear, Conv1d/2d/3d or Embedding: its weight as stored, its bias, its geometry.

    ``stride``, ``padding`` and ``dilation`` may be given as one int and are kept as tuples, one
    number a kernel dim; ``padding`` may also be "same" or "valid". Raises ShapeError for a weight
    whose dims do not fit the kind, ValueRefused for an unknown kind.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None = None
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | str = 0
    padding_mode: str = "zeros"
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    transposed: bool = False
    padding_idx: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KERNEL_DIMS:
            raise ValueRefused(
                f"no layer is called `{self.kind}`", next=f"one of {', '.join(KERNEL_DIMS)}"
            )
        if self.weight.dim() != 2 + self.dims:
            raise ShapeError(
                f"a {self.kind}'s weight has {2 + self.dims} dimensions",
                seen=str(list(self.weight.shape)),
            )
        for name in ("stride", "padding", "dilation"):
            value = getattr(self, name)
            if isinstance(value, int):
                object.__setattr__(self, name, (value,) * self.dims)

    @classmethod
    def from_module(cls, module: nn.Module) -> Layer:
        """The layer that ``module`` computes; its tensors are shared, not copied.

        Takes nn.Linear, nn.Conv1d/2d/3d, nn.Embedding and transformers' Conv1D; anything else is
        a ValueRefused, and so is an embedding with ``max_norm``, whose forward rewrites its weight.
        """
        kind = kind_of(module)
        if not kind:
            raise ValueRefused(
                f"{type(module).__name__} is not a layer that adapters are put on",
                next="a Linear, Conv1d, Conv2d, Conv3d, Embedding, or transformers' Conv1D",
                code="unsupported-layer",
            )
        if kind == "linear":
            return cls(kind, _weight(module), _bias(module), transposed=_is_conv1d(module))
        if kind == "embedding":
            if module.max_norm is not None:
                raise ValueRefused("an embedding with max_norm rewrites its weight as it runs")
            return cls(kind, _weight(module), transposed=True, padding_idx=_index(module))
        geometry = ("stride", "padding", "padding_mode", "dilation", "groups")
        settings = {name: getattr(module, name) for name in geometry}
        return cls(kind, _weight(module), _bias(module), **settings)

    @property
    def dims(self) -> int:
        """How many kernel dims: 0 for a linear or an embedding."""
        return KERNEL_DIMS[self.kind]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (o, i, *k) of the canonical weight."""
        return tuple(self.canonical().shape)

    def canonical(self, weight: Tensor | None = None) -> Tensor:
        """A stored weight (by default the layer's own), seen as (o, i, *k)."""
        weight = self.weight if weight is None else weight
        return weight.t() if self.transposed else weight

    def stored(self, weight: Tensor) -> Tensor:
        """A canonical weight as this layer stores it: the inverse of ``canonical``."""
        return weight.t() if self.transposed else weight

    def sample(self, x: Tensor) -> Tensor:
        """A tensor of the dtype and device that the layer computes in.

        It is ``x``, or the weight where ``x`` is indices or an fx.Proxy, which has neither.
        """
        return x if isinstance(x, Tensor) and self.kind != "embedding" else self.weight

    def batched(self, x: Tensor) -> bool:
        """Whether ``x`` has a batch dim, which a convolution could go without; a proxy counts as so."""
        return not (self.dims and isinstance(x, Tensor) and x.dim() == self.dims + 1)

    def forward(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | EllipsisType | None = ...
    ) -> Tensor:
        """The layer's output with a canonical ``weight`` and a ``bias`` in place of its own.

        ``weight`` may have other channels than the layer's where groups is 1: (r, i, *k) gives r
        output channels, with the layer's stride, padding and dilation.
        """
        weight = self.canonical() if weight is None else weight
        bias = self.bias if isinstance(bias, EllipsisType) else bias
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        if self.kind == "embedding":
            rows = F.embedding(x, weight.t(), self.padding_idx)
            return rows if bias is None else rows + bias
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.pads(), mode=self.padding_mode), (0,) * self.dims
        return self._convolve(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def pointwise(self, y: Tensor, matrix: Tensor) -> Tensor:
        """``matrix`` (p, q) over the q channels of ``y``, position by position."""
        if not self.dims:
            return F.linear(y, matrix)
        return self._convolve(y, matrix.reshape(*matrix.shape, *(1,) * self.dims))

    def low_rank(self, x: Tensor, up: Tensor, down: Tensor, mid: Tensor | None = None) -> Tensor:
        """``layer(x)`` with the weight up·down, without building it: up (o, r), down (r, i, *k).

        With ``mid`` (p, q, *k) it is three steps, down (q, i) pointwise first. It needs groups = 1.
        """
        if mid is not None:
            return self.pointwise(self.forward(self.pointwise(x, down), mid, None), up)
        return self.pointwise(self.forward(x, down, None), up)

    def over_channels(self, values: Tensor) -> Tensor:
        """A vector, one number a channel, shaped to broadcast over an input or output."""
        return values.reshape(-1, *(1,) * self.dims)

    def pads(self) -> list[int]:
        """The padding as F.pad wants it: (before, after) a kernel dim, last dim first.

        "same" pads d·(k − 1) in all, the odd one behind, as torch's convolutions do.
        """
        kernel, dilation = self.weight.shape[2:], self._numbers(self.dilation)
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilation, kernel)]
            pairs = [(total // 2, total - total // 2) for total in totals]
        elif self.padding == "valid":
            pairs = [(0, 0)] * self.dims
        else:
            pairs = [(p, p) for p in self._numbers(self.padding)]
        return [side for pair in reversed(pairs) for side in pair]

    def positions(self, x: Tensor) -> int:
        """How many times the weight is used on ``x``: tokens, or output positions of a conv."""
        if not self.dims:
            shape = x.shape if self.kind == "embedding" else x.shape[:-1]
            return math.prod(shape)
        pads = self.pads()[::-1]
        batch = x.shape[0] if self.batched(x) else 1
        out = batch
        for axis in range(self.dims):
            reach = self._numbers(self.dilation)[axis] * (self.weight.shape[2 + axis] - 1)
            size = x.shape[x.dim() - self.dims + axis] + pads[2 * axis] + pads[2 * axis + 1]
            out *= (size - reach - 1) // self._numbers(self.stride)[axis] + 1
        return out

    def _convolve(self, x: Tensor, weight: Tensor, *settings: Any) -> Tensor:
        y: Tensor = _CONVOLUTIONS[self.dims](x, weight, *settings)
        return y

    @staticmethod
    def _numbers(value: int | tuple[int, ...] | str) -> tuple[int, ...]:
        assert isinstance(value, tuple)
        return value


def kind_of(module: nn.Module) -> str:
    """The kind of layer that a module is, or an empty string for any other module."""
    if _is_conv1d(module):
        return "linear"
    return next((kind for known, kind in _MODULES if isinstance(module, known)), "")


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: y = x·W + b with W (in, out). It is known by name, and not imported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _bias(module: nn.Module) -> Tensor | None:
    bias = module.bias
    return bias if isinstance(bias, Tensor) else None


def _index(module: nn.Module) -> int | None:
    index = module.padding_idx
    return index if isinstance(index, int) else None
