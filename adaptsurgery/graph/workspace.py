"""A copy of a graph to work on: its tensors shared, parameters added and taken away, given back whole.

Nothing reaches the source: what fails half-way leaves a copy behind that nobody holds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from adaptsurgery.graph.walk import Graph, check_graph, flat


class Workspace:
    """The copy. ``finish`` gives it back as the kind of graph that came in."""

    def __init__(self, source: Graph) -> None:
        check_graph(source)
        self.source = source
        self.is_program = isinstance(source, ExportedProgram)
        self.top = _copied(source.graph_module if isinstance(source, ExportedProgram) else source)
        self.state: dict[str, Tensor] = (
            dict(source.state_dict) if isinstance(source, ExportedProgram) else {}
        )
        self._added: dict[str, str] = {}  # placeholder → name in the state
        self._threaded: dict[tuple[tuple[str, ...], str], Node] = {}
        self.fake = _fake_mode(self.top)
        # Where a layer's output has become an adapter's: graph and old node → the node to read.
        self.adapted: dict[tuple[tuple[str, ...], str], Node] = {}
        self._named: dict[tuple[str, ...], dict[str, Node]] = {}
        self._with_values: dict[tuple[str, ...], bool] = {}
        self._first: Node | None = None

    # --- graphs ----------------------------------------------------------------------------------

    def module(self, path: tuple[str, ...] = ()) -> GraphModule:
        """The graph module at a path of get_attr targets."""
        module: Any = self.top
        for step in path:
            module = module.get_submodule(step)
        assert isinstance(module, GraphModule)
        return module

    def modules(self) -> Iterator[tuple[tuple[str, ...], GraphModule]]:
        """Every graph once, the outermost first."""
        seen: set[int] = set()
        waiting: list[tuple[tuple[str, ...], GraphModule]] = [((), self.top)]
        while waiting:
            path, module = waiting.pop(0)
            if id(module) in seen:
                continue
            seen.add(id(module))
            yield path, module
            for node in module.graph.nodes:
                if node.op in ("get_attr", "call_module"):
                    held = _attribute(module, node)
                    if isinstance(held, GraphModule):
                        waiting.append(((*path, str(node.target)), held))

    def nodes(self, path: tuple[str, ...]) -> dict[str, Node]:
        """The nodes of the graph at ``path`` by name, as they were when first asked for."""
        if path not in self._named:
            self._named[path] = {node.name: node for node in self.module(path).graph.nodes}
        return self._named[path]

    def has_values(self, path: tuple[str, ...]) -> bool:
        """Whether the graph at ``path`` notes what its nodes give."""
        if path not in self._with_values:
            nodes = self.module(path).graph.nodes
            self._with_values[path] = any("val" in node.meta for node in nodes)
        return self._with_values[path]

    def callers(self, path: tuple[str, ...]) -> list[Node]:
        """The higher-order nodes that call the graph at ``path``."""
        module, outer = self.module(path), self.module(path[:-1])
        callers = []
        for node in outer.graph.nodes:
            if node.op == "get_attr" and _attribute(outer, node) is module:
                callers += [user for user in node.users if user.op == "call_function"]
        return list(dict.fromkeys(callers))

    # --- tensors ---------------------------------------------------------------------------------

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer by its name."""
        if self.is_program:
            assert isinstance(self.source, ExportedProgram)
            held: Any = self.state[name] if name in self.state else self.source.constants[name]
        else:
            held = _attribute_named(self.top, name)
        assert isinstance(held, Tensor)
        return held

    def has(self, name: str) -> bool:
        if self.is_program:
            assert isinstance(self.source, ExportedProgram)
            return name in self.state or name in self.source.constants
        return _attribute_named(self.top, name) is not None

    def set_tensor(self, name: str, tensor: Tensor) -> None:
        """Put a tensor under a name; a parameter stays the object that it is."""
        value = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
        if self.is_program:
            self.state[name] = value
            return
        *way, last = name.split(".")
        holder: nn.Module = self.top
        for step in way:
            if getattr(holder, step, None) is None:
                holder.add_module(step, nn.Module())
            holder = getattr(holder, step)
        holder._parameters.pop(last, None)
        holder._buffers.pop(last, None)
        holder.register_parameter(last, value)

    def drop_tensor(self, name: str) -> None:
        """Take a tensor away, and the modules that held nothing else."""
        if self.is_program:
            self.state.pop(name, None)
            return
        way = name.split(".")
        holders: list[nn.Module] = [self.top]
        for step in way[:-1]:
            holders.append(getattr(holders[-1], step))
        holders[-1]._parameters.pop(way[-1], None)
        for depth in range(len(holders) - 1, 0, -1):
            bare = type(holders[depth]) is nn.Module
            if bare and not holders[depth]._parameters and not holders[depth]._modules:
                if not holders[depth]._buffers:
                    delattr(holders[depth - 1], way[depth - 1])

    # --- nodes of tensors ------------------------------------------------------------------------

    def is_led(self, key: tuple[tuple[str, ...], str]) -> bool:
        """Whether a parameter has a node in a graph already, by path and name."""
        return key in self._threaded

    def node_of(self, name: str, path: tuple[str, ...], value: Tensor | None) -> Node:
        """The node of the parameter ``name`` in the graph at ``path``, led in through every call."""
        key = (path, name)
        if key not in self._threaded:
            made = self._led_in(name, path, value) if path else self._top_node(name, value)
            self._threaded[key] = made
        return self._threaded[key]

    def _top_node(self, name: str, value: Tensor | None) -> Node:
        graph = self.top.graph
        if self.is_program:
            before = self._first = self._first or self._first_input()
        else:
            before = self._first_operation()
        with graph.inserting_before(before):
            if self.is_program:
                node = graph.placeholder("p_" + name.replace(".", "_"))
                self._added[node.name] = name
            else:
                node = graph.create_node("get_attr", name, name=name.replace(".", "_"))
        if value is not None:
            node.meta["val"] = value
        return node

    def _led_in(self, name: str, path: tuple[str, ...], value: Tensor | None) -> Node:
        """Add the parameter to the operands of every call of the graph, and so to every branch."""
        outer = self.node_of(name, path[:-1], value)
        for caller in self.callers(path):
            append_operand(caller, outer)
            for step, module in self.branches(path[:-1], caller):
                beside = (*path[:-1], step)
                if (beside, name) not in self._threaded:
                    self._threaded[beside, name] = _add_placeholder(module, name, value)
        return self._threaded[path, name]

    def branches(self, path: tuple[str, ...], caller: Node) -> list[tuple[str, GraphModule]]:
        """The graphs that a higher-order node of the graph at ``path`` calls, by name."""
        outer = self.module(path)
        branches = []
        for leaf in flat([caller.args, caller.kwargs]):
            if isinstance(leaf, Node) and leaf.op == "get_attr":
                held = _attribute(outer, leaf)
                if isinstance(held, GraphModule):
                    branches.append((str(leaf.target), held))
        return branches

    def _first_input(self) -> Node:
        """Where a parameter goes: before the first placeholder that is neither token nor parameter."""
        assert isinstance(self.source, ExportedProgram)
        ahead = {
            spec.arg.name
            for spec in self.source.graph_signature.input_specs
            if spec.kind in (InputKind.TOKEN, InputKind.PARAMETER) and hasattr(spec.arg, "name")
        }
        node: Node
        for node in self.top.graph.nodes:
            if node.op != "placeholder" or (
                node.name not in ahead and node.name not in self._added
            ):
                return node
        raise AssertionError("a graph has an output")

    def _first_operation(self) -> Node:
        node: Node
        for node in self.top.graph.nodes:
            if node.op not in ("placeholder", "get_attr"):
                return node
        raise AssertionError("a graph has an output")

    # --- the end ---------------------------------------------------------------------------------

    def finish(self) -> Graph:
        """The copy as a graph of the source's kind, checked."""
        for path, module in self.modules():
            module.graph.lint()
            if path or not self.is_program:  # a program compiles its own outermost graph
                module.recompile()
        if not isinstance(self.source, ExportedProgram):
            return self.top
        source = self.source
        signature = copy.deepcopy(source.graph_signature)
        signature.input_specs = self._input_specs(signature.input_specs)
        renamed = self._renamed_outputs()
        for spec in signature.output_specs:
            _rename(spec.arg, renamed)
        calls = copy.deepcopy(source.module_call_graph)
        for entry in calls:
            for argument in entry.signature.outputs if entry.signature else ():
                _rename(argument, renamed)
        return ExportedProgram(
            root=self.top,
            graph=self.top.graph,
            graph_signature=signature,
            state_dict=self.state,
            range_constraints=copy.copy(source.range_constraints),
            module_call_graph=calls,
            example_inputs=source.example_inputs,
            constants=source.constants,
            verifiers=source.verifiers,
        )

    def _input_specs(self, old: list[InputSpec]) -> list[InputSpec]:
        """One spec a placeholder, in the graph's order; a parameter that was dropped has none."""
        known = {getattr(spec.arg, "name", ""): spec for spec in old}
        specs = []
        for node in self.top.graph.nodes:
            if node.op == "placeholder" and node.name in self._added:
                argument = TensorArgument(name=node.name)
                name = self._added[node.name]
                specs.append(InputSpec(InputKind.PARAMETER, argument, target=name))
            elif node.op == "placeholder":
                specs.append(known[node.name])
        return specs

    def _renamed_outputs(self) -> dict[str, str]:
        """The names that the output has now, by those that it had before."""
        assert isinstance(self.source, ExportedProgram)
        before, after = self.source.graph.output_node(), self.top.graph.output_node()
        pairs = zip(flat(before.args), flat(after.args))
        return {a.name: b.name for a, b in pairs if isinstance(a, Node) and isinstance(b, Node)}


