"""An output that takes long to make: its finished parts beside it, until it can be put in place.

Beside OUT, while the work goes on::

    .adaptsurgery-<digest>.partial/
        files/       finished parts, each there in full or not at all
        norms/       a record of each part: what was measured on it, and what its file was like
        locks/       one per part: several processes may work on one plan; and one per run
        work/        parts that are being written
        landing.json what is about to become OUT, by its inode

The name follows from the plan and OUT's name, so that the next run of the same work finds what a
killed one has done. Nobody else may enter the folder, and one that is not the user's own is not
used. A part is taken up if its file is still what its record says: size, inode, times (a change
cannot but move the last of them), and a hash, of all of a small file and of samples of a large one.
Nothing below OUT's own name changes before the last step, a rename. A run that is killed right
after it has OUT's inode noted: the next one knows its own output.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adaptsurgery.checkpoint import atomic, locks, system
from adaptsurgery.checkpoint.failures import as_file_error
from adaptsurgery_formats.errors import FileError, SurgeryError
from adaptsurgery_formats.paths import check_text

_SAMPLES, _SAMPLE = 64, 4096  # of a part's file, for its record: how many blocks, of how many bytes
_RECORD = 1 << 30
_LOST = "output-exists"
_KEPT = "finished parts are kept, and the same command goes on from them"


class GoneError(Exception):
    """The partial output is not there any more."""


class Partial:
    """The partial output of a plan, beside the output. ``content`` is what becomes the output."""

    def __init__(self, digest: str, out: Path) -> None:
        check_text(out)
        name = digest.encode() + os.fsencode(out.name)
        self.out = out
        self.root = out.parent / f".adaptsurgery-{hashlib.sha256(name).hexdigest()[:16]}.partial"
        self.files = self.root / "files"
        self.landing = self.root / "landing.json"
        self.content = self.files
        self.sign = self.root / "locks" / f"run-{os.urandom(6).hex()}"
        self._held = -1
        self._ours = False
        self._known: dict[int, Any] = {}

    # -- Coming and going

    @contextmanager
    def entered(self, *, alone: bool) -> Iterator[None]:
        """The folders, made or taken up, with this run's sign in them while the block lasts.

        After an interrupt what the next run can use is kept: finished parts, or an output that has
        landed and is not done with. After an error it is removed whole, if nobody else works on it;
        unless ``alone`` is False, which says that other parts of the plan are expected: then what is
        finished is kept, and the error says so.

        Raises FileError ``bad-partial`` where the folder's name is taken by something else.
        """
        try:
            with locks.alone(self.out):
                self._check_ours()
                self._ours = True
                self.make(self.out)
                self._held = system.open_lock(self.sign)
                system.lock(self._held, wait=False)
            yield
        except BaseException as error:
            if self._ours:
                with locks.unbroken():
                    self._tidy(error, alone)
                if isinstance(error, SurgeryError):
                    error.next += self._kept(error.next)
            raise
        finally:
            self._sign_off()

    def make(self, out: Path) -> None:
        """The folders; empty where ``files`` is left of a run that had come to its end."""
        if self.landing.exists() and not self.landed(out) and not self._noted(self.content):
            shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(0o700, exist_ok=True)
        for name in ("files", "norms", "locks", "work"):
            (self.root / name).mkdir(exist_ok=True)

    def _check_ours(self) -> None:
        """Refuse what another has put under the folder's name; begin anew where others could write."""
        try:
            status = os.lstat(self.root)
        except FileNotFoundError:
            return
        mine = getattr(os, "geteuid", lambda: status.st_uid)()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != mine:
            raise FileError(
                "the partial output's name is taken by what is not this user's folder",
                where=str(self.root),
                next="remove it, or name another output",
                code="bad-partial",
            )
        if os.name != "nt" and status.st_mode & 0o022 and not self.busy():
            shutil.rmtree(self.root)

    def _tidy(self, error: BaseException, alone: bool) -> None:
        lost = isinstance(error, FileError) and error.code == _LOST
        failed = isinstance(error, Exception) and not isinstance(error, GoneError)
        with locks.alone(self.out):
            removable = lost or (alone and (failed or not self._started()))
            if removable and not self.landed(self.out) and not self.busy():
                self.remove()

    def _started(self) -> bool:
        return any(p.is_file() for p in self.files.rglob("*"))

    def _kept(self, next: str) -> str:
        """What an error says of finished parts that are still there."""
        kept = self._started() and _KEPT not in next
        return f"{'; ' if next else ''}{_KEPT}" if kept else ""

    def _sign_off(self) -> None:
        if self._held >= 0:
            os.close(self._held)
            self._held = -1
            self.sign.unlink(missing_ok=True)

    def busy(self) -> bool:
        """Whether another run works on it."""
        return busy(self.root, self.sign)

    def remove(self) -> None:
        """Remove it whole; from the first moment on nobody finds it under its name any more."""
        self._sign_off()
        aside = locks.hidden(self.out, f"-{os.urandom(6).hex()}.tmp")
        try:
            os.rename(self.root, aside)
        except OSError:  # it is gone, or a file in it is open on Windows
            aside = self.root
        shutil.rmtree(aside, ignore_errors=True)

    # -- Landing

    def land(self, out: Path, overwrite: bool, record: Path | None = None) -> None:
        """Note what becomes the output, and rename it, with its record; raises ``output-exists``."""
        replace_json(self.landing, atomic.identity(self.content))
        atomic.put(self.content, out, overwrite, record)

    def landed(self, out: Path) -> bool:
        """Whether the output is this plan's own, put there by a run that was killed right after."""
        return self._noted(out)

    def _noted(self, path: Path) -> bool:
        noted = atomic.read_record(self.landing)
        with suppress(OSError):
            return bool(noted) and noted == atomic.identity(path)
        return False

    # -- Parts

    def norms(self, number: int) -> Path:
        return self.root / "norms" / f"{number}.json"

    def record(self, number: int, result: Any, file: Path | None) -> None:
        """Keep what was measured on a finished part, and what its file is like."""
        noted = {"file": _print_of(file) if file else None, "result": result}
        replace_json(self.norms(number), {**noted, "sha256": _digest(noted)})
        self._known[number] = result

    def recorded(self, number: int, file: Path | None) -> Any:
        """What was measured on a finished part; None where it is not there, or not as it was."""
        if number not in self._known:
            noted = atomic.read_record(self.norms(number))
            if noted.pop("sha256", "") != _digest(noted):
                return None
            with suppress(OSError, KeyError):
                if noted.get("file") == (_print_of(file) if file else None):
                    self._known[number] = noted["result"]
        return self._known.get(number)

    def check_files(self, known: Collection[str]) -> None:
        """Refuse files that no run of this plan has put among the finished ones.

        ``known`` are relative names. Raises FileError ``strange-file``.
        """
        strange = sorted(name for name in _contents(self.files) if name not in known)
        if strange:
            raise FileError(
                "the partial output holds files that are not of this work",
                where=str(self.files),
                seen=", ".join(strange[:5]) + (" …" if len(strange) > 5 else ""),
                next=f"remove {self.root} and run again",
                code="strange-file",
            )

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Alone among all processes at one thing; where the file system has no locks, hopefully.

        Raises GoneError where another process has completed the output in the meantime.
        """
        path = self.root / "locks" / name
        try:
            fd = system.open_lock(path)
        except FileNotFoundError:
            raise GoneError from None
        try:
            system.lock(fd)
            if not locks.is_at(fd, path):
                raise GoneError
            yield
        finally:
            os.close(fd)

    # -- Errors

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
        failed = as_file_error(error, out if inside else about, writing=inside)
        failed.next += self._kept(failed.next)
        return failed

    def abandoned(self) -> list[Path]:
        """What killed runs of other plans have left beside the output, if nobody works on it now."""
        folders = sorted(self.root.parent.glob(".adaptsurgery-*.partial"))
        return [root for root in folders if root != self.root and not busy(root)]


def busy(root: Path, but: Path | None = None) -> bool:
    """Whether a process holds one of a partial output's locks, ``but`` for one."""
    return any(locks.is_held(path) for path in (root / "locks").glob("*") if path != but)


