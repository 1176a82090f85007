"""What comes along with the modules: configs, parameters that are replaced, the layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from adaptsurgery.adapters.loading import Loaded
from adaptsurgery.jobs.combining.terms import SummedLayer, WeightedAdapter
from adaptsurgery_formats import AdapterState, Tensor
from adaptsurgery_formats.errors import ValueRefused
from adaptsurgery_formats.tensors import same_bytes

_SHAPING = (
    "peft_type",
    "r",
    "rank_pattern",
    "use_effective_conv2d",
    "decompose_both",
    "decompose_factor",
    "apply_GS",
)


def shell_of(parts: Sequence[WeightedAdapter], first: Loaded) -> AdapterState:
    """The result's state without modules: the first source's metadata and config, all notes."""
    notes = list(dict.fromkeys(note for part in parts for note in part.state.notes))
    saved: dict[str, dict[str, Tensor]] = {}
    for part in parts:
        for component, tensors in part.state.saved.items():
            saved.setdefault(component, {}).update(tensors)
    return replace(first.state, modules=[], saved=saved, config=_config(parts), notes=notes)


def _config(parts: Sequence[WeightedAdapter]) -> dict[str, dict[str, Any]]:
    """The first PEFT config of each component, with the replaced modules of all."""
    merged: dict[str, dict[str, Any]] = {}
    for part in parts:
        for component, config in part.state.config.items():
            mine = merged.setdefault(component, dict(config))
            replaced = [
                *(mine.get("modules_to_save") or ()),
                *(config.get("modules_to_save") or ()),
            ]
            if replaced:
                mine["modules_to_save"] = list(dict.fromkeys(replaced))
            if mine.get("bias", "none") == "none" and "bias" in config:
                mine["bias"] = config["bias"]
    return merged


def check_saved(
    parts: Sequence[WeightedAdapter], layers: dict[tuple[str, str], SummedLayer]
) -> None:
    """Refuse a parameter that two adapters replace by different numbers, or that one also adds to."""
    seen: dict[tuple[str, str], tuple[Tensor, str]] = {}
    for part in parts:
        for component, tensors in part.state.saved.items():
            for key, tensor in tensors.items():
                other, where = seen.setdefault((component, key), (tensor, part.state.where))
                if other.shape != tensor.shape or not same_bytes(other, tensor):
                    raise ValueRefused(
                        f"`{key}` is replaced by two adapters, each in its own way",
                        where=part.state.where,
                        seen=f"also by {where}",
                        next="leave one of them out",
                        code="replaced-twice",
                    )
                if (component, key.rpartition(".")[0]) in layers:
                    raise ValueRefused(
                        f"`{key}` is replaced by one adapter and changed by another",
                        where=part.state.where,
                        next="merge one of them into the base first",
                        code="replaced-and-adapted",
                    )


def in_layout(state: AdapterState, parts: Sequence[WeightedAdapter], target: str) -> AdapterState:
    """The state as one of PEFT's only where a source's config holds for all of its modules.

    PEFT's layout trusts what PEFT wrote; anything else it checks against its rules, and of the
    config there remains what shapes no tensor.
    """
    if any(part.state.layout != "peft" for part in parts):
        others = [p.state.layout for p in parts if p.state.layout != "peft"]
        return replace(state, layout=state.layout if state.layout != "peft" else others[0])
    algorithms = {m.algorithm for m in state.modules}
    if algorithms == {"lora"}:
        return replace(state, layout="combined")
    shaping = [
        {c: {k: config.get(k) for k in _SHAPING} for c, config in part.state.config.items()}
        for part in parts
    ]
    if all(each == shaping[0] for each in shaping):
        return state
    if target != "peft":
        return replace(state, layout="combined", config={})
    rest = {
        component: {k: v for k, v in config.items() if k not in _SHAPING}
        for component, config in state.config.items()
    }
    return replace(state, layout="combined", config=rest)
