"""Carry a module between diffusers' names and the original repository's, all by reference.

A native module stacks rows of diffusers modules (see native.py), so of ΔW = (δ₁; δ₂; …) each part
is a row slice. With each algorithm's right factor shared and its row factor cut, that is exact::

    lora  δ = up[rows] · down          loha  δ = (w1_a[rows]·w1_b) ∘ (w2_a[rows]·w2_b)
    full  δ = diff[rows]               lokr  δ = w1[rows / b] ⊗ w2, at multiples of b only
    hra   W·R stacks as it is: every part has the same u

Backwards the parts' right factors must be one and the same; only LoRA can stack different ones, as
(up₁ 0; 0 up₂)·(down₁; down₂), whose rank, and therefore alpha, is the sum of the parts'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from adaptsurgery_formats.errors import (
    InexactError,
    LayoutError,
    NameLookupError,
    ShapeError,
    nearest,
)
from adaptsurgery_formats.names.rows import Rows
from adaptsurgery_formats.names.tables import Component
from adaptsurgery_formats.state import (
    ALPHA_OVER_R,
    NO_ALPHA,
    ZERO_ALPHA,
    ModuleState,
    delta_shape,
    magnitude_axis,
    options_of,
    shapes_of,
)
from adaptsurgery_formats.tensors import Part, Tensor, bytes_of, concat_rows, same_bytes
from adaptsurgery_formats.traits import traits_of

AS_LORA = "pass `--as lora`: a LoRA can be cut and stacked anywhere"


def to_diffusers(module: ModuleState, component: Component) -> list[ModuleState]:
    """The diffusers modules that a native module is made of, in the order of its rows.

    (o₁ + o₂ + …, i) → (o₁, i), (o₂, i), …; a module that is not in native names comes back as it
    is. Raises InexactError "fused-lokr" or "fused-mixed" where the algorithm cannot be cut so.
    """
    if module.naming != "native":
        return [module]
    segments = _segments(component, module.path)
    if _is_alias(segments, component):
        return [module.changed(path=segments[0].name, naming=component.naming)]
    pieces = _places(segments)
    _check_rows(module, sum(s.count for s in segments))
    _check_cuttable(module, segments)
    return [
        replace(
            module,
            path=path,
            naming=component.naming,
            tensors=_taken(module, sorted(pieces[path])),
        )
        for path in pieces
    ]


def to_native(modules: Sequence[ModuleState], component: Component) -> list[ModuleState]:
    """The native modules that diffusers modules make up, in order of first appearance.

    A part that is not among ``modules`` changes nothing: its rows are zeros. Raises InexactError
    "fused-mixed", "fused-scales" or "fused-lokr" where the parts cannot be one module.
    """
    if not component.native:
        return list(modules)
    # A layer may have a low-rank part and a bias's difference: each is put together by itself.
    groups: dict[tuple[str, bool], dict[str, ModuleState]] = {}
    for module in modules:
        fused = module.naming == "native"
        path = module.path if fused else _native_path(component, module)
        parts = groups.setdefault((path, module.tensors.keys() == {"diff_b"}), {})
        if module.path in parts or (parts and fused) or "" in parts:
            raise LayoutError(
                f"`{module.label}` is adapted twice",
                seen=", ".join(module.keys),
                code="duplicate-module",
            )
        parts["" if fused else module.path] = module
    return [
        parts[""] if "" in parts else _fused(path, parts, component)
        for (path, _), parts in groups.items()
    ]


def _segments(component: Component, path: str) -> tuple[Rows, ...]:
    if path not in component.native:
        raise NameLookupError(
            f"`{path}` is no module of the original repository's {component.name or 'model'}",
            seen=path,
            next=nearest(path, component.native),
        )
    return component.native[path]


def _native_path(component: Component, module: ModuleState) -> str:
    path = component.native_of.get(module.path)
    if path is None:
        raise NameLookupError(
            f"`{module.label}` has no name in the original repository",
            seen=", ".join(module.keys),
            next="write a layout with diffusers names",
            code="no-native-name",
        )
    return path


def _is_alias(segments: Sequence[Rows], component: Component) -> bool:
    """Whether a native module is one diffusers module, whole and in order."""
    first = segments[0]
    return len(segments) == 1 and first.count == component.modules[first.name][0]


# Cutting


def _places(segments: Sequence[Rows]) -> dict[str, list[tuple[int, int, int]]]:
    """Diffusers path → its rows' start there, and the [start, stop) where they lie natively."""
    places: dict[str, list[tuple[int, int, int]]] = {}
    at = 0
    for s in segments:
        places.setdefault(s.name, []).append((s.start, at, at + s.count))
        at += s.count
    return places


