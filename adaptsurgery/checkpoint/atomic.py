"""Outputs that are there in full or not at all.

The bytes are written in a hidden folder beside the target, which nobody else may enter, forced to
disk, and only then renamed into place::

    .adaptsurgery-<digest of the target's name>-<random>.tmp/
        content    what becomes the target
        lock       held while its run lives
        swap.json  which folder is being replaced, where that takes two steps

An error or Ctrl-C leaves what was there before; a killed process leaves at most the hidden folder,
which the next run into the same target removes, or puts in place if that was begun.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from adaptsurgery.checkpoint import locks, privacy, system
from adaptsurgery.checkpoint.failures import FULL, as_file_error
from adaptsurgery_formats.errors import FileError, SurgeryError
from adaptsurgery_formats.paths import check_text

RECORD = ".manifest.json"  # after a file's name: what a merge tells of it
landed: list[str] = []  # what this process has put in place; an interrupted command tells of it
_RECORD_JOBS = ("merge", "unmerge")
_RECORD_SIZE = 1 << 30
_SWAP = "swap.json"


@contextmanager
def output(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    directory: bool = False,
    replaceable: Collection[str] = (),
    needed: int = 0,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> Iterator[Path]:
    """A temporary path to write to, which becomes ``path`` when the block ends without an error.

    A file's path does not exist yet; a directory's does, and is empty. ``needed`` is the number of
    bytes to come, to refuse a full disk beforehand. An existing directory is replaced only if all
    it holds matches ``replaceable``: relative names or patterns such as "*.safetensors" or
    "unet/config.json", where * stays within one folder. Nobody may read the output who may not read
    all of ``inputs``, and the output that it replaces.

    Raises FileError: ``output-exists``, ``output-is-symlink``, ``output-not-ours``,
    ``is-directory``, ``not-a-directory``, ``no-such-folder``, ``no-space``, ``not-writable``,
    ``name-too-long``.
    """
    target = Path(path)
    check_output(
        target, overwrite=overwrite, directory=directory, replaceable=replaceable, needed=needed
    )
    with _room(target, needed) as room:
        if directory:
            os.mkdir(room.content)
        yield room.content
        privacy.narrow(room.content, (*inputs, *_old(target)))
        sync(room.content)
        with locks.alone(target), locks.unbroken():
            put(room.content, target, overwrite)
            sync_folder(target.parent)
            room.leave()


@contextmanager
def outputs(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    beside: Collection[str] = (),
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> Iterator[Path]:
    """A temporary folder for a file and others that stand beside it; each lands under its own name.

    The file of ``path``'s name comes last. ``beside`` are the endings that the others' names may
    have after the file's. As ``output`` otherwise.
    """
    target, sources = Path(path), list(inputs)
    check_output(target, overwrite=overwrite, beside=beside)
    with _room(target, 0) as room:
        os.mkdir(room.content)
        yield room.content
        files = sorted(room.content.iterdir(), key=lambda file: file.name == target.name)
        for file in files:
            privacy.narrow(file, (*sources, *_old(target.with_name(file.name))))
            sync(file)
        with locks.alone(target), locks.unbroken():
            for file in files:
                put(file, target.with_name(file.name), overwrite)
            sync_folder(target.parent)
            room.leave()


@contextmanager
def _room(target: Path, needed: int) -> Iterator[Room]:
    """A hidden folder while the block lasts; what goes wrong there is said of the target."""
    room = Room(target)
    try:
        room.enter()
        yield room
    except OSError as error:
        raise _said(error, room.path, target, needed) from error
    except SurgeryError as error:
        if error.code == "no-space":
            raise _no_space(target, needed) from error
        error.where = error.where.replace(str(room.content), str(target))
        raise
    finally:
        with locks.unbroken():
            room.leave()


class Room:
    """A hidden folder beside an output, of one run: its lock, and what becomes the output."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = locks.hidden(target, f"-{os.urandom(6).hex()}.tmp")
        self.content = self.path / "content"
        self.fd = -1

    def enter(self) -> None:
        with locks.alone(self.target):
            os.mkdir(self.path, 0o700)
            self.fd = system.open_lock(self.path / "lock")
            system.lock(self.fd, wait=False)

    def leave(self) -> None:
        """Remove it, but for the content of a landing that could not be finished or taken back."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if not ((self.path / _SWAP).exists() and self.content.exists()):
            _remove_folder(self.path)


def sweep(target: Path) -> None:
    """Remove what killed runs have left beside an output, or put it in place if that was begun."""
    if not any(target.parent.glob(locks.hidden(target, "*").name)):
        return
    with locks.alone(target):
        for path in target.parent.glob(locks.hidden(target, "-*.tmp").name):
            if _locks_work(target.parent) and not locks.is_held(path / "lock"):
                _settle(path, target)


def _locks_work(folder: Path) -> bool:
    """Whether a lock keeps anybody out here: who cannot tell the dead from the living lets both be."""
    path = folder / f".adaptsurgery-{os.urandom(6).hex()}.lock"
    try:
        fd = system.open_lock(path)
    except OSError:
        return False
    try:
        return system.lock(fd, wait=False) and locks.is_held(path)
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def _settle(room: Path, target: Path) -> None:
    """End what a dead run began: of two steps that replace a folder, the second one is still to do."""
    content, replaced = room / "content", read_record(room / _SWAP)
    if replaced and content.is_dir():
        with suppress(OSError):
            if os.path.lexists(target) and identity(target) == replaced:
                _remove_folder(target)
            if not os.path.lexists(target):
                os.rename(content, target)
    _remove_folder(room)


def read_record(path: Path) -> dict[str, Any]:
    """A small file's JSON object, empty where there is none."""
    try:
        data = json.loads(system.read_file(path, _RECORD_SIZE))
    except (OSError, ValueError, RecursionError, FileError):
        return {}
    return data if isinstance(data, dict) else {}


