"""What only some systems have: each call gives the same without it, and nothing waits for a pipe."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adaptsurgery.checkpoint import system
from adaptsurgery.checkpoint.failures import as_file_error
from adaptsurgery_formats.errors import FileError

DATA = bytes(range(256)) * 513 + b"\r\n\x1a\n"  # what text mode would change
CALLS = ("pread", "preadv", "pwrite", "copy_file_range", "ftruncate", "statvfs")


@pytest.fixture(params=["all calls", "no call", *(c for c in CALLS if hasattr(os, c))])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The system with all its calls, without any, and without one."""
    gone = {"all calls": (), "no call": CALLS}.get(request.param, (request.param,))
    for name in gone:
        monkeypatch.delattr(os, name, raising=False)
    if "statvfs" in gone:  # shutil took its own way by it, once
        monkeypatch.delattr("shutil.disk_usage")
    return str(request.param)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    return path


def test_reading_at_an_offset(calls: str, file: Path) -> None:
    fd = system.open_input(file)
    assert system.read_at(fd, 1000, 70) == DATA[70:1070]
    assert system.read_at(fd, 1000, len(DATA) - 3) == DATA[-3:]
    assert system.read_at(fd, 1000, len(DATA)) == b""
    buffer = bytearray(b"-" * 10)
    assert system.read_into(fd, memoryview(buffer)[2:8], 100) == 6
    assert bytes(buffer) == b"--" + DATA[100:106] + b"--"
    assert system.read_into(fd, memoryview(buffer), len(DATA) - 4) == 4
    os.close(fd)


def test_writing_at_an_offset(calls: str, tmp_path: Path) -> None:
    path = tmp_path / "new"
    fd = system.open_new(path)
    system.resize(fd, 300)
    assert os.fstat(fd).st_size == 300
    assert system.write_at(fd, b"ab\ncd", 200) == 5
    assert system.write_at(fd, memoryview(b"xyz")[1:], 0) == 2
    system.resize(fd, 300)
    system.sync(fd)
    os.close(fd)
    assert path.read_bytes() == b"yz" + b"\0" * 198 + b"ab\ncd" + b"\0" * 95
    with pytest.raises(FileExistsError):
        system.open_new(path)


def test_several_threads_on_one_descriptor(calls: str, file: Path, tmp_path: Path) -> None:
    source, target = system.open_input(file), system.open_new(tmp_path / "copy")

    def move(at: int) -> None:
        data = system.read_at(source, 997, at)
        assert system.write_at(target, data, at) == len(data)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(move, range(0, len(DATA), 997)))
    os.close(source)
    os.close(target)
    assert (tmp_path / "copy").read_bytes() == DATA


def test_the_kernels_copy_or_none(calls: str, file: Path, tmp_path: Path) -> None:
    source, target = system.open_input(file), system.open_new(tmp_path / "part")
    moved = system.kernel_copy(source, target, 50, 10, 5)
    os.close(source)
    os.close(target)
    helped = calls not in ("no call", "copy_file_range")
    assert moved in ((50, 0) if helped else (0,))
    assert (tmp_path / "part").read_bytes() == (b"\0" * 5 + DATA[10:60] if moved else b"")


