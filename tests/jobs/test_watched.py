"""What is read must stay as it is: every job, every file that it reads, every way to change one.

The change comes in the middle of the work, through a call that each job makes late: the one that
puts an output in its place, or gives a verdict. Whoever reads lazily would write a mixture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import adaptsurgery
from adaptsurgery.adapters.comparing import VerificationError
from adaptsurgery.checkpoint import watched
from adaptsurgery.jobs.resize import resize
from adaptsurgery_formats.errors import SurgeryError

SIZE = 8


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


class Inputs:
    """A base in two shards, its fine-tune, a PEFT folder and a kohya file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base, self.tuned = root / "base", root / "tuned"
        for folder, shift in ((self.base, 0.0), (self.tuned, 0.01)):
            self._model(folder, shift)
        self.peft = root / "peft"
        self.peft.mkdir()
        rows = {"lora_A": numbers(2, SIZE), "lora_B": numbers(SIZE, 2)}
        state = {
            f"base_model.model.{n}.{k}.weight": t.clone() for n in "ab" for k, t in rows.items()
        }
        save_file(state, self.peft / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["a", "b"]}
        (self.peft / "adapter_config.json").write_text(json.dumps(config))
        self.kohya = root / "kohya.safetensors"
        down, up = numbers(2, SIZE), numbers(SIZE, 2)
        flat = {"lora_unet_a.lora_down.weight": down, "lora_unet_a.lora_up.weight": up}
        save_file({**flat, "lora_unet_a.alpha": torch.tensor(2.0)}, self.kohya)

    def _model(self, folder: Path, shift: float) -> None:
        folder.mkdir()
        index = {}
        for number, name in enumerate("ab"):
            shard = f"model-0000{number + 1}-of-00002.safetensors"
            save_file({f"{name}.weight": numbers(SIZE, SIZE) + shift}, folder / shard)
            index[f"{name}.weight"] = shard
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        (folder / "config.json").write_text(json.dumps({"model_type": "none"}))
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(tmp_path)


OUT = "out"
KOHYA = {"to": "kohya"}
SHARD = "base/model-00002-of-00002.safetensors"
INDEX, CONFIG, TOKENIZER = (
    f"base/{name}" for name in ("model.safetensors.index.json", "config.json", "tokenizer.json")
)
FOLDER = ("peft/adapter_model.safetensors", "peft/adapter_config.json")


def out(at: Inputs, name: str = OUT) -> Path:
    return at.root / name


def merged(at: Inputs) -> Path:
    place = out(at, "merged")
    adaptsurgery.merge(at.base, at.peft, place)
    return place


JOBS: dict[str, tuple[Callable[[Inputs], Any], tuple[str, ...]]] = {
    "convert": (
        lambda at: adaptsurgery.convert(at.peft, out(at, "o.safetensors"), "kohya", base=at.base),
        (*FOLDER, SHARD, INDEX, CONFIG),
    ),
    "convert a file": (
        lambda at: adaptsurgery.convert(at.kohya, out(at), "peft", base=at.base),
        ("kohya.safetensors",),
    ),
    "combine": (
        lambda at: adaptsurgery.combine([at.peft, at.kohya], out(at), base=at.base),
        (*FOLDER, "kohya.safetensors", SHARD),
    ),
    "resize": (lambda at: resize(at.peft, out(at), rank=1, base=at.base), (*FOLDER, SHARD)),
    "merge": (
        lambda at: adaptsurgery.merge(at.base, at.peft, out(at)),
        (*FOLDER, SHARD, INDEX, CONFIG, TOKENIZER),
    ),
    "unmerge": (
        lambda at: adaptsurgery.unmerge(at.base, at.peft, out(at)),
        (*FOLDER, SHARD, INDEX, CONFIG, TOKENIZER),
    ),
    "extract": (
        lambda at: adaptsurgery.extract(at.base, at.tuned, out(at), rank=1),
        (SHARD, "tuned/model-00001-of-00002.safetensors", INDEX, "tuned/config.json"),
    ),
    "verify": (
        lambda at: adaptsurgery.verify(at.peft, at.kohya, base=at.base),
        (*FOLDER, "kohya.safetensors", SHARD),
    ),
    "inspect": (lambda at: adaptsurgery.inspect(at.peft, base=at.base), (*FOLDER, SHARD)),
}


def overwritten(path: Path) -> None:
    """In place, of the same length, with its old time put back: only ctime tells."""
    stat = path.stat()
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\n")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def longer(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b" ")


