"""The kinds of input, each with the function that makes one of a seed."""

from __future__ import annotations

import random
from collections.abc import Callable

from fuzzing import adapters, bases, commands, folders, headers, numbers, pickles, plans, programs
from fuzzing.inputs import Input

KINDS: dict[str, Callable[[random.Random, int], Input]] = {
    "headers": headers.make,
    "adapters": adapters.make,
    "folders": folders.make,
    "bases": bases.make,
    "programs": programs.make,
    "pickles": pickles.make,
    "plans": plans.make,
    "commands": commands.make,
    "numbers": numbers.make,
}
