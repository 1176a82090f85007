"""What a pickle would build, weighed by its opcodes before anything is built.

A tuple may hold another one twice, and that one a third one twice, and so on: sixty of them take a few
hundred bytes, and hashing the outermost as a dictionary's key takes 2^60 steps that nothing stops. A
call may ask for gigabytes by one number, and so may the number of a place in the unpickler's memory. So
each value is given a weight, which is 1 and those of what it is made of, and what asks for more than a
file of names and tensors can need is refused.
"""

from __future__ import annotations

import pickletools
from typing import BinaryIO

_HEAVIEST = 1 << 22  # of a tuple: what is hashed in a moment
_MOST_BYTES = 1 << 24  # that a call gives, without a record that holds them
_APART = 1 << 20  # places of memory beyond those that are taken
_NO_KEYS = frozenset("""DICT LIST EMPTY_DICT EMPTY_LIST EMPTY_SET APPEND APPENDS SETITEM SETITEMS
    ADDITEMS BUILD""".split())  # fmt: skip
_PUT = frozenset(["PUT", "BINPUT", "LONG_BINPUT"])
_GET = frozenset(["GET", "BINGET", "LONG_BINGET"])
_CALLS = frozenset(["REDUCE", "NEWOBJ", "NEWOBJ_EX"])
_SIZED = ("bytearray", "Storage", "Tensor")  # endings of what takes a size

Value = tuple[int, int, str]  # weight, largest number in it, the name that it stands for
_MARK: Value = (0, 0, "")
_ONE: Value = (1, 0, "")


class Overweight(ValueError):
    """A pickle would build what takes far more steps or memory than the pickle has bytes."""


def weigh(data: bytes | BinaryIO) -> None:
    """Go through one pickle, to its end; Overweight for what is too heavy in it.

    A file is left behind the pickle. Raises ValueError or LookupError for what is no pickle.
    """
    scale = _Scale()
    for opcode, argument, _ in pickletools.genops(data):
        scale.take(opcode, argument)


class _Scale:
    """An unpickler's stack and memory, with weights in the values' places."""

    def __init__(self) -> None:
        self.stack: list[Value] = []
        self.memory: dict[object, Value] = {}

    def take(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        name = opcode.name
        if name in _PUT:
            self.put(argument)
        elif name == "MEMOIZE":
            self.memory[len(self.memory)] = self.stack[-1]
        elif name in _GET:
            self.stack.append(self.memory[argument])
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        elif name == "MARK":
            self.stack.append(_MARK)
        elif opcode.stack_before:
            self.made(opcode)
        elif isinstance(argument, int) and name != "PROTO":
            self.stack += [(1, argument, "")] * len(opcode.stack_after)
        else:
            named = argument if name == "GLOBAL" and isinstance(argument, str) else ""
            self.stack += [(1, 0, named)] * len(opcode.stack_after)

    def put(self, place: object) -> None:
        if isinstance(place, int) and place > len(self.memory) + _APART:
            raise Overweight(f"a value that is kept in place {place}")
        self.memory[place] = self.stack[-1]

    def made(self, opcode: pickletools.OpcodeInfo) -> None:
        """A value made of those that its opcode takes from the stack."""
        parts = self.popped(opcode)
        weight = 1 + sum(part[0] for part in parts)
        number = max((part[1] for part in parts), default=0)
        if opcode.name in _NO_KEYS:
            weight = 1
        if weight > _HEAVIEST:
            raise Overweight(f"a value made of {weight}")
        if opcode.name in _CALLS and number > _MOST_BYTES:
            if any(part[2].endswith(_SIZED) for part in parts):
                raise Overweight(f"a call that asks for {number} bytes")
        self.stack += [(weight, number, "")] * len(opcode.stack_after)

    def popped(self, opcode: pickletools.OpcodeInfo) -> list[Value]:
        """What an opcode takes from the stack: a few values, or all above the last mark."""
        before, parts = opcode.stack_before, []
        if pickletools.markobject in before:
            while (part := self.stack.pop()) is not _MARK:
                parts.append(part)
            before = before[: before.index(pickletools.markobject)]
        return [*parts, *(self.stack.pop() for _ in before)]
