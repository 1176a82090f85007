"""The JSON of an exported program, held against what torch's schema 8 says, field by field.

torch makes Python source of the names in it, looks up operators by dotted names, evaluates its
formulas and imports the modules that its containers name. So each text may be only what its field is
for. A field that is not known may hold numbers and plain names, and little of them.

A description is never built as a whole: an element is read, checked and dropped. So one that is
padded costs no more than its text.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from json import JSONDecodeError
from typing import Any

from adaptsurgery.checkpoint.expressions import Unsafe, check_expression, check_guard

_PIECES = (1 << 12, 1 << 16, 1 << 20)  # characters of text that are read at once
_PADDING = 1 << 16  # characters of unknown fields
_GRAPHS = 10_000  # in graphs
_NUMBERS = 1 << 20  # in a list

_BREAKS = re.compile(r"[\x00-\x1f\x7f\"'\\]")  # what ends a text in Python source
_NAME = re.compile(r"(?!.*__import__)[^\W\d]\w*(\.\w+)*")
_PLAIN = re.compile(r"[\w.:+ -]*")
_INDEX = re.compile(r"[A-Za-z_]\d{7}")  # torch counts up to a symbol's number

_OPERATOR = re.compile(
    r"torch\.ops\.([A-Za-z]\w*|_[A-Za-z]\w*)\.(\w+)\.([A-Za-z]\w*|_[A-Za-z]\w*)", re.ASCII
)
# Operators that reach files, print, or are there for torch's own tests and tools.
_OTHER_ENDS = ("debugprims", "profiler", "static_runtime", "_test", "_inductor_test")
_FILES = ("aten.save", "aten.from_file", "prim.Print")
_SPECIAL = "__and__ __or__ __xor__ __lshift__ __rshift__ __iand__ __ior__ __ixor__".split()
_HIGHER = frozenset(
    """_export_tracepoint associative_scan auto_functionalized auto_functionalized_v2
    autograd_function_apply cond flex_attention flex_attention_backward foreach_map
    graphsafe_run_with_rng_state hints_wrapper invoke_quant invoke_quant_packed invoke_subgraph
    local_map_hop map_impl out_dtype run_and_save_rng_state run_const_graph run_with_rng_state scan
    strict_mode tag_activation_checkpoint while_loop while_loop_stack_output with_effects wrap
    wrap_activation_checkpoint wrap_with_autocast wrap_with_set_grad_enabled""".split()
)
# What torch's verifier lets stand in a graph beside operators, but for what imports a module.
_FUNCTIONS = frozenset(
    [f"_operator.{name}" for name in
     """eq ne le ge lt gt neg pos mul add sub floordiv mod pow truediv and_ or_ xor invert lshift
     rshift getitem""".split()]
    + [f"math.{name}" for name in
       "trunc ceil floor sqrt exp log log2 sin cos tan sinh cosh tanh asin acos atan".split()]
    + [f"torch.{name}" for name in
       """sym_int sym_float sym_ite sym_max sym_min sym_not sym_sqrt sym_sum _sym_sqrt _sym_cos
       _sym_cosh _sym_sin _sym_sinh _sym_tan _sym_tanh _sym_asin _sym_acos _sym_atan _sym_log2
       _C._set_grad_enabled autograd.grad_mode.set_grad_enabled
       amp.autocast_mode._enter_autocast amp.autocast_mode._exit_autocast
       fx.experimental.symbolic_shapes.cast_symbool_to_symint_guardless""".split()]
    + [f"torch._functorch.predispatch.{name}" for name in
       """_add_batch_dim _remove_batch_dim _vmap_increment_nesting _vmap_decrement_nesting
       lazy_load_decompositions _make_dual _unpack_dual _jvp_increment_nesting
       _jvp_decrement_nesting _unwrap_for_grad _enter_dual_level _exit_dual_level""".split()]
)  # fmt: skip
_FACTORIES = frozenset(
    [f"builtins.{name}" for name in "list dict set tuple int float str bool".split()]
    + ["collections.OrderedDict"]
)


class Misplaced(ValueError):
    """Something else than the schema has there; its message says where and what."""


@dataclass
class Description:
    """What a program says of itself: its schema, its torch, and the classes of its containers."""

    major: int | None = None
    minor: int | None = None
    torch: str = "?"
    classes: set[str] = field(default_factory=set)
    padding: int = 0
    graphs: int = 0


Check = Callable[[Description, Any], None]


@dataclass(frozen=True)
class Fields:
    """An object with some of these fields; what it holds beside them is padding."""

    rules: Mapping[str, Any]


@dataclass(frozen=True)
class Each:
    """A list."""

    rule: Any


@dataclass(frozen=True)
class Named:
    """An object whose keys are names: ``key`` checks them, ``rule`` what they stand for."""

    key: Check
    rule: Any


def read_description(text: str, rule: Any) -> Description:
    """What ``text`` says, once all of it has been held against ``rule``.

    Raises Unsafe for a text that torch would run or look up, Misplaced for what is no such JSON.
    """
    description = Description()
    walk = _Walk(text, description)
    try:
        at = walk.value(rule, walk.blank(0))
        if walk.blank(at) != len(text):
            raise Misplaced(f"text follows its end at {at}")
    except RecursionError:
        raise Misplaced("it is nested too deep") from None
    return description


class _Walk:
    """A text that is checked from front to back, small values at once, large ones by their parts."""

    def __init__(self, text: str, description: Description) -> None:
        self.text = text
        self.description = description
        self.decode = json.JSONDecoder().raw_decode
        self.space = re.compile(r"[ \t\n\r]*").match

    def blank(self, at: int) -> int:
        match = self.space(self.text, at)
        return match.end() if match else at

    def value(self, rule: Any, at: int) -> int:
        """Check the value that begins at ``at``; where it ends."""
        for size in _PIECES:
            piece = self.text[at : at + size]
            try:
                value, length = self.decode(piece)
            except JSONDecodeError:
                continue
            if length < len(piece) or at + size >= len(self.text):
                check(self.description, rule, value)
                return at + length
        return self.parts(rule, at)

    def parts(self, rule: Any, at: int) -> int:
        """Check the members of a large list or object one by one."""
        opening = self.text[at : at + 1]
        rule = _resolved(self.description, rule)
        if (opening, type(rule)) not in (("[", Each), ("{", Fields), ("{", Named)):
            raise Misplaced(f"no such value belongs at {at}: {self.text[at : at + 60]!r}")
        closing = "]" if opening == "[" else "}"
        at = self.blank(at + 1)
        left = _NUMBERS if isinstance(rule, Each) and callable(rule.rule) else len(self.text)
        while self.text[at : at + 1] != closing:
            left -= 1
            if left < 0:
                raise Misplaced(f"a list of more than {_NUMBERS} numbers")
            child = rule.rule if isinstance(rule, Each) else None
            if child is None:
                key, at = self.key(at)
                child = _child(self.description, rule, key)
            at = self.blank(self.value(child, at))
            mark = self.text[at : at + 1]
            if mark == ",":
                at = self.blank(at + 1)
            elif mark != closing:
                raise Misplaced(f"damaged at {at}: {self.text[at : at + 60]!r}")
        return at + 1

    def key(self, at: int) -> tuple[str, int]:
        """A member's name, and where its value begins."""
        try:
            key, length = self.decode(self.text[at : at + _PIECES[1]])
        except JSONDecodeError:
            key, length = None, 0
        colon = self.blank(at + length)
        if not isinstance(key, str) or self.text[colon : colon + 1] != ":":
            raise Misplaced(f"damaged at {at}: {self.text[at : at + 60]!r}")
        return key, self.blank(colon + 1)


