"""The canonical form that every layout is parsed into and spelled from.

An adapter file is a list of modules; a module has an algorithm, its tensors by slot, and an alpha
with the rule by which a scale follows from it. Slots keep the shapes of their ecosystem; with
o = out, i = in/groups, k = the kernel's dims, r = rank:

========  ==================================================================================
lora      up (o, r[, 1…]), down (r, i[, *k]), mid (r, r, *k) if tucker [then down (r, i, 1…)];
          for an embedding up (dim, r), down (r, vocab). up_bias (o,) where PEFT has one
loha      w1_a, w2_a (o, r), w1_b, w2_b (r, i·∏k); tucker: t1, t2 (r, r, *k), w*_a (r, o), w*_b (r, i)
lokr      w1 (a, c) or w1_a (a, r) · w1_b (r, c); w2 (b, d, *k) or w2_a (b, r) · w2_b (r, d·∏k)
          or tucker t2 (r, r, *k), w2_a (r, b), w2_b (r, d);  o = a·b, i = c·d
hra       u (i·∏k, r)
full      diff (o, i, *k), diff_b (o,)
norm      w_norm (n,), b_norm (n,)
========  ==================================================================================

What follows from them stands in ``traits``, one row an algorithm. ``magnitude`` beside lora, loha or lokr makes it a DoRA; it is canonically (o, 1, …) where the norm
is taken per output and (1, i, 1, …) where it is taken per input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from adaptsurgery_formats.errors import KeyRefused, ShapeError, ValueRefused
from adaptsurgery_formats.tensors import Tensor
from adaptsurgery_formats.traits import Column, lokr_cuts, traits_of

SLOTS: Mapping[str, tuple[str, ...]] = Column(lambda row: row.slots)
OPTIONAL = ("magnitude", "up_bias")

# How a scale follows from alpha and rank: rule → what it means. The only place that computes one.
ALPHA_OVER_R = "alpha/r"
ALPHA_OVER_SQRT_R = "alpha/sqrt(r)"
NO_ALPHA = "1: no alpha, so alpha = r"
ZERO_ALPHA = "1: alpha 0 stands for r"
BOTH_FULL = "1: both Kronecker factors are stored full"
UNSCALED = "none"
_ONES = (NO_ALPHA, ZERO_ALPHA, BOTH_FULL, UNSCALED)


def scale_of(rule: str, alpha: float | None, rank: int | None) -> float:
    """The number s in W + s·ΔW.

    ``alpha/r`` is LoRA's (arXiv 2106.09685) and LyCORIS's, ``alpha/sqrt(r)`` rsLoRA's
    (arXiv 2312.03732); the other rules are LyCORIS's readings of an alpha that says nothing.
    """
    if rule == ALPHA_OVER_R:
        assert alpha is not None and rank
        return alpha / rank
    if rule == ALPHA_OVER_SQRT_R:
        assert alpha is not None and rank
        return alpha / math.sqrt(rank)
    if rule in _ONES:
        return 1.0
    raise ValueRefused(f"no scale follows by the rule {rule!r}", code="unknown-rule")


@dataclass(frozen=True)
class ModuleState:
    """What a file holds for one module: algorithm, tensors by slot, and the scale with its rule.

    ``path`` is dotted and belongs to the ``naming``: "diffusers" (the model classes of diffusers
    and transformers), "native" (the original repository: LDM, Flux), or "base" (whatever the base
    model calls its modules). ``component`` is the pipeline's part ("unet", "text_encoder", …) or
    "" where a file adapts one unnamed model.
    """

    path: str
    algorithm: str
    tensors: dict[str, Tensor]
    alpha: float | None = None
    rule: str = UNSCALED
    rank: int | None = None
    component: str = ""
    naming: str = "base"
    kind: str = ""  # "embedding" where the file says so, else unknown
    keys: tuple[str, ...] = ()  # where it came from: the file's own keys
    options: dict[str, Any] = field(default_factory=dict)  # hra: apply_gs
    own: str = ""  # the adapter's path for it, where the base at hand has another

    @property
    def written(self) -> str:
        """The path that files have: the adapter's own."""
        return self.own or self.path

    @property
    def scale(self) -> float:
        return scale_of(self.rule, self.alpha, self.rank)

    @property
    def tucker(self) -> bool:
        return any(slot in self.tensors for slot in ("mid", "t1", "t2"))

    @property
    def label(self) -> str:
        return f"{self.component}.{self.path}" if self.component else self.path

    def with_tensors(self, **changes: Tensor | None) -> ModuleState:
        """A copy with slots replaced, or removed where the change is None."""
        kept = {**self.tensors, **{k: v for k, v in changes.items() if v is not None}}
        gone = {k for k, v in changes.items() if v is None}
        return self.changed(tensors={k: v for k, v in kept.items() if k not in gone})

    def changed(self, **fields: Any) -> ModuleState:
        """A copy with fields replaced; a tenth of ``dataclasses.replace``'s cost, a file has thousands."""
        copy = object.__new__(ModuleState)
        copy.__dict__.update(self.__dict__, **fields)
        return copy


def magnitude_axis(module: ModuleState) -> str:
    """ "out" where a DoRA's norm is taken per output row, "in" where per input."""
    magnitude = module.tensors["magnitude"]
    out, _ = delta_shape(module)
    return "out" if magnitude.shape[0] == magnitude.numel == out else "in"


