"""How well an update gives a difference: measured on the update itself, a block of rows at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaptsurgery.core.update import Delta

ROWS = 1 << 20  # numbers in a block


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
    """‖D‖ of a D·2⁻ᵉ."""
    low, high = powers(exponent, 2)
    return float(torch.linalg.vector_norm(scaled, dtype=torch.float64)) * low * high


def relative_error(update: Delta, delta: Tensor) -> float:
    """‖D − s·Δ‖ / ‖D‖ for D (o, i, *k), summed in float64; 0 where both are 0.

    Of an update of D's dtype and a D ``in_range``. Infinite where Δ is not finite, or D is 0 alone.
    """
    matrix, ready = delta.flatten(1), update.prepared(delta.dtype, delta.device)
    missing = total = 0.0
    with torch.no_grad():
        for start in range(0, len(matrix), step := max(1, ROWS // matrix.shape[1])):
            block = matrix[start : start + step].clone()
            total += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
            ready.add_rows_(block, start, start + len(block), -update.scale)
            missing += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
    if not missing:
        return 0.0
    return math.sqrt(missing / total) if total and math.isfinite(missing) else math.inf
