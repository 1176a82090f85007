"""The README's examples, run in the folder that the quickstart leaves: what they print and return.

Numbers are not compared: they come of training, and training differs between machines.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from safetensors.torch import load_file

from adaptsurgery.cli import run
from adaptsurgery.quickstart import quickstart
from adaptsurgery.quickstart.tiny import TinyModel

README = (Path(__file__).resolve().parent.parent / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "try"
    assert quickstart(folder, small=True).facts["failed"] == []
    return folder


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def examples() -> Iterator[tuple[str, list[str]]]:
    """Each command on the quickstart's files, and the lines that stand under it."""
    for block in blocks("console"):
        for typed in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, *shown = typed.splitlines()
            if command.startswith("adaptsurgery ") and command != "adaptsurgery quickstart":
                yield command, shown


def wording(line: str) -> str:
    """A line without its numbers, and a path without the folders before the last."""
    sized = re.sub(r"\d[\d.]* [kMG]?B\b", "# bytes", re.sub(r"/\S*/try/", "/…/try/", line))
    return re.sub(r"\d[\d.,]*(e-\d+)?", "#", sized).rstrip(" …")


def test_the_commands(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(kept)
    for command, shown in examples():
        code = run(shlex.split(command)[1:])
        out, err = capsys.readouterr()
        assert code == int(any(line.startswith("error[") for line in shown)), command + err
        told = [wording(line) for line in (out + err).splitlines()]
        for line in map(wording, shown):
            row = line.startswith(("  rounded", "  lossy"))  # the worst module may be another one
            words = line.split()[0] if row else line
            assert any(words in t if row else t.startswith(words) for t in told), (command, line)
        if "…" not in shown:
            assert len(told) == len(shown) or "--quiet" in command, command


def test_the_library(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kept)
    library, live, *_ = blocks("python")
    names: dict[str, object] = {}
    with redirect_stdout(StringIO()) as out:
        exec(compile(library, "README.md", "exec"), names)
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", library, re.M)
    assert list(map(wording, out.getvalue().splitlines())) == list(map(wording, promised))
    model = TinyModel()
    model.load_state_dict(before := load_file("model.safetensors"))
    exec(compile(live, "README.md", "exec"), {**names, "model": model})
    after = model.state_dict()
    assert max(float((after[k] - before[k]).abs().max()) for k in before) < 1e-6
