"""Who may read an output: nobody who may not read all that it is made of."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

AnyPath = str | os.PathLike[str]
_GROUP, _OTHERS = 0o070, 0o007


def shared_bits(paths: Iterable[AnyPath], group: int) -> int:
    """The permission bits that a file of ``group`` may have which is made of these files and folders.

    A folder counts by who may enter it. A class that may not read one of them loses all its bits;
    where only an input's own group may read it, so does another group.
    """
    bits = 0o777
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:  # who reads it will tell
            continue
        bits &= _bits_of(status, group)
    return bits


def _bits_of(status: os.stat_result, group: int) -> int:
    needed = 0o011 if stat.S_ISDIR(status.st_mode) else 0o044
    open_to = status.st_mode & needed
    if open_to == needed:
        return 0o777
    own_group = open_to & _GROUP and status.st_gid == group
    return 0o777 & ~_OTHERS if own_group else 0o777 & ~_GROUP & ~_OTHERS


def narrow(path: Path, inputs: Iterable[AnyPath]) -> None:
    """Take from a file, or a folder and all in it, what ``shared_bits`` of its inputs does not leave.

    Windows has other permissions, which a file takes from its folder.
    """
    if os.name != "nt":
        narrow_to(path, shared_bits(inputs, os.lstat(path).st_gid))


def narrow_to(path: Path, bits: int) -> None:
    """Take all other permission bits from a file, or a folder and all in it, where there are some."""
    if os.name == "nt" or bits == 0o777:
        return
    for each in below(path):
        mode = stat.S_IMODE(os.lstat(each).st_mode)
        if mode & ~bits & 0o777 and not os.path.islink(each):
            os.chmod(each, mode & (bits | 0o7000))


def below(path: Path) -> Iterator[str]:
    """A file, or a folder and every file and folder in it; links are not followed."""
    yield os.fspath(path)
    for root, folders, files in os.walk(path):
        yield from (os.path.join(root, name) for name in (*folders, *files))
