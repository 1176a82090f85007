"""One row an algorithm: what its tensors are, what their shapes tell, and what may be done with them.

Whatever asks which algorithms there are, or which of them has some property, reads ``TRAITS``; a
name that is not in it is refused by ``traits_of``. The slots' shapes stand in words in ``state``, or
in the algorithm's own file. A shape
function takes the shapes of one module's slots, by slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

from adaptsurgery_formats.errors import ValueRefused, nearest

T = TypeVar("T")
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Options = Mapping[str, Any]  # a module's
Wanted = tuple[int | None, ...]  # a shape with None where any size will do

_NOTHING: Mapping[str, Any] = MappingProxyType({})


def _no_kernel(shapes: Shapes) -> Shape | None:
    return None


def _nothing_wanted(shapes: Shapes) -> dict[str, Wanted]:
    return {}


def _never(shapes: Shapes, options: Options) -> bool:
    return False


def _one(shapes: Shapes) -> int:
    return 1


class Traits(NamedTuple):
    """What is so of every module of one algorithm.

    ``extent`` gives ΔW as a matrix, (o, i·∏k), with 0 for a size that the tensors do not show;
    ``kernel`` the kernel's dims, () for a linear's, None where the tensors hide them; ``wanted``
    the shapes that slots must have beside each other.
    """

    name: str
    title: str  # as it is written in text
    dims: Mapping[str, tuple[int, int]]  # slot → the fewest and the most dimensions it may have
    complete: tuple[tuple[str, ...], ...]  # of which sets one must be there; optional slots apart
    extent: Callable[[Shapes, Options], tuple[int, int]]
    kernel: Callable[[Shapes], Shape | None] = _no_kernel
    wanted: Callable[[Shapes], Mapping[str, Wanted]] = _nothing_wanted
    ranks: tuple[tuple[str, int], ...] = ()  # (slot, dimension) that is the rank: the first there

    # How a module is cut and put together by its output rows.
    rows: tuple[str, ...] = ()  # the slots whose first dimension they are
    unit: Callable[[Shapes], int] = _one  # rows of ΔW to one of those slots'
    cuts: bool = True  # whether it can be at all
    partial: bool = True  # whether parts of a fused weight may be missing: they then have rows of 0
    transposes_core: bool = (
        False  # whether a Tucker core puts the rows of a row slot in its columns
    )

    # How its numbers may be viewed and multiplied.
    factor: tuple[str, ...] = ()  # ΔW is linear in each: the first there takes a factor or a sign
    spatial: tuple[str, ...] = ()  # the slots whose last dimensions are the kernel …
    pointwise: tuple[str, ...] = ()  # … and those where they are ones
    cores: tuple[str, ...] = ()  # beside which a spatial slot that is no core is pointwise
    options: Mapping[str, Any] = _NOTHING  # those that its update takes

    # What it does to the bias.
    shifts: tuple[str, ...] = ()  # the slots that are added to it
    scales_bias: Callable[[Shapes, Options], bool] = _never  # by tensors and options

    # What kind of change it is.
    adds: bool = True  # W' = W + s·Δ
    turns: bool = False  # whether a number of W' comes from several of W
    weighs: bool = True  # whether it has a meaning at other strengths than 1
    reversible: bool = True  # whether it can be taken out of a weight again
    scaled: bool = True  # whether its scale follows from an alpha and a rank
    low_rank: bool = False  # whether ΔW is exactly a LoRA in another form
    dense: bool = False  # whether ΔW is stored outright
    vector: bool = False  # whether the weight that it changes is (n,), a norm's

    # PEFT, and extraction.
    peft_type: str = ""  # "" where PEFT has no such method
    config: str = ""  # the name of its config's class, PEFT's
    peft_fields: Mapping[str, Any] = _NOTHING  # its config's own, with defaults
    peft_lacks: tuple[str, ...] = ()  # of the fields that PEFT's other configs share
    extracts: bool = False  # whether one can be fitted to the difference of two weights

    @property
    def model(self) -> str:
        """The name of the class of models that have it in them, PEFT's."""
        return self.config.removesuffix("Config") + "Model" if self.config else ""

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(self.dims)

    def rank(self, shapes: Shapes) -> int | None:
        """The rank r that shapes show, or None where they show none."""
        return next((shapes[slot][dim] for slot, dim in self.ranks if slot in shapes), None)

    def misfit(self, shapes: Shapes) -> str:
        """What does not fit in a complete module's shapes, or an empty string."""
        for slot, shape in shapes.items():
            low, high = self.dims[slot]
            if 0 in shape:
                return f"{slot} has no elements"
            if not low <= len(shape) <= high:
                return f"{slot} has {len(shape)} dimensions"
        for slot, wanted in self.wanted(shapes).items():
            shape = shapes[slot]
            if len(shape) != len(wanted) or any(w not in (None, s) for s, w in zip(shape, wanted)):
                spelled = ", ".join("?" if w is None else str(w) for w in wanted)
                return f"{slot} is {list(shape)}, expected ({spelled})"
        return ""

    def factor_slot(self, slots: Mapping[str, Any]) -> str:
        """The slot that takes a factor of ΔW. ValueRefused where the algorithm has none."""
        for slot in self.factor:
            if slot in slots:
                return slot
        raise ValueRefused(
            f"no one tensor of a {self.title} takes a factor of its ΔW",
            seen=", ".join(slots),
            next="--as lora, where it can be one",
            code="no-factor",
        )

    @property
    def level_slot(self) -> str:
        """The row slot that takes a factor row by row, where there is one; else ""."""
        return self.factor[0] if len(self.factor) == 1 and self.factor[0] in self.rows else ""

    def last_dims(self, shapes: Shapes, kernel: Shape) -> dict[str, Shape]:
        """The dimensions after the first two that slots have on a weight with this kernel."""
        ones = (1,) * len(kernel)
        cored = any(core in shapes for core in self.cores)
        dims = {}
        for slot in shapes:
            if slot in self.pointwise or slot in self.spatial:
                flat = slot in self.pointwise or (cored and slot not in self.cores)
                dims[slot] = ones if flat else kernel
        return dims


