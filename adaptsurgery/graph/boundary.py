"""A module's boundary: what goes in, what comes out, where no node alone is the layer.

The nodes of one call of a module are those that have it in their nn_module_stack. Its input is the
one tensor from outside that the program's inputs reach, its output the one tensor that is used
outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from adaptsurgery.graph.forms import Form, is_view, op_name, shape_of
from adaptsurgery.graph.walk import Scope, is_ours, owners


@dataclass(frozen=True)
class Boundary:
    """The nodes of a module's call, and the nodes whose values cross into it and out of it."""

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]

    @property
    def trouble(self) -> str:
        """Why the boundary is not one input and one output; "" where it is."""
        if len(self.inputs) == len(self.outputs) == 1:
            return ""
        into = ", ".join(f"`{n.name}`" for n in self.inputs) or "none"
        out = ", ".join(f"`{n.name}`" for n in self.outputs) or "none"
        return f"its boundary is ambiguous: inputs {into}, outputs {out}"

    def is_just(self, form: Form, scope: Scope) -> bool:
        """Whether all nodes beside the form's are views of its input and output, and a bias."""
        out: Node | None = self.outputs[0]
        while out is not form.node and out is not None and (is_view(out) or _adds(out, scope)):
            out = _argument(out)
        into: Node | None = form.x
        while into is not self.inputs[0] and into is not None and is_view(into):
            into = _argument(into)
        return out is form.node and into is self.inputs[0]

    def sizes(self) -> tuple[int, int] | None:
        """(o, i) of a linear map of the last dim; None where the shapes show no such map."""
        into, out = shape_of(self.inputs[0]), shape_of(self.outputs[0])
        if not into or not out or len(into) != len(out) or str(into[:-1]) != str(out[:-1]):
            return None
        ends = out[-1], into[-1]
        return ends if all(isinstance(n, int) for n in ends) else None


def boundary(scope: Scope, key: str) -> Boundary:
    """The boundary of the call of a module that ``key`` stands for, in this graph."""
    calls = ("call_function", "call_method", "call_module")
    nodes = [n for n in scope.nodes if n.op in calls and not is_ours(n) and _within(n, key)]
    group = set(nodes)
    inputs: dict[Node, None] = {}
    for node in nodes:
        for outside in node.all_input_nodes:
            if outside not in group and outside not in scope.fixed and is_tensor(outside):
                inputs[outside] = None
    outputs = [n for n in nodes if is_tensor(n) and set(n.users) - group and n not in scope.fixed]
    return Boundary(tuple(nodes), tuple(inputs), tuple(outputs))


def is_tensor(node: Node) -> bool:
    """Whether a node gives a tensor, as far as the trace noted it; a size or a list is none."""
    if "val" in node.meta or "example_value" in node.meta:
        value: Any = node.meta.get("val", node.meta.get("example_value"))
        return isinstance(value, Tensor)
    return op_name(node) not in ("size", "sym_size", "getattr", "len", "dim")


def is_floating(value: object) -> bool:
    """Whether a tensor is of the dtypes that weights and inputs have; float8 is storage."""
    wide = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return isinstance(value, Tensor) and value.dtype in wide


def _within(node: Node, key: str) -> bool:
    return any(owner.key == key for owner in owners(node))


def _adds(node: Node, scope: Scope) -> bool:
    """Whether a node adds a bias: a parameter, or what is computed from one."""
    return op_name(node) == "add" and len(node.args) == 2 and node.args[1] in scope.fixed


def _argument(node: Node) -> Node | None:
    first = node.args[0] if node.args else None
    return first if isinstance(first, Node) else None
