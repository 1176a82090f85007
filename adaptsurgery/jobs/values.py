"""Numbers that a job is asked with: whole, finite, within their range, or refused by name."""

from __future__ import annotations

from numbers import Integral

from adaptsurgery.core.strength import is_lost
from adaptsurgery_formats.errors import ValueRefused


def check_whole(
    option: str, value: object, least: int | None = 1, most: int | None = None, code: str = ""
) -> None:
    """Raise ValueRefused ("bad-number", or ``code``) unless it is an int from ``least`` to ``most``."""
    if is_whole(value, least, most):
        return
    span = f"from {least} to {most}" if most is not None else f"of at least {least}"
    raise ValueRefused(
        f"{option} {value} is not offered",
        next="a whole number" + (f" {span}" if least is not None else ""),
        code=code or "bad-number",
    )


def is_whole(value: object, least: int | None = 1, most: int | None = None) -> bool:
    """Whether a value is an integer, of Python's or of numpy's, from ``least`` to ``most``."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        return False
    number = int(value)
    return (least is None or number >= least) and (most is None or number <= most)


def read_number(text: str) -> float:
    """The float that a text says; ValueError where it says none, NaN, or more or less than a float.

    What a float can only round to 0, or to a number with digits missing, is less.
    """
    number = float(text)
    if number - number != 0 or (is_lost(number) and _says_more_than_0(text)):
        raise ValueError(text)
    return number


def _says_more_than_0(text: str) -> bool:
    digits = text.lower().partition("e")[0]
    return any(digit.isdecimal() and int(digit) for digit in digits)
