"""An output is there in full or not at all, and only what is ours is replaced."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from unix import needs

from adaptsurgery.checkpoint import atomic
from adaptsurgery.checkpoint.atomic import check_output, output
from adaptsurgery.checkpoint.writer import write_safetensors
from adaptsurgery_formats.errors import FileError, ValueRefused
from adaptsurgery_formats.tensors import Literal, Tensor, scalar

OURS = ("config.json", "*.safetensors", "unet/*.json")


def code_of(path: Path, **options: object) -> str:
    with pytest.raises(FileError) as e, output(path, **options):  # type: ignore[arg-type]
        raise AssertionError("the block was entered")
    return e.value.code


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    with output(target) as path:
        room = path.parent
        assert room.parent == target.parent and room.name.startswith(".") and not path.exists()
        write_safetensors(path, {"x": scalar(1.0)})
        assert not target.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    with output(tmp_path / "out", directory=True) as path:
        (path / "unet").mkdir()
        (path / "unet" / "config.json").write_text("{}")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "unet" / "config.json").read_text() == "{}"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_leaves_nothing(
    tmp_path: Path, directory: bool, error: type[BaseException]
) -> None:
    with pytest.raises(error), output(tmp_path / "a", directory=directory) as path:
        (path / "x" if directory else path).write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.json").write_text("old")
    with pytest.raises(error), output(tmp_path / "a", overwrite=True) as path:
        path.write_text("half")
        raise error
    with (
        pytest.raises(error),
        output(tmp_path / "d", overwrite=True, directory=True, replaceable=OURS) as path,
    ):
        (path / "config.json").write_text("half")
        raise error
    assert (tmp_path / "a").read_text() == (tmp_path / "d" / "config.json").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "d"]


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "d").mkdir()
    assert code_of(tmp_path / "a") == "output-exists"
    assert code_of(tmp_path / "d", directory=True) == "output-exists"


@pytest.mark.parametrize("directory", [False, True])
def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path, directory: bool) -> None:
    target = tmp_path / "a"
    with pytest.raises(FileError) as e, output(target, directory=directory) as path:
        (path / "new" if directory else path).write_text("new")
        if directory:
            target.mkdir()
            (target / "theirs").write_text("theirs")
        else:
            target.write_text("theirs")
    assert e.value.code == "output-exists"
    assert (target / "theirs" if directory else target).read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_file_is_replaced_when_asked(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with output(tmp_path / "a", overwrite=True) as path:
        path.write_text("new")
    assert (tmp_path / "a").read_text() == "new"
    with output(tmp_path / "b", overwrite=True) as path:  # nothing there to replace
        path.write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.fixture(params=["exchange", "two renames"])
def either_swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    yield request.param


def old_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "d"
    (folder / "unet").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "unet/config.json"):
        (folder / name).write_text("old")
    return folder


def test_a_folder_of_ours_is_replaced_whole(tmp_path: Path, either_swap: str) -> None:
    folder = old_folder(tmp_path)
    with output(folder, overwrite=True, directory=True, replaceable=OURS) as path:
        (path / "config.json").write_text("new")
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    assert (folder / "config.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_failed_second_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = old_folder(tmp_path)
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    real = os.rename

    def rename(a: Path, b: Path) -> None:
        if Path(b) == folder and not str(a).endswith(".old"):
            raise OSError(errno.EIO, "no luck")
        real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    with (
        pytest.raises(FileError),
        output(folder, overwrite=True, directory=True, replaceable=OURS) as path,
    ):
        (path / "config.json").write_text("new")
    assert (folder / "config.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize(
    "foreign", ["notes.txt", "unet/deep/config.json", "sub/model.safetensors", "empty/", "link"]
)
def test_a_folder_with_other_things_is_refused(tmp_path: Path, foreign: str) -> None:
    folder = old_folder(tmp_path)
    if foreign.endswith("/"):
        (folder / foreign).mkdir()
    elif foreign == "link":
        (folder / "link").symlink_to(tmp_path)
    else:
        (folder / foreign).parent.mkdir(exist_ok=True)
        (folder / foreign).write_text("precious")
    options = {"overwrite": True, "directory": True, "replaceable": OURS}
    assert code_of(folder, **options) == "output-not-ours"
    assert (folder / "config.json").exists()


@needs("os.mkfifo")
def test_links_and_wrong_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    both = {"overwrite": True}
    assert code_of(tmp_path / "link", **both) == "output-is-symlink"
    assert code_of(tmp_path / "dangling", **both) == "output-is-symlink"
    assert code_of(tmp_path / "dangling") == "output-is-symlink"
    assert code_of(tmp_path / "folder", **both) == "is-directory"
    assert code_of(tmp_path / "file", directory=True, **both) == "not-a-directory"
    assert code_of(tmp_path / "pipe", **both) == "output-exists"
    assert code_of(tmp_path / "no" / "such") == "no-such-folder"
    assert code_of(tmp_path / "file" / "a") == "not-a-directory"
    assert code_of(Path("/")) == "is-directory"
    assert code_of(tmp_path / ("n" * 300)) == "name-too-long"


def test_a_linked_parent_is_fine(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with output(tmp_path / "link" / "a") as path:
        path.write_text("x")
    assert (tmp_path / "real" / "a").read_text() == "x"


def test_without_hard_links_a_rename_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "not here")

    monkeypatch.setattr(os, "link", link)
    with output(tmp_path / "a") as path:
        path.write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# -- Disks that are full, and disks that may not be written ----------------------------------------


def test_a_full_disk_is_seen_beforehand(tmp_path: Path) -> None:
    with pytest.raises(FileError) as e:
        check_output(tmp_path / "a", needed=1 << 60)
    assert e.value.code == "no-space"
    assert str(1 << 60) in e.value.seen and "free" in e.value.seen


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, "no-space"), (errno.EDQUOT, "no-space"), (errno.EROFS, "not-writable")],
)
@pytest.mark.parametrize(
    "call", ["write", pytest.param("copy_file_range", marks=needs("os.copy_file_range"))]
)
def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: str, call: str
) -> None:
    from adaptsurgery.checkpoint.safetensors import Span

    (tmp_path / "src").write_bytes(bytes(1 << 20))
    tensors = {"x": Tensor("I8", (1 << 20,), (Span(str(tmp_path / "src"), 0, 1 << 20),))}
    real, calls = getattr(os, call), []

    def fail(*args: object) -> int:
        calls.append(1)
        if len(calls) > (1 if call == "write" else 0):
            raise OSError(number, os.strerror(number))
        return int(real(*args))

    if call == "write":

        def no_copy(*_: object) -> int:
            raise OSError(errno.EXDEV, "")

        monkeypatch.setattr(os, "copy_file_range", no_copy, raising=False)
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(FileError) as e, output(tmp_path / "a", needed=77) as path:
        write_safetensors(path, tensors)
    monkeypatch.undo()
    assert e.value.code == code
    assert e.value.where == str(tmp_path / "a")
    assert code != "no-space" or "77 bytes needed" in e.value.seen
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A memory file system of 256 KiB; where mounting is not allowed, /dev/full's error stands in."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
    )
    if made.returncode:
        pytest.skip("mounting is not allowed here; the simulated errors above cover the path")
    try:
        yield disk
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], capture_output=True)
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(tiny_disk: Path) -> None:
    big = {"x": Tensor("I8", (1 << 20,), (Literal(bytes(1 << 20)),))}
    with pytest.raises(FileError) as e, output(tiny_disk / "a") as path:
        write_safetensors(path, big)
    assert e.value.code == "no-space" and "free" in e.value.seen
    assert list(tiny_disk.iterdir()) == []
    assert code_of(tiny_disk / "a", needed=1 << 20) == "no-space"


def test_a_disk_that_is_really_read_only(tiny_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    assert code_of(tiny_disk / "a") == "not-writable"
    assert code_of(tiny_disk / "d", directory=True) == "not-writable"


def test_errors_of_surgery_name_the_output_not_the_temporary(tmp_path: Path) -> None:
    nan = {"x": scalar(float("nan"))}
    with pytest.raises(ValueRefused) as e, output(tmp_path / "a") as path:
        write_safetensors(path, nan)
    assert e.value.where == str(tmp_path / "a") and "tmp" not in str(e.value).split("/a:")[-1]
    assert list(tmp_path.iterdir()) == []


def test_an_os_error_about_another_file_names_that_file(tmp_path: Path) -> None:
    with pytest.raises(FileError) as e, output(tmp_path / "a"):
        (tmp_path / "gone").read_bytes()
    assert e.value.code == "no-such-file" and e.value.where == str(tmp_path / "gone")


# -- Killed ------------------------------------------------------------------------------------


SLOW = """
    import sys, time
    from pathlib import Path
    from adaptsurgery.checkpoint.atomic import output
    from adaptsurgery.checkpoint.writer import write_safetensors
    from adaptsurgery_formats.tensors import Literal, Tensor
    tensors = {str(i): Tensor("I8", (9,), (Literal(bytes(9)),)) for i in range(100)}
    with output(Path(sys.argv[1]), overwrite=True) as path:
        write_safetensors(path, tensors, progress=lambda n: (print("x", flush=True), time.sleep(0.1)))
