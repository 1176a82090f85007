"""LoRA: Δ = up·down (arXiv 2106.09685), on convolutions as LoCon, with a Tucker core as LyCORIS's.

linear     up (o, r)            down (r, i)
conv       up (o, r[, 1, …])    down (r, i, *k)
tucker     up (o, p[, 1, …])    mid (p, q, *k)    down (q, i[, 1, …])
           Δ[o, i, k] = Σ up[o, p] mid[p, q, k] down[q, i]      (LyCORIS, arXiv 2309.14859)
embedding  up (dim, r)          down (r, vocab)
up_bias    (o,), scaled as Δ is (PEFT's lora_bias)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from adaptsurgery.core.cost import Form
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.linalg import Approximation, truncate_factors
from adaptsurgery.core.update import Delta


class Truncation(NamedTuple):
    """A LoRA, and ‖Δ − Δ̂‖ / ‖Δ‖ of its exact numbers, before they were rounded to its dtype."""

    lora: LoRA
    error: float


@dataclass(frozen=True, eq=False)
class LoRA(Delta):
    """Δ = up·down; see the module's docstring for the shapes. Raises ShapeError where they misfit."""

    up: Tensor
    down: Tensor
    mid: Tensor | None = None
    up_bias: Tensor | None = None

    name: ClassVar[str] = "lora"

    @classmethod
    def of_factors(
        cls, up: Tensor, down: Tensor, shape: tuple[int, ...], scale: float = 1.0
    ) -> LoRA:
        """The LoRA of two matrices (o, r), (r, i·∏k) for a weight ``shape`` (o, i, *k)."""
        ones = (1,) * (len(shape) - 2)
        return cls(
            up.reshape(*up.shape, *ones), down.reshape(down.shape[0], *shape[1:]), scale=scale
        )

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def extent(self) -> tuple[int, int]:
        kernel = () if self.mid is None else self.mid.shape[2:]
        return self.up.shape[0], math.prod(self.down.shape[1:]) * math.prod(kernel)

    @property
    def kernel(self) -> tuple[int, ...] | None:
        return tuple((self.down if self.mid is None else self.mid).shape[2:])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight_shape or (self.up.shape[0], self.down.shape[1], *(self.kernel or ()))

    def misfit(self) -> str:
        if self.up.dim() < 2 or self.down.dim() < 2 or set(self.up.shape[2:]) > {1}:
            return "up is (o, r[, 1, …]) and down (r, i, *k)"
        if self.mid is None:
            if self.up.shape[1] != self.down.shape[0]:
                return "up (o, r) and down (r, i, *k) differ in r"
        elif self.mid.shape[:2] != (self.up.shape[1], self.down.shape[0]):
            return "mid is not (p, q, *k) between up (o, p) and down (q, i)"
        elif math.prod(self.down.shape[2:]) != 1:
            return "down beside mid is (r, i[, 1, …])"
        if self.up_bias is not None and self.up_bias.shape != (self.up.shape[0],):
            return "up_bias is not (o,)"
        return ""

    def flat(self) -> LoRA:
        """The same Δ without a Tucker core: mid folded into down, exactly. down (r, i, *k)."""
        if self.mid is None:
            return self
        down = torch.einsum("pq...,qi->pi...", self.mid, self.down.flatten(1))
        return replace(self, down=down, mid=None, weight_shape=self.shape)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Two matrices (o, r), (r, i·∏k) whose product is Δ."""
        flat = self.flat()
        return flat.up.flatten(1), flat.down.flatten(1)

    def matrix(self) -> Tensor:
        up, down = self.factors()
        return up @ down

    def add_rows_(self, block: Tensor, start: int, stop: int, factor: float) -> None:
        block.addmm_(self.up[start:stop], self.down, alpha=factor)

    def prepared(self, dtype: torch.dtype, device: torch.device | None = None) -> LoRA:
        """Cast, and two matrices."""
        up, down = self.cast(dtype, device).factors()
        return LoRA(up, down, scale=self.scale, up_bias=self.up_bias)

    def transposed(self) -> LoRA:
        up, down = self.factors()
        return LoRA(down.t().contiguous(), up.t().contiguous(), scale=self.scale)

    def bias_delta(self) -> Tensor | None:
        return self.up_bias

    def delta(self, x: Tensor, layer: Layer, form: Form = "factored") -> Tensor:
        """Two layers, down with the layer's geometry and up pointwise; three with a Tucker core."""
        ready = self.like(layer.sample(x))
        kernel = layer.shape[2:]
        up = ready.up.flatten(1)
        if ready.mid is None:
            return layer.low_rank(x, up, ready.down.reshape(self.rank, *layer.shape[1:]))
        mid = ready.mid.reshape(*ready.mid.shape[:2], *kernel)
        return layer.low_rank(x, up, ready.down.flatten(1), mid)

    def norms(self, weight: Tensor, axis: int) -> Tensor:
        """From Gram matrices: ‖W‖² + 2s⟨W, Δ⟩ + s²‖Δ‖², each over one axis, Δ never built."""
        up, down = self.like(weight).factors()
        wide = weight.flatten(1)
        if axis == 0:
            cross, own = wide @ down.t() * up, up @ (down @ down.t()) * up
        else:
            cross, own = (up.t() @ wide * down).t(), ((up.t() @ up) @ down * down).t()
        per_line = (2 * self.scale * cross + self.scale**2 * own).sum(1)
        added = (
            per_line if axis == 0 else torch.unflatten(per_line, 0, (weight.shape[1], -1)).sum(1)
        )
        return (axis_squares(weight, axis) + added).clamp_min(0).sqrt()

    def to_lora(self) -> LoRA:
        """A LoRA without a Tucker core."""
        return self.flat()

    def truncated(self, rank: int, dtype: torch.dtype | None = None) -> Truncation:
        """The nearest LoRA of ``rank`` (Eckart–Young), by QR of both factors. Keeps the scale.

        In the factors' dtype, float32 at least, unless ``dtype`` says. ShapeError for rank < 1.
        """
        found = truncate_factors(*self.cast(torch.float64).factors(), rank)
        return truncation(found, self, dtype, self.up_bias)


def truncation(
    found: Approximation, source: Delta, dtype: torch.dtype | None, up_bias: Tensor | None = None
) -> Truncation:
    """Factors found for ``source``, as a LoRA of its shape and scale."""
    lora = LoRA.of_factors(found.up, found.down, source.shape, source.scale)
    lora = lora.cast(dtype or source.wide_dtype())
    return Truncation(replace(lora, up_bias=up_bias), found.error)


def axis_squares(weight: Tensor, axis: int) -> Tensor:
    """The squared norm of every output (``axis`` 0) or input (1) of a weight (o, i, *k)."""
    return weight.square().sum([dim for dim in range(weight.dim()) if dim != axis])
