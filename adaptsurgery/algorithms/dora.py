"""DoRA: W' = m ∘ (W + sΔ) / ‖W + sΔ‖ (arXiv 2402.09353), over any Delta.

    magnitude  (o, 1, …)       the norm of every output row    (PEFT; LyCORIS with wd_on_out)
               (1, i, 1, …)    the norm of every input         (LyCORIS without, kohya's dora_scale)

A row or column of W + sΔ that is all zero has no direction and stays zero. For the gradient the
norm is a constant, as in the paper's section 4.3 and in PEFT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptsurgery.algorithms.full import Full
from adaptsurgery.algorithms.lora import LoRA, Truncation, truncation
from adaptsurgery.core.cost import ApplyForm
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.update import (
    Gates,
    Renorm,
    axis_norms,
    compute_dtype,
    only_one,
    wide_for_scale,
    widest,
)
from adaptsurgery.nearest.lanczos import truncate
from adaptsurgery_formats.errors import ShapeError

_LEAST = 2.0**-48  # a norm below it may have lost squares that float32 does not hold


@dataclass(frozen=True, eq=False)
class DoRA(Renorm):
    """A Delta with new norms; the shape of ``magnitude`` says the axis. ShapeError for no such shape."""

    magnitude: Tensor

    name: ClassVar[str] = "dora"

    def __post_init__(self) -> None:
        shape, (outputs, columns) = tuple(self.magnitude.shape), self.inner.extent
        long = math.prod(shape)
        if len(shape) >= 2:
            if shape[0] == outputs == long:
                return
            kernel = math.prod(self.inner.kernel or (1,))
            if shape[1] == long and columns % (long * kernel) == 0:
                return
        raise ShapeError(
            "dora: magnitude is neither (o, 1, …) nor (1, i, 1, …)",
            seen=f"magnitude {list(shape)}, Δ ({outputs}, {columns})",
        )

    @property
    def axis(self) -> int:
        """0 where every output has its norm, 1 where every input has."""
        return 0 if self.magnitude.shape[0] == self.inner.extent[0] == self._length else 1

    @property
    def _length(self) -> int:
        return self.magnitude.numel()

    def gain(self, norms: Tensor, start: int = 0) -> Tensor:
        """m / norm, a vector; 0 where the norm is. Some outputs may be left out on both sides."""
        few = self.axis == 0 and start + norms.numel() <= self._length
        if not few and norms.shape != (self._length,):
            raise ShapeError(
                f"dora: {self._length} magnitudes for {norms.numel()} {'inputs' if self.axis else 'outputs'}"
            )
        return _gain(self.magnitude.flatten().narrow(0, start, norms.numel()), norms)

    def renormed(self, weight: Tensor) -> Tensor:
        return weight * self._along(weight, self.gain(axis_norms(weight.detach(), self.axis)))

    def renorm_(self, weight: Tensor, start: int = 0) -> None:
        first = start if self.axis == 0 else 0
        norms = axis_norms(weight, self.axis)
        odd = ((norms <= _LEAST) | norms.isinf()).nonzero().flatten()
        lines = weight.index_select(self.axis, odd).to(widest(weight.device))
        weight.mul_(self._along(weight, self.gain(norms, first)))
        if odd.numel():  # lines whose squares leave the dtype's range
            magnitude = self.magnitude.flatten().index_select(0, odd + first)
            gain = _gain(magnitude, axis_norms(lines, self.axis))
            new = lines * self._along(lines, gain)
            weight.index_copy_(self.axis, odd, new.to(weight.dtype))

    def _along(self, weight: Tensor, gain: Tensor) -> Tensor:
        return gain.view([-1 if dim == self.axis else 1 for dim in range(weight.dim())])

    def apply(
        self,
        x: Tensor,
        layer: Layer,
        form: ApplyForm = "auto",
        gate: Gates = None,
        seen: Gates = None,
    ) -> Tensor:
        """Around a LoRA it takes the factors: the gain goes on the input's or the output's channels.

        The norms of other deltas need W + sΔ in any case, so those fold.
        """
        gate, seen = only_one(gate), only_one(seen)
        self.inner.check_fits(layer.shape)
        bias = self.fold_bias(layer.bias, layer.weight.dtype, gate)
        lookup = layer.kind == "embedding" and self.axis == 1
        dense = not isinstance(self.inner, LoRA) or form == "folded" or layer.groups > 1 or lookup
        if gate is None and seen is None:
            if dense:
                return layer.forward(x, self.folded(layer.canonical()), bias)
            y = self.product(x, layer)
            return y if bias is None else y + layer.over_channels(bias)
        other = x if seen is None else seen
        if dense:
            weight = layer.canonical()
            added = layer.forward(other, self.folded(weight, gate) - weight, None)
        else:
            added = self.product(other, layer) - layer.forward(other, bias=None)
            added = added if gate is None else added * layer.over_channels(gate.to(added))
        return layer.forward(x, bias=bias) + added

    def product(self, x: Tensor, layer: Layer) -> Tensor:
        """W'·x from the factors of a LoRA, without a bias."""
        assert isinstance(self.inner, LoRA)
        weight = layer.canonical()
        dtype = wide_for_scale(compute_dtype(weight), self.inner.scale, weight.device)
        wide = weight.to(dtype)
        with torch.no_grad():
            norms = self.inner.norms(wide, self.axis)
        gain = layer.over_channels(self.gain(norms).to(layer.sample(x)))
        x = x * gain if self.axis == 1 else x
        y = layer.forward(x, bias=None) + self.inner.scale * self.inner.delta(x, layer)
        return y if self.axis == 1 else y * gain

    def to_full(self, weight: Tensor) -> Full:
        """W' − W as a dense difference, for this canonical ``weight`` only; float32 at least."""
        wide = weight.to(compute_dtype(weight))
        bias = self.inner.bias_delta()
        diff_b = None if bias is None else self.inner.scale * bias
        return Full(diff=self.fold(wide) - wide, diff_b=diff_b)

    def truncated(self, weight: Tensor, rank: int, dtype: torch.dtype | None = None) -> Truncation:
        """The nearest LoRA of ``rank`` to W' − W, for this canonical ``weight`` only."""
        full = self.to_full(weight.to(torch.float64))
        approximation = truncate(full.matrix(), rank)
        return truncation(approximation, full, dtype or self.inner.wide_dtype(), full.diff_b)


def _gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """m / norm; 0 where the norm is, NaN and no row of zeros where it is beyond its dtype."""
    empty = norms.eq(0)
    gain = (magnitude.to(norms) / norms.masked_fill(empty, 1)).masked_fill(empty, 0)
    return gain + (norms - norms)  # ∞ − ∞