def _lora_extent(t: Shapes, options: Options) -> tuple[int, int]:
    return t["up"][0], t["down"][1] * math.prod(_lora_kernel(t))


def _lora_kernel(t: Shapes) -> Shape:
    return t["mid" if "mid" in t else "down"][2:]


def _lora_wanted(t: Shapes) -> dict[str, Wanted]:
    r = t["down"][0]
    wanted: dict[str, Wanted] = {"up": (None, r, *(1,) * (len(t["up"]) - 2))}
    if "mid" in t:
        wanted["mid"] = (r, r, *(None,) * (len(t["mid"]) - 2))
        wanted["down"] = (None, None, *(1,) * (len(t["down"]) - 2))
    if "up_bias" in t:
        wanted["up_bias"] = (t["up"][0],)
    return wanted


def _loha_extent(t: Shapes, options: Options) -> tuple[int, int]:
    if "t1" in t:
        return t["w1_a"][1], t["w1_b"][1] * math.prod(t["t1"][2:])
    return t["w1_a"][0], t["w1_b"][1]


def _loha_wanted(t: Shapes) -> dict[str, Wanted]:
    (r, n), o = t["w1_b"], t["w1_a"][1 if "t1" in t else 0]
    wanted: dict[str, Wanted] = {}
    for half in ("1", "2"):
        wanted[f"w{half}_a"] = (r, o) if "t1" in t else (o, r)
        wanted[f"w{half}_b"] = (r, n)
        if "t1" in t:
            wanted[f"t{half}"] = (r, r, *t["t1"][2:])
    return wanted


def lokr_cuts(t: Shapes) -> tuple[tuple[int, int], tuple[int, int], Shape]:
    """(a, b), (c, d) and the kernel of a LoKr: o = a·b, i = c·d.

    Flat low-rank w2 hides the kernel: it is then counted into d and returned as ().
    """
    a = t["w1"][0] if "w1" in t else t["w1_a"][0]
    c = t["w1"][1] if "w1" in t else t["w1_b"][1]
    if "w2" in t:
        return (a, t["w2"][0]), (c, t["w2"][1]), t["w2"][2:]
    if "t2" in t:
        return (a, t["w2_a"][1]), (c, t["w2_b"][1]), t["t2"][2:]
    return (a, t["w2_a"][0]), (c, math.prod(t["w2_b"][1:])), ()


def _lokr_extent(t: Shapes, options: Options) -> tuple[int, int]:
    (a, b), (c, d), kernel = lokr_cuts(t)
    return a * b, c * d * math.prod(kernel)


def _lokr_wanted(t: Shapes) -> dict[str, Wanted]:
    wanted: dict[str, Wanted] = {}
    if "w1_a" in t:
        wanted["w1_a"] = (None, t["w1_b"][0])
    if "t2" in t:
        wanted["t2"] = (t["w2_a"][0], t["w2_b"][0], *(None,) * (len(t["t2"]) - 2))
        wanted["w2_b"] = (None, None)
    elif "w2_a" in t:
        wanted["w2_a"] = (None, t["w2_b"][0])
    return wanted


