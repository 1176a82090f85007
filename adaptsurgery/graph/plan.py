"""``plan``: which sites of a graph a config means, and what it says in vain.

The rules are those of adaptsurgery.targeting, the modules those that the graph calls. A graph knows
no output embeddings, which "all-linear" leaves out: a lm_head, and what shares an embedding's weight,
are taken for such unless ``outputs`` names them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from adaptsurgery.core.config import AdapterConfig
from adaptsurgery.graph.find import find_sites
from adaptsurgery.graph.naming import GraphNames
from adaptsurgery.graph.sites import Site
from adaptsurgery.graph.strip import base_of
from adaptsurgery.graph.walk import Graph, View
from adaptsurgery.targeting import ALL_LINEAR, Target, find_targets
from adaptsurgery_formats.errors import NameLookupError, ValueRefused
from adaptsurgery_formats.names.heads import OUTPUTS
from adaptsurgery_formats.state import Note


@dataclass(frozen=True)
class Plan:
    """The sites that a config adapts in one graph, each with its own rank and alpha.

    ``unsupported`` are targeted too and cannot be adapted: each has its reason, and ``check``
    refuses them. ``saved`` are the modules of modules_to_save. str(plan) is a table.
    """

    config: AdapterConfig
    placed: tuple[tuple[Site, Target], ...]
    unsupported: tuple[Site, ...] = ()
    saved: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()
    fingerprint: str = field(default="", repr=False)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for site, _ in self.placed)

    def check(self, g: Graph) -> None:
        """Raise ValueRefused unless ``g`` is the graph of this plan, whatever adapters are on it, and
        all its targets can be adapted."""
        if fingerprint(View(base_of(g))) != self.fingerprint:
            raise ValueRefused(
                "the plan is one for another graph",
                seen=f"{len(self.placed)} sites, the first `{self.placed[0][0].path}`"
                if self.placed
                else "no sites",
                next="plan(g, config) of this graph",
                code="another-graph",
            )
        self.check_targets()

    def check_targets(self) -> None:
        """Raise ValueRefused for targets that cannot be adapted."""
        if self.unsupported:
            raise ValueRefused(
                f"{len(self.unsupported)} targets cannot be adapted",
                items=[f"`{s.path}`: {s.reason}" for s in self.unsupported[:8]],
                next="exclude_modules, or trace the model so that they show",
                code="unsupported-site",
            )

    def __str__(self) -> str:
        rows = [("module", "kind", "shape", "calls", "rank", "alpha", "")]
        rows += [
            (*_columns(site), *_numbers(target), _remark(site)) for site, target in self.placed
        ]
        rows += [(*_columns(site), "", "", site.reason) for site in self.unsupported]
        lines = _aligned(rows)
        lines += [f"saved whole: {name}" for name in self.saved]
        lines += [f"note: {note.where}: {note.text}" for note in self.notes]
        return "\n".join(lines)


def table(sites: Iterable[Site]) -> str:
    """Sites as text, a line each, with why one cannot be adapted."""
    rows = [("module", "kind", "shape", "calls", "")]
    rows += [(*_columns(site), site.reason or _remark(site)) for site in sites]
    return "\n".join(_aligned(rows))


def plan(
    g: Graph,
    config: AdapterConfig,
    *,
    model_type: str | None = None,
    outputs: Collection[str] | None = None,
) -> Plan:
    """The sites of ``g`` that ``config`` adapts, whatever adapters are on it.

    ``model_type`` and ``outputs`` are what transformers' config and get_output_embeddings say; see
    adaptsurgery.targeting.find_targets, whose errors these are. NameLookupError for a graph in which
    no layer was found at all.
    """
    base = base_of(g)
    return plan_sites(base, config, find_sites(base), model_type=model_type, outputs=outputs)


def plan_sites(
    g: Graph,
    config: AdapterConfig,
    candidates: Sequence[Site],
    *,
    model_type: str | None = None,
    outputs: Collection[str] | None = None,
) -> Plan:
    """``plan`` of a graph without adapters, whose sites are known already."""
    view = View(g)
    sites = {site.path: site for site in reversed(candidates)}
    if not any(site.adaptable for site in sites.values()):
        raise _nothing(list(sites.values()))
    kinds = _kinds(view, sites, config)
    heads = _heads(sites) if outputs is None else tuple(outputs)
    targets = find_targets(kinds, config, model_type=model_type, outputs=heads)
    chosen = list(_placed(targets.chosen, sites))
    notes = (*targets.notes, *_noted(heads, config, outputs))
    return Plan(
        config,
        tuple((site, target) for site, target in chosen if site.adaptable),
        tuple(site for site, _ in chosen if not site.adaptable),
        targets.saved,
        notes,
        fingerprint(view),
    )


def _placed(chosen: Sequence[Target], sites: dict[str, Site]) -> Iterator[tuple[Site, Target]]:
    """Each target's site, once; one whose names are targeted in part, or unlike, has a reason."""
    named = {name: site for site in sites.values() for name in site.names} | sites
    numbers = {target.name: (target.rank, target.alpha) for target in chosen}
    seen: set[str] = set()
    for target in chosen:
        site = named.get(target.name) or _no_site(target)
        if site.path in seen:
            continue
        seen.add(site.path)
        if len({numbers.get(name) for name in site.names}) > 1:
            remedy = "target all alike, or torch.export.export(…, strict=True)"
            site = replace(site, reason=f"{site.untold()}: {remedy}")
        yield site, target