def identity(path: Path) -> dict[str, int]:
    """What a file or folder keeps through a rename."""
    status = os.lstat(path)
    return {"device": status.st_dev, "inode": status.st_ino}


def _old(target: Path) -> Iterator[str]:
    """The output that is replaced, whose privacy is kept."""
    if os.path.lexists(target):
        yield from privacy.below(target)


def check_output(
    target: Path,
    *,
    overwrite: bool = False,
    directory: bool = False,
    replaceable: Collection[str] = (),
    needed: int = 0,
    beside: Collection[str] = (),
    inner: Collection[str] = (),
) -> None:
    """Everything that ``output`` can refuse before a byte is written, also for a dry run.

    ``beside`` are endings of further files that will stand beside the target under its name,
    ``inner`` the names of what will lie in it.
    """
    where = str(target)
    check_text(target)
    if why := system.refused_name(target):
        raise FileError("no file can have such a name", where=where, seen=why, code="bad-name")
    _check_parent(target)
    _check_names(target, beside, inner)
    sweep(target)
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        mode = None
    except OSError as error:
        raise as_file_error(error, where, writing=True) from error
    if mode is not None:
        _check_existing(target, mode, overwrite, directory, replaceable)
    if needed > system.free_space(target.parent):
        raise _no_space(target, needed)


def _check_names(target: Path, beside: Collection[str], inner: Collection[str]) -> None:
    """Refuse names and paths longer than the file system's, before there is anything to lose."""
    names = [target.name + ending for ending in ("", *beside)]
    names += [part for name in inner for part in name.split("/")]
    longest, limit = max(names, key=_length), _limit(target.parent, "PC_NAME_MAX", 255)
    if _length(longest) > limit:
        _refuse_name(target, longest, limit)
    path = str(locks.hidden(target, "-0123456789ab.partial/files/")) + max(
        inner, key=len, default=""
    )
    if _length(path) > (limit := _limit(target.parent, "PC_PATH_MAX", 1 << 15)):
        _refuse_name(target, path, limit)


def _length(name: str) -> int:
    return len(name) if os.name == "nt" else len(os.fsencode(name))


def _limit(folder: Path, name: str, otherwise: int) -> int:
    try:
        limit = os.pathconf(folder, name)
    except (AttributeError, OSError, ValueError):
        return otherwise
    return limit if limit > 0 else otherwise


