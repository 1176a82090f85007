"""Whatever goes wrong: the exit code, one clear message, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_files import lora_shapes, write_kohya, write_peft, write_zeros

import adaptsurgery.jobs.convert
import adaptsurgery.jobs.inspect

Command = Callable[..., Any]


@pytest.mark.parametrize(
    "args",
    [
        ["inspet", "x"],
        ["inspect"],
        ["inspect", "x", "--colour"],
        ["--frobnicate"],
        ["convert", "a", "--to", "peft"],
        ["convert", "a", "-o", "b"],
        ["convert", "a", "-o", "b", "--to", "diffusers"],
        ["convert", "a", "-o", "b", "--to", "peft", "--from", "zip"],
        ["convert", "a", "-o", "b", "--to", "peft", "--as", "loha"],
        ["convert", "a", "-o", "b", "--to", "peft", "--rank", "4"],
        ["convert", "a", "-o", "b", "--to", "peft", "--as", "lora", "--rank", "0"],
        ["verify", "a"],
        ["verify", "a", "b", "c"],
    ],
)
def test_wrong_usage_is_2(command: Command, args: list[str]) -> None:
    done = command(*args)
    assert (done.code, done.out) == (2, "")
    assert "Error: " in done.err


def test_a_misspelled_command_is_told_the_nearest(command: Command) -> None:
    assert "nearest: `inspect`" in command("inspet").err


def _cut(folder: Path) -> Path:
    file = write_kohya(folder / "a.safetensors")
    os.truncate(file, file.stat().st_size - 100)
    return file


def _header(folder: Path, text: bytes) -> Path:
    file = folder / "a.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    return file


def _config(folder: Path, **fields: object) -> Path:
    write_peft(folder / "peft")
    path = folder / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder / "peft"


def _zeros(**shapes: list[int]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        named = {f"lora_unet_a.{k.replace('__', '.')}": v for k, v in shapes.items()}
        return write_zeros(folder / "a.safetensors", named)

    return make


WHEEL: list[tuple[str, Callable[[Path], Path]]] = [
    ("no-such-file", lambda d: d / "missing.safetensors"),
    ("no-adapter", lambda d: d),
    ("truncated-file", _cut),
    ("truncated-file", lambda d: _raw(d, b"\x00\x01")),
    ("absurd-size", lambda d: _raw(d, b"\xff" * 64)),
    ("bad-header", lambda d: _header(d, b"{" * 64)),
    ("bad-header", lambda d: _header(d, b'{"a": {"dtype": "F4", "shape": [], "data_offsets": [0, 0]}}')),
    ("empty-adapter", lambda d: _header(d, b"{}")),
    ("trailing-bytes", lambda d: _grown(d)),
    ("unknown-layout", lambda d: write_zeros(d / "a.safetensors", {"model.norm.weight": [4]})),
    ("mixed-layouts", lambda d: write_zeros(d / "a.safetensors", lora_shapes(["lora_unet_a", "lycoris_b"]))),
    ("unknown-key", lambda d: write_zeros(d / "a.safetensors", {**lora_shapes(["lora_unet_a"]), "lora_unet_b.what": [1]})),
    ("incomplete-module", _zeros(hada_w1_a=[4, 2], hada_w2_a=[4, 2], hada_w2_b=[2, 4])),
    ("unsupported-algorithm", _zeros(oft_blocks=[2, 4, 4])),
    ("bad-shape", _zeros(lora_down__weight=[4, 6], lora_up__weight=[8, 5])),
    ("bad-shape", _zeros(lora_down__weight=[0, 6], lora_up__weight=[8, 0])),
    ("bad-dtype", lambda d: write_zeros(d / "a.safetensors", lora_shapes(["lora_unet_a"]), dtype="I8")),
    ("config-missing", lambda d: _without_config(d)),
    ("bad-config", lambda d: _bad_config(d)),
    ("config-disagrees", lambda d: _config(d, r=8)),
    ("unsupported-algorithm", lambda d: _config(d, peft_type="OFT")),
]  # fmt: skip


def _raw(folder: Path, data: bytes) -> Path:
    file = folder / "a.safetensors"
    file.write_bytes(data)
    return file


def _grown(folder: Path) -> Path:
    file = write_kohya(folder / "a.safetensors")
    with file.open("ab") as end:
        end.write(b"more")
    return file


def _without_config(folder: Path) -> Path:
    (write_peft(folder / "peft") / "adapter_config.json").unlink()
    return folder / "peft" / "adapter_model.safetensors"


def _bad_config(folder: Path) -> Path:
    (write_peft(folder / "peft") / "adapter_config.json").write_text("{")
    return folder / "peft"


@pytest.mark.parametrize("verb", ["inspect", "convert"])
@pytest.mark.parametrize(
    ("code", "make"), WHEEL, ids=[f"{c}-{i}" for i, (c, _) in enumerate(WHEEL)]
)
def test_bad_input_is_1_with_its_code(
    command: Command, tmp_path: Path, code: str, make: Callable[[Path], Path], verb: str
) -> None:
    (tmp_path / "in").mkdir()
    source = make(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    more = ["--to", "peft", "-o", tmp_path / "out"] if verb == "convert" else []
    done = command(verb, source, *more, "--json")
    assert done.code == 1
    assert done.json["ok"] is False
    assert done.json["error"]["code"] == code
    assert done.err.startswith(f"error[{code}]: ")
    assert "Traceback" not in done.err
    assert sorted(tmp_path.rglob("*")) == before


def test_refusals_of_a_conversion(command: Command, tmp_path: Path) -> None:
    source, out = write_kohya(tmp_path / "a.safetensors"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert "error[" in command("convert", source, "--to", "peft", "-o", out).err
    assert command("convert", source, "--to", "peft", "-o", out, "--overwrite").code == 1
    assert (out / "thesis.txt").read_text() == "mine"
    assert command("convert", source, "--to", "kohya", "-o", source, "--overwrite").code == 1
    assert command("convert", source, "--to", "kohya", "-o", tmp_path / "no" / "x").code == 1


def test_a_model_that_no_table_knows(command: Command, tmp_path: Path) -> None:
    file = write_zeros(tmp_path / "a.safetensors", lora_shapes(["lora_unet_my_own_layer"]))
    done = command("convert", file, "--to", "peft", "-o", tmp_path / "out")
    assert done.code == 1
    assert "error[unknown-model]" in done.err
    assert "--base" in done.err


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (KeyError("w1"), "internal-error"),
        (MemoryError(), "out-of-memory"),
        (RecursionError(), "too-deep"),
        (PermissionError(13, "Permission denied", "x"), "system-error"),
    ],
)
def test_the_unforeseen_is_one_paragraph(
    command: Command, monkeypatch: pytest.MonkeyPatch, raised: Exception, code: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(adaptsurgery.jobs.inspect, "inspect", fail)
    monkeypatch.delenv("ADAPTSURGERY_DEBUG", raising=False)
    done = command("inspect", "x", "--json")
    assert done.code == 1
    assert done.json["error"]["code"] == code
    assert "Traceback" not in done.err
    monkeypatch.setenv("ADAPTSURGERY_DEBUG", "1")
    assert "Traceback" in command("inspect", "x").err


def test_an_internal_error_says_so(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("w1")

    monkeypatch.setattr(adaptsurgery.jobs.inspect, "inspect", fail)
    told = command("inspect", "x").err
    assert "this is an error in adaptsurgery" in told
    assert "KeyError: 'w1'" in told


def test_an_interrupt_is_130(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(adaptsurgery.jobs.inspect, "inspect", fail)
    done = command("inspect", "x")
    assert done.code == 130
    assert "interrupted" in done.err


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_writing_leaves_nothing(tmp_path: Path, sent: signal.Signals) -> None:
    source = write_kohya(tmp_path / "a.safetensors")
    program = """
