"""Changing the algorithm: any adapter as a LoRA, exactly where it can be, else the nearest one.

LoHa of rank r is a LoRA of rank r² (Khatri–Rao), LoKr one of its smaller Kronecker form, HRA one
of its own rank once W is known; DoRA's change (W+sΔ)·m/‖W+sΔ‖ − W has full rank and can only be
approximated. Truncation is optimal (Eckart–Young) and its error is reported per module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from adaptsurgery.checkpoint.bridge import to_torch
from adaptsurgery.jobs.loading import Loaded
from adaptsurgery.jobs.steps import stored
from adaptsurgery.jobs.updates import base_weight, canonical_shape, update_of
from adaptsurgery_formats import AdapterState, ModuleState
from adaptsurgery_formats.errors import InexactError, LayoutError
from adaptsurgery_formats.state import ALPHA_OVER_R, UNSCALED, kernel_of

if TYPE_CHECKING:
    from adaptsurgery.algorithms import DoRA, Full, LoHa, LoKr, LoRA

EXACT = 1e-6  # relative error of ΔW up to which a rewriting counts as float32 rounding


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
    for module in loaded.state.modules:
        progress(module.label)
        changed, error = _as_lora(module, loaded, rank)
        modules += changed
        if not error <= EXACT:
            errors[module.component, module.path] = error
    if errors and not allow_lossy:
        raise _lossy(errors, len(modules), loaded.state.where)
    _note_kernels(loaded)
    return replace(loaded.state, modules=modules)


def _note_kernels(loaded: Loaded) -> None:
    """Say where flat factors were taken for a Linear's because no base shows the weight's shape."""
    unknown = [
        m.label
        for m in loaded.state.modules
        if m.algorithm in ("loha", "lokr")
        and kernel_of(m) is None
        and canonical_shape(m, loaded.names) is None
    ]
    if unknown:
        loaded.state.note(
            "kernel-unknown",
            f"{unknown[0]} and {len(unknown) - 1} more" if unknown[1:] else unknown[0],
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
    if module.algorithm in ("full", "norm") and not _is_matrix(module):
        return [module], 0.0
    plain = module.algorithm == "lora" and "magnitude" not in module.tensors
    if plain and not module.tucker and (rank is None or (module.rank or 0) <= rank):
        return [module], 0.0
    lora, error = _lora_of(module, loaded, rank)
    changed = [_state_of(lora, module)]
    if "diff_b" in module.tensors:
        bias = {"diff_b": module.tensors["diff_b"]}
        changed.append(replace(module, tensors=bias, alpha=None, rule=UNSCALED, rank=None))
    return changed, error


def _is_matrix(module: ModuleState) -> bool:
    """Whether a dense difference is of a weight matrix: not of a norm, nor a bias's alone."""
    return "diff" in module.tensors and len(module.tensors["diff"].shape) > 1


def _lora_of(module: ModuleState, loaded: Loaded, rank: int | None) -> tuple[LoRA, float]:
    """The module's nearest LoRA in float64, and its relative error; 0 where it is exact."""
    import torch

    from adaptsurgery.algorithms import HRA, DoRA, Full, LoHa, LoKr, LoRA

    update = update_of(module, loaded.names, loaded.state.where)
    if isinstance(update, HRA):
        return _cut(update.to_lora(base_weight(loaded, module).double()), rank)
    if isinstance(update, (LoRA, LoHa, LoKr)):
        return _cut(update.cast(torch.float64), rank)
    assert isinstance(update, (DoRA, Full))
    return _dense_as_lora(module, loaded, update, rank)


def _cut(delta: LoRA | LoHa | LoKr, rank: int | None) -> tuple[LoRA, float]:
    """The exact LoRA, or the nearest of ``rank`` where the exact one's is higher."""
    exact = delta.to_lora()
    if rank is None or exact.rank <= rank:
        return exact, 0.0
    found = delta.truncated(rank)
    return found.lora, found.error


def _dense_as_lora(
    module: ModuleState, loaded: Loaded, update: DoRA | Full, rank: int | None
) -> tuple[LoRA, float]:
    """The nearest LoRA of a change of full rank; DoRA's is (W+sΔ)·m/‖W+sΔ‖ − W."""
    from adaptsurgery.algorithms import DoRA, LoRA
    from adaptsurgery.core.linalg import optimal_lora

    if rank is None:
        raise LayoutError(
            f"`{module.label}`: a {'DoRA' if isinstance(update, DoRA) else 'dense difference'} "
            "has full rank, so a LoRA of it needs one",
            where=loaded.state.where,
            next="--rank N --allow-lossy",
            code="rank-needed",
        )
    if isinstance(update, DoRA):
        weight = base_weight(loaded, module).double()
        change = update.fold(weight) - weight
    else:
        change = to_torch(module.tensors["diff"]).double()
    shape = tuple(change.shape)
    found = optimal_lora(change.flatten(1), rank)
    return LoRA.of_factors(found.up, found.down, shape), found.error


def _state_of(lora: LoRA, module: ModuleState) -> ModuleState:
    """A float64 LoRA as a module in the place of another, its scale said by alpha."""
    sources = [t for s, t in module.tensors.items() if s != "magnitude"]
    flat = lora.flat()
    tensors = {"up": stored(flat.up.double(), sources), "down": stored(flat.down.double(), sources)}
    if "up_bias" in module.tensors:
        tensors["up_bias"] = module.tensors["up_bias"]
    alpha = flat.scale * flat.rank
    return replace(
        module,
        algorithm="lora",
        tensors=tensors,
        alpha=alpha,
        rule=ALPHA_OVER_R,
        rank=flat.rank,
        options={},
        kind=module.kind if module.algorithm == "lora" else "",
    )
