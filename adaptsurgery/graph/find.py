"""``find_sites``: every Linear, Conv1D and convolution of a graph, by its nodes, then by its module.

A product with a parameter is a layer wherever it stands. Where the weight is computed (int8,
weight_norm), or no such node is there at all, the boundary of the module tells input and output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from adaptsurgery.core.geometry import Layer
from adaptsurgery.graph.boundary import Boundary, boundary, is_floating
from adaptsurgery.graph.forms import Form, form_of, is_cast, op_name, shape_of, weight_of
from adaptsurgery.graph.naming import GraphNames, is_layer_type, is_linear_type, module_of
from adaptsurgery.graph.sites import Call, Site
from adaptsurgery.graph.walk import Graph, Scope, View, is_ours, owners
from adaptsurgery_formats.errors import ValueRefused

FUSED = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention")
FAST_PATH = "trace it after torch.backends.mha.set_fastpath_enabled(False)"
_FORMLESS = ("grouped_mm", "einsum", "baddbmm")
_THREADED = (
    "wrap_with_set_grad_enabled",
    "wrap_with_autocast",
    "cond",
    "tag_activation_checkpoint",
)


@dataclass(frozen=True)
class _LayerCall:
    """One call of a layer, before calls are put together to sites."""

    site: Site
    place: tuple[int, ...]
    identity: str = ""
    keys: frozenset[str] = field(default_factory=frozenset)


def find_sites(g: Graph, view: View | None = None) -> list[Site]:
    """The layers of ``g`` (an ExportedProgram, its .module(), a symbolic trace), in order of calls.

    A layer that no adapter can be put on is listed too, and its ``reason`` says why. ``view`` may
    be a View of ``g`` that was made before. Raises ValueRefused for what is no graph.
    """
    return _Finder(view or View(g)).sites()


class _Finder:
    def __init__(self, view: View) -> None:
        self.view = view
        self.names = GraphNames(view)
        self.twice = _repeated([scope.path for scope in view.scopes])
        self.read = {name for s in view.scopes for node, name in s.names.items() if node.users}

    def sites(self) -> list[Site]:
        forms = list(self._forms())
        calls = list(self._by_nodes(forms))
        calls += self._by_module({key for f in calls for key in f.keys})
        calls.sort(key=lambda f: f.place)
        sites = _together(calls, self.view, self.names)
        return _with_shares(_told_apart(sites), self.view, self.names)

    def _forms(self) -> Iterator[tuple[Scope, int, Form]]:
        for scope in self.view.scopes:
            for position, node in enumerate(scope.nodes):
                form = None if is_ours(node) else form_of(node)
                if form is not None:
                    yield scope, position, form

    def _by_nodes(self, forms: list[tuple[Scope, int, Form]]) -> Iterator[_LayerCall]:
        computed = []
        for scope, position, form in forms:
            base, turned, passed = weight_of(scope, form)
            if self._is_weight(scope, base, form):
                yield self._direct(scope, position, form, base, turned, passed)
            elif base in scope.fixed and self._roots(scope, base):
                computed.append((scope, position, form, base, turned))
        innermost = [_innermost(form.node) for _, _, form, _, _ in computed]
        for n, (scope, position, form, base, turned) in enumerate(computed):
            alone = innermost.count(innermost[n]) == 1
            yield self._computed(scope, position, form, base, turned, alone)
        for scope in self.view.scopes:
            for position, node in enumerate(scope.nodes):
                yield from self._whole(scope, position, node)
                yield from self._formless(scope, position, node)

    def _is_weight(self, scope: Scope, base: Node, form: Form) -> bool:
        """Whether a node is a parameter or buffer of as many dims as the kind's weight has."""
        if base not in scope.names:
            return False
        tensor = self.view.tensors[scope.names[base]]
        return tensor.dim() == _dims(form) and is_floating(tensor)

    def _direct(
        self,
        scope: Scope,
        position: int,
        form: Form,
        base: Node,
        turned: bool,
        passed: list[Node],
    ) -> _LayerCall:
        weight = scope.names[base]
        path = self.names.path(form.node, weight)
        shape = tuple(self.view.tensors[weight].shape)
        cast = passed[:1] if passed and is_cast(passed[0]) else []
        given = cast[0] if cast else base
        site = Site(
            path,
            form.kind,
            shape[::-1] if turned else shape,
            (_call(scope, form, given, [*passed[len(cast) :], form.node]),),
            weight=weight,
            bias=self._bias_of(scope, form, path, weight),
            transposed=turned,
            type=self.names.type(path),
            reason=self._unreachable(scope),
            **form.geometry,
        )
        return _LayerCall(
            site, (*scope.place, position), _identity(form.node, path), _keys(form.node)
        )

    def _computed(
        self, scope: Scope, position: int, form: Form, base: Node, turned: bool, alone: bool
    ) -> _LayerCall:
        """A product whose weight is made of parameters on the way."""
        root = self._roots(scope, base)[0]
        stack = owners(form.node)
        path = stack[-1].path if stack else module_of(root)
        shape = shape_of(base) or ()
        call, reason = _call(scope, form, base, [form.node]), self._unreachable(scope)
        if not reason and not shape:
            reason = f"its weight is computed from `{root}`, and the trace notes no shape of it"
        elif not reason and len(shape) != _dims(form):
            reason = _stacked(root, shape)
        elif not reason and not (stack and alone):
            reason = f"its weight is a part of `{root}`, or computed from it"
        elif not reason:
            around = boundary(scope, stack[-1].key)
            reason = around.trouble
            if not reason and not around.is_just(form, scope):
                call = _around(scope, around)
        site = Site(
            path,
            form.kind,
            shape[::-1] if turned else shape,
            (call,),
            bias=_bias_name(scope, form) or self._bias(f"{path}.weight"),
            transposed=turned and bool(call.weight),
            type=self.names.type(path),
            reason=reason,
            **form.geometry,
        )
        return _LayerCall(
            site, (*scope.place, position), _identity(form.node, path), _keys(form.node)
        )

    def _whole(self, scope: Scope, position: int, node: Node) -> Iterator[_LayerCall]:
        """The layers in one node: a module that the trace left whole, or a fused encoder layer."""
        place = (*scope.place, position)
        if node.op == "call_module":
            target = str(node.target)
            module = scope.module.get_submodule(target)
            if not isinstance(module, GraphModule):
                for site in _of_module(scope, node, target, module, self._unreachable(scope)):
                    yield _LayerCall(site, place, str(id(module)))
        elif op_name(node) in FUSED:
            reason = f"fused into `{op_name(node)}` (node `{node.name}`): {FAST_PATH}"
            for weight in dict.fromkeys(scope.names.get(n, "") for n in node.all_input_nodes):
                if weight and self.view.tensors[weight].dim() == 2:
                    shape = tuple(self.view.tensors[weight].shape)
                    call = Call(node.name, node.name, (node.name,), "", "", scope.path, scope.hops)
                    path = module_of(weight)
                    yield _LayerCall(
                        Site(path, "linear", shape, (call,), weight=weight, reason=reason), place
                    )

    def _formless(self, scope: Scope, position: int, node: Node) -> Iterator[_LayerCall]:
        """A product with a parameter that has no form of a layer: by groups of rows, an einsum."""
        if is_ours(node) or not any(part in op_name(node) for part in _FORMLESS):
            return
        for given in node.all_input_nodes:
            for root in self._roots(scope, given)[:1] if given in scope.fixed else []:
                shape = tuple(self.view.tensors[root].shape)
                stack = owners(node)
                path = stack[-1].path if stack else module_of(root)
                into = node.all_input_nodes[0].name
                call = Call(into, node.name, (node.name,), "", "", scope.path, scope.hops)
                reason = _stacked(root, shape)
                if len(shape) == 2:
                    reason = f"`{root}` goes into `{op_name(node)}`, which is no linear's form"
                kind = self.names.type(path)
                site = Site(path, "linear", shape, (call,), weight=root, type=kind, reason=reason)
                yield _LayerCall(site, (*scope.place, position), "", _keys(node))

    def _by_module(self, done: set[str]) -> Iterator[_LayerCall]:
        """Modules that are layers by their class, and in which no product was found."""
        for scope in self.view.scopes:
            seen = set(done)
            for position, node in enumerate(scope.nodes):
                for owner in [] if is_ours(node) else owners(node):
                    if owner.key not in seen and is_layer_type(owner.type):
                        if node.op != "call_module":
                            yield from self._bounded(scope, position, owner.key, owner.path)
                        seen.add(owner.key)

    def _bounded(self, scope: Scope, position: int, key: str, path: str) -> Iterator[_LayerCall]:
        around = boundary(scope, key)
        kind = self.names.type(path)
        if not around.outputs or not any(n in scope.names for n in _given(around)):
            return
        reason = self._unreachable(scope) or around.trouble
        sizes = None if around.trouble else around.sizes()
        if not reason and not is_linear_type(kind):
            reason = "no node in it is a convolution that is known"
        elif not reason and (sizes is None or not is_floating(around.inputs[0].meta.get("val"))):
            reason = "no node in it is a product that is known, and its shapes are not a linear's"
        call = _around(scope, around) if not around.trouble else _nowhere(scope, around)
        site = Site(path, "linear", sizes or (), (call,), type=kind, reason=reason)
        yield _LayerCall(site, (*scope.place, position), "", frozenset([key]))

    def _roots(self, scope: Scope, base: Node) -> list[str]:
        """The parameters and buffers of two dims or more that a node is computed from."""
        roots: dict[str, None] = {}
        seen, waiting = {base}, [base]
        while waiting:
            node = waiting.pop()
            name = scope.names.get(node, "")
            if name and self.view.tensors[name].dim() >= 2:
                roots[name] = None
            fresh = [n for n in node.all_input_nodes if n not in seen]
            seen.update(fresh)
            waiting += fresh
        return sorted(roots, key=lambda name: -self.view.tensors[name].numel())

    def _bias_of(self, scope: Scope, form: Form, path: str, weight: str) -> str:
        """The bias that a form adds; where it takes none, what stands beside the module's weight."""
        name = _bias_name(scope, form)
        if name or (form.bias is None and not form.bare):
            return name
        own = [w for w in self.view.same(weight) if module_of(w) == path]
        return self._bias(own[0]) if own else ""

    def _bias(self, weight: str) -> str:
        """The bias beside a weight, where the node adds none: a decomposed graph adds it apart.

        Where the bias has several names, it is the one that the graph reads.
        """
        head, ending, _ = weight.rpartition("weight")
        name = f"{head}bias"
        if not ending or name not in self.view.tensors:
            return ""
        return next((n for n in (name, *self.view.same(name)) if n in self.read), name)

    def _unreachable(self, scope: Scope) -> str:
        """Why a parameter cannot be brought into a graph, or ""."""
        strange = [c for c in scope.callers if c not in _THREADED]
        if strange:
            return f"inside `{strange[0]}`, whose graph takes no further parameters"
        if scope.path in self.twice:
            return f"inside `{'.'.join(scope.path)}`, a graph that is called from two places"
        return ""


