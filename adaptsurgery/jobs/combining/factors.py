"""Low-rank terms: those of the same factors found, rescaled, and made into one LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adaptsurgery.adapters import lowrank
from adaptsurgery.adapters.lowrank import with_factors
from adaptsurgery.adapters.rewritings import as_stored
from adaptsurgery.checkpoint.bridge import from_torch, to_torch, torch_dtype
from adaptsurgery.jobs.combining.terms import BIASES, NOTHING, Term, keys_of
from adaptsurgery_formats import ModuleState
from adaptsurgery_formats.errors import ShapeError
from adaptsurgery_formats.state import ALPHA_OVER_R
from adaptsurgery_formats.tensors import same_bytes
from adaptsurgery_formats.traits import traits_of

if TYPE_CHECKING:
    import torch

    from adaptsurgery.algorithms import LoRA


def distinct(terms: Sequence[Term]) -> list[tuple[ModuleState, float]]:
    """The different Δ among low-rank terms, each with its summed coefficient; none that cancel."""
    groups: list[list[Term]] = []
    for term in terms:
        home = next((g for g in groups if _same_factors(g[0].module, term.module)), None)
        if home is None:
            groups.append([term])
        else:
            home.append(term)
    sums = []
    for group in groups:
        coefficients = [t.coefficient for t in group]
        total = math.fsum(coefficients)
        if abs(total) > NOTHING * math.fsum(map(abs, coefficients)):
            sums.append((replace(group[0].module, keys=keys_of(group)), total))
    return sums


def _same_factors(a: ModuleState, b: ModuleState) -> bool:
    ours, theirs = (m.with_tensors(up_bias=None).tensors for m in (a, b))
    return (
        (a.algorithm, a.kind, ours.keys()) == (b.algorithm, b.kind, theirs.keys())
        and all(t.shape == theirs[slot].shape for slot, t in ours.items())
        and all(same_bytes(t, theirs[slot]) for slot, t in ours.items())
    )


def coefficient_error(terms: Sequence[Term], written: ModuleState) -> float | None:
    """|c' − c|/|c| where the terms' factors are those that were written; None where they differ."""
    if not all(_same_factors(t.module, written) for t in terms):
        return None
    wanted = math.fsum(t.coefficient for t in terms)
    return lowrank.relative(abs(written.scale - wanted), abs(wanted))


def rescaled(module: ModuleState, coefficient: float) -> ModuleState:
    """The same factors at another scale: alpha says it, and a factor the sign."""
    if coefficient == module.scale:
        return module
    row, rank = traits_of(module.algorithm), module.rank or 1
    if coefficient < 0 or not row.scaled:  # some readers expect no negative alpha
        slot = row.factor_slot(module.tensors)
        tensor = module.tensors[slot]
        if not row.scaled:
            return module.with_tensors(
                **{slot: as_stored(to_torch(tensor).double() * coefficient, [tensor])}
            )
        module = module.with_tensors(**{slot: from_torch(-to_torch(tensor))})
    return replace(module, alpha=abs(coefficient) * rank, rank=rank, rule=ALPHA_OVER_R)


def common_scale(terms: Sequence[tuple[float, int]]) -> float:
    """The scale of a sum, of (|coefficient|, rank): one that leaves the most ranks exact.

    What is a power of two of it only moves exponents, in any dtype.
    """
    ranks: dict[float, int] = {}
    for coefficient, rank in terms:
        mantissa = math.frexp(coefficient)[0]
        ranks[mantissa] = ranks.get(mantissa, 0) + rank
    best = max(ranks, key=lambda mantissa: ranks[mantissa])
    return max(c for c, _ in terms if math.frexp(c)[0] == best)


def shortest(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in factors of no more ranks than it has rows or columns: against the identity."""
    import torch

    rows, columns = up.shape[0], down.shape[1]
    if up.shape[1] <= min(rows, columns):
        return up, down
    whole, one = up @ down, torch.eye(min(rows, columns), dtype=up.dtype)
    return (one, whole) if rows <= columns else (whole, one)


def kernel_shape(modules: Sequence[ModuleState], forms: Sequence[LoRA]) -> tuple[int, ...]:
    """(o, i, *k), of the form that shows the kernel; ShapeError where two show different ones."""
    shape = max((form.shape for form in forms), key=len)
    for module, form in zip(modules, forms):
        bare = [k for k in form.shape[2:] if k != 1]
        if bare and bare != [k for k in shape[2:] if k != 1]:
            raise ShapeError(
                f"`{module.label}` has kernels {list(shape[2:])} and {list(form.shape[2:])}",
                next="are the adapters for one model?",
            )
    return shape


def check_extent(
    a: ModuleState, b: ModuleState, ours: tuple[int, int], theirs: tuple[int, int]
) -> None:
    if ours != theirs:
        raise ShapeError(
            f"`{a.label}`: ΔW is {ours} in one adapter and {theirs} in another",
            seen=", ".join([*a.keys[:1], *b.keys[:1]]),
            next="are the adapters for one model?",
        )


def lora_module(
    modules: Sequence[ModuleState],
    up: torch.Tensor,
    down: torch.Tensor,
    shape: tuple[int, ...],
    scale: float,
) -> ModuleState:
    """Two float64 matrices as a LoRA in the place of others, both factors of one dtype."""
    from adaptsurgery.algorithms import LoRA

    lora = LoRA.of_factors(up, down, shape)
    like = [t for m in modules for slot, t in m.tensors.items() if slot not in BIASES]
    tensors = {"up": as_stored(lora.up, like), "down": as_stored(lora.down, like)}
    if len({t.dtype for t in tensors.values()}) > 1:
        wide = torch_dtype(max(tensors.values(), key=lambda t: t.nbytes / t.numel).dtype)
        tensors = {slot: from_torch(to_torch(t).to(wide)) for slot, t in tensors.items()}
    keys = tuple(dict.fromkeys(key for m in modules for key in m.keys))
    return replace(with_factors(modules[0], tensors, scale), keys=keys)
