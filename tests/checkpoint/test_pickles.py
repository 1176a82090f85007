"""Torch pickles whose records another zip tool packed, and tensors that are no plain ones."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptsurgery import SurgeryError
from adaptsurgery.checkpoint.bridge import to_torch
from adaptsurgery.checkpoint.pickles import read_pickle


def repacked(source: Path, target: Path, packed: str, extra: bytes = b"") -> Path:
    """The same records, those whose names end in one of ``packed`` deflated."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            kind = zipfile.ZIP_DEFLATED if name.endswith(tuple(packed)) else zipfile.ZIP_STORED
            new.writestr(name, old.read(name), kind)
        if extra:
            new.writestr("a/extra", extra, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
    return target


@pytest.mark.parametrize("packed", ["0", "1", "01", "01l", "l", ""])
def test_packed_records_are_the_same_numbers(packed: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    state = {k: torch.randint(-2, 3, (4, 32), generator=generator).float() for k in "ab"}
    torch.save(state, tmp_path / "a.pt")
    path = repacked(tmp_path / "a.pt", tmp_path / "b.pt", packed, b"\1" * 3000)
    read = read_pickle(path)
    assert all(torch.equal(to_torch(read[key]), state[key]) for key in state)


def test_what_unpacks_without_end_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    path = repacked(tmp_path / "a.pt", tmp_path / "b.pt", "0", bytes(90 << 20))
    with pytest.raises(SurgeryError) as caught:
        read_pickle(path)
    assert caught.value.code == "absurd-size" and caught.value.next


ODD: dict[str, Any] = {
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "meta": lambda: torch.empty(3, device="meta"),
    "far larger than its memory": lambda: torch.ones(1).expand(1 << 40),
    "larger by two strides": lambda: torch.ones(4).as_strided((1 << 20, 1 << 20), (0, 0)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("old", [False, True])
def test_tensors_that_are_not_plain_are_refused(kind: str, old: bool, tmp_path: Path) -> None:
    try:
        torch.save({"w": ODD[kind]()}, tmp_path / "a.bin", _use_new_zipfile_serialization=not old)
    except (RuntimeError, NotImplementedError):
        pytest.skip("torch cannot save it so")
    with pytest.raises(SurgeryError) as caught:
        read_pickle(tmp_path / "a.bin")
    assert str(tmp_path) in caught.value.where


def test_a_small_view_of_fewer_numbers_is_read(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(5)}, tmp_path / "a.bin")
    assert torch.equal(to_torch(read_pickle(tmp_path / "a.bin")["w"]), torch.ones(5))


def rewritten(source: Path, target: Path, change: Any) -> Path:
    """The same archive, stored, with ``change`` of each record's name and bytes."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(*change(name, old.read(name)))
    return target


@pytest.mark.parametrize("change", ["longer", "shorter", "swapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_record_of_another_size_than_its_storage_is_refused(
    change: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """As torch does where it reads the file, and does not where it maps it."""
    torch.save({"a": torch.ones(8).to(dtype), "b": torch.ones(4).to(dtype)}, tmp_path / "a.pt")
    others = {"data/0": "data/1", "data/1": "data/0"}

    def changed(name: str, data: bytes) -> tuple[str, bytes]:
        head, _, number = name.partition("data/")
        if change == "swapped":
            return head + others.get(f"data/{number}", name[len(head) :]), data
        if number == "0":
            data = data * 2 if change == "longer" else data[:4]
        return name, data

    path = rewritten(tmp_path / "a.pt", tmp_path / "b.pt", changed)
    with pytest.raises(SurgeryError) as caught:
        read_pickle(path)
    assert caught.value.code == "bad-file"


def test_an_ordinary_pickle_is_mapped_and_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Views, shared storages, parameters and a trainer's other things do not hinder it."""
    whole = torch.arange(24.0).reshape(4, 6)
    state = {"a": whole, "b": whole[1:, ::2], "c": torch.nn.Parameter(torch.ones(2)), "d": torch.zeros(0)}  # fmt: skip
    beside = {"optimizer": {"state": [torch.ones(3), torch.Size([2])]}, "epoch": 3}
    torch.save({"state_dict": state, **beside}, tmp_path / "a.ckpt")
    maps, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: maps.append(k["mmap"]) or load(*a, **k))
    read = read_pickle(tmp_path / "a.ckpt")
    assert maps == [True]
    assert all(torch.equal(to_torch(read[key]), state[key]) for key in state)


@pytest.mark.parametrize("more", [b"\0", b"x" * 3000, b"PK\5\6", b"PK\5\6" + bytes(17)])
def test_bytes_after_the_archive_are_no_part_of_it(more: bytes, tmp_path: Path) -> None:
    state = {"a": torch.arange(8.0), "b": torch.ones(3)}
    torch.save(state, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes((tmp_path / "a.pt").read_bytes() + more)
    assert torch.load(tmp_path / "b.pt").keys() == state.keys()
    read = read_pickle(tmp_path / "b.pt")
    assert all(torch.equal(to_torch(read[key]), state[key]) for key in state)
