"""How a weight is stored: narrow qkv, a square Conv1D in a composite model, numbers near the edge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adaptsurgery
from adaptsurgery_formats.errors import SurgeryError


def peft(folder: Path, module: str, out: int, into: int, **more: object) -> torch.Tensor:
    """A LoRA's folder; returns its ΔW (alpha = r)."""
    folder.mkdir()
    up, down = torch.randn(out, 2), torch.randn(2, into)
    name = f"base_model.model.{module}"
    save_file(
        {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [module], **more}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return up @ down


def test_qkv_with_fewer_outputs_than_inputs(tmp_path: Path) -> None:
    weight = torch.randn(12, 16)
    save_file({"a.qkv_proj.weight": weight}, tmp_path / "base.safetensors")
    delta = peft(tmp_path / "k", "a.k_proj", 4, 16)
    adaptsurgery.merge(tmp_path / "base.safetensors", [tmp_path / "k"], tmp_path / "o.safetensors")
    change = load_file(tmp_path / "o.safetensors")["a.qkv_proj.weight"] - weight
    torch.testing.assert_close(change[4:8], delta, atol=1e-5, rtol=1e-5)
    assert not change[:4].any() and not change[8:].any()


def test_a_square_conv1d_within_a_composite_model(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    stem = "decoder.transformer.h.0"
    weight = torch.randn(8, 8)
    tensors = {f"{stem}.attn.c_proj.weight": weight, f"{stem}.mlp.c_fc.weight": torch.ones(8, 32)}
    save_file(tensors, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "vision-encoder-decoder"}))
    delta = peft(tmp_path / "a", f"{stem}.attn.c_proj", 8, 8, fan_in_fan_out=True)
    adaptsurgery.merge(base, [tmp_path / "a"], tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")[f"{stem}.attn.c_proj.weight"]
    torch.testing.assert_close(out - weight, delta.T, atol=1e-5, rtol=1e-5)


def test_an_overflow_in_wide_arithmetic_is_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.full((2, 2), 3e38)}, tmp_path / "base.safetensors")
    save_file({"lycoris_a.diff": torch.full((2, 2), 2e38)}, tmp_path / "a.safetensors")
    with pytest.raises(SurgeryError) as error:
        adaptsurgery.merge(
            tmp_path / "base.safetensors",
            [tmp_path / "a.safetensors"],
            tmp_path / "out.safetensors",
            compute="fp64",
        )
    assert error.value.code == "non-finite"
    assert not (tmp_path / "out.safetensors").exists()


def test_a_live_model_takes_saved_weights_before_differences(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False))
    delta = peft(tmp_path / "b", "0", 3, 4)
    saved = torch.randn(3, 4)
    other = peft(tmp_path / "a", "1", 3, 4, modules_to_save=["0"])
    assert other.shape == (3, 4)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    save_file(
        {**tensors, "base_model.model.0.weight": saved},
        tmp_path / "a" / "adapter_model.safetensors",
    )
    model.append(torch.nn.Linear(4, 3, bias=False))
    adaptsurgery.fold(model, [tmp_path / "a", tmp_path / "b"])
    torch.testing.assert_close(model[0].weight.data, saved + delta)
