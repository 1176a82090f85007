"""Bases in fp8 and int8: refused, or dequantised when asked; every way that scales are stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_files import base_file, peft_file, refused
from safetensors.torch import load_file

from adaptsurgery.jobs.merging.check import verify_merge
from adaptsurgery.jobs.merging.merge import merge, plan_merge
from adaptsurgery.jobs.merging.plan import MergePlan
from adaptsurgery.jobs.merging.recipe import MergeRecipe
from adaptsurgery_formats.errors import SurgeryError

Tensors = dict[str, torch.Tensor]
O, I = 150, 130  # not whole blocks of 128  # noqa: E741
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def by_tensor(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().max() / 448
    q = (weight / scale).to(E4M3)
    return {
        "fc.weight": q,
        "fc.weight_scale": scale,
        "fc.input_scale": scale * 2,
    }, q.double() * scale


def by_row(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    q = (weight / scale).to(E4M3)
    return {"fc.weight": q, "fc.weight_scale": scale.bfloat16()}, q.double() * scale.bfloat16()


def by_block(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = torch.rand(2, 2) + 0.5
    whole = torch.empty(O, I)
    for row in range(O):
        for column in range(I):
            whole[row, column] = scale[row // 128, column // 128]
    q = (weight / whole).to(E4M3)
    return {"fc.weight": q, "fc.weight_scale_inv": scale}, q.double() * whole


def comfy(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = torch.tensor([0.25])
    q = (weight / scale).to(E5M2)
    marker = torch.empty(0).to(E5M2)
    return {"fc.weight": q, "fc.scale_weight": scale, "scaled_fp8": marker}, q.double() * scale


def cast(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    q = weight.to(E4M3)
    return {"fc.weight": q}, q.double()


def bitsandbytes(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scb = weight.abs().amax(1)
    q = (weight * 127 / scb[:, None]).round().to(torch.int8)
    extra = {"fc.SCB": scb, "fc.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return {"fc.weight": q, **extra}, q.double() * scb[:, None].double() / 127


def int8_rows(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    q = (weight / scale).round().to(torch.int8)
    return {"fc.weight": q, "fc.weight_scale": scale}, q.double() * scale


WAYS: dict[str, Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]] = {
    "tensor": by_tensor, "row": by_row, "block": by_block, "comfy": comfy, "cast": cast,
    "bitsandbytes": bitsandbytes, "int8": int8_rows,
}  # fmt: skip


def given(way: str, folder: Path) -> tuple[Path, Path, torch.Tensor, torch.Tensor]:
    """A base with one weight adapted and one not, a LoRA, and W and Δ in float64."""
    held, plain = WAYS[way](numbers(O, I))
    other = {k.replace("fc.", "other."): v.clone() for k, v in held.items()}
    config = {"quantization_config": {"quant_method": "fp8"}, "model_type": "x"}
    norm = {"norm.weight": torch.ones(5)}
    base = base_file(folder / "base", {**other, **held, **norm}, **config)
    up, down = numbers(O, 3), numbers(3, I) * 0.1
    slots = {"fc.lora_A.weight": down, "fc.lora_B.weight": up}
    adapter = peft_file(folder / "lora", "LORA", slots, r=3, lora_alpha=5)
    return base, adapter, plain, 5 / 3 * (up.double() @ down.double())


@pytest.mark.parametrize("way", WAYS)
def test_dequantised_when_asked_and_refused_when_not(way: str, tmp_path: Path) -> None:
    base, adapter, plain, delta = given(way, tmp_path)
    error = refused("quantised-weight", lambda: merge(base, adapter, tmp_path / "never"))
    assert "--dequantize" in error.next
    report = merge(base, adapter, tmp_path / "out", dequantize=True, dtype="fp32", compute="fp64")
    assert "dequantised" in [n.code for n in report.notes]
    found = load_file(tmp_path / "out/model.safetensors")
    assert set(found) == {"fc.weight", "other.weight", "norm.weight"}
    assert torch.equal(found["other.weight"], plain.float())
    assert torch.allclose(found["fc.weight"].double(), plain + delta, rtol=2**-23, atol=1e-12)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"model_type": "x"}


@pytest.mark.parametrize("way", WAYS)
def test_bf16_by_default_and_verified(way: str, tmp_path: Path) -> None:
    base, adapter, plain, delta = given(way, tmp_path)
    merge(base, adapter, tmp_path / "out", dequantize=True)
    found = load_file(tmp_path / "out/model.safetensors")
    assert found["fc.weight"].dtype == found["other.weight"].dtype == torch.bfloat16
    assert found["norm.weight"].dtype == torch.float32
    near = (plain + delta).abs() * 2**-8 + 1e-6
    assert ((found["fc.weight"].double() - plain - delta).abs() <= near).all()
    verify_merge(tmp_path / "out", base, adapter, dequantize=True)
    broken = {**found, "other.weight": found["other.weight"] * 1.5}
    other = base_file(tmp_path / "broken", broken)
    with pytest.raises(SurgeryError) as caught:
        verify_merge(other, base, adapter, dequantize=True)
    assert "other.weight" in str(caught.value)


def test_a_plan_with_scales_goes_through_json(tmp_path: Path) -> None:
    base, adapter, *_ = given("block", tmp_path)
    plan = plan_merge(base, adapter, MergeRecipe(dequantize=True))
    assert MergePlan.from_json(plan.to_json()) == plan


def code(tmp_path: Path, tensors: Tensors, **config: Any) -> str:
    base = base_file(
        tmp_path / "base", {"fc.weight": torch.ones(4, 6).to(E4M3), **tensors}, **config
    )
    slots = {"fc.lora_A.weight": numbers(2, 6), "fc.lora_B.weight": numbers(4, 2)}
    adapter = peft_file(tmp_path / "lora", "LORA", slots, r=2, lora_alpha=2)
    with pytest.raises(SurgeryError) as caught:
        merge(base, adapter, tmp_path / "out", dequantize=True)
    assert not (tmp_path / "out").exists()
    return caught.value.code


@pytest.mark.parametrize(
    ("tensors", "wanted"),
    [
        ({"fc.weight": torch.ones(4, 6, dtype=torch.int8)}, "no-scale"),
        ({"fc.weight": torch.ones(4, 6)}, "nothing-quantised"),
        ({"fc.weight_scale_2": torch.ones(1)}, "no-scale"),
        ({"fc.weight_zero_point": torch.ones(1)}, "no-scale"),
        ({"fc.weight_scale": torch.ones(1), "fc.scale_weight": torch.ones(1)}, "no-scale"),
        ({"fc.weight_scale": torch.ones(1, dtype=torch.int8)}, "no-scale"),
        ({"fc.weight_scale": torch.ones(6)}, "bad-shape"),
        ({"fc.weight_scale_inv": torch.ones(3, 3)}, "bad-shape"),
        ({"x.qweight": torch.ones(4, 6, dtype=torch.int32)}, "packed-weight"),
    ],
)
def test_what_cannot_be_dequantised(tensors: Tensors, wanted: str, tmp_path: Path) -> None:
    assert code(tmp_path, tensors) == wanted
