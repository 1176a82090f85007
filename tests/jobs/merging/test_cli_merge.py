"""The two commands: what they print, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptsurgery.cli.app import run


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[str, str]:
    save_file({"a.fc.weight": torch.ones(4, 6)}, tmp_path / "base.safetensors")
    adapter = {
        "lycoris_a_fc.lora_up.weight": torch.ones(4, 1),
        "lycoris_a_fc.lora_down.weight": torch.ones(1, 6),
    }
    save_file(adapter, tmp_path / "style=1.safetensors")  # a name with an equals sign is a name
    return str(tmp_path / "base.safetensors"), str(tmp_path / "style=1.safetensors")


def test_merge_and_unmerge(
    inputs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = inputs
    out, back = str(tmp_path / "out.safetensors"), str(tmp_path / "back.safetensors")
    assert run(["merge", base, f"{adapter}=0.5", "-o", out, "--dry-run"]) == 0
    assert "dry run" in capsys.readouterr().out and not Path(out).exists()
    assert run(["merge", base, f"{adapter}=0.5", "-o", out, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] and told["outputs"][0] == out and told["facts"]["modules"] == 1
    assert float(load_file(out)["a.fc.weight"][0, 0]) == 1.5
    assert run(["unmerge", out, f"{adapter}=0.5", "-o", back, "--against", base]) == 0
    assert "distance" in capsys.readouterr().out
    assert torch.equal(load_file(back)["a.fc.weight"], torch.ones(4, 6))


def test_refusals(
    inputs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = inputs
    assert run(["merge", base, adapter, "-o", base, "--overwrite"]) == 1
    assert "output-is-base" in capsys.readouterr().err
    assert run(["merge", base, "-o", "out"]) == 2
    assert run(["merge", base, adapter, "-o", "out", "--max-shard-size", "huge"]) == 2
    assert run(["merge", base, adapter, "-o", "out", "--shard-index", "2"]) == 2


def test_a_merged_checkpoint_is_verified(
    inputs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = inputs
    out, back = str(tmp_path / "out.safetensors"), str(tmp_path / "back.safetensors")
    assert run(["merge", base, f"{adapter}=0.5", "-o", out, "-q"]) == 0
    assert run(["verify", out, "--base", base, "--adapter", f"{adapter}=0.5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] and told["facts"] == {"tensors": 1, "edited": 1}
    assert run(["verify", out, "--base", base, "--adapter", f"{adapter}=0.6"]) == 1
    assert "`a.fc.weight` is not what base and adapters give" in capsys.readouterr().err
    assert run(["unmerge", out, f"{adapter}=0.5", "-o", back, "-q"]) == 0
    undone = ["verify", back, "--base", out, "--adapter", f"{adapter}=0.5", "--inverse"]
    assert run(undone) == 0
    assert "1 edited" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["a"], ["a", "b", "--adapter", "c"], ["a", "b", "--inverse"], ["a", "--adapter", "c"]],
)
def test_verify_takes_two_adapters_or_a_checkpoint(arguments: list[str]) -> None:
    assert run(["verify", *arguments]) == 2


def test_verify_says_how_a_merge_is_verified(
    inputs: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = inputs
    assert run(["verify", base, "base/", "a=2", "b"]) == 2
    assert f"verify {base} --base base/ --adapter a=2 --adapter b" in capsys.readouterr().err
    for arguments in ([base, base], [base, adapter, "--base", base]):
        assert run(["verify", *arguments]) == 1
        assert "verify MERGED --base BASE --adapter" in capsys.readouterr().err


def test_what_is_given_in_vain_or_twice_is_said(
    inputs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = inputs
    out = str(tmp_path / "out.safetensors")
    assert run(["merge", base, adapter, "-o", out, "--allow-unmatched"]) == 0
    told = capsys.readouterr().out
    assert "note[all-matched]" in told and "same-adapter" not in told
    twice = f"{tmp_path}/./style=1.safetensors=0.5"
    assert run(["merge", base, adapter, twice, "-o", out, "--overwrite"]) == 0
    told = capsys.readouterr().out
    assert "note[same-adapter]" in told and "named 2 times" in told and "all-matched" not in told
    assert float(load_file(out)["a.fc.weight"][0, 0]) == 2.5
