"""``attach`` and ``detach``: adapters into a graph and out of it, the same kind of graph as came in.

Both go one way: a copy of the graph, every adapter taken out of it, and those that are wanted put in.
So the adapters of one layer are always composed by the one law, in the order they were attached,
and what a base looks like never depends on what was on it before.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from adaptsurgery.algorithms import AdapterConfig
from adaptsurgery.core.config import tensors_of
from adaptsurgery.core.cost import ApplyForm, cheapest
from adaptsurgery.core.law import order_of
from adaptsurgery.core.update import Delta, Update, is_finite, parts_of
from adaptsurgery.graph.dropout import is_training, set_dropouts
from adaptsurgery.graph.find import find_sites
from adaptsurgery.graph.plan import Plan, plan_sites
from adaptsurgery.graph.record import Attached, count, described
from adaptsurgery.graph.sites import Site, one_each
from adaptsurgery.graph.splice import Splicer, joined
from adaptsurgery.graph.strip import AdaptersBySite, adapters_of, bare, strip
from adaptsurgery.graph.template import SiteCall, Template, key, recorded, replay
from adaptsurgery.graph.workspace import Workspace
from adaptsurgery_formats.errors import NameLookupError, ShapeError, ValueRefused, nearest

G = TypeVar("G", ExportedProgram, GraphModule)
Mode = Literal["auto", "factored", "weight"]
LEFT = "modules_to_save: a graph's adapter has no place for it; the base's own numbers stay"
POSITIONS = 512  # how many tokens "auto" reckons with where the graph leaves it open


@dataclass
class GraphChange:
    """A graph being changed: the copy, what is on it, and what shall be."""

    work: Workspace
    present: AdaptersBySite
    wanted: dict[str, list[Attached]]
    training: bool
    _sites: list[Site] | None = None

    @classmethod
    def of(cls, g: Any) -> GraphChange:
        work = Workspace(g)
        by_site = adapters_of(g)
        wanted = {site: list(adapters) for site, adapters in by_site.items()}
        training = is_training(work) if by_site else False
        if by_site:
            strip(work, by_site)
        return cls(work, by_site, wanted, training)

    @property
    def names(self) -> list[str]:
        """The adapters' names, in the order of attaching."""
        return list(dict.fromkeys(a.name for on in self.wanted.values() for a in on))

    def base(self) -> Any:
        """The graph without adapters, as it stands now."""
        return self.work.source if not self.present else bare(self.work, self.present)

    def sites(self) -> list[Site]:
        """The sites of the base; looked for once, unless ``changed``."""
        if self._sites is None:
            self._sites = find_sites(self.base())
        return self._sites

    def changed(self) -> None:
        """Forget the sites, which are looked for again, since the base is another now."""
        self._sites = None

    def check_name(self, name: str) -> None:
        """Raise NameLookupError unless an adapter of that name is there."""
        if name not in self.names:
            known = ", ".join(f"`{n}`" for n in self.names)
            raise NameLookupError(
                f"the graph has no adapter `{name}`",
                seen=f"adapters: {known or 'none'}",
                next=nearest(name, self.names),
                code="no-adapter",
            )

    def remove(self, name: str) -> list[str]:
        """Take an adapter out of ``wanted`` and return the names of its tensors."""
        self.check_name(name)
        gone = [t for on in self.wanted.values() for a in on if a.name == name for t in a.names]
        self.wanted = {
            site: kept
            for site, on in self.wanted.items()
            if (kept := [a for a in on if a.name != name])
        }
        for tensor in gone:
            self.work.drop_tensor(tensor)
        return gone

    def finish(self) -> Any:
        """Put what is wanted onto the bare copy, and give it back."""
        if self.wanted:
            sites = {site.path: site for site in self.sites()}
            if lost := sorted(self.wanted.keys() - sites.keys()):
                raise ValueRefused(
                    "layers that bear an adapter are not found in the graph any more",
                    items=lost[:20],
                    next="go back to the program that was attached to",
                    code="sites-lost",
                )
            counts = {name: self._places(name, sites) for name in self.names}
            templates: dict[object, Template] = {}
            for path, site in sites.items():
                adapters = self.wanted.get(path, [])
                counted = [replace(a, places=counts[a.name]) for a in adapters]
                if counted:
                    put(self.work, site, counted, templates)
            set_dropouts(self.work, self.training, base=False)
            if any(call.graph for path in self.wanted for call in sites[path].calls):
                self._note_counts(counts)
        return self.work.finish()

    def _note_counts(self, counts: dict[str, int]) -> None:
        """Note them on all operations: once traced anew, those within no_grad bear their caller's."""
        for _, module in self.work.modules():
            for node in module.graph.nodes:
                if node.op in ("call_function", "call_method", "call_module"):
                    count(node, counts)

    def _places(self, name: str, sites: Mapping[str, Site]) -> int:
        """How many sites an adapter is on, counted in each graph that calls them."""
        on = (path for path, held in self.wanted.items() if any(a.name == name for a in held))
        return sum(len({call.graph for call in sites[path].calls}) for path in on)


