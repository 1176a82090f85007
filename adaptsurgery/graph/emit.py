"""Eager code as graph nodes: what an Update computes on fake tensors is written down as it runs.

There is no second copy of a formula: ``update.apply`` itself runs, on tensors that have the graph's
shapes and no numbers, and every operation becomes one node, an aten overload. Composite operations
(linear, flatten, unflatten) stay whole, so that no size is written down and open sizes stay open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode

from adaptsurgery.graph.walk import flat
from adaptsurgery_formats.errors import LayoutError, ValueRefused, printable

Maker = Callable[[], Node]
# Python's names of what aten calls otherwise.
_ALIASES = {
    "__rsub__": "rsub",
    "__rmul__": "mul",
    "__radd__": "add",
    "true_divide": "div",
    "__eq__": "eq",
    "__ne__": "ne",
    "__floordiv__": "floor_divide",
}
_SIZES = ("view", "reshape", "permute", "expand")  # their sizes may come one by one


class Emitter(TorchFunctionMode):
    """Runs tensor code and writes each operation into ``graph``, before the node ``point``.

    ``bind`` gives a tensor its node, or a function that makes the node when it is first needed.
    What is computed from ``constant`` tensors alone is written once and used again.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.point: Node | None = None
        self.made: list[Node] = []  # in the order of making
        self._nodes: dict[int, Node | Maker] = {}
        self._makers: dict[int, Maker] = {}
        self._held: list[Tensor] = []  # so that no id is used twice
        self._derived: set[int] = set()
        self._constant: set[int] = set()
        self._once: dict[object, Tensor] = {}

    def bind(
        self, tensor: Tensor, node: Node | Maker, *, weight: bool = False, constant: bool = False
    ) -> Tensor:
        """Make ``tensor`` stand for a node. ``derives`` is true of what comes of a ``weight``."""
        self._nodes[id(tensor)] = node
        self._held.append(tensor)
        if weight:
            self.mark_weight(tensor)
        if constant:
            self._constant.add(id(tensor))
        return tensor

    def mark_weight(self, tensor: Tensor) -> None:
        """Make ``derives`` true of all that is computed from a tensor, bound to a node or not."""
        self._derived.add(id(tensor))
        self._held.append(tensor)

    def has_node(self, tensor: Tensor) -> bool:
        """Whether a tensor stands for a node."""
        return id(tensor) in self._nodes

    def node(self, tensor: Tensor) -> Node:
        """The node that a tensor stands for."""
        entry = self._nodes.get(id(tensor))
        if entry is None:
            raise ValueRefused(
                "a tensor is needed that the graph does not show",
                next="an adapter that needs no weight (no DoRA, no bias, mode factored)",
                code="weight-not-shown",
            )
        if not isinstance(entry, Node):
            self._makers[id(tensor)] = entry
            entry = self._nodes[id(tensor)] = entry()
        return entry

    def constant_nodes(self) -> set[Node]:
        """The nodes that hold for every call."""
        pairs = ((key, node) for key, node in self._nodes.items() if key in self._constant)
        return {node for _, node in pairs if isinstance(node, Node)}

    def forget_erased(self) -> None:
        """Tensors whose nodes were erased are computed anew when they are needed again."""
        gone = {k for k, n in self._nodes.items() if isinstance(n, Node) and n._erased}
        self._once = {k: t for k, t in self._once.items() if id(t) not in gone}
        for key in gone:
            self._nodes.pop(key)
            if key in self._makers:
                self._nodes[key] = self._makers[key]

    def derives(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from one that was bound as a weight, or is one."""
        return id(tensor) in self._derived

    def add(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        """A new node before ``point``."""
        assert self.point is not None
        with self.graph.inserting_before(self.point):
            node = self.graph.create_node(op, target, args, kwargs)
        self.made.append(node)
        return node

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__" or not name:  # shape, dtype, device
            return func(*args, **kwargs)
        if name == "__getitem__":
            return self._index(args[0], args[1])
        return self._run(func, name, args, kwargs)

    def _run(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], **more: Any
    ) -> Any:
        inputs = [leaf for leaf in flat([*args, *kwargs.values()]) if isinstance(leaf, Tensor)]
        constant = all(id(t) in self._constant for t in inputs)
        key = _key(name, args, kwargs) if constant else None
        if key is not None and key in self._once:
            return self._once[key]
        result = (
            self._faked(_linear, inputs, {})
            if name == "linear"
            else self._faked(func, args, kwargs)
        )
        if not isinstance(result, Tensor) or any(result is t for t in inputs):
            return result
        self._write(name, args, kwargs, result)
        if any(id(t) in self._derived for t in inputs):
            self._derived.add(id(result))
        if constant:
            self._constant.add(id(result))
            if key is not None:
                self._once[key] = result
        return result

    def _faked(self, func: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> Any:
        """What an operation gives on tensors without numbers; LayoutError where torch cannot tell."""
        try:
            return func(*args, **kwargs)
        except (AssertionError, RuntimeError) as error:
            raise LayoutError(
                "torch cannot tell a shape in the changed program",
                where=self.point.name if self.point is not None else "",
                seen=printable(f"{type(error).__name__}: {error}")[:200],
                next="export the program anew: its symbols and their ranges contradict each other",
                code="bad-shapes",
            ) from error

    def _write(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
    ) -> None:
        name = _ALIASES.get(name, name)
        if name == "to" and result.device == args[0].device:
            args, kwargs = (args[0], result.dtype), {}
        elif name == "dropout":
            args, kwargs = (args[0], args[1] if len(args) > 1 else kwargs["p"], True), {}
        elif name == "einsum":
            args = (args[0], list(args[1:]))
        elif name in _SIZES and isinstance(args[1], int):
            args = (args[0], list(args[1:]))
        target = overload(name, args, kwargs)
        given: Any = torch.fx.node.map_aggregate((args, kwargs), self._as_argument)
        node = self.add("call_function", target, tuple(given[0]), dict(given[1]))
        node.meta["val"] = result
        self.bind(result, node)

    def _as_argument(self, value: Any) -> Any:
        return self.node(value) if isinstance(value, Tensor) else value

    def _index(self, tensor: Tensor, index: Any) -> Tensor:
        """tensor[index] as unsqueeze, select and slice."""
        items = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in items:
            at = items.index(Ellipsis)
            taken = sum(item is not None for item in items) - 1
            items[at : at + 1] = [slice(None)] * (tensor.dim() - taken)
        axis = 0
        with self:
            for item in items:
                if item is None:
                    tensor = tensor.unsqueeze(axis)
                elif isinstance(item, int):
                    tensor = tensor.select(axis, item)
                    axis -= 1
                elif item != slice(None):
                    tensor = self._sliced(tensor, axis, item)
                axis += 1
        return tensor

    def _sliced(self, tensor: Tensor, axis: int, part: slice) -> Tensor:
        size = tensor.shape[axis]
        start, stop, step = part.indices(size) if isinstance(size, int) else (0, 0, 1)
        if not isinstance(size, int) or step != 1:
            raise ValueRefused(f"a slice {part} of a size that is left open", code="specialised")
        view: Tensor = tensor.narrow(axis, start, stop - start)
        return view


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The result of F.linear, without the views of open sizes that its own shape function goes through."""
    if x.dim() < 3 or x.dtype != weight.dtype or x.shape[-1] != weight.shape[1]:
        return torch.nn.functional.linear(x, weight, bias)  # which tells what is wrong
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def overload(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The aten overload that a call of ``name`` with these arguments means."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        raise NotImplementedError(f"no operation of aten is called `{name}`")
    resolved = torch._C._jit_resolve_packet(f"aten::{name}", *args, **kwargs)
    return getattr(packet, resolved)


def retarget(nodes: Iterable[Node], old: Node, new: Node) -> None:
    """Make ``nodes`` read ``new`` where they read ``old``."""
    if old is not new:
        for node in nodes:
            node.replace_input_with(old, new)


def _key(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """The key that two equal calls share; None where an argument cannot be compared."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return "tensor", id(value)
        if isinstance(value, tuple | list):
            return tuple(of(v) for v in value)
        return type(value), value

    key = (name, of(args), tuple((k, of(v)) for k, v in sorted(kwargs.items())))
    try:
        hash(key)
    except TypeError:
        return None
    return key
