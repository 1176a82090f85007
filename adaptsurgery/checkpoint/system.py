"""What only some systems have, each call with its portable way.

Windows has no pread, pwrite or copy_file_range, no fcntl and no renames over open files; macOS has
no copy_file_range and no /proc. Nothing else in the package calls these itself: a file is opened
here, so that none is opened in text mode (which changes newlines inside tensors on Windows), and
none is waited for that is a pipe.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
import time
from contextlib import suppress
from io import BufferedReader, FileIO
from pathlib import PureWindowsPath
from typing import Any, BinaryIO

from adaptsurgery.checkpoint.watched import note
from adaptsurgery_formats.errors import FileError
from adaptsurgery_formats.paths import check_text, is_device

Path = str | os.PathLike[str]
Buffer = bytes | bytearray | memoryview

LARGEST_TEXT = 1 << 28  # bytes: more than the index of any model has
_STEP, _COPY = 1 << 20, 1 << 26  # bytes read, and bytes that the kernel moves, at a time
_MOST = 1 << 30  # bytes in one call: macOS and Windows refuse 2 GiB
_PLAIN = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOINHERIT", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_FICLONE = 0x40049409  # Linux: <linux/fs.h>, _IOW(0x94, 9, int)
_AT_FDCWD, _EXCHANGE, _SWAP = -100, 2, 2  # Linux's renameat2, macOS's renamex_np
_NO_KERNEL_COPY = {
    getattr(errno, name, 0)
    for name in ("EXDEV", "EINVAL", "ENOSYS", "EOPNOTSUPP", "EPERM", "EBADF", "ETXTBSY")
}
_NO_FILE = {getattr(errno, name, 0) for name in ("ENXIO", "ENODEV", "EOPNOTSUPP")}
_RETRY = 0.05  # seconds between two tries for a lock that cannot be waited for
_moving = threading.Lock()  # where reading at an offset takes two calls

# -- Opening


def open_input(path: Path) -> int:
    """A descriptor to read a regular file's bytes; a pipe, device or socket is refused at once.

    Raises FileError "not-a-file" and "bad-name", and OSError as os.open does; IsADirectoryError for a
    folder.
    """
    check_text(path)
    if not _NO_WAIT:  # then opening a pipe would wait for its writer
        _check_regular(os.stat(path).st_mode, path)
    try:
        fd = os.open(path, os.O_RDONLY | _PLAIN | _NO_WAIT)
    except OSError as error:
        if error.errno in _NO_FILE:  # a socket, a device without a driver
            raise not_a_file(path) from error
        raise
    try:
        described = os.fstat(fd)
        _check_regular(described.st_mode, path)
    except BaseException:
        os.close(fd)
        raise
    note(path, described)
    return fd


def _check_regular(mode: int, path: Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise not_a_file(path)


def is_there(path: Path) -> bool:
    """Whether a file is there, or what is none and will be refused when it is opened; no folder."""
    return os.path.exists(path) and not os.path.isdir(path)


def open_file(path: Path) -> BufferedReader:
    """A regular file, open to read its bytes; raises as ``open_input``."""
    return BufferedReader(FileIO(open_input(path), "rb"))


def not_a_file(path: Path) -> FileError:
    """The error for a pipe, a device or a socket where a file was expected."""
    return FileError(
        "this is no regular file",
        where=os.fspath(path),
        seen="a pipe, a device or a socket",
        next="name a file; save a pipe's bytes to one first",
        code="not-a-file",
    )


def open_new(path: Path, mode: int = 0o666) -> int:
    """A descriptor of a new file to write and read; FileExistsError where the name is taken."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _PLAIN, mode)


def new_file(path: Path) -> BinaryIO:
    """A new file, open to be written; FileExistsError where the name is taken."""
    return os.fdopen(open_new(path), "wb")


def open_lock(path: Path, *, make: bool = True) -> int:
    """A descriptor of a file that serves as a lock, made where it is missing; no link is followed."""
    return os.open(path, os.O_RDWR | (os.O_CREAT if make else 0) | _NO_LINK | _PLAIN, 0o666)


def read_file(path: Path, limit: int = LARGEST_TEXT) -> bytes:
    """All bytes of a regular file of at most ``limit`` bytes; FileError "absurd-size" beyond."""
    data = bytearray()
    with open_file(path) as file:
        while len(data) <= limit and (more := file.read(min(_STEP, limit + 1 - len(data)))):
            data += more
    if len(data) > limit:
        raise FileError(
            "it is larger than such a file can be",
            where=os.fspath(path),
            seen=f"more than {limit} bytes",
            code="absurd-size",
        )
    return bytes(data)


def read_text(path: Path, limit: int = LARGEST_TEXT) -> str:
    """A regular file's text, which is UTF-8 whatever the system's own encoding is.

    Raises UnicodeDecodeError, and as ``read_file``.
    """
    return read_file(path, limit).decode("utf-8")