def replaced(path: Path) -> None:
    """By a file of the same bytes, length and time."""
    beside, stat = path.with_name("beside"), path.stat()
    beside.write_bytes(path.read_bytes())
    os.utime(beside, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(beside, path)


def touched(path: Path) -> None:
    os.utime(path, (1, 1))


WAYS = (overwritten, longer, replaced, touched, Path.unlink)


def late(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> list[int]:
    """Let ``change`` happen once, when the first look at what was watched is due."""
    done: list[int] = []
    check = watched.check_watched

    def checked(*given: Any) -> None:
        if not done:
            done.append(1)
            change()
        check(*given)

    places = (
        "checkpoint.watched", "adapters.writing", "adapters.adapter", "jobs.merging.run",
        "jobs.extract.extract",
    )  # fmt: skip
    for place in places:
        monkeypatch.setattr(f"adaptsurgery.{place}.check_watched", checked)
    return done


CASES = [(job, path) for job, (_, paths) in JOBS.items() for path in paths]


@pytest.mark.parametrize(("job", "path"), CASES, ids=lambda given: str(given))
def test_every_file_that_a_job_reads(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, job: str, path: str
) -> None:
    way = WAYS[CASES.index((job, path)) % len(WAYS)]
    done = late(monkeypatch, lambda: way(inputs.root / path))
    before = {p for p in inputs.root.iterdir() if p.name[0] != "."}
    with pytest.raises(SurgeryError) as error:
        JOBS[job][0](inputs)
    assert done and error.value.code == "input-changed"
    assert os.path.basename(path) in error.value.where
    assert {p for p in inputs.root.iterdir() if p.name[0] != "."} == before


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("job", ["convert", "merge", "extract", "verify"])
def test_every_way_to_change_a_file(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, job: str, way: Callable[[Path], object]
) -> None:
    late(monkeypatch, lambda: way(inputs.root / SHARD))
    with pytest.raises(SurgeryError, match="input-changed"):
        JOBS[job][0](inputs)


@pytest.mark.parametrize("job", JOBS)
def test_what_leaves_the_bytes_alone_is_no_change(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    """A backup that links, rights that change, and a reader."""

    def harmless() -> None:
        for path in JOBS[job][1]:
            (inputs.root / path).read_bytes()
            os.link(inputs.root / path, inputs.root / f".{path.replace('/', '-')}")
        (inputs.root / JOBS[job][1][0]).chmod(0o600)

    done = late(monkeypatch, harmless)
    with suppress(VerificationError):  # of two that are not the same: a verdict all the same
        JOBS[job][0](inputs)
    assert done


def test_a_verdict_on_a_merge_is_of_files_that_stay(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = merged(inputs)
    assert adaptsurgery.verify_merge(place, inputs.base, inputs.peft).rows
    shard = place / "model-00001-of-00002.safetensors"
    late(monkeypatch, lambda: overwritten(shard))
    with pytest.raises(SurgeryError, match="input-changed"):
        adaptsurgery.verify_merge(place, inputs.base, inputs.peft)


def test_what_was_loaded_and_changed_gives_no_update(inputs: Inputs) -> None:
    adapter = adaptsurgery.load(inputs.peft)
    assert adapter["a"].scale == 2
    overwritten(inputs.peft / "adapter_model.safetensors")
    with pytest.raises(SurgeryError, match="input-changed"):
        adapter["a"]
    with pytest.raises(SurgeryError, match="input-changed"):
        adapter.save(inputs.root / "saved")
    model = torch.nn.ModuleDict({n: torch.nn.Linear(SIZE, SIZE) for n in "ab"})
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(SurgeryError, match="input-changed"):
        adaptsurgery.fold(model, adapter)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_pickle_is_read_where_it_lies_and_watched(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickle = inputs.root / "kohya.pt"
    down, up = numbers(2, SIZE), numbers(SIZE, 2)
    torch.save({"lora_unet_a.lora_down.weight": down, "lora_unet_a.lora_up.weight": up}, pickle)
    late(monkeypatch, lambda: touched(pickle))
    with pytest.raises(SurgeryError, match="input-changed"):
        adaptsurgery.convert(pickle, out(inputs), "peft", base=inputs.base)
    assert not out(inputs).exists()


def test_the_first_look_counts_and_the_notes_go_outwards(tmp_path: Path) -> None:
    from adaptsurgery.checkpoint import system

    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.write_bytes(b"1")
    with watched.watching() as outer:
        system.read_file(first)
        with watched.watching() as inner:
            system.read_file(second)
        assert set(inner) == {str(second)} and len(outer) == 2
        longer(first)
        system.read_file(first)
    assert outer[str(first)].size == 1
    with pytest.raises(SurgeryError, match="input-changed"):
        watched.check_watched(outer)
    system.read_file(second)
    assert len(outer) == 2, "nobody watches any more"
