"""What an adapter does to a weight: the algebra that every algorithm is an instance of.

    Delta      W' = W + s·Δ                     LoRA, LoHa, LoKr, full
    Rotation   W' = W·R                         HRA
    Scaling    W' = W ∘ l                       one factor an output or an input
    Renorm     W' = (W + sΔ)·m / ‖W + sΔ‖       DoRA
    several    W' = (W·R1·R2·…) ∘ l + Σ s·Δ, then a Renorm (core/law.py)

Weights are canonical, (o, i, *k), and as matrices (o, i·∏k). ``fold`` computes in float32 at least
and rounds once; ``apply`` is the layer's forward with the update in it, and differentiable.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from adaptsurgery.core.cost import ApplyForm, cheapest, folding
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.law import Order, in_order, order_of, unknown_update
from adaptsurgery.core.rounding import round_into, rounded
from adaptsurgery.core.strength import times
from adaptsurgery_formats.errors import InexactError, ShapeError, ValueRefused
from adaptsurgery_formats.traits import traits_of

U = TypeVar("U", bound="Update")
Gates = Tensor | Sequence[Tensor | None] | None
BLOCK = 32 * 1024  # numbers in a block of rows: 128 KiB of float32 stays in cache
_LEAST = 2.0**-32  # of the scales that are multiplied in float32, and their inverse the most
LINE = 32  # rows at least, so that a block of a transposed weight still fills cache lines


class Update(ABC):
    """Something that turns a weight W into W'.

    ``order`` is its place among several on one weight, and an update that says none is refused there;
    ``weighs`` says whether it has a meaning at other strengths than 1, and ``reversible`` whether it
    can be taken out of a weight again. ``takes`` is what its class takes beside tensors and options.
    """

    name: ClassVar[str] = ""
    order: ClassVar[Order | None] = None
    weighs: ClassVar[bool] = False
    reversible: ClassVar[bool] = False
    takes: ClassVar[tuple[str, ...]] = ()

    @property
    def plain(self) -> Update:
        """The update that this one goes around; itself where it goes around none."""
        return self

    @property
    def on_weight(self) -> bool:
        """Whether it changes the weight at all: a bias's difference alone does not."""
        return True

    @property
    def on_bias(self) -> bool:
        """Whether it changes the bias."""
        return False

    def tensors(self) -> dict[str, Tensor]:
        """The slots that are present."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def check_fits(self, shape: Iterable[int]) -> None:
        """Raise ShapeError unless it fits a weight (o, i, *k)."""
        raise unknown_update(self, "a weight")

    def check_values(self) -> None:
        """Raise ValueRefused where the numbers define no update. Reads the data."""
        return

    @abstractmethod
    def folded(self, weight: Tensor, gate: Tensor | None = None) -> Tensor:
        """W' as one differentiable expression, in the dtype of W; W + g·(W' − W) with a gate."""

    @abstractmethod
    def apply(
        self,
        x: Tensor,
        layer: Layer,
        form: ApplyForm = "auto",
        gate: Gates = None,
        seen: Gates = None,
    ) -> Tensor:
        """The output of ``layer`` with W' for W, without building W' where that is dearer.

        ``form`` "auto" chooses by core/cost.py from shapes and token count; "factored" and
        "folded" choose ahead, and then no size of ``x`` is read. For dropouts, as data flow:
        ``gate`` (o,) or 0-d multiplies what the update adds to the output, W'x − Wx; ``seen`` is
        the input that the update sees where the base sees ``x``: W·x + (W' − W)·seen. A
        Composition takes a sequence of either, one a part in the order of ``parts_of``.
        """

    def scaled(self, weight: float) -> Update:
        """The update at ``weight`` times its strength; ValueRefused where that has no meaning."""
        return only_whole(self, weight)

    def fold(self, weight: Tensor, *, compute: torch.dtype | None = None) -> Tensor:
        """W' for a canonical W: computed in ``compute`` (float32 at least), rounded once.

        Raises ValueRefused for a weight that is not floating, ShapeError for one that Δ or R does
        not fit. Records no gradient.
        """
        wide = compute_dtype(weight, compute)
        with torch.no_grad():
            return rounded(self.folded(weight.to(wide)), weight.dtype)

    def unfold(self, weight: Tensor, *, compute: torch.dtype | None = None) -> Tensor:
        """W for a W': the inverse of ``fold``, up to the rounding of W's dtype."""
        self.check_reversible()
        raise NotImplementedError(f"{type(self).__name__}.unfold")

    def check_reversible(self) -> None:
        """Raise InexactError ("no-inverse") for what cannot be taken out of a weight again."""
        if not self.reversible:
            raise InexactError(
                f"{self.name} cannot be taken out of a weight again: a norm was replaced",
                next="keep the base weight",
                code="no-inverse",
            )

    def fold_bias(
        self, bias: Tensor | None, dtype: torch.dtype | None = None, gate: Tensor | None = None
    ) -> Tensor | None:
        """The layer's bias with the update in it, in the bias's dtype (``dtype`` where it has none)."""
        return bias

    def unfold_bias(self, bias: Tensor) -> Tensor:
        """The bias before ``fold_bias``, up to its rounding."""
        return bias


@dataclass(frozen=True, eq=False, kw_only=True)
class Delta(Update):
    """W' = W + s·Δ, with s = ``scale``, the one attribute that fold and apply both read.

    ``weight_shape`` (o, i, *k) is needed only where the factors hide the kernel and a Δ of that
    shape is wanted; everything else takes it from the weight.
    """

    scale: float = 1.0
    weight_shape: tuple[int, ...] | None = None

    order: ClassVar[Order] = Order.ADD
    weighs: ClassVar[bool] = True
    reversible: ClassVar[bool] = True
    takes: ClassVar[tuple[str, ...]] = ("scale", "weight_shape")

    def __post_init__(self) -> None:
        if wrong := self.misfit():
            shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in self.tensors().items())
            raise ShapeError(f"{self.name}: {wrong}", seen=shapes)
        if self.weight_shape is not None:
            self.check_fits(self.weight_shape)

    def misfit(self) -> str:
        """What does not fit in the slots' shapes, as algebra, or an empty string."""
        return traits_of(self.name).misfit(self._shapes())

    @property
    def extent(self) -> tuple[int, int]:
        """The shape (o, i·∏k) of Δ as a matrix."""
        return traits_of(self.name).extent(self._shapes(), {})

    @property
    def kernel(self) -> tuple[int, ...] | None:
        """The kernel's dims, or None where the tensors hide them."""
        return traits_of(self.name).kernel(self._shapes())

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {slot: tuple(tensor.shape) for slot, tensor in self.tensors().items()}

    @abstractmethod
    def matrix(self) -> Tensor:
        """Δ (o, i·∏k) in the factors' own dtype, differentiable."""

    @abstractmethod
    def add_rows_(self, block: Tensor, start: int, stop: int, factor: float) -> None:
        """Add ``factor``·Δ[start:stop] to ``block`` (stop − start, i·∏k), in place.

        Called on a ``prepared`` delta of the block's dtype.
        """

    @abstractmethod
    def delta(self, x: Tensor, layer: Layer, form: ApplyForm = "factored") -> Tensor:
        """What ``layer`` gives with the weight Δ, unscaled and without a bias, from the factors."""

    def prices(self, positions: int, layer: Layer, training: bool) -> dict[ApplyForm, int]:
        """What each form of ``apply`` costs; see core/cost.py."""
        return {"factored": 0}

    def flat(self) -> Self:
        """The same Δ with fewer factors, ready to be read row by row."""
        return self

    def transposed(self) -> Delta | None:
        """Δᵀ (i, o) as a Delta of the same scale, for weights stored so; None where it has no form.

        It is for a Δ without a kernel; a bias difference stays behind.
        """
        return None

    def bias_delta(self) -> Tensor | None:
        """What is added to the bias, unscaled."""
        return None

    @property
    def on_bias(self) -> bool:
        return self.bias_delta() is not None

    def norms(self, weight: Tensor, axis: int) -> Tensor:
        """‖W + sΔ‖ of every output (``axis`` 0) or input (1): a vector."""
        return axis_norms(self.folded(weight), axis)

    @property
    def shape(self) -> tuple[int, ...]:
        """(o, i, *k), or (o, i·∏k) where the kernel is hidden and no weight_shape was given."""
        if self.weight_shape is not None:
            return self.weight_shape
        kernel = self.kernel or ()
        return (self.extent[0], self.extent[1] // math.prod(kernel), *kernel)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Δ in the layer's canonical shape, unscaled; float32 at least unless ``dtype`` says."""
        return self.cast(dtype or self.wide_dtype()).flat().matrix().reshape(self.shape)

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Δ[start:stop] as a matrix (stop − start, i·∏k), unscaled, building nothing else of Δ."""
        wide = dtype or self.wide_dtype()
        ready = self.prepared(wide)
        with torch.no_grad():
            device = next(iter(ready.tensors().values())).device
            block = torch.zeros((stop - start, self.extent[1]), dtype=wide, device=device)
            ready.add_rows_(block, start, stop, 1.0)
        return block

    def folded(self, weight: Tensor, gate: Tensor | None = None) -> Tensor:
        self.check_fits(weight.shape)
        wide = wide_for_scale(compute_dtype(weight), self.scale, weight.device)
        matrix = self.cast(wide, weight.device).flat().matrix()
        change = gated(self.scale * matrix.reshape(weight.shape), gate)
        return (weight.to(wide) + change).to(weight.dtype)

    def fold(self, weight: Tensor, *, compute: torch.dtype | None = None) -> Tensor:
        return self._shift(weight, self.scale, compute)

    def unfold(self, weight: Tensor, *, compute: torch.dtype | None = None) -> Tensor:
        return self._shift(weight, -self.scale, compute)

    def _shift(self, weight: Tensor, factor: float, compute: torch.dtype | None) -> Tensor:
        """W + factor·Δ, a block of rows at a time."""
        wide = compute_dtype(weight, compute)
        wide = wide_for_scale(wide, factor, weight.device)
        self.check_fits(weight.shape)
        ready = self.prepared(wide, weight.device)

        def shifted(block: Tensor, start: int) -> Tensor:
            ready.add_rows_(block, start, start + block.shape[0], factor)
            return block

        return by_rows(weight, wide, shifted)

    def fold_bias(
        self, bias: Tensor | None, dtype: torch.dtype | None = None, gate: Tensor | None = None
    ) -> Tensor | None:
        difference = self.bias_delta()
        if difference is None:
            return bias
        if bias is None:
            return gated(self.scale * widened(difference), gate).to(dtype or difference.dtype)
        if bias.shape != difference.shape:
            raise ShapeError(
                f"{self.name}: a bias difference {list(difference.shape)} for a bias {list(bias.shape)}"
            )
        shift = gated(self.scale * difference.to(bias.device, compute_dtype(bias)), gate)
        return (bias.to(shift.dtype) + shift).to(bias.dtype)

    def unfold_bias(self, bias: Tensor) -> Tensor:
        back = replace(self, scale=-self.scale).fold_bias(bias)
        assert back is not None
        return back

    def apply(
        self,
        x: Tensor,
        layer: Layer,
        form: ApplyForm = "auto",
        gate: Gates = None,
        seen: Gates = None,
    ) -> Tensor:
        gate, seen = only_one(gate), only_one(seen)
        if layer.shape != self.weight_shape:  # which was held against Δ when it was given
            self.check_fits(layer.shape)
        bias = self.fold_bias(layer.bias, layer.weight.dtype, gate)
        chosen = self.choose(x, layer, form)
        if chosen != "folded" or seen is not None:
            out = layer.forward(x, bias=bias)
            return self.onto(out, x if seen is None else seen, layer, chosen, gate)
        blocks = layer.weight.numel() > BLOCK
        if gate is None and form == "auto" and blocks and not self.training(x):
            # A fold by blocks is some times faster, and has no gradient to record.
            return layer.forward(x, self.fold(layer.canonical()), bias)
        return layer.forward(x, self.folded(layer.canonical(), gate), bias)

    def onto(
        self, out: Tensor, x: Tensor, layer: Layer, form: ApplyForm, gate: Tensor | None = None
    ) -> Tensor:
        """``out`` and what the update adds to the layer's output: g·s·Δ·x, without a bias."""
        if form == "folded":
            full = self.like(layer.sample(x)).flat().matrix().reshape(layer.shape)
            y = layer.forward(x, gated(full, gate), None)
        else:
            y = self.delta(x, layer, form)
            y = y if gate is None else y * layer.over_channels(gate.to(y))
        # Not torch.add(out, y, alpha=…): torch 2.13's inductor loses alpha where y is a matrix product.
        return out + (y if self.scale == 1.0 else self.scale * y)

    def choose(self, x: Tensor, layer: Layer, form: ApplyForm = "auto") -> ApplyForm:
        """The form that ``apply`` takes: grouped layers fold, "auto" takes the cheapest."""
        if layer.groups > 1:
            return "folded"
        if form != "auto" or type(self).prices is Delta.prices:
            return "factored" if form == "auto" else form
        return cheapest(self.prices(layer.positions(x), layer, self.training(x)))

    def training(self, x: Tensor) -> bool:
        """Whether a gradient through this update is wanted."""
        return tracked(x, *self.tensors().values())

    def folding_price(self, build: int, positions: int, training: bool) -> int:
        return folding(build, math.prod(self.extent), positions, training)

    def scaled(self, weight: float) -> Self:
        return self if weight == 1.0 else replace(self, scale=times(weight, self.scale))

    def wide_dtype(self) -> torch.dtype:
        """float64 where a factor is, else float32."""
        held = {tensor.dtype for tensor in self.tensors().values()}
        return torch.float64 if torch.float64 in held else torch.float32

    def cast(self, dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """The same update with its tensors in ``dtype`` (and on ``device``)."""
        held = self.tensors()
        for tensor in held.values():
            if tensor.dtype != dtype or (device is not None and tensor.device != device):
                changes: dict[str, Any] = {n: t.to(device, dtype) for n, t in held.items()}
                return replace(self, **changes)
        return self

    def like(self, sample: Tensor) -> Self:
        """Cast to the dtype and device of ``sample``."""
        return self.cast(sample.dtype, sample.device)

    def prepared(self, dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """Cast, flat and ready for ``add_rows_``."""
        return self.cast(dtype, device).flat()

    def check_fits(self, shape: Iterable[int]) -> None:
        """Raise ShapeError unless Δ has the shape (o, i, *k)."""
        shape = tuple(shape)
        outputs, columns = self.extent
        if shape[0] == outputs and math.prod(shape[1:]) == columns:
            if not self.kernel or self.kernel == shape[2:] or math.prod(self.kernel) == 1:
                return
        kernel = "" if not self.kernel else f", kernel {list(self.kernel)}"
        raise ShapeError(
            f"{self.name}: Δ is ({outputs}, {columns}){kernel}, and the weight is {list(shape)}"
        )


class Rotation(Update):
    """W' = W·R with an orthogonal R (i·∏k, i·∏k), on the input side of the weight."""

    order: ClassVar[Order] = Order.TURN
    reversible: ClassVar[bool] = True

    @abstractmethod
    def turning(self, sample: Tensor, back: bool = False) -> Callable[[Tensor], Tensor]:
        """The map of rows (…, i·∏k) to rows·R, or to rows·Rᵀ = rows·R⁻¹ where ``back``.

        It works in the dtype and on the device of ``sample``, and takes an fx.Proxy for rows.
        """

    def turning_(self, sample: Tensor, back: bool = False) -> Callable[[Tensor], object]:
        """``turning`` in place, on a matrix of rows of any strides."""
        turn = self.turning(sample, back)
        return lambda rows: rows.copy_(turn(rows))

    @abstractmethod
    def then(self, other: Rotation) -> Rotation:
        """R·R_other: this rotation, and the other on the result."""

    @abstractmethod
    def inverse(self) -> Rotation:
        """Rᵀ as a rotation."""

    @property
    @abstractmethod
    def size(self) -> int:
        """The length i·∏k of the rows that R turns."""

    def folded(self, weight: Tensor, gate: Tensor | None = None) -> Tensor:
        self.check_fits(weight.shape)
        rows = weight.flatten(1).to(compute_dtype(weight))
        turned = self.turning(rows)(rows)
        turned = turned if gate is None else rows + gated(turned - rows, gate)
        return turned.reshape(weight.shape).to(weight.dtype)

    def fold(self, weight: Tensor, *, compute: torch.dtype | None = None) -> Tensor:
        return self._turned(weight, compute, back=False)

    def unfold(self, weight: Tensor, *, compute: torch.dtype | None = None) -> Tensor:
        return self._turned(weight, compute, back=True)

    def _turned(self, weight: Tensor, compute: torch.dtype | None, back: bool) -> Tensor:
        """W·R or W·Rᵀ, a block of rows at a time."""
        self.check_fits(weight.shape)
        self.check_values()
        wide = compute_dtype(weight, compute, exact=True)
        with torch.no_grad():
            turn = self.turning(torch.empty(0, dtype=wide, device=weight.device), back)
        return by_rows(weight, wide, lambda block, start: turn(block))

    def apply(
        self,
        x: Tensor,
        layer: Layer,
        form: ApplyForm = "auto",
        gate: Gates = None,
        seen: Gates = None,
    ) -> Tensor:
        """A linear's input is turned, W·R·x = W·(R·x); a convolution adds W·R − W by its factors."""
        gate, seen = only_one(gate), only_one(seen)
        self.check_fits(layer.shape)
        if seen is not None or (gate is not None and gate.dim() > 0):
            return _in_order(x, layer, [(self, gate, seen)], layer.bias)
        chosen = self.choose(x, layer, form)
        if chosen == "folded":
            return layer.forward(x, self.folded(layer.canonical(), gate))
        if layer.kind == "linear":
            return layer.forward(self.turned(x, layer, gate))
        return self.change(layer.canonical()).onto(layer.forward(x), x, layer, chosen, gate)

    def choose(self, x: Tensor, layer: Layer, form: ApplyForm = "auto") -> ApplyForm:
        """The form that ``apply`` takes: grouped layers and embeddings fold, a linear is factored."""
        if layer.groups > 1 or layer.kind == "embedding":
            return "folded"
        if form != "auto" or layer.kind == "linear":
            return "folded" if form == "folded" else "factored"
        return cheapest(self.prices(layer.positions(x), layer, self.training(x)))

    @abstractmethod
    def training(self, x: Tensor) -> bool:
        """Whether a gradient through this update is wanted."""

    @abstractmethod
    def change(self, weight: Tensor) -> Delta:
        """W·R − W for a canonical ``weight``, of low rank; differentiable, right for it only."""

    @abstractmethod
    def prices(self, positions: int, layer: Layer, training: bool) -> dict[ApplyForm, int]:
        """What each form of ``apply`` costs on a convolution; see core/cost.py."""

    def turned(self, x: Tensor, layer: Layer, gate: Tensor | None = None) -> Tensor:
        """R·x, the input of a linear layer that is turned; x + g·(R·x − x) with a gate, 0-d."""
        turned = self.turning(layer.sample(x), back=True)(x)
        return turned if gate is None else x + gate.to(layer.sample(x)) * (turned - x)

    def check_fits(self, shape: Iterable[int]) -> None:
        """Raise ShapeError unless R turns the rows of a weight (o, i, *k)."""
        shape = tuple(shape)
        if math.prod(shape[1:]) != self.size:
            raise ShapeError(
                f"{self.name}: R turns rows of {self.size}, and the weight {list(shape)} has rows "
                f"of {math.prod(shape[1:])}"
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class Scaling(Update):
    """W' = W ∘ l: a factor l an output, which the bias takes as well, or a factor an input.

    At ``scale`` s it goes part of the way, W + s·(W ∘ l − W): the factors are 1 + s·(l − 1).
    """

    scale: float = 1.0

    order: ClassVar[Order] = Order.SCALE
    weighs: ClassVar[bool] = True
    reversible: ClassVar[bool] = True
    takes: ClassVar[tuple[str, ...]] = ("scale",)

    @property
    @abstractmethod
    def axis(self) -> int:
        """0 where every output has its factor, 1 where every input has."""

    @abstractmethod
    def less_one(self) -> Tensor:
        """l − 1 as a vector (o,) or (i,), unscaled, in float32 at least; differentiable."""

    @property
    def on_bias(self) -> bool:
        return self.axis == 0

    def factors(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """1 + s·(l − 1), a vector."""
        return 1 + self.scale * self.less_one().to(device, dtype)

    def divisors(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """The inverse of the factors, which takes them out of a weight again."""
        self.check_reversible()
        return self.factors(dtype, device).reciprocal()

    def check_reversible(self) -> None:
        factors = self.factors(torch.float64).detach()
        if not bool(factors.all()):
            raise InexactError(
                f"{self.name} cannot be taken out of a weight again: it multiplies by 0",
                seen=f"{int((factors == 0).sum())} of {factors.numel()} factors",
                next="keep the base weight",
                code="no-inverse",
            )

    def check_fits(self, shape: Iterable[int]) -> None:
        shape, count = tuple(shape), self.less_one().numel()
        if len(shape) <= self.axis or shape[self.axis] != count:
            side = "inputs" if self.axis else "outputs"
            raise ShapeError(f"{self.name}: factors of {count} {side} for a weight {list(shape)}")

    def scaled(self, weight: float) -> Self:
        return self if weight == 1.0 else replace(self, scale=times(weight, self.scale))

    def folded(self, weight: Tensor, gate: Tensor | None = None) -> Tensor:
        self.check_fits(weight.shape)
        wide = weight.to(compute_dtype(weight))
        factors = self.factors(wide.dtype, wide.device)
        if gate is None:
            return (wide * self._along(wide, factors)).to(weight.dtype)
        return (wide + gated(wide * self._along(wide, factors - 1), gate)).to(weight.dtype)

    def fold(self, weight: Tensor, *, compute: torch.dtype | None = None) -> Tensor:
        return self._multiplied(weight, compute, self.factors)

    def unfold(self, weight: Tensor, *, compute: torch.dtype | None = None) -> Tensor:
        return self._multiplied(weight, compute, self.divisors)

    def _multiplied(
        self,
        weight: Tensor,
        compute: torch.dtype | None,
        factors: Callable[[torch.dtype, torch.device], Tensor],
    ) -> Tensor:
        self.check_fits(weight.shape)
        wide = weight.to(compute_dtype(weight, compute, exact=True))
        with torch.no_grad():
            product = wide * self._along(wide, factors(wide.dtype, wide.device))
            return rounded(product, weight.dtype)

    def _along(self, weight: Tensor, vector: Tensor) -> Tensor:
        return vector.view([-1 if dim == self.axis else 1 for dim in range(weight.dim())])

    def fold_bias(
        self, bias: Tensor | None, dtype: torch.dtype | None = None, gate: Tensor | None = None
    ) -> Tensor | None:
        if bias is None or not self.on_bias:
            return bias
        wide = bias.to(compute_dtype(bias))
        if gate is None:
            return (wide * self.factors(wide.dtype, wide.device)).to(bias.dtype)
        change = wide * (self.factors(wide.dtype, wide.device) - 1)
        return (wide + gated(change, gate)).to(bias.dtype)

    def unfold_bias(self, bias: Tensor) -> Tensor:
        if not self.on_bias:
            return bias
        wide = bias.to(compute_dtype(bias))
        return (wide * self.divisors(wide.dtype, wide.device)).to(bias.dtype)

    def apply(
        self,
        x: Tensor,
        layer: Layer,
        form: ApplyForm = "auto",
        gate: Gates = None,
        seen: Gates = None,
    ) -> Tensor:
        """The factors go on the input's or the output's channels; grouped layers and look-ups fold."""
        gate, seen = only_one(gate), only_one(seen)
        self.check_fits(layer.shape)
        bias = self.fold_bias(layer.bias, layer.weight.dtype, gate)
        if form == "folded" or layer.groups > 1 or layer.kind == "embedding":
            return _in_order(x, layer, [(self, gate, seen)], bias)
        sample = layer.sample(x)
        factors = layer.over_channels(self.factors(sample.dtype, sample.device))
        if gate is None and seen is None and self.axis == 1:
            return layer.forward(x * factors, bias=bias)
        y, other = layer.forward(x, bias=None), x if seen is None else seen
        if self.axis == 1:
            added = layer.forward(other * (factors - 1), bias=None)
        else:
            added = (y if seen is None else layer.forward(other, bias=None)) * (factors - 1)
        y = y + (added if gate is None else added * layer.over_channels(gate.to(added)))
        return y if bias is None else y + layer.over_channels(bias)


@dataclass(frozen=True, eq=False)
class Renorm(Update):
    """W' = (W + sΔ) with new norms, around a Delta."""

    inner: Delta

    order: ClassVar[Order] = Order.RENEW

    @property
    def plain(self) -> Delta:
        return self.inner

    @property
    def on_bias(self) -> bool:
        return self.inner.on_bias

    def tensors(self) -> dict[str, Tensor]:
        return self.inner.tensors() | super().tensors()

    def check_fits(self, shape: Iterable[int]) -> None:
        self.inner.check_fits(shape)

    @property
    @abstractmethod
    def axis(self) -> int:
        """0 where every output has its norm, 1 where every input has."""

    @abstractmethod
    def renorm_(self, weight: Tensor, start: int = 0) -> None:
        """Give the outputs of W + sΔ from ``start`` on (n, i, *k) their new norms, in place.

        Needs all outputs where the norms are the inputs'.
        """

    @abstractmethod
    def renormed(self, weight: Tensor) -> Tensor:
        """``weight`` (W + sΔ, in at least float32) with the new norms."""

    def folded(self, weight: Tensor, gate: Tensor | None = None) -> Tensor:
        wide = weight.to(compute_dtype(weight))
        new = self.renormed(self.inner.folded(wide))
        return (new if gate is None else wide + gated(new - wide, gate)).to(weight.dtype)

    def fold(self, weight: Tensor, *, compute: torch.dtype | None = None) -> Tensor:
        wide = weight.to(compute_dtype(weight, compute, exact=True))
        with torch.no_grad():
            self.renorm_(new := self.inner.fold(wide))
            return rounded(new, weight.dtype)

    def fold_bias(
        self, bias: Tensor | None, dtype: torch.dtype | None = None, gate: Tensor | None = None
    ) -> Tensor | None:
        return self.inner.fold_bias(bias, dtype, gate)


@dataclass(frozen=True, eq=False)
class Composition(Update):
    """Several updates on one layer, by the law's order; ``compose`` makes it."""

    parts: tuple[Update, ...]

    name: ClassVar[str] = "composition"

    @property
    def exact(self) -> bool:
        """Whether the sum has to be exact, since some part does not add."""
        return any(order_of(part) is not Order.ADD for part in self.parts)

    def check_fits(self, shape: Iterable[int]) -> None:
        shape = tuple(shape)
        for update in self.parts:
            update.check_fits(shape)

    def check_reversible(self) -> None:
        for update in self.parts:
            update.check_reversible()

    def folded(self, weight: Tensor, gate: Tensor | None = None) -> Tensor:
        wide = first = weight.to(compute_dtype(weight))
        for update in self.parts:
            wide = update.folded(wide)
        wide = wide if gate is None else first + gated(wide - first, gate)
        return wide.to(weight.dtype)

    def fold(self, weight: Tensor, *, compute: torch.dtype | None = None) -> Tensor:
        out = weight.to(compute_dtype(weight, compute, exact=self.exact))
        for update in self.parts:
            out = update.fold(out)
        return rounded(out, weight.dtype)

    def unfold(self, weight: Tensor, *, compute: torch.dtype | None = None) -> Tensor:
        out = weight.to(compute_dtype(weight, compute, exact=self.exact))
        for update in reversed(self.parts):
            out = update.unfold(out)
        return rounded(out, weight.dtype)

    def fold_bias(
        self, bias: Tensor | None, dtype: torch.dtype | None = None, gate: Tensor | None = None
    ) -> Tensor | None:
        for update in self.parts:
            bias = update.fold_bias(bias, dtype, gate)
        return bias

    def apply(
        self,
        x: Tensor,
        layer: Layer,
        form: ApplyForm = "auto",
        gate: Gates = None,
        seen: Gates = None,
    ) -> Tensor:
        """Every Delta sees the original x, whatever the rotations do to the base's input."""
        parts = list(zip(self.parts, self._each(gate), self._each(seen)))
        bias = layer.bias
        for update, g, _ in parts:
            bias = update.fold_bias(bias, layer.weight.dtype, g)
        turned = [part for part in parts if isinstance(part[0], Rotation)]
        added = [part for part in parts if isinstance(part[0], Delta)]
        plain = all((g is None or g.dim() == 0) and other is None for _, g, other in turned)
        if len(turned) + len(added) < len(parts) or form == "folded" or not plain:
            return _in_order(x, layer, parts, bias)
        weight, rotated = layer.canonical(), x
        turning = bool(turned) and layer.kind == "linear"
        for rotation, g, _ in reversed(turned) if turning else turned:
            assert isinstance(rotation, Rotation)
            if turning:
                rotated = rotation.turned(rotated, layer, g)
            else:
                weight = rotation.folded(weight, g)
        late = []
        for delta, g, other in added:
            assert isinstance(delta, Delta)
            delta.check_fits(layer.shape)
            chosen = delta.choose(x, layer, form)
            if chosen == "folded" and not turning and other is None:
                weight = delta.folded(weight, g)
            else:
                late.append((delta, x if other is None else other, chosen, g))
        out = layer.forward(rotated, weight, bias)
        for delta, other, chosen, g in late:
            out = delta.onto(out, other, layer, chosen, g)
        return out

    def _each(self, given: Gates) -> Sequence[Tensor | None]:
        """The gates, or inputs, as one for each part."""
        count = len(self.parts)
        each = list(given) if isinstance(given, (list, tuple)) else [only_one(given)] * count
        if len(each) != count:
            raise ShapeError(f"{len(each)} gates for the {count} parts of a composition")
        return each

    def scaled(self, weight: float) -> Update:
        return compose([update.scaled(weight) for update in self.parts])


def _in_order(
    x: Tensor,
    layer: Layer,
    parts: Sequence[tuple[Update, Tensor | None, Tensor | None]],
    bias: Tensor | None,
) -> Tensor:
    """W0·x + Σ (Wp − Wp−1)·seen_p, each weight from the one before, by folding."""
    now = layer.canonical()
    for_x, others = now, []
    for update, gate, seen in parts:
        new = update.folded(now, gate)
        if seen is None:
            for_x = new if for_x is now else for_x + (new - now)
        else:
            others.append(layer.forward(seen, new - now, None))
        now = new
    return sum(others, layer.forward(x, for_x, bias))


def wide_for_scale(
    wide: torch.dtype, scale: float, device: torch.device | None = None
) -> torch.dtype:
    """``wide``, or float64 for a scale that leaves float32 no room for its products."""
    return wide if scale == 0 or _LEAST <= abs(scale) <= 1 / _LEAST else widest(device)


def tracked(*tensors: Tensor) -> bool:
    """Whether autograd would record what is computed of any of the tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; True of a tensor without any, on the meta device or fake."""
    held = tensor.detach()
    return held.is_meta or isinstance(held, FakeTensor) or bool(widened(held).isfinite().all())


def gated(change: Tensor, gate: Tensor | None) -> Tensor:
    """``change`` (o, …) times a gate (o,) or 0-d; itself without one."""
    if gate is None:
        return change
    return change * gate.to(change).reshape(-1, *(1,) * (change.dim() - 1))


def only_one(given: Gates) -> Tensor | None:
    """The gate, or the input, of an update that has no parts."""
    if isinstance(given, (list, tuple)):
        if len(given) != 1:
            raise ShapeError(f"{len(given)} gates for one update")
        return given[0]
    return given  # type: ignore[return-value]


def compose(updates: Iterable[Update]) -> Update:
    """Several updates of one layer as one: W' = (W·R1·R2·…) ∘ l + Σ s·Δ, then a Renorm.

    Each comes where its own ``order`` puts it; those of one place keep theirs. Raises ValueRefused
    for a kind that has no place ("unknown-update"), and for two renorms ("two-renorms"), which
    have no order that both would agree on.
    """
    flat = in_order(part for update in updates for part in parts_of(update))
    if sum(order_of(part) is Order.RENEW for part in flat) > 1:
        raise two_renorms()
    return flat[0] if len(flat) == 1 else Composition(tuple(flat))


def two_renorms() -> ValueRefused:
    """The refusal of two updates that both renew the norms of one weight."""
    return ValueRefused(
        "two updates both set the norm of one weight",
        next="fold one into the base first",
        code="two-renorms",
    )


def parts_of(update: Update) -> tuple[Update, ...]:
    """The updates that one is composed of, by the law's order; itself where it is plain."""
    return update.parts if isinstance(update, Composition) else (update,)


def is_reversible(update: Update) -> bool:
    """Whether an update with these numbers can be taken out of a weight again."""
    try:
        update.check_reversible()
    except InexactError:
        return False
    return True


def only_whole(update: U, weight: float) -> U:
    """The update itself at weight 1; ValueRefused for any other weight."""
    if weight == 1.0:
        return update
    raise ValueRefused(
        f"{update.name or type(update).__name__} at weight {weight:g} has no meaning: it does not add",
        next="use weight 1",
        code="no-weight",
    )


def compute_dtype(
    weight: Tensor, compute: torch.dtype | None = None, *, exact: bool = False
) -> torch.dtype:
    """The dtype that a weight is folded in, float32 at least. ValueRefused unless it is floating."""
    if not weight.is_floating_point():
        raise ValueRefused(
            f"a weight of {weight.dtype} cannot take an update",
            next="dequantise it first",
            code="not-floating",
        )
    return wide_for(weight.dtype, compute, exact=exact)


def wide_for(
    stored: torch.dtype, compute: torch.dtype | None = None, *, exact: bool = False
) -> torch.dtype:
    """The dtype that ``stored`` numbers are computed in: float32, or ``compute`` if it is wider.

    It is float64 for float64, and for float16 that has to be ``exact``: with float32's 13 spare bits, the
    rounding of a sum of a few terms puts up to 1e-3 of the elements on the wrong side.
    """
    double = stored == torch.float64 or (exact and stored == torch.float16)
    least = torch.float64 if double else torch.float32
    return least if compute is None else torch.promote_types(compute, least)


def widest(device: torch.device | None) -> torch.dtype:
    """float64, or what a device (Apple's) has in its place."""
    return torch.float32 if device is not None and device.type == "mps" else torch.float64


def widened(tensor: Tensor) -> Tensor:
    """A tensor in float32 at least."""
    return tensor.to(compute_dtype(tensor))


@torch.no_grad()
def by_rows(weight: Tensor, wide: torch.dtype, change: Callable[[Tensor, int], Tensor]) -> Tensor:
    """A new weight, with every block of rows (n, i·∏k) changed in ``wide`` and rounded once.

    ``change`` is called with a copy of the block, which it may write to, and its first row's number.
    """
    outputs, columns = weight.shape[0], math.prod(weight.shape[1:])
    step = max(LINE, BLOCK // max(columns, 1))
    buffer = torch.empty((min(step, outputs), columns), dtype=wide, device=weight.device)
    out = torch.empty_like(weight)
    for start in range(0, outputs, step):
        part = weight[start : start + step]
        block = buffer[: part.shape[0]]
        block.view(part.shape).copy_(part)
        round_into(out[start : start + step], change(block, start).view(part.shape))
    return out


def axis_norms(weight: Tensor, axis: int) -> Tensor:
    """The norm of every output (``axis`` 0) or input (1) of a weight (o, i, *k): a vector."""
    others = [dim for dim in range(weight.dim()) if dim != axis]
    norms: Tensor = torch.linalg.vector_norm(weight, dim=others)
    return norms
