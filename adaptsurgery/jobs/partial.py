"""An output that takes long to make: its finished parts beside it, until it can be put in place.

Beside OUT, while the work goes on::

    .adaptsurgery-<digest>.partial/
        files/       finished parts, each there in full or not at all
        norms/       what was measured on each
        locks/       one per part: several processes may work on one plan
        work/        parts that are being written
        landing.json what is about to become OUT, by its inode

The name follows from the plan and OUT's name, so that the next run of the same work finds what a
killed one has done. Nothing below OUT's own name changes before the last step, a rename. A run
that is killed right after it has OUT's inode noted: the next one knows its own output.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adaptsurgery.checkpoint import atomic
from adaptsurgery.checkpoint.failures import as_file_error
from adaptsurgery_formats.errors import FileError, SurgeryError


class GoneError(Exception):
    """The partial output is not there any more."""


class Partial:
    """The partial output of a plan, beside the output. ``content`` is what becomes the output."""

    def __init__(self, digest: str, out: Path) -> None:
        name = digest.encode() + os.fsencode(out.name)
        self.root = out.parent / f".adaptsurgery-{hashlib.sha256(name).hexdigest()[:16]}.partial"
        self.files = self.root / "files"
        self.landing = self.root / "landing.json"
        self.content = self.files

    def make(self, out: Path) -> None:
        """The folders; empty where ``files`` is left of a run that had come to its end."""
        if self.landing.exists() and not self.landed(out) and not self._noted(self.content):
            shutil.rmtree(self.root, ignore_errors=True)
        for name in ("files", "norms", "locks", "work"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def land(self, out: Path, overwrite: bool) -> None:
        """Note what becomes the output, and rename it."""
        told = os.stat(self.content)
        replace_json(self.landing, {"device": told.st_dev, "inode": told.st_ino})
        atomic.put(self.content, out, overwrite)

    def landed(self, out: Path) -> bool:
        """Whether the output is this plan's own, put there by a run that was killed right after."""
        return self._noted(out)

    def _noted(self, path: Path) -> bool:
        try:
            noted = json.loads(self.landing.read_text("utf-8"))
            told = os.lstat(path)
        except (OSError, ValueError, RecursionError):
            return False
        return bool(noted == {"device": told.st_dev, "inode": told.st_ino})

    def norms(self, number: int) -> Path:
        return self.root / "norms" / f"{number}.json"

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Alone among all processes at one thing; where the file system has no locks, hopefully.

        Raises GoneError where another process has completed the output in the meantime.
        """
        import fcntl

        path = self.root / "locks" / name
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            raise GoneError from None
        try:
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX)
            if not path.exists():
                raise GoneError
            yield
        finally:
            os.close(fd)

    @contextmanager
    def tidy(self, *, alone: bool) -> Iterator[None]:
        """After an error keep what the next run can use: finished parts, or nothing.

        What no further run would mend (a refusal) is removed whole, if nobody else works on it.
        """
        try:
            yield
        except BaseException as error:
            hopeless = isinstance(error, SurgeryError) and not isinstance(error, FileError)
            started = any(p.is_file() for p in self.files.rglob("*"))
            if alone and (hopeless or not started):
                self.remove()
            raise

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def vanished(self) -> FileError:
        """The error for a partial output that somebody removed while it was worked on."""
        return FileError(
            "the partial output vanished",
            where=str(self.root),
            next="run again",
            code="bad-partial",
        )

    def said(self, error: OSError, out: Path) -> FileError:
        """An OSError from the work as a FileError about the file that it is about, or OUT."""
        about = (
            Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else out
        )
        inside = about == out or about.is_relative_to(self.root)
        return as_file_error(error, out if inside else about, writing=inside)

    def abandoned(self) -> list[Path]:
        """What killed runs of other plans have left beside the output, if nobody works on it now."""
        found = sorted(self.root.parent.glob(".adaptsurgery-*.partial"))
        return [root for root in found if root != self.root and not busy(root)]


def busy(root: Path) -> bool:
    """Whether a process holds one of a partial output's locks."""
    import fcntl

    for path in (root / "locks").glob("*"):
        with suppress(FileNotFoundError), open(path, "rb+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
    return False


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", "utf-8")


def replace_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write beside and rename: the copy may share its bytes with another file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_json(beside, data)
    os.replace(beside, path)
