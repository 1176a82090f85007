"""``combine`` and ``resize`` from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from corpus import pack


def lora(path: Path, seed: int) -> Path:
    random = np.random.default_rng(seed)
    tensors = {
        "lora_unet_fc.lora_up.weight": random.standard_normal((8, 3)).astype("f4"),
        "lora_unet_fc.lora_down.weight": random.standard_normal((3, 6)).astype("f4"),
    }
    path.write_bytes(pack(tensors))
    return path


def test_combine(tmp_path: Path, command: Callable[..., Any]) -> None:
    a, b = lora(tmp_path / "a.safetensors", 1), lora(tmp_path / "b.safetensors", 2)
    out = tmp_path / "out.safetensors"
    done = command("combine", f"{a}=0.7", b, "-o", out)
    assert done.code == 0 and "1 modules of 2 adapters: 1 exact" in done.out
    assert "× 0.7" in done.out
    done = command("combine", a, b, "-o", out, "--overwrite", "--rank", 2, "--json")
    assert done.code == 1 and done.json["error"]["code"] == "lossy"
    done = command(
        "combine", a, b, "-o", out, "--overwrite", "--rank", 2, "--allow-lossy", "--json"
    )
    assert done.code == 0 and done.json["job"] == "combine"
    assert done.json["rows"][0]["detail"] == "rank 3 + 3 → 2"


def test_resize(tmp_path: Path, command: Callable[..., Any]) -> None:
    source, out = lora(tmp_path / "a.safetensors", 1), tmp_path / "out.safetensors"
    done = command("resize", source, "-o", out, "--rank", 1)
    assert done.code == 0 and "rank 3 → 1" in done.out
    done = command("resize", source, "-o", out, "--energy", 0.9, "--overwrite", "--json")
    assert done.code == 0 and done.json["facts"]["relative_error"] <= 0.1**0.5
    assert command("resize", source, "-o", out).code == 2
    assert command("resize", source, "-o", out, "--rank", 1, "--energy", 0.5).code == 2