def _unit(module: ModuleState, slot: str) -> int:
    """How many rows of ΔW one row of a row slot stands for: b for LoKr's w1, else 1."""
    return 1 if slot == "magnitude" else traits_of(module.algorithm).unit(shapes_of(module))


def _row_slots(module: ModuleState) -> list[str]:
    """The slots that are cut with the output rows; a DoRA norm per input is not one."""
    slots = [s for s in traits_of(module.algorithm).rows if s in module.tensors]
    if "magnitude" in slots and magnitude_axis(module) == "in":
        slots.remove("magnitude")
    return slots


def _taken(module: ModuleState, places: Sequence[tuple[int, int, int]]) -> dict[str, Tensor]:
    """The module's tensors with only the given native rows, in the given order."""
    taken = dict(module.tensors)
    for slot in _row_slots(module):
        unit = _unit(module, slot)
        rows = [module.tensors[slot].rows(a // unit, b // unit) for _, a, b in places]
        taken[slot] = concat_rows(rows)
    return taken


def _check_rows(module: ModuleState, wanted: int) -> None:
    rows = delta_shape(module)[0]
    if rows not in (0, wanted):
        raise ShapeError(
            f"`{module.label}` has {rows} output rows, but {wanted} are expected",
            seen=", ".join(f"{s} {list(t.shape)}" for s, t in module.tensors.items()),
            next="is the adapter of another model?",
        )


def _check_cuttable(module: ModuleState, segments: Sequence[Rows]) -> None:
    """Refuse what row slices cannot say."""
    cuts = [at for places in _places(segments).values() for _, at, _ in places if at]
    unit = max((_unit(module, slot) for slot in _row_slots(module)), default=1)
    if any(cut % unit for cut in cuts):
        raise InexactError(
            f"the LoKr of `{module.label}` cannot be cut into {_listed(segments)}: its Kronecker "
            f"factor w2 has b = {unit} rows, and not every cut is a multiple of that",
            seen=f"b = {unit}, cuts at rows {', '.join(map(str, sorted(cuts)))}",
            next=AS_LORA,
            code="fused-lokr",
        )
    _check_rowwise(module, segments)


def _check_rowwise(module: ModuleState, segments: Sequence[Rows]) -> None:
    """Refuse what is not said row by row: a tucker LoHa, a DoRA norm per input of several parts."""
    row = traits_of(module.algorithm)
    if not row.cuts:
        raise _mixed(module, segments, f"{row.title} is not cut by rows")
    if row.transposes_core and module.tucker:
        raise _mixed(module, segments, f"a tucker {row.title} holds its rows as columns")
    per_input = "magnitude" in module.tensors and "magnitude" not in _row_slots(module)
    if per_input and len({s.name for s in segments}) > 1:
        raise _mixed(module, segments, "its DoRA norm is taken per input, over all rows at once")


def _listed(segments: Sequence[Rows]) -> str:
    return ", ".join(f"`{path}`" for path in dict.fromkeys(s.name for s in segments))


def _mixed(module: ModuleState, segments: Sequence[Rows], why: str) -> InexactError:
    row = traits_of(module.algorithm)
    return InexactError(
        f"`{module.label}` cannot be carried over exactly: {why}",
        seen=f"one module is made of rows of {_listed(segments)}",
        next=AS_LORA if row.adds or row.turns else "merge it into the base instead",
        code="fused-mixed",
    )


# Fusing


def _fused(path: str, parts: dict[str, ModuleState], component: Component) -> ModuleState:
    """The native module at ``path``, from those of its parts that are adapted."""
    segments = component.native[path]
    order = [p for p in dict.fromkeys(s.name for s in segments) if p in parts]
    present = [parts[p] for p in order]
    if _is_alias(segments, component):
        return present[0].changed(path=path, naming="native")
    for part in present:
        _check_rows(part, component.modules[part.path][0])
    _check_alike(present, segments)
    present = _with_one_right_factor(present, segments)
    by_path = dict(zip(order, present))
    tensors = dict(present[0].tensors)
    for slot in dict.fromkeys(slot for part in present for slot in _row_slots(part)):
        tensors[slot] = concat_rows([_rows_of(by_path, s, slot, present) for s in segments])
    return replace(
        present[0],
        path=path,
        naming="native",
        tensors=tensors,
        keys=tuple(dict.fromkeys(key for part in present for key in part.keys)),
    )


def _check_alike(present: Sequence[ModuleState], segments: Sequence[Rows]) -> None:
    """The parts must be of one algorithm, one dtype, one scale, and complete where needed."""
    first = present[0]
    algorithms = sorted({p.algorithm for p in present})
    if len(algorithms) > 1:
        raise _mixed(first, segments, f"its parts are {' and '.join(algorithms)}")
    for slot in traits_of(first.algorithm).rows:
        stored = [p.tensors[slot] for p in present if slot in p.tensors]
        kinds = sorted({f"{t.dtype} of {len(t.shape)} dimensions" for t in stored})
        if len(kinds) > 1:
            raise _mixed(first, segments, f"its parts' {slot} are {' and '.join(kinds)}")
    if not same_scale(present):
        raise InexactError(
            f"`{first.label}` and the modules it is stored with have different scales",
            seen=", ".join(f"`{p.path}` {p.scale:g}" for p in present),
            next=_equal_scales(first),
            code="fused-scales",
        )
    for part in present:
        _check_rowwise(part, segments)
    count = len({s.name for s in segments})
    row = traits_of(first.algorithm)
    if not row.partial and len(present) < count:
        raise _mixed(first, segments, f"{row.title} changes all rows of a layer, or none")
    normed = sum("magnitude" in part.tensors for part in present)
    if normed and normed < count:
        raise _mixed(first, segments, f"{normed} of the {count} have a DoRA magnitude")


def same_scale(modules: Sequence[ModuleState]) -> bool:
    """Whether all have one scale, up to float64's rounding of alpha/rank."""
    return all(math.isclose(m.scale, modules[0].scale, rel_tol=1e-15) for m in modules)


def _equal_scales(module: ModuleState) -> str:
    """How parts of different scales can be fused; the jobs do it for LoRA and LoHa unasked."""
    slot = traits_of(module.algorithm).level_slot
    fold = f"multiply the scales' ratios into {slot}" if slot else "give them equal alpha/rank"
    return f"{fold}, or {AS_LORA}"


def _with_one_right_factor(
    present: Sequence[ModuleState], segments: Sequence[Rows]
) -> list[ModuleState]:
    """The parts, all with the same tensors but for the row slots; LoRA is widened to that end."""
    groups: list[list[ModuleState]] = []
    for part in present:
        home = next((g for g in groups if _same_right(g[0], part)), None)
        if home is None:
            groups.append([part])
        else:
            home.append(part)
    if len(groups) == 1:
        return list(present)
    first = present[0]
    if first.algorithm != "lora":
        raise _mixed(first, segments, f"its parts' {_right_names(first)} differ")
    if any(p.tucker for p in present):
        raise _mixed(first, segments, "tucker factors of different parts do not stack")
    downs = [group[0].tensors["down"] for group in groups]
    if len({(d.dtype, d.shape[1:]) for d in downs}) > 1:
        raise _mixed(first, segments, "the parts' down factors differ in dtype or inputs")
    widened = {p.path: _widened(p, groups, at) for at, g in enumerate(groups) for p in g}
    return [widened[p.path] for p in present]


def _right(module: ModuleState) -> dict[str, Tensor]:
    rows = _row_slots(module)
    return {slot: t for slot, t in module.tensors.items() if slot not in rows}


def _right_names(module: ModuleState) -> str:
    return ", ".join(_right(module)) or "right factors"


def _same_right(a: ModuleState, b: ModuleState) -> bool:
    """Whether two parts share every tensor that is not cut by rows."""
    left, right = _right(a), _right(b)
    return (
        options_of(a) == options_of(b)
        and left.keys() == right.keys()
        and all(left[s].shape == right[s].shape and same_bytes(left[s], right[s]) for s in left)
    )


def _widened(part: ModuleState, groups: Sequence[Sequence[ModuleState]], at: int) -> ModuleState:
    """The part at rank R = Σ r: up (o, r) → (o, R) between zeros, down all groups' (R, i)."""
    downs = [group[0].tensors["down"] for group in groups]
    ranks = [down.shape[0] for down in downs]
    up, rank = part.tensors["up"], sum(ranks)
    size = bytes_of(up.dtype, ())
    padded = PaddedRows(
        up.parts, ranks[at] * size, sum(ranks[:at]) * size, sum(ranks[at + 1 :]) * size
    )
    wide = Tensor(up.dtype, (up.shape[0], rank, *up.shape[2:]), (padded,))
    alpha, rule = _widened_alpha([group[0] for group in groups], rank)
    return replace(
        part.with_tensors(up=wide, down=concat_rows(downs)), alpha=alpha, rule=rule, rank=rank
    )


def _widened_alpha(parts: Sequence[ModuleState], rank: int) -> tuple[float | None, str]:
    """(alpha, rule) that keep the parts' common scale s at rank R.

    Equal fractions have the mediant's value, Σ alpha / Σ r = s, and that sum rounds less often
    than R·s does.
    """
    rules = {p.rule for p in parts}
    if rules <= {NO_ALPHA} or rules <= {ZERO_ALPHA}:
        return parts[0].alpha, parts[0].rule
    alphas = [p.alpha for p in parts if p.alpha is not None]
    if rules == {ALPHA_OVER_R} and sum(alphas) / rank == parts[0].scale:
        return sum(alphas), ALPHA_OVER_R
    return rank * parts[0].scale, ALPHA_OVER_R


def _rows_of(
    parts: dict[str, ModuleState], segment: Rows, slot: str, present: Sequence[ModuleState]
) -> Tensor:
    """The segment's rows of a slot; zeros where the part is not adapted."""
    example = next(p for p in present if slot in p.tensors)
    unit = _unit(example, slot)
    if segment.start % unit or segment.stop % unit:
        raise InexactError(
            f"rows {segment.start}:{segment.stop} of `{segment.name}` cannot be stacked as a "
            f"LoKr: they are not a multiple of b = {unit}",
            seen=f"the LoKr of `{example.label}`",
            next=AS_LORA,
            code="fused-lokr",
        )
    start, stop = segment.start // unit, segment.stop // unit
    part = parts.get(segment.name)
    if part is not None and slot in part.tensors:
        return part.tensors[slot].rows(start, stop)
    tensor = example.tensors[slot]
    shape = (stop - start, *tensor.shape[1:])
    zeros = Tensor(tensor.dtype, shape, ())
    return replace(zeros, parts=(Zeros(zeros.nbytes),))


# Parts that hold no numbers of their own


@dataclass(frozen=True, slots=True)
class Zeros:
    """A run of zero bytes: 0 in every dtype that adapters are stored in."""

    nbytes: int

    def window(self, start: int, stop: int) -> Zeros:
        return Zeros(stop - start)

    def read(self) -> bytes:
        return bytes(self.nbytes)


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """Rows of ``width`` bytes each, set between ``left`` and ``right`` zero bytes."""

    parts: tuple[Part, ...]
    width: int
    left: int
    right: int

    @property
    def nbytes(self) -> int:
        return (
            sum(p.nbytes for p in self.parts) // self.width * (self.left + self.width + self.right)
        )

    def window(self, start: int, stop: int) -> Part:
        return Window(self, start, stop)

    def read(self) -> bytes:
        data = b"".join(p.read() for p in self.parts)
        before, after = bytes(self.left), bytes(self.right)
        starts = range(0, len(data), self.width)
        return b"".join(before + data[i : i + self.width] + after for i in starts)


@dataclass(frozen=True, slots=True)
class Window:
    """Bytes [start, stop) of a run that has to be read as a whole."""

    source: Part
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def window(self, start: int, stop: int) -> Window:
        return Window(self.source, self.start + start, self.start + stop)

    def read(self) -> bytes:
        return self.source.read()[self.start : self.stop]
