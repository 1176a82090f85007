"""An adapter at a lower rank: the nearest one, by QR and a small SVD of each module's factors.

LoHa and LoKr are cut through their LoRA forms and come out as LoRA. The scale s of a module stays
(alpha = s·rank), and so does the dtype: factors are rounded once, and the error that is reported
is that of the rounded ones. Nothing is clamped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adaptsurgery.adapters import lowrank
from adaptsurgery.adapters.comparing import EXACT
from adaptsurgery.adapters.loading import Loaded
from adaptsurgery.adapters.lowrank import Spec, in_naming, lora_form, with_factors
from adaptsurgery.adapters.report import Report, Row
from adaptsurgery.adapters.rewritings import as_stored
from adaptsurgery.adapters.updates import is_nonfinite_allowed, nonfinite_allowed, nonfinite_of
from adaptsurgery.adapters.writing import Progress, check_paths, writable, write_adapter
from adaptsurgery.checkpoint.bridge import from_torch, torch_dtype
from adaptsurgery.jobs.change import note_kernels
from adaptsurgery.jobs.values import is_whole
from adaptsurgery_formats import ModuleState, Tensor
from adaptsurgery_formats.errors import LayoutError, ShapeError, ValueRefused
from adaptsurgery_formats.traits import traits_of

if TYPE_CHECKING:
    import torch

    from adaptsurgery.algorithms import LoRA


def resize(
    source: Spec,
    out: Spec,
    *,
    rank: int | None = None,
    energy: float | None = None,
    to: str | None = None,
    base: Spec | None = None,
    layout: str | None = None,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    hashes: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Write the adapter at ``source`` to ``out`` with every module at a lower rank.

    ``rank`` is the highest that a module keeps; ``energy`` E (0 < E ≤ 1) keeps of each module the
    smallest k with Σ_{i≤k} σᵢ² ≥ E·Σ σᵢ², which bounds its relative error by √(1 − E). Exactly one
    of them is given. A LoRA of no higher rank stays as it is, byte for byte; so do dense
    differences, norms and rotations. A DoRA keeps its magnitude.

    ``to`` is the layout to write, the source's by default; ``base`` gives the module list. The
    report has each module's rank before and after and its relative error, 1e-6 and less being
    float32's rounding. A module that is to be cut and is not finite is refused, or stays as it is with
    ``allow_nonfinite``. Raises LayoutError ("rank-or-energy"), ValueRefused ("bad-energy"), and
    what loading and writing raise.
    """
    goal = _Goal(rank, energy)
    (loaded,) = lowrank.load_together([source], base=base, to=to, layout=layout)
    target = writable(to or loaded.state.layout)
    check_paths(loaded.paths, out, target, overwrite, loaded.base_place)
    state = in_naming(loaded.state, loaded.names, target)
    with nonfinite_allowed(allow_nonfinite):
        cuts = [_cut(module, loaded, goal) for module in state.modules]
    note_kernels(loaded)
    _note_changes(loaded, cuts)
    result = replace(loaded, state=replace(state, modules=[cut.written for cut in cuts]))
    report = write_adapter(
        result,
        Path(out),
        target.name,
        allow_nonfinite=allow_nonfinite,
        overwrite=overwrite,
        dry_run=dry_run,
        hashes=hashes,
        progress=progress,
    )
    return _told(report, cuts)


class _Goal:
    """How much of a module is kept: a rank, or a share of its energy."""

    def __init__(self, rank: int | None, energy: float | None) -> None:
        if (rank is None) == (energy is None):
            raise LayoutError(
                "one of rank and energy is needed, and not both",
                next="--rank N, or --energy E",
                code="rank-or-energy",
            )
        if rank is not None and not is_whole(rank):
            raise ShapeError(f"no LoRA has rank {rank}", next="a rank of at least 1")
        if energy is not None and not 0 < energy <= 1:
            raise ValueRefused(
                f"no share of the energy is {energy}", next="0 < E ≤ 1", code="bad-energy"
            )
        self.rank, self.energy = rank, energy

    def of(self, s: torch.Tensor) -> int:
        """How many of the singular values ``s``, in falling order, are kept; at least one."""
        if self.rank is not None:
            return min(self.rank, len(s))
        assert self.energy is not None
        kept = s.square().cumsum(0)
        return min(int((kept < self.energy * kept[-1]).sum()) + 1, len(s))


@dataclass(frozen=True)
class _Cut:
    """A module before and after; ``apart`` and ``total`` are ‖c·Δ − c'·Δ'‖ and ‖c·Δ‖."""

    before: ModuleState
    written: ModuleState
    apart: float = 0.0
    total: float = 0.0

    @property
    def error(self) -> float:
        return lowrank.relative(self.apart, self.total)

    def row(self) -> Row:
        if self.written is self.before:
            return Row(self.before.label, self.before.algorithm, "identical")
        change = "rounded" if self.error <= EXACT else "lossy"
        before = self.before.rank or "full"
        detail = f"rank {before} → {self.written.rank}"
        return Row(self.before.label, self.written.algorithm, change, self.error, detail)


