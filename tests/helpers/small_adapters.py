"""Adapters of a module or two: tensors by key, a PEFT folder, a module's state and its ΔW."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from adaptsurgery.adapters.updates import update_of
from adaptsurgery.checkpoint.bridge import from_torch
from adaptsurgery_formats import ModuleState
from adaptsurgery_formats.state import ALPHA_OVER_R

Tensors = dict[str, torch.Tensor]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return made.to(dtype)


def write(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path)
    return path


def peft(folder: Path, tensors: Tensors, **config: object) -> Path:
    folder.mkdir()
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    named = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    write(folder / "adapter_model.safetensors", named)
    return folder


def lora(path: str, *, out: int = 6, into: int = 5, seed: int = 0) -> Tensors:
    return {
        f"{path}.lora_A.weight": rand(2, into, seed=seed),
        f"{path}.lora_B.weight": rand(out, 2, seed=seed),
    }


def module(algorithm: str, tensors: Tensors, *, path: str = "q", scale: float = 1.0) -> ModuleState:
    held = {slot: from_torch(t) for slot, t in tensors.items()}
    return ModuleState(path, algorithm, held, alpha=2 * scale, rule=ALPHA_OVER_R, rank=2)


def delta(one: ModuleState) -> torch.Tensor:
    update = update_of(one, None)
    return update.scale * update.dense(torch.float64)  # type: ignore[attr-defined]
