"""From the names in a file to the modules of a model, by look-up only.

A parsed state of kohya or LyCORIS has flat names, ComfyUI's has dotted native ones, PEFT's the
model's own. ``resolve`` finds each in a model's list (``Names``), checks that the adapter's shapes
fit the weight's, and gives each module its component, naming and path. Without a base the bundled
tables are tried: the one that has every name, with fitting shapes, is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from adaptsurgery_formats.errors import (
    LayoutError,
    NameLookupError,
    ShapeError,
    SurgeryError,
    nearest,
)
from adaptsurgery_formats.names import TABLES, Component, Names, table
from adaptsurgery_formats.state import (
    AdapterState,
    ModuleState,
    delta_shape,
    kernel_of,
    may_be_transposed,
    shapes_of,
)
from adaptsurgery_formats.tensors import Tensor
from adaptsurgery_formats.traits import traits_of


def resolve(state: AdapterState, names: Names) -> AdapterState:
    """The state with every module found in ``names``.

    Raises NameLookupError for a name that is unknown, ambiguous, or that two entries stand for,
    and ShapeError where the adapter does not fit the weight.
    """
    modules = [_resolve_module(m, names, state.where) for m in _stripped(state.modules, names)]
    refuse_twice(modules, state.where)
    saved = _resolve_saved(state, names, modules)
    return replace(state, modules=modules, saved=saved, model=names.model)


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
        if all(_places(m, names) for m in bare):
            return bare
    return modules


def identify(state: AdapterState) -> list[tuple[Names, AdapterState]]:
    """Every bundled table that has all of the state's modules, with the state resolved in it."""
    found = []
    for name in [state.model] if state.model in TABLES else TABLES:
        if not all(_places(m, table(name)) for m in state.modules):
            continue  # before the look-up fails: its hint takes longer than all the rest
        try:
            found.append((table(name), resolve(state, table(name))))
        except SurgeryError:
            continue
    return found


def resolve_by_tables(state: AdapterState) -> tuple[Names, AdapterState]:
    """The bundled table that fits, and the state resolved in it.

    Several tables may share an encoder: where they agree on every module the first is taken.
    Raises NameLookupError if none fits ("unknown-model") or several disagree ("ambiguous-model").
    """
    found = identify(state)
    if not found:
        raise _no_table(state)
    if len({_spots(resolved) for _, resolved in found}) > 1:
        raise NameLookupError(
            "the names fit several models, which put them in different components",
            where=state.where,
            seen=", ".join(names.model for names, _ in found),
            next="say which: --base " + " or --base ".join(names.model for names, _ in found),
            code="ambiguous-model",
        )
    return found[0]


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
    found = _places(module, names)
    if len(found) > 1:  # encoders of one kind differ in size
        found = {place for place in found if _fits_at(module, place, names, where)} or found
    if len(found) != 1:
        raise _lookup_error(module, names, sorted(found), where)
    component_name, naming, path = found.pop()
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
    found = _spelled(module.path, module.naming, component)
    if found or component.naming != "base":
        return found
    clip = "text_model_" if module.naming == "flat" else "text_model."
    other = module.path.removeprefix(clip)
    return _spelled(other if other != module.path else clip + other, module.naming, component)


def _spelled(path: str, naming: str, component: Component) -> list[tuple[str, str]]:
    if naming == "flat":
        return component.find(path)
    located = component.locate(path)
    return [located] if located else []


def _lookup_error(
    module: ModuleState, names: Names, found: list[tuple[str, str, str]], where: str
) -> NameLookupError:
    if found:
        could = " or ".join(f"`{c}.{p}`" if c else f"`{p}`" for c, _, p in found)
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


