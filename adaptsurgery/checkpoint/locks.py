"""One process at a time at an output's name, and a last step that Ctrl-C does not break in two.

Hidden names beside an output follow from its own, so that the next run into it finds what a killed
one has left: ``.adaptsurgery-<digest of the name>`` and an ending.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from adaptsurgery.checkpoint import system

PATIENCE = 15.0  # seconds that the name is waited for; its holder may have been stopped for good
_PAUSE = 0.005
_mine = threading.local()
_taken_fds: dict[Path, int] = {}  # what this process has open of names' locks


def hidden(target: Path, ending: str) -> Path:
    """A hidden path beside an output, of its own whatever the length of the output's name."""
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
    return target.parent / f".adaptsurgery-{digest}{ending}"


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """Alone among all processes at an output's name, for the short time that a landing takes.

    A thread that is alone already stays so. Where the file system has no locks, or the holder does
    not let go within ``PATIENCE``, the block is entered all the same: what it does looks at inodes
    before it puts one thing beside another.
    """
    path = hidden(target, ".lock")
    names: set[str] = _mine.__dict__.setdefault("names", set())
    if str(path) in names:
        yield
        return
    fd = -1
    try:
        with unbroken():
            fd = _taken(path)
            names.add(str(path))
        yield
    finally:
        with unbroken():
            names.discard(str(path))
            if fd >= 0:
                _give_back(path, fd)


def _taken(path: Path) -> int:
    """The descriptor of a held lock; -1 where there can be none, or it is waited for in vain."""
    last = time.monotonic() + PATIENCE
    while True:
        try:
            fd = _taken_fds[path] = system.open_lock(path)
        except OSError:
            return -1
        try:
            while not system.lock(fd, wait=False):
                if time.monotonic() > last:
                    os.close(fd)
                    return -1
                time.sleep(_PAUSE)
        except BaseException:
            os.close(fd)
            raise
        if is_at(fd, path):
            return fd
        os.close(fd)


def let_go() -> None:
    """Give back what an interrupt has cut off from the block that would have given it back."""
    for path, fd in list(_taken_fds.items()):
        with suppress(OSError):
            if system.lock(fd, wait=False) and is_at(fd, path):
                _give_back(path, fd)
    _taken_fds.clear()
    _mine.__dict__.pop("names", None)


def _give_back(path: Path, fd: int) -> None:
    """Remove a lock's file while it is held, or where the system forbids that right after."""
    _taken_fds.pop(path, None)
    try:
        os.unlink(path)
    except OSError:
        os.close(fd)
        with suppress(OSError):
            os.unlink(path)
    else:
        os.close(fd)


def is_at(fd: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock of a file; False where there is no such file."""
    try:
        fd = system.open_lock(path, make=False)
    except OSError:
        return False
    try:
        return not system.lock(fd, wait=False)
    finally:
        os.close(fd)


@contextmanager
def unbroken() -> Iterator[None]:
    """Ctrl-C, and SIGTERM where it is handled in Python, wait until the block has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def later(number: int, _: FrameType | None) -> None:
        came.append(number)

    before: dict[int, signal._HANDLER] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):
                before[number] = handler
                signal.signal(number, later)
        yield
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
        if came:
            signal.raise_signal(came[0])
