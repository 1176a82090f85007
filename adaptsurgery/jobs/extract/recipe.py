"""What an extraction's plan depends on, as plain data, and what cannot be asked of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adaptsurgery.jobs.options.extraction import AUTO, offered
from adaptsurgery_formats import FORMATS, WRITABLE, ModuleState
from adaptsurgery_formats.errors import InexactError, LayoutError, ValueRefused, nearest

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


@dataclass(frozen=True)
class ExtractRecipe:
    """How a plan is carried out; every field is a part of its digest.

    ``goal`` is one of "rank", "energy", "max_error", "budget" with its ``value``; a budget is of
    the whole adapter. ``conv_rank`` is for kernels other than 1. ``ranks`` overrule both by PEFT's
    rank_pattern.
    """

    algorithm: str
    goal: str
    value: float
    to: str = "peft"
    factor: int | None = None
    decompose_both: bool = False
    conv_rank: int | None = None
    tucker: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    dtype: str = "fp32"
    seed: int = 0
    dense: bool = True
    compare: bool = False
    curves: bool = False
    allow_empty: bool = False
    allow_nonfinite: bool = False

    @property
    def exact_goal(self) -> bool:
        """Whether the goal is an error or an energy, which ranks follow from."""
        return self.goal in ("energy", "max_error")


def check_options(options: ExtractRecipe) -> None:
    """Refuse options that have no meaning, or no effect."""
    for name, value, known in (
        ("algorithm", options.algorithm, offered()),
        ("to", options.to, WRITABLE),
        ("dtype", options.dtype, tuple(DTYPES)),
    ):
        if value not in known:
            raise ValueRefused(
                f"--{name} {value} is not offered",
                next=nearest(value, known) or f"one of {', '.join(known)}",
                code="no-such-option",
            )
    _refuse_unheld(options)
    _refuse_idle(options)


def _refuse_unheld(options: ExtractRecipe) -> None:
    """Refuse a target that has no module of the algorithm at all."""
    if options.algorithm == AUTO:
        return
    unheld = FORMATS[options.to].holds(ModuleState("", options.algorithm, {}), None)
    if unheld is not None:
        holders = [
            name
            for name in WRITABLE
            if FORMATS[name].holds(ModuleState("", options.algorithm, {}), None) is None
        ]
        raise InexactError(
            unheld.what,
            next=" or ".join([*(f"--to {name}" for name in holders), "--algorithm lora"]),
            code=unheld.code,
        )


def _refuse_idle(options: ExtractRecipe) -> None:
    """ExtractRecipe that the algorithm has no use for."""
    kronecker = options.algorithm in ("lokr", AUTO)
    coreable = kronecker or (options.algorithm == "lora" and options.to != "peft")
    idle = {
        "--factor": options.factor is not None and not kronecker,
        "--decompose-both": options.decompose_both and not kronecker,
        "--tucker": options.tucker and not coreable,
    }
    for name, wrong in idle.items():
        if wrong:
            raise LayoutError(
                f"{name} has no effect on {options.algorithm} in {options.to}",
                next="it is for lokr, and for lora beyond PEFT, which has no core in its LoRA"
                if name == "--tucker"
                else "it is for --algorithm lokr",
                code="option-without-effect",
            )
    if options.algorithm == "hra" and options.ranks:
        raise InexactError(
            "PEFT's HRA has one rank for all modules, and no rank_pattern",
            next="leave --rank-pattern out",
            code="hra-ranks",
        )
