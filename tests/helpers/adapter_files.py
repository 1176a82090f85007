"""Adapter files for tests, written from shapes alone: their data are zeros that take no room."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

GOLDEN = Path(__file__).parents[2] / "formats" / "golden"
_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1}
Shapes = Mapping[str, Sequence[int]]


def write_zeros(
    path: Path,
    shapes: Shapes,
    *,
    dtype: str = "F16",
    metadata: Mapping[str, str] | None = None,
    values: Mapping[str, float] | None = None,
) -> Path:
    """A safetensors file of zeros; ``values`` gives the one number in some F16 scalars."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at, places = 0, {}
    for key, shape in shapes.items():
        end = at + _SIZES[dtype] * _count(shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        places[key], at = at, end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + at)
        for key, value in (values or {}).items():
            file.seek(start + places[key])
            file.write(struct.pack("<e", value))
    return path


def _count(shape: Sequence[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def write_golden(path: Path, name: str) -> Path:
    """A real file's keys and shapes, with zeros."""
    return write_zeros(path, json.loads((GOLDEN / f"{name}.json").read_text())["tensors"])


def lora_shapes(names: Sequence[str], r: int = 4, o: int = 8, i: int = 6) -> dict[str, list[int]]:
    """lora_down (r, i), lora_up (o, r) and alpha () for each name."""
    shapes: dict[str, list[int]] = {}
    for name in names:
        shapes[f"{name}.lora_down.weight"] = [r, i]
        shapes[f"{name}.lora_up.weight"] = [o, r]
        shapes[f"{name}.alpha"] = []
    return shapes


def write_kohya(
    path: Path, *, alpha: float = 2.0, metadata: Mapping[str, str] | None = None
) -> Path:
    """A small kohya file on SD1.5's UNet and text encoder: three modules of rank 4."""
    names = [
        f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_{n}" for n in "qk"
    ]
    shapes = lora_shapes(names, o=320, i=320)
    shapes |= lora_shapes(["lora_te_text_model_encoder_layers_0_mlp_fc1"], o=3072, i=768)
    values = {key: alpha for key in shapes if key.endswith("alpha")}
    return write_zeros(path, shapes, values=values, metadata=metadata)


def write_peft(folder: Path, *, r: int = 4, names: Sequence[str] = ("q_proj", "v_proj")) -> Path:
    """A small PEFT folder: two layers of a language model, alpha = 2r."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, list[int]] = {}
    for layer in range(2):
        for name in names:
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            shapes[f"{module}.lora_A.weight"] = [r, 6]
            shapes[f"{module}.lora_B.weight"] = [8, r]
    write_zeros(folder / "adapter_model.safetensors", shapes, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": list(names)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
