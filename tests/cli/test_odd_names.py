"""Names that no file has, or that would steer a terminal, wherever a command takes one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adaptsurgery.cli import run

BROKEN = ["\ud800", "\ud800/x", "a\0b"]
LINES = {
    "inspect": ["inspect", "NAME"], "convert": ["convert", "NAME", "--to", "peft", "-o", "o"],
    "convert to": ["convert", "k.safetensors", "--to", "lycoris", "-o", "NAME"],
    "merge": ["merge", "NAME", "k.safetensors", "-o", "o"],
    "merge to": ["merge", "base.safetensors", "k.safetensors", "-o", "NAME"],
    "combine to": ["combine", "k.safetensors", "-o", "NAME"],
    "resize to": ["resize", "k.safetensors", "--rank", "1", "-o", "NAME"],
    "extract to": ["extract", "base.safetensors", "tuned.safetensors", "--rank", "1", "-o", "NAME"],
    "report": ["extract", "base.safetensors", "tuned.safetensors", "--rank", "1", "-o", "o", "--report", "NAME"],
    "rewrite": ["rewrite", "NAME", "--adapter", "k.safetensors", "-o", "o.pt2"],
    "rewrite to": ["rewrite", "k.safetensors", "--adapter", "k.safetensors", "-o", "NAME"],
    "quickstart": ["quickstart", "--folder", "NAME"],
}  # fmt: skip


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tuned"):
        save_file({"a.weight": torch.randn(4, 4)}, f"{name}.safetensors")
    lora = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 2)}
    save_file({f"lora_unet_a.{k}": t for k, t in lora.items()}, "k.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", [*BROKEN, "", "/", "."])
@pytest.mark.parametrize("line", LINES)
def test_a_name_that_no_file_has_is_refused(
    line: str, name: str, room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in ("/", ".") and not line.endswith((" to", "report")):
        return  # a folder to read from
    before = sorted(room.iterdir())
    code = run([name if word == "NAME" else word for word in LINES[line]])
    told = capsys.readouterr().err
    assert code in (1, 2) and "internal-error" not in told and "Traceback" not in told
    assert name not in BROKEN or code == 2 or "error[" in told
    assert sorted(room.iterdir()) == before


@pytest.mark.parametrize(
    "words", [["inspect", "x", "\u202eabc"], ["\x1b[31mx"], ["merge", "--\x1bx"]]
)
def test_wrong_usage_steers_no_terminal(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 2
    told = capsys.readouterr().err
    assert told and all(c == "\n" or c.isprintable() for c in told)
