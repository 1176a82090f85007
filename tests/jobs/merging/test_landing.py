"""How a merge's output lands: what is taken up, who wins, what an interrupt leaves, and for whom."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_run import contents, left_behind, refusal, write_adapter, write_base
from unix import needs

from adaptsurgery.checkpoint import atomic, locks, system
from adaptsurgery.jobs.merging import run
from adaptsurgery.jobs.merging.check import verify_merge
from adaptsurgery.jobs.merging.merge import merge, plan_merge
from adaptsurgery_formats.errors import FileError

SHARD = "model-00001-of-00003.safetensors"


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    return write_base(tmp_path / "base"), write_adapter(tmp_path / "a.safetensors")


@pytest.fixture
def single(tmp_path: Path) -> tuple[Path, Path]:
    base = write_base(tmp_path / "base") / SHARD
    return base, write_adapter(tmp_path / "two.safetensors", range(2))


def is_merge_of(out: Path, base: Path, adapter: str | Path) -> bool:
    """Whether numbers and manifest are those of one merge."""
    report = verify_merge(out, base, adapter)
    return bool(report.rows) and not report.notes


# -- Finished parts


def half_done(base: Path, adapter: Path, out: Path) -> Path:
    """The partial output with the first of three shards finished."""
    merge(base, adapter, out, shard_index=0, num_shards=3)
    (partial,) = left_behind(out.parent)
    return out.parent / partial


@pytest.mark.parametrize("damage", ["flipped", "time set back", "replaced", "cut", "a link"])
def test_a_shard_that_is_not_as_it_was_finished_is_done_again(
    inputs: tuple[Path, Path], tmp_path: Path, damage: str
) -> None:
    base, adapter = inputs
    shard = half_done(base, adapter, tmp_path / "out") / "files" / SHARD
    data, before = bytearray(shard.read_bytes()), shard.stat()
    data[-1] ^= 1
    if damage in ("replaced", "a link"):
        shard.unlink()
    if damage == "a link":
        (tmp_path / "other").write_bytes(data)
        shard.symlink_to(tmp_path / "other")
    else:
        shard.write_bytes(data[:-8] if damage == "cut" else data)
    if damage == "time set back":
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    merge(base, adapter, tmp_path / "out")
    assert is_merge_of(tmp_path / "out", base, adapter) and not left_behind(tmp_path)


@pytest.mark.parametrize("record", [None, "", "[]", "{}", "{not json", '{"sha256": "", "file": 1}'])
def test_a_shard_without_its_record_is_done_again(
    inputs: tuple[Path, Path], tmp_path: Path, record: str | None
) -> None:
    base, adapter = inputs
    partial = half_done(base, adapter, tmp_path / "out")
    path = partial / "norms" / "0.json"
    path.unlink()
    if record is not None:
        path.write_text(record)
    merge(base, adapter, tmp_path / "out")
    manifest = json.loads((tmp_path / "out/adaptsurgery_manifest.json").read_text())
    assert len(manifest["norms"]) == 6 and is_merge_of(tmp_path / "out", base, adapter)


def test_a_record_whose_figures_were_changed_is_not_believed(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = inputs
    path = half_done(base, adapter, tmp_path / "out") / "norms" / "0.json"
    record = json.loads(path.read_text())
    next(iter(record["result"].values()))["change"] = 99.0
    path.write_text(json.dumps(record))
    merge(base, adapter, tmp_path / "out")
    manifest = json.loads((tmp_path / "out/adaptsurgery_manifest.json").read_text())
    assert all(norms["change"] != 99 for norms in manifest["norms"].values())


@pytest.mark.parametrize("name", ["evil.py", "model-00009-of-00009.safetensors", "sub/x", "link"])
def test_files_of_other_work_are_refused_and_never_land(
    inputs: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    base, adapter = inputs
    strange = half_done(base, adapter, tmp_path / "out") / "files" / name
    strange.parent.mkdir(exist_ok=True)
    if name == "link":
        strange.symlink_to(tmp_path)
    else:
        strange.write_text("x")
    error = refusal(base, adapter, tmp_path / "out")
    assert error.code == "strange-file" and name in error.seen
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["link", "dangling", "file"])
def test_what_has_the_partial_outputs_name_is_left_alone(
    inputs: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    base, adapter = inputs
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    root = run._Place(plan_merge(base, [adapter]), tmp_path / "out").root
    if kind == "file":
        root.write_text("theirs")
    else:
        root.symlink_to(tmp_path / ("mine" if kind == "link" else "nowhere"))
    assert refusal(base, adapter, tmp_path / "out").code == "bad-partial"
    assert root.is_symlink() or root.read_text() == "theirs"
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["precious"]
    assert not (tmp_path / "out").exists()


def test_nobody_else_may_look_into_a_partial_output(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = inputs
    partial = half_done(base, adapter, tmp_path / "out")
    assert partial.stat().st_mode & 0o077 == 0
    (partial / "files" / "strange").write_text("x")
    partial.chmod(0o777)  # as if others could have written there: all of it is made anew
    merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out" / "strange").exists() and not left_behind(tmp_path)


def test_a_shard_is_as_it_was_recorded_until_it_lands(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """Private inputs narrow it before, so that no twin takes it for another file, and a kill keeps it."""
    base, adapter = inputs
    (base / "config.json").chmod(0o600)
    plan, out = plan_merge(base, [adapter]), tmp_path / "out"
    runner = run._Runner(plan, run._Place(plan, out), None, 1, None, True)
    with runner.place.entered(alone=True):
        for number in range(len(plan.jobs)):
            runner.job(number)
        run._make_ready(plan, runner.place, out, {})
        assert all(map(run._Place(plan, out).done, range(len(plan.jobs))))


# -- Two at one output


def during(monkeypatch: pytest.MonkeyPatch, step: str, act: Callable[[], object]) -> None:
    """Let something happen once, right before a step of a landing."""
    owner: Any = run if hasattr(run, step) else atomic
    real = getattr(owner, step)

    def first(*given: Any, **options: Any) -> Any:
        monkeypatch.setattr(owner, step, real)
        act()
        return real(*given, **options)

    monkeypatch.setattr(owner, step, first)


@pytest.mark.parametrize("step", ["_make_ready", "put", "_drop_record", "put_record", "_close"])
def test_a_landing_within_another_never_mixes_file_and_manifest(
    single: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    base, adapter = single
    out = tmp_path / "out.safetensors"
    merge(base, f"{adapter}=3", out)
    during(monkeypatch, step, lambda: merge(base, f"{adapter}=2", out, overwrite=True))
    merge(base, adapter, out, overwrite=True)
    now = next(w for w in ("1", "2") if is_merge_of_numbers(out, base, f"{adapter}={w}"))
    assert is_merge_of(out, base, f"{adapter}={now}")
    assert not left_behind(tmp_path)


def is_merge_of_numbers(out: Path, base: Path, adapter: str) -> bool:
    try:
        return bool(verify_merge(out, base, adapter).rows)
    except Exception:
        return False


@pytest.mark.parametrize("folder", [False, True])
def test_the_loser_leaves_the_winners_files_alone(
    folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a.safetensors", range(6 if folder else 2))
    base, out = (base, tmp_path / "out") if folder else (base / SHARD, tmp_path / "o.safetensors")
    during(monkeypatch, "_make_ready", lambda: merge(base, f"{adapter}=2", out))
    error = refusal(base, adapter, out)
    assert error.code == "output-exists" and error.where == str(out)
    assert is_merge_of(out, base, f"{adapter}=2") and not left_behind(tmp_path)


def test_the_same_merge_twice_is_done_twice(
    single: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = single
    out = tmp_path / "out.safetensors"
    plan = plan_merge(base, [adapter])
    during(monkeypatch, "check_inputs", lambda: run.run_plan(plan, out))
    assert run.run_plan(plan, out)[0]
    assert is_merge_of(out, base, adapter) and not left_behind(tmp_path)


def test_another_commands_output_takes_the_manifest_with_it(
    single: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = single
    out = tmp_path / "out.safetensors"
    merge(base, adapter, out)
    with atomic.output(out, overwrite=True) as path:
        path.write_bytes(base.read_bytes())
    assert not Path(f"{out}.manifest.json").exists()
    Path(f"{out}.manifest.json").write_text('{"job": "mine"}')
    with atomic.output(out, overwrite=True) as path:
        path.write_bytes(base.read_bytes())
    assert Path(f"{out}.manifest.json").read_text() == '{"job": "mine"}'


@needs("fcntl")
def test_an_interrupted_twin_leaves_the_others_work(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = inputs
    plan, out = plan_merge(base, [adapter]), tmp_path / "out"
    one, two = run._Place(plan, out), run._Place(plan, out)
    with one.entered(alone=True):
        with pytest.raises(KeyboardInterrupt), two.entered(alone=True):
            raise KeyboardInterrupt
        assert one.root.is_dir() and one.busy() is False
    with pytest.raises(KeyboardInterrupt), two.entered(alone=True):
        raise KeyboardInterrupt
    assert not left_behind(tmp_path)


@needs("fcntl")
def test_a_lock_whose_holder_does_not_let_go_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.05)
    path = locks.hidden(tmp_path / "out", ".lock")
    fd = system.open_lock(path)
    system.lock(fd)
    with locks.alone(tmp_path / "out"), locks.alone(tmp_path / "out"):
        pass
    os.close(fd)
    with locks.alone(tmp_path / "out"):
        assert locks.is_held(path)
    assert not path.exists()


# -- Interrupts


@pytest.mark.parametrize("step", ["put", "_drop_record", "put_record", "_close", "replace_json"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_the_same_command_ends_what_was_broken_off(
    single: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: BaseException,
) -> None:
    base, adapter = single
    out = tmp_path / "out.safetensors"

    def broken() -> None:
        raise error

    during(monkeypatch, step, broken)
    with pytest.raises((KeyboardInterrupt, FileError)):
        merge(base, adapter, out)
    monkeypatch.undo()
    assert all(name.endswith(".partial") for name in left_behind(tmp_path))
    merge(base, adapter, out)
    assert is_merge_of(out, base, adapter) and not left_behind(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_within_the_landing_waits_for_its_end(
    single: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    base, adapter = single
    out = tmp_path / "out.safetensors"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    during(monkeypatch, "put_record", lambda: signal.raise_signal(number))
    try:
        with pytest.raises(KeyboardInterrupt):
            merge(base, adapter, out)
    finally:
        signal.signal(number, before)
    assert is_merge_of(out, base, adapter) and not left_behind(tmp_path)


@needs("fcntl")
def test_a_kill_between_the_two_renames_is_mended(
    single: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = single
    out = tmp_path / "out.safetensors"
    merge(base, f"{adapter}=3", out)
    child = multiprocessing.get_context("fork").Process(target=killed, args=(base, adapter, out))
    child.start()
    child.join()
    assert child.exitcode == 9 and not Path(f"{out}.manifest.json").exists()
    merge(base, adapter, out, overwrite=True)
    assert is_merge_of(out, base, adapter) and not left_behind(tmp_path)


def killed(base: Path, adapter: Path, out: Path) -> None:
    atomic.put_record = lambda *_: os._exit(9)
    merge(base, adapter, out, overwrite=True)


# -- Where an output may lie, and what it is made of


def test_an_output_in_the_adapters_folder_is_taken_up(tmp_path: Path) -> None:
    """What lies beside an adapter's own files is no part of it, nor of the plan."""
    base, folder = write_base(tmp_path / "base"), tmp_path / "adapter"
    folder.mkdir()
    write_adapter(folder / "a.safetensors")
    digest = plan_merge(base, [folder]).digest
    (folder / "checkpoint-100").mkdir()
    (folder / "checkpoint-100" / "optimizer.bin").write_bytes(b"x" * 99)
    (folder / "trainer_state.json").write_text("{}")
    assert plan_merge(base, [folder]).digest == digest
    merge(base, folder, folder / "out", shard_index=0, num_shards=3)
    merge(base, folder, folder / "out")
    assert not left_behind(folder) and contents(folder / "out")


