"""The tensors of two checkpoints laid side by side, from headers alone.

A tensor's partner bears the same name in the same component, whatever file or shard it is in. One
of the two models may have leading segments that the other lacks (``model.``, ``bert.``): the
prefix under which most names agree is taken, and told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from adaptsurgery.checkpoint.base import Base, Located
from adaptsurgery_formats import Note
from adaptsurgery_formats.errors import NameLookupError
from adaptsurgery_formats.names.aligning import SAME, prefix_between


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
    paired = Paired()
    for component, other in _components(base, tuned):
        _pair_component(paired, base, tuned, component, other)
    total = sum(map(len, base.parameters.values()))
    if 2 * len(paired.pairs) < total or not paired.pairs:
        raise NameLookupError(
            f"{len(paired.pairs)} of the base's {total} tensors are in the fine-tuned model",
            where=tuned.where,
            items=[f"only in the base: `{n}`" for n in paired.only_base[:8]]
            + [f"only in the fine-tuned model: `{p.label}`" for p in paired.only_tuned[:8]],
            next="are the two of one architecture? BASE comes first, then the fine-tuned model",
            code="different-architectures",
        )
    if paired.only_base:
        paired.notes.append(_alone("only-in-base", base, paired.only_base))
    return paired


def _components(base: Base, tuned: Base) -> list[tuple[str, str]]:
    """Components that go together: of one name, or each model's only one."""
    if len(base.parameters) == len(tuned.parameters) == 1:
        return [(next(iter(base.parameters)), next(iter(tuned.parameters)))]
    return [(name, name) for name in base.parameters]


def _pair_component(paired: Paired, base: Base, tuned: Base, component: str, other: str) -> None:
    mine, theirs = base.parameters[component], tuned.parameters.get(other, {})
    alignment = prefix_between(mine, theirs)
    if alignment != SAME:
        longer = "fine-tuned model" if alignment.add else "base"
        text = f"`{alignment.add or alignment.strip}` goes before the names of the {longer}"
        paired.notes.append(Note("prefix", tuned.where, text))
    for name, at in mine.items():
        partner = alignment.of(name)
        pair = Pair(component, name, _side(at), NOWHERE)
        if partner in theirs:
            paired.pairs.append(Pair(component, name, _side(at), _side(theirs[partner])))
        else:
            paired.only_base.append(pair.label)
    for name, at in theirs.items():
        if (own := alignment.inverse.of(name)) not in mine:
            paired.only_tuned.append(Pair(component, own, NOWHERE, _side(at)))


def _side(at: Located) -> Side:
    return Side(at.file, at.key, at.dtype, at.shape)


def _alone(code: str, base: Base, names: Sequence[str]) -> Note:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    text = f"not in the fine-tuned model, and left out: {', '.join(names[:5])}{more}"
    return Note(code, base.where, text)
