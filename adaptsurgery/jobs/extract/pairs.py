"""The tensors of two checkpoints laid side by side, from headers alone.

A tensor's partner bears the same name in the same component, whatever file or shard it is in. One
of the two models may have leading segments that the other lacks (``model.``, ``bert.``): the
prefix under which most names agree is taken, and told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from adaptsurgery.checkpoint.base import Base, Located
from adaptsurgery_formats import Note
from adaptsurgery_formats.errors import NameLookupError


@dataclass(frozen=True)
class Side:
    """Where one of a pair lies: the number of its file, its key there, dtype and shape as stored."""

    file: int
    key: str
    dtype: str
    shape: tuple[int, ...]


NOWHERE = Side(-1, "", "F32", (0,))


@dataclass(frozen=True)
class Pair:
    """A parameter of both checkpoints, under the base's name for it.

    ``base`` is NOWHERE for one that only the fine-tuned model has.
    """

    component: str
    name: str
    base: Side
    tuned: Side

    @property
    def label(self) -> str:
        return f"{self.component}.{self.name}" if self.component else self.name

    @property
    def new(self) -> bool:
        return self.base == NOWHERE


@dataclass
class Paired:
    """All pairs in the base's order, and what has no partner."""

    pairs: list[Pair] = field(default_factory=list)
    only_base: list[str] = field(default_factory=list)
    only_tuned: list[Pair] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


def pair_up(base: Base, tuned: Base) -> Paired:
    """Every tensor of ``base`` with its partner in ``tuned``.

    Raises NameLookupError ("different-architectures") where fewer than half of the base's tensors
    have one, with both sides' names.
    """
    found = Paired()
    for component, other in _components(base, tuned):
        _pair_component(found, base, tuned, component, other)
    total = sum(map(len, base.parameters.values()))
    if 2 * len(found.pairs) < total or not found.pairs:
        raise NameLookupError(
            f"{len(found.pairs)} of the base's {total} tensors are in the fine-tuned model",
            where=tuned.where,
            items=[f"only in the base: `{n}`" for n in found.only_base[:8]]
            + [f"only in the fine-tuned model: `{p.label}`" for p in found.only_tuned[:8]],
            next="are the two of one architecture? BASE comes first, then the fine-tuned model",
            code="different-architectures",
        )
    if found.only_base:
        found.notes.append(_alone("only-in-base", base, found.only_base))
    return found


def _components(base: Base, tuned: Base) -> list[tuple[str, str]]:
    """Components that go together: of one name, or each model's only one."""
    if len(base.parameters) == len(tuned.parameters) == 1:
        return [(next(iter(base.parameters)), next(iter(tuned.parameters)))]
    return [(name, name) for name in base.parameters]


def _pair_component(found: Paired, base: Base, tuned: Base, component: str, other: str) -> None:
    mine, theirs = base.parameters[component], tuned.parameters.get(other, {})
    called = _aligned(mine, theirs)
    if called.prefix:
        text = f"`{called.prefix}` goes before the names of the {called.longer}"
        found.notes.append(Note("prefix", tuned.where, text))
    for name, at in mine.items():
        partner = called.partner(name)
        pair = Pair(component, name, _side(at), NOWHERE)
        if partner in theirs:
            found.pairs.append(Pair(component, name, _side(at), _side(theirs[partner])))
        else:
            found.only_base.append(pair.label)
    for name, at in theirs.items():
        if called.inverse(name) not in mine:
            found.only_tuned.append(Pair(component, called.inverse(name), NOWHERE, _side(at)))


def _side(at: Located) -> Side:
    return Side(at.file, at.key, at.dtype, at.shape)


@dataclass(frozen=True)
class _Alignment:
    """A prefix that the ``longer`` of the two, "base" or "fine-tuned model", has before its names."""

    prefix: str = ""
    longer: str = ""

    def partner(self, name: str) -> str:
        """The fine-tuned model's name for one of the base."""
        return name.removeprefix(self.prefix) if self.longer == "base" else self.prefix + name

    def inverse(self, name: str) -> str:
        """The base's name for one of the fine-tuned model."""
        return self.prefix + name if self.longer == "base" else name.removeprefix(self.prefix)


def _aligned(mine: Mapping[str, Located], theirs: Mapping[str, Located]) -> _Alignment:
    """No prefix where that finds at least half; else the one that finds the most."""
    same = len(mine.keys() & theirs.keys())
    if 2 * same >= min(len(mine), len(theirs)):
        return _Alignment()
    tried = [_Alignment(p, "fine-tuned model") for p in _prefixes(mine, theirs)]
    tried += [_Alignment(p, "base") for p in _prefixes(theirs, mine)]
    hits = {a: sum(a.partner(name) in theirs for name in mine) for a in tried}
    best = max(tried, key=lambda a: hits[a], default=_Alignment())
    return best if hits.get(best, 0) > same else _Alignment()


def _prefixes(short: Collection[str], long: Collection[str]) -> list[str]:
    """Heads of the long names whose tails are short names, the commonest first."""
    counts: Counter[str] = Counter()
    for name in long:
        at = name.find(".") + 1
        while at:
            if name[at:] in short:
                counts[name[:at]] += 1
            at = name.find(".", at) + 1
    return [prefix for prefix, _ in counts.most_common(4)]


def _alone(code: str, base: Base, names: Sequence[str]) -> Note:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    text = f"not in the fine-tuned model, and left out: {', '.join(names[:5])}{more}"
    return Note(code, base.where, text)
