"""Regular expressions that are compiled when they are first asked: most commands ask few of them."""

from __future__ import annotations

import re
from typing import Any


class Late:
    """A pattern's methods, by the names that ``re.Pattern`` gives them."""

    def __init__(self, source: str | bytes) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        bound = getattr(re.compile(self._source), name)
        self.__dict__[name] = bound
        return bound
