"""What is added: adapters at their weights, the terms of each layer, and what they came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from adaptsurgery.adapters.loading import Loaded
from adaptsurgery.adapters.lowrank import in_naming
from adaptsurgery.core.strength import times
from adaptsurgery_formats import Format, ModuleState
from adaptsurgery_formats.errors import ValueRefused
from adaptsurgery_formats.state import ALPHA_OVER_R, is_rigid
from adaptsurgery_formats.traits import traits_of

NOTHING = 1e-12  # coefficients that cancel to less than this share of themselves are 0
BIASES = ("up_bias", "diff_b")


class WeightedAdapter:
    """One adapter and its weight, in the target's naming."""

    def __init__(self, loaded: Loaded, weight: float, target: Format) -> None:
        self.loaded, self.weight = loaded, weight
        self.state = in_naming(loaded.state, loaded.names, target) if weight else loaded.state

    def check_weight(self) -> None:
        if self.weight == 1.0:
            return
        rigid = next((m for m in self.state.modules if is_rigid(m)), None)
        saved = next((key for s in self.state.saved.values() for key in s), "")
        if rigid is not None or saved:
            kind = "it is replaced outright" if rigid is None else f"{_title(rigid)} does not add"
            raise ValueRefused(
                f"`{rigid.label if rigid else saved}` at weight {self.weight:g} has no meaning: {kind}",
                where=self.state.where,
                next="use weight 1, or 0 to leave the adapter out",
                code="no-weight",
            )


@dataclass(frozen=True)
class Term:
    """A module with its adapter's weight: c·Δ with c = w·s."""

    module: ModuleState
    weight: float

    @property
    def coefficient(self) -> float:
        return times(self.weight, self.module.scale)

    def weighted(self) -> ModuleState:
        """The module with its coefficient for a scale, only to be measured."""
        r = self.module.rank or 1
        return replace(self.module, alpha=self.coefficient * r, rank=r, rule=ALPHA_OVER_R)


@dataclass
class SummedLayer:
    """One layer's terms in the order of the adapters, and what they were summed to."""

    terms: list[Term]
    summed: list[ModuleState] = field(default_factory=list)


def _title(module: ModuleState) -> str:
    return "a DoRA" if "magnitude" in module.tensors else f"a {traits_of(module.algorithm).title}"


def moves_weight(module: ModuleState) -> bool:
    """Whether a module changes more than the bias."""
    return module.tensors.keys() != {"diff_b"}


def without_bias(module: ModuleState) -> ModuleState:
    return module.with_tensors(up_bias=None, diff_b=None)


def as_they_are(terms: Sequence[Term]) -> bool:
    """Whether a layer's terms are one adapter's, at weight 1: each algorithm once."""
    algorithms = [t.module.algorithm for t in terms]
    moving = sum(moves_weight(t.module) for t in terms)
    return (
        len(set(algorithms)) == len(terms) and moving <= 1 and all(t.weight == 1.0 for t in terms)
    )


def keys_of(terms: Sequence[Term]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key for t in terms for key in t.module.keys))


def ranks_of(terms: Sequence[Term], written: Sequence[ModuleState]) -> str:
    """ "rank 8 + 4 → 12", where that says something."""
    before = [str(t.module.rank) for t in terms if t.module.rank]
    after = [str(m.rank) for m in written if m.rank]
    if not before or before == after:
        return ""
    return f"rank {' + '.join(before)} → {' + '.join(after) or 'none'}"