"""


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_process_leaves_no_half_output(
    tmp_path: Path, number: signal.Signals, there: bool
) -> None:
    target = tmp_path / "a.safetensors"
    if there:
        target.write_text("old")
    command = [sys.executable, "-c", textwrap.dedent(SLOW), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        process.stdout.readline()
        time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(20) != 0
    assert target.exists() == there
    assert not there or target.read_text() == "old"
    others = [p.name for p in tmp_path.iterdir() if p != target]
    if number == signal.SIGINT:
        assert others == []
    assert all(name.startswith(".adaptsurgery-") for name in others)


# -- What killed runs leave, and two at one name


def dead_room(target: Path, content: str = "half") -> atomic.Room:
    room = atomic.Room(target)
    room.enter()
    os.close(room.fd)  # as its process's end does
    room.fd = -1
    room.content.write_text(content)
    return room


@needs("fcntl")
def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    dead, other = dead_room(tmp_path / "a"), dead_room(tmp_path / "b")
    living = atomic.Room(tmp_path / "a")
    living.enter()
    with output(tmp_path / "a") as path:
        path.write_text("new")
    assert not dead.path.exists() and living.path.exists() and other.path.exists()
    living.leave()
    assert code_of(tmp_path / "a") == "output-exists"
    assert code_of(tmp_path / "b" / "c") == "no-such-folder"
    check_output(tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_where_locks_keep_nobody_out_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = dead_room(tmp_path / "a")
    monkeypatch.setattr(atomic.system, "lock", lambda *_, **__: True)
    check_output(tmp_path / "a")
    assert dead.path.exists()


@needs("fcntl")
@pytest.mark.parametrize("step", ["before", "between"])
def test_a_swap_in_two_steps_is_ended_by_the_next_run(tmp_path: Path, step: str) -> None:
    folder = old_folder(tmp_path)
    room = dead_room(folder)
    room.content.unlink()
    room.content.mkdir()
    (room.content / "config.json").write_text("new")
    (room.path / "swap.json").write_text(json.dumps(atomic.identity(folder)))
    if step == "between":
        folder.rename(room.path / "content.old")
    atomic.sweep(folder)
    assert (folder / "config.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


@needs("fcntl")
def test_a_folder_that_came_after_a_broken_swap_is_left_alone(tmp_path: Path) -> None:
    folder = old_folder(tmp_path)
    room = dead_room(folder)
    room.content.unlink()
    room.content.mkdir()
    (room.path / "swap.json").write_text('{"device": 1, "inode": 1}')
    atomic.sweep(folder)
    assert (folder / "config.json").read_text() == "old" and not room.path.exists()


def test_a_folder_that_cannot_be_renamed_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an overlay file system, where a folder of a lower layer has no other name to get."""
    folder = old_folder(tmp_path)
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    real = os.rename

    def rename(a: Path, b: Path) -> None:
        if Path(a) == folder:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    with output(folder, overwrite=True, directory=True, replaceable=OURS) as path:
        (path / "config.json").write_text("new")
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    assert (folder / "config.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_signal_within_the_last_step_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = atomic.sync_folder

    def interrupted(path: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        real(path)

    monkeypatch.setattr(atomic, "sync_folder", interrupted)
    with pytest.raises(KeyboardInterrupt), output(tmp_path / "a") as path:
        path.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert atomic.landed[-1] == str(tmp_path / "a")


@needs("os.pathconf")
def test_paths_too_long_for_what_lies_within(tmp_path: Path) -> None:
    deep = "/".join(["d" * 200] * 20)
    with pytest.raises(FileError) as e:
        check_output(tmp_path / "a", inner=[deep])
    assert e.value.code == "name-too-long"
    with pytest.raises(FileError) as e:
        check_output(tmp_path / "a", inner=["x/" + "é" * 128])
    assert e.value.code == "name-too-long"
    check_output(tmp_path / ("é" * 127), inner=["x/" + "é" * 127])


def test_several_files_land_together_the_named_one_last(tmp_path: Path) -> None:
    with atomic.outputs(tmp_path / "a.onnx", beside=[".data"]) as folder:
        (folder / "a.onnx").write_text("1")
        (folder / "a.onnx.data").write_text("2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    (tmp_path / "a.onnx").unlink()
    with pytest.raises(FileError) as e, atomic.outputs(tmp_path / "a.onnx") as folder:
        (folder / "a.onnx").write_text("3")
        (folder / "a.onnx.data").write_text("4")
    assert e.value.code == "output-exists"
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx.data"]
    assert (tmp_path / "a.onnx.data").read_text() == "2"
