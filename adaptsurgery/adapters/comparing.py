"""Two adapters held against each other: a row per module, by its ΔW in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from adaptsurgery.adapters.loading import Loaded
from adaptsurgery.adapters.renaming import comparable, uncut
from adaptsurgery.adapters.report import Report, Row
from adaptsurgery.adapters.rows import in_one_form
from adaptsurgery.adapters.updates import (
    base_weight,
    check_finite,
    is_nonfinite_allowed,
    nonfinite_of,
    update_of,
)
from adaptsurgery.checkpoint.bridge import to_torch
from adaptsurgery_formats import ModuleState
from adaptsurgery_formats.errors import InexactError, SurgeryError
from adaptsurgery_formats.state import options_of
from adaptsurgery_formats.tensors import same_bytes
from adaptsurgery_formats.traits import traits_of

if TYPE_CHECKING:
    import torch

    from adaptsurgery.core.update import Delta

    Rows = Callable[[int, int], torch.Tensor]

EXACT = 1e-6  # relative error of ΔW up to which a rewriting counts as float32 rounding
IDENTICAL, ROUNDED, LOSSY = "identical", "rounded", "lossy"


NO_NUMBER = "not finite"  # computed of what is not finite, and allowed: there is no distance


SAME = (IDENTICAL, ROUNDED)


_ROUNDING = 2.0**-48  # of ‖W‖: float64's, over the sums of a few thousand terms


_BLOCK = 1 << 22  # numbers of ΔW held at a time


class VerificationError(SurgeryError):
    """Two adapters that should do the same do not; ``report`` has a row per module."""

    default_code = "not-equal"
    report: Report | None = None


def compare(a: Loaded, b: Loaded) -> Iterator[Row]:
    """One row per module that either adapter has; raises where replaced parameters differ."""
    a, b = _in_one_form(a, b)
    whole = uncut(a.state, a.names) | uncut(b.state, b.names)
    ours = _by_place(comparable(a.state, a.names, whole))
    theirs = _by_place(comparable(b.state, b.names, whole))
    _compare_saved(a, b)
    for place, mine in ours.items():
        if place in theirs:
            yield _row(mine, theirs[place], a, b)
    for one, other, where in ((ours, theirs, "first"), (theirs, ours, "second")):
        for place, modules in one.items():
            if place in other:
                continue
            label, algorithm = modules[0].label, modules[0].algorithm
            if all(map(_adds_nothing, modules)):
                yield Row(label, algorithm, IDENTICAL, detail="adds nothing")
            else:
                yield Row(label, algorithm, f"only in the {where}", 1.0)


def _in_one_form(a: Loaded, b: Loaded) -> tuple[Loaded, Loaded]:
    """Both with the modules that are parts of different wholes put together, where that can be."""
    if a.names is None or b.names is None:
        return a, b
    try:
        first, second = in_one_form([a.state, b.state], b.names)
    except InexactError:
        return a, b  # not one module: they differ, and are shown so
    return replace(a, state=first), replace(b, state=second)


def _adds_nothing(module: ModuleState) -> bool:
    """Whether ΔW is exactly zero because a factor is, or the scale, and nothing is NaN or infinite."""
    if nonfinite_of(module):
        return False
    zero = {slot: not to_torch(t).any() for slot, t in module.tensors.items()}
    row = traits_of(module.algorithm)
    if row.dense:
        return all(zero.values())
    if not row.low_rank or "magnitude" in zero:
        return False
    return module.scale == 0 or (zero.pop("up_bias", True) and any(zero.values()))


def _by_place(modules: list[ModuleState]) -> dict[tuple[str, str], list[ModuleState]]:
    """The modules by component and path: a layer may have a low-rank part and a bias's."""
    groups: dict[tuple[str, str], list[ModuleState]] = {}
    for module in modules:
        groups.setdefault((module.component, module.path), []).append(module)
    return groups


def _compare_saved(a: Loaded, b: Loaded) -> None:
    mine = {(c, k): t for c, s in a.state.saved.items() for k, t in s.items()}
    theirs = {(c, k): t for c, s in b.state.saved.items() for k, t in s.items()}
    unequal = [k for k in mine.keys() | theirs.keys() if k not in mine or k not in theirs]
    unequal += [k for k in mine.keys() & theirs.keys() if not same_bytes(mine[k], theirs[k])]
    if unequal:
        raise VerificationError(
            f"{len(unequal)} replaced parameters differ",
            where=b.state.where,
            seen=", ".join(".".join(filter(None, k)) for k in sorted(unequal)[:4]),
        )


def _row(mine: list[ModuleState], theirs: list[ModuleState], a: Loaded, b: Loaded) -> Row:
    label = mine[0].label
    shown = "+".join(dict.fromkeys(m.algorithm for m in theirs))
    if len(mine) == len(theirs) and all(map(identical, mine, theirs)):
        return Row(label, shown, IDENTICAL)
    if is_nonfinite_allowed() and (count := sum(map(nonfinite_of, mine))):
        return Row(label, shown, NO_NUMBER, detail=f"{count} of its numbers are NaN or infinite")
    error = distance(mine, theirs, a, b)
    return Row(label, shown, ROUNDED if error <= EXACT else LOSSY, error)


def identical(a: ModuleState, b: ModuleState) -> bool:
    """The same algorithm, the same bytes in every slot, the same scale."""
    return (
        a.algorithm == b.algorithm
        and a.tensors.keys() == b.tensors.keys()
        and a.scale == b.scale
        and options_of(a) == options_of(b)
        and all(same_bytes(t, b.tensors[slot]) for slot, t in a.tensors.items())
    )