def put(
    work: Workspace, site: Site, adapters: list[Attached], templates: dict[object, Template]
) -> None:
    """Put all adapters of one site, composed, at each of its calls; sites that are alike get copies.

    ``templates`` holds the nodes of earlier sites by the key of those alike, and gets this one's.
    """
    before = _known_replacements(work)
    place = SiteCall(work, site, site.calls[0], tuple(adapters))
    like = key(place)
    if template := templates.get(like):
        replay(place, template)
    else:
        own = place.own()
        made = _spliced(work, site, adapters)
        if like is not None and (new := recorded(place, *made, own)):
            templates[like] = new
    if _known_replacements(work) != before:
        raise ValueRefused(
            f"`{site.path}`: the adapter would fix a size that the graph leaves open",
            next="mode weight, or a static export",
            code="specialised",
        )


def _spliced(
    work: Workspace, site: Site, adapters: list[Attached]
) -> tuple[list[Node], dict[str, Node]]:
    """Run the update at each call; give the last one's nodes, and those in its values' place."""
    held = {name: work.tensor(name) for a in adapters for name in a.names}
    updates: list[Update] = []
    names: dict[int, str] = {}
    for attached in adapters:
        update = attached.update(held)
        updates.append(update)
        names |= _names_of(attached, update)
    whole, configs = joined(adapters, updates)
    form: ApplyForm = "folded" if all(a.form == "folded" for a in adapters) else "factored"
    splicers: dict[tuple[str, ...], Splicer] = {}
    made: tuple[list[Node], dict[str, Node]] = ([], {})
    for number, call in enumerate(site.calls):
        if call.graph not in splicers:
            splicers[call.graph] = Splicer(
                work, site, whole, tuple(adapters), form, names, configs, call.graph
            )
        made = splicers[call.graph].splice(call, number)
    return made


def _names_of(attached: Attached, update: Update) -> dict[int, str]:
    """id of each tensor of an update → its name in the state."""
    names = {}
    for part, built in zip(attached.parts, parts_of(update)):
        for slot, tensor in tensors_of(built).items():
            names[id(tensor)] = part.slots[slot]
    return names


def _known_replacements(work: Workspace) -> dict[Any, Any]:
    shapes = work.fake.shape_env
    return dict(shapes.replacements) if shapes is not None else {}


# --- the public doors ----------------------------------------------------------------------------


