"""From the names in a file to the modules of a model, by look-up only.

A parsed state of kohya or LyCORIS has flat names, ComfyUI's has dotted native ones, PEFT's the
model's own. ``resolve`` finds each in a model's list (``Names``), checks that the adapter's shapes
fit the weight's, and gives each module its component, naming and path. Without a base the bundled
tables are tried: the one that has every name, with fitting shapes, is taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from adaptsurgery_formats.errors import (
    LayoutError,
    NameLookupError,
    ShapeError,
    SurgeryError,
    nearest,
)
from adaptsurgery_formats.fitting import fit
from adaptsurgery_formats.names import TABLES, Component, Names, flatten, table
from adaptsurgery_formats.names.families import CLIP_TEXT
from adaptsurgery_formats.state import (
    AdapterState,
    ModuleState,
)
from adaptsurgery_formats.tensors import Tensor


def find_modules(state: AdapterState, names: Names) -> AdapterState:
    """The state with every module found in ``names``.

    Names that the base has not, but that its family of models has for rows of it, are found too,
    and so are those that lack its leading segments or have others. Raises NameLookupError for a name
    that is unknown, ambiguous, or that two entries stand for, LayoutError ("interleaved-weight"),
    and ShapeError where the adapter does not fit the weight.
    """
    modules = _placed(_stripped(state.modules, names), names, state)
    refuse_twice(modules, state.where)
    saved = _resolve_saved(state, names, modules)
    return replace(state, modules=modules, saved=saved, model=names.model)


def _by_other_names(
    group: list[ModuleState], names: Names, state: AdapterState
) -> list[ModuleState]:
    """Modules that the base calls otherwise; what finds them is imported where some are left over."""
    from adaptsurgery_formats.other_names import by_other_names

    return by_other_names(group, list(_candidates(group[0], names)), state)


def _placed(modules: list[ModuleState], names: Names, state: AdapterState) -> list[ModuleState]:
    """Each module at its place: by the base's own names, or all of a component by its family's."""
    strays = {_home(m) for m in modules if not _places(m, names)}
    if not strays:
        return [_resolve_module(m, names, state.where) for m in modules]
    placed = {
        number: _resolve_module(m, names, state.where)
        for number, m in enumerate(modules)
        if _home(m) not in strays
    }
    for home in strays:
        numbers = [number for number, m in enumerate(modules) if _home(m) == home]
        group = [modules[number] for number in numbers]
        known = _by_other_names(group, names, state) or [
            _resolve_module(m, names, state.where) for m in group
        ]
        placed |= zip(numbers, known)
    return [placed[number] for number in range(len(modules))]


def _in_family(module: ModuleState, names: Names) -> bool:
    """Whether a flat name is one that the base's family of models has for some of its weights."""
    return any(module.path in c.dotted for c in _candidates(module, names))


def _home(module: ModuleState) -> tuple[str, str]:
    """What tells which part of a pipeline a module is of: its component, or its prefix."""
    return module.component, str(module.options.get("prefix", ""))


def _stripped(modules: list[ModuleState], names: Names) -> list[ModuleState]:
    """Modules whose prefix is not known, without the shortest one that leaves names of the model."""
    if not all(m.options.get("any_prefix") for m in modules):
        return modules
    first = modules[0].path
    for at in (i + 1 for i, letter in enumerate(first) if letter == "_"):
        prefix = first[:at]
        if not all(m.path.startswith(prefix) for m in modules):
            break
        bare = [m.changed(path=m.path.removeprefix(prefix)) for m in modules]
        if all(_places(m, names) or _in_family(m, names) for m in bare):
            return bare
    return modules


def identify(state: AdapterState) -> list[tuple[Names, AdapterState]]:
    """Every bundled table that has all of the state's modules, with the state resolved in it."""
    matches = []
    for name in [state.model] if state.model in TABLES else TABLES:
        if not all(_places(m, table(name)) for m in state.modules):
            continue  # before the look-up fails: its hint takes longer than all the rest
        try:
            matches.append((table(name), find_modules(state, table(name))))
        except SurgeryError:
            continue
    return matches