@pytest.mark.parametrize("length", [242, 255, 256])
def test_names_too_long_are_told_before_the_work(
    single: tuple[Path, Path], tmp_path: Path, length: int
) -> None:
    base, adapter = single
    out = tmp_path / ("n" * (length - 12) + ".safetensors")
    for _ in range(2):
        assert refusal(base, adapter, out).code == "name-too-long"
        assert refusal(base, adapter, out, dry_run=True).code == "name-too-long"
    assert not left_behind(tmp_path)
    assert merge(base, adapter, tmp_path / ("n" * 228 + ".safetensors")).facts["complete"]


@pytest.mark.parametrize("name", ["README.md", "notes/LICENSE"])
def test_a_link_that_leads_nowhere_is_told_before_the_work(
    inputs: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    base, adapter = inputs
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).symlink_to(base / "gone")
    error = refusal(base, adapter, tmp_path / "out")
    assert name.rpartition("/")[2] in error.where + error.seen + "".join(map(str, error.items))
    assert not left_behind(tmp_path)


def test_a_working_directory_that_was_removed(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    home = os.getcwd()
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        assert merge(base, adapter, tmp_path / "out").facts["complete"]
    finally:
        os.chdir(home)


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Path]:
    """An overlay file system over a folder that holds an earlier output."""
    lower, upper, top = (tmp_path / name for name in ("lower", "upper", "top"))
    for folder in (lower, upper, top):
        folder.mkdir()
    merge(write_base(tmp_path / "base"), write_adapter(tmp_path / "a.safetensors"), lower / "out")
    memory = ["mount", "-t", "tmpfs", "tmpfs", str(upper)]
    options = f"lowerdir={lower},upperdir={upper}/up,workdir={upper}/work,redirect_dir=off"
    if subprocess.run(memory, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    (upper / "up").mkdir()
    (upper / "work").mkdir()
    command = ["mount", "-t", "overlay", "overlay", "-o", options, str(top)]
    done = subprocess.run(command, capture_output=True).returncode
    try:
        if done:
            pytest.skip("there is no overlay file system here")
        yield top
    finally:
        subprocess.run(["umount", str(top)], capture_output=True)
        subprocess.run(["umount", "-l", str(upper)], capture_output=True)


def test_a_folder_of_a_containers_image_is_replaced(container: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "a.safetensors"
    merge(tmp_path / "base", f"{adapter}=2", container / "out", overwrite=True)
    assert is_merge_of(container / "out", tmp_path / "base", f"{adapter}=2")
    assert not left_behind(container)


# -- After an error


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The second shard's work ends in an error."""
    write = run._Runner._write

    def once(self: Any, job: Any, work: Path) -> Any:
        if job.name != SHARD:
            raise error
        return write(self, job, work)

    monkeypatch.setattr(run._Runner, "_write", once)


ERRORS = [FileError("no", code="bad-file"), OSError(28, "No space left on device"), MemoryError()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_an_error_leaves_nothing(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    failing(monkeypatch, error)
    with pytest.raises((FileError, MemoryError)):
        merge(*inputs, tmp_path / "out")
    assert not left_behind(tmp_path) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", ERRORS[:2], ids=lambda e: type(e).__name__)
def test_parts_that_are_finished_outlive_an_error_of_another_and_that_is_said(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    partial = half_done(*inputs, tmp_path / "out")
    failing(monkeypatch, error)
    with pytest.raises(FileError) as caught:
        merge(*inputs, tmp_path / "out", shard_index=1, num_shards=3)
    assert "kept" in caught.value.next and (partial / "files" / SHARD).exists()


def test_what_an_interrupt_leaves_is_taken_up(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge(*inputs, tmp_path / "out")
    (partial,) = left_behind(tmp_path)
    inode = (tmp_path / partial / "files" / SHARD).stat().st_ino
    merge(*inputs, tmp_path / "out")
    assert (tmp_path / "out" / SHARD).stat().st_ino == inode and not left_behind(tmp_path)


@pytest.mark.parametrize("norms", [5, "x", [1], {"a": 5}, {"a": {"b": "x"}}, {"a": {"b": [1]}}])
def test_a_manifest_of_other_json_is_no_fault(
    inputs: tuple[Path, Path], tmp_path: Path, norms: Any
) -> None:
    """A part that comes late reads the norms from the manifest that another has written."""
    out = tmp_path / "out"
    merge(*inputs, out)
    path = out / "adaptsurgery_manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "norms": norms}))
    report = merge(*inputs, out, shard_index=1, num_shards=3)
    assert report.facts["complete"]
