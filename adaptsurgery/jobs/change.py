"""Changing the algorithm: any adapter as a LoRA, exactly where it can be, else the nearest one.

LoHa of rank r is a LoRA of rank r² (Khatri–Rao), LoKr one of its smaller Kronecker form, HRA one
of its own rank once W is known; DoRA's change (W+sΔ)·m/‖W+sΔ‖ − W has full rank and can only be
approximated. Truncation is optimal (Eckart–Young) and its error is reported per module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from adaptsurgery.adapters.comparing import EXACT
from adaptsurgery.adapters.loading import Loaded
from adaptsurgery.adapters.lowrank import hides_kernel, in_place_of, is_low_rank, low_rank_update
from adaptsurgery.adapters.report import some
from adaptsurgery.adapters.updates import base_weight, update_of
from adaptsurgery_formats import AdapterState, ModuleState
from adaptsurgery_formats.errors import InexactError, LayoutError
from adaptsurgery_formats.state import UNSCALED
from adaptsurgery_formats.tensors import DTYPE_BITS
from adaptsurgery_formats.traits import traits_of

if TYPE_CHECKING:
    from adaptsurgery.algorithms import LoRA, LowRank


def as_lora(
    loaded: Loaded,
    *,
    rank: int | None,
    allow_lossy: bool,
    progress: Callable[[str], None] = lambda _: None,
) -> AdapterState:
    """Every LoHa, LoKr, HRA, dense difference and DoRA of an adapter as a LoRA.

    ``rank`` truncates those whose exact rank is higher, and is needed for DoRA and dense
    differences. Raises InexactError ("lossy") if any module would be approximated and
    ``allow_lossy`` is not set, LayoutError ("base-needed", "rank-needed").
    """
    errors: dict[tuple[str, str], float] = {}
    modules: list[ModuleState] = []
    grown: Counter[tuple[str, str]] = Counter()
    for module in loaded.state.modules:
        progress(module.label)
        changed, error = _as_lora(module, loaded, rank)
        modules += changed
        grown.update(_grown(module, changed[0]))
        if not error <= EXACT:
            errors[module.component, module.path] = error
    if errors and not allow_lossy:
        raise _lossy(errors, len(modules), loaded.state.where)
    note_kernels(loaded)
    _note_dtypes(loaded, grown)
    return replace(loaded.state, modules=modules)


def note_kernels(loaded: Loaded) -> None:
    """Say where flat factors were taken for a Linear's because no base shows the weight's shape."""
    unknown = [m.label for m in loaded.state.modules if hides_kernel(m, loaded.names)]
    if unknown:
        loaded.state.note(
            "kernel-unknown",
            some(unknown),
            "written as a Linear's LoRA; --base MODEL if it is a convolution's",
        )


def _lossy(errors: dict[tuple[str, str], float], count: int, where: str) -> InexactError:
    worst = max(errors, key=lambda key: errors[key])
    return InexactError(
        f"{len(errors)} of {count} modules can only be approximated",
        where=where,
        seen=f"relative error up to {errors[worst]:.3g}, at `{_label(*worst)}`",
        next="--allow-lossy if that is good enough, or a higher --rank",
        code="lossy",
    )


def _label(component: str, path: str) -> str:
    return f"{component}.{path}" if component else path


def _as_lora(
    module: ModuleState, loaded: Loaded, rank: int | None
) -> tuple[list[ModuleState], float]:
    """The modules that take this one's place, and the relative error."""
    if traits_of(module.algorithm).dense and not _is_matrix(module):
        return [module], 0.0
    plain = module.algorithm == "lora" and "magnitude" not in module.tensors
    if plain and not module.tucker and (rank is None or (module.rank or 0) <= rank):
        return [module], 0.0
    lora, error = _nearest(module, loaded, rank)
    factors = [t for s, t in module.tensors.items() if s not in ("magnitude", "up_bias")]
    changed = [in_place_of(module, lora, factors)]
    if "diff_b" in module.tensors:
        bias = {"diff_b": module.tensors["diff_b"]}
        changed.append(replace(module, tensors=bias, alpha=None, rule=UNSCALED, rank=None))
    return changed, error


def _is_matrix(module: ModuleState) -> bool:
    """Whether a dense difference is of a weight matrix: not of a norm, nor a bias's alone."""
    return "diff" in module.tensors and len(module.tensors["diff"].shape) > 1


def _nearest(module: ModuleState, loaded: Loaded, rank: int | None) -> tuple[LoRA, float]:
    """The module's nearest LoRA in float64, and its relative error; 0 where it is exact."""
    import torch

    from adaptsurgery.algorithms import HRA, DoRA, Full

    names, where = loaded.names, loaded.state.where
    if is_low_rank(module):
        return _cut(low_rank_update(module, names, where), rank)
    update = update_of(module.with_tensors(diff_b=None), names, where)
    if isinstance(update, HRA):
        return _cut(update.to_lora(base_weight(loaded, module).double()), rank)
    if not isinstance(update, (DoRA, Full)):
        title = traits_of(module.algorithm).title
        raise InexactError(
            f"`{module.label}`: nothing here makes a LoRA of a {title}",
            where=where,
            next="merge it into the base instead",
            code="no-lora-form",
        )
    if rank is None:
        raise _rank_needed(module, where)
    if isinstance(update, DoRA):
        wide = replace(update, inner=update.inner.cast(torch.float64))
        return wide.truncated(base_weight(loaded, module), rank, torch.float64)
    return update.cast(torch.float64).truncated(rank)


def _cut(delta: LowRank, rank: int | None) -> tuple[LoRA, float]:
    """The exact LoRA, or the nearest of ``rank`` where the exact one's is higher."""
    exact = delta.to_lora()
    if rank is None or exact.rank <= rank:
        return exact, 0.0
    own = getattr(delta, "truncated", exact.truncated)  # some cut themselves at less cost
    lora, error = own(rank)
    return lora, error


def _rank_needed(module: ModuleState, where: str) -> LayoutError:
    kind = "DoRA" if "magnitude" in module.tensors else "dense difference"
    return LayoutError(
        f"`{module.label}`: a {kind} has full rank, so a LoRA of it needs one",
        where=where,
        next="--rank N --allow-lossy",
        code="rank-needed",
    )


def _note_dtypes(loaded: Loaded, grown: Counter[tuple[str, str]]) -> None:
    """Say how many modules are stored wider than their source."""
    for (was, now), count in grown.items():
        text = f"{count} modules are stored in {now}: {was} does not hold their factors exactly"
        loaded.state.note("dtype", loaded.state.where, text)


def _grown(before: ModuleState, after: ModuleState) -> list[tuple[str, str]]:
    """The widest dtypes of a module's factors before and after, if the latter is wider."""
    was, now = (
        max((t.dtype for s, t in m.tensors.items() if s != "magnitude"), key=DTYPE_BITS.__getitem__)
        for m in (before, after)
    )
    return [(was, now)] if DTYPE_BITS[now] > DTYPE_BITS[was] else []
