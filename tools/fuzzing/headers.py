"""Safetensors headers: text, JSON, entries, offsets and lengths that lie."""

from __future__ import annotations

import json
import random
from typing import Any

from corpus import Raw, joined

from fuzzing.damage import NAMES, ODD, cut_or_grown, flipped, json_damaged
from fuzzing.inputs import Input
from fuzzing.oracle import pack

_WIDTH = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "U16": 2,
    "U32": 4, "U64": 8, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


def make(r: random.Random, seed: int) -> Input:
    """A small valid file, damaged in one to three ways, read beside the safetensors library."""
    damages = [r.choice(_DAMAGES) for _ in range(r.choice((0, 1, 1, 1, 2, 3)))]
    header, data = _valid(r)
    text, tail = json.dumps(header), data
    blob = None
    for damage in damages:
        made = damage(r, header, text, tail)
        if isinstance(made, bytes):
            blob = made
            break
        text, tail = made
        header = _again(text, header)
    blob = blob if blob is not None else joined(text.encode("utf-8", "surrogatepass"), tail)
    job = "inspect" if r.random() < 0.15 else "header"
    story = "+".join(d.__name__.strip("_") for d in damages)
    options = {"source": "in/x.safetensors"}
    return Input("headers", seed, {"x.safetensors": blob}, job, options, story=story)


def _again(text: str, before: dict[str, Any]) -> dict[str, Any]:
    """The header of a text, where there is one of a sensible depth and size."""
    if len(text) > 20_000 or text.count("[[") + text.count('{"a"') > 50:
        return before
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        return before
    return read if isinstance(read, dict) else before


def _valid(r: random.Random) -> tuple[dict[str, Any], bytes]:
    tensors = {}
    for n in range(r.choice((0, 1, 2, 5, 12))):
        dtype = r.choice(tuple(_WIDTH))
        shape = tuple(r.choice((0, 1, 2, 3, 8)) for _ in range(r.choice((0, 1, 2, 2, 4))))
        count = _WIDTH[dtype]
        for s in shape:
            count *= s
        name = r.choice(NAMES).strip("\x00") if r.random() < 0.15 else f"a.{n}.lora_A.weight"
        tensors[name or "z"] = Raw(dtype, shape, r.randbytes(count))
    tensors.pop("__metadata__", None)
    blob = pack(tensors, {"format": "pt"} if r.random() < 0.5 else None)
    end = 8 + int.from_bytes(blob[:8], "little")
    return json.loads(blob[8:end]), blob[end:]


Made = tuple[str, bytes] | bytes
Header = dict[str, Any]


def _values(r: random.Random, header: Header, text: str, data: bytes) -> Made:
    return json.dumps(json_damaged(r, header, r.choice((1, 1, 2)))), data


def _bytes(r: random.Random, header: Header, text: str, data: bytes) -> Made:
    return joined(flipped(r, text.encode("utf-8", "surrogatepass")), data)


def _length(r: random.Random, header: Header, text: str, data: bytes) -> Made:
    raw = text.encode("utf-8", "surrogatepass")
    n = len(raw)
    wrong = r.choice(
        (0, 1, 2, n - 1, n + 1, n + len(data), 2 * n, 10**8, 10**8 + 1, 2**63, 2**64 - 1)
    )
    return max(wrong, 0).to_bytes(8, "little") + raw + data


def _whole(r: random.Random, header: Header, text: str, data: bytes) -> Made:
    return cut_or_grown(r, joined(text.encode("utf-8", "surrogatepass"), data))


def _twice(r: random.Random, header: Header, text: str, data: bytes) -> Made:
    key = r.choice(list(header) or ["a"])
    again = f"{json.dumps(key)}: {json.dumps(header.get(key, 1))}, "
    return text.replace("{", "{" + again, 1), data


