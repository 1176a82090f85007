"""--as lora: what a file keeps beside its ΔW, and what is told of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_adapters import lora, module, peft, rand, write

import adaptsurgery
from adaptsurgery.adapters.comparing import VerificationError
from adaptsurgery.adapters.lowrank import plain_lora
from adaptsurgery.checkpoint.bridge import to_torch


def test_as_lora_keeps_the_prefix_that_a_file_was_read_under(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"blocks.0.fc.weight": torch.zeros(6, 4)})
    name = "lora_te_blocks_0_fc"
    factors = {f"{name}.lokr_w1": rand(2, 2), f"{name}.lokr_w2": rand(3, 2)}
    source = write(tmp_path / "a.safetensors", {**factors, f"{name}.alpha": torch.tensor(1.0)})
    out = tmp_path / "b.safetensors"
    adaptsurgery.convert(source, out, "kohya", base=base, algorithm="lora")
    assert {key.partition(".")[0] for key in load_file(out)} == {name}


def test_as_lora_says_what_is_stored_wider(tmp_path: Path) -> None:
    name = "lycoris_blocks_0_fc"
    slots = {"w1_a": (6, 2), "w1_b": (2, 4), "w2_a": (6, 2), "w2_b": (2, 4)}
    half = {
        f"{name}.hada_{s}": rand(*shape, seed=n, dtype=torch.bfloat16)
        for n, (s, shape) in enumerate(slots.items())
    }
    source = write(tmp_path / "a.safetensors", {**half, f"{name}.alpha": torch.tensor(1.0)})
    base = write(tmp_path / "base.safetensors", {"blocks.0.fc.weight": torch.zeros(6, 4)})
    out = tmp_path / "b.safetensors"
    report = adaptsurgery.convert(source, out, "lycoris", base=base, algorithm="lora")
    (note,) = [n for n in report.notes if n.code == "dtype"]
    assert note.text.startswith("1 modules are stored in F32: BF16")
    assert load_file(out)[f"{name}.lora_up.weight"].dtype == torch.float32


def test_the_bias_of_a_dora_keeps_its_scale(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"blocks.0.q.weight": rand(6, 5, seed=9)})
    tensors = lora("blocks.0.q") | {
        "blocks.0.q.lora_B.bias": rand(6),
        "blocks.0.q.lora_magnitude_vector": rand(6, seed=3).abs(),
    }
    said = {"lora_alpha": 8, "use_dora": True, "lora_bias": True}
    source, out = peft(tmp_path / "dora", tensors, **said), tmp_path / "lora"
    report = adaptsurgery.convert(
        source, out, "peft", base=base, algorithm="lora", rank=5, allow_lossy=True
    )
    assert report.max_error < 1e-6
    config = json.loads((out / "adapter_config.json").read_text())
    bias = load_file(out / "adapter_model.safetensors")["base_model.model.blocks.0.q.lora_B.bias"]
    assert torch.allclose(config["lora_alpha"] / config["r"] * bias, 4 * rand(6))
    without = {key: t for key, t in tensors.items() if not key.endswith("bias")}
    other = peft(tmp_path / "other", without, **{**said, "lora_bias": False})
    with pytest.raises(VerificationError):  # the bias of a DoRA is looked at
        adaptsurgery.verify(source, other, base=base)


def test_a_plain_lora_keeps_its_bias_at_scale_1() -> None:
    tensors = {"up": rand(6, 2), "down": rand(2, 5), "up_bias": rand(6)}
    plain = plain_lora(module("lora", tensors, scale=3.0), None, "f")
    assert plain.scale == 1
    assert torch.allclose(to_torch(plain.tensors["up_bias"]), 3 * rand(6))
