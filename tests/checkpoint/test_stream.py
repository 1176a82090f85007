"""A streamed file: copies byte for byte, edits in bounded memory, errors that name their tensor."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from unix import needs

from adaptsurgery.algorithms import HRA, LoRA, build
from adaptsurgery.checkpoint import stream
from adaptsurgery.checkpoint.bridge import from_torch
from adaptsurgery.checkpoint.finite import Nonfinite
from adaptsurgery.checkpoint.safetensors import read_safetensors
from adaptsurgery.checkpoint.stream import Entry, write_stream
from adaptsurgery.core.blocks import Placed, edit_of
from adaptsurgery.core.update import Update
from adaptsurgery_formats.errors import FileError, ShapeError, ValueRefused
from adaptsurgery_formats.tensors import Literal, Tensor, scalar

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * 0.1).to(dtype)


def entry(tensor: Tensor, *places: Placed, dtype: str | None = None) -> Entry:
    return Entry(tensor, lambda compute: edit_of(places, tensor.shape, compute), dtype)


def lora(o: int, i: int) -> LoRA:
    return LoRA(numbers(o, 4), numbers(4, i), scale=0.5)


@pytest.fixture
def source(tmp_path: Path) -> dict[str, Tensor]:
    held = {f"w.{d}": numbers(300, 70, dtype=d) for d in DTYPES}
    held |= {"i": torch.arange(7), "b": torch.ones(5).bool(), "empty": torch.zeros(0, 3)}
    held["nan"], held["scalar"] = torch.tensor([float("nan")]), torch.tensor(3.0)
    save_file(held, tmp_path / "in.safetensors", {"format": "pt"})
    return read_safetensors(tmp_path / "in.safetensors").tensors


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_copy_is_the_file_byte_for_byte(
    workers: int, source: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "COPY", 1000)
    entries = {key: Entry(tensor) for key, tensor in source.items()}
    seen: list[int] = []
    write_stream(tmp_path / "out", entries, {"format": "pt"}, workers=workers, progress=seen.append)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "in.safetensors").read_bytes()
    assert sum(seen) == (tmp_path / "out").stat().st_size


@needs("os.copy_file_range")
def test_without_the_kernels_help_too(
    source: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise OSError(18, "cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refused)
    write_stream(tmp_path / "out", {k: Entry(t) for k, t in source.items()}, {"format": "pt"})
    assert (tmp_path / "out").read_bytes() == (tmp_path / "in.safetensors").read_bytes()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("piece", [1, 5000, 1 << 20])
def test_edits_conversions_and_new_tensors(
    workers: int,
    piece: int,
    source: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "PIECE", piece)
    before = load_file(tmp_path / "in.safetensors")
    updates: list[Update] = [lora(300, 70), HRA(numbers(70, 3)), HRA(numbers(300, 3))]
    entries = {key: Entry(tensor) for key, tensor in source.items()}
    for n, d in enumerate(DTYPES[:3]):
        turned = n == 2  # the last HRA turns columns of the stored (i, o): all rows at once
        entries[f"w.{d}"] = entry(source[f"w.{d}"], Placed(updates[n], transposed=turned))
    entries["cast"] = Entry(source["w.torch.float32"], dtype="BF16")
    entries["half"] = entry(source["w.torch.bfloat16"], Placed(updates[0]), dtype="F32")
    entries["rows"] = entry(
        source["w.torch.float32"].rows(10, 90), Placed(updates[0], source=(10, 90))
    )
    entries["new"] = Entry(scalar(2.5, "BF16"))
    entries["held"] = Entry(from_torch(torch.arange(6).reshape(2, 3)))
    norms = write_stream(tmp_path / "out", entries, workers=workers, norms=True)
    after = load_file(tmp_path / "out")
    wanted = {key: before[key] for key in ("i", "b", "empty", "scalar", "w.torch.float64")}
    wanted["w.torch.float32"] = updates[0].fold(before["w.torch.float32"])
    wanted["w.torch.bfloat16"] = updates[1].fold(before["w.torch.bfloat16"])
    wanted["w.torch.float16"] = updates[2].fold(before["w.torch.float16"].t()).t()
    wanted["cast"] = before["w.torch.float32"].bfloat16()
    wanted["half"] = updates[0].fold(before["w.torch.bfloat16"].float())
    wanted["rows"] = wanted["w.torch.float32"][10:90]
    wanted |= {"new": torch.tensor(2.5).bfloat16(), "held": torch.arange(6).reshape(2, 3)}
    assert bool(after.pop("nan").isnan().all())
    torch.testing.assert_close(after, wanted)
    assert set(norms) == {"w.torch.float32", "w.torch.bfloat16", "w.torch.float16", "half", "rows"}
    change = (wanted["w.torch.float32"] - before["w.torch.float32"]).norm()
    assert norms["w.torch.float32"].as_dict()["change"] == pytest.approx(float(change), rel=1e-4)


def test_float64_compute(source: dict[str, Tensor], tmp_path: Path) -> None:
    update = lora(300, 70)
    key = "w.torch.bfloat16"
    write_stream(tmp_path / "out", {key: entry(source[key], Placed(update))}, compute="F64")
    weight = load_file(tmp_path / "in.safetensors")[key]
    exact = weight.double() + 0.5 * (update.up.double() @ update.down.double())
    assert torch.equal(load_file(tmp_path / "out")[key], exact.to(torch.bfloat16))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_names_its_tensor_and_stops_all(
    workers: int, source: dict[str, Tensor], tmp_path: Path
) -> None:
    def broken(compute: torch.dtype) -> object:
        raise RuntimeError("no such factor")

    large = build("full", {"diff": torch.full((300, 70), 7e4)})
    cases: list[tuple[str, Entry, type[Exception], str]] = [
        ("w.torch.float16", entry(source["w.torch.float16"], Placed(large)), ValueRefused, "non-finite"),
        ("w.torch.float32", entry(source["w.torch.float32"], Placed(lora(3, 4))), ShapeError, "bad-shape"),
        ("i", entry(source["i"], Placed(lora(7, 1))), ValueRefused, "quantised-weight"),
        ("i", Entry(source["i"], dtype="F32"), ValueRefused, "quantised-weight"),
        ("i", Entry(Tensor("I64", (7,), (Literal(b"123"),))), ShapeError, "bad-shape"),
    ]  # fmt: skip
    for n, (key, wrong, kind, code) in enumerate(cases):
        entries = {k: Entry(t) for k, t in source.items()} | {key: wrong}
        with pytest.raises(kind, match=f"(?s)`{key}`.*{code}"):
            write_stream(tmp_path / f"out{n}", entries, workers=workers)
    bug = Entry(source["w.torch.float32"], broken)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no such factor") as caught:
        write_stream(tmp_path / "bug", {"w": bug}, workers=workers)
    assert caught.value.__notes__ == ["in the work on `w`"]
    assert threading.active_count() == 1 or not any(
        t.name.startswith("Thread-") and t.is_alive() and "work" in t.name
        for t in threading.enumerate()
    )
    with pytest.raises(FileError, match="output-exists"):
        write_stream(tmp_path / "bug", {})


def test_a_source_cut_short_is_told(source: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "in.safetensors"
    os.truncate(path, path.stat().st_size - 20_000)
    for one in (Entry, lambda t: entry(t, Placed(build("full", {"diff": torch.zeros(t.shape)})))):
        entries = {key: one(t) for key, t in source.items() if key.startswith("w")}
        with pytest.raises(FileError, match="truncated-file"):
            write_stream(tmp_path / f"out{len(os.listdir(tmp_path))}", entries)


def test_casts_and_edits_refuse_what_is_not_finite_unless_it_is_allowed(tmp_path: Path) -> None:
    infinite = from_torch(torch.tensor([1.0, float("inf")]))
    write_stream(tmp_path / "copy", {"w": Entry(infinite)})
    with pytest.raises(ValueRefused, match="non-finite"):
        write_stream(tmp_path / "refused", {"w": Entry(infinite, dtype="F16")})
    allowed = Nonfinite(allowed=True)
    write_stream(tmp_path / "a", {"w": Entry(infinite, dtype="F16")}, nonfinite=allowed)
    assert load_file(tmp_path / "a")["w"].tolist() == [1.0, float("inf")]
    assert allowed.computed == {"w": 1} and not allowed.copied
    with pytest.raises(ValueRefused, match="non-finite"):
        write_stream(tmp_path / "b", {"w": Entry(from_torch(torch.tensor([7e4])), dtype="F16")})
    with pytest.raises(ValueRefused, match="non-finite"):
        write_stream(tmp_path / "c", {"w": entry(infinite.reshape(2, 1), Placed(lora(2, 1)))})


def test_torch_gets_its_threads_back(source: dict[str, Tensor], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    key = "w.torch.float32"
    write_stream(tmp_path / "out", {key: entry(source[key], Placed(lora(300, 70)))})
    assert torch.get_num_threads() == before


SPARSE = """
import json, sys, torch
from adaptsurgery.algorithms import LoRA
from adaptsurgery.checkpoint.finite import Nonfinite
from adaptsurgery.checkpoint.safetensors import read_safetensors
from adaptsurgery.checkpoint.stream import Entry, write_stream
from adaptsurgery.core.blocks import Placed, edit_of
o, i = 64000, 4096
head = json.dumps({"w": {"dtype": "BF16", "shape": [o, i], "data_offsets": [0, o * i * 2]}}).encode()
head += b" " * (-len(head) % 8)
with open(sys.argv[1], "wb") as file:
    file.write(len(head).to_bytes(8, "little") + head)
    file.truncate(8 + len(head) + o * i * 2)
