"""The update that a planned change stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adaptsurgery.adapters.updates import nonfinite_allowed, update_of
from adaptsurgery.jobs.merging.matched import Change
from adaptsurgery_formats import AdapterState, ModuleState
from adaptsurgery_formats.fitting import fit
from adaptsurgery_formats.names.orientation import with_sign

if TYPE_CHECKING:
    from adaptsurgery.core.update import Update


def update_for(
    change: Change, states: Sequence[AdapterState], allow_nonfinite: bool = False
) -> Update:
    """The whole module's update; ``change`` says which of its rows go where."""
    state = states[change.adapter]
    module = fit(with_sign(state.modules[change.module], change.turned), change.shape, state.where)
    with nonfinite_allowed(allow_nonfinite):
        return update_of(_as_norm(module), None, state.where)


def _as_norm(module: ModuleState) -> ModuleState:
    """A full difference of a vector is a norm's, under the other name."""
    diff = module.tensors.get("diff")
    if module.algorithm != "full" or diff is None or len(diff.shape) != 1:
        return module
    bias = {"b_norm": module.tensors["diff_b"]} if "diff_b" in module.tensors else {}
    return replace(module, algorithm="norm", tensors={"w_norm": diff, **bias})
