"""The members of a safetensors header, one at a time, out of its raw bytes.

A header is JSON of one shape: an object of objects, in which there are texts and lists of whole
numbers. A JSON parser builds whatever it is given, a hundred bytes of memory for a byte of ``[],``;
here nothing is built that a header cannot hold, and a member is all that is held at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Mapping
from typing import NamedTuple, NoReturn

from adaptsurgery_formats.errors import FileError
from adaptsurgery_formats.late import Late
from adaptsurgery_formats.tensors import DTYPE_BITS

_METADATA = "__metadata__"
_MOST_OTHERS = 100  # faults that are put aside to tell of a name that comes twice
_LONGEST_NAME = 1 << 24  # bytes of a key
_LONGEST_LIST = 1 << 20  # bytes of one list of numbers
_WS = rb"[ \t\n\r]*"
_NUMBER = rb"(?:0|[1-9][0-9]{0,17})"  # surely of 64 bits; longer ones take the longer way
_COUNT = rb"(" + _NUMBER + rb")"
_COUNTS = _NUMBER + rb"(?:, ?" + _NUMBER + rb"){0,8}"
_TEXT = rb'"([^"\\\x00-\x1f]*)"'


def _tokens(*tokens: bytes) -> Late:
    """Tokens with JSON's white space before each."""
    return Late(b"".join(_WS + token for token in tokens))


_KEY = _tokens(_TEXT, b":")
# "a.weight": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}: as nearly all are written
_ENTRY = re.compile(
    rb" ?" + _TEXT + rb': ?\{"dtype": ?"([A-Z0-9_]{1,16})", ?"shape": ?\[((?:' + _COUNTS
    + rb')?)\], ?"data_offsets": ?\[' + _COUNT + rb", ?" + _COUNT + rb"\]\}([,}])"
)  # fmt: skip
_PAIR = Late(rb" ?" + _TEXT + b": ?" + _TEXT)
_LIST = _tokens(rb"(\[[-+.0-9eE, \t\n\r]*\])")
_SCALAR = _tokens(rb"(?:-?[0-9][-+.0-9eE]{0,99}|true|false|null)")
_QUOTE, _COLON, _OPEN = _tokens(b'"'), _tokens(b":"), _tokens(rb"\{")
_AFTER = _tokens(rb"([,}])")
_CLOSE = _tokens(rb"\}")
_END = Late(_WS + rb"\Z")
# A text's bytes up to its end or its thousandth escape: more at once would cost memory.
_CHARACTERS = Late(rb'[^"\\\x00-\x1f]*(?:\\[^\x00-\x1f][^"\\\x00-\x1f]*){0,999}')


class Entry(NamedTuple):
    """A tensor as a header describes it; no more is checked than each field's kind."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header_members(raw: bytes, where: str) -> Iterator[tuple[str, Entry | str]]:
    """A tensor's name and entry, or a key of the metadata and its text, in the header's order.

    Names may come twice, within one object's own fields alone they may not. Raises FileError
    "bad-header", "duplicate-key" for anything that is no header.
    """
    if not raw.startswith(b"{"):
        bad_header("the header is no JSON object", where, seen=_at(raw, 0))
    closed = _CLOSE.match(raw, 1)
    more, at = closed is None, closed.end() if closed else 1
    others: dict[str, int] = {}  # keys of what is no tensor's, and where their values stand
    while more:
        if (entry := _ENTRY.match(raw, at)) is not None and entry[1] != b"__metadata__":
            yield _plain(entry, where)
            more, at = entry[6] == b",", entry.end()
            continue
        key, at = _key(raw, at, where)
        scalar = _SCALAR.match(raw, at)
        if key != _METADATA and not scalar:
            value, at = _entry(raw, at, key, where)
            yield key, value
        elif key in others:
            raise duplicate_key(key, where)
        else:
            others[key] = at
            at = scalar.end() if scalar else (yield from _metadata(raw, at, where))
            if len(others) > _MOST_OTHERS:
                break
        more, at = _after(raw, at, where)
    _check_end(raw, at, others, where)


def _check_end(raw: bytes, at: int, others: Mapping[str, int], where: str) -> None:
    """Refuse what is no object among a header's values, and what follows a header."""
    for key, stands in others.items():
        if not _OPEN.match(raw, stands):
            bad_header(f"`{short(key)}` is no object", where, seen=_at(raw, stands))
    if not _END.match(raw, at):
        bad_header("the header is not JSON", where, seen=f"more after its end: {_at(raw, at)}")


