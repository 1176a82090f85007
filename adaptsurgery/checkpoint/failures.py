"""Operating-system errors, said as FileErrors."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from adaptsurgery_formats.errors import FileError, nearest

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_IN_USE = (32, 33)  # Windows' sharing and lock violations
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def as_file_error(error: OSError, where: str | os.PathLike[str], *, writing: bool) -> FileError:
    """The FileError that says what an OSError means for the file ``where``."""
    place = os.fspath(where)
    seen = error.strerror or str(error)
    if error.errno in FULL:
        return FileError(
            "there is no room to write it",
            where=place,
            seen=seen,
            next="free some space, or write to another disk",
            code="no-space",
        )
    if getattr(error, "winerror", None) in _IN_USE:
        return FileError(
            "another program has it open",
            where=place,
            seen=seen,
            next="close what uses it, and run again",
            code="in-use",
        )
    if error.errno in _DENIED:
        verb, code = ("written", "not-writable") if writing else ("read", "not-readable")
        return FileError(
            f"it may not be {verb}",
            where=place,
            seen=seen,
            next="check the permissions of the file and of its folder",
            code=code,
        )
    if error.errno == errno.ENOENT and not writing:
        return missing_file(place)
    if error.errno == errno.EISDIR:
        return FileError("a file was expected, this is a folder", where=place, code="is-directory")
    verb = "written" if writing else "read"
    return FileError(f"it cannot be {verb}", where=place, seen=seen, code="bad-file")


def missing_file(where: str | os.PathLike[str]) -> FileError:
    """A "no-such-file" FileError with the nearest names that do exist as a hint."""
    path = Path(where)
    folder = path.parent
    try:
        hint = nearest(path.name, os.listdir(folder))
        trouble = "no such file"
    except (OSError, ValueError):  # ValueError: a null, or half a character, in the name
        hint = ""
        trouble = f"no such file: the folder `{folder}` does not exist"
    return FileError(trouble, where=os.fspath(where), next=hint, code="no-such-file")
