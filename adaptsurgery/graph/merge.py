"""``merge``: adapters folded into the weights of a graph, which then shows no trace of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.law import Order, order_of
from adaptsurgery.core.update import Update, compose, is_finite, parts_of
from adaptsurgery.graph.attach import GraphChange
from adaptsurgery.graph.emit import retarget
from adaptsurgery.graph.find import find_sites
from adaptsurgery.graph.forms import is_view, op_name
from adaptsurgery.graph.record import Attached
from adaptsurgery.graph.sites import Call, Site
from adaptsurgery.graph.walk import Scope, View
from adaptsurgery.graph.workspace import Workspace
from adaptsurgery_formats.errors import ValueRefused

G = TypeVar("G", ExportedProgram, GraphModule)
_BIASED = ("linear", "conv1d", "conv2d", "conv3d")


def merge(g: G, name: str | None = None) -> G:
    """``g`` with an adapter folded into its weights, or all of them where ``name`` is None.

    Weights are computed in float32 at least and rounded once. A weight that others use too (a tied
    embedding) is left to them, and the layer gets one of its own. Raises NameLookupError for a name
    that the graph has not, ValueRefused for a weight that is computed in the graph, for one that would
    not be finite, and for an adapter that cannot go in before those that stay.
    """
    session = GraphChange.of(g)
    if name is None and not session.names:
        session.check_name("default")
    if name is not None:
        session.check_name(name)
    base = session.base()
    view = View(base)
    sites = {site.path: site for site in find_sites(base, view)}
    nodes: dict[tuple[str, ...], dict[str, Node]] = {}
    for path, adapters in list(session.wanted.items()):
        going = [a for a in adapters if name in (None, a.name)]
        if going:
            staying = [a for a in adapters if a not in going]
            _Merger(session.work, view, nodes, sites[path]).run(going, staying)
    session.changed()
    for each in session.names if name is None else [name]:
        session.remove(each)
    result: G = session.finish()
    return result


@dataclass
class _Merger:
    """Folds adapters into one site. ``view`` is the base's, ``nodes`` the copy's by graph and name."""

    work: Workspace
    view: View
    nodes: dict[tuple[str, ...], dict[str, Node]]
    site: Site

    def run(self, going: list[Attached], staying: list[Attached]) -> None:
        if not self.site.weight:
            raise ValueRefused(
                f"`{self.site.path}`: its weight is computed in the graph, and cannot be replaced",
                next="leave the adapter attached",
                code="computed-weight",
            )
        update = compose(self._updates(going))
        _check_order(self.site.path, update, self._updates(staying))
        named = "" if self._is_apart() else self.site.bias
        bias = self.work.tensor(named).detach() if named else None
        weight = self.work.tensor(self.site.weight).detach()
        layer = self.site.layer(weight, bias)
        new = layer.stored(update.fold(layer.canonical())).contiguous()
        folded = update.fold_bias(bias, weight.dtype)
        if not all(is_finite(t) for t in (new, folded) if t is not None):
            raise ValueRefused(
                f"`{self.site.path}`: the merged weight is not finite",
                seen=f"{weight.dtype}".removeprefix("torch."),
                next="look at the adapter's numbers; a base in float16 may overflow",
                code="non-finite",
            )
        self._replace("weight", self.site.weight, new)
        if folded is not None and folded is not bias:
            self._replace("bias", named, folded.detach().clone())

    def _is_apart(self) -> bool:
        """Whether the bias cannot be replaced: others use it too, or a node reads the layer's output
        without it.

        The layer then gets a second bias, for what an update adds.
        """
        site = self.site
        if not site.bias or self._module() is not None or any(call.bias for call in site.calls):
            return False
        return self._used_elsewhere(site.bias) or not all(map(self._is_biased, site.calls))

    def _is_biased(self, call: Call) -> bool:
        """Whether every node that reads a call's output, or a view of it, adds the bias to it."""
        for scope in self.view.scopes:
            if scope.path != call.graph:
                continue
            left = [node for node in scope.nodes if node.name == call.output]
            while left:
                for user in left.pop().users:
                    if is_view(user):
                        left.append(user)
                    elif not self._is_behind(scope, user) or all(
                        scope.names.get(operand) != self.site.bias
                        for operand in user.all_input_nodes
                    ):
                        return False
        return True

    def _updates(self, adapters: Iterable[Attached]) -> list[Update]:
        return [a.update({n: self.work.tensor(n) for n in a.names}) for a in adapters]

    def _replace(self, slot: str, name: str, value: Tensor) -> None:
        """Put a new tensor in the place of the layer's; others that use the old one keep it."""
        module = self._module()
        if module is not None:
            setattr(module, slot, nn.Parameter(value, _trained(getattr(module, slot))))
            return
        old = self.work.tensor(name) if name else None
        parameter = nn.Parameter(value, _trained(old))
        if name and not self._used_elsewhere(name):
            self.work.set_tensor(name, parameter)
            return
        own = self._own_name(slot, name)
        self.work.set_tensor(own, parameter)
        for call in self.site.calls:
            self._read(call, slot, own, value)

    def _module(self) -> nn.Module | None:
        """The module that the site calls, in a symbolic trace."""
        call = self.site.calls[0]
        node = self._nodes(call)[call.nodes[0]]
        if node.op != "call_module":
            return None
        return self.work.module(call.graph).get_submodule(str(node.target))

    def _nodes(self, call: Call) -> dict[str, Node]:
        if call.graph not in self.nodes:
            graph = self.work.module(call.graph).graph
            self.nodes[call.graph] = {node.name: node for node in graph.nodes}
        return self.nodes[call.graph]

    def _used_elsewhere(self, name: str) -> bool:
        own = {(call.graph, node) for call in self.site.calls for node in call.nodes}
        for scope in self.view.scopes:
            for node, held in scope.names.items():
                for user in node.users if held == name else ():
                    passed_on = any(s.hops[-1:] == (user.name,) for s in self.view.scopes)
                    ours = (scope.path, user.name) in own or (
                        name == self.site.bias and self._is_behind(scope, user)
                    )
                    if not ours and not passed_on:
                        return True
        return False

    def _is_behind(self, scope: Scope, node: Node) -> bool:
        """Whether a node adds something to a linear's output, or its view, along the last axis."""
        if self.site.kind != "linear" or op_name(node) != "add" or node.kwargs:
            return False
        if len(node.all_input_nodes) != 2:
            return False
        outputs = {call.output for call in self.site.calls if call.graph == scope.path}
        return any(_viewed(operand).name in outputs for operand in node.all_input_nodes)

    def _own_name(self, slot: str, name: str) -> str:
        wanted = f"{self.site.path}.{slot}" if self.site.path else slot
        free = not self.work.has(wanted) or (wanted != name and not self._read_by_graph(wanted))
        return wanted if free else f"{wanted}_merged"

    def _read_by_graph(self, name: str) -> bool:
        return any(name in scope.names.values() for scope in self.view.scopes)

    def _read(self, call: Call, slot: str, name: str, value: Tensor) -> None:
        """Make one call read the parameter ``name``."""
        nodes = self._nodes(call)
        group = [nodes[n] for n in call.nodes]
        shown = any("val" in node.meta for node in nodes.values())
        fake = self.work.fake.from_tensor(value, static_shapes=True) if shown else None
        new = self.work.node_of(name, call.graph, fake)
        held = getattr(call, slot)
        if held:
            retarget(group, nodes[held], new)
        else:
            self._add_bias(group, nodes[call.output], new, value)

    def _add_bias(self, group: list[Node], output: Node, new: Node, value: Tensor) -> None:
        """A bias for a layer that had none: its own argument, or an addition behind it."""
        named = str(getattr(output.target, "__name__", output.target)).split(".")[0]
        if len(group) == 1 and named in _BIASED:
            output.args = (*output.args[:2], new, *output.args[3:])
            return
        layer = Layer(self.site.kind, torch.empty(self.site.shape, device="meta"))
        shaped = value.shape if not layer.dims else (*value.shape, *(1,) * layer.dims)
        graph = output.graph
        users = list(output.users)
        with graph.inserting_before(output.next):
            view = graph.call_function(torch.ops.aten.view.default, (new, list(shaped)))
            total = graph.call_function(torch.ops.aten.add.Tensor, (output, view))
        for node, like in ((view, new), (total, output)):
            node.meta = {k: v for k, v in output.meta.items() if k != "val"}
            if "val" in like.meta:
                held = like.meta["val"]
                node.meta["val"] = held.view(shaped) if node is view else held
        retarget(users, output, total)


def _viewed(node: Node) -> Node:
    """The node that a node is a view of."""
    while is_view(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _trained(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _check_order(path: str, update: Update, staying: list[Update]) -> None:
    """Raise ValueRefused unless ``update`` comes, by core/law.py, before all that stays."""
    going = [order_of(part) for part in parts_of(update)]
    later = [order_of(part) for each in staying for part in parts_of(each)]
    if not going or not later or (max(going) <= min(later) and max(going) is not Order.RENEW):
        return
    if max(going) is Order.RENEW and min(later) is not Order.TURN:
        what = "a renorm cannot be folded in before other updates that stay"
    elif min(later) is Order.TURN:
        what = "a difference cannot be folded in before a rotation that stays: it would be turned"
    else:
        what = "a difference cannot be folded in before a scaling that stays: it would be scaled"
    raise ValueRefused(f"`{path}`: {what}", next="merge all, or detach the other", code="order")
