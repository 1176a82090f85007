"""Plain data that has been through JSON, made into the dataclasses that it came from.

A field's annotation says what may stand there: whole numbers, texts, true or false, finite numbers,
other dataclasses, tuples of them, mappings from texts, or None where the annotation lets it.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import types
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_LARGEST = 1 << 63


def record(value: Any, kind: Any, name: str) -> Any:
    """``value`` as ``kind`` says; ValueError, with the place by its ``name``, where it is not so."""
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _made(value, kind, name)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (kind,) = (arg for arg in args if arg is not type(None))
        return None if value is None else record(value, kind, name)
    if origin is tuple:
        return tuple(_items(value, args, name))
    if origin is Literal and value in args:
        return value
    if origin in (dict, collections.abc.Mapping):
        return {key: record(v, args[1], f"{name}.{key}") for key, v in _object(value, name).items()}
    if origin is Literal or not _is(value, kind):
        raise ValueError(f"{name} is not {getattr(kind, '__name__', kind)}: {value!r:.40}")
    return value


def _made(value: Any, kind: Any, name: str) -> Any:
    given, hints = _object(value, name), _hints(kind)
    if strange := given.keys() - hints.keys():
        raise ValueError(f"{name} has no {sorted(strange)[0]:.40}")
    fields = dataclasses.fields(kind)
    if missing := [f.name for f in fields if f.name not in given and _needed(f)]:
        raise ValueError(f"{name} lacks {missing[0]}")
    return kind(**{key: record(v, hints[key], f"{name}.{key}") for key, v in given.items()})


@cache
def _hints(kind: Any) -> Mapping[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _items(value: Any, args: tuple[Any, ...], name: str) -> Iterator[Any]:
    endless = args[-1] is Ellipsis
    if not isinstance(value, list) or not (endless or len(value) == len(args)):
        raise ValueError(f"{name} is no list of that length: {value!r:.40}")
    for number, item in enumerate(value):
        yield record(item, args[0] if endless else args[number], f"{name}.{number}")


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no object: {value!r:.40}")
    return value


def _is(value: Any, kind: type[Any]) -> bool:
    """Whether a value is of a plain type; a whole number is one for a float, half a character no text."""
    if kind is float:
        return (type(value) is float and math.isfinite(value)) or _is(value, int)
    if kind is str and type(value) is str:
        return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)
    return type(value) is kind and (kind is not int or abs(value) < _LARGEST)