def _dims(form: Form) -> int:
    """How many dims the weight of a form's kind has."""
    return 2 if form.kind == "linear" else 2 + int(form.kind[4])


def _stacked(root: str, shape: tuple[Any, ...]) -> str:
    return f"stacked experts: `{root}` {'×'.join(map(str, shape))} is several matrices in one parameter"


def _bias_name(scope: Scope, form: Form) -> str:
    return scope.names.get(form.bias, "") if isinstance(form.bias, Node) else ""


def _call(scope: Scope, form: Form, base: Node, nodes: list[Node]) -> Call:
    bias = form.bias.name if isinstance(form.bias, Node) else ""
    names = tuple(n.name for n in nodes)
    return Call(form.x.name, form.node.name, names, base.name, bias, scope.path, scope.hops)


def _around(scope: Scope, around: Boundary) -> Call:
    names = tuple(n.name for n in around.nodes)
    into, out = around.inputs[0].name, around.outputs[0].name
    return Call(into, out, names, "", "", scope.path, scope.hops)


def _nowhere(scope: Scope, around: Boundary) -> Call:
    """The call of an ambiguous boundary: its nodes are known, its input is not."""
    names = tuple(n.name for n in around.nodes)
    return Call("", around.outputs[-1].name, names, "", "", scope.path, scope.hops)


