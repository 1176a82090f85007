"""Differences of any scale: worked on near 1, and what is found for them put back, to the bit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaptsurgery.nearest.goal import norm_of


def in_range(delta: Tensor) -> tuple[Tensor, int]:
    """D·2⁻ᵉ with its largest number between ½ and 1, and e.

    No square or product of it leaves the range of its dtype, however large or small D is, and what
    is found for it is D's own, to the bit, times ``powers(e, …)``.
    """
    largest = max(abs(float(end)) for end in torch.aminmax(delta))
    exponent = math.frexp(largest)[1] if largest else 0
    low, high = powers(-exponent, 2)  # one step could leave float32's range
    return delta * low * high, exponent


def powers(exponent: int, count: int) -> list[float]:
    """2ᵉ as a product of ``count`` powers of two, as equal as can be."""
    return [2.0 ** ((exponent + part) // count) for part in range(count)]


def full_norm(scaled: Tensor, exponent: int) -> float:
    """‖D‖, from D·2⁻ᵉ and e."""
    low, high = powers(exponent, 2)
    return norm_of(scaled) * low * high