def check(description: Description, rule: Any, value: Any) -> None:
    """Hold a value against a rule; nothing is nothing anywhere."""
    if value is None:
        return
    rule = _resolved(description, rule)
    if isinstance(rule, Each) and isinstance(value, list):
        for item in value:
            check(description, rule.rule, item)
    elif isinstance(rule, Fields) and value == {}:
        raise Misplaced("an object without its fields")
    elif isinstance(rule, Fields | Named) and isinstance(value, dict):
        for key, item in value.items():
            check(description, _child(description, rule, key), item)
    elif isinstance(rule, Each | Fields | Named):
        raise Misplaced(f"{str(value)[:60]!r} where an object or a list belongs")
    else:
        rule(description, value)


def _resolved(description: Description, rule: Any) -> Any:
    """A rule itself, or the one of a graph in a graph."""
    if rule != "graph":
        return rule
    description.graphs += 1
    if description.graphs > _GRAPHS:
        raise Misplaced("too many graphs in graphs")
    return _GRAPH


def _child(description: Description, rule: Any, key: str) -> Any:
    if isinstance(rule, Named):
        rule.key(description, key)
        return rule.rule
    return rule.rules.get(key, _padding)


# -- What single values may be


def _padding(description: Description, value: Any) -> None:
    """A field that this schema has not: numbers and plain names, and not many."""
    text = json.dumps(value)
    description.padding += len(text) + 16
    if description.padding > _PADDING:
        raise Misplaced("it is padded with fields that no program has")
    for part in _strings(value):
        if not _PLAIN.fullmatch(part):
            raise Unsafe(f"a field that is not known: {part[:200]}")


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [part for item in value for part in _strings(item)]
    if isinstance(value, dict):
        return [*value, *(part for item in value.values() for part in _strings(item))]
    return []