import sys, time
import adaptsurgery.adapters.writing as job
from adaptsurgery.cli import main
write = job.write_safetensors
def slow(*args, **kwargs):
    write(*args, **kwargs)
    print("writing", flush=True)
    time.sleep(30)
job.write_safetensors = slow
main()
"""
    args = ["convert", str(source), "--to", "kohya", "-o", str(tmp_path / "out.safetensors")]
    running = subprocess.Popen(
        [sys.executable, "-c", program, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert running.stdout is not None
    assert running.stdout.readline() == b"writing\n"
    assert len(list(tmp_path.iterdir())) > 1
    time.sleep(0.05)
    running.send_signal(sent)
    _, err = running.communicate(timeout=20)
    assert running.returncode == 130
    assert b"Traceback" not in err
    assert list(tmp_path.iterdir()) == [source]


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "adapter", names=[f"m{i}_proj" for i in range(300)])
    line = f"{sys.executable} -m adaptsurgery inspect {folder} --json | head -c 10"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], capture_output=True)
    assert done.stderr == b""
    assert done.returncode in (0, 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_behind_stdout(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "adaptsurgery", "inspect", write_peft(tmp_path / "adapter")],
            stdout=full, stderr=subprocess.PIPE,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(b"error[system-error]")
    assert b"Traceback" not in done.stderr


def test_any_encoding_of_the_terminal_will_do(process: Command, tmp_path: Path) -> None:
    source = write_kohya(tmp_path / "a.safetensors")
    args = ("convert", source, "--to", "peft", "-o", tmp_path / "out")
    done = process(*args, PYTHONIOENCODING="ascii")
    assert (done.code, done.err) == (0, "")
    assert "3/3 modules" in done.out


def test_a_name_that_is_no_text(process: Command, tmp_path: Path) -> None:
    done = process("inspect", os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"), "--json")
    assert done.code == 1
    assert done.json["error"]["code"] == "no-such-file"
