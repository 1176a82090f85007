"""An adapter's nodes once more: layers that are alike get copies of what the first of them got.

An update that runs on fake tensors takes its time, and gives the same nodes for every layer of the same
geometry, shapes, input and adapters. So what one call got is kept, each node by what it reads: others
of these nodes, the layer's own values, an adapter's parameter. A copy reads what stands in the same
places of another layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from adaptsurgery.graph.emit import retarget
from adaptsurgery.graph.record import SHARED, Attached, Tag, tag_of
from adaptsurgery.graph.sites import RECORD, Call, Site
from adaptsurgery.graph.workspace import Workspace

BASE = ("nn_module_stack", "stack_trace")  # what a node of an adapter has of its layer's


@dataclass(frozen=True)
class Ref:
    """An operand: a step by number, a value of the layer by role, a parameter by order."""

    kind: str
    number: int = 0


@dataclass(frozen=True)
class RecordedNode:
    """One node to make; one that is ``after`` stands behind the layer, not before it."""

    target: Any
    args: Any
    kwargs: Any
    value: Any
    after: bool
    shared: bool


@dataclass(frozen=True)
class Template:
    """The nodes in their order, and which of them stand in for the layer's values."""

    steps: tuple[RecordedNode, ...]
    roles: Mapping[str, Ref]


@dataclass
class SiteCall:
    """One call of a layer, where adapters are put."""

    work: Workspace
    site: Site
    call: Call
    adapters: tuple[Attached, ...]

    def __post_init__(self) -> None:
        self.nodes = self.work.nodes(self.call.graph)
        self.group = [self.nodes[name] for name in self.call.nodes]
        self.output = self.nodes[self.call.output]
        self.has_values = self.work.has_values(self.call.graph)

    @property
    def input(self) -> Node:
        """The node that the layer reads now: the adapted output of the layer before, where that is one."""
        adapted = self.work.adapted.get((self.call.graph, self.call.input))
        return adapted or self.nodes[self.call.input]

    @property
    def names(self) -> list[str]:
        """The parameters of the adapters, in order."""
        return [name for a in self.adapters for name in a.names]

    def parameter(self, name: str) -> Node:
        """The node of one parameter."""
        value = None
        if self.has_values and not self.work.is_led((self.call.graph, name)):
            value = self.work.fake.from_tensor(self.work.tensor(name).detach(), static_shapes=True)
        return self.work.node_of(name, self.call.graph, value)

    def own(self) -> dict[str, Node]:
        """The nodes of the layer's values by role: x, out, weight and bias."""
        held = {"x": self.input, "out": self.output}
        for slot in ("weight", "bias"):
            if name := getattr(self.call, slot):
                held[slot] = self.nodes[name]
        return held

    def lead_out(self, end: Node, ours: Iterable[Node]) -> None:
        """Make all nodes that read the layer's output read ``end``."""
        own, made = self.output, set(ours)
        self.work.adapted[self.call.graph, own.name] = end
        for user in list(own.users):
            if user not in made:
                user.replace_input_with(own, end)


def key(place: SiteCall) -> object:
    """The key that calls which get the same nodes share; None where copies are not made."""
    site = place.site
    if len(site.calls) > 1 or place.group[0].op != "call_function":
        return None
    own = place.own()
    reached = [
        (slot, node.op, node.op != "get_attr" or node < place.group[0])
        for slot, node in own.items()
        if slot != "out"
    ]
    return (
        (site.kind, site.shape, site.transposed, site.stride, site.padding, site.padding_mode),
        (site.dilation, site.groups, place.has_values, tuple(reached)),
        tuple(str(node.target) for node in place.group),
        tuple((slot, _look(_value(place, slot, node))) for slot, node in own.items()),
        tuple(_adapter_key(place.work, a) for a in place.adapters),
    )


def _value(place: SiteCall, slot: str, node: Node) -> Any:
    value = node.meta.get("val")
    if value is None and slot in ("weight", "bias") and node.op == "get_attr":
        return place.work.tensor(str(node.target))
    return value


