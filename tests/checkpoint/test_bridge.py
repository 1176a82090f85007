"""Tensors to torch and back, computed tensors, and torch's pickles."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptsurgery.checkpoint.bridge import DTYPES, computed, from_torch, to_torch, torch_dtype
from adaptsurgery.checkpoint.pickles import read_pickle
from adaptsurgery.checkpoint.safetensors import read_safetensors
from adaptsurgery.checkpoint.writer import write_safetensors
from adaptsurgery_formats.errors import FileError, ShapeError, ValueRefused
from adaptsurgery_formats.tensors import DTYPE_BYTES, Literal, Tensor, concat_rows


def bits(t: torch.Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_there_and_back_in_every_dtype(tmp_path: Path, name: str) -> None:
    dtype = torch_dtype(name)
    t = torch.randint(0, 2, (6 * DTYPE_BYTES[name],), dtype=torch.uint8).view(dtype).reshape(2, 3)
    lazy = from_torch(t)
    assert (lazy.dtype, lazy.shape, lazy.nbytes) == (name, (2, 3), len(bits(t)))
    assert lazy.read() == bits(t)
    assert bits(to_torch(lazy)) == bits(t)
    if name != "F8_E8M0":  # safetensors' own torch bridge lacks it
        save_file({"t": t}, tmp_path / "a")
        back = to_torch(read_safetensors(tmp_path / "a").tensors["t"])
        assert back.dtype == dtype and bits(back) == bits(t) and back.shape == (2, 3)


def test_all_dtypes_are_carried() -> None:
    assert set(DTYPES) == set(DTYPE_BYTES)


def test_the_result_is_its_own_and_writable() -> None:
    source = torch.ones(4)
    for lazy in (from_torch(source), Tensor("F32", (4,), (Literal(bytes(16)),))):
        got = to_torch(lazy)
        got += 5
        assert to_torch(lazy).max() <= 1
    assert source.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    t = torch.zeros(shape, dtype=torch.bfloat16)
    assert to_torch(from_torch(t)).shape == shape
    assert to_torch(Tensor("BF16", shape, (Literal(from_torch(t).read()),))).shape == shape


def test_rows_windows_and_views_of_held_tensors() -> None:
    t = torch.randn(6, 8)
    for view in (t, t.T, t[::2], t[:, 1:5], t[0].expand(3, 8)):
        lazy = from_torch(view)
        assert torch.equal(to_torch(lazy), view)
        assert torch.equal(to_torch(lazy.rows(1, 3)), view[1:3])
        assert torch.equal(to_torch(concat_rows([lazy, lazy])), torch.cat([view, view]))
        assert lazy.parts[0].window(2, 7).read() == bits(view)[2:7]
    assert torch.equal(to_torch(from_torch(t).reshape(8, 6)), t.reshape(8, 6))


def test_conjugated_views_are_resolved() -> None:
    t = torch.randn(4, dtype=torch.complex64).conj()
    assert torch.equal(to_torch(from_torch(t)), t.resolve_conj())


def test_gradients_do_not_come_along() -> None:
    assert not to_torch(from_torch(torch.randn(3, requires_grad=True))).requires_grad


def test_computed_tensors_are_computed_when_read(tmp_path: Path) -> None:
    calls: list[int] = []

    def thunk() -> torch.Tensor:
        calls.append(1)
        return torch.arange(6.0).reshape(2, 3).T  # not contiguous

    lazy = computed("F32", (3, 2), thunk)
    assert lazy.nbytes == 24 and not calls
    write_safetensors(tmp_path / "a", {"t": lazy})
    assert len(calls) == 1
    assert torch.equal(load_file(tmp_path / "a")["t"], thunk())
    assert torch.equal(to_torch(lazy.rows(1, 2)), thunk()[1:2])


def test_a_broken_promise_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShapeError):
        computed("F32", (3,), lambda: torch.zeros(4)).read()
    with pytest.raises(ShapeError):
        to_torch(Tensor("F32", (3,), (Literal(bytes(8)),)))
    with pytest.raises(ShapeError):
        write_safetensors(tmp_path / "a", {"t": Tensor("F32", (3,), (Literal(bytes(8)),))})


def test_what_has_no_bytes_is_refused() -> None:
    for t in (torch.eye(3).to_sparse(), torch.empty(3, device="meta")):
        with pytest.raises(ValueRefused):
            from_torch(t)
    with pytest.raises(ValueRefused):
        torch_dtype("F13")


@pytest.mark.parametrize("name", ["safetensors", "writer", "finite", "atomic", "base", "hub", "bridge", "pickles"])  # fmt: skip
def test_nothing_heavy_is_imported(name: str) -> None:
    heavy = "{'torch', 'numpy', 'huggingface_hub', 'safetensors', 'requests', 'httpx'}"
    code = f"import sys, adaptsurgery.checkpoint.{name}; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# -- Pickles -----------------------------------------------------------------------------------


def test_a_state_dict(tmp_path: Path) -> None:
    w = torch.randn(4, 6)
    state = {
        "w": w,
        "tied": w,
        "t": w.T,
        "s": w[1:3, ::2],
        "h": w.half(),
        "p": torch.nn.Parameter(w),
    }
    for name, options in [
        ("new.bin", {}),
        ("old.pt", {"_use_new_zipfile_serialization": False}),
    ]:
        torch.save(state, tmp_path / name, **options)
        got = read_pickle(tmp_path / name)
        assert list(got) == list(state)
        assert all(torch.equal(to_torch(got[k]), state[k]) for k in state)
        write_safetensors(tmp_path / f"{name}.out", got)
        saved = load_file(tmp_path / f"{name}.out")
        assert all(torch.equal(saved[k], state[k]) for k in state)


def test_a_lightning_checkpoint_is_unwrapped(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "a.ckpt")
    assert list(read_pickle(tmp_path / "a.ckpt")) == ["w"]


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, new: bool) -> None:
    state = {"w": torch.ones(1), "x": Evil(tmp_path / "pwned")}
    torch.save(state, tmp_path / "a.bin", _use_new_zipfile_serialization=new)
    with pytest.raises(FileError) as e:
        read_pickle(tmp_path / "a.bin")
    assert e.value.code == "unsafe-pickle" and "mkdir" in e.value.seen
    assert not (tmp_path / "pwned").exists()


def test_a_bare_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(pickle.dumps(Evil(tmp_path / "pwned")))
    with pytest.raises(FileError) as e:
        read_pickle(tmp_path / "a.bin")
    assert e.value.code in ("unsafe-pickle", "bad-file")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "content", [[torch.ones(1)], {}, {"a": 1}, {"a": {"b": torch.ones(1)}}, {1: torch.ones(1)}]
)
def test_other_things_than_tensors_are_listed(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(FileError) as e:
        read_pickle(tmp_path / "a.bin")
    assert e.value.code == "bad-file"


def test_sparse_tensors_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"emb": torch.eye(3).to_sparse()}, tmp_path / "a.bin")
    with pytest.raises(FileError) as e:
        read_pickle(tmp_path / "a.bin")
    assert "emb" in e.value.what


@pytest.mark.parametrize("keep", [0, 1, 10, 300, 1000, -1])
def test_a_damaged_pickle(tmp_path: Path, keep: int) -> None:
    torch.save({"w": torch.ones(500)}, tmp_path / "a.bin")
    (tmp_path / "b.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:keep])
    with pytest.raises(FileError) as e:
        read_pickle(tmp_path / "b.bin")
    assert e.value.code == "bad-file"


def test_no_pickle(tmp_path: Path) -> None:
    with pytest.raises(FileError) as e:
        read_pickle(tmp_path / "a.bin")
    assert e.value.code == "no-such-file"
    with pytest.raises(FileError) as e:
        read_pickle(tmp_path)
    assert isinstance(e.value, FileError)