def write_text(path: Path, text: str) -> None:
    """Write a file's text as UTF-8, with its newlines as they are."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _PLAIN, 0o666)
    with os.fdopen(fd, "wb") as file:
        file.write(text.encode("utf-8"))


def copy_file(source: Path, target: Path) -> None:
    """A new file with another's bytes: shared where the file system can, else copied; on disk.

    Raises FileError "not-a-file", and OSError; FileExistsError where the target is there.
    """
    with open_file(source) as a, new_file(target) as b:
        if not share(a.fileno(), b.fileno()):
            _copy(a.fileno(), b.fileno())
        os.fsync(b.fileno())


def _copy(source: int, target: int) -> None:
    at = 0
    while moved := kernel_copy(source, target, _COPY, at, at):
        at += moved
    while data := read_at(source, _STEP, at):
        left = memoryview(data)
        while left:
            done = write_at(target, left, at)
            at, left = at + done, left[done:]


# -- Reading and writing at an offset, by several threads on one descriptor


def read_at(fd: int, count: int, offset: int) -> bytes:
    """At most ``count`` bytes from ``offset``; none only at the end of the file."""
    count = min(count, _MOST)
    if hasattr(os, "pread"):
        return os.pread(fd, count, offset)
    with _moving:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, count)


def read_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Read into ``buffer`` from ``offset``; the number of bytes read, 0 at the end of the file."""
    buffer = buffer[:_MOST]
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    data = read_at(fd, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


def write_at(fd: int, data: Buffer, offset: int) -> int:
    """Write at ``offset``; the number of bytes written, which may be fewer than there are."""
    some = memoryview(data)[:_MOST]
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, some, offset)
    with _moving:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, some)


def resize(fd: int, size: int) -> None:
    """Give a new file its final size."""
    if hasattr(os, "ftruncate"):
        os.ftruncate(fd, size)
    elif size:
        write_at(fd, b"\0", size - 1)


def kernel_copy(source: int, target: int, count: int, start: int, at: int) -> int:
    """Bytes that the kernel moved from ``start`` of one file to ``at`` of another.

    0 where it cannot, or where the source ends: then read and write. OSError for a full disk.
    """
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source, target, min(count, _MOST), start, at)
    except OSError as error:
        if error.errno in _NO_KERNEL_COPY:
            return 0
        raise


def share(source: int, target: int) -> bool:
    """Let an empty file have another's bytes without a copy; False where the file system cannot."""
    try:
        import fcntl

        fcntl.ioctl(target, _FICLONE, source)
    except (ImportError, AttributeError, OSError):
        return False
    return True


# -- Names


def local_path(spec: str) -> str | None:
    """The path that a name has where it is there: below the home that its ``~`` means, or so called."""
    for path in (os.path.expanduser(spec), spec):
        if path and os.path.lexists(path):
            return path
    return None


def refused_name(path: Path) -> str:
    """Why this system has no file of such a name, or another one under it; empty where it has."""
    return windows_refuses(os.fspath(path)) if os.name == "nt" else ""


def windows_refuses(path: str) -> str:
    """``refused_name`` on Windows: devices' names, endings that are left away, streams, wildcards."""
    whole = PureWindowsPath(path)
    for part in whole.parts[bool(whole.anchor) :]:
        if part == "..":
            continue
        if is_device(part):
            return f"`{part}` is a device's name"
        if part.endswith((".", " ")):
            return f"`{part}` ends in a dot or a space, which Windows leaves away"
        if strange := [c for c in part if c in '<>:"|?*' or ord(c) < 32]:
            return f"`{part}` has a {strange[0]!r} in it"
    return ""


def names_folder(path: Path) -> bool:
    """Whether a path is written as a folder's, with a separator at its end."""
    return os.fspath(path).endswith(tuple(filter(None, (os.sep, os.altsep))))


def exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    try:
        import ctypes

        library: Any = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return bool(library.renamex_np(os.fsencode(a), os.fsencode(b), _SWAP) == 0)
        done = library.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _EXCHANGE)
    except (ImportError, AttributeError, TypeError, OSError):
        return False
    return bool(done == 0)


def rename_new(source: Path, target: Path) -> None:
    """Rename a file where nothing may be replaced; FileExistsError where the target is there."""
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError, AttributeError):  # no hard links here
        if os.path.lexists(target):
            raise FileExistsError(
                errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target)
            ) from None
        os.rename(source, target)
    else:
        os.unlink(source)


def sync(fd: int) -> None:
    """Force what was written through a descriptor to disk."""
    os.fsync(fd)


def sync_file(path: Path) -> None:
    """Force a file's bytes to disk. Windows flushes only what is open for writing."""
    fd = os.open(path, (os.O_RDWR if sys.platform == "win32" else os.O_RDONLY) | _PLAIN)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    """Force a folder's names to disk, where the system can; the rename is done all the same."""
    with suppress(OSError):
        sync_file(path)


def free_space(folder: Path) -> int:
    """Bytes that may still be written below a folder."""
    import shutil

    try:
        return shutil.disk_usage(folder).free
    except AttributeError:  # neither way here: the disk itself will tell
        return sys.maxsize


# -- Locks, which go with their process


def lock(fd: int, *, wait: bool = True) -> bool:
    """Hold a file's lock; False where another holds it and ``wait`` is False.

    True also where the file system has no locks: then nobody is kept apart.
    """
    try:
        import fcntl
    except ImportError:
        return _lock_by_msvcrt(fd, wait)
    flock = getattr(fcntl, "flock", None)
    if flock is None:
        return True
    try:
        flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _lock_by_msvcrt(fd: int, wait: bool) -> bool:
    try:
        import msvcrt
    except ImportError:
        return True
    hold: Any = msvcrt
    while True:
        try:
            os.lseek(fd, 0, os.SEEK_SET)
            hold.locking(fd, hold.LK_NBLCK, 1)
            return True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EDEADLK):
                return True
        if not wait:
            return False
        time.sleep(_RETRY)


# -- The process


def to_nowhere(fd: int) -> None:
    """Let what is written to a descriptor vanish from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY | _PLAIN)
    os.dup2(nowhere, fd)
    os.close(nowhere)


def peak_memory() -> int:
    """This process's largest resident size in bytes; 0 where the system does not say.

    Linux's own figure first: getrusage's also counts the process that started this one.
    """
    with suppress(OSError, ValueError, IndexError):
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for entry in file:
                if entry.startswith("VmHWM:"):
                    return int(entry.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
