"""Outputs that name nothing, such as the root or a folder by a dot, are refused as what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adaptsurgery.cli import run


@pytest.mark.parametrize("out", ["/", ".", "./", "..", "../", ""])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_an_output_without_a_name(
    out: str, overwrite: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given, here = tmp_path / "given", tmp_path / "here"
    given.mkdir()
    here.mkdir()
    save_file({"fc.weight": torch.eye(4)}, given / "base.safetensors")
    save_file({"fc.weight": torch.eye(4) + 1}, given / "tuned.safetensors")
    factors = {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(4, 2)}
    keys = {f"base_model.model.fc.{k}.weight": t for k, t in factors.items()}
    save_file(keys, given / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["fc"]}
    (given / "adapter_config.json").write_text(json.dumps(config))
    base, tuned, adapter = (str(given / n) for n in ("base.safetensors", "tuned.safetensors", ""))
    monkeypatch.chdir(here)
    commands = [
        ["merge", base, adapter, "-o", out],
        ["unmerge", base, adapter, "--against", tuned, "-o", out],
        ["convert", adapter, "--to", "kohya", "--base", base, "-o", out],
        ["convert", adapter, "--to", "peft", "-o", out],
        ["extract", base, tuned, "--rank", "1", "--to", "kohya", "-o", out],
        ["extract", base, tuned, "--rank", "1", "-o", "e", "--report", out],
    ]
    for command in commands:
        assert run([*command, *overwrite]) in (1, 2), command
        assert "internal-error" not in capfd.readouterr().err, command
    assert not list(here.iterdir())
    assert len(list(given.iterdir())) == 4
