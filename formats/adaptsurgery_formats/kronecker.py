"""How PEFT and LyCORIS cut a dimension into LoKr's two factors, and the search for a setting.

Neither stores its cut: both derive it again from one ``factor`` when they load a file, so a file
whose shapes no setting gives cannot be loaded by them. Sources: ``peft.tuners.lokr.layer`` and
``lycoris.functional.general``, read and run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
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


def lycoris_loader_factor(out: tuple[int, int], into: tuple[int, int]) -> bool:
    """Whether LyCORIS's own loader, which guesses its factor from shapes, makes these cuts.

    (a, b) cuts the outputs and (c, d) the inputs. A file that fails here is right by the
    definition all the same; its reader is at fault.
    """
    (a, b), (c, d) = out, into
    if (a, c) == (lycoris_factorization(a * b, -1)[0], lycoris_factorization(c * d, -1)[0]):
        factor = -1
    else:
        first, second = max(a, c), max(b, d)
        if a * b % first == c * d % first == 0 and first in (a, b) and first in (c, d):
            factor = first
        elif a * b % second == c * d % second == 0 and second in (a, b) and second in (c, d):
            factor = second
        else:
            factor = min(first, second)
    return (lycoris_factorization(a * b, factor), lycoris_factorization(c * d, factor)) == (
        (a, b),
        (c, d),
    )