def _text(_: Description, value: Any) -> None:
    """Any text: torch keeps it as one."""
    if not isinstance(value, str):
        raise Misplaced(f"{str(value)[:60]!r} where a text belongs")


def _name(_: Description, value: Any) -> None:
    """A name that becomes a variable of Python source; higher operators' inputs have none."""
    _text(_, value)
    if value and not _NAME.fullmatch(value):
        raise Unsafe(f"a name that would be code: {value[:200]}")


def _path(_: Description, value: Any) -> None:
    """A parameter's or a module's dotted name, which is written into source between quotes."""
    _text(_, value)
    if _BREAKS.search(value) or len(value) > 4096:
        raise Unsafe(f"a name that would be code: {value[:200]}")


def _symbol(_: Description, value: Any) -> None:
    _text(_, value)
    check_expression(value)
    if _INDEX.search(value):
        raise Unsafe(f"a symbol of an absurd number: {value[:200]}")


def _operator(_: Description, value: Any) -> None:
    """An operator's dotted name, which torch looks up."""
    _text(_, value)
    match = _OPERATOR.fullmatch(value)
    if match and match[1] not in _OTHER_ENDS and (match[2] in _SPECIAL or match[2][:2] != "__"):
        known = f"{match[1]}.{match[2]}" not in _FILES
    elif value.startswith("torch.ops.higher_order."):
        known = value.rpartition(".")[2] in _HIGHER
    else:
        known = value in _FUNCTIONS
    if not known or (match and match[1] == "higher_order"):
        raise Unsafe(f"no operator of a graph: {value[:200]}")


def _formula(_: Description, value: Any) -> None:
    _text(_, value)
    check_expression(value)


def _condition(_: Description, value: Any) -> None:
    _text(_, value)
    check_guard(value)


def _number(_: Description, value: Any) -> None:
    """A number, or what torch writes for one that JSON has not."""
    if not isinstance(value, int | float) and value not in ("Infinity", "-Infinity", "NaN"):
        raise Misplaced(f"{str(value)[:60]!r} where a number belongs")


def _whole(_: Description, value: Any) -> None:
    if not isinstance(value, int):
        raise Misplaced(f"{str(value)[:60]!r} where an integer belongs")


def _version(description: Description, value: Any) -> None:
    if not isinstance(value, dict):
        raise Misplaced(f"{str(value)[:60]!r} where the schema's version belongs")
    numbers = [value.get(name) for name in ("major", "minor")]
    if any(type(number) is not int for number in numbers):
        raise Misplaced("the schema's version is no number")
    description.major, description.minor = value["major"], value["minor"]


def _torch(description: Description, value: Any) -> None:
    _text(description, value)
    description.torch = value[:60]


# -- Containers: what goes in and out, as JSON in a text


