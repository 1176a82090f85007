"""The scan for NaN and infinity against numpy's and torch's isfinite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from adaptsurgery.checkpoint.bridge import computed, from_torch
from adaptsurgery.checkpoint.finite import (
    BLOCK,
    count_nonfinite,
    find_nonfinite,
    first_nonfinite,
)
from adaptsurgery.checkpoint.safetensors import read_safetensors
from adaptsurgery.checkpoint.writer import write_safetensors
from adaptsurgery_formats.errors import ValueRefused
from adaptsurgery_formats.tensors import Literal, Tensor

WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


def first_by_torch(dtype: str, data: bytes) -> int | None:
    bad = ~torch.isfinite(torch.frombuffer(bytearray(data), dtype=TORCH[dtype]))
    return int(bad.nonzero()[0]) if bad.any() else None


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_all_sixteen_bit_patterns(dtype: str) -> None:
    patterns = np.arange(1 << 16, dtype="<u2").tobytes()
    bad = ~torch.isfinite(torch.frombuffer(bytearray(patterns), dtype=TORCH[dtype]))
    for i in range(1 << 16):
        found = first_nonfinite(dtype, patterns[2 * i : 2 * i + 2]) >= 0
        assert found == bool(bad[i])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(WIDTH)), st.data())
def test_any_bytes_as_numpy_sees_them(dtype: str, data: st.DataObject) -> None:
    width = WIDTH[dtype]
    # 0x7f and friends are drawn often, so that near misses (huge but finite) are common
    byte = st.sampled_from([0x00, 0x7B, 0x7C, 0x7E, 0x7F, 0x80, 0xEF, 0xF0, 0xFC, 0xFF])
    raw = bytes(data.draw(st.lists(byte, min_size=width, max_size=12 * width)))
    raw = raw[: len(raw) // width * width]
    tensor = Tensor(dtype, (len(raw) // width,), (Literal(raw),))
    assert find_nonfinite(tensor) == first_by_torch(dtype, raw)


@pytest.mark.parametrize("dtype", sorted(WIDTH))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_planted_at_the_borders_of_blocks(tmp_path: Path, dtype: str, bad: float) -> None:
    per_block = BLOCK // WIDTH[dtype]
    count = 2 * per_block + 7
    clean = torch.randn(count, generator=torch.manual_seed(1)).to(TORCH[dtype])
    top = torch.finfo(TORCH[dtype]).max
    clean[3], clean[-2] = top, -top  # suspects in the first and the last block, all finite
    assert find_nonfinite(from_torch(clean)) is None
    for number, at in enumerate((0, per_block - 1, per_block, 2 * per_block, count - 1)):
        t = clean.clone()
        t[at] = bad
        assert find_nonfinite(from_torch(t)) == at
        save_file({"a": clean[:5].clone(), "t": t}, tmp_path / f"{number}")
        file = read_safetensors(tmp_path / f"{number}")
        assert find_nonfinite(file.tensors["t"]) == at
        with pytest.raises(ValueRefused) as e:
            write_safetensors(tmp_path / f"{number}.out", file.tensors)
        assert f"[{at}]" in e.value.seen and "`t`" in e.value.what


def test_a_tensor_of_only_suspects_is_settled_fast() -> None:
    t = torch.full((1 << 20,), torch.finfo(torch.float32).max)
    assert find_nonfinite(from_torch(t)) is None
    t[-1] = float("nan")
    assert find_nonfinite(from_torch(t)) == (1 << 20) - 1


def test_complex_numbers_by_both_halves() -> None:
    t = torch.zeros(10, dtype=torch.complex64)
    assert find_nonfinite(from_torch(t)) is None
    t[7] = complex(0, float("inf"))
    assert find_nonfinite(from_torch(t)) == 7


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integers_are_not_scanned(tmp_path: Path, dtype: torch.dtype) -> None:
    ones = torch.full((64,), 0xFF, dtype=torch.uint8).view(dtype)
    assert find_nonfinite(from_torch(ones)) is None
    write_safetensors(tmp_path / "a", {"a": from_torch(ones)})


@pytest.mark.parametrize("dtype", [d for n, d in vars(torch).items() if n.startswith("float8_")])
def test_every_byte_of_fp8_as_torch_reads_it(dtype: torch.dtype) -> None:
    held = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    bad = ~held.double().isfinite()
    tensor = from_torch(held)
    assert find_nonfinite(tensor) == (int(bad.nonzero()[0]) if bad.any() else None)
    assert count_nonfinite(tensor) == int(bad.sum())


@given(st.data(), st.sampled_from([*TORCH, "C64"]))
def test_counts_are_those_of_numpy(data: st.DataObject, dtype: str) -> None:
    kinds = {"C64": torch.complex64, **TORCH}
    size = data.draw(st.integers(1, 300))
    held = torch.randn(size).to(kinds[dtype])
    for at in data.draw(st.lists(st.integers(0, size - 1), max_size=9)):
        held[at] = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    assert count_nonfinite(from_torch(held)) == int((~held.isfinite()).sum())


def test_empty_and_unaligned() -> None:
    assert find_nonfinite(Tensor("F32", (0, 3), (Literal(b""),))) is None
    assert find_nonfinite(Tensor("F32", (0,), ())) is None
    inf = np.float32("inf").tobytes()
    split = Tensor("F32", (2,), (Literal(bytes(4) + inf[:3]), Literal(inf[3:])))
    assert find_nonfinite(split) == 1


def test_what_is_computed_is_computed_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def thunk() -> torch.Tensor:
        calls.append(1)
        return torch.ones(BLOCK)

    t = computed("F32", (BLOCK,), thunk)
    write_safetensors(tmp_path / "a", {"a": t})
    assert calls == [1]
    assert find_nonfinite(t) is None
    assert calls == [1, 1]
