"""The law of several updates on one layer, as data: each says its own place in the order.

    W' = (W·R1·R2·…) ∘ l + Σ w·s·Δ, then a Renorm

Files, live models and graphs all sort by ``order_of``, which refuses what has no place, so that
nothing that is new to one of them is left out by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import TypeVar

from adaptsurgery_formats.errors import ValueRefused

T = TypeVar("T")


class Order(IntEnum):
    """The place of an update among all on one weight; updates of one place keep their order."""

    TURN = 0  # W·R
    SCALE = 1  # W ∘ l
    ADD = 2  # W + s·Δ
    RENEW = 3  # new norms, of which a weight takes one set


def order_of(update: object) -> Order:
    """An update's place. ValueRefused ("unknown-update") where it says none."""
    order = getattr(update, "order", None)
    if isinstance(order, Order):
        return order
    raise unknown_update(update, "the law of several updates on one weight")


def in_order(updates: Iterable[T]) -> list[T]:
    """Updates as they come, each kind's own order kept. Raises what ``order_of`` does."""
    return sorted(updates, key=order_of)


def unknown_update(update: object, by: str) -> ValueRefused:
    """The refusal of an update whose kind is known to nobody, or not here."""
    name = getattr(update, "name", "") or type(update).__name__
    return ValueRefused(
        f"{by} knows no update of the kind `{name}`",
        seen=f"a {type(update).__name__}",
        next="an update that is a Delta, a Rotation, a Scaling or a Renorm",
        code="unknown-update",
    )
