"""Where a merge computes, and what it says of rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from merge_files import base_file, peft_file, refused
from safetensors.torch import load_file

from adaptsurgery.jobs.merging.merge import merge, unmerge

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


UNIT = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}


def plain(tmp_path: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    torch.manual_seed(1)
    base = base_file(tmp_path / "base", {"fc.weight": torch.randn(40, 30).to(dtype)})
    slots = {"fc.lora_A.weight": torch.randn(3, 30), "fc.lora_B.weight": torch.randn(40, 3)}
    return base, peft_file(tmp_path / "lora", "LORA", slots, r=3, lora_alpha=5)


def test_a_named_device_gives_the_same_bytes(tmp_path: Path) -> None:
    base, adapter = plain(tmp_path)
    merge(base, adapter, tmp_path / "a")
    merge(base, adapter, tmp_path / "b", device="cpu:0")
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in "ab")
    assert first == second


def test_a_device_that_is_none(tmp_path: Path) -> None:
    base, adapter = plain(tmp_path)
    refused("no-such-option", lambda: merge(base, adapter, tmp_path / "a", device="gpu"))
    if not torch.cuda.is_available():
        error = refused(
            "no-such-device", lambda: merge(base, adapter, tmp_path / "a", device="cuda")
        )
        assert "--device cpu" in error.next
    assert not (tmp_path / "a").exists() and not list(tmp_path.glob(".adapt*"))


@pytest.mark.parametrize("kind", ["lora", "hra"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_unmerge_says_of_rounding_holds(kind: str, dtype: str, tmp_path: Path) -> None:
    """|W − W₀| ≤ u·|W'| (under a rotation u·‖row of W'‖) + u·|W|, computed in float64."""
    base, adapter = plain(tmp_path, DTYPES[dtype])
    if kind == "hra":
        slots = {"fc.hra_u": torch.randn(30, 4)}
        adapter = peft_file(tmp_path / "hra", "HRA", slots, r=4)
    merge(base, adapter, tmp_path / "merged", compute="fp64")
    report = unmerge(tmp_path / "merged", adapter, tmp_path / "again", compute="fp64")
    told = report.facts["rounding"]
    assert told == {"merged": UNIT[dtype], "now": UNIT[dtype], "of": "row" if kind == "hra" else "element"}  # fmt: skip
    first, merged, again = (
        load_file(tmp_path / n / "model.safetensors")["fc.weight"].double()
        for n in ("base", "merged", "again")
    )
    size = merged.norm(dim=1, keepdim=True) if kind == "hra" else merged.abs()
    bound = told["merged"] * size + told["now"] * again.abs()
    assert ((again - first).abs() <= bound * (1 + 2**-7) + 1e-12).all()
    if kind == "hra" and dtype != "fp32":  # not so by the element's own size
        assert ((again - first).abs() > 2 * told["now"] * again.abs()).any()
