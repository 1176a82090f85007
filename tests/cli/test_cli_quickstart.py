"""``adaptsurgery quickstart``: what is printed, its JSON, its exit codes."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

Command = Callable[..., Any]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.randn(64, 128), "b.weight": torch.randn(64, 64, 1, 1)}, path)
    return path


def test_as_a_user_runs_it(process: Command, command: Command, tmp_path: Path) -> None:
    """The whole run, piped, well under a minute; then the commands that it hands on."""
    done = process("quickstart", tmp_path / "try", "--small")
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out
    for told in ("bits per byte", "error[no-hra]", "all 4 adapters agree in every layout that"):
        assert told in done.out
    table = [
        line.split() for line in done.out.splitlines() if " → " in line and "identical" in line
    ]
    assert [row[0] for row in table] == ["lora", "loha", "lokr", "hra"]
    assert "Traceback" not in done.out
    following = done.out.partition("to go on:\n")[2].splitlines()
    assert len(following) == 3
    for line in following:
        assert command(*shlex.split(line)[1:]).code == 0, line


def test_json_and_quiet(command: Command, model: Path) -> None:
    done = command("quickstart", "--base", model, "--json")
    assert done.code == 0
    assert done.json["ok"] is True
    assert done.json["job"] == "quickstart"
    assert len(done.json["facts"]["adapters"]) == 4
    quiet = command("quickstart", "--base", model, "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_a_model_of_the_users(command: Command, model: Path, tmp_path: Path) -> None:
    done = command("quickstart", tmp_path / "try", "--base", model)
    assert done.code == 0
    assert "random directions, not trained" in done.out
    assert "bits" not in done.out
    assert command("inspect", tmp_path / "try" / "loha").code == 0


def test_disagreement_is_exit_code_1(
    command: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaptsurgery.quickstart import run

    monkeypatch.setattr(run, "AGREE", -1.0)
    done = command("quickstart", "--base", model)
    assert done.code == 1
    assert "do not agree" in done.out
    told = command("quickstart", "--base", model, "--json")
    assert (told.code, told.json["ok"]) == (1, False)
    assert "does not agree" in told.err


def test_errors(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    done = command("quickstart", tmp_path)
    assert done.code == 1
    assert "error[output-exists]" in done.err
    assert command("quickstart", "--seed", "-1").code == 2
