"""NaN and infinity found in raw bytes, with nothing but slices and memory searches.

A float is not finite exactly when its exponent bits are all ones. The exponent lies in the last
one or two bytes of a little-endian number, so the last bytes alone, a strided slice, tell nearly
everything: one search for 0x7f and one for 0xff settles a block of F32, BF16 or F64 (which hold
such a byte only from 2^127 or 2^1009 on), and eight searches settle F16. A block with a suspect
byte is settled exactly by one AND of two strided slices. The numbers of fp8 are bytes themselves.

The rule for what becomes of such numbers is ``Nonfinite``'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import or_

from adaptsurgery.checkpoint.safetensors import Span
from adaptsurgery_formats import Note
from adaptsurgery_formats.tensors import DTYPE_BITS, Literal, Part, Tensor, is_packed

BLOCK = 256 * 1024  # stays in a core's cache; measured best between 128 KiB and 1 MiB
_SHOWN = 3  # tensors that a note names


@dataclass
class Nonfinite:
    """How many numbers of an output are NaN or infinite, by tensor; one rule for every job.

    What is only copied is never refused: its bytes are what they were, and where they are read on
    the way they are counted as ``copied``. What is computed or cast is refused, unless it is
    ``allowed``: then it is counted as ``computed``.
    """

    allowed: bool = False
    copied: Counter[str] = field(default_factory=Counter)
    computed: Counter[str] = field(default_factory=Counter)

    def notes(self, where: str) -> list[Note]:
        """What there is to tell of the output ``where``."""
        kinds = (
            ("nonfinite-copied", self.copied, "copied as they were"),
            ("nonfinite-written", self.computed, "written, as --allow-nonfinite says"),
        )
        return [Note(code, where, f"{listed(c)}: {text}") for code, c, text in kinds if c]


def listed(counts: Mapping[str, int]) -> str:
    """ "5 numbers that are NaN or infinite in 2 tensors (`a` 4, `b` 1)"."""
    shown = ", ".join(f"`{key}` {count}" for key, count in list(counts.items())[:_SHOWN])
    more = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
    total = sum(counts.values())
    numbers = "number that is" if total == 1 else "numbers that are"
    tensors = "tensor" if len(counts) == 1 else "tensors"
    return f"{total} {numbers} NaN or infinite in {len(counts)} {tensors} ({shown}{more})"


class _Exponent:
    """Where a dtype's exponent lies: in the last byte, and in the one before it (mask 0: not)."""

    def __init__(self, width: int, last_mask: int, before_mask: int) -> None:
        self.width = width
        self.last = _table(last_mask)
        self.before = _table(before_mask) if before_mask else b""
        self.suspects = [byte for byte in range(256) if self.last[byte]]


class _Bytes(_Exponent):
    """A number of one byte, and the bytes that stand for NaN or infinity."""

    def __init__(self, *suspects: int) -> None:
        self.width, self.before, self.suspects = 1, b"", list(suspects)
        self.last = bytes(int(byte in suspects) for byte in range(256))


def _table(mask: int) -> bytes:
    """A translation to 1 for the bytes whose masked bits are all ones, and to 0 for the others."""
    return bytes(int(byte & mask == mask) for byte in range(256))


# C64 is looked at as pairs of F32, of which one is enough.
_EXPONENTS = {
    "F64": _Exponent(8, 0x7F, 0xF0),
    "F32": _Exponent(4, 0x7F, 0x80),
    "C64": _Exponent(4, 0x7F, 0x80),
    "BF16": _Exponent(2, 0x7F, 0x80),
    "F16": _Exponent(2, 0x7C, 0x00),
    "F8_E5M2": _Exponent(1, 0x7C, 0x00),
    "F8_E4M3": _Bytes(0x7F, 0xFF),
    "F8_E8M0": _Bytes(0xFF),
    "F8_E4M3FNUZ": _Bytes(0x80),
    "F8_E5M2FNUZ": _Bytes(0x80),
}


def scanned(dtype: str) -> bool:
    """Whether the dtype can hold NaN or infinity."""
    return dtype in _EXPONENTS


def width_of(dtype: str) -> int:
    """Bytes of a number that is looked at."""
    return DTYPE_BITS[dtype] // 8


def marks_of(dtype: str, block: bytes | bytearray) -> bytes | None:
    """A byte for each of a block's whole numbers, 1 where it is NaN or infinite; None if none is."""
    exponent = _EXPONENTS[dtype]
    last = block[exponent.width - 1 :: exponent.width]
    if not any(suspect in last for suspect in exponent.suspects):
        return None
    marks = last.translate(exponent.last)
    if exponent.before:
        before = block[exponent.width - 2 :: exponent.width].translate(exponent.before)
        both = int.from_bytes(marks, "little") & int.from_bytes(before, "little")
        marks = both.to_bytes(len(last), "little")
    if 1 not in marks:
        return None
    return bytes(map(or_, marks[::2], marks[1::2])) if dtype == "C64" else bytes(marks)


def first_nonfinite(dtype: str, block: bytes | bytearray) -> int:
    """The byte offset of the first NaN or infinity in a block of whole numbers, or -1."""
    marks = marks_of(dtype, block)
    return -1 if marks is None else marks.find(1) * width_of(dtype)


def find_nonfinite(tensor: Tensor) -> int | None:
    """The flat index of a tensor's first NaN or infinity, or None; None for integers.

    Reads the tensor part by part, in blocks; raises FileError as the parts do.
    """
    if not scanned(tensor.dtype) or not tensor.numel:
        return None
    width = tensor.nbytes // tensor.numel
    at = 0
    for part in whole_numbers(tensor):
        for block in _blocks(part):
            index = first_nonfinite(tensor.dtype, block)
            if index >= 0:
                return (at + index) // width
            at += len(block)
    return None


def count_nonfinite(tensor: Tensor) -> int:
    """How many of a tensor's numbers are NaN or infinite.

    Reads the tensor; raises FileError as its parts do.
    """
    if not scanned(tensor.dtype) or not tensor.numel:
        return 0
    total = 0
    for part in whole_numbers(tensor):
        for block in _blocks(part):
            marks = marks_of(tensor.dtype, block)
            total += 0 if marks is None else marks.count(1)
    return total


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
