"""Sums of norms' weights and of biases, and zeros where a layout wants a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adaptsurgery.adapters.rewritings import as_stored
from adaptsurgery.checkpoint.bridge import from_torch, to_torch
from adaptsurgery.jobs.combining.terms import Term, keys_of
from adaptsurgery_formats import ModuleState, Tensor
from adaptsurgery_formats.errors import ShapeError
from adaptsurgery_formats.traits import traits_of

if TYPE_CHECKING:
    import torch


def is_vector(module: ModuleState) -> bool:
    """Whether a module changes a norm's weight (n,): as norm, or as a dense difference of it."""
    diff = module.tensors.get("diff")
    row = traits_of(module.algorithm)
    return row.vector or (row.dense and diff is not None and len(diff.shape) == 1)


def sum_of_vectors(terms: Sequence[Term]) -> ModuleState:
    """The sum of changes of a norm, slot by slot."""
    first = terms[0].module
    if len({t.module.algorithm for t in terms}) > 1:
        raise ShapeError(
            f"`{first.label}` is a norm in one adapter and not in another",
            seen=", ".join(t.module.algorithm for t in terms),
        )
    slots = [s for s in ("diff", "w_norm", "b_norm") if any(s in t.module.tensors for t in terms)]
    held = {
        slot: [(t.weight, t.module.tensors[slot]) for t in terms if slot in t.module.tensors]
        for slot in slots
    }
    tensors = {slot: weighted_sum(each, first.label) for slot, each in held.items()}
    return replace(first, tensors=tensors, keys=keys_of(terms))


def weighted_sum(held: Sequence[tuple[float, Tensor]], label: str) -> Tensor:
    """Σ c·t; the tensor itself where there is one, at 1."""
    if len(held) == 1 and held[0][0] == 1.0:
        return held[0][1]
    if len({t.shape for _, t in held}) > 1:
        shapes = " and ".join(str(list(t.shape)) for _, t in held)
        raise ShapeError(f"`{label}`: {shapes} do not add", next="are the adapters for one model?")
    terms: list[torch.Tensor] = [c * to_torch(t).double() for c, t in held]
    return as_stored(sum(terms[1:], terms[0]), [t for _, t in held])


def _zeros_like(tensor: Tensor) -> Tensor:
    return from_torch(to_torch(tensor) * 0)


def zeroed(module: ModuleState) -> ModuleState:
    """The module with a Δ of 0: its first factor, or all that is added, is zeros."""
    row = traits_of(module.algorithm)
    slots = list(module.tensors) if row.dense else [row.factor_slot(module.tensors)]
    slots += ["up_bias"] if "up_bias" in module.tensors else []
    return module.with_tensors(**{slot: _zeros_like(module.tensors[slot]) for slot in slots})
