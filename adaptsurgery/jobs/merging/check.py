"""A merged checkpoint held against its base and adapters, by the plain law in float64.

Which rows an adapter means is found by the same matching as in the merge, so a mistake there does
not show here. The arithmetic goes another way than the merge did: whole tensors, one update after
the other, by ``Update.fold``. So it also tells where the streaming engine would be wrong.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptsurgery.adapters.comparing import VerificationError
from adaptsurgery.adapters.report import Report, Row
from adaptsurgery.checkpoint.base import Base, read_json
from adaptsurgery.checkpoint.bridge import to_torch
from adaptsurgery.checkpoint.finite import count_nonfinite
from adaptsurgery.checkpoint.hub import resolve
from adaptsurgery.checkpoint.safetensors import read_safetensors
from adaptsurgery.checkpoint.watched import unchanged
from adaptsurgery.jobs.inputs import open_base
from adaptsurgery.jobs.merging.manifest import manifest_path
from adaptsurgery.jobs.merging.matched import Change
from adaptsurgery.jobs.merging.plan import LINKS_LEFT_OUT, MergePlan, TensorEdit
from adaptsurgery.jobs.merging.planning import Adapters, open_plan
from adaptsurgery.jobs.merging.quantised import Scale
from adaptsurgery.jobs.merging.recipe import MergeRecipe
from adaptsurgery_formats import AdapterState, Note
from adaptsurgery_formats.tensors import Tensor, same_bytes

if TYPE_CHECKING:
    import torch

    from adaptsurgery.core.update import Update

# What float32 arithmetic may add to one rounding, in parts of the tensor's largest number.
NOISE = 2.0**-20
_SHOWN = 5


def verify_merge(
    merged: str | os.PathLike[str],
    base: str | os.PathLike[str],
    adapters: Adapters,
    *,
    allow_unmatched: bool = False,
    inverse: bool = False,
    dequantize: bool = False,
) -> Report:
    """Tell whether ``merged`` is ``base`` with the adapters, tensor by tensor, within one rounding.

    Untouched tensors must have the base's bytes (or, where ``merged`` is of another dtype, its
    numbers rounded). The weights default to those of the adapters as they are given. The matching
    of names is shared with ``merge``; the arithmetic is checked on another way. Raises
    VerificationError ("not-equal", "missing-tensor") at the first tensor that is not so, and
    "extra-tensor" for tensors that a merge would not have written.
    """
    options = MergeRecipe(inverse=inverse, dequantize=dequantize, allow_nonfinite=True)
    with unchanged():
        return _verified(os.fspath(merged), base, adapters, options, allow_unmatched)


def _verified(
    merged: str,
    base: str | os.PathLike[str],
    adapters: Adapters,
    options: MergeRecipe,
    allow_unmatched: bool,
) -> Report:
    plan, states = open_plan(base, adapters, options, allow_unmatched, False, skip_links=True)
    tensors = _by_key(open_base(merged))
    rows = []
    for component, edit in _tensors(plan):
        tensor = tensors.get((component, edit.key))
        if tensor is None:
            raise VerificationError(
                f"`{edit.key}` is not in the merged checkpoint",
                where=merged,
                code="missing-tensor",
            )
        rows.append(_compare(edit, tensor, plan, states, merged))
    _refuse_extra(plan, tensors, merged)
    return _verdict(rows, plan, Path(resolve(merged, kind="base")))


def checkpoints_apart(merged: Path, original: Path) -> dict[str, Any]:
    """How far two checkpoints of the same tensors lie apart: ‖A − B‖/‖B‖ in all, and the worst
    element's difference in parts of its size."""
    a, b = _by_key(open_base(str(merged))), _by_key(open_base(str(original)))
    squares, wholes, worst, changed = 0.0, 0.0, ("", 0.0), 0
    for key in a.keys() & b.keys():
        first, second = a[key], b[key]
        if first.shape != second.shape or same_bytes(first, second):
            continue
        changed += 1
        x, y = to_torch(first).double(), to_torch(second).double()
        squares += float((x - y).square().sum())
        wholes += float(y.square().sum())
        most = float((x - y).abs().max() / y.abs().max().clamp_min(1e-300))
        worst = max(worst, (key[1], most), key=lambda w: w[1])
    return {
        "different_tensors": changed,
        "relative": math.sqrt(squares / wholes) if wholes else 0.0,
        "worst": worst[1],
        "worst_tensor": worst[0],
    }