def _given(around: Boundary) -> Iterator[Node]:
    for node in around.nodes:
        yield from node.all_input_nodes


def _of_module(
    scope: Scope, node: Node, target: str, module: nn.Module, unreachable: str
) -> Iterator[Site]:
    """The layer that a called module is, or the layers in one that the trace left whole."""
    prefix = ".".join((*scope.path, target))
    first = node.all_input_nodes[0].name if node.all_input_nodes else ""
    call = Call(first, node.name, (node.name,), "", "", scope.path, scope.hops)
    for name, part in module.named_modules():
        if not _is_layer(part):
            continue
        path = f"{prefix}.{name}" if name else prefix
        whole = f"inside `{prefix}`, which the trace left whole: use torch.export"
        yield replace(_of_layer(path, part, call), reason=whole if name else unreachable)


def _is_layer(module: nn.Module) -> bool:
    try:
        return Layer.from_module(module).kind != "embedding"
    except ValueRefused:
        return False


def _of_layer(path: str, module: nn.Module, call: Call) -> Site:
    layer = Layer.from_module(module)
    geometry: dict[str, Any] = {}
    if layer.dims:
        names = ("stride", "padding", "padding_mode", "dilation", "groups")
        geometry = {name: getattr(layer, name) for name in names}
    bias = "" if layer.bias is None else f"{path}.bias"
    return Site(
        path,
        layer.kind,
        layer.shape,
        (call,),
        weight=f"{path}.weight",
        bias=bias,
        transposed=layer.transposed,
        type=type(module).__name__,
        **geometry,
    )


def _together(calls: list[_LayerCall], view: View, names: GraphNames) -> list[Site]:
    """One site for the calls of one module: of one weight and bias, unless the trace noted more."""
    sites: dict[object, list[_LayerCall]] = {}
    for one in calls:
        sites.setdefault(_module_key(one.site, view), []).append(one)
    groups = [group for whole in sites.values() for group in _objects(whole)]
    return [_joined(group, view, names) for group in groups]


