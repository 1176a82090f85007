"""transformers' Conv1D stores its weight (in, out); GPT-2's c_proj is square, so shapes say nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import adaptsurgery


@pytest.mark.slow
def test_dora_on_conv1d_as_lora(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"n_embd": 24, "n_head": 2, "n_layer": 2, "vocab_size": 50, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        target_modules=["c_proj", "c_attn"], r=3, lora_alpha=5, use_dora=True, fan_in_fan_out=True
    )
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
        elif "lora_" in name:
            parameter.data = torch.randn_like(parameter) / 10
    adapted.save_pretrained(tmp_path / "dora")
    tokens = torch.arange(8)[None]
    wanted, plain = adapted(tokens).logits, model(tokens).logits
    adaptsurgery.convert(
        tmp_path / "dora",
        tmp_path / "lora",
        "peft",
        base=tmp_path / "base",
        algorithm="lora",
        rank=24,
        allow_lossy=True,
    )
    found = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "lora").eval()(tokens).logits
    assert (wanted - plain).norm() > 0.05 * plain.norm()
    assert (found - wanted).norm() < 1e-5 * (wanted - plain).norm() + 1e-5
