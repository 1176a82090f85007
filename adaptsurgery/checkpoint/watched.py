"""What a job reads is watched while it reads: noted when it is opened, looked at again at the end.

Tensors are read lazily, so a file that changes in the meantime would give a mixture of old and new
numbers. ``system.open_input`` notes every file that it opens within ``watching()``, and before an
output lands or a verdict is given ``check_watched`` asks whether each is still what it was.

A file is another one if its size, its time of modification or its inode is. A writer that puts the
time back moves ctime all the same; so do chmod, chown and a new hard link, which leave the bytes
alone and show in mode, owner and count of links. So a ctime that moved counts where none of these
did. Two writes within one tick of the file system's clock look like one, and are not told apart.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from adaptsurgery_formats.errors import FileError, SurgeryError


@dataclass(frozen=True, eq=False, repr=False)
class Stamp:
    """A file by what its system says of it: identity, size and times, not its bytes."""

    size: int
    modified: int
    inode: tuple[int, int]
    changed: int
    rights: tuple[int, ...]

    @classmethod
    def of(cls, stat: os.stat_result) -> Stamp:
        rights = (stat.st_mode, stat.st_uid, stat.st_gid, stat.st_nlink)
        inode = (stat.st_dev, stat.st_ino)
        return cls(stat.st_size, stat.st_mtime_ns, inode, stat.st_ctime_ns, rights)

    def same(self, now: Stamp) -> bool:
        """Whether a later stamp of the same path is of the same bytes."""
        if (self.size, self.modified, self.inode) != (now.size, now.modified, now.inode):
            return False
        return self.changed == now.changed or self.rights != now.rights


Watched = Mapping[str, Stamp]


@dataclass(eq=False, repr=False)
class _Notes:
    """The files opened within one ``watching()``, by absolute path, and the notes around it."""

    outer: _Notes | None
    stamps: dict[str, Stamp] = field(default_factory=dict)


_current: ContextVar[_Notes | None] = ContextVar("watched", default=None)


def note(path: str | os.PathLike[str], stat: os.stat_result) -> None:
    """Remember what a file was when it was opened; the first time counts."""
    notes = _current.get()
    if notes is not None:
        notes.stamps.setdefault(os.path.abspath(os.fsdecode(path)), Stamp.of(stat))


@contextmanager
def watching() -> Iterator[dict[str, Stamp]]:
    """Note the files that are opened within; what surrounds this one gets its notes at the end."""
    notes = _Notes(_current.get())
    token = _current.set(notes)
    try:
        yield notes.stamps
    finally:
        _current.reset(token)
        if notes.outer is not None:
            notes.outer.stamps.update({**notes.stamps, **notes.outer.stamps})


def current() -> Watched:
    """What has been noted so far by the innermost ``watching()``."""
    notes = _current.get()
    return {} if notes is None else notes.stamps


@contextmanager
def unchanged() -> Iterator[dict[str, Stamp]]:
    """Raise FileError "input-changed" where a file that is read within is not the same at its end.

    Whatever else was refused meanwhile may be the change's fault, and gives way to it.
    """
    with watching() as watched:
        try:
            yield watched
        except SurgeryError as error:
            check_watched(watched, error)
            raise
        check_watched(watched)


def check_watched(watched: Watched, cause: BaseException | None = None) -> None:
    """Raise FileError "input-changed" unless every file is what it was when it was noted."""
    for path, before in watched.items():
        try:
            now = Stamp.of(os.stat(path))
        except OSError as error:
            raise changed(path, error.strerror or str(error)) from (cause or error)
        if not before.same(now):
            raise changed(path, _difference(before, now)) from cause


def _difference(before: Stamp, now: Stamp) -> str:
    if before.inode != now.inode:
        return "another file has its name now"
    if before.size != now.size:
        return f"{now.size} bytes, {before.size} before"
    return "it was written to"


def changed(path: str, seen: str = "") -> FileError:
    """The error for an input that is no longer what it was when the work began."""
    return FileError(
        "it has changed while it was read",
        where=path,
        seen=seen,
        next="nothing was written; run again when it is left alone",
        code="input-changed",
    )
