"""Taking adapters out: the base reads its own values again, and what surgery added is erased.

What a noted node stands in for is found by following it back through its own adapter's nodes to what
was there before: the last such node in the graph's order is the layer's own input, weight, bias or
output, since parameters come first. So it holds after a re-export or a decomposition too, where
names have changed and one node has become several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch.fx import GraphModule, Node

from adaptsurgery.graph.emit import retarget
from adaptsurgery.graph.record import SHARED, Attached, Tag, count, counts_of, tag_of
from adaptsurgery.graph.walk import Graph, View
from adaptsurgery.graph.workspace import Workspace, remove_operand
from adaptsurgery_formats.errors import ValueRefused

AdaptersBySite = dict[str, tuple[Attached, ...]]


def adapters_of(g: Graph) -> AdaptersBySite:
    """Site path → the adapters on it, in order, as the graph's own notes have them.

    Raises ValueRefused where some of the notes are gone.
    """
    by_site: AdaptersBySite = {}
    places: dict[tuple[str, tuple[str, ...]], tuple[Attached, ...]] = {}
    counts: dict[str, int] = {}
    for scope in View(g).scopes:
        for node in scope.module.graph.nodes:
            counts |= counts_of(node)
            tag = tag_of(node)
            if tag is not None and tag.adapters:
                by_site.setdefault(tag.site, tag.adapters)
                places[tag.site, scope.path] = tag.adapters
    _check_whole(list(places.values()), counts)
    return by_site


def _check_whole(places: list[tuple[Attached, ...]], counts: dict[str, int]) -> None:
    """``counts`` has the places of adapters whose notes may be lost altogether."""
    seen = Counter(a.name for adapters in places for a in adapters)
    counts = counts | {a.name: a.places for adapters in places for a in adapters}
    for name, wanted in counts.items():
        if seen[name] != wanted:
            raise ValueRefused(
                f"the notes of the adapter `{name}` are not whole: torch drops those within no_grad "
                "and autocast when it exports or decomposes a program again",
                seen=f"{seen[name]} of {wanted} places",
                next="go back to the program that was attached to, and detach or merge there",
                code="notes-lost",
            )


def strip(work: Workspace, by_site: AdaptersBySite) -> None:
    """Take every adapter out of the copy; their tensors stay in its state."""
    names = {name for adapters in by_site.values() for a in adapters for name in a.names}
    parameters = _parameter_nodes(work, names)
    for path, module in work.modules():
        _Stripper(module, parameters.get(path, set())).run()
    for node in parameters.get((), set()):
        _erase_parameter(work, (), node)
    for _, module in work.modules():
        for node in module.graph.nodes:
            count(node, None)
        _forget_names(module)


def bare(work: Workspace, by_site: AdaptersBySite) -> Graph:
    """The stripped copy as a graph by itself, to look for sites in."""
    names = {t for on in by_site.values() for a in on for t in a.names}
    held = {name: work.state.pop(name) for name in names & work.state.keys()}
    graph = work.finish()
    work.state = {**work.state, **held}
    return graph


def base_of(g: Graph) -> Graph:
    """A graph without its adapters; itself where it has none."""
    by_site = adapters_of(g)
    if not by_site:
        return g
    work = Workspace(g)
    strip(work, by_site)
    return bare(work, by_site)


def _forget_names(module: GraphModule) -> None:
    """Names of erased nodes are free again, so that what is put back has the names it had."""
    names = type(module.graph._graph_namespace)()
    for node in module.graph.nodes:
        names.create_name(node.name, None)
    module.graph._graph_namespace = names


def _parameter_nodes(work: Workspace, names: set[str]) -> dict[tuple[str, ...], set[Node]]:
    """The nodes of adapters' parameters by graph, operands of nested graphs included."""
    source = View(work.source)
    wanted: dict[tuple[str, ...], set[str]] = {}
    for scope in source.scopes:
        held = {node.name for node, name in scope.names.items() if name in names}
        wanted.setdefault(scope.path, set()).update(held)
    return {
        path: {node for node in module.graph.nodes if node.name in wanted.get(path, set())}
        for path, module in work.modules()
    }


def _erase_parameter(work: Workspace, path: tuple[str, ...], node: Node) -> None:
    """Erase a parameter's node, with the operands that led it into nested graphs."""
    for caller in list(node.users):
        place = remove_operand(caller, node)
        for step, inner in work.branches(path, caller):
            places = [n for n in inner.graph.nodes if n.op == "placeholder"]
            _erase_parameter(work, (*path, step), places[place])
    work.module(path).graph.erase_node(node)


class _Stripper:
    """Takes the adapters out of one graph."""

    def __init__(self, module: GraphModule, parameters: set[Node]) -> None:
        self.module, self.parameters = module, parameters
        self.place = {node: n for n, node in enumerate(module.graph.nodes)}
        self.tags: Mapping[Node, Tag] = {
            node: tag for node in module.graph.nodes if (tag := tag_of(node)) is not None
        }
        self.original: dict[Node, Node] = {}

    def run(self) -> None:
        for node in self.tags:
            outside = [user for user in node.users if user not in self.tags]
            if outside:
                retarget(outside, node, self._stands_for(node))
        for node in sorted(self.tags, key=self.place.__getitem__, reverse=True):
            self.module.graph.erase_node(node)

    def _stands_for(self, node: Node) -> Node:
        """The base's node whose place an adapter's node took; any other node is itself."""
        tag = self.tags.get(node)
        if tag is None:
            return node
        if node not in self.original:
            self.original[node] = self._original_of(node, tag)
        return self.original[node]

    def _original_of(self, node: Node, tag: Tag) -> Node:
        if tag.module:
            return self._called_again(node, tag)
        return self._stands_for(max(self._entries(node, tag), key=self.place.__getitem__))

    def _entries(self, node: Node, tag: Tag) -> list[Node]:
        """The nodes that are not the adapter's, and that its nodes read on the way to ``node``."""
        seen, queue, entries = {node}, [node], []
        while queue:
            for source in queue.pop().all_input_nodes:
                if source in seen:
                    continue
                seen.add(source)
                other = self.tags.get(source)
                if other and other.site == tag.site and other.call in (tag.call, SHARED):
                    queue.append(source)
                elif source not in self.parameters:
                    entries.append(source)
        return entries

    def _called_again(self, node: Node, tag: Tag) -> Node:
        """A new call of the module whose call a node took the place of."""
        x = max(
            (n for n in self._entries(node, tag) if n.op != "get_attr"), key=self.place.__getitem__
        )
        with self.module.graph.inserting_before(node):
            made = self.module.graph.create_node(
                "call_module", tag.module, (self._stands_for(x),), name=tag.node
            )
        for key in ("nn_module_stack", "stack_trace"):
            if key in node.meta:
                made.meta[key] = node.meta[key]
        self.place[made] = self.place[node]
        return made