def append_operand(caller: Node, operand: Node) -> None:
    """Give a higher-order node one more operand, at the end."""
    *rest, last = caller.args
    if isinstance(last, tuple | list):
        caller.args = (*rest, type(last)([*last, operand]))
    else:
        caller.args = (*caller.args, operand)


def remove_operand(caller: Node, operand: Node) -> int:
    """Take an operand out and return its place, counted from the end (-1 is the last)."""
    *rest, last = caller.args
    if isinstance(last, tuple | list):
        place = list(last).index(operand)
        caller.args = (*rest, type(last)(o for n, o in enumerate(last) if n != place))
        return place - len(last)
    place = list(caller.args).index(operand)
    count = len(caller.args)
    caller.args = tuple(o for n, o in enumerate(caller.args) if n != place)
    return place - count


def _add_placeholder(module: GraphModule, name: str, value: Tensor | None) -> Node:
    last = [node for node in module.graph.nodes if node.op == "placeholder"][-1:]
    first = next(iter(module.graph.nodes))
    where = module.graph.inserting_after(last[0]) if last else module.graph.inserting_before(first)
    with where:
        node = module.graph.placeholder("p_" + name.replace(".", "_"))
    if value is not None:
        node.meta["val"] = value
    return node


def _rename(argument: Any, renamed: dict[str, str]) -> None:
    if getattr(argument, "name", None) in renamed:
        argument.name = renamed[argument.name]


