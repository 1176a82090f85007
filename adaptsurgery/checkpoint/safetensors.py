"""The strict, header-only reader of safetensors files.

A file is an 8-byte little-endian length n, n bytes of JSON, and the data::

    {"__metadata__": {"format": "pt"},
     "a.weight": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}, …}

Every byte of the data belongs to exactly one tensor. Anything else is refused here, so that later
code may trust what it is handed. Only the header is read; tensors are spans of the file.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any, NoReturn

from adaptsurgery.checkpoint import system
from adaptsurgery.checkpoint.failures import as_file_error
from adaptsurgery_formats.errors import FileError
from adaptsurgery_formats.tensors import DTYPE_BYTES, Tensor

MAX_HEADER = 100_000_000  # the safetensors library's own limit
_MAX_ELEMENTS = 1 << 60
_FIELDS = {"dtype", "shape", "data_offsets"}
_INT = {int}


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
            fd = system.open_input(self.path)
            try:
                return _pread(fd, self.nbytes, self.offset, self.path)
            finally:
                os.close(fd)
        except OSError as error:
            raise as_file_error(error, self.path, writing=False) from error


def _pread(fd: int, count: int, offset: int, where: str) -> bytes:
    data = system.read_at(fd, count, offset)
    while len(data) < count:
        more = system.read_at(fd, count - len(data), offset + len(data))
        if not more:
            raise cut_short(where, offset + count, offset + len(data))
        data += more
    return data


def cut_short(where: str, wanted: int, found: int) -> FileError:
    """The error for a file that ends before its tensors do."""
    return FileError(
        "the file ends too early",
        where=where,
        seen=f"{found} bytes of at least {wanted}",
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
    """The parsed and checked header ``raw`` of a file ``where`` of ``size`` bytes in all."""
    entries = _json_object(raw, where)
    metadata = _metadata(entries.pop("__metadata__", {}), where)
    start = 8 + len(raw)
    tensors: dict[str, Tensor] = {}
    ends: list[tuple[int, int, str]] = []
    for key, entry in entries.items():
        if not key:
            _bad("a tensor has an empty name", where, seen=_short(entry))
        tensor, begin, end = _entry(key, entry, where, start)
        tensors[key] = tensor
        ends.append((begin, end, key))
    _check_cover(ends, size - start, where)
    return SafetensorsFile(where, tensors, metadata, start, size)


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
        _bad("the header is empty", where, seen="a header length of 0")
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


def _json_object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        _bad("the header is not UTF-8", where, seen=str(error))
    if not text.startswith("{"):
        _bad("the header is no JSON object", where, seen=_short(text))
    whole = _positive_int if "-0" in text else None
    try:
        parsed = json.loads(text, object_pairs_hook=_unique, parse_int=whole)
        if "\\u" in text:  # an escape can spell half a surrogate pair, which is no text
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except _DuplicateKey as error:
        raise FileError(
            f"the header names `{error}` twice",
            where=where,
            next="the file was not written by the safetensors library; ask its author",
            code="duplicate-key",
        ) from None
    except UnicodeEncodeError as error:
        _bad("a name in the header is no text", where, seen=str(error))
    except ValueError as error:
        _bad("the header is not JSON", where, seen=str(error))
    except RecursionError:
        _bad("the header is nested too deeply", where)
    assert isinstance(parsed, dict)
    return parsed


class _DuplicateKey(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKey(next(n for n in names if names.count(n) > 1))
    return found


def _positive_int(text: str) -> int:
    """int, but "-0" stays negative, so that the checks below see it."""
    return int(text) if text != "-0" else -1


def _metadata(found: object, where: str) -> dict[str, str]:
    if not isinstance(found, dict):
        _bad("__metadata__ is no object", where, seen=_short(found))
    for key, value in found.items():
        if not isinstance(value, str):
            _bad(f"__metadata__ `{key}` is not text", where, seen=_short(value))
    return found


def _entry(key: str, entry: object, where: str, start: int) -> tuple[Tensor, int, int]:
    """One tensor of the header and its [begin, end) in the data."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        _bad(
            f"`{key}` is not described by dtype, shape and data_offsets", where, seen=_short(entry)
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        _bad(f"`{key}` has an unknown dtype", where, seen=_short(dtype))
    if not _counts(shape):
        _bad(f"`{key}` has a shape that is none", where, seen=_short(shape))
    if not _counts(offsets) or len(offsets) != 2:
        _bad(f"`{key}` has data_offsets that are none", where, seen=_short(offsets))
    begin, end = offsets
    numel = math.prod(shape)
    if end - begin != numel * DTYPE_BYTES[dtype]:
        _bad(
            f"`{key}` has {end - begin} bytes, but its shape and dtype need "
            f"{_short(numel * DTYPE_BYTES[dtype])}",
            where,
            seen=f"{dtype} {_short(shape)} at {_short(offsets)}",
        )
    if numel == 0 and math.prod(d or 1 for d in shape) >= _MAX_ELEMENTS:
        raise FileError(
            f"`{key}` has an absurd shape", where=where, seen=_short(shape), code="absurd-size"
        )
    span = Span(where, start + begin, end - begin)
    return Tensor(dtype, tuple(shape), (span,)), begin, end


def _counts(found: object) -> bool:
    """Whether this is a list of whole numbers, none negative (a bool is no number)."""
    if type(found) is not list:
        return False
    if not found:
        return True
    return set(map(type, found)) == _INT and min(found) >= 0 and max(found) < 1 << 64


def _check_cover(ends: list[tuple[int, int, str]], total: int, where: str) -> None:
    """Every byte of the data in exactly one tensor, from the first to the last."""
    at, before = 0, ""
    for begin, end, key in sorted(ends):
        if begin < at:
            raise FileError(
                f"`{key}` and `{before}` share bytes",
                where=where,
                seen=f"`{before}` ends at {at}, `{key}` begins at {begin}",
                code="overlapping-tensors",
            )
        if begin > at:
            raise FileError(
                f"{begin - at} bytes before `{key}` belong to no tensor",
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


def _short(found: object) -> str:
    """A value as an error shows it: never longer than a line."""
    try:
        text = repr(found)
    except (ValueError, RecursionError):  # numbers of more digits than Python will print
        return "a number of thousands of digits"
    return text if len(text) <= 120 else text[:117] + "…"


def _bad(what: str, where: str, seen: str = "") -> NoReturn:
    raise FileError(
        what,
        where=where,
        seen=seen,
        next="the file is damaged or is no safetensors file; fetch it again",
        code="bad-header",
    )
