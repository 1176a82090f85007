"""Zip archives as torch writes them, read so that two readers cannot see two archives in one file.

Python's zipfile and torch's reader look for the list of records in different ways, and neither holds
it against the records themselves. Here all of it has to agree: one list, at the end and nowhere else,
records that do not overlap, and a header before each that says what the list says.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_END = struct.Struct("<4s4H2LH")  # the end record: disks, counts, size and offset of the list
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_COMMENT = 0xFFFF
_PLAIN = 0x080E  # flags that change no byte: deflate's level, sizes that follow, names in UTF-8
_STORED, _DEFLATED = 0, 8
_LARGE = 0xFFFFFFFF  # stands for a number that did not fit


class BadArchive(ValueError):
    """The archive is damaged, or says one thing in two ways."""


@dataclass(frozen=True, slots=True)
class Record:
    """One file in an archive: where its bytes lie, how many they are there and unpacked."""

    name: str
    header: int
    start: int
    packed: int
    size: int
    stored: bool


@dataclass(frozen=True)
class Archive:
    """The records of an archive that ``read(offset, count)`` gives the bytes of."""

    read: Callable[[int, int], bytes]
    length: int
    records: tuple[Record, ...]

    @property
    def stored(self) -> bool:
        """Whether every record lies there as it is, so that it may be mapped."""
        return all(record.stored for record in self.records)

    @property
    def size(self) -> int:
        """The bytes of all records unpacked."""
        return sum(record.size for record in self.records)

    def bytes_of(self, record: Record) -> bytes:
        """A record's bytes, never more than its list promises; BadArchive where they are others."""
        data = self.read(record.start, record.packed)
        if not record.stored:
            unpack = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                data = unpack.decompress(data, record.size + 1)
            except zlib.error as error:
                raise BadArchive(f"`{record.name}`: {error}") from error
        if len(data) != record.size:
            raise BadArchive(f"`{record.name}` has not the {record.size} bytes that are listed")
        return data


def read_archive(
    read: Callable[[int, int], bytes], length: int, *, longer: bool = False
) -> Archive:
    """The archive of ``length`` bytes whose list and records agree; BadArchive otherwise.

    ``longer`` lets bytes follow its end, which are then no part of it.
    """
    start, stop, count = _list_of(read, length, longer)
    entries = list(_entries(read(start, stop - start), count))
    records = tuple(_record(read, entry, start) for entry in entries)
    at = 0
    for record in sorted(records, key=lambda r: r.header):
        if record.header < at:
            raise BadArchive(f"`{record.name}` overlaps another record")
        at = record.start + record.packed
    return Archive(read, length, records)


def _list_of(read: Callable[[int, int], bytes], length: int, longer: bool) -> tuple[int, int, int]:
    """Where the list of records begins and ends, and how many it has."""
    tail_at = max(0, length - _COMMENT - _END.size)
    tail = read(tail_at, length - tail_at)
    at = tail.rfind(b"PK\5\6", 0, len(tail) - _END.size + 4)  # the last one that is whole
    if at < 0:
        raise BadArchive("it has no list of records at its end")
    _, disk, disks, here, count, size, offset, comment = _END.unpack_from(tail, at)
    if not longer and tail_at + at + _END.size + comment != length:
        raise BadArchive("bytes follow its end")
    stop = tail_at + at
    if stop >= _LOCATOR.size and read(stop - _LOCATOR.size, 4) == b"PK\6\7":
        stop, (disk, disks, here, count, size, offset) = _large_end(read, stop - _LOCATOR.size)
    if disk or disks or here != count or offset + size != stop:
        raise BadArchive("its list of records is not where its end says")
    return offset, stop, count


def _large_end(read: Callable[[int, int], bytes], locator: int) -> tuple[int, tuple[int, ...]]:
    """The end record of an archive beyond 4 GiB, which must stand right before its locator."""
    _, disk, offset, disks = _LOCATOR.unpack(read(locator, _LOCATOR.size))
    if disk or disks > 1 or offset != locator - _END64.size:
        raise BadArchive("its end record is not where it says")
    fields = _END64.unpack(read(offset, _END64.size))
    if fields[0] != b"PK\6\6" or fields[1] != _END64.size - 12:
        raise BadArchive("its end record is damaged")
    return offset, fields[4:]


def _entries(listing: bytes, count: int) -> Iterator[tuple[bytes, int, int, int, int, int]]:
    """Each record's name, flags, method, packed size, size and offset, as the list has them."""
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > len(listing) or listing[at : at + 4] != b"PK\1\2":
            raise BadArchive("its list of records is damaged")
        fields = _ENTRY.unpack_from(listing, at)
        flags, method, packed, size = fields[3], fields[4], fields[8], fields[9]
        name_length, extra_length, comment, disk, offset = *fields[10:14], fields[16]
        at += _ENTRY.size
        name = listing[at : at + name_length]
        extra = listing[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment
        if disk or at > len(listing):
            raise BadArchive("its list of records is damaged")
        size, packed, offset = _large(extra, [size, packed, offset])
        yield name, flags, method, packed, size, offset
    if at != len(listing):
        raise BadArchive("its list has more records than it says")


def _large(extra: bytes, numbers: list[int]) -> list[int]:
    """Sizes and offset, those that did not fit taken from the extra field of large files."""
    fields = []
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            fields.append(extra[at + 4 : at + 4 + length])
        at += 4 + length
    wide = fields[0] if len(fields) == 1 else b""
    numbers_left = [n for (n,) in struct.iter_unpack("<Q", wide[: len(wide) // 8 * 8])]
    if len(fields) > 1 or numbers.count(_LARGE) > len(numbers_left):
        raise BadArchive("a record's size is missing, or there twice")
    return [numbers_left.pop(0) if number == _LARGE else number for number in numbers]


def _record(
    read: Callable[[int, int], bytes], entry: tuple[bytes, int, int, int, int, int], end: int
) -> Record:
    """The record of one entry, whose own header must say the same."""
    name, flags, method, packed, size, offset = entry
    shown = name.decode("utf-8", "backslashreplace")
    if flags & ~_PLAIN or method not in (_STORED, _DEFLATED):
        raise BadArchive(f"`{shown}` is encrypted, or packed in a way that torch does not write")
    header = read(offset, _LOCAL.size + len(name))
    if len(header) != _LOCAL.size + len(name) or header[:4] != b"PK\3\4":
        raise BadArchive(f"`{shown}` is not where the list says")
    fields = _LOCAL.unpack_from(header)
    if fields[3] != method or fields[2] & ~_PLAIN or header[_LOCAL.size :] != name:
        raise BadArchive(f"`{shown}` is another record than the list says")
    if fields[9] != len(name) or (method == _STORED and packed != size):
        raise BadArchive(f"`{shown}` is another record than the list says")
    start = offset + _LOCAL.size + fields[9] + fields[10]
    if start + packed > end:
        raise BadArchive(f"`{shown}` runs into the list of records")
    return Record(shown, offset, start, packed, size, method == _STORED)
