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
from typing import Any

from adaptsurgery_formats.errors import FileError

Path = str | os.PathLike[str]
Buffer = bytes | bytearray | memoryview

_PLAIN = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOINHERIT", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_FICLONE = 0x40049409  # Linux: <linux/fs.h>, _IOW(0x94, 9, int)
_AT_FDCWD, _EXCHANGE, _SWAP = -100, 2, 2  # Linux's renameat2, macOS's renamex_np
_NO_KERNEL_COPY = {
    getattr(errno, name, 0)
    for name in ("EXDEV", "EINVAL", "ENOSYS", "EOPNOTSUPP", "EPERM", "EBADF", "ETXTBSY")
}
_RETRY = 0.05  # seconds between two tries for a lock that cannot be waited for
_moving = threading.Lock()  # where reading at an offset takes two calls

# -- Opening


def open_input(path: Path) -> int:
    """A descriptor to read a regular file's bytes; a pipe, device or socket is refused at once.

    Raises FileError "not-a-file", and OSError as os.open does; IsADirectoryError for a folder.
    """
    fd = os.open(path, os.O_RDONLY | _PLAIN | _NO_WAIT)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise not_a_file(path)


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


def open_lock(path: Path, *, make: bool = True) -> int:
    """A descriptor of a file that serves as a lock, made where it is missing; no link is followed."""
    return os.open(path, os.O_RDWR | (os.O_CREAT if make else 0) | _NO_LINK | _PLAIN, 0o666)


def read_file(path: Path, limit: int) -> bytes:
    """All bytes of a regular file of at most ``limit`` bytes; FileError "absurd-size" beyond."""
    fd = open_input(path)
    with os.fdopen(fd, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FileError(
            "it is larger than such a file can be",
            where=os.fspath(path),
            seen=f"more than {limit} bytes",
            code="absurd-size",
        )
    return data


# -- Reading and writing at an offset, by several threads on one descriptor


def read_at(fd: int, count: int, offset: int) -> bytes:
    """At most ``count`` bytes from ``offset``; fewer only at the end of the file."""
    if hasattr(os, "pread"):
        return os.pread(fd, count, offset)
    with _moving:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, count)


def read_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Read into ``buffer`` from ``offset``; the number of bytes read, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    data = read_at(fd, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


def write_at(fd: int, data: Buffer, offset: int) -> int:
    """Write at ``offset``; the number of bytes written, which may be fewer than there are."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _moving:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def resize(fd: int, size: int) -> None:
    """Give a file its final size."""
    if hasattr(os, "ftruncate"):
        os.ftruncate(fd, size)
    else:
        with _moving:
            os.lseek(fd, max(size - 1, 0), os.SEEK_SET)
            os.write(fd, b"\0"[:size])


def kernel_copy(source: int, target: int, count: int, start: int, at: int) -> int:
    """Bytes that the kernel moved from ``start`` of one file to ``at`` of another.

    0 where it cannot, or where the source ends: then read and write. OSError for a full disk.
    """
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source, target, count, start, at)
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

    return shutil.disk_usage(folder).free


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
