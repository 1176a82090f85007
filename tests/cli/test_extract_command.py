"""``adaptsurgery extract``: its text, its JSON, its exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    random = torch.Generator().manual_seed(0)
    base = {f"l.{n}.weight": torch.randn(12, 8, generator=random) for n in "ab"}
    tuned = {k: w + 0.1 * torch.randn(12, 8, generator=random) for k, w in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


def test_text_and_json(command: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    done = command(
        "extract", *pair, "-o", tmp_path / "out", "--rank", "2", "--rank-pattern", "l.a=3"
    )
    assert done.code == 0 and "2 modules, rank 2…3" in done.out and "wrote" in done.out
    assert "lossy" in done.out and "energy kept" in done.out
    assert "with 100 parameters" in done.out
    again = command("extract", *pair, "-o", tmp_path / "two", "--energy", "0.5", "--json")
    assert again.json["ok"] and again.json["facts"]["modules"] == 2
    assert command("extract", *pair, "-o", tmp_path / "three", "--rank", "1", "-q").out == ""
    dry = command("extract", *pair, "-o", tmp_path / "four", "--rank", "1", "--dry-run")
    assert "dry run" in dry.out and not (tmp_path / "four").exists()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 2),
        (["--rank", "2", "--energy", "0.5"], 2),
        (["--rank", "0"], 2),
        (["--rank", "2", "--rank-pattern", "l.a"], 2),
        (["--rank", "2", "--shard-index", "1"], 2),
        (["--rank", "2", "--include", "nothing"], 1),
        (["--energy", "1.5"], 1),
    ],
)
def test_exit_codes(
    command: Any, pair: tuple[Path, Path], tmp_path: Path, words: list[str], code: int
) -> None:
    done = command("extract", *pair, "-o", tmp_path / "out", *words)
    assert done.code == code and not (tmp_path / "out").exists()
