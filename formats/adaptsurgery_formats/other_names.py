"""An adapter's modules at the weights of a base that calls them otherwise.

The names are those of its family of models (``names.families``), laid over the base's with other
leading segments where that finds more (``names.aligning``). A module keeps the path that it came
with as its ``own``; its path is then the first that the base has for the same rows, so that two
adapters of one weight meet there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from adaptsurgery_formats.errors import LayoutError, NameLookupError, SurgeryError
from adaptsurgery_formats.fitting import fit
from adaptsurgery_formats.names.aligning import (
    SAME,
    Aligned,
    Alignment,
    Lookup,
    best_alignments,
)
from adaptsurgery_formats.names.cuts import cut_of, part_of
from adaptsurgery_formats.names.orientation import CONV1D_NAMES
from adaptsurgery_formats.names.rows import StoredWeight, shape_of
from adaptsurgery_formats.names.tables import Component
from adaptsurgery_formats.state import AdapterState, ModuleState, Note, delta_shape

Choice = tuple[Component, Aligned]


def by_other_names(
    modules: Sequence[ModuleState], components: Sequence[Component], state: AdapterState
) -> list[ModuleState]:
    """The modules of one component where an alignment finds them all; [] where none does.

    Raises NameLookupError ("ambiguous-alignment", "ambiguous-module"), LayoutError
    ("interleaved-weight"), ShapeError.
    """
    choice = _chosen(modules, [c for c in components if c.parameters], state)
    if choice is None:
        return []
    component, aligned = choice
    weights = [one_weight(aligned.found[m.path], m, state.where) for m in modules]
    paths = [_path(weight, component) for weight in weights]
    if not all(paths):
        return []
    if aligned.alignment != SAME:
        note = Note(
            "aligned-names", state.where, f"names aligned with the base's: {aligned.alignment}"
        )
        state.notes += [note] if note not in state.notes else []
    shapes = _shapes(modules, weights, component, state.where)
    spelled = _Spelled(component, aligned.alignment)
    return [
        fit(spelled.placed(m, *path), shape, state.where)
        for m, path, shape in zip(modules, paths, shapes)
    ]


def _chosen(
    modules: Sequence[ModuleState], components: Sequence[Component], state: AdapterState
) -> Choice | None:
    """The component and the alignment that find every module, by names or else by shapes."""
    paths = list(dict.fromkeys(m.path for m in modules))
    flat = modules[0].naming == "flat"
    choices: list[Choice] = []
    for component in components:
        fits = partial(fits_all, modules, component)
        tried = best_alignments(Lookup(component.weights, flat), paths, fits)
        choices += [(component, aligned) for aligned in tried if len(aligned.found) == len(paths)]
    if len(choices) > 1:
        choices = [(c, a) for c, a in choices if fits_all(modules, c, a)] or choices
    if len(choices) > 1:
        raise ambiguous_alignment(
            modules[0].path, [(c.name, a.alignment) for c, a in choices], state.where
        )
    return choices[0] if choices else None


def ambiguous_alignment(
    path: str, choices: Sequence[tuple[str, Alignment]], where: str
) -> NameLookupError:
    """That an adapter fits its base in several ways, of which one path is the example."""
    spots = [f"`{home}.{a.of(path)}`" if home else f"`{a.of(path)}`" for home, a in choices]
    return NameLookupError(
        f"the adapter fits the base in {len(choices)} ways",
        where=where,
        seen=f"`{path}` could be " + " or ".join(spots[:4]),
        next="write the adapter with the base's full names",
        code="ambiguous-alignment",
    )


def fits_all(modules: Sequence[ModuleState], component: Component, aligned: Aligned) -> bool:
    """Whether the shapes of all modules found go with an alignment."""
    for module in modules:
        for weight in aligned.found.get(module.path, ()):
            if weight.part >= 0 or weight.refused:
                continue
            try:
                fit(named(module, weight), shape_of(weight.rows, component.parameters), "")
            except SurgeryError:
                return False
    return True


def named(module: ModuleState, weight: StoredWeight) -> ModuleState:
    """A module of a flat name under its weight's own, which alone can tell transformers' Conv1D."""
    if module.naming != "flat" or weight.module.rpartition(".")[2] not in CONV1D_NAMES:
        return module
    return module.changed(path=weight.module)


def one_weight(weights: Sequence[StoredWeight], module: ModuleState, where: str) -> StoredWeight:
    """The one weight that a name stands for, and that can be changed; raises as ``by_other_names``."""
    if len(weights) > 1:
        could = " or ".join(f"`{w.rows[0].name}`" for w in weights)
        raise NameLookupError(
            f"`{module.path}` could be {could}",
            where=where,
            seen=", ".join(module.keys[:1]),
            next="write the adapter with dotted names, which tell the two apart",
            code="ambiguous-module",
        )
    if weights[0].refused:
        raise LayoutError(
            f"`{module.label}` cannot be merged: {weights[0].refused}",
            where=where,
            seen=", ".join(module.keys[:1]),
            next="train on the fused module, or merge through the model's own code",
            code="interleaved-weight",
        )
    return weights[0]


def _path(weight: StoredWeight, component: Component) -> tuple[str, str]:
    """(naming, path) of a weight; a table's own, where it has the whole of it."""
    if component.naming == "base":
        return "base", component.first_names[weight]
    return component.locate(weight.module) or ("", "")


def _shapes(
    modules: Sequence[ModuleState],
    weights: Sequence[StoredWeight],
    component: Component,
    where: str,
) -> Iterator[tuple[int, ...]]:
    """The shape of each weight; those of q, k and v as the adapters or a config cut them."""
    known: dict[str, dict[int, int]] = {}
    for module, weight in zip(modules, weights):
        if weight.part >= 0:
            rows = known.setdefault(weight.rows[0].name, {})
            if outputs := delta_shape(module)[0]:
                rows[weight.part] = outputs
    parameters, config = component.parameters, component.config
    cuts = {name: cut_of(name, parameters, config, rows, where) for name, rows in known.items()}
    for weight in weights:
        settled = part_of(weight, cuts[weight.rows[0].name]) if weight.part >= 0 else weight
        yield shape_of(settled.rows, parameters)


class _Spelled:
    """The paths that modules came with."""

    def __init__(self, component: Component, alignment: Alignment) -> None:
        self.component, self.alignment = component, alignment

    def placed(self, module: ModuleState, naming: str, path: str) -> ModuleState:
        """The module at its place in the base, with its own path where that is another."""
        own = module.own or module.path
        if module.naming == "flat":
            known = self.component.dotted if self.alignment == SAME else {}
            own = known.get(module.path, path)
        return module.changed(
            component=self.component.name,
            naming=naming,
            path=path,
            own=own if own != path and naming == "base" else "",
        )
