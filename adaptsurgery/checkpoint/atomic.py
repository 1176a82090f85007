"""Outputs that are there in full or not at all.

The bytes are written beside the target under a hidden, unpredictable name, forced to disk, and
only then renamed into place. An error or Ctrl-C leaves what was there before; a killed process
leaves at most the hidden file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from adaptsurgery.checkpoint import system
from adaptsurgery.checkpoint.failures import FULL, as_file_error
from adaptsurgery_formats.errors import FileError, SurgeryError

_AT_FDCWD, _EXCHANGE = -100, 2


@contextmanager
def output(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    directory: bool = False,
    replaceable: Collection[str] = (),
    needed: int = 0,
) -> Iterator[Path]:
    """A temporary path to write to, which becomes ``path`` when the block ends without an error.

    A file's path does not exist yet; a directory's does, and is empty. ``needed`` is the number of
    bytes to come, to refuse a full disk beforehand. An existing directory is replaced only if all
    it holds matches ``replaceable``: relative names or patterns such as "*.safetensors" or
    "unet/config.json", where * stays within one folder.

    Raises FileError: ``output-exists``, ``output-is-symlink``, ``output-not-ours``,
    ``is-directory``, ``not-a-directory``, ``no-such-folder``, ``no-space``, ``not-writable``.
    """
    target = Path(path)
    check_output(
        target, overwrite=overwrite, directory=directory, replaceable=replaceable, needed=needed
    )
    temporary = target.parent / f".adaptsurgery-{os.urandom(8).hex()}.tmp"
    try:
        if directory:
            os.mkdir(temporary)
        yield temporary
        sync(temporary)
        put(temporary, target, overwrite)
        sync_folder(target.parent)
    except OSError as error:
        _remove(temporary)
        raise _said(error, temporary, target, needed) from error
    except SurgeryError as error:
        _remove(temporary)
        if error.code == "no-space":
            raise _no_space(target, needed) from error
        error.where = error.where.replace(str(temporary), str(target))
        raise
    except BaseException:
        _remove(temporary)
        raise


def check_output(
    target: Path,
    *,
    overwrite: bool = False,
    directory: bool = False,
    replaceable: Collection[str] = (),
    needed: int = 0,
) -> None:
    """Everything that ``output`` can refuse before a byte is written, also for a dry run."""
    where = str(target)
    if why := system.refused_name(target):
        raise FileError("no file can have such a name", where=where, seen=why, code="bad-name")
    _check_parent(target)
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


def put(temporary: Path, target: Path, overwrite: bool) -> None:
    """Rename a finished file or folder into place: in one step, or not at all.

    Without ``overwrite`` FileExistsError where the target is there; with it an old folder is swapped
    out and removed.
    """
    if not overwrite:
        _rename_new(temporary, target)
    elif temporary.is_dir() and target.is_dir():
        _swap(temporary, target)
    else:
        os.replace(temporary, target)


def _rename_new(temporary: Path, target: Path) -> None:
    """Rename where nothing may be replaced, not even what appeared in the meantime."""
    if temporary.is_dir():
        if os.path.lexists(target):
            raise FileExistsError
        os.rename(temporary, target)  # over a folder with contents this fails by itself
        return
    try:
        os.link(temporary, target, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise FileExistsError from None
        os.rename(temporary, target)
    else:
        os.unlink(temporary)


def _swap(temporary: Path, target: Path) -> None:
    """Put the new folder in place of the old one and remove the old one."""
    if _exchange(temporary, target):
        _remove_folder(temporary)
        return
    old = temporary.with_name(temporary.name + ".old")
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(old, target)
        raise
    _remove_folder(old)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step, where the kernel and the file system can."""
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    done: int = renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _EXCHANGE)
    return done == 0


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


def _remove(path: Path) -> None:
    if path.is_dir():
        _remove_folder(path)
    else:
        with suppress(OSError):
            path.unlink()


def _said(error: OSError, temporary: Path, target: Path, needed: int) -> FileError:
    """An OSError from within the block as a FileError that names the file it is about."""
    if isinstance(error, FileExistsError):
        return FileError(
            "the output appeared while it was being written",
            where=str(target),
            next="pass --overwrite, or name another output",
            code="output-exists",
        )
    if error.errno in FULL:
        return _no_space(target, needed)
    about = os.fspath(error.filename) if isinstance(error.filename, (str, os.PathLike)) else ""
    if about and not Path(about).is_relative_to(temporary) and Path(about) != target:
        return as_file_error(error, about, writing=False)
    return as_file_error(error, target, writing=True)
