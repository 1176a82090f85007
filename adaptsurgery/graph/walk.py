"""One view of an ExportedProgram and a GraphModule: their graphs, nested ones too, and their tensors.

A higher-order node (no_grad, autocast, cond) calls a graph of its own, into which parameters come as
operands. A Scope is one such graph; it knows what every placeholder stands for.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from adaptsurgery.graph.sites import RECORD
from adaptsurgery_formats.errors import ValueRefused

Graph = ExportedProgram | GraphModule
# What a pass leaves on nodes that belong to no module.
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
_ROOTS = re.compile(r"^(L\['self'\]|L__self__|_export_root)\.?")


@dataclass(eq=False)
class Scope:
    """A graph and the way to it: ``path`` of get_attr targets, ``hops`` of calling nodes."""

    module: GraphModule
    path: tuple[str, ...] = ()
    hops: tuple[str, ...] = ()
    callers: tuple[str, ...] = ()  # what calls it, from the top: "cond", "wrap_with_autocast"
    operands: Mapping[Node, Node] = field(default_factory=dict)
    outer: Scope | None = None
    place: tuple[int, ...] = ()  # where its caller stands, to order what is in it
    names: dict[Node, str] = field(default_factory=dict)  # nodes that are a parameter or buffer
    fixed: set[Node] = field(default_factory=set)  # nodes that no input of the program reaches

    @property
    def nodes(self) -> list[Node]:
        return list(self.module.graph.nodes)


@dataclass(frozen=True)
class Owner:
    """The module call that a node belongs to: ``key`` tells calls apart, ``identity`` objects."""

    key: str
    path: str
    type: str

    @property
    def identity(self) -> str:
        """The module object's id where a strict trace noted it, else ""."""
        number = self.key.partition("@")[0]
        return number if number.isdigit() else ""


class View:
    """The scopes of a program, the outermost first, and its parameters and buffers by name."""

    def __init__(self, g: Graph) -> None:
        check_graph(g)
        self.graph = g
        self.top = g.graph_module if isinstance(g, ExportedProgram) else g
        self.tensors = _tensors(g)
        self._inputs = _lifted(g)
        self._by_identity: dict[object, list[str]] = {}
        for name, tensor in self.tensors.items():
            self._by_identity.setdefault(_identity(tensor), []).append(name)
        self.scopes = list(self._scopes(Scope(self.top)))

    def _scopes(self, scope: Scope) -> Iterator[Scope]:
        """A scope with its names and fixed nodes, and those nested in it, in the order of calls."""
        yield scope
        for position, node in enumerate(scope.nodes):
            name = self._name(scope, node)
            if name:
                scope.names[node] = name
            if name or self._is_fixed(scope, node):
                scope.fixed.add(node)
            for inner in _called(scope, node):
                inner.place = (*scope.place, position)
                yield from self._scopes(inner)

    def _name(self, scope: Scope, node: Node) -> str:
        if node.op == "placeholder":
            if scope.outer is None:
                return self._inputs.get(node.name, "")
            return scope.outer.names.get(scope.operands[node], "") if node in scope.operands else ""
        if node.op == "get_attr":
            name = ".".join((*scope.path, str(node.target)))
            return name if name in self.tensors else ""
        return ""

    def _is_fixed(self, scope: Scope, node: Node) -> bool:
        if node.op == "placeholder":
            outer = scope.outer
            return (
                outer is not None and node in scope.operands and scope.operands[node] in outer.fixed
            )
        return node.op not in ("output", "call_module") and all(
            n in scope.fixed for n in node.all_input_nodes
        )

    def same(self, name: str) -> list[str]:
        """Every name of the tensor that is called ``name``, in the state's order."""
        return self._by_identity[_identity(self.tensors[name])]


def check_graph(g: object) -> None:
    """Raise ValueRefused for what is no graph."""
    if not isinstance(g, ExportedProgram | GraphModule):
        raise ValueRefused(
            f"{type(g).__name__} is not a graph",
            next="an ExportedProgram, its .module(), or what torch.fx.symbolic_trace gives",
            code="not-a-graph",
        )


