"""PEFT's LoraConfig: which LoRA, or which DoRA around one, a layer gets, and its initial values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsurgery.algorithms.dora import DoRA
from adaptsurgery.algorithms.lora import LoRA
from adaptsurgery.core.config import PatternConfig, Shapes, kaiming_
from adaptsurgery.core.update import Update, widened
from adaptsurgery_formats.errors import ValueRefused


@dataclass(kw_only=True)
class LoraConfig(PatternConfig):
    """PEFT's LoraConfig: scale lora_alpha/r, or lora_alpha/√r with ``use_rslora`` (arXiv 2312.03732).

    ``use_dora`` sets norms of its own (arXiv 2402.09353), ``lora_bias`` a bias beside ``up``.
    ``init_lora_weights``: True, up = 0; "gaussian", the same with normal numbers of 1/r;
    "orthogonal", both apart from 0 with product 0; False, neither 0. "eva" needs data and is read,
    not made. On a convolution with groups ΔW = up·down has the weight's own shape, (o, i/groups, *k);
    PEFT's lets every group see all inputs, which no ΔW does.
    """

    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True

    algorithm: ClassVar[str] = "lora"
    kinds: ClassVar[frozenset[str]] = PatternConfig.kinds | {"embedding"}
    inits: ClassVar[tuple[Any, ...]] = (True, False, "gaussian", "orthogonal", "eva")
    biases: ClassVar[tuple[str, ...]] = ("none", "all", "lora_only")

    @property
    def _init_field(self) -> str:
        return "init_lora_weights"

    def seen(self, x: Tensor, kind: str = "linear") -> Tensor | None:
        """The input under lora_dropout; an embedding's indices have none, as in PEFT."""
        return (
            F.dropout(x, self.lora_dropout) if self.lora_dropout and kind != "embedding" else None
        )

    def check(self) -> None:
        super().check()
        if self.lora_bias and (self.use_dora or self.init_lora_weights not in (True, False)):
            raise ValueRefused(
                "lora_bias goes with neither use_dora nor a special init_lora_weights",
                where="LoraConfig",
                code="bad-config",
            )

    def shapes(self, shape: tuple[int, ...], rank: int, kind: str = "linear") -> Shapes:
        o, i, *k = shape
        ones = (1,) * len(k)
        slots: Shapes = {"up": (o, rank, *ones), "down": (rank, i, *k)}
        if self.lora_bias:
            slots["up_bias"] = (o,)
        if self.use_dora:
            slots["magnitude"] = (o, 1, *ones)
        return slots

    def assembled(self, tensors: dict[str, Tensor], scale: float, shape: tuple[int, ...]) -> Update:
        slots = {name: tensor for name, tensor in tensors.items() if name != "magnitude"}
        delta = LoRA(**slots, scale=scale, weight_shape=shape)
        return DoRA(delta, tensors["magnitude"]) if self.use_dora else delta

    def initialise(
        self, tensors: dict[str, Tensor], kind: str, generator: torch.Generator | None
    ) -> None:
        up, down, how = tensors["up"], tensors["down"], self.init_lora_weights
        embedding = kind == "embedding"
        if how == "eva":
            raise ValueRefused("init_lora_weights 'eva' needs data", code="bad-config")
        if how == "orthogonal":
            _orthogonal_(up, down, generator)
        elif embedding:  # as nn.Embedding's own
            nn.init.normal_(up, generator=generator)
            nn.init.zeros_(down) if how else nn.init.normal_(down, generator=generator)
        else:
            if how == "gaussian":
                nn.init.normal_(down, std=1 / down.shape[0], generator=generator)
            else:
                kaiming_(down, generator)
            nn.init.zeros_(up) if how else kaiming_(up, generator)
        if "up_bias" in tensors:
            reach = 0.0 if how else up.shape[1] ** -0.5
            nn.init.uniform_(tensors["up_bias"], -reach, reach, generator=generator)

    def finish(self, update: Update, weight: Tensor | None) -> None:
        if not self.use_dora:
            return
        assert isinstance(update, DoRA)
        if weight is None:
            raise ValueRefused("a DoRA's first norms are the weight's", next="pass weight")
        norms = update.inner.norms(widened(weight), update.axis)
        update.magnitude.copy_(norms.view_as(update.magnitude))


def _orthogonal_(up: Tensor, down: Tensor, generator: torch.Generator | None) -> None:
    """up = X·Q1, down = (Y·Q2)ᵀ with Q1, Q2 the halves of an orthogonal matrix, so up·down = 0."""
    rank = down.shape[0]
    if rank % 2 or down.dim() > 2:
        what = f"rank {rank}" if rank % 2 else "a convolution"
        raise ValueRefused(
            f"orthogonal initial values are for an even rank and matrices, not {what}",
            next="init_lora_weights=True",
            code="no-initial-value",
        )
    device, sides = down.device, (rank, down.shape[1], up.shape[0])
    normal = [
        nn.init.normal_(torch.empty(side, rank // n, device=device), generator=generator)
        for side, n in zip(sides, (1, 2, 2))
    ]
    whole = torch.linalg.qr(normal[0]).Q
    down.copy_((normal[1] @ whole[::2]).t() / 10)
    up.copy_(normal[2] @ whole[1::2] / 10)