def distance(mine: list[ModuleState], theirs: list[ModuleState], a: Loaded, b: Loaded) -> float:
    """‖Δ − Δ'‖/‖Δ‖ over a layer's weight and bias, in float64, a block of rows at a time."""
    if len(mine) == len(theirs) == 1 and _is_flat_lora(mine[0]) and _is_flat_lora(theirs[0]):
        for side, loaded in ((mine[0], a), (theirs[0], b)):
            check_finite(side, loaded.state.where)
        return _lora_distance(mine[0], theirs[0])
    (first, size, noise), (second, other, more) = _change(mine, a), _change(theirs, b)
    if size != other:
        return math.inf
    step = max(1, _BLOCK // max(1, size[1]))
    apart = total = 0.0
    for start in range(0, size[0], step):
        stop = min(start + step, size[0])
        block = first(start, stop)
        apart += float((block - second(start, stop)).square().sum())
        total += float(block.square().sum())
    difference, norm = _bias_distance(mine, theirs, a, b)
    apart, total = apart + difference, total + norm
    if math.sqrt(apart) <= noise + more:
        return 0.0
    return math.sqrt(apart / total) if total else math.inf


def _is_flat_lora(module: ModuleState) -> bool:
    return module.algorithm == "lora" and module.tensors.keys() == {"up", "down"}


def _lora_distance(mine: ModuleState, theirs: ModuleState) -> float:
    """The same for two LoRAs, from their factors: ‖up·down‖ is that of two small triangles."""
    import torch

    (up, down), (other_up, other_down) = _factors(mine), _factors(theirs)
    if (len(up), down.shape[1]) != (len(other_up), other_down.shape[1]):
        return math.inf
    if torch.equal(up, other_up) and torch.equal(down, other_down):
        return 0.0
    apart = _product_norm(torch.cat([up, -other_up], 1), torch.cat([down, other_down]))
    total = _product_norm(up, down)
    return apart / total if total else (math.inf if apart else 0.0)


def _factors(module: ModuleState) -> tuple[torch.Tensor, torch.Tensor]:
    """s·up (o, r) and down (r, i·∏k) in float64, less the terms that add nothing."""
    up, down = (to_torch(module.tensors[s]).double().flatten(1) for s in ("up", "down"))
    used = up.any(0) & down.any(1)
    return module.scale * up[:, used], down[used]


def _product_norm(up: torch.Tensor, down: torch.Tensor) -> float:
    import torch

    left, right = torch.linalg.qr(up, mode="r").R, torch.linalg.qr(down.t(), mode="r").R
    return float((left @ right.t()).norm())


def _change(modules: list[ModuleState], loaded: Loaded) -> tuple[Rows, tuple[int, int], float]:
    """What the modules add to a weight as a matrix (o, i·∏k), by blocks of rows, and its size.

    Also how much of it may be float64's rounding: W' − W of a rotation is no better than W itself,
    and an HRA that starts as the identity is all rounding.
    """
    import torch

    from adaptsurgery.core.update import Delta, Update

    blocks: list[Rows] = []
    size, noise = (0, 0), 0.0
    for module in modules:
        update: Update = update_of(module, loaded.names, loaded.state.where)
        if isinstance(update, Delta):
            blocks.append(_delta_rows(update))
            size = max(size, update.extent)
            continue
        weight = base_weight(loaded, module).double()
        moved = (update.fold(weight) - weight).flatten(1)
        noise += _ROUNDING * float(weight.norm())
        blocks.append(lambda start, stop, moved=moved: moved[start:stop])  # type: ignore[misc]
        size = (moved.shape[0], moved.shape[1])

    def rows(start: int, stop: int) -> torch.Tensor:
        return torch.stack([block(start, stop) for block in blocks]).sum(0)

    return rows, size, noise


def _delta_rows(update: Delta) -> Rows:
    import torch

    def rows(start: int, stop: int) -> torch.Tensor:
        return update.scale * update.rows(start, stop, torch.float64)

    return rows


def _bias_distance(
    mine: list[ModuleState], theirs: list[ModuleState], a: Loaded, b: Loaded
) -> tuple[float, float]:
    """‖β − β'‖² and ‖β‖² of the bias differences."""
    first, second = _bias(mine, a), _bias(theirs, b)
    if first is None or second is None:
        present = first if first is not None else second
        square = float(present.square().sum()) if present is not None else 0.0
        return square, square
    return float((first - second).square().sum()), float(first.square().sum())


def _bias(modules: list[ModuleState], loaded: Loaded) -> torch.Tensor | None:
    from adaptsurgery.core.update import Delta

    total = None
    for module in modules:
        update = update_of(module, loaded.names, loaded.state.where).plain
        if isinstance(update, Delta) and (shift := update.bias_delta()) is not None:
            part = update.scale * shift.double()
            total = part if total is None else total + part
    return total


def verdict(rows: list[Row]) -> str:
    """One line: how many modules are the same, and how far the farthest is off."""
    same = sum(r.change == IDENTICAL for r in rows)
    parts = [f"{same} identical"] if same else []
    if measureless := sum(r.change == NO_NUMBER for r in rows):
        parts.append(f"{measureless} not finite, and not measured")
    for change, word in ((ROUNDED, "equal to float32 rounding"), (LOSSY, "approximated")):
        errors = [r.error for r in rows if r.change == change]
        if errors:
            parts.append(f"{len(errors)} {word}, relative error up to {max(errors):.2g}")
    return f"{len(rows)}/{len(rows)} modules: " + "; ".join(parts)
