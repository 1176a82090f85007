"""Updates on one stored tensor, as an edit that runs over its rows and holds a block at a time.

A stored tensor is looked at as a matrix, rows × columns, in the order of its bytes:

    (o, i, *k)        o rows of i·∏k            a layer's own, canonical
    (i, o)            i rows of o               transformers' Conv1D, an embedding (vocab, dim)
    (E, o, i)         E·o rows of i             stacked experts; (E, i, o) where transposed
    (n,)              n rows of 1               a bias, a norm

``Place`` says where on it an update lies. A LoRA, LoHa, LoKr or full difference changes every row by
itself, transposed or not; so do an HRA and a DoRA that renews the outputs' norms, on canonical
storage. An HRA on transposed storage and a DoRA of the inputs' norms need all rows together.
The law is that of ``core.update.compose``: W' = (W·R1·R2·…) ∘ l + Σ w·s·Δ, then a Renorm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptsurgery.core.law import Order, order_of, unknown_update
from adaptsurgery.core.rounding import round_into, rounded
from adaptsurgery.core.update import (
    Delta,
    Renorm,
    Rotation,
    Scaling,
    Update,
    compose,
    parts_of,
    two_renorms,
    wide_for,
    wide_for_scale,
    widest,
)
from adaptsurgery_formats.errors import InexactError, ShapeError, ValueRefused

BLOCK = 256 * 1024  # numbers changed at a time: few calls, and a block stays in a core's cache
SAMPLE = 32 * 1024  # numbers of a piece whose norms are measured
FEW = 4 * 1024  # numbers that are looked at together for one that moves


@dataclass(frozen=True, eq=False)
class Placed:
    """An update, its weight, and what it covers of a stored tensor.

    ``rows`` are outputs [a, b) of the tensor (a query within a fused qkv), all where None; ``source``
    are outputs [c, d) of the update (a fused adapter on a split weight), all where None. ``expert``
    is the index in a stack (E, …); ``transposed`` says that the weight, or every expert's, is stored
    (i, o). ``bias`` takes what the update does to the bias, and the tensor is (o,).
    """

    update: Update
    weight: float = 1.0
    rows: tuple[int, int] | None = None
    source: tuple[int, int] | None = None
    expert: int | None = None
    transposed: bool = False
    bias: bool = False


@dataclass(frozen=True, eq=False)
class Grid:
    """The factors of a quantised tensor's numbers, which come before anything is added.

    Number [m, n] of the stored matrix is multiplied by values[m // a, n // b], (a, b) = ``block``;
    an a or b of 0 stands for as many rows or columns as make ``values`` (p, q) cover all.
    """

    values: Tensor
    block: tuple[int, int] = (0, 0)

    def step(self, rows: int, columns: int) -> RegionChange:
        """The multiplication as the first step of an edit."""
        p, q = self.values.shape
        a, b = self.block[0] or -(-rows // p), self.block[1] or -(-columns // q)

        def scale(view: Tensor, start: int) -> None:
            lines = torch.arange(start, start + view.shape[0], device=self.values.device) // a
            factors = self.values[lines]
            view.mul_(factors if q == 1 else factors.repeat_interleave(b, 1)[:, :columns])

        return RegionChange(_Region(0, rows, 0, columns, (rows, columns), False), False, scale)


class _Region(NamedTuple):
    """Stored rows [top, bottom), columns [left, right), and the canonical shape of what is there."""

    top: int
    bottom: int
    left: int
    right: int
    shape: tuple[int, ...]
    transposed: bool

    def meets(self, other: _Region) -> bool:
        rows = max(self.top, other.top) < min(self.bottom, other.bottom)
        return rows and max(self.left, other.left) < min(self.right, other.right)


class RegionChange(NamedTuple):
    """One update on one region: ``change(view, n)`` for the region's stored rows from n on.

    A ``whole`` step takes all rows of the region at once, any other some of them.
    """

    region: _Region
    whole: bool
    change: Callable[[Tensor, int], object]


class BlockEdit:
    """What a list of places does to a stored tensor seen as ``rows`` × ``columns``.

    ``unit`` is the number of rows that have to come together: 1 where every row changes by itself,
    all rows (of an expert) where not. ``compute`` is the dtype of the blocks, ``turns`` says whether
    a rotation or a renorm is among the updates, and ``narrow`` that numbers come and go as float32,
    whatever ``compute`` is. ``edit_of`` builds it.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        unit: int,
        steps: Sequence[RegionChange],
        compute: torch.dtype,
        turns: bool,
    ) -> None:
        self.rows, self.columns, self.unit = rows, columns, unit
        self.compute, self.turns, self.narrow = compute, turns, False
        self.steps = tuple(steps)
        self.stride = stride_of(columns)

    @property
    def whole(self) -> bool:
        """Whether more than a row is needed at once."""
        return self.unit > 1

    @torch.no_grad()
    def apply(self, block: Tensor, start: int = 0) -> None:
        """Change rows [start, start + n) of the tensor, given as ``block`` (n, columns), in place.

        The block has the dtype ``compute``. ``start`` and n are multiples of ``unit``. A single
        step takes the block as it is; several go through it in pieces that stay in cache.
        """
        steps = self.between(start, start + block.shape[0])
        if len(steps) == 1:
            run_steps(steps, (block,), start)
        elif any(step.whole for step in steps):
            for step in steps:
                pieces = (block,) if step.whole else torch.split(block, self.stride)
                run_steps([step], pieces, start)
        else:
            run_steps(steps, torch.split(block, self.stride), start)

    def between(self, start: int, stop: int) -> list[RegionChange]:
        """The steps that change any of the rows [start, stop)."""
        return [s for s in self.steps if s.region.top < stop and start < s.region.bottom]