def _cut(module: ModuleState, loaded: Loaded, goal: _Goal) -> _Cut:
    from adaptsurgery.core.linalg import factor_svd

    if not traits_of(module.algorithm).low_rank:
        return _Cut(module, module)
    if module.algorithm == "lora" and goal.rank is not None and (module.rank or 0) <= goal.rank:
        return _Cut(module, module)
    if is_nonfinite_allowed() and nonfinite_of(module):
        text = "it holds NaN or infinity: it has no lower rank, and stays as it is"
        loaded.state.note("not-cut", module.label, text)
        return _Cut(module, module)
    form = lora_form(module, loaded.names, loaded.state.where)
    u, s, vt = factor_svd(*form.factors())
    k = goal.of(s)
    if module.algorithm == "lora" and k >= (module.rank or 0):
        return _Cut(module, module)
    root = s[:k].sqrt()
    written = _written(module, form, u[:, :k] * root, root[:, None] * vt[:k])
    after = lora_form(written, loaded.names, loaded.state.where)
    apart, total = lowrank.terms_apart([(module.scale, form)], [(written.scale, after)])
    return _Cut(module, written, apart, total)


def _written(module: ModuleState, form: LoRA, up: torch.Tensor, down: torch.Tensor) -> ModuleState:
    """The factors as a module in the place of another, in its dtype, at its scale."""
    from adaptsurgery.algorithms import LoRA

    lora = LoRA.of_factors(up, down, form.shape)
    factors = {
        slot: t for slot, t in module.tensors.items() if slot not in ("up_bias", "magnitude")
    }
    kept = {slot: t for slot, t in module.tensors.items() if slot not in factors}
    tensors = {"up": _rounded(lora.up, factors), "down": _rounded(lora.down, factors), **kept}
    return with_factors(module, tensors, module.scale)


def _rounded(wide: torch.Tensor, factors: dict[str, Tensor]) -> Tensor:
    """In the widest of the factors' dtypes; in float32 where its range is too small."""
    import torch

    from adaptsurgery.core.rounding import rounded

    dtype = torch_dtype(next(iter(factors.values())).dtype)
    for tensor in factors.values():
        dtype = torch.promote_types(dtype, torch_dtype(tensor.dtype))
    narrow = rounded(wide.contiguous(), dtype)
    return from_torch(narrow) if bool(torch.isfinite(narrow).all()) else as_stored(wide, [])


def _note_changes(loaded: Loaded, cuts: Sequence[_Cut]) -> None:
    """Say which algorithms became LoRA, which were left alone, and what a DoRA's error is of."""
    become = Counter(c.before.algorithm for c in cuts if c.before.algorithm != c.written.algorithm)
    for algorithm, count in become.items():
        text = f"{count} modules of {algorithm} are LoRA now: cut through their LoRA forms"
        loaded.state.note("as-lora", loaded.state.where, text)
    left = Counter(c.before.algorithm for c in cuts if not traits_of(c.before.algorithm).low_rank)
    for algorithm, count in left.items():
        text = f"{count} modules of {algorithm} have no such rank and stay as they are"
        loaded.state.note("not-cut", loaded.state.where, text)
    if any("magnitude" in c.before.tensors and c.written is not c.before for c in cuts):
        text = "a DoRA's error is that of Δ; its magnitudes are kept"
        loaded.state.note("dora-error", loaded.state.where, text)


def _told(report: Report, cuts: Sequence[_Cut]) -> Report:
    rows = [cut.row() for cut in cuts]
    moved = [row for row in rows if row.change != "identical"]
    overall = lowrank.relative(
        math.hypot(*(cut.apart for cut in cuts)), math.hypot(*(cut.total for cut in cuts))
    )
    before, after = _ranks([c.before for c in cuts]), _ranks([c.written for c in cuts])
    report.job, report.rows = "resize", rows
    report.verdict = f"{len(rows)} modules, rank {_shown(before)} → {_shown(after)}: "
    report.verdict += (
        f"{len(rows) - len(moved)} as they were"
        if not moved
        else (
            f"{len(moved)} cut, relative error up to {max(r.error for r in moved):.2g}, "
            f"over all {overall:.2g}"
        )
    )
    report.facts |= {"ranks": {"before": before, "after": after}, "relative_error": overall}
    return report


def _ranks(modules: Sequence[ModuleState]) -> dict[str, int]:
    """How many modules have which rank; "full" where none shows."""
    low = [m for m in modules if traits_of(m.algorithm).low_rank]
    counted = Counter(m.rank or 0 for m in low)
    return {str(rank or "full"): counted[rank] for rank in sorted(counted)}


def _shown(ranks: dict[str, int]) -> str:
    names = list(ranks)
    if len(names) < 2:
        return names[0] if names else "none"
    return f"{names[0]}…{names[-1]}"