def _spatial_kernel(*slots: str) -> Callable[[Shapes], Shape | None]:
    """The kernel as the first of the slots that is there has it."""
    return lambda t: next((t[slot][2:] for slot in slots if slot in t), None)


def _same_length(whole: str, bias: str) -> Callable[[Shapes], dict[str, Wanted]]:
    def wanted(t: Shapes) -> dict[str, Wanted]:
        return {bias: (t[whole][0],)} if whole in t and bias in t else {}

    return wanted


def _ia3_extent(t: Shapes, options: Options) -> tuple[int, int]:
    """(o, 0) or (0, i), of which a convolution's i does not tell i·∏k."""
    shape = next(iter(t.values()))
    if options.get("on_input"):
        return 0, math.prod(shape) if len(shape) < 3 else 0
    return math.prod(shape), 0


def _ia3_wanted(t: Shapes) -> dict[str, Wanted]:
    """Factors of one side, whatever dimensions of 1 stand around them."""
    return {slot: (math.prod(s),) for slot, s in t.items() if max(s) != math.prod(s)}


def _full_extent(t: Shapes, options: Options) -> tuple[int, int]:
    shape = t["diff"] if "diff" in t else (t["diff_b"][0], 0)
    return shape[0], math.prod(shape[1:])


_MATRIX, _ROW, _CORE, _ANY, _WIDE = (2, 2), (1, 1), (3, 5), (1, 5), (2, 5)
_W1, _W2 = (("w1",), ("w1_a", "w1_b")), (("w2",), ("w2_a", "w2_b"), ("w2_a", "w2_b", "t2"))
_HALVES = ("w1_a", "w1_b", "w2_a", "w2_b")
_LORA_FIELDS: dict[str, Any] = {
    "rank_pattern": {}, "alpha_pattern": {}, "r": 8, "lora_alpha": 8, "lora_dropout": 0.0,
    "fan_in_fan_out": False, "bias": "none", "use_rslora": False, "use_dora": False,
    "lora_bias": False, "init_lora_weights": True,
}  # fmt: skip
_LOHA_FIELDS: dict[str, Any] = {
    "rank_pattern": {}, "alpha_pattern": {}, "rank_dropout": 0.0, "module_dropout": 0.0,
    "init_weights": True, "r": 8, "alpha": 8, "use_effective_conv2d": False,
}  # fmt: skip
_LOKR_FIELDS: dict[str, Any] = _LOHA_FIELDS | {
    "decompose_both": False, "decompose_factor": -1, "rank_dropout_scale": False,
}  # fmt: skip

