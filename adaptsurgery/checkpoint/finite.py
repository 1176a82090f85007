"""NaN and infinity found in raw bytes, with nothing but slices and memory searches.

A float is not finite exactly when its exponent bits are all ones. The exponent lies in the last
one or two bytes of a little-endian number, so the last bytes alone, a strided slice, tell nearly
everything: one search for 0x7f and one for 0xff settles a block of F32, BF16 or F64 (which hold
such a byte only from 2^127 or 2^1009 on), and eight searches settle F16. A block with a suspect
byte is settled exactly by one AND of two strided slices.
"""

from __future__ import annotations

from collections.abc import Iterator

from adaptsurgery.checkpoint.safetensors import Span
from adaptsurgery_formats.tensors import Literal, Part, Tensor, is_packed

BLOCK = 256 * 1024  # stays in a core's cache; measured best between 128 KiB and 1 MiB


class _Exponent:
    """Where a dtype's exponent lies: in the last byte, and in the one before it (mask 0: not)."""

    def __init__(self, width: int, last_mask: int, before_mask: int) -> None:
        self.width = width
        self.last = _table(last_mask)
        self.before = _table(before_mask) if before_mask else b""
        self.suspects = [byte for byte in range(256) if self.last[byte]]


def _table(mask: int) -> bytes:
    """A translation to 1 for the bytes whose masked bits are all ones, and to 0 for the others."""
    return bytes(int(byte & mask == mask) for byte in range(256))


# C64 is looked at as pairs of F32.
_EXPONENTS = {
    "F64": _Exponent(8, 0x7F, 0xF0),
    "F32": _Exponent(4, 0x7F, 0x80),
    "C64": _Exponent(4, 0x7F, 0x80),
    "BF16": _Exponent(2, 0x7F, 0x80),
    "F16": _Exponent(2, 0x7C, 0x00),
}


def scanned(dtype: str) -> bool:
    """Whether the dtype can hold NaN or infinity in the sense of this module (fp8 is not read)."""
    return dtype in _EXPONENTS


def first_nonfinite(dtype: str, block: bytes | bytearray) -> int:
    """The byte offset of the first NaN or infinity in a block of whole numbers, or -1."""
    exponent = _EXPONENTS[dtype]
    last = block[exponent.width - 1 :: exponent.width]
    if not any(suspect in last for suspect in exponent.suspects):
        return -1
    marks = last.translate(exponent.last)
    if exponent.before:
        before = block[exponent.width - 2 :: exponent.width].translate(exponent.before)
        both = int.from_bytes(marks, "little") & int.from_bytes(before, "little")
        marks = both.to_bytes(len(last), "little")
    found = marks.find(1)
    return found * exponent.width if found >= 0 else -1


def find_nonfinite(tensor: Tensor) -> int | None:
    """The flat index of a tensor's first NaN or infinity, or None; None for integer and fp8.

    Reads the tensor part by part, in blocks; raises FileError as the parts do.
    """
    if not scanned(tensor.dtype) or not tensor.numel:
        return None
    width = tensor.nbytes // tensor.numel
    at = 0
    for part in whole_numbers(tensor):
        for block in _blocks(part):
            found = first_nonfinite(tensor.dtype, block)
            if found >= 0:
                return (at + found) // width
            at += len(block)
    return None


def whole_numbers(tensor: Tensor) -> tuple[Part, ...]:
    """A tensor's parts, or all its bytes in one where a part ends within a number."""
    if len(tensor.parts) > 1 and tensor.numel and not is_packed(tensor.dtype):
        width = tensor.nbytes // tensor.numel
        if any(part.nbytes % width for part in tensor.parts):
            return (Literal(tensor.read()),)
    return tensor.parts


def _blocks(part: Part) -> Iterator[bytes]:
    if isinstance(part, Span):
        for start in range(0, part.nbytes, BLOCK):
            yield part.window(start, min(start + BLOCK, part.nbytes)).read()
    else:
        yield from cut(part)


def cut(part: Part) -> Iterator[bytes]:
    """The bytes of a part that is not in a file, read once, in blocks.

    A part with a ``buffer()`` lends its memory instead of copying it.
    """
    lend = getattr(part, "buffer", part.read)
    data = memoryview(lend())
    for start in range(0, len(data), BLOCK):
        yield bytes(data[start : start + BLOCK])