def _copied(module: GraphModule) -> GraphModule:
    """A copy whose tensors are the source's own, and whose hooks are kept."""
    memo: dict[int, Any] = {}
    for holder in module.modules():
        memo |= {id(t): t for t in (*holder._parameters.values(), *holder._buffers.values())}
        memo |= {id(v): v for v in vars(holder).values() if isinstance(v, Tensor)}
        if isinstance(holder, GraphModule):
            for node in holder.graph.nodes:
                memo |= {id(v): v for v in flat(list(node.meta.values())) if isinstance(v, Tensor)}
    memo.pop(id(None), None)
    out = copy.deepcopy(module, memo)
    for hooks in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks"):
        getattr(out, hooks).update(getattr(module, hooks))
    for name, value in vars(module).items():  # what a GraphModule's constructor leaves behind
        vars(out).setdefault(name, value)
    out.training = module.training
    for ours, theirs in zip(out.modules(), module.modules()):
        if isinstance(ours, GraphModule) and isinstance(theirs, GraphModule):
            _named_alike(ours, theirs)
    return out


def _named_alike(ours: GraphModule, theirs: GraphModule) -> None:
    """torch's copy renames a node whose name Python has for something else ("input")."""
    for node, other in zip(ours.graph.nodes, theirs.graph.nodes):
        if node.name != other.name:
            node.name = other.name
            ours.graph._graph_namespace.create_name(other.name, None)


def _fake_mode(module: GraphModule) -> FakeTensorMode:
    """The mode of the graph's own fake tensors, or a new one where it has none."""
    for node in module.graph.nodes:
        for value in flat(node.meta.get("val")):
            if isinstance(value, FakeTensor):
                return value.fake_mode
    return FakeTensorMode(shape_env=ShapeEnv())


def _attribute(module: nn.Module, node: Node) -> Any:
    return _attribute_named(module, str(node.target))


def _attribute_named(module: Any, name: str) -> Any:
    for step in name.split("."):
        module = getattr(module, step, None)
    return module
