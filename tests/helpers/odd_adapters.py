"""Adapters with odd names, shapes or configs, and the code that a conversion is refused by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import adaptsurgery
from adaptsurgery_formats.errors import SurgeryError

Tensors = Mapping[str, torch.Tensor]


def lora(name: str, out: int, into: int, *kernel: int, rank: int = 2) -> dict[str, torch.Tensor]:
    ones = (1,) * len(kernel)
    return {
        f"{name}.lora_up.weight": torch.randn(out, rank, *ones),
        f"{name}.lora_down.weight": torch.randn(rank, into, *kernel),
    }


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file(dict(tensors), path, metadata)
    return path


def peft(
    folder: Path, tensors: Tensors, metadata: dict[str, str] | None = None, **config: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write(
        folder / "adapter_model.safetensors",
        {f"base_model.model.{k}": v for k, v in tensors.items()},
        metadata,
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def plain(path: str, out: int = 6, into: int = 5) -> dict[str, torch.Tensor]:
    return {
        f"{path}.lora_A.weight": torch.randn(2, into),
        f"{path}.lora_B.weight": torch.randn(out, 2),
    }


def config_of(*targets: str, **more: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": list(targets), **more}


def code(source: Any, out: Path, to: str, **options: Any) -> str:
    with pytest.raises(SurgeryError) as error:
        adaptsurgery.convert(source, out, to, **options)
    assert not out.exists()
    return error.value.code
