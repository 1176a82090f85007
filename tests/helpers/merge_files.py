"""A base's folder, an adapter's folder, and the code that work is refused by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adaptsurgery_formats.errors import SurgeryError


def peft_file(folder: Path, kind: str, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    named = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    marks = ("lora_", "hra_", "hada_", "lokr_")
    paths = {k.partition(f".{m}")[0] for k in tensors for m in marks if f".{m}" in k}
    held = {"peft_type": kind, "target_modules": sorted(paths), **config}
    (folder / "adapter_config.json").write_text(json.dumps(held))
    return folder


def base_file(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refused(code: str, work: Callable[[], object]) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        work()
    assert caught.value.code == code
    return caught.value