def _look(value: Any) -> object:
    """All of a tensor but its numbers, as a key; open sizes by their expressions."""
    if not isinstance(value, Tensor):
        return None
    sizes = (*value.shape, *value.stride())
    return (
        value.dim(),
        tuple(n.node.expr if isinstance(n, torch.SymInt) else n for n in sizes),
        value.dtype,
        value.device,
    )


def _adapter_key(work: Workspace, attached: Attached) -> object:
    parts = [
        (
            p.algorithm,
            p.scale,
            repr(p.options),
            [(s, _look(work.tensor(n))) for s, n in p.slots.items()],
        )
        for p in attached.parts
    ]
    return attached.form, attached.strength, repr(attached.dropout), repr(parts)


def recorded(
    place: SiteCall, made: list[Node], roles: Mapping[str, Node], own: dict[str, Node]
) -> Template | None:
    """The nodes that a call got, to be copied; None where a copy could not hold all of it.

    ``own`` are the layer's values as they were before.
    """
    known = {node: Ref(kind) for kind, node in own.items()}
    parameters = {place.parameter(n): Ref("parameter", i) for i, n in enumerate(place.names)}
    made = sorted((node for node in made if not node._erased), key=lambda n: n._sort_key)
    steps = {node: Ref("step", n) for n, node in enumerate(made)}
    refs: dict[Node, Ref] = {**known, **parameters, **steps}
    read = {node for step in made for node in step.all_input_nodes} | set(roles.values())
    if len(known) < len(own) or read - refs.keys() or any(n.op != "call_function" for n in made):
        return None

    def as_ref(value: Any) -> Any:
        return refs[value] if isinstance(value, Node) else value

    return Template(
        tuple(
            RecordedNode(
                node.target,
                map_aggregate(node.args, as_ref),
                map_aggregate(node.kwargs, as_ref),
                node.meta.get("val"),
                node > place.output,
                _call_of(node) == SHARED,
            )
            for node in made
        ),
        {role: refs[node] for role, node in roles.items()},
    )


def _call_of(node: Node) -> int:
    tag = tag_of(node)
    assert tag is not None
    return tag.call


def replay(place: SiteCall, template: Template) -> None:
    """Give a call copies of the nodes that another like it got."""
    graph, own = place.output.graph, place.own()
    names, made = place.names, list[Node]()
    behind = place.output.next

    def actual(value: Any) -> Any:
        if not isinstance(value, Ref):
            return value
        if value.kind == "step":
            return made[value.number]
        return (
            place.parameter(names[value.number]) if value.kind == "parameter" else own[value.kind]
        )

    for step in template.steps:
        args, kwargs = map_aggregate(step.args, actual), map_aggregate(step.kwargs, actual)
        with graph.inserting_before(behind if step.after else place.group[0]):
            made.append(graph.create_node("call_function", step.target, args, kwargs))
    ends = {role: actual(ref) for role, ref in template.roles.items()}
    for role, end in ends.items():
        if role != "out":
            retarget(place.group, own[role], end)
    if "out" in ends:
        place.lead_out(ends["out"], made)
    role_of = {node: role for role, node in ends.items()}
    texts: dict[Tag, str] = {}
    for node, step in zip(made, template.steps):
        tag = Tag(place.site.path, SHARED if step.shared else 0, role_of.get(node, ""))
        if tag not in texts:
            texts[tag] = (replace(tag, adapters=place.adapters) if tag.role else tag).text
        note(node, place.output, texts[tag])
        if step.value is not None:
            node.meta["val"] = step.value


def note(node: Node, base: Node, text: str) -> None:
    """Give a new node its metadata: its layer's, and the surgery's note."""
    node.meta = {
        name: dict(kept) if isinstance(kept := base.meta[name], dict) else kept
        for name in BASE
        if name in base.meta
    }
    node.meta["custom"] = {RECORD: text}
