"""Other systems' ways, simulated in one process: what Unix alone has taken away, Windows' renames.

    python tests/systems/portable.py --remove --hook tests/checkpoint tests/jobs …   pytest, run so
    python tests/systems/portable.py --hook -m adaptsurgery convert …                a module, run so

--remove takes from ``os`` and its neighbours what Windows does not have, and lets os.rename, os.open
of a folder and ctypes answer as they do there. --hook refuses, as Windows does, to rename or to
remove what this process has open or mapped, and to rename a folder that holds such a file. The
processes that are started from there are treated alike, by ``site/sitecustomize.py``.
"""

from __future__ import annotations

import builtins
import errno
import os
import runpy
import signal  # noqa: F401  for GONE
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WAYS = "ADAPTSURGERY_TEST_SYSTEM"  # the environment's name for them: "remove", "hook", both
GONE = {
    "os": (
        "O_CLOEXEC O_NONBLOCK O_NOFOLLOW O_DIRECTORY O_NOCTTY O_SYNC O_DSYNC "
        "pread preadv pwrite pwritev copy_file_range sendfile splice statvfs fstatvfs fdatasync "
        "posix_fadvise posix_fallocate lockf fchmod fchown chown lchown getuid geteuid getgid getegid "
        "setuid setsid killpg getpgid fork forkpty mkfifo mknod sched_getaffinity "
        "sched_setaffinity sysconf nice getloadavg pathconf sync chroot"
    ),
    "signal": "SIGHUP SIGALRM setitimer alarm pthread_sigmask",
}
UNIMPORTABLE = ("fcntl", "resource", "pwd", "grp", "syslog")
FILE_PARTS = [f"tests/{room}" for room in ("checkpoint", "formats", "jobs", "cli", "systems")]


# -- What is taken away


def remove() -> None:
    """Take away what Windows does not have, and let what it has answer as it does there."""
    if "ctypes" not in sys.modules:
        import ctypes  # which asks for itself at its first import
    import shutil
    import subprocess

    for module, names in GONE.items():
        for name in names.split():
            if hasattr(sys.modules[module], name):
                delattr(sys.modules[module], name)
    for name in UNIMPORTABLE:
        sys.modules[name] = None  # type: ignore[assignment]
    # The standard library's own uses, which are other ones on Windows.
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined]
    shutil.disk_usage = _disk_usage  # type: ignore[assignment]
    subprocess.fcntl = None  # type: ignore[attr-defined]
    os.open, builtins.open = _opening(os.open), _opening(builtins.open)  # type: ignore[assignment]
    os.rename, os.replace = _renaming(os.rename, False), _renaming(os.replace, True)
    os.link = _linking(os.link)  # type: ignore[assignment]
    ctypes.CDLL.__getattr__ = _looking(ctypes.CDLL.__getattr__)  # type: ignore[method-assign]


_statvfs = os.statvfs


def _disk_usage(path: Any) -> Any:
    import shutil

    disk = _statvfs(path)
    total, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    return shutil._ntuple_diskusage(total, total - free, free)  # type: ignore[attr-defined]


def _opening(real: Callable[..., Any]) -> Callable[..., Any]:
    def opened(path: Any, *args: Any, **options: Any) -> Any:
        if isinstance(path, (str, bytes, os.PathLike)):
            name = os.fsdecode(path)
            if name.startswith("/proc/"):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            if os.path.isdir(name):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return real(path, *args, **options)

    return opened


def _renaming(real: Callable[..., Any], over: bool) -> Callable[..., Any]:
    def renamed(source: Any, target: Any) -> None:
        there = os.path.lexists(target) and not _same(source, target)
        if there and not over:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), source, None, target)
        if there and (os.path.isdir(target) or os.path.isdir(source)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), source, None, target)
        real(source, target)

    return renamed


def _same(a: Any, b: Any) -> bool:
    return os.path.abspath(a) == os.path.abspath(b)


