"""The one rule by which an adapter's forward picks its form.

A form's price is its multiplications plus 16 for every number it streams through memory (fp32;
measured: within 12 % of the best form over 140 shapes). "factored" pays on every position;
"folded" builds W' once a call and then costs what the bare layer costs. In training a folded form
also pays for the gradient of W', one product of the layer's own size, which a frozen base and
factored adapters never need.
"""

from __future__ import annotations

from typing import Literal

ApplyForm = Literal["auto", "factored", "bilinear", "folded"]
STREAM = 16


def price(multiplications: int, streamed: int) -> int:
    """What a form costs, in multiplications."""
    return multiplications + STREAM * streamed


def folding(build: int, numbers: int, positions: int, training: bool) -> int:
    """The price of W' = W + sΔ in one pass: W read, W' written, Δ built with ``build`` products."""
    gradient = positions * numbers // 3 if training else 0  # once, where all else is done thrice
    return price(build, 2 * numbers) + gradient


def cheapest(prices: dict[ApplyForm, int]) -> ApplyForm:
    """The form with the least price, the first of equals."""
    return min(prices, key=lambda form: prices[form])
