"""Whether two adapters do the same: ΔW module by module, from the tensors of both."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from adaptsurgery.adapters.comparing import LOSSY, SAME, VerificationError, compare, verdict
from adaptsurgery.adapters.loading import Loaded, read_adapter
from adaptsurgery.adapters.report import Report
from adaptsurgery.checkpoint.finite import count_nonfinite
from adaptsurgery.checkpoint.watched import unchanged
from adaptsurgery_formats import AdapterState
from adaptsurgery_formats.errors import LayoutError, NameLookupError

if TYPE_CHECKING:
    import torch

    Rows = Callable[[int, int], torch.Tensor]


def verify(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
) -> Report:
    """Compare two adapter files by their ΔW, whatever their layouts and algorithms.

    Raises VerificationError ("not-equal") unless every ΔW agrees to 1e-6 of its norm, a module that
    only one of them has being zero there; a base is needed for names that no bundled table has, and where an HRA or
    a DoRA is held against another algorithm. Bytes that are the same are the same update though they
    be no numbers, and the verdict then says how many; ValueRefused ("non-finite") where others would
    have to be measured.
    """
    with unchanged():
        return _verified(first, second, base)


def _verified(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    base: str | os.PathLike[str] | None,
) -> Report:
    a, b = _loaded(first, base), _loaded(second, base)
    _share_names(a, b)
    _share_component(a, b)
    report = Report("verify", rows=list(compare(a, b)), notes=[*a.state.notes, *b.state.notes])
    wrong = [r for r in report.rows if r.change not in SAME]
    if not wrong:
        report.verdict = verdict(report.rows) + _not_numbers(b.state)
        return report
    worst = max(wrong, key=lambda r: r.error)
    report.verdict = f"{len(wrong)} of {len(report.rows)} modules differ"
    error = VerificationError(
        report.verdict,
        where=b.state.where,
        seen=f"`{worst.module}`: "
        + (f"relative error {worst.error:.3g}" if worst.change == LOSSY else worst.change),
    )
    error.report = report
    raise error


def _not_numbers(state: AdapterState) -> str:
    """What to add to a verdict where some of the bytes that agree are no numbers."""
    tensors = [t for module in state.modules for t in module.tensors.values()]
    tensors += [t for saved in state.saved.values() for t in saved.values()]
    count = sum(map(count_nonfinite, tensors))
    return f"; identical bytes, of which {count} are not numbers" if count else ""


def _loaded(name: str | os.PathLike[str], base: str | os.PathLike[str] | None) -> Loaded:
    try:
        return read_adapter(name, base=base)
    except LayoutError as error:
        if error.code == "unknown-layout":
            error.next += (
                ". A merged checkpoint: verify MERGED --base BASE --adapter ADAPTER[=WEIGHT]"
            )
        raise


def _share_names(a: Loaded, b: Loaded) -> None:
    """Let an adapter without names of its own be looked up where the other one's were found."""
    from adaptsurgery_formats.resolve import find_modules

    for one, other in ((a, b), (b, a)):
        if one.names is None and other.names is not None:
            try:
                one.state = find_modules(one.state, other.names)
            except NameLookupError:
                continue  # it is for another model: compare says which modules are missing
            one.names, one.base = other.names, other.base


def _share_component(a: Loaded, b: Loaded) -> None:
    """Let the one unnamed model of an adapter without names be the other's one component."""
    for one, other in ((a, b), (b, a)):
        mine, theirs = one.state.components, other.state.components
        if one.names is None and len(mine) == len(theirs) == 1 and "" in (mine[0], theirs[0]):
            one.state = _under(one.state, theirs[0])


def _under(state: AdapterState, component: str) -> AdapterState:
    """A state of one component under another name of it."""
    saved = [held for held in state.saved.values() if held]
    return replace(
        state,
        modules=[m.changed(component=component) for m in state.modules],
        saved=dict.fromkeys([component], saved[0]) if saved else {},
    )