def _spec(description: Description, value: Any) -> None:
    """A tree of containers. torch imports what an enumeration or a default comes from."""
    _text(description, value)
    try:
        tree = json.loads(value)
    except (ValueError, RecursionError):
        raise Misplaced(f"no tree of containers: {value[:60]!r}") from None
    if not isinstance(tree, list) or len(tree) != 2:
        raise Misplaced(f"no tree of containers: {value[:60]!r}")
    _tree(description, tree[1])


def _inputs(description: Description, value: Any) -> None:
    """The inputs' tree, whose keywords become arguments of Python source."""
    _spec(description, value)
    tree = json.loads(value)[1]
    children = tree.get("children_spec") or []
    for child in children[1:2]:
        if child.get("type") == "builtins.dict":
            for keyword in json.loads(child.get("context") or "[]"):
                _name(description, keyword)


def _tree(description: Description, node: Any) -> None:
    if not isinstance(node, dict) or not isinstance(node.get("children_spec"), list):
        raise Misplaced(f"no tree of containers: {str(node)[:60]!r}")
    kind = node.get("type")
    if kind is not None:
        _text(description, kind)
        description.classes.add(kind)
    _context(node.get("context"))
    for child in node["children_spec"]:
        _tree(description, child)


def _context(context: Any) -> None:
    """What a container says beside its members: keys, a class, a default."""
    if isinstance(context, dict) and {"default_factory_module", "default_factory_name"} & set(
        context
    ):
        factory = f"{context.get('default_factory_module')}.{context.get('default_factory_name')}"
        if factory not in _FACTORIES:
            raise Unsafe(f"a default that is imported: {factory[:200]}")
        context = context.get("dict_context")
    try:
        held = json.loads(context) if isinstance(context, str) else context
    except (ValueError, RecursionError):
        held = context
    _keys(held)


def _keys(held: Any) -> None:
    if isinstance(held, dict) and "__enum__" in held:
        _member(held)
    elif isinstance(held, dict):
        for key, item in held.items():
            _keys(key)
            _keys(item)
    elif isinstance(held, list):
        for item in held:
            _keys(item)
    elif isinstance(held, str) and _BREAKS.search(held):
        raise Unsafe(f"a key that would be code: {held[:200]}")


def _member(held: dict[str, Any]) -> None:
    """A key that is a member of an enumeration, whose module must be imported already."""
    module, _, path = str(held.get("fqn")).partition(":")
    kind: Any = sys.modules.get(module)
    for part in path.split("."):
        kind = getattr(kind, part, None) if kind is not None and part.isidentifier() else None
    if not isinstance(kind, type) or not issubclass(kind, Enum):
        raise Unsafe(f"a class that would be imported: {str(held.get('fqn'))[:200]}")


# -- torch._export.serde.schema, of major version 8

