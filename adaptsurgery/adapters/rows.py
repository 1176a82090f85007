"""Modules that are rows of a base's stored ones, as the stored ones themselves.

    q_proj, k_proj, v_proj  on a stored qkv_proj    stacked, with zeros for what is not adapted
    qkv_proj                on stored q, k, v       cut by rows

So an adapter comes onto a model that calls or cuts its layers otherwise, and two adapters meet that
adapt the same rows as parts of different wholes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from adaptsurgery.adapters.renaming import at_one_scale
from adaptsurgery_formats import AdapterState, ModuleState
from adaptsurgery_formats.errors import InexactError
from adaptsurgery_formats.names import Component, Names, to_diffusers, to_native
from adaptsurgery_formats.names.rows import Rows
from adaptsurgery_formats.state import delta_shape

Placed = tuple[ModuleState, tuple[Rows, ...]]


def as_stored(
    state: AdapterState, names: Names, only: frozenset[str] | None = None
) -> AdapterState:
    """The state with each module as the stored ones that it is rows of, under the base's names.

    ``only`` names the stored tensors whose modules are changed so, all where it is None. Raises
    InexactError where an algorithm cannot be stacked or cut so, or no stored module has the rows.
    """
    modules: list[ModuleState] = []
    for name in state.components:
        component = names.components.get(name)
        part = list(state.of(name))
        modules += part if component is None else _stored(part, component, state, only)
    return replace(state, modules=modules)


def in_one_form(states: Sequence[AdapterState], names: Names | None) -> list[AdapterState]:
    """The states with modules that meet on some rows as parts of different wholes at the stored ones."""
    if names is None or not any(_is_part(m, names) for state in states for m in state.modules):
        return list(states)
    meeting = frozenset(_meeting(states, names))
    return [as_stored(s, names, meeting) if meeting else s for s in states]


def _is_part(module: ModuleState, names: Names) -> bool:
    """Whether a module of a base's own list is not one of the stored ones."""
    component = names.components.get(module.component)
    return (
        component is not None
        and bool(component.parameters)
        and module.path not in component.modules
    )


def in_one_naming(states: Sequence[AdapterState]) -> list[AdapterState]:
    """The states with their modules' own names where those agree, else with the base's for all."""
    names: dict[tuple[str, str], set[str]] = {}
    for module in (m for state in states for m in state.modules):
        names.setdefault((module.component, module.path), set()).add(module.own)
    mixed = len({any(m.own for m in state.modules) for state in states}) > 1
    if not mixed and all(len(own) == 1 for own in names.values()):
        return list(states)
    return [
        replace(state, modules=[m.changed(own="") if m.own else m for m in state.modules])
        for state in states
    ]


def _meeting(states: Sequence[AdapterState], names: Names) -> Iterator[str]:
    """The stored tensors of which two modules, of different paths, have some rows in common."""
    spans: dict[tuple[str, Rows], dict[str, tuple[int, int]]] = {}
    for module in (m for state in states for m in state.modules):
        component = names.components.get(module.component)
        for rows in _rows(module, component) if component and component.parameters else ():
            spot = (module.component, Rows(rows.name, index=rows.index))
            stop = rows.stop or 1 << 62
            spans.setdefault(spot, {}).setdefault(module.path, (rows.start, stop))
    for (_, rows), by_path in spans.items():
        held = sorted(by_path.values())
        if any(after[0] < before[1] for before, after in pairwise(held)):
            yield rows.name


def _rows(module: ModuleState, component: Component) -> tuple[Rows, ...]:
    """The rows that a module is, but for a head that is written apart from the table it is tied to."""
    if component.naming != "base" or module.naming != "base":
        return ()
    if (weight := component.weights_at(module.path)) is not None and weight.tied:
        return ()
    return component.rows(module.path, module.naming, delta_shape(module)[0])


def _stored(
    part: Sequence[ModuleState],
    component: Component,
    state: AdapterState,
    only: frozenset[str] | None,
) -> list[ModuleState]:
    modules: list[ModuleState] = []
    parts: dict[str, list[Placed]] = {}
    for module in part:
        rows = _rows(module, component)
        chosen = only is None or any(r.name in only for r in rows)
        if not chosen:
            modules.append(module)
        elif not rows or (len(rows) == 1 and not rows[0].stop):
            modules.append(module.changed(own=""))
        elif len(rows) > 1:
            modules += _cut(module, rows, component)
        else:
            parts.setdefault(rows[0].name, []).append((module, rows))
    for name, members in parts.items():
        modules += _stacked(_stored_path(name, members), name, members, component, state)
    return modules


def _stored_path(name: str, members: Sequence[Placed]) -> str:
    module, rows = members[0]
    if name.endswith(".weight") and rows[0].index is None:
        return name.removesuffix(".weight")
    raise InexactError(
        f"`{module.label}` is rows of `{name}`, which is no layer's weight",
        seen=", ".join(module.keys[:1]),
        next="merge the adapter into a file of the model",
        code="no-such-layer",
    )


def _cut(module: ModuleState, rows: Iterable[Rows], component: Component) -> Iterator[ModuleState]:
    """A module of several stored ones, cut into them."""
    paths = [r.name.removesuffix(".weight") for r in rows]
    shapes = {path: component.modules[path] for path in paths}
    table = _table(module.path, [(p, 0, shapes[p][0]) for p in paths], shapes)
    for piece in to_diffusers(module.changed(naming="native"), table):
        yield piece.changed(naming="base", own="")


def _stacked(
    path: str, name: str, members: Sequence[Placed], component: Component, state: AdapterState
) -> Iterator[ModuleState]:
    """Modules of some rows of a stored one, stacked with zeros for the rows between."""
    turned = bool(members[0][1][0].turned)
    shape = component.parameters[name].shape
    shape = shape[::-1] if turned else shape
    spans = {m.path: (rows[0].start, rows[0].stop) for m, rows in members}
    segments, at = [], 0
    for part, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        segments += [(f"{path}[{at}]", at, start)] if at < start else []
        segments.append((part, start, stop))
        at = stop
    segments += [(f"{path}[{at}]", at, shape[0])] if at < shape[0] else []
    shapes = {part: (stop - start, *shape[1:]) for part, start, stop in segments}
    table = _table(path, [(p, 0, shapes[p][0]) for p, _, _ in segments], shapes)
    modules = [m.changed(own="") for m, _ in members]
    for module in to_native(at_one_scale(modules, table, state), table):
        yield module.changed(path=path, naming="base")


def _table(
    fused: str, segments: Iterable[tuple[str, int, int]], shapes: Mapping[str, tuple[int, ...]]
) -> Component:
    """One fused module and its parts, as a table of a model has them."""
    native = {fused: tuple(Rows(*segment) for segment in segments)}
    return Component("", shapes, native=native, naming="base")
