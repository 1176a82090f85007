"""An adapter's paths laid over the base's, where one of the two has other leading segments.

    adapter  layers.0.self_attn.q_proj             base  model.layers.0.self_attn.q_proj
    adapter  base.encoder.layer.0.output.dense     base  bert.encoder.layer.0.output.dense

Either every module of an adapter is found under one alignment, and under no other, or it is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from adaptsurgery_formats.names.rows import StoredWeight, StoredWeights

_PROBES = 6


@dataclass(frozen=True)
class Alignment:
    """``add`` in place of ``strip`` at the head of a path."""

    strip: str = ""
    add: str = ""

    def of(self, path: str) -> str:
        """The aligned path; one that does not begin with ``strip`` (a head) stays as it is."""
        if not path.startswith(self.strip):
            return path
        return self.add + path[len(self.strip) :]

    def __str__(self) -> str:
        if self.strip and self.add:
            return f"`{self.strip}` read as `{self.add}`"
        return f"`{self.strip}` dropped" if self.strip else f"`{self.add}` added"

    @property
    def inverse(self) -> Alignment:
        """What takes an aligned path back."""
        return Alignment(self.add, self.strip)


SAME = Alignment()


@dataclass(frozen=True)
class Aligned:
    """What an alignment finds: weight by path, or several of them where flat names are ambiguous."""

    alignment: Alignment
    found: Mapping[str, tuple[StoredWeight, ...]]

    @property
    def places(self) -> frozenset[tuple[str, tuple[StoredWeight, ...]]]:
        return frozenset(self.found.items())


class Lookup:
    """The weights of a component by dotted or by flat name."""

    def __init__(self, weights: StoredWeights, flat: bool) -> None:
        self.separator = "_" if flat else "."
        self.table: dict[str, tuple[StoredWeight, ...]] = {}
        for path, weight in weights.items():
            name = path.replace(".", "_") if flat else path
            held = self.table.get(name, ())
            if weight not in held:
                self.table[name] = (*held, weight)

    def of_half(self, alignment: Alignment, paths: Sequence[str]) -> bool:
        """Whether what is taken off stands before half of the paths at least: heads may lack it."""
        return 2 * sum(path.startswith(alignment.strip) for path in paths) >= len(paths)

    def under(self, alignment: Alignment, paths: Iterable[str]) -> Aligned:
        hits = ((path, self.table.get(alignment.of(path))) for path in paths)
        return Aligned(alignment, {path: weights for path, weights in hits if weights})

    def candidates(self, paths: Sequence[str]) -> Iterator[Alignment]:
        """Alignments that some of the paths suggest."""
        heads: dict[str, set[str]] = {}
        for path in paths[:: max(1, len(paths) // _PROBES)]:
            for tail, head in tails(path, self.separator):
                heads.setdefault(tail, set()).add(head)
        for name in self.table:
            for tail, add in tails(name, self.separator):
                for strip in heads.get(tail, ()):
                    if self._plausible(strip, add):
                        yield Alignment(strip, add)

    def _plausible(self, strip: str, add: str) -> bool:
        """One of the two is empty, or neither has a number, which would tell layers apart."""
        if not strip or not add:
            return bool(strip or add)
        return not any(p.isdigit() for p in (strip + add).split(self.separator))


def tails(path: str, separator: str) -> Iterator[tuple[str, str]]:
    """What remains of a path without its first segments, and those segments."""
    at = 0
    while at >= 0:
        yield path[at:], path[:at]
        at = path.find(separator, at) + 1 or -1


def best_alignments(
    lookup: Lookup, paths: Sequence[str], fits: Callable[[Aligned], bool]
) -> list[Aligned]:
    """The alignments that find the most paths; one, if names or else shapes can tell.

    Paths as they are come first: where they find everything nothing else is tried. What leaves the
    adapter's names whole comes before what takes segments off.
    """
    same = lookup.under(SAME, paths)
    if len(same.found) == len(paths):
        return [same]
    others = (a for a in dict.fromkeys(lookup.candidates(paths)) if lookup.of_half(a, paths))
    tried = [same, *(lookup.under(a, paths) for a in others)]
    most = max(len(a.found) for a in tried)
    best = [a for a in tried if len(a.found) == most]
    if most < len(paths) and best[0] is same:
        return [same]
    best.sort(key=lambda a: len(a.alignment.strip))
    distinct = list({a.places: a for a in reversed(best)}.values())
    if len(distinct) > 1:
        distinct = [a for a in distinct if fits(a)] or distinct
    return [a for a in distinct if not a.alignment.strip] or distinct


def prefix_between(mine: Collection[str], theirs: Collection[str]) -> Alignment:
    """How the names of one model become those of another of its kind: as they are where that finds
    at least half, else the prefix that finds the most, which either of the two may have."""
    same = sum(name in theirs for name in mine)
    if 2 * same >= min(len(mine), len(theirs)):
        return SAME
    tried = [Alignment(add=prefix) for prefix in _prefixes(mine, theirs)]
    tried += [Alignment(strip=prefix) for prefix in _prefixes(theirs, mine)]
    hits = {a: sum(a.of(name) in theirs for name in mine) for a in tried}
    best = max(tried, key=lambda a: hits[a], default=SAME)
    return best if hits.get(best, 0) > same else SAME


def _prefixes(short: Collection[str], long: Collection[str]) -> list[str]:
    """Heads of the long names whose tails are short names, the commonest first."""
    counts: Counter[str] = Counter()
    for name in long:
        counts.update(head for tail, head in tails(name, ".") if head and tail in short)
    return [prefix for prefix, _ in counts.most_common(4)]