@dataclass(frozen=True)
class Note:
    """Something a user should know that is not an error: a stable code, where, and a sentence."""

    code: str
    where: str
    text: str


@dataclass
class AdapterState:
    """A whole adapter: modules, replaced parameters, metadata, and what was noticed on the way.

    ``saved`` holds parameters that the file replaces outright (PEFT's modules_to_save, biases,
    resized embeddings) by component and dotted parameter name. ``config`` is PEFT's
    adapter_config.json per component. ``model`` names the bundled model table that the names were
    looked up in, or is empty. ``prefix`` goes before flat names in the place of the layout's own.
    """

    layout: str
    modules: list[ModuleState]
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: str = ""
    prefix: str = ""  # of flat names, where it is not the layout's own
    notes: list[Note] = field(default_factory=list)
    where: str = ""

    @property
    def components(self) -> list[str]:
        """The components in order of first appearance."""
        named = [m.component for m in self.modules] + [c for c, s in self.saved.items() if s]
        return list(dict.fromkeys(named))

    def of(self, component: str) -> Iterator[ModuleState]:
        return (m for m in self.modules if m.component == component)

    def note(self, code: str, where: str, text: str) -> None:
        self.notes.append(Note(code, where, text))


def check_complete(module: ModuleState, where: str) -> None:
    """Raise KeyRefused unless the module's slots are one full set of its algorithm."""
    have = frozenset(module.tensors) - frozenset(OPTIONAL)
    sets = traits_of(module.algorithm).complete
    if any(have == frozenset(s) for s in sets):
        return
    best = max(sets, key=lambda s: (len(have & set(s)), -len(s)))
    missing, extra = sorted(set(best) - have), sorted(have - set(best))
    trouble = [f"{', '.join(missing)} missing"] if missing else []
    trouble += [f"{', '.join(extra)} left over"] if extra else []
    raise KeyRefused(
        f"`{module.label}` is half a {module.algorithm}: {'; '.join(trouble)}",
        where=where,
        seen=", ".join(module.keys) or ", ".join(sorted(have)),
        next="the file is damaged or was cut; take it from its source again",
        code="incomplete-module",
    )


def shapes_of(module: ModuleState) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's tensors by slot."""
    return {slot: tensor.shape for slot, tensor in module.tensors.items()}


def is_rigid(module: ModuleState) -> bool:
    """Whether a module has no meaning at another strength than 1: a rotation, a DoRA."""
    return "magnitude" in module.tensors or not traits_of(module.algorithm).weighs


def options_of(module: ModuleState) -> dict[str, Any]:
    """The options of a module that are a part of its update: hra's apply_gs."""
    options = traits_of(module.algorithm).options
    return {name: module.options.get(name, default) for name, default in options.items()}


def module_rank(module: ModuleState) -> int | None:
    """The rank r that the tensors show, or None where they show none (full/full LoKr, full, norm)."""
    return traits_of(module.algorithm).rank(shapes_of(module))


def kernel_of(module: ModuleState) -> tuple[int, ...] | None:
    """The kernel dims that the tensors show; () for a linear, None where flat factors hide them."""
    return traits_of(module.algorithm).kernel(shapes_of(module))


def delta_shape(module: ModuleState) -> tuple[int, int]:
    """ΔW as a matrix: (o, i·∏k). What turns the inputs has no o, and gives (0, i·∏k)."""
    return traits_of(module.algorithm).extent(shapes_of(module), module.options)


def lokr_shapes(module: ModuleState) -> tuple[tuple[int, int], tuple[int, int], tuple[int, ...]]:
    """(a, b), (c, d) and the kernel of a LoKr: o = a·b, i = c·d; see ``lokr_cuts``."""
    return lokr_cuts(shapes_of(module))


def check_shapes(module: ModuleState, where: str) -> None:
    """Raise ShapeError unless the slots' shapes fit each other."""
    wrong = _misfit(module)
    if wrong:
        shapes = ", ".join(f"{s} {list(t.shape)}" for s, t in module.tensors.items())
        raise ShapeError(f"`{module.label}`: {wrong}", where=where, seen=shapes)


def _misfit(module: ModuleState) -> str:
    """What does not fit in a complete module's shapes, or an empty string."""
    wrong = traits_of(module.algorithm).misfit(shapes_of(module))
    return wrong or _magnitude_misfit(module)


def _magnitude_misfit(module: ModuleState) -> str:
    if "magnitude" not in module.tensors:
        return ""
    shape = module.tensors["magnitude"].shape
    out, columns = delta_shape(module)
    kernel = kernel_of(module)
    long = [n for n in shape if n != 1]
    if len(long) > 1 or len(shape) < 2:
        return f"magnitude {list(shape)} is neither (o, 1, …) nor (1, i, 1, …)"
    if shape[0] == out:
        return ""
    hidden = kernel is None  # flat factors count the kernel into the columns
    fits = columns % shape[1] == 0 if hidden else columns == shape[1] * math.prod(kernel or ())
    if shape[0] == 1 and fits:
        return ""
    return f"magnitude {list(shape)} fits neither {out} outputs nor the inputs"