def _module_key(site: Site, view: View) -> object:
    if not site.weight:
        return site.path, site.kind, "computed"
    weight = view.same(site.weight)[0]
    bias = view.same(site.bias)[0] if site.bias else ""
    return weight, bias, site.kind, site.transposed


def _objects(calls: list[_LayerCall]) -> list[list[_LayerCall]]:
    """Calls of one weight and bias by module object, where a strict trace kept objects apart."""
    if len({one.identity for one in calls} - {""}) < 2:
        return [calls]
    paths = {one.site.path: one.identity for one in calls if one.identity}
    groups: dict[str, list[_LayerCall]] = {}
    for one in calls:
        groups.setdefault(one.identity or paths.get(one.site.path, ""), []).append(one)
    return list(groups.values())


def _joined(group: list[_LayerCall], view: View, names: GraphNames) -> Site:
    """One site of several calls, under the first of the module's names in the model's order."""
    sites = [one.site for one in group]
    first = sites[0]
    called = dict.fromkeys(site.path for site in sites)
    order = [module_of(name) for name in view.same(first.weight)] if first.weight else []
    sure = [p for p in order if p in called]
    if first.bias and first.weight.endswith(".weight"):
        sure = [p for p in order if f"{p}.bias".lstrip(".") in view.same(first.bias)] or sure
    path = (sure or [first.path])[0]
    reasons = [site.reason for site in sites if site.reason]
    if not reasons and any(_geometry(site) != _geometry(first) for site in sites):
        reasons = ["it is called with different strides, paddings or dilations"]
    calls = tuple(call for site in sites for call in site.calls)
    uncalled = [p for p in order if p in called or p in sure or p not in names.types]
    aliases = tuple(p for p in dict.fromkeys([*uncalled, *called]) if p != path)
    sure_of_one = len(called) == 1 or first.bias or all(one.identity for one in group)
    untold = () if sure_of_one else tuple(dict.fromkeys([path, *called]))
    return replace(
        first, path=path, aliases=aliases, names=untold, calls=calls, reason="".join(reasons[:1])
    )


def _geometry(site: Site) -> tuple[object, ...]:
    return site.shape, site.stride, site.padding, site.padding_mode, site.dilation, site.groups


def _told_apart(sites: list[Site]) -> list[Site]:
    """Two weights of one module have one path: no config and no file tells which is meant."""
    several = _repeated([site.path for site in sites])
    return [
        replace(s, reason=f"`{s.path}` uses several weights: {s.weight or 'one of them computed'}")
        if s.path in several and not s.reason and not s.weight.endswith(".weight")
        else s
        for s in sites
    ]


def _with_shares(sites: list[Site], view: View, names: GraphNames) -> list[Site]:
    users = _users(sites, view, names)
    return [
        replace(site, shares=_others(site, users[view.same(site.weight)[0]]))
        if site.weight and site.adaptable
        else site
        for site in sites
    ]


def _others(site: Site, users: dict[str, None]) -> tuple[str, ...]:
    return tuple(p for p in users if p not in (site.path, *site.aliases))


def _users(sites: list[Site], view: View, names: GraphNames) -> dict[str, dict[str, None]]:
    """Weight → the paths (or nodes) that use it."""
    labels = {
        (call.graph, name): site.path
        for site in sites
        for call in site.calls
        for name in call.nodes
    }
    users: dict[str, dict[str, None]] = {}
    for site in sites:
        if site.weight:
            users.setdefault(view.same(site.weight)[0], {})[site.path] = None
    for scope in view.scopes:
        for node, name in scope.names.items():
            held = users.setdefault(view.same(name)[0], {})
            for user in node.users:
                stack = owners(user)
                if is_ours(user) or _passes_on(view, scope, user):
                    continue
                label = labels.get((scope.path, user.name))
                held[label or (stack[-1].path if stack else user.name)] = None
    return users


def _passes_on(view: View, scope: Scope, node: Node) -> bool:
    """Whether a node only hands its operands to a graph of its own, where they are looked at."""
    return node.op == "output" or any(
        inner.outer is scope and inner.hops[-1] == node.name for inner in view.scopes
    )


def _identity(node: Node, path: str) -> str:
    stack = owners(node)
    return stack[-1].identity if stack and stack[-1].path == path else ""


def _innermost(node: Node) -> object:
    stack = owners(node)
    return stack[-1].key if stack else node


def _keys(node: Node) -> frozenset[str]:
    return frozenset(owner.key for owner in owners(node))


def _repeated(values: list[Any]) -> set[Any]:
    seen: set[Any] = set()
    return {value for value in values if value in seen or seen.add(value)}  # type: ignore[func-returns-value]
