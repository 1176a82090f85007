"""A pipe, a socket or a device in any place where a command looks for a file: never waited for.

All commands run in one process, which is given a time: each ends by itself, refused as "not-a-file"
or done where it has no need of that file.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from unix import needs

RUNNER = """
import json, os, sys
from adaptsurgery.cli import run
for line in json.load(sys.stdin):
    print("==", run([*line, "--json"]), flush=True)
"""
NAMES = ["a.q_proj", "a.v_proj"]
NEEDED = "refused"  # what the command cannot do without
# In the base's folder: file → whether a merge needs it.
IN_BASE = {
    "config.json": NEEDED,
    "model.safetensors": NEEDED,
    "model.safetensors.index.json": "",
    "model_index.json": NEEDED,
    "tokenizer.json": "",
    "notes.txt": "",
    "generation_config.json": "",
}
# In the adapter's: whether inspecting it does.
IN_ADAPTER = {
    "adapter_config.json": NEEDED,
    "adapter_model.safetensors": NEEDED,
    "notes.json": "",
    "x.safetensors": "",
}


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as there:
            there.bind(path.name)
    finally:
        os.chdir(here)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    (folder / "base").mkdir()
    (folder / "lora").mkdir()
    save_file({f"{n}.weight": torch.ones(4, 4) for n in NAMES}, folder / "base/model.safetensors")
    (folder / "base/config.json").write_text("{}")
    parts = {"lora_A": (2, 4), "lora_B": (4, 2)}
    save_file(
        {
            f"base_model.model.{n}.{p}.weight": torch.ones(s)
            for n in NAMES
            for p, s in parts.items()
        },
        folder / "lora/adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]}
    (folder / "lora/adapter_config.json").write_text(json.dumps(config))
    return folder


def _put(make: Callable[[Path], None], folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)


def _lines(sound: Path, room: Path, make: Callable[[Path], None]) -> dict[str, list[str]]:
    """Every place, and a command line that comes upon it."""
    base, lora = str(sound / "base"), str(sound / "lora")
    lines: dict[str, list[str]] = {}
    for name in IN_BASE:
        folder = room / f"base-{name}"
        shutil.copytree(base, folder)
        _put(make, folder, name)
        lines[f"base/{name}"] = ["merge", str(folder), lora, "-o", f"{room}/merged-{name}"]
    for name in IN_ADAPTER:
        folder = room / f"lora-{name}"
        shutil.copytree(lora, folder)
        _put(make, folder, name)
        lines[f"lora/{name}"] = ["inspect", str(folder), "--hashes"]
        lines[f"lora/{name} in a merge"] = ["merge", base, str(folder), "-o", f"{room}/of-{name}"]
    for name in ("f.bin", "f.pt", "f.safetensors", "f.index.json"):
        _put(make, room, name)
        kohya = ["--to", "kohya", "-o", f"{room}/k.safetensors"]
        lines[f"--base {name}"] = ["convert", lora, *kohya, "--base", f"{room}/{name}"]
        lines[f"inspect {name}"] = ["inspect", f"{room}/{name}"]
        lines[f"verify {name}"] = ["verify", lora, f"{room}/{name}"]
        lines[f"extract {name}"] = [
            "extract", base, f"{room}/{name}", "-o", f"{room}/x", "--rank", "1",
        ]  # fmt: skip
    _put(make, room, "f.pt2")
    lines["rewrite f.pt2"] = ["rewrite", f"{room}/f.pt2", "--table"]
    return lines


@needs("os.mkfifo")
@pytest.mark.parametrize("make", [_pipe, _device, _socket])
def test_every_place(sound: Path, tmp_path: Path, make: Callable[[Path], None]) -> None:
    lines = _lines(sound, tmp_path, make)
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(list(lines.values())), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    answers = done.stdout.split("==")
    assert len(answers) == len(lines) + 1, done.stderr[-2000:]
    needed = {f"base/{n}" for n, how in IN_BASE.items() if how}
    needed |= {
        f"lora/{n}{more}" for n, how in IN_ADAPTER.items() if how for more in ("", " in a merge")
    }
    for (place, _), text, code in zip(lines.items(), answers, answers[1:]):
        answer = json.loads(text[text.index("{") :])
        error = "" if answer["ok"] else answer["error"]["code"]
        assert int(code.split("{")[0]) == (0 if answer["ok"] else 1)
        optional = place.startswith(("base/", "lora/")) and place not in needed
        linked = make is _device and place.startswith("base/")  # and leads out of the base
        refused = error == "not-a-file" or (linked and error == "link-outside")
        assert refused or (optional and not error), f"{place}: {error or 'done'}"
