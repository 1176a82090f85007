"""(IA)³: a factor an output or an input of the layer (arXiv 2205.05638).

    l   (o, 1), (1, i); (1, n, 1, …) of a convolution       PEFT: W' = W ∘ l, and b' = b ∘ l of outputs
    w   (n,); (1, n, 1, …) of a convolution                 LyCORIS: W' = W ∘ (1 + w), the bias as it is

An IA3 has one of the two. ``on_input`` says that its n numbers are the inputs' (PEFT's feedforward).
At a strength s the factors are 1 + s·(l − 1), or 1 + s·w, LyCORIS's multiplier.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptsurgery.core.config import AdapterConfig, Shapes
from adaptsurgery.core.update import Scaling, widened
from adaptsurgery_formats.errors import ShapeError
from adaptsurgery_formats.traits import traits_of


@dataclass(frozen=True, eq=False, kw_only=True)
class IA3(Scaling):
    """W' = W ∘ l. ShapeError unless it is l or w, and one of its dimensions holds all its numbers."""

    l: Tensor | None = None  # noqa: E741
    w: Tensor | None = None
    on_input: bool = False

    name: ClassVar[str] = "ia3"

    def __post_init__(self) -> None:
        held = self.tensors()
        if len(held) != 1:
            raise ShapeError("ia3: one of l and w, not both and not none", seen=", ".join(held))
        ((slot, numbers),) = held.items()
        if not numbers.numel() or max(numbers.shape, default=0) != numbers.numel():
            seen = f"{slot} {list(numbers.shape)}"
            raise ShapeError(f"ia3: {slot} is not (n,) with ones around it", seen=seen)

    @property
    def axis(self) -> int:
        return int(self.on_input)

    @property
    def on_bias(self) -> bool:
        return self.l is not None and not self.on_input

    def less_one(self) -> Tensor:
        if self.w is not None:
            return widened(self.w).flatten()
        assert self.l is not None
        return widened(self.l).flatten() - 1


@dataclass(kw_only=True)
class IA3Config(AdapterConfig):
    """PEFT's IA3Config: no rank and no alpha. It starts at l = 1.

    ``feedforward_modules`` are those of the target modules whose inputs are scaled: a regex of the
    whole name, or ends of names. Both have to be said; PEFT's tables of models are not looked up.
    """

    feedforward_modules: Collection[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    algorithm: ClassVar[str] = "ia3"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv2d", "conv3d"})
    on_input: ClassVar[bool] = False  # of the module that ``for_module`` was asked for

    def check(self) -> None:
        for name in ("target_modules", "feedforward_modules"):
            if getattr(self, name) is None:
                hint = "the names, [] for none; the defaults of PEFT's table are LoRA's here"
                raise self._refused(name, None, hint)
        for name in traits_of(self.algorithm).peft_lacks:
            if getattr(self, name) is not None:
                raise self._refused(name, getattr(self, name), "PEFT's IA3Config has no such field")
        super().check()

    @property
    def _init_field(self) -> str:
        return "init_ia3_weights"

    @property
    def options(self) -> dict[str, Any]:
        return {"on_input": self.on_input}

    def to_dict(self) -> dict[str, Any]:
        lacking = ("r", *traits_of(self.algorithm).peft_lacks)
        return {name: value for name, value in super().to_dict().items() if name not in lacking}

    def for_module(self, name: str) -> IA3Config:
        from adaptsurgery_formats.peft import is_feedforward

        chosen = copy.copy(self)
        chosen.__dict__["on_input"] = is_feedforward(name, self.feedforward_modules, "IA3Config")
        return chosen

    def shapes(self, shape: tuple[int, ...], rank: int, kind: str = "linear") -> Shapes:
        count = shape[int(self.on_input)]
        ones = (1,) * (len(shape) - 2)
        return {"l": (count, 1) if not ones and not self.on_input else (1, count, *ones)}

    def assembled(self, tensors: dict[str, Tensor], scale: float, shape: tuple[int, ...]) -> IA3:
        return IA3(l=tensors["l"], on_input=self.on_input)

    def initialise(
        self, tensors: dict[str, Tensor], kind: str, generator: torch.Generator | None
    ) -> None:
        if self.init_ia3_weights:
            tensors["l"].fill_(1)
        else:
            tensors["l"].normal_(generator=generator)
