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

``magnitude`` beside lora, loha or lokr makes it a DoRA; it is canonically (o, 1, …) where the norm
is taken per output and (1, i, 1, …) where it is taken per input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from adaptsurgery_formats.errors import KeyRefused, ShapeError
from adaptsurgery_formats.tensors import Tensor

# The slots of each algorithm, and the sets of them of which one must be present in full.
SLOTS: dict[str, tuple[str, ...]] = {
    "lora": ("up", "down", "mid", "up_bias", "magnitude"),
    "loha": ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2", "magnitude"),
    "lokr": ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2", "magnitude"),
    "hra": ("u",),
    "full": ("diff", "diff_b"),
    "norm": ("w_norm", "b_norm"),
}
_LOKR_W1 = (("w1",), ("w1_a", "w1_b"))
_LOKR_W2 = (("w2",), ("w2_a", "w2_b"), ("w2_a", "w2_b", "t2"))
COMPLETE: dict[str, tuple[tuple[str, ...], ...]] = {
    "lora": (("up", "down"), ("up", "down", "mid")),
    "loha": (("w1_a", "w1_b", "w2_a", "w2_b"), ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    "lokr": tuple(a + b for a in _LOKR_W1 for b in _LOKR_W2),
    "hra": (("u",),),
    "full": (("diff",), ("diff", "diff_b"), ("diff_b",)),
    "norm": (("w_norm",), ("w_norm", "b_norm"), ("b_norm",)),
}
OPTIONAL = ("magnitude", "up_bias")

# How a scale follows from alpha and rank: rule → what it means. The only place that computes one.
ALPHA_OVER_R = "alpha/r"
ALPHA_OVER_SQRT_R = "alpha/sqrt(r)"
NO_ALPHA = "1: no alpha, so alpha = r"
ZERO_ALPHA = "1: alpha 0 stands for r"
BOTH_FULL = "1: both Kronecker factors are stored full"
UNSCALED = "none"


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
    return 1.0


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


# transformers' Conv1D layers (GPT-2 and its kin) go by these names; their weight is stored (i, o).
CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")


def may_be_transposed(module: ModuleState) -> bool:
    """Whether there is a sign that the module's weight is stored (i, o), other than its shape."""
    if module.kind == "embedding" or module.options.get("fan_in_fan_out"):
        return True
    return module.path.rpartition(".")[2] in CONV1D_NAMES


def check_complete(module: ModuleState, where: str) -> None:
    """Raise KeyRefused unless the module's slots are one full set of its algorithm."""
    have = frozenset(module.tensors) - frozenset(OPTIONAL)
    sets = COMPLETE[module.algorithm]
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


def module_rank(module: ModuleState) -> int | None:
    """The rank r that the tensors show, or None where they show none (full/full LoKr, full, norm)."""
    t = module.tensors
    if module.algorithm == "lora":
        return t["down"].shape[0]
    if module.algorithm == "loha":
        return t["w1_b"].shape[0]
    if module.algorithm == "hra":
        return t["u"].shape[-1]
    if module.algorithm == "lokr":
        for slot in ("w2_b", "w1_b"):
            if slot in t:
                return t[slot].shape[0]
    return None


def kernel_of(module: ModuleState) -> tuple[int, ...] | None:
    """The kernel dims that the tensors show; () for a linear, None where flat factors hide them."""
    t = module.tensors
    if module.algorithm == "lora":
        return (t["mid"] if "mid" in t else t["down"]).shape[2:]
    if module.algorithm == "full" and "diff" in t:
        return t["diff"].shape[2:]
    if module.algorithm in ("loha", "lokr"):
        for slot in ("t2", "w2"):
            if slot in t:
                return t[slot].shape[2:]
    return None


def delta_shape(module: ModuleState) -> tuple[int, int]:
    """ΔW as a matrix: (o, i·∏k). HRA, which has no o, gives (0, i·∏k)."""
    t, algorithm = module.tensors, module.algorithm
    if algorithm == "lora":
        k = math.prod(kernel_of(module) or ())
        return t["up"].shape[0], t["down"].shape[1] * k
    if algorithm == "loha":
        if "t1" in t:
            return t["w1_a"].shape[1], t["w1_b"].shape[1] * math.prod(t["t1"].shape[2:])
        return t["w1_a"].shape[0], t["w1_b"].shape[1]
    if algorithm == "lokr":
        (a, b), (c, d), kernel = lokr_shapes(module)
        return a * b, c * d * math.prod(kernel)
    if algorithm == "hra":
        return 0, t["u"].shape[0]
    if algorithm == "full":
        shape = t["diff"].shape if "diff" in t else (t["diff_b"].shape[0], 0)
        return shape[0], math.prod(shape[1:])
    return (t["w_norm"] if "w_norm" in t else t["b_norm"]).shape[0], 1


def lokr_shapes(module: ModuleState) -> tuple[tuple[int, int], tuple[int, int], tuple[int, ...]]:
    """(a, b), (c, d) and the kernel of a LoKr: o = a·b, i = c·d.

    Flat low-rank w2 hides the kernel: it is then counted into d and returned as ().
    """
    t = module.tensors
    a = t["w1"].shape[0] if "w1" in t else t["w1_a"].shape[0]
    c = t["w1"].shape[1] if "w1" in t else t["w1_b"].shape[1]
    if "w2" in t:
        return (a, t["w2"].shape[0]), (c, t["w2"].shape[1]), t["w2"].shape[2:]
    if "t2" in t:
        return (a, t["w2_a"].shape[1]), (c, t["w2_b"].shape[1]), t["t2"].shape[2:]
    return (a, t["w2_a"].shape[0]), (c, math.prod(t["w2_b"].shape[1:])), ()


def check_shapes(module: ModuleState, where: str) -> None:
    """Raise ShapeError unless the slots' shapes fit each other."""
    wrong = _misfit(module)
    if wrong:
        shapes = ", ".join(f"{s} {list(t.shape)}" for s, t in module.tensors.items())
        raise ShapeError(f"`{module.label}`: {wrong}", where=where, seen=shapes)


def _misfit(module: ModuleState) -> str:
    """What does not fit in a complete module's shapes, or an empty string."""
    t, algorithm = module.tensors, module.algorithm
    for slot, tensor in t.items():
        if tensor.numel == 0:
            return f"{slot} has no elements"
        low, high = _NDIM[slot]
        if not low <= len(tensor.shape) <= high:
            return f"{slot} has {len(tensor.shape)} dimensions"
    r = module_rank(module)
    tests: dict[str, tuple[tuple[int, ...], tuple[int | None, ...]]] = {}
    if algorithm == "lora":
        tests["up"] = (t["up"].shape, (None, r) + (1,) * (len(t["up"].shape) - 2))
        if "mid" in t:
            tests["mid"] = (t["mid"].shape[:2], (r, r))
            tests["down"] = (t["down"].shape[2:], (1,) * (len(t["down"].shape) - 2))
        if "up_bias" in t:
            tests["up_bias"] = (t["up_bias"].shape, (t["up"].shape[0],))
    elif algorithm == "loha":
        n = t["w1_b"].shape[1]
        o = t["w1_a"].shape[1 if "t1" in t else 0]
        for half in ("1", "2"):
            tests[f"w{half}_a"] = (t[f"w{half}_a"].shape, (r, o) if "t1" in t else (o, r))
            tests[f"w{half}_b"] = (t[f"w{half}_b"].shape, (r, n))
            if "t1" in t:
                tests[f"t{half}"] = (t[f"t{half}"].shape, (r, r, *t["t1"].shape[2:]))
    elif algorithm == "lokr":
        if "w1_a" in t:
            tests["w1_a"] = (t["w1_a"].shape, (None, t["w1_b"].shape[0]))
        if "t2" in t:
            tests["t2"] = (t["t2"].shape[:2], (t["w2_a"].shape[0], t["w2_b"].shape[0]))
            tests["w2_b"] = (t["w2_b"].shape, (None, None))
        elif "w2_a" in t:
            tests["w2_a"] = (t["w2_a"].shape, (None, t["w2_b"].shape[0]))
    elif algorithm in ("full", "norm"):
        a, b = ("diff", "diff_b") if algorithm == "full" else ("w_norm", "b_norm")
        if a in t and b in t:
            tests[b] = (t[b].shape, (t[a].shape[0],))
    for slot, (shape, wanted) in tests.items():
        if len(shape) != len(wanted) or any(w not in (None, s) for s, w in zip(shape, wanted)):
            spelled = ", ".join("?" if w is None else str(w) for w in wanted)
            return f"{slot} is {list(t[slot].shape)}, expected ({spelled})"
    return _magnitude_misfit(module)


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


_NDIM: dict[str, tuple[int, int]] = {
    "up": (2, 5), "down": (2, 5), "mid": (3, 5), "up_bias": (1, 1), "magnitude": (1, 5),
    "w1_a": (2, 2), "w1_b": (2, 2), "w2_a": (2, 2), "w2_b": (2, 5), "t1": (3, 5), "t2": (3, 5),
    "w1": (2, 2), "w2": (2, 5), "u": (2, 2),
    "diff": (1, 5), "diff_b": (1, 1), "w_norm": (1, 1), "b_norm": (1, 1),
}  # fmt: skip