def _linking(real: Callable[..., Any]) -> Callable[..., Any]:
    def linked(source: Any, target: Any, **options: Any) -> None:
        if options:
            raise NotImplementedError("link: options unavailable on this platform")
        real(source, target)

    return linked


def _looking(real: Callable[..., Any]) -> Callable[..., Any]:
    def looked(self: Any, name: str) -> Any:
        if name in ("renameat2", "renamex_np"):
            raise AttributeError(name)
        return real(self, name)

    return looked


# -- What is refused


def hook() -> None:
    """Refuse from now on to rename or remove what is open or mapped in this process."""
    import tempfile

    tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # type: ignore[assignment]  as there
    sys.addaudithook(_audit)


_open, _readlink, _stat, _scan = builtins.open, os.readlink, os.stat, os.listdir


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event == "os.rename":
        source, target = (_named(path, fd) for path, fd in zip(args[:2], args[2:4]))
        _refuse_held(source)
        _refuse_held(target)
    elif event == "os.remove":
        _refuse_held(_named(*args[:2]))


def _named(path: Any, folder: int = -1) -> str:
    name = os.fsdecode(path)
    if folder >= 0 and not os.path.isabs(name):
        name = os.path.join(_readlink(f"/proc/self/fd/{folder}"), name)
    return os.path.join(os.path.realpath(os.path.dirname(name) or "."), os.path.basename(name))


def _refuse_held(path: str) -> None:
    """PermissionError as Windows' "used by another process", where the path is held."""
    try:
        there = os.lstat(path)
    except OSError:
        return
    inside = path + os.sep if stat.S_ISDIR(there.st_mode) else ""
    for number, held in _held():
        if (not inside and number == there.st_ino and _is(held, there)) or (
            inside and held.startswith(inside)
        ):
            raise PermissionError(errno.EACCES, f"it is open here: {held}", path)


def _is(held: str, there: os.stat_result) -> bool:
    try:
        now = os.lstat(held)
    except OSError:
        return False
    return (now.st_dev, now.st_ino) == (there.st_dev, there.st_ino)


def _held() -> Iterator[tuple[int, str]]:
    """Inode and path of each file that this process has open or mapped."""
    for name in _scan("/proc/self/fd"):
        try:
            status = _stat(f"/proc/self/fd/{name}")
            if stat.S_ISREG(status.st_mode):
                yield status.st_ino, _readlink(f"/proc/self/fd/{name}")
        except OSError:  # the listing's own
            continue
    with _open("/proc/self/maps", "rb") as file:
        for line in file:
            parts = line.split(None, 5)
            if len(parts) == 6 and parts[5].startswith(b"/"):
                yield int(parts[4]), os.fsdecode(parts[5].rstrip(b"\n"))


# -- Running


def apply(ways: str) -> None:
    """Take the ways that ``ways`` names: "remove", "hook", both or none."""
    if "hook" in ways:
        hook()
    if "remove" in ways:
        remove()


def environment(ways: str) -> dict[str, str]:
    """The environment in which every Python process takes these ways."""
    path = [str(HERE / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, WAYS: ways, "PYTHONPATH": os.pathsep.join(path)}


def main(args: list[str]) -> int:
    """Run pytest, or with -m a module, in this process and in what it starts."""
    ways = ",".join(a[2:] for a in args if a in ("--remove", "--hook"))
    rest = [a for a in args if a not in ("--remove", "--hook")]
    os.environ.update(environment(ways))
    if rest[:1] == ["-m"]:
        sys.argv = rest[1:]
        apply(ways)
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        return 0
    import psutil  # noqa: F401  the peers' own, made for this system

    apply(ways)
    import _pytest.tmpdir
    import pytest

    _pytest.tmpdir.get_user_id = lambda: None  # type: ignore[attr-defined]
    return int(pytest.main(rest or FILE_PARTS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
