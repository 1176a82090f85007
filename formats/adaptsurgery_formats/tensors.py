"""Lazy tensors: a dtype, a shape, and the places where the bytes lie.

Reshapes, row slices and row concatenations only move the places about, so a conversion that
changes nothing but keys never decodes a number and needs neither numpy nor torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from adaptsurgery_formats.errors import ShapeError, ValueRefused

# safetensors' dtype names and their sizes in bytes.
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8,
}  # fmt: skip
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_STRUCT = {
    "F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b",
    "U64": "<Q", "U32": "<I", "U16": "<H", "U8": "<B",
}  # fmt: skip


@runtime_checkable
class Part(Protocol):
    """A run of bytes: a window of a file, a literal, or something computed when it is read."""

    @property
    def nbytes(self) -> int: ...

    def window(self, start: int, stop: int) -> Part:
        """The bytes [start, stop) of this run."""
        ...

    def read(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes that are at hand: an alpha that is written anew, rows of zeros."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def window(self, start: int, stop: int) -> Literal:
        return Literal(self.data[start:stop])

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor by reference, in row-major order: parts follow one another."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]

    def read(self) -> bytes:
        return b"".join(p.read() for p in self.parts)

    def reshape(self, *shape: int) -> Tensor:
        """The same bytes under another shape; raises ShapeError if the counts differ."""
        if math.prod(shape) != self.numel:
            raise ShapeError(f"cannot view {list(self.shape)} as {list(shape)}")
        return Tensor(self.dtype, tuple(shape), self.parts)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the first dimension: shape (stop − start, …)."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise ShapeError(f"rows {start}:{stop} of a tensor of shape {list(self.shape)}")
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        kept: list[Part] = []
        at, low, high = 0, start * row, stop * row
        for part in self.parts:
            a, b = max(low - at, 0), min(high - at, part.nbytes)
            if a < b:
                kept.append(part if (a, b) == (0, part.nbytes) else part.window(a, b))
            at += part.nbytes
        return Tensor(self.dtype, (stop - start, *self.shape[1:]), tuple(kept))

    def item(self) -> float:
        """The number in a one-element tensor of any float or integer dtype."""
        if self.numel != 1:
            raise ShapeError(f"a single number was expected, not shape {list(self.shape)}")
        data = self.read()
        if self.dtype == "BF16":
            return float(struct.unpack("<f", b"\0\0" + data)[0])
        if self.dtype not in _STRUCT:
            raise ValueRefused(f"a number of dtype {self.dtype} cannot be read")
        return float(struct.unpack(_STRUCT[self.dtype], data)[0])


def concat_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors stacked along the first dimension, by reference."""
    first = tensors[0]
    for t in tensors[1:]:
        if t.dtype != first.dtype or t.shape[1:] != first.shape[1:]:
            raise ShapeError(
                f"cannot stack {t.dtype} {list(t.shape)} under {first.dtype} {list(first.shape)}"
            )
    rows = sum(t.shape[0] for t in tensors)
    return Tensor(first.dtype, (rows, *first.shape[1:]), tuple(p for t in tensors for p in t.parts))


def scalar(value: float, dtype: str = "F32") -> Tensor:
    """A 0-d tensor that holds ``value``."""
    if dtype == "BF16":
        data = struct.pack("<f", value)[2:]
    else:
        number = value if dtype in FLOAT_DTYPES else int(value)
        data = struct.pack(_STRUCT[dtype], number)
    return Tensor(dtype, (), (Literal(data),))


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes: by reference where that tells, else by reading."""
    if a.dtype != b.dtype or a.numel != b.numel:
        return False
    return a.parts == b.parts or a.read() == b.read()


def total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)
