"""Adapter files for the arithmetic of whole adapters, and the sums that they must make.

Written and summed by plain numpy in float64, from the definitions; nothing of the package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from corpus import CONFIG, SHAPES, Raw, bfloat16, loha_core, lokr, lora, pack, tucker, unpack, write
from corpus import loha as loha_slots
from plain_delta import changes

Array = np.ndarray[Any, Any]
PATHS = ("blk_0.fc_a", "blk_0.fc_b", "blk_0.conv_in", "blk_0.pw")
KINDS = ("lora", "tucker", "loha", "loha-core", "lokr-full", "lokr-low", "lokr-both", "full")
FAMILIES = {"peft": "peft", "lycoris": "kohya", "kohya": "kohya", "comfyui": "kohya"}
PREFIX = {"lycoris": "lycoris_", "kohya": "lora_unet_", "comfyui": "diffusion_model."}


class Numbers:
    """Normal numbers of one seed, in the dtype that a file stores."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> Array:
        return (self.random.standard_normal(shape) * 0.5).astype("float32")


@dataclass(frozen=True)
class ByHand:
    """An adapter to be written: one kind of module on some layers."""

    kind: str
    layout: str
    seed: int
    rank: int = 2
    alpha: float = 1.5
    dtype: str = "float32"
    paths: tuple[str, ...] = PATHS[:2]
    bias: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def slots(self, path: str) -> dict[str, Array]:
        n, shape = Numbers(self.seed * 101 + PATHS.index(path)), SHAPES[path]
        kernel = len(shape) > 2
        if self.kind == "lora" or (self.kind == "tucker" and not kernel):
            return lora(n, shape, self.rank)  # type: ignore[arg-type]
        if self.kind == "tucker":
            return tucker(n, shape, self.rank)  # type: ignore[arg-type]
        if self.kind == "loha-core" and kernel:
            return loha_core(n, shape, self.rank)  # type: ignore[arg-type]
        if self.kind.startswith("loha"):
            return loha_slots(n, shape, self.rank)  # type: ignore[arg-type]
        if self.kind == "full":
            return {"diff": n(*shape)}
        return lokr(n, shape, self.kind.partition("-")[2])  # type: ignore[arg-type]

    @property
    def algorithm(self) -> str:
        return {"tucker": "lora", "loha-core": "loha"}.get(self.kind, self.kind.split("-")[0])

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Any] = {}
        for path in self.paths:
            tensors |= self._module(path)
        if self.layout == "peft":
            config = {
                "peft_type": self.algorithm.upper(), "r": self.rank, "task_type": None,
                "target_modules": sorted(self.paths), "decompose_factor": 2,
                "lora_alpha" if self.algorithm == "lora" else "alpha": self.alpha, **self.extra,
            }  # fmt: skip
            files = {
                CONFIG: json.dumps(config).encode(),
                "adapter_model.safetensors": pack(tensors),
            }
            return write(files, folder)
        path = folder / "adapter.safetensors"
        path.write_bytes(pack(tensors))
        return path

    def _module(self, path: str) -> dict[str, Any]:
        from corpus import PREFIX as PEFT_PREFIX
        from corpus import spelled

        family = FAMILIES[self.layout]
        dotted = self.layout in ("peft", "comfyui")
        name = PREFIX.get(self.layout, PEFT_PREFIX) + (path if dotted else path.replace(".", "_"))
        slots = self.slots(path)
        tensors = {
            f"{name}.{spelled(s, self.algorithm, family)}": self._stored(t)
            for s, t in slots.items()
        }
        if self.layout != "peft" and self.algorithm != "full":
            tensors[f"{name}.alpha"] = np.float32(self.alpha)
        if self.bias and self.layout != "peft":
            tensors[f"{name}.diff_b"] = self._stored(Numbers(self.seed + 7)(SHAPES[path][0]))
        return tensors

    def _stored(self, array: Array) -> Raw | Array:
        return bfloat16(array) if self.dtype == "bfloat16" else array.astype(self.dtype)


def weighted_sum(parts: list[tuple[Path, float]]) -> dict[str, Array]:
    """Σ w·ΔW by flat module name, a bias's change after its weight's."""
    total: dict[str, Array] = {}
    for path, weight in parts:
        for name, change in changes(path).items():
            before = total.get(name, np.zeros((0, 1)))
            size = max(len(before), len(change))
            total[name] = padded(before, size) + weight * padded(change, size)
    return total


def padded(a: Array, size: int) -> Array:
    """Zeros where one adapter has a bias's change and another has none."""
    return np.concatenate([a, np.zeros((size - len(a), 1))])


def gap(wanted: Mapping[str, Array], found: Mapping[str, Array], scale: float = 0.0) -> float:
    """The largest ‖a − b‖/‖a‖ of all modules; infinity where one has a module more."""
    if wanted.keys() != found.keys():
        return float("inf")
    worst = 0.0
    for name, a in wanted.items():
        size = max(len(a), len(found[name]))
        apart = np.linalg.norm(padded(a, size) - padded(found[name], size))
        worst = max(worst, float(apart / max(float(np.linalg.norm(a)), scale, 1e-30)))
    return worst


def dtypes(path: Path) -> set[str]:
    tensors, _ = unpack(path.read_bytes())
    return {t.dtype for key, t in tensors.items() if not key.endswith(".alpha")}
