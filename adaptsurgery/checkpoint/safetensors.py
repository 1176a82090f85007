"""The strict, header-only reader of safetensors files.

A file is an 8-byte little-endian length n, n bytes of JSON, and the data::

    {"__metadata__": {"format": "pt"},
     "a.weight": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}, …}

Every byte of the data belongs to exactly one tensor. Anything else is refused here, so that later
code may trust what it is handed. Only the header is read; tensors are spans of the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from adaptsurgery.checkpoint import system
from adaptsurgery.checkpoint.failures import as_file_error
from adaptsurgery.checkpoint.header import Entry, bad_header, duplicate_key, header_members, short
from adaptsurgery_formats.errors import FileError
from adaptsurgery_formats.tensors import DTYPE_BITS, Tensor

MAX_HEADER = 100_000_000  # the safetensors library's own limit
_MAX_ELEMENTS = 1 << 60
_LARGE = 6 << 20  # a header's bytes from which on it is gone through before anything is kept


@dataclass(frozen=True, slots=True)
class Span:
    """A run of bytes in a file: the lazy ``Part`` of everything that is read from disk."""

    path: str
    offset: int
    nbytes: int

    def window(self, start: int, stop: int) -> Span:
        return Span(self.path, self.offset + start, stop - start)

    def read(self) -> bytes:
        """The bytes; raises FileError if the file is gone or has become shorter."""
        try:
            with _opened(self.path) as fd:
                return _pread(fd, self.nbytes, self.offset, self.path)
        except OSError as error:
            raise as_file_error(error, self.path, writing=False) from error


_HELD: ContextVar[dict[str, int] | None] = ContextVar("held open", default=None)


@contextmanager
def held_open() -> Iterator[None]:
    """Spans that are read within the block open each file once, and close it at the block's end."""
    held: dict[str, int] = {}
    before = _HELD.set(held)
    try:
        yield
    finally:
        _HELD.reset(before)
        for fd in held.values():
            os.close(fd)


@contextmanager
def _opened(path: str) -> Iterator[int]:
    held = _HELD.get()
    if held is not None:
        if path not in held:
            held[path] = system.open_input(path)
        yield held[path]
        return
    fd = system.open_input(path)
    try:
        yield fd
    finally:
        os.close(fd)


def _pread(fd: int, count: int, offset: int, where: str) -> bytes:
    data = system.read_at(fd, count, offset)
    while len(data) < count:
        more = system.read_at(fd, count - len(data), offset + len(data))
        if not more:
            raise cut_short(where, offset + count, offset + len(data))
        data += more
    return data


def cut_short(where: str, wanted: int, size: int) -> FileError:
    """The error for a file that ends before its tensors do."""
    return FileError(
        "the file ends too early",
        where=where,
        seen=f"{size} bytes of at least {wanted}",
        next="the download or copy was cut; fetch it again",
        code="truncated-file",
    )


@dataclass
class SafetensorsFile:
    """A parsed header: tensors by key in the file's order, metadata, and where the data begin."""

    path: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    data_offset: int
    size: int


def read_safetensors(path: str | os.PathLike[str]) -> SafetensorsFile:
    """The header of a safetensors file, with every tensor as a lazy span.

    Raises FileError: ``no-such-file``, ``is-directory``, ``not-a-file``, ``not-readable``, ``truncated-file``,
    ``absurd-size``, ``bad-header``, ``duplicate-key``, ``overlapping-tensors``, ``gap-in-data``,
    ``trailing-bytes``.
    """
    where = os.fspath(path)
    try:
        fd = system.open_input(where)
        try:
            size = os.fstat(fd).st_size
            length = _header_length(system.read_at(fd, 8, 0), size, where)
            raw = _pread(fd, length, 8, where)
        finally:
            os.close(fd)
    except OSError as error:
        raise as_file_error(error, where, writing=False) from error
    return parse_header(raw, where, size)


