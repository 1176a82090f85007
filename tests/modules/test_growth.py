"""Time that grows with the modules and no faster, and a fraction of PEFT's."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import nn

from adaptsurgery import LoraConfig, PeftModel, get_peft_model


def model(count: int) -> nn.Module:
    blocks = (
        nn.ModuleDict({"q": nn.Linear(2, 2), "v": nn.Linear(2, 2)}) for _ in range(count // 2)
    )
    out = nn.Module()
    out.layers = nn.ModuleList(blocks)
    return out


def fields(count: int) -> dict[str, Any]:
    """Every module with an entry of its own in rank_pattern."""
    names = [f"layers.{n // 2}.{'qv'[n % 2]}" for n in range(count)]
    ranks = {name: 1 + n % 2 for n, name in enumerate(names)}
    return {"r": 3, "target_modules": ["q", "v"], "rank_pattern": ranks}


def seconds(call: Any) -> float:
    gc.collect()
    start = time.process_time()
    call()
    return time.process_time() - start


def ours(count: int, folder: Path) -> dict[str, float]:
    base, told = model(count), fields(count)
    made: list[PeftModel] = []
    first = seconds(lambda: made.append(get_peft_model(base, LoraConfig(**told))))
    second = seconds(lambda: made[0].add_adapter("b", LoraConfig(**told)))
    saving = seconds(lambda: made[0].save_pretrained(folder, ["default"]))
    fresh = model(count)
    loading = seconds(lambda: PeftModel.from_pretrained(fresh, folder))
    return {"injection": first, "second": second, "saving": saving, "loading": loading}


def test_linear_in_the_modules(tmp_path: Path) -> None:
    small = [ours(200, tmp_path / f"s{n}") for n in range(2)]
    large = ours(1600, tmp_path / "l")
    for part, many in large.items():
        few = min(t[part] for t in small)
        assert many < 3 * 8 * max(few, 0.02), (part, few, many)  # 8 if linear, 64 if quadratic


@pytest.mark.filterwarnings("ignore")
def test_a_fraction_of_peft_s(tmp_path: Path) -> None:
    count = 600
    mine = ours(count, tmp_path)
    base = model(count)
    theirs = seconds(lambda: peft.get_peft_model(base, peft.LoraConfig(**fields(count))))
    assert mine["injection"] < theirs / 5
