"""How strong an update is: its scale times its weight, in float64, or refused. Without torch."""

from __future__ import annotations

import math

from adaptsurgery_formats.errors import ValueRefused


def times(weight: float, scale: float) -> float:
    """weight·scale; ValueRefused "out-of-range" where float64 has no such number.

    A product that rounds to 0, or keeps only a part of its digits, is refused as well: the update
    would be left out, or be another one, without a word.
    """
    strength = weight * scale
    vanished = bool(weight and scale) and is_lost(strength)
    if vanished or not math.isfinite(strength):
        raise ValueRefused(
            f"weight {weight:g} times scale {scale:g} is no number that float64 has",
            seen=f"{strength:g}",
            next="another weight; 0 leaves the adapter out",
            code="out-of-range",
        )
    return strength


def is_lost(number: float) -> bool:
    """Whether a number that should not be 0 is, or is so small that digits are missing."""
    return abs(number) < 2.0**-1022