def fit(module: ModuleState, shape: tuple[int, ...], where: str) -> ModuleState:
    """The module with its shapes as the weight (o, i, *k) has them.

    Accepts the transposed weights of transformers' Conv1D (i, o) and of embeddings (vocab, dim).
    A LoRA for a 1×1 convolution may be stored as a linear's and the reverse: viewed anew.
    Raises ShapeError where o or i·∏k do not agree.
    """
    row = traits_of(module.algorithm)
    if row.vector or len(shape) == 1:
        return _fit_norm(module, shape, where)
    if not shape:
        raise ShapeError(f"`{module.label}`: the base's weight is one number", where=where)
    out, columns = delta_shape(module)
    ways = [(shape[0], math.prod(shape[1:]))]
    if len(shape) == 2 and may_be_transposed(module):
        ways.append((shape[1], shape[0]))
    if not out:  # and where nothing shows the inputs either, the update itself is asked later
        fits = columns in (0, *(i for _, i in ways))
    elif not columns:  # of a bias alone
        fits = out in [o for o, _ in ways]
    else:
        fits = (out, columns) in ways
    if "magnitude" in module.tensors:  # transposed weights have their inputs first
        fits = fits and module.tensors["magnitude"].numel in (out, *shape[:2])
    if not fits or not _kernel_fits(module, shape):
        shapes = ", ".join(f"{s} {list(t.shape)}" for s, t in module.tensors.items())
        raise ShapeError(
            f"`{module.label}`: ΔW is ({out}, {columns}), the weight is {list(shape)}",
            where=where,
            seen=shapes,
            next="is the adapter for this base?",
        )
    return _reshaped(module, shape)


def _fit_norm(module: ModuleState, shape: tuple[int, ...], where: str) -> ModuleState:
    sizes = {t.shape for t in module.tensors.values()}
    if traits_of(module.algorithm).dense and sizes == {(shape[0],)}:
        return module
    raise ShapeError(
        f"`{module.label}`: {module.algorithm} of shape {sorted(map(list, sizes))} "
        f"on a weight of shape {list(shape)}",
        where=where,
        next="is the adapter for this base?",
    )


def _kernel_fits(module: ModuleState, shape: tuple[int, ...]) -> bool:
    kernel = kernel_of(module)
    if kernel is None:
        return True
    if len(kernel) == len(shape) - 2:
        return kernel == shape[2:]
    # a linear's factors for a 1×1 convolution, or PEFT's core (r, r, k, 1) for a Conv1d
    bare = tuple(k for k in kernel if k != 1)
    return bare == tuple(k for k in shape[2:] if k != 1)


def _reshaped(module: ModuleState, shape: tuple[int, ...]) -> ModuleState:
    """Views that the weight's number of dimensions asks for: nothing is computed."""
    row, t = traits_of(module.algorithm), module.tensors
    changes: dict[str, Tensor | None] = {}
    for slot, last in row.last_dims(shapes_of(module), shape[2:]).items():
        if len(t[slot].shape) != len(shape):
            first = t[slot].shape[:2] if len(t[slot].shape) > 1 else shape[:2]
            changes[slot] = t[slot].reshape(*first, *last)
    if "magnitude" in t and len(t["magnitude"].shape) != len(shape):
        ones = (1,) * (len(shape) - 2)
        changes["magnitude"] = t["magnitude"].reshape(*t["magnitude"].shape[:2], *ones)
    fitted = module.with_tensors(**changes) if changes else module
    if "ambiguous_tucker" not in module.options:
        return fitted
    options = {k: v for k, v in module.options.items() if k != "ambiguous_tucker"}
    return fitted.changed(options=options)


def kohya_component(state: AdapterState) -> tuple[Names, AdapterState] | None:
    """The model whose names a PEFT or LyCORIS adapter without a base has, for kohya's spelling.

    None where no bundled table has them: the names are then flattened as they are. Raises
    NameLookupError ("ambiguous-component") where tables put them under different prefixes.
    """
    found = identify(state)
    prefixes = {
        tuple(dict.fromkeys(names.components[m.component].kohya_prefixes[0] for m in s.modules))
        for names, s in found
    }
    if len(prefixes) > 1:
        raise NameLookupError(
            "these modules are in several models, under different kohya prefixes",
            where=state.where,
            seen=", ".join(f"{n.model}: {s.components[0]}" for n, s in found),
            next="say which model: --base " + " or --base ".join(n.model for n, _ in found),
            code="ambiguous-model",
        )
    return found[0] if found else None


def require_resolved(state: AdapterState) -> None:
    """Raise LayoutError if flat names were not looked up."""
    if any(m.naming == "flat" for m in state.modules):
        raise LayoutError(
            "flat names cannot be told apart without the base's module list",
            where=state.where,
            next="--base MODEL (a safetensors file, a folder, or sd15, sd2, sdxl, flux)",
            code="base-needed",
        )
