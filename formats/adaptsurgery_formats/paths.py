"""Names that become a part of a path: which would lead elsewhere, and which no file can have."""

from __future__ import annotations

import os

from adaptsurgery_formats.errors import FileError

LONGEST = 255  # bytes of a name, on every common file system
_DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"}
_DEVICES |= {f"{port}{n}" for port in ("com", "lpt") for n in "0123456789¹²³"}


def leads_out(name: str) -> bool:
    """Whether a name, read from a file, leads out of its folder on some system."""
    return name in ("", ".", "..") or any(c in name for c in "/\\\0:")


def misnamed(name: str) -> str:
    """Why some system cannot have a file of this name, in a few words; "" where all can."""
    if leads_out(name):
        return "it leads out of its folder" if name else "it is empty"
    if not name.isprintable():
        return "it has control characters"
    if name.endswith((".", " ")):
        return "it ends in a dot or a space, which Windows leaves away"
    if is_device(name):
        return "it is a device's name on Windows"
    return f"it is longer than {LONGEST} bytes" if _too_long(name) else ""


def is_device(name: str) -> bool:
    """Whether a name is a device's on Windows, whatever follows its first dot."""
    return name.partition(".")[0].rstrip().lower() in _DEVICES


def check_text(path: str | os.PathLike[str]) -> None:
    """Raise FileError ``bad-name`` for a path that no system call takes: a null, half a character."""
    try:
        broken = b"\0" in os.fsencode(path)
    except UnicodeEncodeError:
        broken = True
    if broken:
        raise FileError(
            "no file can have such a name",
            where=repr(os.fspath(path))[:200],
            seen="a null, or half a character",
            code="bad-name",
        )


def check_name(name: str, where: str, next: str = "") -> None:
    """Raise FileError ``path-escapes`` for a name that would lead out of its folder, ``bad-name`` for
    one that is too long to be any file's."""
    if leads_out(name):
        raise FileError(
            "a file name leads out of the folder",
            where=where,
            seen=repr(name),
            next=next,
            code="path-escapes",
        )
    if _too_long(name):
        raise FileError(
            f"a file name is longer than {LONGEST} bytes",
            where=where,
            seen=repr(name),
            next=next,
            code="bad-name",
        )


def check_below(name: object, where: str) -> None:
    """Raise FileError ``path-escapes`` for a relative path that leads out of the folder it starts in.

    Its parts, between slashes, may have any name that a file of this system can have.
    """
    separators = "\0" if os.sep == "/" else "\0\\:"
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") or any(c in part for c in separators) for part in parts):
        raise FileError(
            "a file name leads out of the folder", where=where, seen=repr(name), code="path-escapes"
        )


def _too_long(name: str) -> bool:
    return len(name.encode("utf-8", "surrogatepass")) > LONGEST
