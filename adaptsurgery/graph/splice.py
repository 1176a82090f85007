"""An adapter at one call of a layer: the layer's own nodes stay, and read other values.

``Update.apply`` computes the layer with its forward; what it computes around that becomes nodes of
the adapter, and the forward itself is the call that stands in the graph, given another input, weight
or bias where the update has one. So nothing of the base is copied, and taking the adapter out is
giving the base its own values back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from adaptsurgery.core.config import AdapterConfig
from adaptsurgery.core.cost import ApplyForm
from adaptsurgery.core.exporting import exporting
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.update import Update, compose, parts_of
from adaptsurgery.graph.emit import Emitter, retarget
from adaptsurgery.graph.record import SHARED, Attached, Tag, mapped
from adaptsurgery.graph.sites import Call, Site
from adaptsurgery.graph.template import note
from adaptsurgery.graph.workspace import Workspace
from adaptsurgery_formats.errors import SurgeryError, ValueRefused

Bias = Tensor | None | EllipsisType


@dataclass
class Forward:
    """One time that an update asked for the layer's output, and the node that stands for it."""

    node: Node
    x: Tensor
    weight: Tensor | None
    bias: Bias
    out: Tensor


@dataclass(frozen=True, eq=False)
class Traced(Layer):
    """A layer that notes when it is computed with its own weight, or one made from it."""

    noted: Callable[[Tensor, Tensor | None, Bias], Tensor] | None = None
    derives: Callable[[Tensor], bool] | None = None

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Bias = ...) -> Tensor:
        assert self.noted is not None and self.derives is not None
        if weight is None or self.derives(weight):
            return self.noted(x, weight, bias)
        return super().forward(x, weight, bias)

    def plain(self, x: Tensor, weight: Tensor | None, bias: Bias) -> Tensor:
        return super().forward(x, weight, bias)


def stand_in(*values: Any) -> Any:
    """The target of a node whose place is still open. No graph that is given back has one."""
    raise AssertionError("a graph was left unfinished")


