"""Every module of a state under the names that a layout writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from adaptsurgery_formats import AdapterState, Format, ModuleState, Tensor
from adaptsurgery_formats.errors import InexactError, refuse_together
from adaptsurgery_formats.names import Component, Names, to_diffusers, to_native
from adaptsurgery_formats.names.renaming import same_scale
from adaptsurgery_formats.resolve import kohya_component
from adaptsurgery_formats.state import ALPHA_OVER_R
from adaptsurgery_formats.traits import traits_of

Parts = Sequence[ModuleState]
Levelled = Sequence[tuple[ModuleState, float]]  # a module at a new scale, and old / new


def names_for(
    state: AdapterState, names: Names | None, target: Format
) -> tuple[Names | None, AdapterState]:
    """The names to write a target with: of an adapter without a base, kohya's need a model's.

    None where no bundled model has its modules; NameLookupError ("ambiguous-model") for several.
    """
    if names is not None or target.name != "kohya" or state.prefix:
        return names, state
    return kohya_component(state) or (None, state)


def renamed(
    state: AdapterState,
    names: Names | None,
    target: Format,
    multiply: Callable[[Levelled], Parts] | None = None,
) -> AdapterState:
    """The state in the target's naming: fused modules are split, or split ones fused.

    Parts of different scales are put at one; ``multiply`` folds the ratios into their tensors, and
    may be a stand-in where shapes are all that matters. Raises InexactError where a fused LoKr
    cannot be cut or parts cannot be fused.
    """
    multiply = multiply or partial(_multiplied, state)
    if names is None:
        return state
    modules: list[ModuleState] = []
    for name in state.components:
        component = names.components.get(name)
        part = list(state.of(name))
        if component is None:
            modules += part
        elif _naming(component, target) == "native":
            modules += to_native(_at_one_scale(part, component, multiply), component)
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


def at_one_scale(part: Parts, component: Component, state: AdapterState) -> list[ModuleState]:
    """The modules, those that make up one fused module all at one scale: the ratios are folded."""
    return _at_one_scale(part, component, partial(_multiplied, state))


def _at_one_scale(
    part: Parts, component: Component, multiply: Callable[[Levelled], Parts]
) -> list[ModuleState]:
    """The modules, those that make up one native module all at one scale."""
    groups: dict[str, list[ModuleState]] = {}
    for module in part:
        if module.naming != "native" and traits_of(module.algorithm).level_slot:
            groups.setdefault(_native_path(module, component), []).append(module)
    changed: dict[int, ModuleState] = {}
    for path, group in groups.items():
        if path and len({m.algorithm for m in group}) == 1 and not same_scale(group):
            changed |= zip(map(id, group), multiply(_levelled(group)))
    return [changed.get(id(module), module) for module in part]


def _levelled(group: Parts) -> list[tuple[ModuleState, float]]:
    """Each at the scale that is farthest from 0, and what its row factor is to be multiplied by."""
    common = max((m.scale for m in group), key=abs)
    return [(_at_scale(m, common), m.scale / common) for m in group]


def _at_scale(module: ModuleState, scale: float) -> ModuleState:
    if module.scale == scale:
        return module
    rank = module.rank or 1
    return module.changed(alpha=scale * rank, rank=rank, rule=ALPHA_OVER_R)


def _multiplied(state: AdapterState, levelled: Levelled) -> list[ModuleState]:
    """The ratios folded into the row factors, which keep their one dtype or all become float32."""
    from adaptsurgery.adapters.rewritings import wider_dtype

    modules = [module for module, _ in levelled]
    ratios = [ratio for _, ratio in levelled]
    for slot in (traits_of(modules[0].algorithm).level_slot, "up_bias"):
        modules = _slot_multiplied(modules, ratios, slot)
    for (old, _), new in zip(levelled, modules):
        if new is not old:
            state.note("rewritten", new.label, fold_step(new) + wider_dtype(old, new))
    return modules


def _slot_multiplied(modules: Parts, ratios: Sequence[float], slot: str) -> list[ModuleState]:
    from adaptsurgery.adapters.rewritings import as_stored
    from adaptsurgery.checkpoint.bridge import to_torch

    def product(n: int, like: list[Tensor]) -> Tensor:
        return as_stored(to_torch(modules[n].tensors[slot]).double() * ratios[n], like)

    own = {n: m.tensors[slot] for n, m in enumerate(modules) if slot in m.tensors}
    changed = {n: product(n, [t]) for n, t in own.items() if ratios[n] != 1}
    if len({t.dtype for t in (own | changed).values()}) > 1:
        changed = {n: product(n, [t for t in own.values() if t.dtype == "F64"]) for n in own}
    return [
        m.with_tensors(**{slot: changed[n]}) if n in changed else m for n, m in enumerate(modules)
    ]


def fold_step(module: ModuleState) -> str:
    """What a report calls it."""
    return f"fold the scale into {traits_of(module.algorithm).level_slot}"


Whole = frozenset[tuple[str, str]]  # native modules, by component and path, that are not cut


def uncut(state: AdapterState, names: Names | None) -> Whole:
    """The native modules of a state that cannot be cut into diffusers' (a fused LoKr)."""
    places = set()
    for module in state.modules:
        component = names.components.get(module.component) if names else None
        try:
            to_diffusers(module, component) if component else None
        except InexactError:
            places.add((module.component, module.path))
    return frozenset(places)


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