def fingerprint(view: View) -> str:
    """A hash that tells graphs apart: of all nodes, nested ones too, by name and target."""
    digest = hashlib.sha256()
    for scope in view.scopes:
        digest.update(repr(scope.path).encode())
        for node in scope.nodes:
            digest.update(f"{node.op} {node.name} {node.target}\n".encode())
    return digest.hexdigest()[:16]


def _kinds(view: View, sites: dict[str, Site], config: AdapterConfig) -> dict[str, str]:
    """Every module that the graph calls, and its layer's kind.

    A product that a larger module computes with a parameter of its own (a router, an attention's
    in_proj) is a layer where it is named; "all-linear" means modules that are linear.
    """
    names = GraphNames(view)
    targets = config.target_modules
    by_class = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    paths = [name for site in sites.values() for name in (site.names or (site.path,))]
    kinds = dict.fromkeys(names.modules(paths), "")
    for path, site in sites.items():
        layer = names.is_layer(path, site.weight)
        for name in site.names or (path,):
            kinds[name] = site.kind if layer or not by_class else ""
    embeddings = [p for p in kinds if names.type(p).endswith("Embedding") and p not in sites]
    kinds.update(dict.fromkeys(embeddings, "embedding"))
    return kinds


def _heads(sites: dict[str, Site]) -> tuple[str, ...]:
    """Sites that look like output embeddings."""
    return tuple(
        path
        for path, site in sites.items()
        if path.rpartition(".")[2] in OUTPUTS or any("embed" in p for p in site.shares)
    )


def _noted(
    heads: tuple[str, ...], config: AdapterConfig, outputs: Collection[str] | None
) -> list[Note]:
    targets = config.target_modules
    if outputs is not None or not (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        return []
    text = "taken for an output embedding and left out; outputs=() takes it in"
    return [Note("left-out", head, text) for head in heads]


def _no_site(target: Target) -> Site:
    reason = "in a graph adapters go on linears and convolutions"
    return Site(target.name, target.kind, (), (), reason=reason)


def _nothing(sites: list[Site]) -> NameLookupError:
    return NameLookupError(
        "no layer of the graph can be adapted",
        items=[f"`{site.path}`: {site.reason}" for site in sites[:8]],
        seen=f"{len(sites)} layers, none adaptable" if sites else "no Linear, no convolution",
        next="find_sites(g) lists what was found; export the model with torch.export.export",
        code="no-sites",
    )


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines of text in aligned columns; the last column is not padded."""
    widths = [max(map(len, column)) for column in list(zip(*rows))[:-1]]
    cells = [[*(c.ljust(w) for c, w in zip(row, widths)), row[-1]] for row in rows]
    return ["  ".join(row).rstrip() for row in cells]


def _columns(site: Site) -> tuple[str, str, str, str]:
    shape = "×".join(map(str, site.shape))
    return site.path or "(the model)", site.kind, shape, str(len(site.calls))


def _numbers(target: Target) -> tuple[str, str]:
    return str(target.rank), "" if target.alpha is None else f"{target.alpha:g}"


def _remark(site: Site) -> str:
    parts = [f"shares its weight with {', '.join(site.shares)}"] if site.shares else []
    parts += [f"also called {', '.join(site.aliases)}"] if site.aliases else []
    parts += ["weight computed"] if not site.weight else []
    return "; ".join(parts)
