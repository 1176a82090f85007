"""Every module of a state under the names that a layout writes."""

from __future__ import annotations

from dataclasses import replace

from adaptsurgery_formats import AdapterState, Format, ModuleState
from adaptsurgery_formats.errors import InexactError, refuse_together
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
            modules += _split(part, component, state.where)
    return replace(state, modules=modules)


def _split(part: list[ModuleState], component: Component, where: str) -> list[ModuleState]:
    """The modules under diffusers' names; raises InexactError with all that cannot be cut."""
    modules: list[ModuleState] = []
    refused: list[InexactError] = []
    for module in part:
        try:
            modules += to_diffusers(module, component)
        except InexactError as error:
            refused.append(error)
    refuse_together(refused, len(part), where)
    return modules


def _naming(component: Component, target: Format) -> str:
    """The names a target is written in: kohya's own, the base's where one is given, or diffusers'."""
    if target.naming is None:
        return component.kohya_naming
    return "native" if component.stored == "native" else target.naming


Whole = frozenset[tuple[str, str]]  # native modules, by component and path, that are not cut


def uncut(state: AdapterState, names: Names | None) -> Whole:
    """The native modules of a state that cannot be cut into diffusers' (a fused LoKr)."""
    found = set()
    for module in state.modules:
        component = names.components.get(module.component) if names else None
        try:
            to_diffusers(module, component) if component else None
        except InexactError:
            found.add((module.component, module.path))
    return frozenset(found)


def comparable(state: AdapterState, names: Names | None, whole: Whole) -> list[ModuleState]:
    """The modules under diffusers' names, but for those in ``whole``, whose parts are fused.

    ``whole`` holds what either of two states cannot cut, so that the two can be held together.
    """
    if names is None:
        return state.modules
    modules: list[ModuleState] = []
    parts: dict[tuple[str, str], list[ModuleState]] = {}
    for module in state.modules:
        component = names.components.get(module.component)
        home = (module.component, _native_path(module, component))
        if home in whole:
            parts.setdefault(home, []).append(module)
        else:
            modules += to_diffusers(module, component) if component else [module]
    for (name, _), group in parts.items():
        try:
            modules += to_native(group, names.components[name])
        except InexactError:
            modules += group  # not one module: they differ, and are shown so
    return modules


def _native_path(module: ModuleState, component: Component | None) -> str:
    if component is None or module.naming == "native":
        return module.path
    return component.native_of.get(module.path, "")
