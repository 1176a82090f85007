"""The formulas in an exported program, which torch evaluates: sizes (by sympy) and guards (as Python).

Each is parsed, never run, and may hold names, numbers and arithmetic, and calls of the functions that
torch itself writes there, which are listed here: ``FloorDiv(Symbol('s0', integer=True), Integer(2))``.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from functools import lru_cache

_LENGTH = 20_000  # characters of a formula
_DEPTH = 80  # terms in terms
_DIGITS = 40  # of a number
_EXPONENT = 16
_FLOAT_BITS = 3400  # of the integer part of 1e999
_BITS = 1 << 17  # of the largest number that a formula of numbers alone may come to
_DEGREE = 24  # of a formula as a polynomial, whose terms sympy may write out

_SYMPY = """Symbol Integer Float Rational Add Mul Pow Max Min Abs Mod floor ceiling Piecewise
ExprCondPair And Or Not Xor Equality Unequality GreaterThan LessThan StrictGreaterThan StrictLessThan
Eq Ne Ge Le Gt Lt""".split()
# torch.utils._sympy.functions
_TORCH = """FloorDiv ModularIndexing Where PythonMod CleanDiv CeilToInt FloorToInt CeilDiv IntTrueDiv
FloatTrueDiv LShift RShift IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt
RoundDecimal ToFloat FloatPow PowByNatural Identity BitwiseFn_bitwise_and BitwiseFn_bitwise_or
BitwiseFn_bitwise_xor""".split()
_OPAQUE = "sqrt cos cosh sin sinh tan tanh asin acos atan exp log log2 asinh".split()
FUNCTIONS = frozenset([*_SYMPY, *_TORCH, *(f"OpaqueUnaryFn_{name}" for name in _OPAQUE)])
_POWERS = ("Pow", "PowByNatural", "FloatPow", "LShift")

_GUARD_CALLS = frozenset(
    """max min abs int float bool round cast_symbool_to_symint_guardless
    IsNonOverlappingAndDenseIndicator torch.sym_float torch.sym_int torch.sym_max torch.sym_min
    torch.sym_not torch.sym_ite torch.sym_sum""".split()
)
_LARGE = frozenset(["math.factorial", "math.perm", "math.comb"])  # of a few digits, without end
_GUARD_METHODS = ("size", "stride", "storage_offset", "dim", "ndim", "numel")

_SYMBOL = re.compile(r"[A-Za-z_]\w{0,63}", re.ASCII)
_NUMBER = re.compile(r"[-+]?(\d{1,40}(\.\d{0,40})?|\.\d{1,40})(e[-+]?\d{1,3})?", re.ASCII)
_KEY = re.compile(r"[^\x00-\x1f\x7f\"'\\]{0,1000}")

_ARITHMETIC = (
    ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Tuple,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context,
)  # fmt: skip


class Unsafe(ValueError):
    """A text that is more than it may be; its message is what was seen."""


@lru_cache(maxsize=65536)
def check_expression(text: str) -> None:
    """Raise Unsafe unless a size's formula is names, numbers, arithmetic and torch's own functions."""
    tree = _parsed(text)
    _expression(tree, text, _DEPTH)
    _bits(tree, text)
    _degree(tree, text)


@lru_cache(maxsize=65536)
def check_guard(text: str) -> None:
    """Raise Unsafe unless a guard compares sizes of inputs by arithmetic."""
    _guard(_parsed(text), text, _DEPTH)


def _parsed(text: str) -> ast.expr:
    if len(text) > _LENGTH or "\n" in text or "\r" in text or "\0" in text:
        raise Unsafe(_short(text))
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise Unsafe(_short(text)) from None


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def _expression(node: ast.expr, text: str, depth: int) -> None:
    """A term of a size's formula and all terms in it."""
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in ("Symbol", "Float"):
            _literal_call(node, name, text)
            return
        if name not in FUNCTIONS or node.keywords:
            raise Unsafe(_short(text))
        terms = node.args
    else:
        terms = _terms(node, text)
    if depth <= 0:
        raise Unsafe(_short(text))
    for term in terms:
        _expression(term, text, depth - 1)


def _literal_call(node: ast.Call, name: str, text: str) -> None:
    """``Symbol('s0', integer=True)`` or ``Float('1.5', precision=53)``, and nothing like it."""
    pattern = _SYMBOL if name == "Symbol" else _NUMBER
    first = node.args[0] if len(node.args) == 1 else None
    value = first.value if isinstance(first, ast.Constant) else None
    good = isinstance(value, str) and pattern.fullmatch(value) and not value.startswith("__")
    for keyword in node.keywords:
        given = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if name == "Symbol":
            good = good and isinstance(given, bool) and keyword.arg is not None
        else:
            good = good and type(given) is int and given <= 1000 and keyword.arg == "precision"
    if not good:
        raise Unsafe(_short(text))


