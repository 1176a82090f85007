"""The differences that are stored outright: full (LyCORIS's `diff`, `diff_b`) and norm (`w_norm`).

    full   diff (o, i, *k)    diff_b (o,)      W' = W + s·diff, b' = b + s·diff_b
    norm   w_norm (n,)        b_norm (n,)      the same of a LayerNorm, GroupNorm or RMSNorm

One of the two may be missing; the other is then all that changes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from adaptsurgery.algorithms.lora import Truncation, truncation
from adaptsurgery.core.cost import ApplyForm, price
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.update import Delta, compute_dtype
from adaptsurgery.nearest.lanczos import truncate
from adaptsurgery_formats.errors import ShapeError, ValueRefused


@dataclass(frozen=True, eq=False)
class Difference(Delta):
    """Δ as it is stored, or 0 where only the bias's difference is."""

    @property
    @abstractmethod
    def difference(self) -> Tensor | None:
        """The weight's difference, in the weight's shape."""

    @property
    def on_weight(self) -> bool:
        return self.difference is not None

    @property
    def outputs(self) -> int:
        return next(iter(self.tensors().values())).shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        if self.difference is not None:
            return tuple(self.difference.shape)
        if self.weight_shape is None:
            raise ShapeError(
                f"{self.name}: a difference of the bias alone does not show the weight's shape",
                next="pass weight_shape",
            )
        return self.weight_shape

    @property
    def extent(self) -> tuple[int, int]:
        return self.shape[0], math.prod(self.shape[1:])

    def check_fits(self, shape: Iterable[int]) -> None:
        shape = tuple(shape)
        if shape[:1] != (self.outputs,) or (self.difference is not None and shape != self.shape):
            held = "(o,)" if self.difference is None else "(o, i, *k)"
            seen = ", ".join(f"{name} {list(t.shape)}" for name, t in self.tensors().items())
            raise ShapeError(
                f"{self.name}: {held} is not that of the weight {list(shape)}", seen=seen
            )

    def matrix(self) -> Tensor:
        outputs, columns = self.extent
        if self.difference is not None:
            return self.difference.reshape(outputs, columns)
        return next(iter(self.tensors().values())).new_zeros(outputs, columns)

    def add_rows_(self, block: Tensor, start: int, stop: int, factor: float) -> None:
        if self.difference is not None:
            block.add_(self.difference[start:stop].reshape(block.shape), alpha=factor)

    def prepared(self, dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """The same difference on the device, not cast: ``add_rows_`` widens each block that it adds."""
        return self.cast(next(iter(self.tensors().values())).dtype, device)

    def folded(self, weight: Tensor, gate: Tensor | None = None) -> Tensor:
        if self.difference is not None:
            return super().folded(weight, gate)
        self.check_fits(weight.shape)
        return weight

    def _shift(self, weight: Tensor, factor: float, compute: torch.dtype | None) -> Tensor:
        if self.difference is not None:
            return super()._shift(weight, factor, compute)
        self.check_fits(weight.shape)
        compute_dtype(weight)  # refuses what is not floating
        return weight.detach().clone()


@dataclass(frozen=True, eq=False)
class Full(Difference):
    """Δ = diff (o, i, *k), and diff_b (o,) on the bias."""

    diff: Tensor | None = None
    diff_b: Tensor | None = None

    name: ClassVar[str] = "full"

    def misfit(self) -> str:
        if self.diff is None:
            return "neither diff nor diff_b" if self.diff_b is None else ""
        if self.diff.dim() < 2:
            return "diff is not (o, i, *k)"
        if self.diff_b is not None and self.diff_b.shape != self.diff.shape[:1]:
            return "diff (o, i, *k) and diff_b (o,) differ in o"
        return ""

    @property
    def difference(self) -> Tensor | None:
        return self.diff

    def transposed(self) -> Full | None:
        return self if self.diff is None else Full(diff=self.diff.t(), scale=self.scale)

    def bias_delta(self) -> Tensor | None:
        return self.diff_b

    def delta(self, x: Tensor, layer: Layer, form: ApplyForm = "factored") -> Tensor:
        if self.diff is None:
            return layer.forward(x, torch.zeros_like(layer.canonical()), None)
        return layer.forward(x, self.diff.to(layer.sample(x)), None)

    def prices(self, positions: int, layer: Layer, training: bool) -> dict[ApplyForm, int]:
        if self.diff is None:
            return {"folded": 0}
        o, n = self.extent
        return {
            "factored": price(positions * o * n, positions * o),
            "folded": self.folding_price(o * n, positions, training),
        }

    def truncated(self, rank: int, dtype: torch.dtype | None = None) -> Truncation:
        """The nearest LoRA of ``rank``; diff_b becomes its up_bias."""
        approximation = truncate(self.matrix().double(), rank)
        return truncation(approximation, self, dtype, self.diff_b)


@dataclass(frozen=True, eq=False)
class Norm(Difference):
    """Δ = w_norm (n,) on a norm's weight, b_norm (n,) on its bias. Folded, never applied."""

    w_norm: Tensor | None = None
    b_norm: Tensor | None = None

    name: ClassVar[str] = "norm"

    def misfit(self) -> str:
        held = list(self.tensors().values())
        if not held:
            return "neither w_norm nor b_norm"
        if any(t.dim() != 1 or t.shape != held[0].shape for t in held):
            return "w_norm and b_norm are not both (n,)"
        return ""

    @property
    def difference(self) -> Tensor | None:
        return self.w_norm

    def bias_delta(self) -> Tensor | None:
        return self.b_norm

    def delta(self, x: Tensor, layer: Layer, form: ApplyForm = "factored") -> Tensor:
        raise ValueRefused(
            "norm: a norm layer is no linear map of its input",
            next="fold the difference into its weight and bias",
        )