_SYMBOLIC = Fields(
    {
        "expr_str": _formula,
        "hint": Fields({"as_int": _whole, "as_bool": _whole, "as_float": _number}),
    }
)
_SIZE = Fields({"as_expr": _SYMBOLIC, "as_int": _whole, "as_float": _number, "as_bool": _whole})
_DEVICE = Fields({"type": _name, "index": _whole})
_META = Fields({
    "dtype": _whole, "sizes": Each(_SIZE), "requires_grad": _whole, "device": _DEVICE,
    "strides": Each(_SIZE), "storage_offset": _SIZE, "layout": _whole,
})  # fmt: skip
_TENSOR = Fields({"name": _name})
_OPTIONAL = Fields({"as_tensor": _TENSOR, "as_none": _whole})
_SYMBOL = Fields({"as_name": _name, "as_int": _whole, "as_float": _number, "as_bool": _whole})
_OBJECT = Fields({"name": _name, "class_fqn": _path})
_ARGUMENT_RULES: dict[str, Any] = {
    "as_none": _whole, "as_bool": _whole, "as_int": _whole, "as_float": _number,
    "as_string": _text, "as_bools": Each(_whole), "as_ints": Each(_whole),
    "as_floats": Each(_number), "as_strings": Each(_text), "as_int_lists": Each(Each(_whole)),
    "as_float_lists": Each(Each(_number)), "as_complex": Fields({"real": _number, "imag": _number}),
    "as_scalar_type": _whole, "as_memory_format": _whole, "as_layout": _whole, "as_device": _DEVICE,
    "as_tensor": _TENSOR, "as_tensors": Each(_TENSOR), "as_nested_tensors": Each(Each(_TENSOR)),
    "as_optional_tensor": _OPTIONAL, "as_optional_tensors": Each(_OPTIONAL),
    "as_sym_int": _SYMBOL, "as_sym_ints": Each(_SYMBOL), "as_sym_bool": _SYMBOL,
    "as_sym_bools": Each(_SYMBOL), "as_sym_float": _SYMBOL, "as_sym_floats": Each(_SYMBOL),
    "as_graph": Fields({"name": _name, "graph": "graph"}), "as_custom_obj": _OBJECT,
    "as_operator": _operator,
}  # fmt: skip
_ARGUMENT = Fields(_ARGUMENT_RULES)
_ARGUMENT_RULES["as_string_to_argument"] = Named(_name, _ARGUMENT)
_NODE = Fields(
    {
        "target": _operator,
        "name": _name,
        "is_hop_single_tensor_return": _whole,
        "inputs": Each(Fields({"name": _name, "arg": _ARGUMENT, "kind": _whole})),
        "outputs": Each(_ARGUMENT),
        "metadata": Named(_name, _text),
    }
)
_GRAPH = Fields({
    "inputs": Each(_ARGUMENT), "outputs": Each(_ARGUMENT), "nodes": Each(_NODE),
    "tensor_values": Named(_name, _META), "sym_int_values": Named(_name, _SIZE),
    "sym_bool_values": Named(_name, _SIZE), "sym_float_values": Named(_name, _SIZE),
    "custom_obj_values": Named(_name, _OBJECT), "is_single_tensor_return": _whole,
})  # fmt: skip
_VALUE = Fields({"as_none": _whole, "as_int": _whole, "as_float": _number, "as_string": _text, "as_bool": _whole})  # fmt: skip
_INPUT = Fields(
    {
        "user_input": Fields({"arg": _ARGUMENT}),
        "parameter": Fields({"arg": _TENSOR, "parameter_name": _path}),
        "buffer": Fields({"arg": _TENSOR, "buffer_name": _path, "persistent": _whole}),
        "tensor_constant": Fields({"arg": _TENSOR, "tensor_constant_name": _path}),
        "custom_obj": Fields({"arg": _OBJECT, "custom_obj_name": _path}),
        "token": Fields({"arg": _TENSOR}),
        "constant_input": Fields({"name": _name, "value": _VALUE}),
    }
)
_OUTPUT = Fields(
    {
        "user_output": Fields({"arg": _ARGUMENT}),
        "loss_output": Fields({"arg": _TENSOR}),
        "buffer_mutation": Fields({"arg": _TENSOR, "buffer_name": _path}),
        "parameter_mutation": Fields({"arg": _TENSOR, "parameter_name": _path}),
        "gradient_to_parameter": Fields({"arg": _TENSOR, "parameter_name": _path}),
        "gradient_to_user_input": Fields({"arg": _TENSOR, "user_input_name": _name}),
        "user_input_mutation": Fields({"arg": _TENSOR, "user_input_name": _name}),
        "token": Fields({"arg": _TENSOR}),
    }
)
_CALL = Fields({"fqn": _path, "signature": Fields({
    "inputs": Each(_ARGUMENT), "outputs": Each(_ARGUMENT), "in_spec": _inputs, "out_spec": _spec,
    "forward_arg_names": Each(_name),
})})  # fmt: skip
PROGRAM = Fields({
    "graph_module": Fields({
        "graph": _GRAPH,
        "signature": Fields({"input_specs": Each(_INPUT), "output_specs": Each(_OUTPUT)}),
        "module_call_graph": Each(_CALL), "metadata": Named(_name, _text),
        "treespec_namedtuple_fields": Named(_path, Fields({"field_names": Each(_name)})),
    }),
    "opset_version": Named(_name, _whole), "verifiers": Each(_name), "guards_code": Each(_condition),
    "range_constraints": Named(_symbol, Fields({"min_val": _whole, "max_val": _whole})),
    "schema_version": _version, "torch_version": _torch,
})  # fmt: skip
TENSOR_META = _META