def _tensors(plan: MergePlan) -> Iterator[tuple[str, TensorEdit]]:
    return ((job.component, t) for job in plan.jobs for t in job.tensors)


def _refuse_extra(plan: MergePlan, tensors: Mapping[tuple[str, str], Tensor], where: str) -> None:
    planned = {(component, edit.key) for component, edit in _tensors(plan)}
    extra = [f"`{c}.{key}`" if c else f"`{key}`" for c, key in sorted(tensors.keys() - planned)]
    if extra:
        more = f" and {len(extra) - _SHOWN} more" if len(extra) > _SHOWN else ""
        raise VerificationError(
            f"{len(extra)} tensors of the merged checkpoint are not in base or adapters",
            where=where,
            seen=", ".join(extra[:_SHOWN]) + more,
            code="extra-tensor",
        )


def _by_key(base: Base) -> dict[tuple[str, str], Tensor]:
    return {(f.component, key): t for f in base.files for key, t in f.tensors.items()}


def _compare(
    edit: TensorEdit, merged: Tensor, plan: MergePlan, states: list[AdapterState], where: str
) -> Row:
    source = _source(edit, plan, states)
    if not edit.changes and edit.scale is None and same_bytes(source, merged):
        return Row(edit.key, "", "identical", detail=_not_numbers(count_nonfinite(merged)))
    got = to_torch(merged)
    wanted = expected(edit, source, plan, states)
    if tuple(got.shape) != tuple(wanted.shape):
        raise _differs(edit, where, f"shape {list(got.shape)}, expected {list(wanted.shape)}")
    got, wanted, count = _numbers(edit, got, wanted, where)
    off = (got.double() - wanted).abs()
    unit, step = _unit(got)
    allowed = unit * wanted.abs() + step + NOISE * wanted.abs().max()
    if not bool((off <= allowed).all()):
        raise _differs(edit, where, f"off by up to {float(off.max()):.3g}")
    error = float(off.max() / wanted.abs().max().clamp_min(1e-300))
    change = "rounded" if error else "identical"
    return Row(edit.key, "", change, error, _not_numbers(count))