def resolve_by_tables(state: AdapterState) -> tuple[Names, AdapterState]:
    """The bundled table that fits, and the state resolved in it.

    Several tables may share an encoder: where they agree on every module the first is taken.
    Raises NameLookupError if none fits ("unknown-model") or several disagree ("ambiguous-model").
    """
    matches = identify(state)
    if not matches:
        raise _no_table(state)
    if len({_spots(resolved) for _, resolved in matches}) > 1:
        raise NameLookupError(
            "the names fit several models, which put them in different components",
            where=state.where,
            seen=", ".join(names.model for names, _ in matches),
            next="say which: --base " + " or --base ".join(names.model for names, _ in matches),
            code="ambiguous-model",
        )
    return matches[0]


def _spots(state: AdapterState) -> tuple[tuple[str, str, str], ...]:
    return tuple((m.component, m.naming, m.path) for m in state.modules)


def _no_table(state: AdapterState) -> NameLookupError:
    """An error that says how far the closest table came."""
    missed = {name: _missed(state, table(name)) for name in TABLES}
    name = min(missed, key=lambda n: len(missed[n]))
    known = len(state.modules) - len(missed[name])
    closest = f"closest is {name} with {known} of {len(state.modules)} modules"
    if known and missed[name]:
        try:
            _resolve_module(missed[name][0], table(name), state.where)
        except SurgeryError as error:
            closest += f"; {error.what} {error.next}".rstrip()
    return NameLookupError(
        "no bundled model has these modules",
        where=state.where,
        seen=closest if known > 0 else f"`{state.modules[0].path}` and others",
        next="pass the model they belong to: --base MODEL (a safetensors file or a folder)",
        code="unknown-model",
    )


def _missed(state: AdapterState, names: Names) -> list[ModuleState]:
    """The modules that a model does not have, or not in such a shape."""
    missed = []
    for module in state.modules:
        try:
            if _places(module, names):  # else the error would look for the nearest name
                _resolve_module(module, names, state.where)
                continue
        except SurgeryError:
            pass
        missed.append(module)
    return missed


def _resolve_module(module: ModuleState, names: Names, where: str) -> ModuleState:
    places = _places(module, names)
    if len(places) > 1:  # encoders of one kind differ in size
        places = {place for place in places if _fits_at(module, place, names, where)} or places
    if len(places) != 1:
        raise _lookup_error(module, names, sorted(places), where)
    component_name, naming, path = places.pop()
    component = names.components[component_name]
    placed = module
    if (module.component, module.naming, module.path) != (component_name, naming, path):
        placed = module.changed(component=component_name, naming=naming, path=path)
    shape = component.shape(path, naming)
    return fit(placed, shape, where) if shape is not None else placed


def _fits_at(module: ModuleState, place: tuple[str, str, str], names: Names, where: str) -> bool:
    component, naming, path = place
    shape = names.components[component].shape(path, naming)
    try:
        return shape is None or bool(fit(module, shape, where))
    except ShapeError:
        return False


def _places(module: ModuleState, names: Names) -> set[tuple[str, str, str]]:
    """Every (component, naming, path) that a module's name could stand for."""
    return {
        (component.name, naming, path)
        for component in _candidates(module, names)
        for naming, path in _spellings(module, component)
    }


def _candidates(module: ModuleState, names: Names) -> Iterable[Component]:
    """The components in which a module may lie; none where its prefix is not the model's."""
    prefix = module.options.get("prefix")
    if module.naming == "flat" and prefix is not None:
        hits = [c for c in names.components.values() if prefix in c.kohya_prefixes]
        alone = names.components.get("") if len(names.components) == 1 else None
        return [alone] if alone and not hits else hits  # one unnamed model takes any prefix
    if module.component in names.components:
        return [names.components[module.component]]
    return names.components.values()


def _spellings(module: ModuleState, component: Component) -> list[tuple[str, str]]:
    """(naming, path) of each module of the component that a name could stand for.

    A base's own list may be a CLIPTextModel's with or without ``text_model.``, which
    transformers 5 dropped: adapters go by either.
    """
    spellings = _spelled(module.path, module.naming, component)
    if spellings or component.naming != "base":
        return spellings
    clip = flatten(f"{CLIP_TEXT}.") if module.naming == "flat" else f"{CLIP_TEXT}."
    other = module.path.removeprefix(clip)
    return _spelled(other if other != module.path else clip + other, module.naming, component)