def _refuse_name(target: Path, name: str, limit: int) -> None:
    raise FileError(
        "a name that has to be written would be too long",
        where=str(target),
        seen=f"{_length(name)} bytes of at most {limit}: {name[:40]}…{name[-40:]}",
        next="a shorter name for the output",
        code="name-too-long",
    )


def _no_space(target: Path, needed: int) -> FileError:
    wanted = f"{needed} bytes needed, " if needed else ""
    return FileError(
        "there is no room to write it",
        where=str(target),
        seen=f"{wanted}{system.free_space(target.parent)} free",
        next="free some space, or write to another disk",
        code="no-space",
    )


def _check_parent(target: Path) -> None:
    parent = target.parent
    if target.name in ("", ".", ".."):
        raise FileError("this names no output", where=str(target), code="is-directory")
    if not os.path.exists(parent):
        raise FileError(
            "the folder to write into does not exist",
            where=str(target),
            seen=f"no `{parent}`",
            next=f"mkdir -p {parent}",
            code="no-such-folder",
        )
    if not os.path.isdir(parent):
        raise FileError(
            "the folder to write into is a file",
            where=str(target),
            seen=str(parent),
            code="not-a-directory",
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise FileError(
            "it may not be written",
            where=str(target),
            seen=f"`{parent}` is not writable",
            next="check the permissions of the folder, or write elsewhere",
            code="not-writable",
        )


def _check_existing(
    target: Path, mode: int, overwrite: bool, directory: bool, replaceable: Collection[str]
) -> None:
    where = str(target)
    if stat.S_ISLNK(mode):
        raise FileError(
            "the output is a symbolic link",
            where=where,
            seen=f"→ {os.readlink(target)}",
            next="name the file itself, or remove the link",
            code="output-is-symlink",
        )
    if stat.S_ISDIR(mode) and not directory:
        raise FileError(
            "a file is to be written here, but this is a folder",
            where=where,
            next="name a file within it",
            code="is-directory",
        )
    if directory and not stat.S_ISDIR(mode):
        raise FileError(
            "a folder is to be written here, but this is a file",
            where=where,
            next="name a folder that does not exist yet",
            code="not-a-directory",
        )
    if not directory and not stat.S_ISREG(mode):
        raise FileError("this is no regular file", where=where, code="output-exists")
    if not overwrite:
        raise FileError(
            "the output exists already",
            where=where,
            next="pass --overwrite, or name another output",
            code="output-exists",
        )
    if directory:
        _check_ours(target, replaceable)


def _check_ours(target: Path, replaceable: Collection[str]) -> None:
    """Refuse to replace a folder that holds anything that we would not write there."""
    foreign = [name for name in _contents(target) if not _matches(name, replaceable)]
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise FileError(
            "the folder holds files that are not an earlier output",
            where=str(target),
            seen=", ".join(sorted(foreign)[:5]) + more,
            next="name another folder, or move those files away",
            code="output-not-ours",
        )


def _contents(folder: Path) -> Iterator[str]:
    """Relative names of all files, links and empty folders below a folder; links are not followed."""
    for root, folders, files in os.walk(folder):
        here = Path(root).relative_to(folder)
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        yield from ((here / name).as_posix() for name in [*files, *links])
        if not files and not folders and root != str(folder):
            yield here.as_posix() + "/"


def _matches(name: str, patterns: Collection[str]) -> bool:
    """Whether a relative name fits a pattern, folder by folder."""
    parts = name.split("/")
    return any(
        len(wanted := pattern.split("/")) == len(parts)
        and all(fnmatchcase(part, w) for part, w in zip(parts, wanted))
        for pattern in patterns
    )


def put(temporary: Path, target: Path, overwrite: bool, record: Path | None = None) -> None:
    """Rename a finished file or folder into place: in one step, or not at all.

    ``temporary`` and ``record`` lie in a hidden folder beside the target, and the caller is
    ``locks.alone`` at it. With ``overwrite`` an old folder is swapped out and removed. A file's
    ``record`` lands with it, and no file stands beside the record of another: the old one goes
    before the file does, the new one comes after it, if the file is still there.

    Raises FileError ``output-exists`` where the target is there and may not be replaced.
    """
    own = identity(temporary)
    if not overwrite and os.path.lexists(target):
        raise appeared(target)
    _drop_record(target)
    try:
        if not overwrite:
            _rename_new(temporary, target)
        elif temporary.is_dir() and target.is_dir():
            _swap(temporary, target)
        else:
            os.replace(temporary, target)
    except FileExistsError:
        raise appeared(target) from None
    landed.append(str(target))
    put_record(record, target, own)


def put_record(record: Path | None, target: Path, own: dict[str, int]) -> None:
    """Put a file's record beside it, unless another output has come in its place."""
    with suppress(OSError):
        if identity(target) != own:
            return
    _drop_record(target)
    if record is not None:
        os.replace(record, record_path(target))


def record_path(target: Path) -> Path:
    """Where the record of an output file lies."""
    return target.parent / (target.name + RECORD)  # also of what has no name, and will be refused


def is_record(path: Path) -> bool:
    """Whether a file is what a merge tells of its output."""
    return read_record(path).get("job") in _RECORD_JOBS


def _drop_record(target: Path) -> None:
    path = record_path(target)
    with suppress(OSError):
        if os.path.lexists(path) and is_record(path):
            path.unlink()


def appeared(target: Path) -> FileError:
    """The error of a run whose output another one has made in the meantime."""
    return FileError(
        "the output appeared while it was being written",
        where=str(target),
        next="pass --overwrite, or name another output",
        code="output-exists",
    )


def _rename_new(temporary: Path, target: Path) -> None:
    """Rename where nothing may be replaced, not even what appeared in the meantime."""
    if not temporary.is_dir():
        system.rename_new(temporary, target)
        return
    try:
        os.rename(temporary, target)  # over a folder with contents this fails by itself
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError from None
        raise


def _swap(temporary: Path, target: Path) -> None:
    """Put the new folder in place of the old one and remove the old one.

    Where names cannot be exchanged that takes two steps, of which a note is left for ``sweep``.
    """
    if _exchange(temporary, target):
        _remove_folder(temporary)
        return
    old, note = temporary.with_name(temporary.name + ".old"), temporary.with_name(_SWAP)
    system.write_text(note, json.dumps(identity(target)))
    sync(note)
    try:
        _move_away(target, old)
    except OSError:
        if target.is_dir() and not old.exists():
            note.unlink()
        raise
    try:
        os.rename(temporary, target)
    except BaseException:
        if old.exists():
            os.rename(old, target)
            note.unlink()
        raise
    _remove_folder(old)
    note.unlink(missing_ok=True)


def _move_away(target: Path, old: Path) -> None:
    """Rename a folder, or remove it where it has no other name to get.

    That is so in a container: a folder of a layer below an overlay file system can only be emptied.
    """
    import shutil

    try:
        os.rename(target, old)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        locked = [root for root, _, _ in os.walk(target) if not os.access(root, os.W_OK | os.X_OK)]
        if locked:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), locked[0]) from None
        shutil.rmtree(target)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step, where the kernel and the file system can."""
    return system.exchange(a, b)


def sync(path: Path) -> None:
    """Force a file, or all that a folder holds, to disk."""
    if not path.is_dir():
        system.sync_file(path)
        return
    for root, _, files in os.walk(path):
        for name in files:
            if not (Path(root) / name).is_symlink():
                system.sync_file(Path(root) / name)
        sync_folder(Path(root))


def sync_folder(path: Path) -> None:
    """Force a folder's names to disk."""
    system.sync_folder(path)


def _remove_folder(path: Path) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)


def _said(error: OSError, temporary: Path, target: Path, needed: int) -> FileError:
    """An OSError from within the block as a FileError that names the file it is about."""
    if isinstance(error, FileExistsError):
        return appeared(target)
    if error.errno in FULL:
        return _no_space(target, needed)
    about = os.fspath(error.filename) if isinstance(error.filename, (str, os.PathLike)) else ""
    if about and not Path(about).is_relative_to(temporary) and Path(about) != target:
        return as_file_error(error, about, writing=False)
    return as_file_error(error, target, writing=True)