def _numbers(
    edit: TensorEdit, got: torch.Tensor, wanted: torch.Tensor, where: str
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Both with 0 where neither is a number, and how many are not: NaN for NaN, infinity for its own.

    Rounded to what is stored: where that overflows, infinity is what is wanted.
    """
    from adaptsurgery.core.rounding import rounded

    held = rounded(wanted, got.dtype) if got.is_floating_point() else wanted
    bad = ~(got.double().isfinite() & held.double().isfinite())
    if not bool(bad.any()):
        return got, wanted, 0
    same = (got == held) | (got.isnan() & held.isnan())
    if not bool(same[bad].all()):
        count = int((bad & ~same).sum())
        raise _differs(edit, where, f"{count} numbers are not finite here, or should not be")
    return got.masked_fill(bad, 0), wanted.masked_fill(bad, 0), int(bad.sum())


def _not_numbers(count: int) -> str:
    return f"{count} of its numbers are NaN or infinite" if count else ""


def _unit(tensor: torch.Tensor) -> tuple[float, float]:
    """A dtype's step beside 1, and its smallest, which numbers below its normal ones are apart."""
    import torch

    if not tensor.is_floating_point():
        return 0.0, 0.0
    dtype = torch.finfo(tensor.dtype)
    return float(dtype.eps), float(dtype.smallest_normal) * float(dtype.eps)


def _differs(edit: TensorEdit, where: str, seen: str) -> VerificationError:
    return VerificationError(
        f"`{edit.key}` is not what base and adapters give",
        where=where,
        seen=seen,
        next="other weights or adapters went into it, or the file was changed since",
    )


def _source(edit: TensorEdit, plan: MergePlan, states: list[AdapterState]) -> Tensor:
    if edit.saved is not None:
        return states[edit.saved.adapter].saved[edit.saved.component][edit.saved.name]
    return read_safetensors(plan.files[edit.file].path).tensors[edit.source]


def expected(
    edit: TensorEdit, source: Tensor, plan: MergePlan, states: list[AdapterState]
) -> torch.Tensor:
    """The tensor in float64 after all changes, in the law's order."""
    from adaptsurgery.core.law import order_of

    out = to_torch(source).double()
    if edit.scale is not None:
        _scale(out, edit.scale, plan)
    ready = [(c, _update(c, plan, states)) for c in edit.changes]
    ready.sort(key=lambda one: order_of(one[1]))
    for change, update in reversed(ready) if plan.options.inverse else ready:
        _apply(out, change, update, plan.options.inverse)
    return out


def _scale(out: torch.Tensor, scale: Scale, plan: MergePlan) -> None:
    """A quantised tensor's numbers by their scales, written out to its whole shape."""
    if scale.file < 0:
        return
    values = to_torch(read_safetensors(plan.files[scale.file].path).tensors[scale.key]).double()
    if values.numel() == 1:
        factors = values.reshape(())
    elif scale.block == (0, 0):
        factors = values.reshape(-1, *(1,) * (out.dim() - 1))
    else:
        (a, b), (rows, columns) = scale.block, out.shape
        factors = values.repeat_interleave(a, 0).repeat_interleave(b, 1)[:rows, :columns]
    out.mul_(factors * scale.factor)


def _update(change: Change, plan: MergePlan, states: list[AdapterState]) -> Update:
    from adaptsurgery.jobs.merging.updates import update_for

    return update_for(change, states, allow_nonfinite=True).scaled(
        plan.adapters[change.adapter].weight
    )


def _apply(out: torch.Tensor, change: Change, update: Update, inverse: bool) -> None:
    """One update on its rows of a float64 tensor, in place."""
    view = out if change.index is None else out[change.index]
    rows = (view.t() if change.turned else view)[change.at : change.at + change.rows]
    if change.what == "bias":
        rows.copy_(_bias(rows, change, update, inverse))
        return
    outputs = change.shape[int(change.turned)]
    span = slice(change.first, change.first + change.rows)
    full = rows.new_zeros((outputs, *rows.shape[1:]))
    full[span] = rows
    done = update.unfold(full) if inverse else update.fold(full)
    rows.copy_(done[span])


def _bias(rows: torch.Tensor, change: Change, update: Update, inverse: bool) -> torch.Tensor:
    """One update on its rows of a bias."""
    full = rows.new_zeros(change.shape[int(change.turned)])
    span = slice(change.first, change.first + change.rows)
    full[span] = rows
    done = update.unfold_bias(full) if inverse else update.fold_bias(full)
    assert done is not None
    return done[span]


def _verdict(rows: list[Row], plan: MergePlan, merged: Path) -> Report:
    notes = [Note(*n) for n in plan.notes if n[0] != LINKS_LEFT_OUT]  # nothing is copied here
    path = manifest_path(merged, merged.is_dir())
    if path.is_file():
        notes += _manifest_notes(read_json(path), plan, str(path))
    worst = max((r.error for r in rows), default=0.0)
    edited = sum(bool(t.changes) for _, t in _tensors(plan))
    text = f"{len(rows)} tensors · {edited} edited · max|W' − ref| {worst:.1g} of the largest"
    if not_numbers := sum(bool(row.detail) for row in rows):
        text += f" · {not_numbers} hold NaN or infinity, as base and adapters give"
    return Report("verify-merge", text, rows, notes, facts={"tensors": len(rows), "edited": edited})


def _manifest_notes(manifest: Mapping[str, Any], plan: MergePlan, where: str) -> Iterator[Note]:
    """Where a manifest names other inputs than those at hand."""
    try:
        hashes = [[f["sha256"] for f in a["files"]] for a in manifest["adapters"]]
        weights = [a["weight"] for a in manifest["adapters"]]
    except (KeyError, TypeError):
        yield Note("bad-manifest", where, "the manifest is not one of ours")
        return
    if hashes != [[f.sha256 for f in a.files] for a in plan.adapters]:
        yield Note("manifest-differs", where, "it names other adapter files, by their hashes")
    if weights != [a.weight for a in plan.adapters]:
        yield Note("manifest-differs", where, f"it names the weights {json.dumps(weights)}")
