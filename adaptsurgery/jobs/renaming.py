"""Every module of a state under the names that a layout writes."""

from __future__ import annotations

from dataclasses import replace

from adaptsurgery_formats import AdapterState, Format, ModuleState
from adaptsurgery_formats.errors import InexactError
from adaptsurgery_formats.names import Component, Names, to_diffusers, to_native


def renamed(state: AdapterState, names: Names | None, target: Format) -> AdapterState:
    """The state in the target's naming: fused modules are split, or split ones fused.

    Raises InexactError where a fused LoKr cannot be cut or parts cannot be fused.
    """
    if names is None:
        return state
    modules: list[ModuleState] = []
    for name in state.components:
        component = names.components.get(name)
        part = list(state.of(name))
        if component is None:
            modules += part
        elif _naming(component, target) == "native":
            modules += to_native(part, component)
        else:
            modules += [m for module in part for m in to_diffusers(module, component)]
    return replace(state, modules=modules)


def _naming(component: Component, target: Format) -> str:
    """The names a target is written in: kohya's own, the base's where one is given, or diffusers'."""
    if target.naming is None:
        return component.kohya_naming
    return "native" if component.stored == "native" else target.naming


def comparable(state: AdapterState, names: Names | None) -> list[ModuleState]:
    """The modules under diffusers' names wherever they can be cut so, to hold two states together."""
    if names is None:
        return state.modules
    modules: list[ModuleState] = []
    for module in state.modules:
        component = names.components.get(module.component)
        try:
            modules += to_diffusers(module, component) if component else [module]
        except InexactError:
            modules.append(module)
    return modules
