"""A switch for formulas that are traced for export, and must use what every exporter has.

A formula may have two forms, one that is fast and one of plain products; both stand in its
algorithm's file, and this module says which is wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_PLAIN: ContextVar[bool] = ContextVar("plain", default=False)


def plain_operations() -> bool:
    """Whether formulas take their plain form, as within ``exporting`` and torch.export."""
    if torch.compiler.is_dynamo_compiling():  # which cannot read a context variable
        return bool(torch.compiler.is_exporting())
    return _PLAIN.get() or torch.compiler.is_exporting()


@contextmanager
def exporting() -> Iterator[None]:
    """Make formulas take their plain form within the block."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)