def test_a_whole_copy(calls: str, file: Path, tmp_path: Path) -> None:
    system.copy_file(file, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA
    with pytest.raises(FileExistsError):
        system.copy_file(file, tmp_path / "copy")


def test_free_space_is_a_number(calls: str, tmp_path: Path) -> None:
    assert system.free_space(tmp_path) > 0


def test_texts_are_utf8_with_their_own_newlines(tmp_path: Path) -> None:
    system.write_text(tmp_path / "text", "ΔW\n→\r\n")
    assert (tmp_path / "text").read_bytes() == "ΔW\n→\r\n".encode()
    assert system.read_text(tmp_path / "text") == "ΔW\n→\r\n"
    system.write_text(tmp_path / "text", "x")
    assert system.read_file(tmp_path / "text") == b"x"


@pytest.mark.parametrize("size", [0, 1, 999, 1000])
def test_a_limit_of_bytes(tmp_path: Path, size: int) -> None:
    (tmp_path / "a").write_bytes(b"x" * size)
    assert system.read_file(tmp_path / "a", limit=1000) == b"x" * size
    (tmp_path / "a").write_bytes(b"x" * 1001)
    with pytest.raises(FileError) as caught:
        system.read_file(tmp_path / "a", limit=1000)
    assert caught.value.code == "absurd-size"


# -- What is no file


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as there:
        there.bind(os.path.relpath(path))  # a socket's name may have 107 bytes


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders here")
@pytest.mark.parametrize("make", [_pipe, _socket, _device])
@pytest.mark.parametrize("waits", [False, True], ids=["O_NONBLOCK", "no O_NONBLOCK"])
def test_what_is_no_file_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], waits: bool
) -> None:
    if waits:
        monkeypatch.setattr(system, "_NO_WAIT", 0)
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "it")
    before = len(os.listdir("/dev/fd"))
    for opens in (system.open_input, system.open_file, system.read_file, system.read_text):
        with pytest.raises(FileError) as caught:
            opens(tmp_path / "it")
        assert caught.value.code == "not-a-file"
        assert str(tmp_path / "it") == caught.value.where
    with pytest.raises(FileError):
        system.copy_file(tmp_path / "it", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("waits", [False, True], ids=["O_NONBLOCK", "no O_NONBLOCK"])
def test_a_folder_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    if waits:  # as on Windows, where opening one is "permission denied"
        monkeypatch.setattr(system, "_NO_WAIT", 0)
        monkeypatch.setattr(os, "open", _denied)
    with pytest.raises(IsADirectoryError) as caught:
        system.open_input(tmp_path)
    assert as_file_error(caught.value, tmp_path, writing=False).code == "is-directory"


def _denied(*_: object) -> int:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


# -- Names


@pytest.fixture(params=["links", "no links", "no os.link"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise NotImplementedError

    if request.param == "no links":
        monkeypatch.setattr(os, "link", none)
    elif request.param == "no os.link":
        monkeypatch.delattr(os, "link", raising=False)


def test_a_rename_to_a_new_name(links: None, file: Path, tmp_path: Path) -> None:
    system.rename_new(file, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
    file.write_bytes(b"other")
    with pytest.raises(FileExistsError):
        system.rename_new(file, tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == DATA
    assert file.read_bytes() == b"other"


def test_an_exchange_is_done_or_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def texts() -> list[str]:
        return [(tmp_path / name).read_text() for name in "ab"]

    for name in "ab":
        (tmp_path / name).write_text(name)
    done = system.exchange(tmp_path / "a", tmp_path / "b")
    assert texts() == (["b", "a"] if done else ["a", "b"])
    before = texts()
    for without in (TypeError, OSError):  # Windows has no CDLL(None)
        monkeypatch.setattr(ctypes, "CDLL", _raising(without))
        assert not system.exchange(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    assert not system.exchange(tmp_path / "a", tmp_path / "b")
    assert texts() == before


def _raising(error: type[Exception]) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("con", "device"),
        ("out/AUX.safetensors", "device"),
        ("C:\\models\\nul.json", "device"),
        ("lpt9 .txt", "device"),
        ("a\\com¹", "device"),
        ("out.", "ends in"),
        ("a /b", "ends in"),
        ("C:/a/out.safetensors:stream", "':'"),
        ("what?.json", "'?'"),
        ("a\tb", "'\\t'"),
        ("C:\\models\\a.safetensors", ""),
        ("C:/models/a.safetensors", ""),
        ("..\\console\\auxiliary.json", ""),
        ("../out", ""),
        ("\\\\server\\share\\com10", ""),
        ("ΔW é.safetensors", ""),
    ],
)
def test_names_that_windows_has_not(path: str, why: str) -> None:
    told = system.windows_refuses(path)
    assert (why in told) if why else told == ""


def test_an_output_of_such_a_name_is_refused_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaptsurgery.checkpoint.atomic import check_output

    check_output(tmp_path / "aux.safetensors")
    monkeypatch.setattr(system, "refused_name", lambda p: system.windows_refuses(os.fspath(p)))
    with pytest.raises(FileError) as caught:
        check_output(tmp_path / "aux.safetensors")
    assert caught.value.code == "bad-name"


def test_a_folder_by_its_separator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert system.names_folder("out/")
    assert not system.names_folder("out")
    monkeypatch.setattr(os, "sep", "\\")
    monkeypatch.setattr(os, "altsep", "/")
    assert system.names_folder("out\\") and system.names_folder("out/")


@pytest.mark.parametrize(
    "path", ["C:\\models\\a", "C:/models/a", "C:a/b", ".\\a", "..\\a/b", "models\\a", "\\\\srv\\a"]
)
def test_a_windows_path_is_no_name_on_the_hub(path: str) -> None:
    from adaptsurgery.checkpoint.hub import parse_spec

    with pytest.raises(FileError) as caught:
        parse_spec(path)
    assert caught.value.code == "no-such-file"


@pytest.mark.parametrize(
    ("item", "path", "weight"),
    [
        ("C:/x=0.8", "C:/x", 0.8),
        ("C:\\models\\a.safetensors=-1", "C:\\models\\a.safetensors", -1.0),
        ("C:\\models\\a.safetensors", "C:\\models\\a.safetensors", 1.0),
        ("\\\\server\\a=b\\c=2", "\\\\server\\a=b\\c", 2.0),
    ],
)
def test_a_weight_behind_a_windows_path(item: str, path: str, weight: float) -> None:
    from adaptsurgery.jobs.merging.adapters import split_weight

    assert split_weight(item) == (path, weight)


@pytest.mark.parametrize("name", ["a\\b.safetensors", "C:b.safetensors", "..\\b", "/b", "a/b"])
def test_an_index_names_no_other_folder(tmp_path: Path, name: str) -> None:
    from adaptsurgery.checkpoint.base import parse_index

    with pytest.raises(FileError) as caught:
        parse_index({"weight_map": {"a.weight": name}}, tmp_path / "model.safetensors.index.json")
    assert caught.value.code == "path-escapes"


def test_another_program_that_has_it_open() -> None:
    error = PermissionError(errno.EACCES, "used by another process")
    assert as_file_error(error, "a", writing=True).code == "not-writable"
    error.winerror = 32  # type: ignore[attr-defined]
    assert as_file_error(error, "a", writing=True).code == "in-use"


# -- Locks, and the process


class _Msvcrt:
    """Windows' locks, as far as one process shows them: a byte is held by one descriptor."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        self.held: set[int] = set()

    def locking(self, fd: int, mode: int, count: int) -> None:
        inode = os.fstat(fd).st_ino
        if inode in self.held:
            raise PermissionError(errno.EACCES, "locked")
        self.held.add(inode)


@pytest.mark.parametrize("way", ["fcntl", "msvcrt", "none"])
def test_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way == "fcntl":
        pytest.importorskip("fcntl")
    else:
        monkeypatch.setitem(sys.modules, "fcntl", None)
        monkeypatch.setitem(sys.modules, "msvcrt", _Msvcrt() if way == "msvcrt" else None)
    a, b = system.open_lock(tmp_path / "lock"), system.open_lock(tmp_path / "lock")
    assert system.lock(a)
    assert system.lock(b, wait=False) == (way == "none")
    os.close(a)
    os.close(b)


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A system that says nothing of a process's memory."""
    import builtins

    real = builtins.open

    def no_proc(path: Any, *args: Any, **options: Any) -> Any:
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(path)
        return real(path, *args, **options)

    monkeypatch.setattr(builtins, "open", no_proc)
    yield


def test_memory_is_a_figure_or_nothing(unknown: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptsurgery.cli import output

    try:
        import resource
    except ImportError:
        resource = None  # type: ignore[assignment]
    assert (system.peak_memory() > 1_000_000) == (resource is not None)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert system.peak_memory() == 0
    assert output.peak() == []
