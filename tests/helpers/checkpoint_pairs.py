"""Small checkpoints and fine-tunes of them, as files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def weights(seed: int = 0) -> Tensors:
    """A model of linears, convolutions, norms, biases, an embedding, a head, and a lone parameter."""
    random = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    found = {"model.embed_tokens.weight": some(40, 24)}
    for i in range(2):
        block = f"model.layers.{i}."
        found |= {
            f"{block}q_proj.weight": some(24, 24),
            f"{block}up.weight": some(48, 24),
            f"{block}up.bias": some(48),
            f"{block}down.weight": some(24, 48),
            f"{block}norm.weight": 1 + 0.1 * some(24),
            f"{block}norm.bias": 0.1 * some(24),
        }
    found |= {
        "model.conv.weight": some(16, 12, 3, 3),
        "model.point.weight": some(16, 12, 1, 1),
        "model.cls_token": some(1, 1, 24),
        "lm_head.weight": some(40, 24),
    }
    return found


def moved(base: Mapping[str, Tensor], size: float = 0.05, seed: int = 1) -> Tensors:
    """A fine-tune that changes everything, at full rank."""
    random = torch.Generator().manual_seed(seed)
    return {k: w + size * torch.randn(w.shape, generator=random) for k, w in base.items()}


def write(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, {"format": "pt"})
    return path


def write_shards(folder: Path, tensors: Mapping[str, Tensor], count: int) -> Path:
    """A folder of ``count`` shards, the tensors dealt out one by one."""
    folder.mkdir()
    index: dict[str, str] = {}
    for shard in range(count):
        name = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        held = dict(list(tensors.items())[shard::count])
        write(folder / name, held)
        index |= dict.fromkeys(held, name)
    told = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(told))
    (folder / "config.json").write_text("{}")
    return folder


def apart(
    got: Mapping[str, Tensor], tuned: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> float:
    """‖got − tuned‖/‖tuned − base‖ over all tensors."""
    missing = sum(float((got[k].double() - tuned[k].double()).square().sum()) for k in tuned)
    total = sum(float((tuned[k].double() - base[k].double()).square().sum()) for k in tuned)
    return (missing / total) ** 0.5


def read(path: Path) -> Tensors:
    return load_file(path)


def tree(path: Path) -> dict[str, bytes]:
    """Every file at or below a path, by its name there."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}
