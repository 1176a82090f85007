"""No output is open to more people than the most private of what it is made of."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adaptsurgery.checkpoint import atomic, privacy
from adaptsurgery.jobs.combining.combine import combine
from adaptsurgery.jobs.convert import convert
from adaptsurgery.jobs.extract.extract import extract
from adaptsurgery.jobs.merging.merge import merge, unmerge
from adaptsurgery.jobs.resize import resize
from adaptsurgery.jobs.rewrite import rewrite

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
W = 8


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A base (file and folder), a fine-tuned one, two adapters and a program, all open to all."""
    base = {"model.a.weight": torch.randn(W, W), "model.b.weight": torch.randn(W, W)}
    save_file(base, tmp_path / "base.safetensors", {"format": "pt"})
    tuned = {key: weight + 0.1 * torch.randn(W, W) for key, weight in base.items()}
    save_file(tuned, tmp_path / "tuned.safetensors", {"format": "pt"})
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "base" / name).write_text("{}")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        tensors = {
            "base_model.model.model.a.lora_A.weight": torch.randn(2, W),
            "base_model.model.model.a.lora_B.weight": torch.randn(W, 2),
        }
        save_file(tensors, tmp_path / name / "adapter_model.safetensors", {"format": "pt"})
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["a"]}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    for path in tmp_path.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return tmp_path


def modes(room: Path) -> dict[str, int]:
    return {str(p.relative_to(room)): p.stat().st_mode & 0o777 for p in room.rglob("*")}


Job = Callable[[Path, Path], Any]
JOBS: dict[str, tuple[Job, list[str]]] = {
    "convert to a file": (
        lambda h, o: convert(h / "one", o / "x.safetensors", "kohya", base=h / "base.safetensors"),
        ["one/adapter_model.safetensors", "one/adapter_config.json", "base.safetensors", "one"],
    ),
    "convert to a folder": (
        lambda h, o: convert(h / "one", o / "x", "peft", base=h / "base"),
        ["one/adapter_model.safetensors", "base/model.safetensors", "base"],
    ),
    "combine": (
        lambda h, o: combine([h / "one", h / "two"], o / "x", to="peft"),
        ["one/adapter_model.safetensors", "two/adapter_model.safetensors", "two"],
    ),
    "resize": (
        lambda h, o: resize(h / "one", o / "x", rank=1),
        ["one/adapter_model.safetensors", "one/adapter_config.json"],
    ),
    "extract": (
        lambda h, o: extract(
            h / "base.safetensors", h / "tuned.safetensors", o / "x", rank=1, report=o / "r.json"
        ),
        ["base.safetensors", "tuned.safetensors"],
    ),
    "merge a file": (
        lambda h, o: merge(h / "base.safetensors", h / "one", o / "x.safetensors"),
        ["base.safetensors", "one/adapter_model.safetensors", "one/adapter_config.json", "one"],
    ),
    "merge a folder": (
        lambda h, o: merge(h / "base", h / "one", o / "x"),
        ["base/model.safetensors", "base/tokenizer.json", "base", "one/adapter_config.json"],
    ),
    "unmerge": (
        lambda h, o: unmerge(h / "base", h / "one", o / "x"),
        ["base/model.safetensors", "base/config.json", "one/adapter_model.safetensors"],
    ),
}


@pytest.mark.parametrize("name", JOBS)
def test_one_private_input_makes_all_of_the_output_private(name: str, home: Path) -> None:
    job, inputs = JOBS[name]
    for number, private in enumerate((None, *inputs)):
        room = home / f"room {number}"
        room.mkdir()
        path = home / (private or "base.safetensors")
        before = path.stat().st_mode & 0o777
        if private:
            path.chmod(0o700 if path.is_dir() else 0o600)
        job(home, room)
        path.chmod(before)
        found = modes(room)
        assert found
        for output, mode in found.items():
            full = 0o755 if (room / output).is_dir() else 0o644
            assert mode == (full & 0o700 if private else full), (private, output, oct(mode))


def test_what_replaces_a_private_output_is_private(home: Path) -> None:
    out = home / "out.safetensors"
    merge(home / "base.safetensors", home / "one", out)
    out.chmod(0o600)
    merge(home / "base.safetensors", home / "two", out, overwrite=True)
    assert {out.stat().st_mode & 0o777, Path(f"{out}.manifest.json").stat().st_mode & 0o777} == {
        0o600
    }
    convert(home / "one", home / "x", "peft")
    (home / "x" / "adapter_model.safetensors").chmod(0o600)
    convert(home / "two", home / "x", "peft", overwrite=True)
    assert set(modes(home / "x").values()) == {0o600}


def test_a_program_and_its_onnx_are_as_private_as_the_config(home: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Linear(W, W)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x)

    torch.export.save(torch.export.export(Net(), (torch.zeros(1, W),)), home / "net.pt2")
    config = home / "two" / "adapter_config.json"
    config.chmod(0o600)
    (home / "room").mkdir()
    rewrite(home / "net.pt2", home / "room" / "x.pt2", config=config)
    assert modes(home / "room") == {"x.pt2": 0o600}
    with atomic.outputs(home / "room" / "x.onnx", beside=[".data"], inputs=[config]) as folder:
        for name in ("x.onnx", "x.onnx.data"):
            (folder / name).write_text("")
    assert set(modes(home / "room").values()) == {0o600} and len(modes(home / "room")) == 3


def test_while_it_is_written_nobody_else_may_enter(tmp_path: Path) -> None:
    with atomic.output(tmp_path / "x") as path:
        assert path.parent.stat().st_mode & 0o077 == 0
        path.write_text("")


@pytest.mark.parametrize(
    ("mode", "own_group", "bits"),
    [
        (0o644, True, 0o777),
        (0o644, False, 0o777),
        (0o640, True, 0o770),
        (0o640, False, 0o700),  # the group of the output has others in it
        (0o600, True, 0o700),
        (0o604, True, 0o700),  # those of the input's group may not read it
    ],
)
def test_who_may_read_an_output(tmp_path: Path, mode: int, own_group: bool, bits: int) -> None:
    path = tmp_path / "x"
    path.write_text("")
    path.chmod(mode)
    group = path.stat().st_gid
    assert privacy.shared_bits([path], group if own_group else group + 1) == bits
    assert privacy.shared_bits([path, tmp_path / "gone"], group if own_group else group + 1) == bits