@dataclass
class Splicer:
    """Adapters of one site, put at each of its calls in one graph."""

    work: Workspace
    site: Site
    update: Update  # of all adapters, by the one law
    adapters: tuple[Attached, ...]
    form: ApplyForm
    tensors: Mapping[int, str]  # id of an adapter's tensor → its name
    configs: list[AdapterConfig | None]  # one for each part of the update
    path: tuple[str, ...] = ()
    emitter: Emitter = field(init=False)
    own: dict[str, Tensor] = field(default_factory=dict)  # the layer's tensors, by their nodes

    def __post_init__(self) -> None:
        self.module = self.work.module(self.path)
        self.nodes = self.work.nodes(self.path)
        self.has_values = self.work.has_values(self.path)
        self.emitter = Emitter(self.module.graph)
        self.faked = mapped(self.update, self._fake)

    def _fake(self, tensor: Tensor) -> Tensor:
        """An adapter's tensor without its numbers, known by its parameter's node."""
        name = self.tensors[id(tensor)]
        fake = self.work.fake.from_tensor(tensor.detach(), static_shapes=True)
        value = fake if self.has_values else None
        return self.emitter.bind(
            fake, lambda: self.work.node_of(name, self.path, value), constant=True
        )

    # --- one call --------------------------------------------------------------------------------

    def splice(self, call: Call, number: int) -> tuple[list[Node], dict[str, Node]]:
        """Put the adapters at ``call``, the ``number``-th of the site.

        Returns the nodes that were made, and those that stand in for the layer's own values.
        """
        emit = self.emitter
        group = [self.nodes[name] for name in call.nodes]
        module = self._called(group[0])
        emit.point = group[0]
        x, layer = self._bound(call, group, module)
        noted: list[Forward] = []
        traced = replace(layer, noted=self._noting(noted, call, layer, x), derives=emit.derives)
        gates, seen = [], []
        emit.made = []
        with ExitStack() as stack:
            for context in (exporting(), torch.enable_grad(), self.work.fake, emit):
                stack.enter_context(context)
            for config in self.configs:
                gates.append(config.gate(self.site.shape[0], layer.sample(x)) if config else None)
                seen.append(config.seen(x) if config else None)
            several = len(parts_of(self.faked)) > 1
            out = self.faked.apply(
                x, traced, self.form, gates if several else gates[0], seen if several else seen[0]
            )
        return self._settle(call, number, group, module, traced, noted, out)

    def _called(self, node: Node) -> nn.Module | None:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _bound(
        self, call: Call, group: list[Node], module: nn.Module | None
    ) -> tuple[Tensor, Traced]:
        """The call's input and layer as fake tensors that stand for nodes."""
        emit, weight, bias = self.emitter, None, None
        if module is not None:
            held: Any = module
            weight = self._of_module(group[0], "weight", held.weight)
            bias = None if held.bias is None else self._of_module(group[0], "bias", held.bias)
        else:
            weight = self._of_node(call.weight, weight=True)
            bias = self._of_node(call.bias) if call.bias else None
        layer = self.site.layer(weight, bias)
        settings = {f.name: getattr(layer, f.name) for f in fields(layer)}
        x_node = self._input(call)
        x = x_node.meta.get("val")
        x = self._new(x) if isinstance(x, Tensor) else self._guessed(weight)
        return emit.bind(x, x_node), Traced(**settings)

    def _input(self, call: Call) -> Node:
        """The node that the layer reads now: the adapted output of the layer before, where that is one."""
        return self.work.adapted.get((self.path, call.input)) or self.nodes[call.input]

    def _of_module(self, node: Node, slot: str, tensor: Tensor) -> Tensor:
        emit = self.emitter
        key = f"{node.target}.{slot}"
        if key not in self.own:
            self.own[key] = emit.bind(
                self.work.fake.from_tensor(tensor.detach(), static_shapes=True),
                lambda: emit.add("get_attr", key, (), {}),
                weight=slot == "weight",
                constant=True,
            )
        return self.own[key]

    def _of_node(self, name: str, weight: bool = False) -> Tensor:
        """A tensor for the node ``name``; a weight that no node shows has a shape alone."""
        if name not in self.own:
            self.own[name] = self._of_no_node() if not name else self._named(name, weight)
        return self.own[name]

    def _of_no_node(self) -> Tensor:
        """A weight that is known by its shape alone."""
        shape = self.site.shape[::-1] if self.site.transposed else self.site.shape
        with self.work.fake:
            fake = torch.empty(shape)
        self.emitter.mark_weight(fake)
        return fake

    def _named(self, name: str, weight: bool) -> Tensor:
        node = self.nodes[name]
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            fake = self._new(value)
        else:
            real = self.work.tensor(str(node.target)).detach()
            fake = self.work.fake.from_tensor(real, static_shapes=True)
        fixed = node.op in ("placeholder", "get_attr")
        return self.emitter.bind(fake, self._reachable(node), weight=weight, constant=fixed)

    def _reachable(self, node: Node) -> Node | Callable[[], Node]:
        """The node, or a get_attr of our own where it stands behind the place of the adapter."""
        point = self.emitter.point
        assert point is not None
        if node.op != "get_attr" or node < point:
            return node
        return lambda: self.emitter.add("get_attr", node.target, (), {})

    def _new(self, value: Tensor) -> Tensor:
        """A new fake tensor like ``value``, since each stands for one node only."""
        with self.work.fake, torch.no_grad():
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=value.device
            )

    def _guessed(self, weight: Tensor) -> Tensor:
        """An input for a graph that notes no shapes; no size of it reaches the graph."""
        i, *kernel = self.site.shape[1:]
        reach = [k * max(self.site.dilation or (1,)) + 7 for k in kernel]
        channels = i * self.site.groups
        shape = [3, channels, *reach] if kernel else [3, 5, channels]
        with self.work.fake:
            return torch.empty(shape, dtype=weight.dtype, device=weight.device)

    # --- the layer's own forward -----------------------------------------------------------------

    def _noting(
        self, noted: list[Forward], call: Call, layer: Traced, x: Tensor
    ) -> Callable[[Tensor, Tensor | None, Bias], Tensor]:
        value = self.nodes[call.output].meta.get("val")

        def note(given: Tensor, weight: Tensor | None, bias: Bias) -> Tensor:
            with torch._C.DisableTorchFunction():
                out = self._new(value) if isinstance(value, Tensor) else layer.plain(x, None, ...)
            emit = self.emitter
            held = [t for t in (given, weight, bias) if isinstance(t, Tensor)]
            args = [emit.node(t) for t in held if not self._is_own(t, layer)]
            node = emit.add("call_function", stand_in, tuple(args), {})
            node.meta["val"] = out
            node.meta["kept"] = True
            emit.bind(out, node)
            noted.append(Forward(node, given, weight, bias, out))
            return out

        return note

    def _is_own(self, tensor: Tensor, layer: Layer) -> bool:
        """Whether a tensor is the layer's own bias, or its own weight, turned or not."""
        emit = self.emitter
        if tensor is layer.weight or tensor is layer.bias:
            return True
        if not emit.has_node(tensor) or not emit.has_node(layer.weight):
            return not emit.has_node(tensor)
        if not emit.derives(tensor) or emit.node(tensor).target is not torch.ops.aten.t.default:
            return False
        return emit.node(tensor).args[0] is emit.node(layer.weight)

    def _settle(
        self,
        call: Call,
        number: int,
        group: list[Node],
        module: nn.Module | None,
        layer: Traced,
        noted: list[Forward],
        out: Tensor,
    ) -> tuple[list[Node], dict[str, Node]]:
        """Give the last forward to the base's own nodes, compute the others, and note it all."""
        emit = self.emitter
        for forward in noted[:-1]:
            self._computed(forward, layer)
        last = noted[-1]
        written = emit.made
        after = written[written.index(last.node) + 1 :]
        values = self._values(last, layer)
        functional = module is not None and bool(values.keys() - {"x"})
        if functional:
            self._computed(last, layer)
            roles = {"out": emit.node(out)}
            own_output = group[0]
        else:
            own_output = self.nodes[call.output]
            roles = self._given(call, group, last, layer, values)
            for node in after[::-1]:
                own_output.append(node)
            last.node.replace_all_uses_with(own_output)
            end = own_output if out is last.out else emit.node(out)
            end = self._with_new_bias(values, layer, end, own_output, out)
            if end is not own_output:
                roles["out"] = end
        ends = list(roles.values())
        if "out" in roles:
            self.work.adapted[self.path, own_output.name] = roles["out"]
            ours = set(emit.made)
            for user in list(own_output.users):
                if user not in ours:
                    user.replace_input_with(own_output, roles["out"])
        made = emit.made
        self._note(number, own_output, roles, group[0] if functional else None, ends)
        return made, roles

    def _computed(self, forward: Forward, layer: Traced) -> None:
        """Write a forward down as an operation of the adapter's own."""
        emit = self.emitter
        made, emit.made = emit.made, []
        emit.point = forward.node
        with exporting(), self.work.fake, emit:
            out = layer.plain(forward.x, forward.weight, forward.bias)
        forward.node.replace_all_uses_with(emit.node(out))
        emit.bind(forward.out, emit.node(out))
        at = made.index(forward.node)
        made[at : at + 1] = emit.made
        emit.made = made
        self.module.graph.erase_node(forward.node)

    def _values(self, forward: Forward, layer: Layer) -> dict[str, Tensor | None]:
        """The values that the base's forward reads instead of its own."""
        values: dict[str, Tensor | None] = {"x": forward.x}
        if forward.weight is not None and not self._is_own(forward.weight, layer):
            values["weight"] = forward.weight
        if not isinstance(forward.bias, EllipsisType) and forward.bias is not layer.bias:
            values["bias"] = forward.bias
        return values

    def _given(
        self,
        call: Call,
        group: list[Node],
        forward: Forward,
        layer: Traced,
        values: dict[str, Tensor | None],
    ) -> dict[str, Node]:
        """Make the base's nodes read ``values``, and return the nodes of these by role."""
        emit, roles = self.emitter, {}
        emit.point = forward.node
        x, own = emit.node(forward.x), self._input(call)
        if x is not own:
            roles["x"] = x
            retarget(group, own, x)
        new = {"weight": values.get("weight")}
        if layer.bias is not None and "bias" in values:
            new["bias"] = values["bias"]
        for role, tensor in new.items():
            if role == "weight" and tensor is None:
                continue
            with self.work.fake, emit:
                if role == "weight":
                    assert tensor is not None
                    tensor = layer.stored(tensor)
                elif tensor is None:
                    assert layer.bias is not None
                    tensor = torch.zeros_like(layer.bias)
            name = getattr(call, role)
            if not name:
                raise _not_shown(self.site, role)
            roles[role] = emit.node(tensor)
            retarget(group, self.nodes[name], roles[role])
        return roles

    def _with_new_bias(
        self,
        values: dict[str, Tensor | None],
        layer: Layer,
        end: Node,
        own_output: Node,
        out: Tensor,
    ) -> Node:
        """A bias that the layer has no place for is added to its output."""
        bias = values.get("bias")
        if bias is None or layer.bias is not None:
            return end
        emit = self.emitter
        shape_of = self._new(out)
        emit.bind(shape_of, own_output)
        emit.point = own_output.next
        with self.work.fake, emit:
            total = shape_of + layer.over_channels(bias)
        node = emit.node(total)
        for user in list(own_output.users):
            if user is not node and user in set(emit.made):
                user.replace_input_with(own_output, node)
        return node if end is own_output else end

    # --- notes -----------------------------------------------------------------------------------

    def _note(
        self,
        number: int,
        base: Node,
        roles: dict[str, Node],
        replaced: Node | None,
        ends: Iterable[Node],
    ) -> None:
        """Give every new node its tag and metadata; erase those that nothing uses."""
        emit = self.emitter
        for forward in [n for n in emit.made if n.target is stand_in]:
            emit.made.remove(forward)
            self.module.graph.erase_node(forward)
        role_of = {node: role for role, node in roles.items()}
        kept = set(ends)
        constant = emit.constant_nodes()
        made = emit.made
        for node in reversed(made):
            if not node.users and node not in kept:
                self.module.graph.erase_node(node)
        for node in made:
            if node._erased:
                continue
            value = node.meta.pop("val", None)
            if self.has_values and value is None and node.op == "get_attr":
                value = self._value_of(node)
            shared = node in constant and node not in role_of
            tag = Tag(self.site.path, SHARED if shared else number, role_of.get(node, ""))
            if node in role_of:
                tag = replace(tag, adapters=self.adapters)
            if replaced is not None and role_of.get(node) == "out":
                tag = replace(tag, module=str(replaced.target), node=replaced.name)
            note(node, base, tag.text)
            if self.has_values and value is not None:
                node.meta["val"] = value
        if replaced is not None:
            self.module.graph.erase_node(replaced)
        emit.made = []
        emit.forget_erased()

    def _value_of(self, node: Node) -> Any:
        return next(
            (
                n.meta["val"]
                for n in self.nodes.values()
                if n.target == node.target and "val" in n.meta
            ),
            None,
        )


def _not_shown(site: Site, what: str) -> SurgeryError:
    return ValueRefused(
        f"`{site.path}`: the adapter needs the layer's {what}, which the graph does not show",
        next="mode factored; no DoRA and no bias",
        code="weight-not-shown",
    )


def joined(adapters: Iterable[Attached], updates: Iterable[Update]) -> tuple[Update, list[Any]]:
    """All adapters of a site as one update by the law, and the config of each of its parts."""
    config_of: dict[int, Any] = {}
    updates = list(updates)
    for attached, update in zip(adapters, updates):
        for part in parts_of(update):
            config_of[id(part)] = attached.config
    whole = compose(updates)
    return whole, [config_of[id(part)] for part in parts_of(whole)]
