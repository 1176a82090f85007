"""Rows of stored tensors, of which a module's weight is made.

Besides the stored modules themselves, a module may be::

    self_attn.q_proj          rows [0, q) of a stored self_attn.qkv_proj       (Phi-3)
    self_attn.qkv_proj        stored q_proj, k_proj and v_proj, one below the other
    mlp.experts.3.gate_proj   rows of slice 3 of a stored experts.gate_up_proj (E, 2·o, i)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


class Shaped(Protocol):
    """What has a shape: a tensor, a place in a file, or the shape alone."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape alone."""

    shape: tuple[int, ...]


Parameters = Mapping[str, Shaped]  # parameter name → what has its shape


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [start, stop) of the canonical form (o, i, *k) of what ``name`` names; a stop of 0 takes
    all.

    ``name`` is a stored tensor's, or in the tables of models a module's. ``index`` picks a slice of
    a stacked (E, …) tensor. ``turned``: the tensor is stored (…, i, o); None where shapes have to
    tell.
    """

    name: str
    start: int = 0
    stop: int = 0
    index: int | None = None
    turned: bool | None = None

    @property
    def count(self) -> int:
        """How many rows these are; 0 stands for all."""
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        """Whether these are all rows of a tensor that is no stack."""
        return self.stop == 0 and self.index is None


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """The rows that are one module's weight, one below the other.

    ``part`` 0, 1 or 2 says that it is the q, k or v of its one tensor: how many rows that is, only a
    config or the adapters' own shapes tell (see ``cuts``). ``refused`` says why it cannot be changed
    by itself. ``tied`` names the parameter that would have to be written apart: an output head that
    is the embedding.
    """

    rows: tuple[Rows, ...]
    part: int = -1
    refused: str = ""
    tied: str = ""

    @property
    def module(self) -> str:
        """The path of the stored module that this is the whole of, or ""."""
        first = self.rows[0]
        if len(self.rows) > 1 or not first.whole or self.part >= 0 or self.refused or self.tied:
            return ""
        return first.name.removesuffix(".weight") if first.name.endswith(".weight") else ""


StoredWeights = Mapping[str, StoredWeight]  # module path → its weight


def shape_of(rows: tuple[Rows, ...], parameters: Parameters) -> tuple[int, ...]:
    """The shape of rows one below the other: (Σ rows, i, *k), or a single tensor's as it is stored
    where nothing says that it is stored (i, o)."""
    shapes = [_shape(piece, parameters[piece.name].shape) for piece in rows]
    return (sum(s[0] for s in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]


def _shape(piece: Rows, stored: tuple[int, ...]) -> tuple[int, ...]:
    shape = stored if piece.index is None else stored[1:]
    shape = shape[::-1] if piece.turned else shape
    return (piece.count, *shape[1:]) if piece.stop else shape