# A new algorithm: its row here. ``state`` says the slots' shapes in words.
TRAITS: dict[str, Traits] = {
    row.name: row
    for row in (
        Traits(
            name="lora",
            title="LoRA",
            dims={"up": _WIDE, "down": _WIDE, "mid": _CORE, "up_bias": _ROW, "magnitude": _ANY},
            complete=(("up", "down"), ("up", "down", "mid")),
            extent=_lora_extent,
            kernel=_lora_kernel,
            wanted=_lora_wanted,
            ranks=(("down", 0),),
            rows=("up", "up_bias", "magnitude"),
            factor=("up",),
            shifts=("up_bias",),
            spatial=("down", "mid"),
            pointwise=("up",),
            cores=("mid",),
            low_rank=True,
            peft_type="LORA",
            config="LoraConfig",
            peft_fields=_LORA_FIELDS,
            extracts=True,
        ),
        Traits(
            name="loha",
            title="LoHa",
            dims={
                **dict.fromkeys(_HALVES, _MATRIX),
                "w2_b": _WIDE,
                "t1": _CORE,
                "t2": _CORE,
                "magnitude": _ANY,
            },
            complete=(_HALVES, (*_HALVES, "t1", "t2")),
            extent=_loha_extent,
            kernel=_spatial_kernel("t2"),
            wanted=_loha_wanted,
            ranks=(("w1_b", 0),),
            rows=("w1_a", "w2_a", "magnitude"),
            transposes_core=True,
            factor=("w1_a",),
            spatial=("t1", "t2"),
            cores=("t1", "t2"),
            low_rank=True,
            peft_type="LOHA",
            config="LoHaConfig",
            peft_fields=_LOHA_FIELDS,
            extracts=True,
        ),
        Traits(
            name="lokr",
            title="LoKr",
            dims={
                **dict.fromkeys(("w1", "w1_a", "w1_b"), _MATRIX),
                "w2": _WIDE,
                "w2_a": _MATRIX,
                "w2_b": _WIDE,
                "t2": _CORE,
                "magnitude": _ANY,
            },
            complete=tuple(a + b for a in _W1 for b in _W2),
            extent=_lokr_extent,
            kernel=_spatial_kernel("t2", "w2"),
            wanted=_lokr_wanted,
            ranks=(("w2_b", 0), ("w1_b", 0)),
            rows=("w1", "w1_a", "magnitude"),
            unit=lambda t: lokr_cuts(t)[0][1],
            factor=("w1_a", "w1"),
            spatial=("t2", "w2"),
            cores=("t2",),
            low_rank=True,
            peft_type="LOKR",
            config="LoKrConfig",
            peft_fields=_LOKR_FIELDS,
            extracts=True,
        ),
        Traits(
            name="hra",
            title="HRA",
            dims={"u": _MATRIX},
            complete=(("u",),),
            extent=lambda t, _: (0, t["u"][0]),
            ranks=(("u", -1),),
            partial=False,
            options={"apply_gs": False},
            adds=False,
            turns=True,
            weighs=False,
            scaled=False,
            peft_type="HRA",
            config="HRAConfig",
            peft_fields={"r": 8, "apply_GS": False, "init_weights": True, "bias": "none"},
            extracts=True,
        ),
        Traits(
            name="ia3",
            title="(IA)³",
            dims={"l": _ANY, "w": _ANY},
            complete=(("l",), ("w",)),
            extent=_ia3_extent,
            wanted=_ia3_wanted,
            cuts=False,
            partial=False,
            options={"on_input": False},
            scales_bias=lambda t, options: "l" in t and not options.get("on_input"),
            adds=False,
            scaled=False,
            peft_type="IA3",
            config="IA3Config",
            peft_lacks=("layers_to_transform", "layers_pattern"),
            peft_fields={
                "feedforward_modules": None,
                "fan_in_fan_out": False,
                "init_ia3_weights": True,
            },
        ),
        Traits(
            name="full",
            title="dense difference",
            dims={"diff": _ANY, "diff_b": _ROW},
            complete=(("diff",), ("diff", "diff_b"), ("diff_b",)),
            extent=_full_extent,
            kernel=_spatial_kernel("diff"),
            wanted=_same_length("diff", "diff_b"),
            rows=("diff", "diff_b"),
            shifts=("diff_b",),
            spatial=("diff",),
            scaled=False,
            dense=True,
        ),
        Traits(
            name="norm",
            title="norm difference",
            dims={"w_norm": _ROW, "b_norm": _ROW},
            complete=(("w_norm",), ("w_norm", "b_norm"), ("b_norm",)),
            extent=lambda t, _: (t["w_norm" if "w_norm" in t else "b_norm"][0], 1),
            wanted=_same_length("w_norm", "b_norm"),
            rows=("w_norm", "b_norm"),
            shifts=("b_norm",),
            scaled=False,
            dense=True,
            vector=True,
        ),
    )
}


def traits_of(algorithm: str) -> Traits:
    """An algorithm's row. ValueRefused ("unknown-algorithm") for a name that has none."""
    row = TRAITS.get(algorithm)
    if row is None:
        raise ValueRefused(
            f"no algorithm is called `{algorithm}`",
            next=nearest(algorithm, TRAITS) or f"one of {', '.join(TRAITS)}",
            code="unknown-algorithm",
        )
    return row


def title_of(algorithm: str) -> str:
    """How an algorithm is written in text; a name that has no row as it is."""
    return TRAITS[algorithm].title if algorithm in TRAITS else algorithm


def named(test: Callable[[Traits], bool]) -> tuple[str, ...]:
    """The names of the algorithms that a test is true of, in the table's order."""
    return tuple(name for name, row in TRAITS.items() if test(row))


class Column(Mapping[str, T], Generic[T]):
    """One trait of every algorithm as a table of its own, read from ``TRAITS`` whenever it is asked."""

    def __init__(
        self, value: Callable[[Traits], T], of: Callable[[Traits], bool] = lambda row: True
    ) -> None:
        self._value, self._of = value, of

    def __getitem__(self, algorithm: str) -> T:
        if algorithm not in self:
            raise KeyError(algorithm)
        return self._value(TRAITS[algorithm])

    def __contains__(self, algorithm: object) -> bool:
        return algorithm in TRAITS and self._of(TRAITS[str(algorithm)])

    def __iter__(self) -> Iterator[str]:
        return iter(named(self._of))

    def __len__(self) -> int:
        return len(named(self._of))