def attach(
    g: G,
    what: Any,
    name: str = "default",
    mode: Mode = "auto",
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> G:
    """``g`` with an adapter: a graph of the same kind, ``g`` itself untouched.

    ``what`` is a config (fresh initial values, PEFT's) or a Plan made from one, or a mapping from
    module paths to updates, such as ``adaptsurgery.load`` returns. ``mode`` "factored" computes the
    adapter beside the layer, "weight" folds it into the weight on every call, and "auto" takes what
    core/cost.py finds cheaper. Its tensors become parameters, called ``path.name.algorithm_slot``,
    of ``dtype`` (by default their own; float32 where they are fresh).

    Several adapters on one layer are one update, by the law of core/law.py, with
    rotations in the order of attaching.

    Raises ValueRefused for a name that is taken, a plan of another graph, a layer that no adapter
    can be put on, numbers that are not finite, a size that the adapter would fix, or a config with
    modules_to_save or ``bias``, which train the base's own tensors; NameLookupError for paths that
    match no layer; ShapeError for an update that does not fit its layer. Warns of what a config says in vain,
    and of modules that an Adapter was saved with whole. ``g`` is as it was after any of them.
    """
    session = GraphChange.of(g)
    _check_free(name, session)
    sites = _by_name(session.sites())
    chosen = _chosen(session, what, sites, generator, dtype)
    for path, (update, config) in chosen.items():
        site = sites[path]
        check_site(site, update)
        parts, tensors = described(
            update, prefix(site.path, name), taken_names(session.work, site, name)
        )
        for full, tensor in tensors.items():
            kept = tensor.detach().clone().to(dtype or tensor.dtype)
            check_finite(path, full, kept)
            session.work.set_tensor(full, nn.Parameter(kept, kept.is_floating_point()))
        form = _form(mode, site, update, config)
        attached = Attached(name, form, site.shape, parts, _dropout(config))
        session.wanted.setdefault(site.path, []).append(attached)
    result: G = session.finish()
    return result


def detach(g: G, name: str = "default") -> G:
    """``g`` without an adapter: the base's own code, and outputs equal to the bit. Others stay.

    Raises NameLookupError where there is no adapter of that name.
    """
    session = GraphChange.of(g)
    session.remove(name)
    result: G = session.finish()
    return result


def set_scale(g: G, scale: float, name: str = "default") -> G:
    """``g`` with an adapter at ``scale`` times its strength as attached or loaded.

    The record keeps both, so that another scale is one of the same strength, and 1 gives it back.
    Raises ValueRefused for HRA and DoRA, which do not add, at any other scale than 1, and for a scale
    that is not finite.
    """
    if not math.isfinite(scale):
        raise ValueRefused(f"{scale} is no scale", next="a finite number", code="bad-scale")
    session = GraphChange.of(g)
    session.check_name(name)
    for site, adapters in session.wanted.items():
        session.wanted[site] = [
            _at(a, scale, session.work) if a.name == name else a for a in adapters
        ]
    result: G = session.finish()
    return result


def _at(attached: Attached, scale: float, work: Workspace) -> Attached:
    plain = replace(attached, strength=1.0)
    plain.update(_tensors(work, attached)).scaled(scale)  # raises where it has no meaning
    return replace(attached, strength=float(scale))


def _tensors(work: Workspace, attached: Attached) -> dict[str, Tensor]:
    return {name: work.tensor(name) for name in attached.names}


def _by_name(sites: list[Site]) -> dict[str, Site]:
    """Sites by every path of theirs."""
    named = {alias: site for site in sites for alias in site.aliases}
    return named | {site.path: site for site in sites}


def _check_free(name: str, session: GraphChange) -> None:
    if not name.isidentifier():
        raise ValueRefused(
            f"`{name}` is no name for an adapter", next="letters, digits and _", code="bad-name"
        )
    if name in session.names:
        raise ValueRefused(
            f"the graph has an adapter `{name}` already",
            next=f"another name; or detach(g, {name!r}) first",
            code="name-taken",
        )


def _chosen(
    session: GraphChange,
    what: Any,
    sites: Mapping[str, Site],
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
) -> dict[str, tuple[Update, AdapterConfig | None]]:
    """Path → the update for it, and the config that it is made from."""
    if isinstance(what, Mapping):
        saved = getattr(what, "saved", {})  # an Adapter's, by component and name
        for path in [name for held in saved.values() for name in held]:
            warnings.warn(f"{path}: {LEFT} [not-adapted]", stacklevel=4)
        return {path: (update, None) for path, update in _matched(what, sites).items()}
    if isinstance(what, Plan):
        made = what
        made.check(session.base())
    else:
        made = plan_sites(session.base(), what, session.sites())
        made.check_targets()
        for note in made.notes:
            warnings.warn(f"{note.where}: {note.text} [{note.code}]", stacklevel=4)
    _check_base_kept(made)
    config = made.config
    updates: dict[str, tuple[Update, AdapterConfig | None]] = {}
    for site, target in made.placed:
        update = config.for_module(target.name).fresh(
            site.shape,
            rank=target.rank,
            alpha=target.alpha,
            kind=site.kind,
            dtype=dtype or torch.float32,
            generator=generator,
            weight=_weight(session.work, site),
        )
        updates[site.path] = (update, config)
    return updates


def _check_base_kept(made: Plan) -> None:
    """Refuse a config that trains the base's tensors: a graph's adapter holds only its own."""
    config = made.config
    asked = [f"modules_to_save: `{name}`" for name in made.saved]
    if (bias := getattr(config, "bias", "none")) != "none":
        asked.append(f'bias="{bias}"')
    if asked:
        raise ValueRefused(
            "the config trains tensors of the base, which a graph's adapter does not hold",
            items=asked[:20],
            next='modules_to_save=None and bias="none", and give the optimiser those parameters of '
            "the graph beside adapter_parameters(g); or adapt the live model",
            code="base-trained",
        )


def _matched(what: Mapping[str, Update], sites: Mapping[str, Site]) -> dict[str, Update]:
    """The updates by path. NameLookupError unless every path is that of a layer of the graph."""
    lost = [path for path in what if path not in sites]
    if lost or not what:
        raise NameLookupError(
            f"{len(lost)} of {len(what)} modules of the adapter are no layers of the graph"
            if what
            else "the adapter has no modules",
            items=lost[:20],
            next=nearest(lost[0], sites) if lost else "",
            code="no-site",
        )
    return one_each(what, sites)


def _weight(work: Workspace, site: Site) -> Tensor | None:
    """A site's canonical weight, where it is a tensor of the graph's."""
    if not site.weight:
        return None
    held = work.tensor(site.weight).detach()
    return held.t() if site.transposed else held


def check_site(site: Site, update: Update) -> None:
    if not site.adaptable:
        raise ValueRefused(f"`{site.path}` takes no adapter: {site.reason}", code="not-adaptable")
    for part in parts_of(update):
        order_of(part)  # refuses what has no place in the law
        try:
            part.check_fits(site.shape)
        except ShapeError as error:
            raise ShapeError(f"`{site.path}`: {error.what}", seen=error.seen) from None
        scale = getattr(part.plain, "scale", 1.0)
        if not math.isfinite(scale):
            raise ValueRefused(f"`{site.path}`: {scale} is no scale", code="bad-scale")


def check_finite(path: str, name: str, tensor: Tensor) -> None:
    """Raise ValueRefused for NaN or infinity in a tensor of an adapter that comes onto a site."""
    if not is_finite(tensor):
        raise ValueRefused(
            f"`{path}`: the adapter's numbers are not finite",
            seen=f"{name}, {tensor.dtype}".replace("torch.", ""),
            next="look at where they come from; float16 may overflow",
            code="non-finite",
        )


def prefix(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def taken_names(work: Workspace, site: Site, name: str) -> list[str]:
    """What the model has under an adapter's prefix already: no name of it is used again."""
    start = prefix(site.path, name)
    if isinstance(work.source, ExportedProgram):
        held = [*work.state, *work.source.constants]
    else:
        held = [n for n, _ in work.top.named_parameters(remove_duplicate=False)]
        held += [n for n, _ in work.top.named_buffers(remove_duplicate=False)]
    return [full for full in held if full.startswith(start)]


def _dropout(config: AdapterConfig | None) -> dict[str, Any]:
    names = ("lora_dropout", "rank_dropout", "module_dropout")
    shares = {n: getattr(config, n, 0.0) for n in names if getattr(config, n, 0.0)}
    if shares and getattr(config, "rank_dropout_scale", False):
        shares["rank_dropout_scale"] = True
    return shares


def _form(mode: Mode, site: Site, update: Update, config: AdapterConfig | None) -> ApplyForm:
    """How the adapter is computed at a site."""
    if mode not in ("auto", "factored", "weight"):
        raise ValueRefused(
            f"no mode is called `{mode}`", next="one of auto, factored, weight", code="bad-mode"
        )
    if mode != "auto":
        return "folded" if mode == "weight" else "factored"
    deltas = [part for part in parts_of(update) if isinstance(part, Delta)]
    if len(deltas) != len(parts_of(update)) or not site.weight or site.groups > 1:
        return "factored"
    layer = site.layer(torch.empty(_stored_shape(site), device="meta"))
    prices: dict[ApplyForm, int] = {"factored": 0, "folded": 0}
    for delta in deltas:
        own = delta.prices(POSITIONS, layer, config is not None)
        prices["factored"] += own.get("factored", 0)
        prices["folded"] += own.get("folded", math.prod(site.shape) * POSITIONS)
    return cheapest(prices)


def _stored_shape(site: Site) -> tuple[int, ...]:
    return site.shape[::-1] if site.transposed else site.shape
