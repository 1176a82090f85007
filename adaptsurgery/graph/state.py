"""What adapters a graph has, their numbers as updates, and other numbers for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from adaptsurgery.core.update import Update
from adaptsurgery.graph.attach import GraphChange, check_finite, check_site, prefix, taken_names
from adaptsurgery.graph.record import described
from adaptsurgery.graph.strip import adapters_of
from adaptsurgery.graph.walk import Graph, View
from adaptsurgery_formats.errors import NameLookupError, nearest

G = TypeVar("G", ExportedProgram, GraphModule)


def adapters(g: Graph) -> list[str]:
    """The names of the adapters on a graph, in the order of attaching."""
    return list(dict.fromkeys(a.name for on in adapters_of(g).values() for a in on))


def adapter_parameters(g: Graph, name: str = "default") -> dict[str, nn.Parameter]:
    """An adapter's parameters by their names in the state_dict: what an optimiser is given.

    Those of ``g.module()`` are the same objects. Raises NameLookupError for a name it has not.
    """
    _check(g, name)
    tensors = View(g).tensors
    names = [t for on in adapters_of(g).values() for a in on if a.name == name for t in a.names]
    return {t: p for t in names if isinstance(p := tensors[t], nn.Parameter)}


def adapter_state(g: Graph, name: str = "default") -> dict[str, Update]:
    """Module path → update of an adapter: what ``attach`` takes and ``Adapter.from_updates`` saves.

    The tensors are the graph's own, detached. Raises NameLookupError for a name it has not.
    """
    _check(g, name)
    tensors: Mapping[str, Tensor] = View(g).tensors
    return {
        site: attached.update(tensors)
        for site, on in adapters_of(g).items()
        for attached in on
        if attached.name == name
    }


def load_state(g: G, updates: Mapping[str, Update], name: str = "default") -> G:
    """``g`` with other numbers in an adapter: ranks and algorithms may be others too.

    Raises NameLookupError where ``updates`` has other modules than the adapter, ShapeError where
    one does not fit its layer, ValueRefused for numbers that are not finite; ``g`` stays as it is.
    """
    session = GraphChange.of(g)
    session.check_name(name)
    on = {
        site for site, adapters in session.wanted.items() if any(a.name == name for a in adapters)
    }
    wrong = sorted(on.symmetric_difference(updates))
    if wrong:
        raise NameLookupError(
            f"the numbers are not for the modules of the adapter `{name}`",
            items=[f"`{p}`: {'not given' if p in on else 'not on the graph'}" for p in wrong[:20]],
            next=nearest(wrong[0], on),
            code="other-modules",
        )
    sites = {site.path: site for site in session.sites()}
    for path in on:
        check_site(sites[path], updates[path])
        for n, attached in enumerate(session.wanted[path]):
            if attached.name == name:
                for old in attached.names:
                    session.work.drop_tensor(old)
                taken = taken_names(session.work, sites[path], name)
                parts, tensors = described(updates[path], prefix(path, name), taken)
                for full, tensor in tensors.items():
                    check_finite(path, full, tensor)
                    session.work.set_tensor(full, nn.Parameter(tensor.detach().clone()))
                session.wanted[path][n] = replace(attached, parts=parts, strength=1.0)
    result: G = session.finish()
    return result


def _check(g: Graph, name: str) -> None:
    known = adapters(g)
    if name not in known:
        raise NameLookupError(
            f"the graph has no adapter `{name}`",
            seen=f"adapters: {', '.join(known) or 'none'}",
            next=nearest(name, known),
            code="no-adapter",
        )
