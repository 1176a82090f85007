"""Dump what the real peers write, as key → shape tables: formats/golden/matrix-*.json.

    python tools/goldens.py

One file per format, one cell per algorithm and variant, each with its source. Needs the [test]
extra. tests/formats/test_matrix.py reads them.
"""

from __future__ import annotations

import json
import logging
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from lycoris import LycorisNetwork, create_lycoris
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import nn

GOLDEN = Path(__file__).parents[1] / "formats" / "golden"
Cells = dict[str, dict[str, Any]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.fc = nn.Linear(16, 32)
        self.conv_in = nn.Conv2d(16, 32, 3)
        self.point = nn.Conv2d(32, 16, 1)
        self.norm = nn.LayerNorm(16)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blk_0 = Block()


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {k: list(t.shape) for k, t in sorted(tensors.items())}


def peft_cells() -> Cells:
    layers = ["fc", "conv_in", "point"]
    lora, other = {"r": 2, "lora_alpha": 3}, {"r": 2, "alpha": 3}
    configs = {
        "lora": peft.LoraConfig(**lora, target_modules=layers),
        "lora-rslora": peft.LoraConfig(**lora, target_modules=layers, use_rslora=True),
        "lora-dora": peft.LoraConfig(**lora, target_modules=layers, use_dora=True),
        "lora-embedding": peft.LoraConfig(**lora, target_modules=["embed", "fc"]),
        "lora-bias": peft.LoraConfig(**lora, target_modules=layers, lora_bias=True),
        "loha": peft.LoHaConfig(**other, target_modules=layers),
        "loha-tucker": peft.LoHaConfig(**other, target_modules=layers, use_effective_conv2d=True),
        "lokr": peft.LoKrConfig(**other, target_modules=layers),
        "lokr-tucker": peft.LoKrConfig(**{**other, "r": 1}, target_modules=layers, use_effective_conv2d=True),
        "lokr-both": peft.LoKrConfig(**{**other, "r": 1}, target_modules=layers, decompose_both=True),
        "lokr-full": peft.LoKrConfig(r=64, alpha=64, target_modules=layers),
        "hra": peft.HRAConfig(r=2, target_modules=layers),
        "hra-gs": peft.HRAConfig(r=2, target_modules=layers, apply_GS=True, init_weights=False),
        "ia3": peft.IA3Config(target_modules=layers, feedforward_modules=[]),
        "ia3-input": peft.IA3Config(target_modules=layers, feedforward_modules=["fc", "conv_in"]),
    }  # fmt: skip
    cells: Cells = {}
    for cell, config in configs.items():
        with tempfile.TemporaryDirectory() as folder:
            model = peft.get_peft_model(Model(), config)
            model.save_pretrained(folder)
            said = json.loads((Path(folder) / "adapter_config.json").read_text("utf-8"))
            for name in ("target_modules", "feedforward_modules"):
                if name in said:
                    said[name] = sorted(said[name])
            tensors = shapes(get_peft_model_state_dict(model))
        cells[cell] = {"config": said, "tensors": tensors}
    return cells


LYCORIS: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora"},
    "lora-tucker": {"algo": "lora", "use_tucker": True},
    "lora-dora": {"algo": "lora", "dora_wd": True},
    "loha": {"algo": "loha"},
    "loha-tucker": {"algo": "loha", "use_tucker": True},
    "loha-dora": {"algo": "loha", "dora_wd": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr-tucker": {"algo": "lokr", "factor": 4, "use_tucker": True},
    "lokr-both": {"algo": "lokr", "factor": 4, "decompose_both": True, "linear_dim": 1, "conv_dim": 1},
    "lokr-full": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "lokr-dora": {"algo": "lokr", "factor": 4, "dora_wd": True},
    "ia3": {"algo": "ia3"},
    "ia3-input": {"algo": "ia3"},  # by a preset's module_algo_map
    "full": {"algo": "full"},
    "norm": {"algo": "lora", "train_norm": True},
}  # fmt: skip


def lycoris_cells(prefix: str) -> Cells:
    """LyCORIS's own wrapper; with kohya's prefix its keys are those of its kohya class."""
    cells: Cells = {}
    with tempfile.TemporaryDirectory() as folder:
        preset = Path(folder) / "preset.toml"
        preset.write_text(
            f'enable_conv = true\ntarget_module = ["Block"]\nlora_prefix = "{prefix}"\n'
        )
        for cell, options in LYCORIS.items():
            given = {"linear_dim": 2, "linear_alpha": 3, "conv_dim": 2, "conv_alpha": 3, **options}
            inward = {"Block": {**options, "train_on_input": True}}
            by_kind = inward if cell == "ia3-input" else {}
            LycorisNetwork.apply_preset({"module_algo_map": by_kind})
            network = create_lycoris(Model(), 1.0, preset=str(preset), **given)
            network.apply_to()  # its modules are its own from here on
            tensors = shapes(network.state_dict())
            if cell == "norm":
                tensors = {k: v for k, v in tensors.items() if "norm" in k}
            cells[cell] = {"tensors": tensors}
    LycorisNetwork.apply_preset({"lora_prefix": "lycoris"})
    return cells


def diffusers_cells() -> Cells:
    """A tiny Flux transformer through diffusers' own save_lora_weights."""
    cells: Cells = {}
    for cell, dora in (("lora", False), ("lora-dora", True)):
        model = FluxTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4),
        )  # fmt: skip
        config = peft.LoraConfig(
            r=2, lora_alpha=3, target_modules=["to_q", "proj_mlp"], use_dora=dora
        )
        model.add_adapter(config)
        with tempfile.TemporaryDirectory() as folder:
            FluxLoraLoaderMixin.save_lora_weights(folder, get_peft_model_state_dict(model))
            with safe_open(Path(folder) / "pytorch_lora_weights.safetensors", "pt") as file:
                tensors = {k: file.get_tensor(k) for k in file.keys()}
        cells[cell] = {"tensors": shapes(tensors)}
    return cells


def comfyui_cells() -> Cells:
    """LyCORIS's tensors under dotted names, which ComfyUI reads and ai-toolkit writes."""
    names = {
        "lycoris_blk_0_" + name: f"diffusion_model.blk_0.{name}"
        for name in ("fc", "conv_in", "point", "norm")
    }
    cells: Cells = {}
    for cell, made in lycoris_cells("lycoris").items():
        if cell.startswith("ia3"):
            continue  # ComfyUI has none
        split = {tuple(key.split(".", 1)): shape for key, shape in made["tensors"].items()}
        cells[cell] = {"tensors": {f"{names[name]}.{slot}": s for (name, slot), s in split.items()}}
    return cells


def write(name: str, source: str, cells: Cells) -> None:
    text = json.dumps({"source": source, "cells": cells}, indent=1, sort_keys=True)
    (GOLDEN / f"matrix-{name}.json").write_text(text + "\n", "utf-8")


def main() -> None:
    logging.disable(logging.CRITICAL)
    torch.manual_seed(0)
    lycoris = f"lycoris-lora {version('lycoris-lora')}, create_lycoris"
    write("peft", f"peft {version('peft')}, save_pretrained", peft_cells())
    write("lycoris", lycoris, lycoris_cells("lycoris"))
    write("kohya", f"{lycoris} with kohya's lora_prefix", lycoris_cells("lora_unet"))
    write("diffusers", f"diffusers {version('diffusers')}, save_lora_weights", diffusers_cells())
    write("comfyui", f"{lycoris}, under the dotted names that ComfyUI reads", comfyui_cells())


if __name__ == "__main__":
    main()