def _plain(entry: re.Match[bytes], where: str) -> tuple[str, Entry]:
    name, dtype, shape, begin, end, _ = entry.groups()
    key = _named(name, where)
    if not name:
        bad_header("a tensor has an empty name", where, seen=_at(entry.string, entry.start()))
    known = dtype.decode()
    if known not in DTYPE_BITS:
        bad_header(f"`{short(key)}` has an unknown dtype", where, seen=known)
    counts = tuple(map(int, shape.split(b","))) if shape else ()
    return key, Entry(known, counts, int(begin), int(end))


def _entry(raw: bytes, at: int, key: str, where: str) -> tuple[Entry, int]:
    """A tensor's object that is written in another way than most, and where it ends."""
    fields: dict[str, object] = {}
    start = at
    more, at = _opened(raw, at, key, where)
    while more:
        name, at = _key(raw, at, where)
        if name in fields:
            raise duplicate_key(name, where)
        if len(fields) == 3:
            _no_entry(key, raw, start, where)
        if (numbers := _LIST.match(raw, at)) is not None:
            fields[name], at = _counts(numbers[1], key, name, where), numbers.end()
        elif (quote := _QUOTE.match(raw, at)) is not None:
            fields[name], at = _text(raw, quote.end(), where)
        else:
            _no_entry(key, raw, start, where)
        more, at = _after(raw, at, where)
    entry = _entry_of(fields, key, where)
    if entry is None:
        _no_entry(key, raw, start, where)
    return entry, at


def _entry_of(fields: Mapping[str, object], key: str, where: str) -> Entry | None:
    match fields:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            if dtype not in DTYPE_BITS or not key:
                what = (
                    f"`{short(key)}` has an unknown dtype" if key else "a tensor has an empty name"
                )
                bad_header(what, where, seen=short(dtype))
            return Entry(dtype, tuple(shape), begin, end)
    return None


def _metadata(raw: bytes, at: int, where: str) -> Generator[tuple[str, str], None, int]:
    """The texts of ``__metadata__`` by their keys; returns where it ends."""
    more, at = _opened(raw, at, _METADATA, where)
    while more:
        if (pair := _PAIR.match(raw, at)) is not None:
            yield _decoded(pair[1], where), _decoded(pair[2], where)
            at = pair.end()
        else:
            key, at = _key(raw, at, where)
            quote = _QUOTE.match(raw, at)
            if quote is None:
                bad_header(f"{_METADATA} `{short(key)}` is not text", where, seen=_at(raw, at))
            value, at = _text(raw, quote.end(), where)
            yield key, value
        more, at = _after(raw, at, where)
    return at


def _opened(raw: bytes, at: int, key: str, where: str) -> tuple[bool, int]:
    """Whether an object that begins here has members, and where they begin, or it ends."""
    opened = _OPEN.match(raw, at)
    if opened is None:
        bad_header(f"`{short(key)}` is no object", where, seen=_at(raw, at))
    if (closed := _CLOSE.match(raw, opened.end())) is not None:
        return False, closed.end()
    return True, opened.end()


def _after(raw: bytes, at: int, where: str) -> tuple[bool, int]:
    """Whether another member follows, and where it begins, or the object ends."""
    after = _AFTER.match(raw, at)
    if after is None:
        bad_header("the header is not JSON", where, seen=f"at byte {at}: {_at(raw, at)}")
    return after[1] == b",", after.end()


