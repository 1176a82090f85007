"""Damage that any kind of input can take: to bytes, to JSON, to a folder's entries, to names."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

from fuzzing.inputs import Content, Special

# Every JSON kind, and numbers and texts at the edges of what may be meant.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, -1, 7, 0.5, -0.0, 1e-46, 1e39, 1e308, float("nan"), float("inf"),
    2**31, 2**53 + 1, 2**63, 2**64, 10**30, 10**400, "", "x", "0", "é", "e\u0301", "\u202e", "\x1b[31m",
    "a\nb", "\x00", "\ud800", "x" * 300, "x" * 5000, "../x", "/", "{room}/escaped", "~nosuchuser/x",
    [], [[]], [1], [None], ["x"], {}, {"x": 1}, {"": None}, [0, 8], {"x": {"x": []}},
)  # fmt: skip
NAMES = (
    "A", "a", "é", "e\u0301", "K", "\u212a", "a\nb", "\x1b[31mred", "\u202eabc", " ", ".", "..", "../x",
    "a/b", "CON", "x" * 255, "x" * 300, "x" * 5000, "\x00", "'", '"', "\\", "%s", "{0}", "-o", "__metadata__",
)  # fmt: skip


def flipped(r: random.Random, data: bytes, first: int = 0) -> bytes:
    """A few bytes changed: any of them, or one that JSON minds."""
    blob = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 8)) if len(blob) > first else 0):
        blob[r.randrange(first, len(blob))] = r.choice(
            (r.randrange(256), 0, 34, 44, 49, 91, 93, 125)
        )
    return bytes(blob)


def cut_or_grown(r: random.Random, data: bytes) -> bytes:
    """Cut short, cut out of the middle, something appended, or empty."""
    at = r.randrange(len(data) + 1)
    return r.choice((
        data[:at], data[:at] + data[at + r.choice((1, 8, 100)) :], data + r.randbytes(r.choice((1, 8, 99))),
        data + b"\0" * 8, data + data, b"",
    ))  # fmt: skip


def json_damaged(r: random.Random, value: Any, times: int = 1) -> Any:
    """The same JSON with a few of its values replaced, dropped, doubled or renamed."""
    out = copy.deepcopy(value)
    for _ in range(times):
        places = list(_places(out))
        if not places:
            return copy.deepcopy(r.choice(ODD))
        holder, key = r.choice(places)
        _change(r, holder, key)
    return out


def _places(value: Any, depth: int = 0) -> Any:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield value, key
        if depth < 8:
            yield from _places(inner, depth + 1)


def _change(r: random.Random, holder: Any, key: Any) -> None:
    choice = r.random()
    if choice < 0.6:
        holder[key] = copy.deepcopy(r.choice(ODD))
    elif choice < 0.7:
        del holder[key]
    elif choice < 0.8 and isinstance(holder[key], (int, float)):
        holder[key] = holder[key] + r.choice((-1, 1, 4, 0.5, 2**32))
    elif choice < 0.9 and isinstance(holder, dict):
        holder[r.choice(NAMES)] = holder.pop(key)
    elif isinstance(holder, list):
        holder.append(copy.deepcopy(holder[key]))
    else:
        holder[key] = [holder[key]]


def json_text(r: random.Random, value: Any) -> bytes:
    """JSON as bytes, at times deep, doubled, or in another encoding."""
    text = json.dumps(value)
    choice = r.random()
    if choice < 0.03:
        text = "[" * r.choice((900, 100_000))
    elif choice < 0.06:
        text = text.replace("{", '{"x": ' + '{"x": ' * 3000 + "1" + "}" * 3000 + ", ", 1)
    elif choice < 0.09:
        text = text + text
    elif choice < 0.11:
        return text.encode(r.choice(("utf-16", "utf-8-sig", "utf-32")))
    elif choice < 0.13:
        text = text.replace("{", '{"x": 1, "x": 2, ', 1)
    return text.encode("utf-8", "surrogatepass")


def special(r: random.Random) -> Content:
    """What may lie in the place of a file."""
    return r.choice((
        Special("fifo"), Special("folder"), Special("link", "/dev/zero"), Special("link", "nowhere"),
        Special("link", "."), Special("link", "{room}/in"), Special("link", "/etc/hostname"), b"",
        Special("link", "/dev/stdin"), b"\0" * 4096, b"{", b"null", b"[]",
    ))  # fmt: skip


def text_of(r: random.Random, texts: tuple[str, ...]) -> str:
    """One of the texts, or two put together."""
    return r.choice(texts) if r.random() < 0.8 else r.choice(texts) + r.choice(texts)


Damage = Callable[[random.Random, bytes], bytes]