def owners(node: Node) -> list[Owner]:
    """The modules that a node was called in, the outermost first, as the trace noted them."""
    stack = node.meta.get("nn_module_stack") or {}
    return [
        Owner(str(key), clean(path), _class_name(kind))
        for key, (path, kind) in stack.items()
        if path != _NO_MODULE
    ]


@functools.lru_cache(4096)
def clean(path: str) -> str:
    """A module's dotted path from a trace's spelling of it: no root, no ``@2`` for a second call."""
    return re.sub(r"@\d+$", "", _ROOTS.sub("", path))


def is_ours(node: Node) -> bool:
    """Whether surgery put the node there."""
    return RECORD in (node.meta.get("custom") or {})


def flat(value: Any) -> Iterator[Any]:
    """The leaves of a node's arguments, in order."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from flat(item)
    elif isinstance(value, dict):
        yield from flat(list(value.values()))
    else:
        yield value


def _called(scope: Scope, node: Node) -> Iterator[Scope]:
    """The graphs that a node calls."""
    if node.op == "call_module":
        target = str(node.target)
        called = scope.module.get_submodule(target)
        if isinstance(called, GraphModule):
            yield _inside(scope, node, target, called, "call_module", list(flat(node.args)))
        return
    if node.op != "call_function" or not any(_graph_of(scope, n) for n in node.all_input_nodes):
        return
    leaves = list(flat((node.args, node.kwargs)))
    graphs = [leaf for leaf in leaves if isinstance(leaf, Node) and _graph_of(scope, leaf)]
    operands = leaves[leaves.index(graphs[-1]) + 1 :]
    for graph in graphs:
        inner = _graph_of(scope, graph)
        assert inner is not None
        yield _inside(scope, node, str(graph.target), inner, _name_of(node), operands)


def _inside(
    scope: Scope, node: Node, target: str, inner: GraphModule, caller: str, operands: list[Any]
) -> Scope:
    """The scope of ``inner``; its placeholders are the last of the operands."""
    places = [n for n in inner.graph.nodes if n.op == "placeholder"]
    given = operands[len(operands) - len(places) :] if len(operands) >= len(places) else []
    bound = {p: o for p, o in zip(places, given) if isinstance(o, Node)}
    return Scope(
        inner,
        (*scope.path, target),
        (*scope.hops, node.name),
        (*scope.callers, caller),
        bound,
        scope,
    )


def _graph_of(scope: Scope, node: Node) -> GraphModule | None:
    if node.op != "get_attr":
        return None
    attribute: Any = scope.module
    for part in str(node.target).split("."):
        attribute = getattr(attribute, part, None)
    return attribute if isinstance(attribute, GraphModule) else None


def _name_of(node: Node) -> str:
    """The name of a higher-order node's operation, such as ``cond``."""
    name = getattr(node.target, "_name", None) or getattr(node.target, "__name__", node.target)
    return str(name)


def _class_name(kind: Any) -> str:
    """The bare name (``Linear``) of a class, or of the dotted name of one."""
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]


def _tensors(g: Graph) -> dict[str, Tensor]:
    if isinstance(g, ExportedProgram):
        constants = {k: v for k, v in g.constants.items() if isinstance(v, Tensor)}
        return {**g.state_dict, **constants}
    tensors: dict[str, Tensor] = dict(g.named_parameters(remove_duplicate=False))
    tensors.update(g.named_buffers(remove_duplicate=False))
    return tensors


def _lifted(g: Graph) -> dict[str, str]:
    """Placeholder → the parameter, buffer or constant that it stands for."""
    if not isinstance(g, ExportedProgram):
        return {}
    signature = g.graph_signature
    return {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }


def _identity(tensor: Tensor) -> object:
    """A key that two names of one tensor share, also after a program was loaded."""
    try:
        place = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a fake or wrapped tensor has no memory
        place = 0
    if place == 0:
        return id(tensor)
    return place, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
