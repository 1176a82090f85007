"""Streams that are closed, full or narrow, and Ctrl-C at any moment: an exit code and no traceback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from adapter_files import write_kohya, write_peft
from unix import needs

COMMANDS = ["inspect", "convert", "fail", "usage", "help"]


def _line(folder: Path, what: str) -> list[str]:
    source = folder / "adapter"
    if not source.exists():
        write_peft(source)
    return {
        "inspect": ["inspect", str(source)],
        "convert": [
            "convert",
            str(source),
            "--to",
            "lycoris",
            "-o",
            str(folder / "out.safetensors"),
        ],
        "fail": ["inspect", str(folder / "nothing-of-that-name")],
        "usage": ["inspect"],
        "help": ["convert", "--help"],
    }[what]


@needs("/dev/full")
@pytest.mark.parametrize("out", ["", ">&-", ">/dev/full"])
@pytest.mark.parametrize("err", ["2>&-", "2>/dev/full", ""])
def test_no_stream_stops_the_work(tmp_path: Path, out: str, err: str) -> None:
    """All in one shell, each by its exit code; what cannot be told is not, and the work is done."""
    for what, as_json in (("inspect", True), ("convert", False), ("fail", True), ("usage", False)):
        words = [*_line(tmp_path, what), *(["--json"] if as_json else [])]
        run = f"{sys.executable} -m adaptsurgery {' '.join(words)} {out} {err}"
        done = subprocess.run(["bash", "-c", run], capture_output=True, text=True)
        assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
        wanted = {"fail": 1, "usage": 2}.get(what, int(out == ">/dev/full"))
        assert done.returncode == wanted, (what, out, err, done.stderr)
    assert (tmp_path / "out.safetensors").exists()


def _child(words: list[str], **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "adaptsurgery", *words],
        capture_output=True, env={**os.environ, **env}, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    "console",
    [
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
    ],
)
@pytest.mark.parametrize("what", COMMANDS)
def test_any_console_is_told_in_what_it_can_show(
    tmp_path: Path, console: dict[str, str], what: str
) -> None:
    folder = tmp_path / "ΔW→日本"
    folder.mkdir()
    done = _child(_line(folder, what), **console)
    assert done.returncode == {"fail": 1, "usage": 2}.get(what, 0), done.stderr
    assert b"Traceback" not in done.stderr
    encoding = console.get("PYTHONIOENCODING", "ascii").partition(":")[0]
    (done.stdout + done.stderr).decode(encoding)
    if what in ("inspect", "fail"):
        found = _child([*_line(folder, what), "--json"], **console)
        answer: Any = json.loads(found.stdout.decode("ascii"))
        seen = json.dumps(answer, ensure_ascii=False)
        as_given = os.fsencode(folder).decode(
            "ascii", "surrogateescape"
        )  # to a process in C's locale
        assert str(folder) in seen or as_given in seen


def test_json_to_utf8_is_plain_text(tmp_path: Path) -> None:
    folder = tmp_path / "ΔW"
    folder.mkdir()
    done = _child([*_line(folder, "inspect"), "--json"], PYTHONIOENCODING="utf-8")
    assert "ΔW" in done.stdout.decode("utf-8")


# -- Ctrl-C

IMPORTING = """
import builtins, os, signal, sys
real, wanted = builtins.__import__, sys.argv.pop(1)
def imported(name, *rest, **more):
    if name == wanted:
        builtins.__import__ = real
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *rest, **more)
builtins.__import__ = imported
sys.argv[0] = "adaptsurgery"
from adaptsurgery.__main__ import main
main()
"""


@needs("os.fork")  # a Ctrl-C of one's own
@pytest.mark.parametrize(
    "module",
    ["signal", "click", "dataclasses", "adaptsurgery.jobs.inspect"],
)
def test_an_interrupt_while_modules_are_imported(tmp_path: Path, module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, module, *_line(tmp_path, "inspect")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr.strip() == "interrupted; nothing was left behind"
    assert (done.returncode, done.stdout) == (130, "")


@needs("os.fork")
def test_an_interrupt_within_text_that_is_executed(tmp_path: Path) -> None:
    """As dataclasses and namedtuples do: Python would die of the signal afterwards."""
    program = (
        "import sys, adaptsurgery.jobs.inspect as job\n"
        "def fail(*_, **__): exec('raise KeyboardInterrupt')\n"
        "job.inspect = fail\n"
        "from adaptsurgery.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "inspect", "x"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted; nothing was left behind")


def test_an_interrupt_that_is_ignored_stays_so(tmp_path: Path) -> None:
    """A shell's background job: nohup, and what began with Ctrl-C switched off."""
    program = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "import adaptsurgery.jobs.inspect as job\n"
        "def interrupted(*_, **__): signal.raise_signal(signal.SIGINT); raise SystemExit(7)\n"
        "job.inspect = interrupted\n"
        "from adaptsurgery.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, "inspect", "x"], capture_output=True)
    assert (done.returncode, done.stderr) == (7, b"")


@needs("os.fork")
def test_real_interrupts_leave_130(tmp_path: Path) -> None:
    """At moments spread over a run; before Python has come to this package it dies by its own way."""
    source = write_kohya(tmp_path / "a.safetensors")
    words = ["convert", str(source), "--to", "peft", "-o", str(tmp_path / "out")]
    ours = 0
    for n in range(8):
        running = subprocess.Popen(
            [sys.executable, "-m", "adaptsurgery", *words, "--overwrite"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        time.sleep(0.06 + 0.03 * n)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
        if not err or re.search(r"runpy|<frozen site>|encodings|adaptsurgery/__init__", err):
            continue
        ours += 1
        assert err.strip() == "interrupted; nothing was left behind", err
        assert running.returncode == 130
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
