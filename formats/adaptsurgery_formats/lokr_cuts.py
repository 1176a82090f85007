"""How PEFT and LyCORIS cut a dimension into LoKr's two factors, and the search for a setting.

Neither stores its cut: both derive it again from one ``factor`` when they load a file, so a file
whose shapes no setting gives cannot be loaded by them. Sources: ``peft.tuners.lokr.layer`` and
``lycoris.functional.general``, read and run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod


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
Factors = tuple[int, int]
FACTORIZATIONS = {"peft": peft_factorization, "lycoris": lycoris_factorization}


def sweepable_factors(out: int, into: int, loader: str) -> dict[tuple[Factors, Factors], int]:
    """Every pair of cuts, of ``out`` and of ``into``, that a loader makes, with a factor that gives it.

    -1, the default of both, comes first. A cut changes at a divisor and next to one only.
    """
    cut = FACTORIZATIONS[loader]
    divisors = {
        f for n in (out, into) for m in range(1, int(n**0.5) + 1) if n % m == 0 for f in (m, n // m)
    }
    factors: dict[tuple[Factors, Factors], int] = {}
    for factor in (-1, *sorted(divisors | {f + 1 for f in divisors})):
        factors.setdefault((cut(out, factor), cut(into, factor)), factor)
    return factors


def stored_shapes(
    out: Factors, into: Factors, kernel: tuple[int, ...], rank: int, both: bool, tucker: bool
) -> dict[str, tuple[int, ...]]:
    """The shapes that PEFT and LyCORIS make a LoKr's slots of, for the cuts (a, b) and (c, d).

    w2 is whole from rank max(b, d)/2 on, w1 from max(a, c)/2 or without ``both``; a ``tucker``
    core stands where w2 is not whole and the kernel is not 1.
    """
    (a, b), (c, d) = out, into
    factored = both and 2 * rank < max(a, c)
    slots = {"w1_a": (a, rank), "w1_b": (rank, c)} if factored else {"w1": (a, c)}
    if 2 * rank >= max(b, d):
        return {**slots, "w2": (b, d, *kernel)}
    if tucker and any(k != 1 for k in kernel):
        return {**slots, "w2_a": (rank, b), "w2_b": (rank, d), "t2": (rank, rank, *kernel)}
    return {**slots, "w2_a": (b, rank), "w2_b": (rank, d * prod(kernel))}


@dataclass(frozen=True, eq=False, repr=False)
class Storage:
    """What a loader can hold of a weight ``shape`` (o, i, *k) with the cuts (a, b), (c, d) of o and i."""

    shape: tuple[int, ...]
    out: Factors
    into: Factors
    both: bool = False
    tucker: bool = False
    loader: str = "peft"

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """``stored_shapes`` at a rank."""
        return stored_shapes(self.out, self.into, self.shape[2:], rank, self.both, self.tucker)

    def parameters(self, rank: int) -> int:
        return sum(map(prod, self.shapes(rank).values()))

    def refusal(self, rank: int) -> str:
        """Why the loader would not give Δ back from these shapes; empty where it does."""
        shapes, (out, into, *kernel) = self.shapes(rank), self.shape
        if self.loader == "lycoris":
            loads = lycoris_loads(shapes, out, into)
            return (
                "" if loads else "LyCORIS's loader guesses another factor or rank from the shapes"
            )
        if len(kernel) > 2:
            return "PEFT has no LoKr for Conv3d"
        if len(kernel) == 1 and "w2" in shapes:
            return "PEFT scrambles a Conv1d LoKr with a full w2"
        if "t2" in shapes and rank == 1 and (len(kernel) == 1 or kernel[1] == 1):
            return "PEFT fails at a tucker core of rank 1 beside a kernel that ends in 1"
        return ""

    def expressible(self, rank: int) -> tuple[int, int]:
        """The rank that w1 can have, and that of w2, as a matrix or along b of a tucker core."""
        (a, b), (c, d), shapes = self.out, self.into, self.shapes(rank)
        first = min(a, c, rank) if "w1_a" in shapes else min(a, c)
        most = min(b, d * prod(self.shape[2:]))
        if "w2" in shapes:
            return first, max(most, b, d)  # more than any other form
        return first, rank if "t2" in shapes else min(most, rank)

    def ranks(self) -> list[int]:
        """Ranks that the loader takes; each has more numbers, and can say more, than those before."""
        kept, least = [], sys.maxsize
        for rank in range((max(*self.out, *self.into) + 1) // 2, 0, -1):
            if self.parameters(rank) < least and not self.refusal(rank):
                least = self.parameters(rank)
                kept.append(rank)
        return sorted({self.expressible(rank): rank for rank in kept}.values())


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
    shape = shapes.get("w1_a") or shapes.get("w2_a")
    return shape[1] if shape else None


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