def _print_of(path: Path) -> dict[str, Any]:
    """What a finished file is like; raises OSError where it is none of ours."""
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "this is no regular file", str(path))
    times = {"modified": status.st_mtime_ns, "changed": status.st_ctime_ns}
    size = status.st_size
    return {"size": size, "inode": status.st_ino, **times, "sha256": _sampled(path, size)}


def _sampled(path: Path, size: int) -> str:
    """The hash of a file's bytes, of a large one's beginning, end and evenly spaced blocks between."""
    digest = hashlib.sha256()
    step = max(_SAMPLE, size // _SAMPLES)
    fd = system.open_input(path)
    try:
        for at in (*range(0, size, step), max(0, size - _SAMPLE)):
            digest.update(system.read_at(fd, _SAMPLE, at))
    finally:
        os.close(fd)
    return digest.hexdigest()


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _contents(folder: Path) -> Iterator[str]:
    """Relative names of all that lies below a folder but folders; a link is not followed."""
    for root, folders, files in os.walk(folder):
        here = Path(root).relative_to(folder)
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        yield from ((here / name).as_posix() for name in (*files, *links))


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    system.write_text(path, json.dumps(data, indent=2) + "\n")


def replace_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write beside and rename: a reader sees the old text or the new one, whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(3).hex()}.tmp")
    try:
        write_json(beside, data)
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
