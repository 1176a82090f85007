"""One change of a model's adapters at a time: threads that add, delete and merge wait for each other.

A forward does not wait. It goes through the adapters that it finds active in a layer when it comes to
it, and through those left where one is taken out meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import RLock
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])


class Turn:
    """Whose turn it is to change a model; a copy or a pickle of one is a new one."""

    def __init__(self) -> None:
        self.lock = RLock()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()


def alone(method: _F) -> _F:
    """A method of what has a ``turn``, that no other thread changes anything during."""

    @wraps(method)
    def waiting(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.turn.lock: return method(self, *args, **kwargs)  # fmt: skip  # noqa: E701

    return waiting  # type: ignore[return-value]