def _many_twice(r: random.Random, header: Header, text: str, data: bytes) -> Made:
    """Thousands of names, the last of them twice."""
    if r.random() < 0.97:
        return _twice(r, header, text, data)
    count = r.choice((1000, 20_000, 40_000))
    names = ",".join(f'"{n}":0' for n in range(count))
    return "{" + names + f',"{count - 1}":0}}', data


def _crowd(r: random.Random, header: Header, text: str, data: bytes) -> Made:
    """A header of very many small things: each costs far more memory than its two bytes."""
    if r.random() < 0.97:
        return _values(r, header, text, data)
    thing, place = r.choice(("[]", "{}", "0", '""')), r.choice(("shape", "x", "__metadata__"))
    return f'{{"{place}": [' + f"{thing}," * r.choice((1000, 4_000_000)) + f"{thing}]}}", data


def _deep(r: random.Random, header: Header, text: str, data: bytes) -> Made:
    depth = r.choice((100, 900, 5000, 100_000))
    nest = "[" * depth + "]" * depth if r.random() < 0.5 else '{"a":' * depth + "1" + "}" * depth
    return text.replace("{", f'{{"deep": {nest}, ', 1), data


def _spelling(r: random.Random, header: Header, text: str, data: bytes) -> Made:
    """Other JSON texts for the same or nearly the same value."""
    return r.choice((
        text + " " * r.choice((1, 7, 8, 100)), " " + text, "\ufeff" + text, text + "\n", text + "\0",
        text + text, text + "x", text.replace('"F32"', '"\\u00463\\u0032"'), text.replace("0", "-0", 1),
        text.replace(":", ": /* */", 1), text.replace("[0", "[00", 1), text.replace("[0", "[0.0", 1),
        text.replace("[0", "[0e0", 1), text.replace('"', "'"), text.replace("}", ",}", 1),
        text.replace("0", "NaN", 1), text.replace("0", "1e400", 1), text.replace('"a', '"\\ud800a', 1),
        text.replace("0", "1" * 5000, 1), text.replace("]", "]]", 1), "", "null", "[]", "1", '"x"', "{}",
    )), data  # fmt: skip


def _entries(r: random.Random, header: Header, text: str, data: bytes) -> Made:
    """Offsets, shapes or dtypes of two tensors exchanged, moved, or made to share bytes."""
    keys = [k for k, e in header.items() if isinstance(e, dict) and "shape" in e]
    if not keys:
        return _spelling(r, header, text, data)
    a, b = header[r.choice(keys)], header[r.choice(keys)]
    field = r.choice(("dtype", "shape", "data_offsets"))
    if r.random() < 0.5:
        a[field], b[field] = b.get(field), a.get(field)
    elif field == "data_offsets" and isinstance(a.get(field), list):
        step = r.choice((-8, -1, 1, 8, 2**64, 2**63))
        a[field] = [o + step if isinstance(o, int) else o for o in a[field]]
    elif field == "shape":
        a[field] = r.choice(([2**32, 2**32, 0], [0, 2**63], [2**64], [1] * 1000, [-1, -1], [], [0]))
    else:
        a[field] = r.choice((*_WIDTH, "F4", "F6_E2M3", "F8_E8M0", "C64", "f32", "", *ODD[:3]))
    return json.dumps(header), data


def _unwritten(r: random.Random, header: Header, text: str, data: bytes) -> Made:
    """Not UTF-8, or something else altogether."""
    raw = text.encode("utf-8", "surrogatepass")
    return r.choice((
        joined(raw.replace(b"a", b"\xff", 1), data), joined(text.encode("utf-16", "surrogatepass"), data),
        b"PK\x03\x04" + raw, b"version https://git-lfs.github.com/spec/v1\n", b"<html>" + raw, raw, b"",
        b"\x80\x02}q\x00.", b"GGUF" + raw, r.randbytes(64),
    ))  # fmt: skip


_DAMAGES = (
    _values, _values, _bytes, _bytes, _length, _whole, _twice, _many_twice, _crowd, _deep, _spelling,
    _spelling, _entries, _entries, _entries, _unwritten,
)  # fmt: skip