def _key(raw: bytes, at: int, where: str) -> tuple[str, int]:
    """A key, and where its value begins."""
    if (plain := _KEY.match(raw, at)) is not None:
        return _named(plain[1], where), plain.end()
    quote = _QUOTE.match(raw, at)
    if quote is None:
        bad_header("the header is not JSON", where, seen=f"at byte {at}: {_at(raw, at)}")
    key, at = _text(raw, quote.end(), where)
    colon = _COLON.match(raw, at)
    if colon is None:
        bad_header("the header is not JSON", where, seen=f"at byte {at}: {_at(raw, at)}")
    return key, colon.end()


def _text(raw: bytes, at: int, where: str) -> tuple[str, int]:
    """The text whose opening quote ends at ``at``, and where it ends itself."""
    start, end = at, _characters(raw, at)
    while end > at and raw[end : end + 1] == b"\\":
        at, end = end, _characters(raw, end)
    if raw[end : end + 1] != b'"':
        bad_header("the header is not JSON", where, seen=f"at byte {end}: {_at(raw, end)}")
    piece = raw[start:end]
    if b"\\" not in piece:
        return _decoded(piece, where), end + 1
    try:
        text: str = json.loads(f'"{_decoded(piece, where)}"')
        text.encode()  # an escape can spell half a surrogate pair, which is no text
    except UnicodeEncodeError as error:
        bad_header("a name in the header is no text", where, seen=str(error)[:200])
    except ValueError as error:
        bad_header("the header is not JSON", where, seen=str(error))
    return text, end + 1


def _characters(raw: bytes, at: int) -> int:
    part = _CHARACTERS.match(raw, at)
    return part.end() if part is not None else at


def _named(name: bytes, where: str) -> str:
    """A key as text; one of megabytes is no name, and is not decoded."""
    if len(name) > _LONGEST_NAME:
        bad_header(f"a name has {len(name)} bytes", where, seen=_at(name, 0))
    return _decoded(name, where)


def _decoded(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        bad_header("the header is not UTF-8", where, seen=f"{error.reason}: {short(text)}")


def _counts(text: bytes, key: str, name: str, where: str) -> list[int]:
    """A list of whole numbers, none negative nor of more than 64 bits."""
    what = f"`{short(key)}` has a {short(name)} that is none"
    if len(text) > _LONGEST_LIST:
        bad_header(what, where, seen=f"a list of {len(text)} bytes")
    try:
        numbers = json.loads(text, parse_float=_no_count)
    except ValueError:
        bad_header(what, where, seen=_at(text, 0))
    if b"-" in text or (numbers and max(numbers) >= 1 << 64):
        bad_header(what, where, seen=_at(text, 0))
    counts: list[int] = numbers
    return counts


def _no_count(text: str) -> NoReturn:
    raise ValueError(text)


def _no_entry(key: str, raw: bytes, start: int, where: str) -> NoReturn:
    bad_header(
        f"`{short(key)}` is not described by dtype, shape and data_offsets",
        where,
        seen=_at(raw, start),
    )


def _at(raw: bytes, at: int) -> str:
    """What stands at a place, as an error shows it."""
    return raw[at : at + 100].decode("utf-8", "backslashreplace") or "its end"


def short(value: object) -> str:
    """A value as an error shows it: never longer than a line."""
    if isinstance(value, (str, bytes)):
        value = value[:200]
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # numbers of more digits than Python will print
        return "a number of thousands of digits"
    return text if len(text) <= 120 else text[:117] + "…"


def bad_header(what: str, where: str, seen: str = "") -> NoReturn:
    """Raise the FileError for a header that is none."""
    raise FileError(
        what,
        where=where,
        seen=seen,
        next="the file is damaged or is no safetensors file; fetch it again",
        code="bad-header",
    )


def duplicate_key(key: str, where: str) -> FileError:
    """The error for a name that comes twice."""
    return FileError(
        f"the header names `{short(key)}` twice",
        where=where,
        next="the file was not written by the safetensors library; ask its author",
        code="duplicate-key",
    )
