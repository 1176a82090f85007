"""The node forms of a layer: which nodes compute x·Wᵀ or a convolution, whatever traced them.

    linear(x, W (o, i), b)     conv1d, conv2d, conv3d, convolution(x, W (o, i, *k), b, …)
    addmm(b, x, V (i, o))      mm(x, V), bmm(x, V), matmul(x, V)

V is a Wᵀ that was turned by t, permute or transpose, or a weight that is stored so (Conv1D).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from adaptsurgery.graph.walk import Scope

aten = torch.ops.aten
_TURNS = ("t", "numpy_T", "permute", "transpose")
_VIEWS = (
    "alias", "clone", "contiguous", "detach", "expand", "flatten", "reshape", "squeeze",
    "unflatten", "unsqueeze", "view", "_unsafe_view", "lift_fresh_copy",
)  # fmt: skip


@dataclass(frozen=True)
class Form:
    """A node that is a layer's product: its operands, and how the weight operand reads."""

    node: Node
    kind: str
    x: Node
    weight: Node
    bias: Node | None = None
    turned: bool = False  # the operand reads (i, o)
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bare: bool = False  # takes no bias: one is added apart

    @property
    def geometry(self) -> dict[str, Any]:
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}


def form_of(node: Node) -> Form | None:
    """The form that a node has; None where it is no linear map of one operand by another."""
    if node.op == "call_method":
        overload = _METHODS.get(str(node.target))
    else:
        overload = _OVERLOADS.get(node.target) if node.op == "call_function" else None
    if overload is None:
        return None
    arguments = _arguments(node, overload)
    form = _READERS[overload](node, arguments)
    if form is None or not (isinstance(form.x, Node) and isinstance(form.weight, Node)):
        return None
    return form


def op_name(node: Node) -> str:
    """The bare name of a node's operation: ``view`` for aten.view.default or a tensor's view."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name).partition("::")[2]
    return str(getattr(node.target, "__name__", node.target))


def is_view(node: Node) -> bool:
    """Whether a node moves numbers about at most, and mixes no channel with another."""
    return op_name(node) in _VIEWS


def weight_of(scope: Scope, form: Form) -> tuple[Node, bool, list[Node]]:
    """The node that the weight operand is a turn, a cast or a view of, whether it reads (i, o), and
    the way.

    The way stops at the first node that is a parameter or no such view of one.
    """
    node, turned, passed = form.weight, form.turned, []
    while node not in scope.names and node.op in ("call_function", "call_method"):
        before = node.args[0] if node.args else None
        if not isinstance(before, Node):
            break
        if _turns(node):
            turned = not turned
        elif not (is_cast(node) or (is_view(node) and _ends_alike(before, node))):
            break
        passed.append(node)
        node = before
    return node, turned, passed[::-1]


def is_cast(node: Node) -> bool:
    """Whether a node rounds floating numbers to another dtype, or back: what autocast does."""
    return op_name(node) in ("to", "_to_copy", "float", "half", "bfloat16", "double")


def shape_of(node: Node) -> tuple[Any, ...] | None:
    """The shape that the trace noted; None where it noted none, as a symbolic trace does."""
    value = node.meta.get("val", node.meta.get("example_value"))
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _turns(node: Node) -> bool:
    """Whether a node swaps the two dims of a matrix."""
    if op_name(node) not in _TURNS:
        return False
    shape, order = shape_of(node), node.args[1:]
    if shape is not None and len(shape) != 2:
        return False
    if op_name(node) == "permute":
        first = order[0] if order else None
        return [d % 2 for d in (first if isinstance(first, list | tuple) else order)] == [1, 0]  # type: ignore[operator]
    return not order or sorted(d % 2 for d in order) == [0, 1]  # type: ignore[operator]


def _ends_alike(before: Node, after: Node) -> bool:
    """Whether a node keeps the last two dims, as an expand of one matrix to a batch does."""
    left, right = shape_of(before), shape_of(after)
    return left is not None and right is not None and left[-2:] == right[-2:]


def _arguments(node: Node, overload: Any) -> dict[str, Any]:
    """A call's arguments by the names of the schema, trimmed defaults put back."""
    schema = overload._schema.arguments
    given = {a.name: value for a, value in zip(schema, node.args)}
    given.update(node.kwargs)
    return {a.name: a.default_value for a in schema if a.has_default_value()} | given


def _linear(node: Node, given: Mapping[str, Any]) -> Form | None:
    return Form(node, "linear", given["input"], given["weight"], given.get("bias"))


def _addmm(node: Node, given: Mapping[str, Any]) -> Form | None:
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1:
        return None
    return Form(node, "linear", given["mat1"], given["mat2"], given["self"], turned=True)


def _product(node: Node, given: Mapping[str, Any]) -> Form | None:
    left = given.get("self", given.get("input"))
    right = given.get("mat2", given.get("other"))
    return Form(node, "linear", left, right, turned=True, bare=True)


def _convolution(dims: int) -> Callable[[Node, Mapping[str, Any]], Form | None]:
    def read(node: Node, given: Mapping[str, Any]) -> Form | None:
        rank = dims or _kernel_dims(given)
        if rank is None or given.get("transposed", False):
            return None
        numbers = {n: _spread(given[n], rank) for n in ("stride", "padding", "dilation")}
        x, weight, bias = given["input"], given["weight"], given.get("bias")
        return Form(node, f"conv{rank}d", x, weight, bias, groups=given["groups"], **numbers)

    return read


def _kernel_dims(given: Mapping[str, Any]) -> int | None:
    shape = shape_of(given["weight"])
    rank = len(shape) - 2 if shape is not None else len(given["stride"])
    return rank if rank in (1, 2, 3) else None


def _spread(value: Any, dims: int) -> Any:
    """An option as one number a kernel dim; "same" and "valid" stay as they are."""
    if isinstance(value, str):
        return value
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * dims if len(numbers) == 1 else numbers


_READERS: dict[Any, Callable[[Node, Mapping[str, Any]], Form | None]] = {
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.matmul.default: _product,
    aten.conv1d.default: _convolution(1),
    aten.conv2d.default: _convolution(2),
    aten.conv3d.default: _convolution(3),
    aten.conv1d.padding: _convolution(1),
    aten.conv2d.padding: _convolution(2),
    aten.conv3d.padding: _convolution(3),
    aten.convolution.default: _convolution(0),
}
# What is called → the overload whose schema names its arguments: a symbolic trace calls torch's own.
_OVERLOADS: dict[Any, Any] = {
    **{overload: overload for overload in _READERS},
    torch.nn.functional.linear: aten.linear.default,
    torch.addmm: aten.addmm.default,
    torch.mm: aten.mm.default,
    torch.bmm: aten.bmm.default,
    torch.matmul: aten.matmul.default,
    operator.matmul: aten.matmul.default,
    torch.conv1d: aten.conv1d.default,
    torch.conv2d: aten.conv2d.default,
    torch.conv3d: aten.conv3d.default,
    torch.nn.functional.conv1d: aten.conv1d.default,
    torch.nn.functional.conv2d: aten.conv2d.default,
    torch.nn.functional.conv3d: aten.conv3d.default,
}
_METHODS: dict[str, Any] = {
    "addmm": aten.addmm.default,
    "bmm": aten.bmm.default,
    "matmul": aten.matmul.default,
    "mm": aten.mm.default,
}