def parse_header(raw: bytes, where: str, size: int) -> SafetensorsFile:
    """The parsed and checked header ``raw`` of a file ``where`` of ``size`` bytes in all.

    A large header is gone through once before anything of it is kept, so that one that is no
    header costs little more than its own bytes.
    """
    start = 8 + len(raw)
    if len(raw) > _LARGE:
        for key, value in header_members(raw, where):
            if isinstance(value, Entry):
                _span(key, value, where)
    metadata: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    ends: list[tuple[int, int, str]] = []
    for key, value in header_members(raw, where):
        if key in (tensors if isinstance(value, Entry) else metadata):
            raise duplicate_key(key, where)
        if isinstance(value, Entry):
            begin, end = _span(key, value, where)
            span = Span(where, start + begin, end - begin)
            tensors[key] = Tensor(value.dtype, value.shape, (span,))
            ends.append((begin, end, key))
        else:
            metadata[key] = value
    _check_cover(ends, size - start, where)
    return SafetensorsFile(where, tensors, metadata, start, size)


def _span(key: str, entry: Entry, where: str) -> tuple[int, int]:
    """[begin, end) of a tensor in the data, which its dtype and shape must fill."""
    begin, end = entry.begin, entry.end
    numel = math.prod(entry.shape)
    bits = numel * DTYPE_BITS[entry.dtype]
    if (end - begin) * 8 != bits:
        need = f"{short(bits // 8)}" if bits % 8 == 0 else f"{short(bits)} bits, no whole number"
        bad_header(
            f"`{short(key)}` has {end - begin} bytes, but its shape and dtype need {need}",
            where,
            seen=f"{entry.dtype} {short(list(entry.shape))} at {[begin, end]}",
        )
    if numel == 0 and math.prod(d or 1 for d in entry.shape) >= _MAX_ELEMENTS:
        raise FileError(
            f"`{short(key)}` has an absurd shape",
            where=where,
            seen=short(list(entry.shape)),
            code="absurd-size",
        )
    return begin, end


def _header_length(first: bytes, size: int, where: str) -> int:
    if len(first) < 8:
        raise cut_short(where, 8, size)
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER:
        raise FileError(
            "this is no safetensors file, or its first bytes are damaged",
            where=where,
            seen=f"a header length of {length} bytes, of which {MAX_HEADER} are allowed",
            next=_looks_like(first),
            code="absurd-size",
        )
    if length == 0:
        bad_header("the header is empty", where, seen="a header length of 0")
    if 8 + length > size:
        raise cut_short(where, 8 + length, size)
    return length


def _looks_like(first: bytes) -> str:
    """What a file that is no safetensors file may be, by its first bytes."""
    if first.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return "it looks like a pickle (.bin, .pt, .ckpt): give it that ending"
    if first.startswith(b"version "):
        return "it looks like a Git LFS pointer: run `git lfs pull`"
    if first.lstrip().startswith((b"<", b"{")):
        return "it looks like a web page or JSON, not the file itself: download it again"
    return "fetch the file again"


def _check_cover(ends: list[tuple[int, int, str]], total: int, where: str) -> None:
    """Every byte of the data in exactly one tensor, from the first to the last."""
    at, before = 0, ""
    for begin, end, key in sorted(ends):
        if begin < at:
            raise FileError(
                f"`{short(key)}` and `{short(before)}` share bytes",
                where=where,
                seen=f"`{short(before)}` ends at {at}, `{short(key)}` begins at {begin}",
                code="overlapping-tensors",
            )
        if begin > at:
            raise FileError(
                f"{begin - at} bytes before `{short(key)}` belong to no tensor",
                where=where,
                seen=f"data from {at} to {begin}",
                code="gap-in-data",
            )
        at, before = end, key
    if at > total:
        raise cut_short(where, at, total)
    if at < total:
        raise FileError(
            f"{total - at} bytes follow the last tensor",
            where=where,
            seen=f"{total} bytes of data, {at} of them named by the header",
            code="trailing-bytes",
        )
