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

# safetensors' dtype names and the bits of an element, in the order in which the library writes them.
DTYPE_BITS = {
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F32": 32, "U32": 32, "I32": 32,
    "BF16": 16, "F16": 16, "U16": 16, "I16": 16,
    "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8,
    "F6_E3M2": 6, "F6_E2M3": 6, "F4": 4, "BOOL": 8,
}  # fmt: skip
# The bytes of an element, of the dtypes whose elements have whole ones.
DTYPE_BYTES = {dtype: bits // 8 for dtype, bits in DTYPE_BITS.items() if bits % 8 == 0}
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_STRUCT = {
    "F64": "<d",
    "F32": "<f",
    "F16": "<e",
    "I64": "<q",
    "I32": "<i",
    "I16": "<h",
    "I8": "<b",
    "U64": "<Q",
    "U32": "<I",
    "U16": "<H",
    "U8": "<B",
}


def bytes_of(dtype: str, shape: Iterable[int]) -> int:
    """The bytes of a tensor: ∏ shape elements, several of which share a byte in F4 and F6."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def is_packed(dtype: str) -> bool:
    """Whether elements are smaller than a byte, so that a row may end within one."""
    return dtype not in DTYPE_BYTES


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
        return bytes_of(self.dtype, self.shape)

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
        row = bytes_of(self.dtype, self.shape[1:])
        if row * self.shape[0] != self.nbytes:
            raise ShapeError(f"a row of {self.dtype} {list(self.shape)} ends within a byte")
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
