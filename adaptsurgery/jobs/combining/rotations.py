"""HRA one after the other, as one; and as PEFT's one rank and form want them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adaptsurgery.adapters import lowrank
from adaptsurgery.adapters.rewritings import as_stored
from adaptsurgery.checkpoint.bridge import to_torch
from adaptsurgery.jobs.combining.terms import Term, keys_of
from adaptsurgery_formats import ModuleState
from adaptsurgery_formats.errors import InexactError, ShapeError

if TYPE_CHECKING:
    import torch


CHAINS = ("hra",)  # the rotations of which several make one


def chained(terms: Sequence[Term]) -> ModuleState:
    """One HRA that does what several do, one after the other."""
    import torch

    from adaptsurgery.algorithms import HRA

    modules = [t.module for t in terms]
    first = modules[0]
    if len(modules) == 1:
        return first
    if strange := sorted({m.algorithm for m in modules} - {*CHAINS}):
        raise InexactError(
            f"`{first.label}`: several of {', '.join(strange)} are not one adapter",
            next="merge the adapters into the base instead",
            code="no-sum",
        )
    sizes = {m.tensors["u"].shape[0] for m in modules}
    if len(sizes) > 1:
        raise ShapeError(f"`{first.label}`: rotations of {sorted(sizes)} inputs do not follow")
    columns = []
    for module in modules:
        gs = bool(module.options.get("apply_gs"))
        one = HRA(to_torch(module.tensors["u"]).double(), gs)
        one.check_values()
        columns.append(one.reflections() if gs else one.u)
    u = torch.cat(columns, dim=1)
    tensors = {"u": as_stored(u, [m.tensors["u"] for m in modules])}
    return replace(
        first,
        tensors=tensors,
        rank=u.shape[1],
        options={**first.options, "apply_gs": False},
        keys=keys_of(terms),
    )


def of_one_hra_form(modules: list[ModuleState]) -> list[ModuleState]:
    """PEFT's HRA has one rank and one apply_GS: equal pairs of columns, which undo each other, pad."""
    chains = [m for m in modules if m.algorithm == "hra"]
    plain = {bool(m.options.get("apply_gs")) for m in chains} == {False, True}
    most = max((m.rank or 0 for m in chains), default=0)
    if not plain and all(m.rank == most for m in chains):
        return modules
    if any((most - (m.rank or 0)) % 2 for m in chains):
        return modules  # the layout's own plan refuses: a reflection more or less is another R
    return [_padded(m, most) if m.algorithm == "hra" else m for m in modules]


def _padded(module: ModuleState, rank: int) -> ModuleState:
    import torch

    from adaptsurgery.algorithms import HRA

    u = to_torch(module.tensors["u"])
    if module.options.get("apply_gs"):
        u = HRA(u.double(), True).reflections()
    last = u[:, -1:].expand(-1, rank - u.shape[1])
    wide = as_stored(torch.cat([u, last], dim=1).double(), [module.tensors["u"]])
    return replace(
        module, tensors={"u": wide}, rank=rank, options={**module.options, "apply_gs": False}
    )


def rotated_apart(chain: Sequence[ModuleState], result: ModuleState) -> float:
    """‖X·R' − X·R₁·R₂…‖/‖X·R₁·R₂… − X‖ for random rows X."""
    import torch

    from adaptsurgery.algorithms import HRA

    def turned(module: ModuleState, rows: torch.Tensor) -> torch.Tensor:
        u = to_torch(module.tensors["u"]).double()
        return HRA(u, bool(module.options.get("apply_gs"))).turning(rows)(rows)

    random = torch.Generator().manual_seed(0)
    rows = torch.randn(8, result.tensors["u"].shape[0], generator=random, dtype=torch.float64)
    wanted = rows
    for module in chain:
        wanted = turned(module, wanted)
    apart = float((turned(result, rows) - wanted).norm())
    moved = float((wanted - rows).norm())
    return lowrank.relative(apart, max(moved, 1e-9 * float(rows.norm())))