tensor = read_safetensors(sys.argv[1]).tensors["w"]
update = LoRA(torch.zeros(o, 8), torch.zeros(8, i))
edit = lambda compute: edit_of([Placed(update)], tensor.shape, compute)
small = lambda compute: edit_of([Placed(update, rows=(0, 100), source=(0, 100))], (100, i), compute)
write_stream(sys.argv[2] + ".warm", {"w": Entry(tensor.rows(0, 100), small)})
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak()
write_stream(sys.argv[2], {"w": Entry(tensor, edit)}, sync=False)
print(peak() - before)
"""


@needs("/proc/self/status")
@pytest.mark.slow
def test_memory_is_a_few_megabytes_whatever_the_tensor(tmp_path: Path) -> None:
    """A tensor of 524 MB, edited whole: more than torch's own memory by less than 40 MB."""
    arguments = [sys.executable, "-c", SPARSE, str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40_000
    assert (tmp_path / "out").stat().st_size > 64000 * 4096 * 2


@pytest.mark.parametrize("workers", [1, 6])
@pytest.mark.parametrize("kernel", [True, False])
def test_a_few_sources_are_open_at_once_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, kernel: bool
) -> None:
    monkeypatch.setattr(stream._Sources, "limit", 4)
    if not kernel:
        monkeypatch.setattr(stream.system, "kernel_copy", lambda *_: 0)
    entries, most = {}, [0]
    for n in range(60):
        save_file({f"w{n}": torch.full((64,), float(n))}, tmp_path / f"{n}.safetensors")
        entries[f"w{n}"] = Entry(read_safetensors(tmp_path / f"{n}.safetensors").tensors[f"w{n}"])
    real = stream._Sources._open

    def counted(sources: stream._Sources, path: str) -> int:
        fd = real(sources, path)
        most[0] = max(most[0], len(sources.files))
        return fd

    monkeypatch.setattr(stream._Sources, "_open", counted)
    write_stream(tmp_path / "out", entries, workers=workers)
    got = load_file(tmp_path / "out")
    assert all(torch.equal(got[f"w{n}"], torch.full((64,), float(n))) for n in range(60))
    assert 0 < most[0] <= 4 + workers
