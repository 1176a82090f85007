"""JSON from others: an object that knows its file, and fields of the kind that they must have.

Any value may stand in any field of a file that somebody else wrote. What is read from one goes
through ``typed``, which refuses a value of another kind by the field's name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from adaptsurgery_formats.errors import FileError

MAX_JSON = 256 << 20
_MOST_VALUES = 4_000_000  # each takes up to some hundred bytes of memory
_KINDS = {
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
_T = TypeVar("_T", str, int, bool, list[Any], dict[str, Any])


class JsonObject(dict[str, Any]):
    """A file's object, and the file's path."""

    where: str = ""


def json_object(
    data: bytes, where: str, code: str = "bad-json", *, finite: bool = False
) -> JsonObject:
    """A file's JSON object; ``finite`` refuses NaN, infinity and what is too large for a float.

    Raises FileError of a code for anything else, "absurd-size" for more than fits into memory.
    """
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > _MOST_VALUES:
        raise FileError(
            "it holds more than such a file can",
            where=where,
            seen=f"about {values} values",
            code="absurd-size",
        )
    try:
        text = data.decode("utf-8")
        read = json.loads(text, **_FINITE) if finite else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError("it is not JSON", where=where, seen=str(error)[:200], code=code) from error
    if not isinstance(read, dict):
        raise FileError("it holds no JSON object", where=where, code=code)
    out = JsonObject(read)
    out.where = where
    return out


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


_FINITE: Any = {"parse_constant": _no_constant, "parse_float": _number}


def typed(config: Mapping[str, Any], name: str, kind: type[_T], where: str = "") -> _T | None:
    """A field's value, None where it is missing or null.

    Raises FileError "bad-config" for a value of another kind; true and false are no numbers.
    """
    value = config.get(name)
    if value is None:
        return None
    if isinstance(value, bool) if kind is bool else _is(value, kind):
        inside: _T = _inside(value, config, where)
        return inside
    raise FileError(
        f"`{name}` is not {_KINDS[kind]}",
        where=where or getattr(config, "where", "") or "config.json",
        seen=f"{name} = {json.dumps(value)[:80]}",
        next="mend it in the file, or fetch the file again",
        code="bad-config",
    )


def texts(config: Mapping[str, Any], name: str) -> list[str]:
    """A field that is a list of texts, empty where it is missing; raises as ``typed`` does."""
    values = typed(config, name, list) or []
    for value in values:
        typed({name: "" if value is None else value}, name, str, getattr(config, "where", ""))
    return [str(value or "") for value in values]


def _is(value: object, kind: type[Any]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _inside(value: Any, config: Mapping[str, Any], where: str) -> Any:
    """The value; an object knows the file that it is part of."""
    if not isinstance(value, dict):
        return value
    out = JsonObject(value)
    out.where = where or getattr(config, "where", "")
    return out