def _terms(node: ast.expr, text: str) -> list[ast.expr]:
    """The terms of arithmetic; none of a name or a number. Unsafe for all else."""
    if isinstance(node, ast.Constant) and _is_number(node.value):
        return []
    if isinstance(node, ast.Name) and _SYMBOL.fullmatch(node.id) and not node.id.startswith("__"):
        return []
    if not isinstance(node, _ARITHMETIC):
        raise Unsafe(_short(text))
    return list(_children(node))


def _children(node: ast.AST) -> Iterator[ast.expr]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield child


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and abs(value) < 10**_DIGITS


def _bits(node: ast.expr, text: str) -> int | None:
    """At most how many bits a term of numbers alone comes to; None where names are in it."""
    if isinstance(node, ast.Constant):
        return int(node.value).bit_length() if isinstance(node.value, int) else _FLOAT_BITS
    if isinstance(node, ast.Name):
        return None
    if isinstance(node, ast.Call):
        called = node.func.id if isinstance(node.func, ast.Name) else ""
        if called in ("Symbol", "Float"):
            return None if called == "Symbol" else _FLOAT_BITS
        terms, power = node.args, called in _POWERS
    else:
        terms = list(_children(node))
        power = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift)
    sizes = [_bits(term, text) for term in terms]
    if power and len(sizes) == 2 and sizes[1] is not None:
        sizes = [None if sizes[0] is None else sizes[0] * _exponent(terms[1], text)]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    if total is not None and total > _BITS:
        raise Unsafe(_short(text))
    return total


def _degree(node: ast.expr, text: str) -> int:
    """The degree of a term as a polynomial of its symbols and of its calls of other functions."""
    if isinstance(node, ast.Constant | ast.Name):
        return int(isinstance(node, ast.Name))
    called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    if called in ("Symbol", "Float"):
        return 1
    terms = node.args if isinstance(node, ast.Call) else list(_children(node))
    degrees = [_degree(term, text) for term in terms]
    if called == "Pow" or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)):
        degree = degrees[0] * (_exponent(terms[1], text) if not degrees[-1] else 1)
    elif called == "Mul" or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
        degree = sum(degrees)
    else:
        degree = max(degrees, default=0)
    if degree > _DEGREE:
        raise Unsafe(_short(text))
    return degree if called in ("", "Add", "Mul", "Pow") else min(degree, 1)


def _exponent(node: ast.expr, text: str) -> int:
    """An exponent's size, which is one small number."""
    number = _constant(node)
    if number is None or not abs(number) <= _EXPONENT:
        raise Unsafe(_short(text))
    return math.ceil(abs(number))


def _constant(node: ast.expr) -> float | None:
    """The number that an exponent is: plain, negated, in Integer(…) or in Rational(…)."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp):
        return _constant(node.operand)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
        first = node.args[0]
        if node.func.id == "Float":
            text = first.value if isinstance(first, ast.Constant) else None
            return float(text) if isinstance(text, str) else None
        if node.func.id in ("Integer", "Rational"):
            return _constant(first)
    return None


def _guard(node: ast.expr, text: str, depth: int) -> None:
    """A term of a guard: ``L['x'].size()[0] % 2 == 0``."""
    if depth <= 0:
        raise Unsafe(_short(text))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift):
        if not any(isinstance(part, ast.Subscript) for part in ast.walk(node.right)):
            _exponent(node.right, text)
    if isinstance(node, ast.Call):
        terms = [*_callee(node.func, text), *node.args]
        if node.keywords:
            raise Unsafe(_short(text))
    elif isinstance(node, ast.Subscript):
        key = node.slice
        if not isinstance(key, ast.Constant) or not _is_key(key.value):
            raise Unsafe(_short(text))
        terms = [node.value]
    elif isinstance(node, ast.Attribute) and _dotted(node) in ("math.inf", "math.nan", "math.pi"):
        return
    else:
        terms = _terms(node, text)
    for term in terms:
        _guard(term, text, depth - 1)


def _callee(node: ast.expr, text: str) -> list[ast.expr]:
    """What a guard may call: a listed function, or a method of a tensor, whose tensor it gives."""
    name = _dotted(node)
    if name in _LARGE:
        raise Unsafe(ast.unparse(node))
    if name in _GUARD_CALLS or name in FUNCTIONS or re.fullmatch(r"math\.[a-z]\w*", name):
        return []
    if isinstance(node, ast.Attribute) and node.attr in _GUARD_METHODS:
        return [node.value]
    raise Unsafe(_short(text))


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return ""


def _is_key(value: object) -> bool:
    return type(value) is int or (isinstance(value, str) and bool(_KEY.fullmatch(value)))