def run_steps(steps: Sequence[RegionChange], pieces: Iterable[Tensor], start: int) -> None:
    """Every step on each piece in turn; the first piece begins with the row ``start``."""
    for piece in pieces:
        stop = start + piece.shape[0]
        for region, _, change in steps:
            top, bottom, left, right = region[:4]
            if top <= start and stop <= bottom and right - left == piece.shape[1]:
                change(piece, start - top)
            elif max(start, top) < min(stop, bottom):
                low, high = max(start, top), min(stop, bottom)
                change(piece[low - start : high - start, left:right], low - top)
        start = stop


def stride_of(columns: int) -> int:
    """How many rows make up a block that stays in cache."""
    return max(1, BLOCK // max(columns, 1))


@torch.no_grad()
def edit_of(
    places: Iterable[Placed],
    shape: tuple[int, ...],
    compute: torch.dtype = torch.float32,
    device: torch.device | None = None,
    *,
    inverse: bool = False,
    grid: Grid | None = None,
) -> BlockEdit:
    """The edit of a tensor stored with ``shape``, on blocks of the dtype ``compute``.

    The updates come in the law's order, those of one kind in the order given; ``inverse`` takes them
    out in the opposite order. ``grid`` comes before everything. Factors are cast once, here. Raises
    ShapeError where an update does not fit its place, ValueRefused for a kind that no block knows
    ("unknown-update"), a weight other than 1 on what does not add ("no-weight"), two renorms on one
    place ("two-renorms"), numbers that are no rotation, and InexactError ("no-inverse",
    "cannot-split") for what cannot be taken out, or cut.
    """
    pairs = check_places(places, shape, inverse=inverse)
    stacked = len(shape) > 1 and any(place.expert is not None for place, _ in pairs)
    rows = math.prod(shape[: 2 if stacked else 1])
    columns = math.prod(shape[2 if stacked else 1 :])
    compute = _for_scales(compute, [part for _, part in pairs], device)
    ready = _Building(shape, compute, device, inverse)
    inner = [(place, part.plain) for place, part in pairs if part.plain is not part]
    placed = sorted([*pairs, *inner], key=lambda one: order_of(one[1]))
    steps = [ready.step(place, part) for place, part in placed]
    if inverse:
        steps.reverse()
    if grid is not None:
        steps.insert(0, grid.step(rows, columns))
    unit = rows // shape[0] if stacked else rows
    unit = unit if any(s.whole for s in steps) else 1
    turns = any(order_of(part) is not Order.ADD for _, part in placed)
    return BlockEdit(rows, columns, unit, steps, compute, turns)


def _for_scales(
    compute: torch.dtype, parts: Iterable[Update], device: torch.device | None
) -> torch.dtype:
    """``compute``, or float64 where one of the scales needs it."""
    for part in parts:
        compute = wide_for_scale(compute, getattr(part.plain, "scale", 1.0), device)
    return compute


def edit_for(
    build: Callable[[torch.dtype], BlockEdit],
    source: torch.dtype,
    target: torch.dtype,
    compute: torch.dtype,
    device: torch.device | None = None,
) -> BlockEdit:
    """The edit that ``build`` makes for a dtype, in the one that ``core.update.wide_for`` wants.

    ``source`` and ``target`` are what the tensor is stored in before and after, and ``compute`` is
    what was asked for, at least. Deltas reach float16 from float64 through float32 unless float64
    was asked for: two roundings, which put 6e-5 of the numbers on the wrong side, and are quick.
    A ``device`` without float64 (Apple's) does what it can.
    """
    asked = wide_for(source, compute)
    exact = widest(device) == torch.float64
    edit = build(torch.promote_types(asked, wide_for(target, exact=exact)))
    wider = asked == torch.float32 and edit.compute != asked
    edit.narrow = wider and target.itemsize < 4 and not edit.turns
    return edit


def check_places(
    places: Iterable[Placed], shape: tuple[int, ...], *, inverse: bool = False
) -> list[tuple[Placed, Update]]:
    """The plain updates of places at their weights; raises what ``edit_of`` raises."""
    pairs = [(place, part) for place in places for part in _parts(place)]
    for place, part in pairs:
        _check_place(place, part, shape, inverse)
    _refuse_two_renorms(pairs, shape)
    return pairs


def _parts(place: Placed) -> Iterator[Update]:
    """The update at its weight, taken apart; for a bias, only what changes it."""
    for part in parts_of(compose([place.update.scaled(place.weight)])):
        _kind_of(part)
        if not place.bias:
            yield part
        elif part.on_bias:
            yield part.plain


def _check_place(
    place: Placed, part: Update, shape: tuple[int, ...], inverse: bool = False
) -> None:
    """Raise unless ``part`` of a place's update fits a tensor stored with ``shape``."""
    if inverse:
        part.check_reversible()
    _kind_of(part).check(place, part, shape)


def _check_rotation(place: Placed, rotation: Rotation, shape: tuple[int, ...]) -> None:
    rotation.check_values()
    rotation.check_fits(_region(place, shape).shape)


def _check_delta(place: Placed, delta: Delta, shape: tuple[int, ...]) -> None:
    _check_outputs(place, delta, _outputs(delta, place), shape)


def _check_scaling(place: Placed, scaling: Scaling, shape: tuple[int, ...]) -> None:
    outputs = (place.source or (0, _region(place, shape).shape[0]))[1]
    counted = scaling.less_one().numel() if scaling.axis == 0 else outputs
    _check_outputs(place, scaling, counted, shape)


def _check_outputs(place: Placed, part: Update, outputs: int, shape: tuple[int, ...]) -> None:
    """Raise ShapeError unless a place takes as many of an update's ``outputs`` as lie there."""
    region = _region(place, shape)
    first, last = place.source or (0, outputs)
    if not 0 <= first <= last <= outputs or last - first != region.shape[0]:
        raise ShapeError(
            f"{part.name}: outputs {first}:{last} of {outputs} for {region.shape[0]} of the tensor",
            seen=f"stored as {list(shape)}",
        )
    if not place.bias:
        part.check_fits((outputs, *region.shape[1:]))


def _check_renorm(place: Placed, renorm: Renorm, shape: tuple[int, ...]) -> None:
    if renorm.axis == 1 and place.source not in (None, (0, renorm.inner.extent[0])):
        raise InexactError(
            f"{renorm.name}: the norms of inputs are those of all outputs, and this weight holds some",
            next="an adapter split as the base is",
            code="cannot-split",
        )
    _check_delta(place, renorm.inner, shape)


def _outputs(delta: Delta, place: Placed) -> int:
    vector = delta.bias_delta() if place.bias else None
    return delta.extent[0] if vector is None else vector.shape[0]


def _refuse_two_renorms(pairs: Sequence[tuple[Placed, Update]], shape: tuple[int, ...]) -> None:
    taken: list[_Region] = []
    for place, part in pairs:
        if order_of(part) is Order.RENEW:
            region = _region(place, shape)
            if any(region.meets(other) for other in taken):
                raise two_renorms()
            taken.append(region)


def _region(place: Placed, shape: tuple[int, ...]) -> _Region:
    """Where a place lies in the stored matrix. ShapeError where the tensor has no such place."""
    stacked = place.expert is not None
    inner = shape[1:] if stacked else shape
    if not inner or (stacked and not 0 <= (place.expert or 0) < shape[0]):
        raise ShapeError(f"no expert {place.expert} in a tensor {list(shape)}")
    if place.transposed and len(inner) != 2:
        raise ShapeError(f"a tensor {list(inner)} is not stored (i, o)")
    outputs = inner[1] if place.transposed else inner[0]
    first, last = place.rows or (0, outputs)
    if not 0 <= first <= last <= outputs:
        raise ShapeError(f"outputs {first}:{last} of a tensor {list(shape)} with {outputs}")
    top = (place.expert or 0) * inner[0]
    if place.transposed:
        return _Region(top, top + inner[0], first, last, (last - first, inner[0]), True)
    columns = math.prod(inner[1:])
    return _Region(top + first, top + last, 0, columns, (last - first, *inner[1:]), False)


@dataclass(frozen=True)
class _Building:
    """Makes updates into steps: cast, flat, and transposed where the storage is."""

    shape: tuple[int, ...]
    compute: torch.dtype
    device: torch.device | None
    inverse: bool

    def step(self, place: Placed, part: Update) -> RegionChange:
        """One plain update on its place."""
        return _kind_of(part).build(self, place, part)

    def delta(self, place: Placed, delta: Delta) -> RegionChange:
        region = _region(place, self.shape)
        factor = -delta.scale if self.inverse else delta.scale
        if place.bias:
            return self._vector(region, place, delta, factor)
        first = place.source[0] if place.source else 0
        if region.transposed:
            wide = delta.cast(widest(self.device), self.device)  # before factors are multiplied
            turned = wide.transposed() if place.source is None else None
            if turned is None:
                return self._strided(region, delta, first, factor)
            delta, first = turned, 0
        ready = delta.prepared(self.compute, self.device)

        def add(view: Tensor, start: int) -> None:
            ready.add_rows_(view, first + start, first + start + view.shape[0], factor)

        return RegionChange(region, False, add)

    def _strided(self, region: _Region, delta: Delta, first: int, factor: float) -> RegionChange:
        """A step that adds canonical rows to stored columns, for a Delta with no transpose."""
        ready = delta.prepared(self.compute, self.device)

        def add(view: Tensor, start: int) -> None:
            rows = view.t()
            for at in range(0, rows.shape[0], 32):
                piece = rows[at : at + 32]
                ready.add_rows_(piece, first + at, first + at + piece.shape[0], factor)

        return RegionChange(region, True, add)

    def _vector(self, region: _Region, place: Placed, delta: Delta, factor: float) -> RegionChange:
        vector = delta.bias_delta()
        assert vector is not None
        first, last = place.source or (0, vector.shape[0])
        column = vector[first:last].to(self.device, self.compute)[:, None]

        def add(view: Tensor, start: int) -> None:
            view.add_(column[start : start + view.shape[0]], alpha=factor)

        return RegionChange(region, False, add)

    def rotation(self, place: Placed, rotation: Rotation) -> RegionChange:
        region = _region(place, self.shape)
        sample = torch.empty(0, dtype=self.compute, device=self.device)
        turn_ = rotation.turning_(sample, back=self.inverse)
        if region.transposed:
            return RegionChange(region, True, lambda view, start: turn_(view.t()))
        return RegionChange(region, False, lambda view, start: turn_(view))

    def scaling(self, place: Placed, scaling: Scaling) -> RegionChange:
        region = _region(place, self.shape)
        find = scaling.divisors if self.inverse else scaling.factors
        factors = find(self.compute, self.device).detach()
        if scaling.axis == 0 and place.source:
            factors = factors[slice(*place.source)]
        if scaling.axis == 1:
            factors = factors.repeat_interleave(math.prod(region.shape[2:]))
        if (scaling.axis == 1) != region.transposed:
            return RegionChange(region, False, lambda view, start: view.mul_(factors))
        column = factors[:, None]

        def scale(view: Tensor, start: int) -> None:
            view.mul_(column[start : start + view.shape[0]])

        return RegionChange(region, False, scale)

    def renorm(self, place: Placed, renorm: Renorm) -> RegionChange:
        region = _region(place, self.shape)
        first = place.source[0] if place.source else 0

        def renew(view: Tensor, start: int) -> None:
            rows = view.t() if region.transposed else view
            weight = torch.unflatten(rows, 1, region.shape[1:]) if len(region.shape) > 2 else rows
            renorm.renorm_(weight, first + start)

        return RegionChange(region, region.transposed or renorm.axis == 1, renew)


class _Kind(NamedTuple):
    """How updates of one place in the law are held against a place, and made into a step."""

    type: type[Any]
    check: Callable[[Placed, Any, tuple[int, ...]], None]
    build: Callable[[_Building, Placed, Any], RegionChange]


_KINDS = {
    Order.TURN: _Kind(Rotation, _check_rotation, _Building.rotation),
    Order.SCALE: _Kind(Scaling, _check_scaling, _Building.scaling),
    Order.ADD: _Kind(Delta, _check_delta, _Building.delta),
    Order.RENEW: _Kind(Renorm, _check_renorm, _Building.renorm),
}


def _kind_of(part: Update) -> _Kind:
    """The row of ``_KINDS`` for an update. ValueRefused ("unknown-update") where there is none."""
    kind = _KINDS.get(order_of(part))
    if kind is None or not isinstance(part, kind.type):
        raise unknown_update(part, "a stored tensor")
    return kind


@dataclass
class Norms:
    """The norms of W, of W', and of W' − W before it is rounded, from samples all over a tensor.

    Measuring every number costs as much as changing it, so that ``SAMPLE`` numbers of every piece
    are measured, and stand for the piece: estimates, of which ``share`` says how much they rest on.
    A tensor of no more than that is measured whole.
    """

    before: float = 0.0  # squares, of the numbers measured
    after: float = 0.0
    change: float = 0.0
    measured: int = 0
    numbers: int = 0
    moved: int = 0

    def __iadd__(self, other: Norms) -> Norms:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def take(self, before: Tensor, after: Tensor, dtype: torch.dtype) -> None:
        """Add rows of W and the same rows of W', which will be stored in ``dtype``."""
        self.numbers += after.numel()
        if not self.measured:
            self._measure(before, after)
        few = max(1, FEW // max(after.shape[1], 1))
        for old, new in zip(torch.split(before, few), torch.split(after, few)):
            if self.moved:  # usually from the first rows on
                return
            stays = rounded(old.to(after), dtype)
            self.moved = int(not torch.equal(stays, rounded(new, dtype)))

    def _measure(self, before: Tensor, after: Tensor) -> None:
        few = max(1, SAMPLE // max(after.shape[1], 1))
        old, new = before[:few].to(after).flatten(), after[:few].flatten()
        change = new - old
        self.before += float(old.dot(old))
        self.after += float(new.dot(new))
        self.change += float(change.dot(change))
        self.measured += new.numel()

    def as_dict(self) -> dict[str, float]:
        """The norms of all numbers, the share that was measured, and 1 if anything moved."""
        share = self.measured / max(self.numbers, 1)
        squares = {"before": self.before, "after": self.after, "change": self.change}
        norms = {name: math.sqrt(square / (share or 1.0)) for name, square in squares.items()}
        return {**norms, "share": share, "moved": min(self.moved, 1)}


@torch.no_grad()
def change_rows(
    edit: BlockEdit | None,
    source: Tensor,
    target: Tensor,
    start: int,
    scratch: Tensor,
    norms: Norms | None = None,
    *,
    allowed: bool = False,
) -> int:
    """Rows [start, start + n) from ``source`` (n, columns) edited into ``target``, rounded once.

    The edit is not ``whole``; None only rounds. Both tensors may be the same memory. ``scratch``
    (at least ``edit.stride``, columns) has the compute dtype, and what it holds stays in cache.
    ``norms`` (new ones) gets all blocks. Returns how many numbers are not finite, which is a
    ValueRefused "non-finite" unless ``allowed``.
    """
    stop = start + source.shape[0]
    steps = [] if edit is None else edit.between(start, stop)
    stride = scratch.shape[0]
    narrow = scratch.float() if edit is not None and edit.narrow else scratch
    bad = 0
    for part, here in zip(torch.split(source, stride), torch.split(target, stride)):
        block, ends = scratch[: part.shape[0]], narrow[: part.shape[0]]
        ends.copy_(part)
        if edit is not None and edit.narrow:
            run_steps(steps, (block.copy_(ends),), start)
            ends.copy_(block)
        else:
            run_steps(steps, (block,), start)
        if norms is not None:
            norms.take(part, ends, target.dtype)
        bad += settle(ends, here, start, allowed=allowed)
        start += stride
    return bad


def settle(block: Tensor, target: Tensor, start: int = 0, *, allowed: bool = False) -> int:
    """Round ``block`` into ``target`` and return how many numbers are not finite there.

    Unless that is ``allowed`` one raises ValueRefused "non-finite", edited or only cast.
    """
    round_into(target, block)
    return check_rows(target, block, start, allowed=allowed)


def check_rows(target: Tensor, block: Tensor, start: int = 0, *, allowed: bool = False) -> int:
    """How many numbers of ``target`` are not finite, in rows from ``start`` on, computed as ``block``.

    Raises ValueRefused "non-finite" for one unless that is ``allowed``.
    """
    flat = block.reshape(-1)
    double = target.dtype == torch.float64
    most = math.inf if double else float(torch.finfo(target.dtype).max) ** 2
    if float(flat.dot(flat)) < most:
        return 0  # no number is larger than the norm
    bad = ~target.isfinite()
    count = int(bad.sum())
    if count and not allowed:
        row, column = (int(n) for n in bad.nonzero()[0])
        raise ValueRefused(
            "the result is not finite",
            seen=f"{float(block[row, column]):g} in row {start + row}, column {column}, "
            f"for {str(target.dtype).removeprefix('torch.')}",
            next="a wider --dtype, if it only overflows; else base or adapter are broken, and "
            "--allow-nonfinite writes it as it comes",
            code="non-finite",
        )
    return count
