"""The modules of a model: their names in each naming, their shapes, and the look-up by flat name.

kohya and LyCORIS write ``down_blocks_0_attentions_0_proj_in``; which dots the underscores stood
for, only the model's own module list can tell. Lists of the common models are bundled as
``<name>.json`` beside this file (written by tools/module_tables.py); for any other model the list
is that of the base checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from adaptsurgery_formats.errors import NameLookupError, ShapeError, nearest
from adaptsurgery_formats.names.cuts import cut_of, part_of
from adaptsurgery_formats.names.families import weights_of
from adaptsurgery_formats.names.native import RULES, Shapes
from adaptsurgery_formats.names.rows import (
    Parameters,
    Rows,
    Shape,
    StoredWeight,
    StoredWeights,
    shape_of,
)

TABLES = ("sd15", "sd2", "sdxl", "flux")


def flatten(path: str) -> str:
    """The path as kohya and LyCORIS write it: dots become underscores."""
    return path.replace(".", "_")


@dataclass(frozen=True)
class Component:
    """One part of a pipeline, and the names of its modules.

    ``modules`` gives the shape of each module's weight (o, i, *k), (n,) or (vocab, dim), by its
    path in ``naming``: "diffusers" in a bundled table, "base" in a base's own list. ``native``
    gives the original repository's modules as rows of those. ``kohya_prefixes``: the first is
    written, all are read. ``kohya_naming`` is the naming whose paths kohya flattens.

    ``aliases`` maps other paths of a module to its path in ``modules``: transformers 5 drops
    ``text_model.`` from a CLIPTextModel. ``own`` maps a path in ``modules`` to what the base at
    hand calls that module, where that differs; only writers for that base look at it.
    ``optional`` modules may be absent from a base (a tied embedding, Flux-schnell's guidance).
    ``open_inputs`` layers take other inputs in variants of the model (inpainting's conv_in).
    ``stored`` is the naming that the base at hand is stored in, or "" without a base; of that base
    ``parameters`` are all the names and shapes, and ``config`` is its config.json. They give the
    ``weights`` under every name that a family of models has for them.
    """

    name: str
    modules: Mapping[str, tuple[int, ...]]
    native: Mapping[str, tuple[Rows, ...]] = field(default_factory=dict)
    kohya_prefixes: tuple[str, ...] = ()
    kohya_naming: str = "diffusers"
    naming: str = "diffusers"
    aliases: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    open_inputs: frozenset[str] = frozenset()
    stored: str = ""
    parameters: Parameters = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def index(self) -> Mapping[str, list[tuple[str, str]]]:
        """Flat name → every (naming, path) that it could stand for."""
        index: dict[str, list[tuple[str, str]]] = {}
        for known, place in self._spellings():
            hits = index.setdefault(flatten(known), [])
            if place not in hits:
                hits.append(place)
        return index

    def _spellings(self) -> Iterator[tuple[str, tuple[str, str]]]:
        for path in self.modules:
            yield path, (self.naming, path)
        for path, canonical in self.aliases.items():
            yield path, (self.naming, canonical)
        for path in self.native:
            if path not in self.modules:
                yield path, ("native", path)

    def find(self, flat: str) -> list[tuple[str, str]]:
        """(naming, path) of every module, in either naming, whose flattened name is ``flat``."""
        return list(self.index.get(flat, ()))

    def locate(self, path: str) -> tuple[str, str] | None:
        """(naming, path) of the module that a dotted path names in any naming, or None."""
        if path in self.modules:
            return self.naming, path
        if path in self.aliases:
            return self.naming, self.aliases[path]
        return ("native", path) if path in self.native else None

    def called(self, path: str) -> str:
        """What the base at hand calls the module at ``path``, for files that it will load."""
        return self.own.get(path, path)

    def shape(self, path: str, naming: str) -> tuple[int, ...] | None:
        """The weight's shape; a native one stacks its segments' rows: (Σ rows, i, *k).

        None for a module that is not known, or is a part of another of which nothing tells the rows.
        """
        if naming != "native":
            return self.modules.get(path) or self._shape_of_rows(path)
        segments = self.native.get(path)
        if not segments:
            return None
        rows = sum(s.count for s in segments)
        return (rows, *self.modules[segments[0].name][1:])

    def _shape_of_rows(self, path: str) -> tuple[int, ...] | None:
        weight = self.weights.get(path)
        try:
            return shape_of(self.cut(weight, 0).rows, self.parameters) if weight else None
        except ShapeError:
            return None

    def rows(self, path: str, naming: str, outputs: int = 0) -> tuple[Rows, ...]:
        """The rows of the base's parameters that are the weight of a module, in either naming.

        ``outputs`` are the module's own, which tell where a q, k or v lies where no config does.
        """
        if naming == "native" or path in self.modules:
            return self._rows_of_table(path, naming)
        return self.cut(self.weights[path], outputs).rows

    def cut(self, weight: StoredWeight, outputs: int) -> StoredWeight:
        """A q, k or v with the rows that it has in its fused weight; raises ShapeError."""
        if weight.part < 0:
            return weight
        known = {weight.part: outputs} if outputs else {}
        cut = cut_of(weight.rows[0].name, self.parameters, self.config, known)
        return part_of(weight, cut)

    def _rows_of_table(self, path: str, naming: str) -> tuple[Rows, ...]:
        """A base stored under native names holds several diffusers modules in one fused weight, or
        one in another order of its rows."""
        native = self.stored == "native"
        if native == (naming == "native"):
            return (Rows(f"{path if native else self.called(path)}.weight"),)
        if not native:
            segments = self.native[path]
            return tuple(Rows(f"{self.called(s.name)}.weight", s.start, s.stop) for s in segments)
        fused = self.native_of.get(path, "")
        spans, at = [], 0
        for s in self.native.get(fused, ()):
            rows = s.count
            if s.name == path:
                spans.append((s.start, at, at + rows))
            at += rows
        return tuple(Rows(f"{fused}.weight", start, stop) for _, start, stop in sorted(spans))

    @cached_property
    def weights(self) -> StoredWeights:
        """The weights of the base at hand under every name that an adapter may have for them."""
        if not self.parameters:
            return {}
        return weights_of(self.parameters, self.config, self._known_rows())

    def weights_at(self, path: str) -> StoredWeight | None:
        """The weight at a path that is no stored module's; None for one that is, or is not known."""
        return None if path in self.modules else self.weights.get(path)

    def _known_rows(self) -> Iterator[tuple[str, tuple[Rows, ...]]]:
        """What a bundled table tells, of this component alone where the whole base is in none."""
        known = self if self.naming != "base" else self._in_a_table()
        if known is None or not known.stored:
            return
        for path in (*known.modules, *known.aliases, *known.native):
            naming, canonical = known.locate(path) or ("", path)
            yield path, known._rows_of_table(canonical, naming)

    def _in_a_table(self) -> Component | None:
        names = names_of_base({self.name: self.modules}, "")
        if not names.model:
            return None
        return names.components.get(self.name or next(iter(names.components)))

    @cached_property
    def first_names(self) -> Mapping[StoredWeight, str]:
        """Each weight's first name, under which it is the same whatever an adapter calls it."""
        first: dict[StoredWeight, str] = {}
        for path, weight in self.weights.items():
            first.setdefault(weight, path)
        return first

    @cached_property
    def dotted(self) -> Mapping[str, str]:
        """Flat name → the first dotted one that it stands for, of all that there are."""
        names: dict[str, str] = {}
        for path in self.weights:
            names.setdefault(flatten(path), path)
        return names

    @cached_property
    def native_of(self) -> Mapping[str, str]:
        """Diffusers path → the native module that holds its rows."""
        return {s.name: path for path, segments in self.native.items() for s in segments}


@dataclass(frozen=True)
class Names:
    """The components of a model. ``model`` is the bundled table's name, "" for a base's own."""

    model: str
    components: Mapping[str, Component]
    where: str

    @cached_property
    def by_prefix(self) -> Mapping[str, Component]:
        """kohya prefix → component, longest prefix first."""
        owners: dict[str, Component] = {}
        for component in self.components.values():
            for prefix in component.kohya_prefixes:
                owners.setdefault(prefix, component)
        return dict(sorted(owners.items(), key=lambda item: -len(item[0])))


@cache
def table(name: str) -> Names:
    """The bundled table ``name``, one of TABLES; raises NameLookupError for any other."""
    if name not in TABLES:
        raise NameLookupError(
            f"there is no module table `{name}`",
            seen=name,
            next=nearest(name, TABLES) or "tables: " + ", ".join(TABLES),
            code="unknown-model",
        )
    components = {key: _component(key, c) for key, c in _data(name).items()}
    return Names(name, components, f"the bundled table `{name}`")


@cache
def _data(name: str) -> dict[str, dict[str, Any]]:
    """A table's components as they are stored, folded."""
    text = Path(__file__).with_name(f"{name}.json").read_text("utf-8")
    components: dict[str, dict[str, Any]] = json.loads(text)["components"]
    return components


def _component(name: str, data: dict[str, Any]) -> Component:
    modules = dict(expand(data["modules"]))
    rule, dropped = data.get("native", ""), data.get("dropped_prefix", "")
    return Component(
        name=name,
        modules=modules,
        native=RULES[rule](modules) if rule else {},
        kohya_prefixes=tuple(data["kohya_prefixes"]),
        kohya_naming=data["kohya_naming"],
        aliases={p.removeprefix(dropped): p for p in modules if dropped and p.startswith(dropped)},
        optional=frozenset(data.get("optional", ())),
        open_inputs=frozenset(data.get("open_inputs", ())),
    )


_RANGE = re.compile(r"(\d+)-(\d+)")


def expand(tree: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """A table's tree as (path, shape): ``{"layers.0-2": {"fc": [4, 8]}}`` gives three modules.

    A key is one name or several joined by dots, one of which may be a range of indices whose
    subtrees are all alike; both its ends are counted.
    """
    flat: list[tuple[str, tuple[int, ...]]] = []
    for key, value in tree.items():
        below = [("", tuple(value))] if isinstance(value, list) else expand(value)
        for name in _counted(key):
            flat += [(f"{name}.{rest}" if rest else name, shape) for rest, shape in below]
    return flat


def _counted(key: str) -> list[str]:
    match = _RANGE.search(key)
    if not match:
        return [key]
    head, tail = key[: match.start()], key[match.end() :]
    return [f"{head}{i}{tail}" for i in range(int(match[1]), int(match[2]) + 1)]


def from_modules(
    components: Mapping[str, Shapes],
    where: str,
    parameters: Mapping[str, Parameters] | None = None,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
) -> Names:
    """A base's own list, as its checkpoint's header shows it: one naming, called "base"."""
    parameters, configs = parameters or {}, configs or {}
    encoders = [name for name in components if name.startswith("text_encoder")]
    return Names(
        "",
        {
            name: Component(
                name=name,
                modules=modules,
                kohya_prefixes=_base_prefixes(name, len(encoders) == 1),
                kohya_naming="base",
                naming="base",
                stored="base",
                parameters=parameters.get(name, {}),
                config=configs.get(name, {}),
            )
            for name, modules in components.items()
        },
        where,
    )


def _base_prefixes(name: str, lone_encoder: bool) -> tuple[str, ...]:
    """The prefixes under which kohya knows a pipeline's component."""
    if name in ("", "unet", "transformer"):
        return ("lora_unet", "lora_transformer") if name == "transformer" else ("lora_unet",)
    if name == "text_encoder":
        return ("lora_te",) if lone_encoder else ("lora_te1", "lora_te")
    if name.startswith("text_encoder_"):
        return (f"lora_te{name.removeprefix('text_encoder_')}",)
    return (f"lora_{name}",)


def recognise(components: Mapping[str, Shapes]) -> str:
    """The one bundled table whose module names and shapes such a base has, or "".

    Each component that the table knows must fit, in diffusers names, native names, or CLIP names
    without ``text_model.``; one unnamed component stands for the UNet or transformer. Variants
    that differ in the input layer's channels alone are recognised too. A lone CLIP-L, which
    several models share, is not.
    """
    likely = (name for name in TABLES if _may_fit(components, _data(name)))
    fitting = [name for name in likely if _stored_namings(components, table(name))]
    return fitting[0] if len(fitting) == 1 else ""


def _may_fit(components: Mapping[str, Shapes], data: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether all names begin as the table's do: so no table of another model is unfolded."""
    first = next(iter(data))
    return all(
        path.partition(".")[0] in data[name or first]["heads"]
        for name, modules in components.items()
        if (name or first) in data
        for path in modules
    )


def _stored_namings(components: Mapping[str, Shapes], names: Names) -> dict[str, str]:
    """Table component → the naming that the base has it in; {} if any of them does not fit.

    A component of another kind of model (a transformer, where the table has a unet) does not fit;
    one that no table knows (a vae) is not looked at.
    """
    namings: dict[str, str] = {}
    for given, modules in components.items():
        name = given or next(iter(names.components))
        if name in names.components:
            namings[name] = _stored_naming(modules, names.components[name])
        elif any(name in table(other).components for other in TABLES):
            return {}
    return namings if all(namings.values()) else {}


def _stored_naming(modules: Shapes, component: Component) -> str:
    """The naming in which the base has this component: "diffusers", "alias", "native"; or ""."""
    for naming in ("diffusers", "alias", "native"):
        expected = _expected(component, naming)
        required = {name for name, (path, _) in expected.items() if path not in component.optional}
        if expected and required <= modules.keys() <= expected.keys():
            if all(_fits(shape, *expected[name], component) for name, shape in modules.items()):
                return naming
    return ""


def _expected(component: Component, naming: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in the given naming → the (first) diffusers path behind it, and the weight's shape."""
    if naming == "native":
        return {
            name: (segments[0].name, component.shape(name, "native") or ())
            for name, segments in component.native.items()
        }
    own = _shortened(component) if naming == "alias" else {}
    return {own.get(path, path): (path, shape) for path, shape in component.modules.items()}


def _shortened(component: Component) -> dict[str, str]:
    return {path: short for short, path in component.aliases.items()}


def _fits(shape: tuple[int, ...], path: str, wanted: tuple[int, ...], component: Component) -> bool:
    """Equal shapes, but for the inputs of a layer that takes more of them in some variants."""
    if path in component.open_inputs and len(shape) == len(wanted) > 1:
        return (shape[0], *shape[2:]) == (wanted[0], *wanted[2:])
    return tuple(shape) == wanted


def names_of_base(
    components: Mapping[str, Shapes],
    where: str,
    parameters: Mapping[str, Parameters] | None = None,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
) -> Names:
    """The names to use with a base: its bundled table where it is recognised, else its own list.

    In the former case ``stored`` tells the base's naming, and ``own`` what it calls the modules
    that it names otherwise (``encoder.layers.0.mlp.fc1`` without ``text_model.``). With all
    ``parameters`` of the base, and the ``configs`` that it has, other names of its family are found.
    """
    parameters, configs = parameters or {}, configs or {}
    model = recognise(components)
    if not model:
        return from_modules(components, where, parameters, configs)
    known = table(model)
    stored = _stored_namings(components, known)
    first = next(iter(known.components))
    given = {name or first: shapes for name, shapes in components.items()}
    held = {name or first: parameters.get(name, {}) for name in components}
    settings = {name or first: configs.get(name, {}) for name in components}
    fitted = {
        name: replace(
            _as_stored(component, stored.get(name, ""), given.get(name, {})),
            parameters=held.get(name, {}),
            config=settings.get(name, {}),
        )
        for name, component in known.components.items()
    }
    return Names(model, fitted, f"{known.where}, as {where} has it")


def names_of_modules(shapes: Shapes, where: str) -> Names:
    """The names of a model of which only the modules' weights are known: a live one, or a graph."""
    parameters = {f"{path}.weight": Shape(shape) for path, shape in shapes.items()}
    return names_of_base({"": shapes}, where, {"": parameters})


def weights_of_base(
    names: Names,
    parameters: Mapping[str, Parameters],
    configs: Mapping[str, Mapping[str, Any]],
) -> dict[str, StoredWeights]:
    """Component of a base → its weights by every name; ``names`` are those of the whole base."""
    weights: dict[str, StoredWeights] = {}
    for name, held in parameters.items():
        home = name if name in names.components else name or next(iter(names.components))
        component = names.components.get(home)
        known = component is not None and bool(component.stored)
        weights[name] = (
            component.weights if known and component else weights_of(held, configs.get(name, {}))
        )
    return weights


def _as_stored(component: Component, stored: str, modules: Shapes) -> Component:
    """The table's component with what only the base at hand can tell: its input layer, its names."""
    if not stored:
        return component
    taken = {
        path: modules[name]
        for name, (path, _) in _expected(component, stored).items()
        if path in component.open_inputs
    }
    return replace(
        component,
        modules={**component.modules, **taken},
        own=_shortened(component) if stored == "alias" else {},
        stored="native" if stored == "native" else component.naming,
    )
