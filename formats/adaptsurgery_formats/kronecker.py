"""How PEFT and LyCORIS cut a dimension into LoKr's two factors, and the search for a setting.

Neither stores its cut: both derive it again from one ``factor`` when they load a file, so a file
whose shapes no setting gives cannot be loaded by them. Sources: ``peft.tuners.lokr.layer`` and
``lycoris.functional.general``, read and run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache


def _climb(dimension: int, limit: int) -> tuple[int, int]:
    """The pair of divisors (m, n), m ≤ n, that the upward walk both libraries share ends at."""
    m, n = 1, dimension
    while m < n:
        step = m + 1
        while dimension % step:
            step += 1
        other = dimension // step
        if step + other > m + n or step > limit:
            break
        m, n = step, other
    return (m, n) if m <= n else (n, m)


@lru_cache(maxsize=65536)
def peft_factorization(dimension: int, factor: int) -> tuple[int, int]:
    """PEFT's cut (first, second) of a dimension: a divisor ``factor`` comes first, unsorted."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    return _climb(dimension, dimension if factor == -1 else factor)


@lru_cache(maxsize=65536)
def lycoris_factorization(dimension: int, factor: int) -> tuple[int, int]:
    """LyCORIS's cut: PEFT's, sorted, and any negative factor means the whole dimension."""
    if factor > 0 and dimension % factor == 0:
        first, second = factor, dimension // factor
        return (first, second) if first <= second else (second, first)
    return _climb(dimension, dimension if factor < 0 else factor)


def peft_decompose_factor(cuts: Iterable[tuple[int, int]]) -> int | None:
    """The decompose_factor under which PEFT makes every cut (first, second), or None.

    A cut (m, n) of d = m·n comes from the factor m, and where m ≤ n also from the factors between
    m and the next divisor that the walk would step to; -1, the default, is preferred.
    """
    wanted = {(m * n, (m, n)) for m, n in cuts}
    if all(peft_factorization(d, -1) == cut for d, cut in wanted):
        return -1
    low = max(m for _, (m, _) in wanted)
    high = min(_last_factor(d, m) for d, (m, _) in wanted)
    for factor in range(low, min(high, max(d for d, _ in wanted) + 1) + 1):
        if all(peft_factorization(d, factor) == cut for d, cut in wanted):
            return factor
    return None


def _last_factor(dimension: int, first: int) -> int:
    """The largest factor worth trying for a cut that begins with ``first``."""
    if first * first > dimension:
        return first
    if first == _climb(dimension, dimension)[0]:  # the walk ends here: no factor is too large
        return sys.maxsize
    return next(m for m in range(first + 1, dimension + 1) if dimension % m == 0) - 1


Shapes = Mapping[str, tuple[int, ...]]


def lycoris_loads(shapes: Shapes, out: int, into: int) -> bool:
    """Whether LyCORIS's own loader makes the factors of a LoKr file as the file has them.

    ``shapes`` by slot, ``out`` and ``into`` = in/groups of the layer. It guesses factor and rank
    from shapes; a file that fails here is right by the definition all the same.
    """
    rank, factor = _guessed_rank(shapes), _guessed_factor(shapes)
    (a, b), (c, d) = lycoris_factorization(out, factor), lycoris_factorization(into, factor)
    both = "w1" not in shapes and "w2" not in shapes
    w1_full = not both or rank is None or 2 * rank >= max(a, c)
    w2_full = rank is None or 2 * rank >= max(b, d)
    made = {"w1"} if w1_full else {"w1_a", "w1_b"}
    made |= {"w2"} if w2_full else {"w2_a", "w2_b", *(("t2",) if "t2" in shapes else ())}
    cut = shapes["w1"] if "w1" in shapes else (shapes["w1_a"][0], shapes["w1_b"][1])
    return made == set(shapes) and cut == (a, c)


def _guessed_rank(shapes: Shapes) -> int | None:
    """The loader's rank; that of a tucker w2_a (r, b) is read from the wrong side. None: full."""
    found = shapes.get("w1_a") or shapes.get("w2_a")
    return found[1] if found else None


def _guessed_factor(shapes: Shapes) -> int:
    """The loader's factor; it takes d·∏k for d, and r for b where there is a tucker core."""
    a, c = shapes["w1"] if "w1" in shapes else (shapes["w1_a"][0], shapes["w1_b"][1])
    b, d = shapes["w2"][:2] if "w2" in shapes else (shapes["w2_a"][0], shapes["w2_b"][1])
    if (a, c) == (lycoris_factorization(a * b, -1)[0], lycoris_factorization(c * d, -1)[0]):
        return -1
    first = max(a, c)
    second = max(shapes["w2"]) if "w2" in shapes else max(b, d)
    for factor in (first, second):
        divides = a * b % factor == c * d % factor == 0
        if divides and factor in (a, b) and factor in (c, d):
            return factor
    return min(first, second)
