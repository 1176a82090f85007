"""Workers, parts, kills and resumption: the same bytes in the end, and nothing half written."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkpoint_pairs as models
import pytest
import torch
from unix import needs

from adaptsurgery.checkpoint import atomic
from adaptsurgery.jobs.extract import choose, fitting
from adaptsurgery.jobs.extract import page as page_module
from adaptsurgery.jobs.extract.extract import extract
from adaptsurgery_formats.errors import SurgeryError

extract_module = importlib.import_module("adaptsurgery.jobs.extract.extract")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = models.weights()
    return (
        models.write_shards(folder / "base", base, 2),
        models.write_shards(folder / "tuned", dict(reversed(models.moved(base).items())), 3),
    )


def left_behind(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".adaptsurgery")]


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "hra", "auto"])
def test_the_same_bytes_whatever_the_workers_and_parts(
    pair: tuple[Path, Path], tmp_path: Path, algorithm: str
) -> None:
    options: dict[str, Any] = {"algorithm": algorithm, "rank": 2, "seed": 3}
    options["include"] = ["q_proj", "layers.0.up", "conv"]
    extract(*pair, tmp_path / "one", workers=1, **options)
    extract(*pair, tmp_path / "three", workers=3, **options)
    for index in (2, 0, 1):
        report = extract(*pair, tmp_path / "parts", shard_index=index, num_shards=3, **options)
        assert report.facts["complete"] == (index == 1)
    wanted = models.tree(tmp_path / "one")
    assert models.tree(tmp_path / "three") == wanted == models.tree(tmp_path / "parts")
    assert not left_behind(tmp_path)


def test_a_part_that_comes_late_finds_the_output(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for index in (0, 1, 0):
        report = extract(*pair, tmp_path / "out", rank=2, shard_index=index, num_shards=2)
    assert report.facts["complete"] and "already-there" in [n.code for n in report.notes]
    assert not left_behind(tmp_path)
    with pytest.raises(SurgeryError) as refused:
        extract(*pair, tmp_path / "out", rank=3, shard_index=0, num_shards=2)
    assert refused.value.code == "output-exists"


def test_finished_layers_are_not_done_again(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fit = fitting.fit_layer

    def counted(layer: Any, *rest: Any) -> Any:
        if len(done) == 3:
            raise stop
        done.append(layer.label)
        return fit(layer, *rest)

    monkeypatch.setattr(fitting, "fit_layer", counted)
    stop: BaseException = OSError(28, "No space left on device")
    with pytest.raises(SurgeryError):  # an error leaves nothing behind
        extract(*pair, tmp_path / "out", rank=2, workers=1)
    assert not (tmp_path / "out").exists() and not left_behind(tmp_path)
    stop, done[:] = KeyboardInterrupt(), []
    with pytest.raises(KeyboardInterrupt):
        extract(*pair, tmp_path / "out", rank=2, workers=1)
    assert not (tmp_path / "out").exists() and len(left_behind(tmp_path)) == 1
    first, done[:] = list(done), []
    monkeypatch.setattr(
        fitting, "fit_layer", lambda layer, *rest: (done.append(layer.label), fit(layer, *rest))[1]
    )
    report = extract(*pair, tmp_path / "out", rank=2, workers=1)
    assert len(done) == 5 and not set(done) & set(first)
    assert report.facts["modules"] == 8 and not left_behind(tmp_path)


def test_another_extraction_does_not_take_it_up(pair: tuple[Path, Path], tmp_path: Path) -> None:
    extract(*pair, tmp_path / "out", rank=2, shard_index=0, num_shards=2)
    report = extract(*pair, tmp_path / "out", rank=3)
    assert {r["rank"] for r in report.facts["layers"]} == {3}
    assert "abandoned" in [n.code for n in report.notes] and len(left_behind(tmp_path)) == 1


def test_an_input_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = models.weights()
    paths = models.write(tmp_path / "b.safetensors", base), tmp_path / "t.safetensors"
    models.write(paths[1], models.moved(base))
    fit = fitting.fit_layer

    def touched(*given: Any) -> Any:
        os.utime(paths[1], (1, 1))
        return fit(*given)

    monkeypatch.setattr(fitting, "fit_layer", touched)
    with pytest.raises(SurgeryError) as refused:
        extract(*paths, tmp_path / "out", rank=2)
    assert refused.value.code == "input-changed" and not (tmp_path / "out").exists()


@needs("fcntl")
@pytest.mark.parametrize("to", ["peft", "kohya"])
def test_kills_at_random_moments(pair: tuple[Path, Path], tmp_path: Path, to: str) -> None:
    """An old output stays until it is replaced whole; what is there in the end is what it should be."""
    out = tmp_path / ("out" if to == "peft" else "out.safetensors")
    given: dict[str, Any] = {"algorithm": "lora", "rank": 3, "to": to, "overwrite": True}
    started = time.monotonic()
    extract(*pair, out, **given)
    took, wanted = time.monotonic() - started, models.tree(out)
    extract(*pair, out, rank=1, to=to, overwrite=True)
    old, chance, ends = models.tree(out), random.Random(0), []
    while ends.count(-signal.SIGKILL) < 6 and len(ends) < 40:
        child = multiprocessing.get_context("fork").Process(
            target=extract, args=(*pair, out), kwargs=given
        )
        child.start()
        time.sleep(chance.uniform(0.0, took))
        child.kill()
        child.join()
        ends.append(child.exitcode)
        assert models.tree(out) in (old, wanted)
    assert ends.count(-signal.SIGKILL) == 6
    extract(*pair, out, **given)
    assert models.tree(out) == wanted
    assert not left_behind(tmp_path)


_LIMITED = """
import json, resource, sys
import torch, adaptsurgery.jobs.extract.fitting
from adaptsurgery.cli.output import peak_memory
from adaptsurgery.jobs.extract.extract import extract
torch.set_num_threads(1)
def size():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith("VmSize"))
before, room = peak_memory(), int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_AS, (size() + room, size() + room))
report = extract(*sys.argv[1:4], rank=4, workers=1)
print(json.dumps({"used": peak_memory() - before, "error": report.facts["error"]}))
"""


@needs("resource", "/proc/self/status")
@pytest.mark.slow
def test_a_pair_larger_than_the_memory_allowed(tmp_path: Path) -> None:
    """RLIMIT_AS: beyond what torch has taken, the process gets less than either checkpoint.

    What it uses is a few layers, whatever their number; between runs the allocator keeps from 1 to
    14 of these beyond the libraries' own.
    """
    random = torch.Generator().manual_seed(0)
    width, count = 1024, 36
    base = {f"l.{n}.weight": torch.randn(width, width, generator=random) for n in range(count)}
    tuned = {k: w + 0.01 * torch.randn(width, width, generator=random) for k, w in base.items()}
    paths = (
        models.write_shards(tmp_path / "b", base, 4),
        models.write_shards(tmp_path / "t", tuned, 3),
    )
    size, layer = 4 * count * width**2, 4 * width**2
    room = size * 7 // 8
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, *map(str, paths), str(tmp_path / "out"), str(room)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["used"] < 16 * layer + (64 << 20) < size, told


# -- The report lands with the adapter, and two at one output


def in_fork(work: Any) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    return child.exitcode


@pytest.mark.parametrize("ending", ["json", "html"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_between_adapter_and_report_leaves_the_report_to_the_next_run(
    pair: tuple[Path, Path], tmp_path: Path, ending: str, overwrite: bool
) -> None:
    out, page = tmp_path / "out", tmp_path / f"page.{ending}"
    if overwrite:
        extract(*pair, out, rank=1)
        page.write_text("old")
    given: dict[str, Any] = {"rank": 2, "report": page, "overwrite": overwrite}

    def killed() -> None:
        real = atomic.put

        def first_alone(source: Path, target: Path, *rest: Any) -> None:
            real(source, target, *rest)
            if target == out:
                os._exit(9)

        atomic.put = first_alone
        extract(*pair, out, **given)

    assert in_fork(killed) == 9
    assert out.exists() and page.exists() == overwrite
    report = extract(*pair, out, **given)
    assert str(page) in report.outputs and "already-there" in [n.code for n in report.notes]
    text = page.read_text()
    assert "tuned" in text and text != "old" and not left_behind(tmp_path)


def test_a_report_that_fails_leaves_nothing_half_done(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise RuntimeError("no page")

    with monkeypatch.context() as patch:
        patch.setattr(page_module, "text_of", broken)
        with pytest.raises(RuntimeError):
            extract(*pair, tmp_path / "out", rank=2, report=tmp_path / "page.json")
    assert not (tmp_path / "out").exists()
    extract(*pair, tmp_path / "out", rank=2, report=tmp_path / "page.json")
    assert (tmp_path / "page.json").exists() and not left_behind(tmp_path)


def test_a_report_that_is_there_already_is_refused_before_the_work(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "page.json").write_text("mine")
    for dry_run in (True, False):
        with pytest.raises(SurgeryError) as refused:
            extract(*pair, tmp_path / "out", rank=2, report=tmp_path / "page.json", dry_run=dry_run)
        assert refused.value.code == "output-exists"
    assert (tmp_path / "page.json").read_text() == "mine" and not left_behind(tmp_path)


@needs("fcntl")
@pytest.mark.parametrize("step", ["check_models", "results", "chosen_state"])
def test_the_same_extraction_twice_at_once(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The second run comes while the first one is at some step; both are done."""
    out, wanted = tmp_path / "out", tmp_path / "wanted"
    extract(*pair, wanted, rank=2)
    fork = multiprocessing.get_context("fork")
    go = fork.Event()
    twin = fork.Process(target=lambda: (go.wait(60), extract(*pair, out, rank=2)))
    twin.start()  # before any lock is held, which a fork would share
    module: Any = choose if step == "chosen_state" else extract_module
    real = getattr(module, step)

    def first(*given: Any) -> Any:
        monkeypatch.setattr(module, step, real)
        go.set()
        time.sleep(0.3)
        return real(*given)

    monkeypatch.setattr(module, step, first)
    assert extract(*pair, out, rank=2).facts["complete"]
    twin.join(60)
    assert twin.exitcode == 0
    assert models.tree(out) == models.tree(wanted) and not left_behind(tmp_path)


def test_other_figures_in_a_record_are_not_believed(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    extract(*pair, tmp_path / "out", rank=2, shard_index=0, num_shards=2)
    (partial,) = left_behind(tmp_path)
    for n, path in enumerate(sorted((tmp_path / partial / "norms").iterdir())):
        path.write_text(path.read_text().replace("0.", "1.", 1) if n else "{not json")
    for path in (tmp_path / partial / "files").iterdir():
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    extract(*pair, tmp_path / "out", rank=2)
    extract(*pair, tmp_path / "wanted", rank=2)
    assert models.tree(tmp_path / "out") == models.tree(tmp_path / "wanted")
