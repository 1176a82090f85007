"""Updates on one stored tensor, as an edit that runs over its rows and holds a block at a time.

A stored tensor is looked at as a matrix, rows × columns, in the order of its bytes:

    (o, i, *k)        o rows of i·∏k            a layer's own, canonical
    (i, o)            i rows of o               transformers' Conv1D, an embedding (vocab, dim)
    (E, o, i)         E·o rows of i             stacked experts; (E, i, o) where transposed
    (n,)              n rows of 1               a bias, a norm

``Place`` says where on it an update lies. A LoRA, LoHa, LoKr or full difference changes every row by
itself, transposed or not; so do an HRA and a DoRA that renews the outputs' norms, on canonical
storage. An HRA on transposed storage and a DoRA of the inputs' norms need all rows together.
The law is that of ``core.update.compose``: W' = W·R1·R2·… + Σ w·s·Δ, then a Renorm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from adaptsurgery.core.update import Delta, Renorm, Rotation, Update, compose, parts_of
from adaptsurgery_formats.errors import InexactError, ShapeError, ValueRefused

BLOCK = 32 * 1024  # numbers changed at a time: with its scratch, what stays in a core's cache


@dataclass(frozen=True, eq=False)
class Place:
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


class _Step(NamedTuple):
    """One update on one region: ``change(view, n)`` for the region's stored rows from n on."""

    region: _Region
    whole: bool  # the region at once; else any of its rows
    change: Callable[[Tensor, int], None]