def _spelled(path: str, naming: str, component: Component) -> list[tuple[str, str]]:
    if naming == "flat":
        return component.find(path)
    located = component.locate(path)
    return [located] if located else []


def _lookup_error(
    module: ModuleState, names: Names, places: list[tuple[str, str, str]], where: str
) -> NameLookupError:
    if places:
        could = " or ".join(f"`{c}.{p}`" if c else f"`{p}`" for c, _, p in places)
        return NameLookupError(
            f"`{module.path}` could be {could}",
            where=where,
            seen=f"`{module.label}` in {names.where}",
            next="pass a --base of just that component",
            code="ambiguous-module",
        )
    candidates = list(_candidates(module, names))
    prefix = module.options.get("prefix")
    if not candidates and prefix is not None:
        return NameLookupError(
            f"{names.where} has nothing under the prefix `{prefix}_`",
            where=where,
            seen=f"{prefix}_{module.path}",
            next="prefixes: " + ", ".join(f"`{p}_`" for p in names.by_prefix),
            code="unknown-prefix",
        )
    known: list[str] = []
    for component in candidates:
        known += component.index if module.naming == "flat" else component.modules
    return NameLookupError(
        f"`{module.path}` is no module of {names.where}",
        where=where,
        seen=module.keys[0] if module.keys else module.label,
        next=nearest(module.path, known) or "is it for another model? pass its --base",
    )


def refuse_twice(modules: list[ModuleState], where: str) -> None:
    """Two entries for one module, in two spellings or two namings, would be read by nobody alike."""
    seen: dict[tuple[str, str, str], ModuleState] = {}
    for module in modules:
        spot = (module.component, module.path, module.algorithm)
        if spot in seen:
            first = seen[spot]
            raise NameLookupError(
                f"`{module.label}` is adapted twice",
                where=where,
                seen=", ".join([*first.keys[:1], *module.keys[:1]]),
                next="remove one of the two; readers would take the last or the sum",
                code="duplicate-module",
            )
        seen[spot] = module


def _resolve_saved(
    state: AdapterState, names: Names, modules: list[ModuleState]
) -> dict[str, dict[str, Tensor]]:
    """Replaced parameters under the component that the modules were found in."""
    if not any(state.saved.values()):
        return {}
    components = list(dict.fromkeys(m.component for m in modules))
    moved: dict[str, dict[str, Tensor]] = {}
    for component, tensors in state.saved.items():
        home = component
        if component not in names.components and len(components) == 1:
            home = components[0]
        moved[home] = dict(tensors)
    return moved


def kohya_component(state: AdapterState) -> tuple[Names, AdapterState] | None:
    """The model whose names a PEFT or LyCORIS adapter without a base has, for kohya's spelling.

    None where no bundled table has them: the names are then flattened as they are. Raises
    NameLookupError ("ambiguous-component") where tables put them under different prefixes.
    """
    matches = identify(state)
    prefixes = {
        tuple(dict.fromkeys(names.components[m.component].kohya_prefixes[0] for m in s.modules))
        for names, s in matches
    }
    if len(prefixes) > 1:
        raise NameLookupError(
            "these modules are in several models, under different kohya prefixes",
            where=state.where,
            seen=", ".join(f"{n.model}: {s.components[0]}" for n, s in matches),
            next="say which model: --base " + " or --base ".join(n.model for n, _ in matches),
            code="ambiguous-model",
        )
    return matches[0] if matches else None


def require_resolved(state: AdapterState) -> None:
    """Raise LayoutError if flat names were not looked up."""
    if any(m.naming == "flat" for m in state.modules):
        raise LayoutError(
            "flat names cannot be told apart without the base's module list",
            where=state.where,
            next="--base MODEL (a safetensors file, a folder, or sd15, sd2, sdxl, flux)",
            code="base-needed",
        )