class BlockEdit:
    """What a list of places does to a stored tensor seen as ``rows`` × ``columns``.

    ``unit`` is the number of rows that have to come together: 1 where every row changes by itself,
    all rows (of an expert) where not. ``edit_of`` builds it.
    """

    def __init__(self, rows: int, columns: int, unit: int, steps: Sequence[_Step]) -> None:
        self.rows, self.columns, self.unit = rows, columns, unit
        self.steps = tuple(steps)
        self.stride = max(1, BLOCK // max(columns, 1))

    @property
    def whole(self) -> bool:
        """Whether more than a row is needed at once."""
        return self.unit > 1

    @torch.no_grad()
    def apply(self, block: Tensor, start: int = 0) -> None:
        """Change rows [start, start + n) of the tensor, given as ``block`` (n, columns), in place.

        The block has the dtype that the edit was built for. ``start`` and n are multiples of
        ``unit``. A large block is gone through in pieces that stay in cache.
        """
        stop = start + block.shape[0]
        steps = [s for s in self.steps if s.region.top < stop and start < s.region.bottom]
        if any(step.whole for step in steps):
            for step in steps:
                self._pass(block, start, [step])
        else:
            self._pass(block, start, steps)

    def _pass(self, block: Tensor, start: int, steps: Sequence[_Step]) -> None:
        stride = block.shape[0] if steps and steps[0].whole else self.stride
        for first in range(0, block.shape[0], stride):
            piece = block[first : first + stride]
            for step in steps:
                _change(step, piece, start + first)


def _change(step: _Step, block: Tensor, start: int) -> None:
    """One step on the rows that its region shares with the block."""
    top, bottom, left, right = step.region[:4]
    low, high = max(start, top), min(start + block.shape[0], bottom)
    if low < high:
        view = block[low - start : high - start, left:right]
        step.change(view, low - top)


def edit_of(
    places: Iterable[Place],
    shape: tuple[int, ...],
    compute: torch.dtype = torch.float32,
    device: torch.device | None = None,
    *,
    inverse: bool = False,
) -> BlockEdit:
    """The edit of a tensor stored with ``shape``, on blocks of the dtype ``compute``.

    Rotations come first, in the order given, then all deltas, then what renews norms; ``inverse``
    takes them out in the opposite order. Factors are cast once, here. Raises ShapeError where an
    update does not fit its place, ValueRefused for a weight other than 1 on what does not add
    ("no-weight"), two renorms on one place ("two-renorms"), numbers that are no rotation, and
    InexactError ("no-inverse", "cannot-split") for a renorm taken out or cut.
    """
    found = [(place, part) for place in places for part in _parts(place)]
    for place, part in found:
        check_place(place, part, shape, inverse)
    stacked = len(shape) > 1 and any(place.expert is not None for place, _ in found)
    rows = math.prod(shape[: 2 if stacked else 1])
    columns = math.prod(shape[2 if stacked else 1 :])
    _refuse_two_renorms(found, shape)
    ready = _Building(shape, compute, device, inverse)
    turned = [ready.rotation(place, u) for place, u in found if isinstance(u, Rotation)]
    added = [ready.delta(place, u) for place, u in found if isinstance(u, Delta)]
    added += [ready.delta(place, u.inner) for place, u in found if isinstance(u, Renorm)]
    renewed = [ready.renorm(place, u) for place, u in found if isinstance(u, Renorm)]
    steps = [*added, *reversed(turned)] if inverse else [*turned, *added, *renewed]
    unit = rows // shape[0] if stacked else rows
    return BlockEdit(rows, columns, unit if any(s.whole for s in steps) else 1, steps)


def _parts(place: Place) -> Iterator[Update]:
    """The update at its weight, taken apart; for a bias, only what shifts it."""
    for part in parts_of(compose([place.update.scaled(place.weight)])):
        if not place.bias:
            yield part
        elif isinstance(part, (Delta, Renorm)):
            delta = part.inner if isinstance(part, Renorm) else part
            if delta.bias_delta() is not None:
                yield delta


def check_place(place: Place, part: Update, shape: tuple[int, ...], inverse: bool = False) -> None:
    """Raise unless ``part`` of a place's update fits a tensor stored with ``shape``."""
    region = _region(place, shape)
    if isinstance(part, Renorm):
        _check_renorm(place, part, inverse)
    if isinstance(part, Rotation):
        part.check_values()
        part.check_fits(region.shape)
        return
    delta = part.inner if isinstance(part, Renorm) else part
    assert isinstance(delta, Delta)
    outputs = _outputs(delta, place)
    first, last = place.source or (0, outputs)
    if not 0 <= first <= last <= outputs or last - first != region.shape[0]:
        raise ShapeError(
            f"{delta.name}: outputs {first}:{last} of {outputs} for {region.shape[0]} of the tensor",
            seen=f"stored as {list(shape)}",
        )
    if not place.bias:
        delta.check_fits((outputs, *region.shape[1:]))


def _check_renorm(place: Place, part: Renorm, inverse: bool) -> None:
    if inverse:
        raise InexactError(
            f"{part.name} cannot be taken out of a weight again: a norm was replaced",
            next="keep the base weight",
            code="no-inverse",
        )
    if part.axis == 1 and place.source not in (None, (0, part.inner.extent[0])):
        raise InexactError(
            f"{part.name}: the norms of inputs are those of all outputs, and this weight holds some",
            next="an adapter split as the base is",
            code="cannot-split",
        )


def _outputs(delta: Delta, place: Place) -> int:
    vector = delta.bias_delta() if place.bias else None
    return delta.extent[0] if vector is None else vector.shape[0]


def _refuse_two_renorms(found: Sequence[tuple[Place, Update]], shape: tuple[int, ...]) -> None:
    taken: list[_Region] = []
    for place, part in found:
        if isinstance(part, Renorm):
            region = _region(place, shape)
            if any(region.meets(other) for other in taken):
                raise ValueRefused(
                    "two updates both set the norm of one weight",
                    next="fold one into the base first",
                    code="two-renorms",
                )
            taken.append(region)


def _region(place: Place, shape: tuple[int, ...]) -> _Region:
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
    """Updates made into steps: cast, flat, transposed where the storage is."""

    shape: tuple[int, ...]
    compute: torch.dtype
    device: torch.device | None
    inverse: bool

    def delta(self, place: Place, delta: Delta) -> _Step:
        region = _region(place, self.shape)
        factor = -delta.scale if self.inverse else delta.scale
        if place.bias:
            return self._vector(region, place, delta, factor)
        first = place.source[0] if place.source else 0
        if region.transposed:
            turned = delta.transposed() if place.source is None else None
            if turned is None:
                return self._strided(region, delta, first, factor)
            delta, first = turned, 0
        ready = delta.prepared(self.compute, self.device)

        def add(view: Tensor, start: int) -> None:
            ready.add_rows_(view, first + start, first + start + view.shape[0], factor)

        return _Step(region, False, add)

    def _strided(self, region: _Region, delta: Delta, first: int, factor: float) -> _Step:
        """Canonical rows added to columns of the storage, for what cannot be transposed."""
        ready = delta.prepared(self.compute, self.device)

        def add(view: Tensor, start: int) -> None:
            rows = view.t()
            for at in range(0, rows.shape[0], 32):
                piece = rows[at : at + 32]
                ready.add_rows_(piece, first + at, first + at + piece.shape[0], factor)

        return _Step(region, True, add)

    def _vector(self, region: _Region, place: Place, delta: Delta, factor: float) -> _Step:
        vector = delta.bias_delta()
        assert vector is not None
        first, last = place.source or (0, vector.shape[0])
        column = vector[first:last].to(self.device, self.compute)[:, None]

        def add(view: Tensor, start: int) -> None:
            view.add_(column[start : start + view.shape[0]], alpha=factor)

        return _Step(region, False, add)

    def rotation(self, place: Place, rotation: Rotation) -> _Step:
        region = _region(place, self.shape)
        sample = torch.empty(0, dtype=self.compute, device=self.device)
        turn_ = rotation.turning_(sample, back=self.inverse)
        if region.transposed:
            return _Step(region, True, lambda view, start: turn_(view.t()))
        return _Step(region, False, lambda view, start: turn_(view))

    def renorm(self, place: Place, renorm: Renorm) -> _Step:
        region = _region(place, self.shape)
        first = place.source[0] if place.source else 0

        def renew(view: Tensor, start: int) -> None:
            rows = view.t() if region.transposed else view
            weight = rows.unflatten(1, region.shape[1:]) if len(region.shape) > 2 else rows
            renorm.renorm_(weight, first + start)

        return _Step(region, region.transposed or renorm.axis == 1, renew)
