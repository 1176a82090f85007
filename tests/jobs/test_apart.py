"""No command replaces what it reads: each command, each input, each kind of output, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import adaptsurgery
from adaptsurgery.checkpoint import apart
from adaptsurgery.checkpoint.apart import files_read, keep_apart
from adaptsurgery_formats.errors import SurgeryError

CODES = {"output-is-source", "output-is-input", "output-is-base"}
Job = Callable[["Room", dict[str, Any]], object]


class Room:
    """A model in a file, in a folder and behind an index of another name, and two adapters of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.weights = {f"{n}.weight": torch.full((8, 8), float(i)) for i, n in enumerate("ab")}
        self.base, self.tuned = root / "base.safetensors", root / "tuned.safetensors"
        save_file(self.weights, self.base)
        save_file({k: v + torch.eye(8) for k, v in self.weights.items()}, self.tuned)
        self.folder = self.sharded(root / "folder", "model")
        self.index = self.sharded(root / "other", "another") / "another.safetensors.index.json"
        save_file(self.weights, self.index.parent / "model.safetensors")
        self.first, self.second = (self.adapter(root / name) for name in ("first", "second"))
        self.program = root / "program.pt2"
        self.program.write_bytes(b"PK, and never read as far as the second byte")

    def sharded(self, folder: Path, stem: str) -> Path:
        folder.mkdir()
        shards = {k: f"{stem}-0000{i}-of-00002.safetensors" for i, k in enumerate(self.weights, 1)}
        for key, name in shards.items():
            save_file({key: self.weights[key]}, folder / name)
        index = {"metadata": {}, "weight_map": shards}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text("{}")
        return folder

    def adapter(self, folder: Path) -> Path:
        folder.mkdir()
        stem = "base_model.model.a.lora"
        tensors = {f"{stem}_A.weight": torch.ones(2, 8), f"{stem}_B.weight": torch.ones(8, 2)}
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    def contents(self) -> dict[str, bytes]:
        files = (p for p in sorted(self.root.rglob("*")) if p.is_file())
        return {p.relative_to(self.root).as_posix(): p.read_bytes() for p in files}

    def shard(self, folder: Path) -> Path:
        return sorted(folder.glob("*-00001-of-00002.safetensors"))[0]


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


def weights_of(adapter: Path) -> Path:
    return adapter / "adapter_model.safetensors"


def config_of(adapter: Path) -> Path:
    return adapter / "adapter_config.json"


def convert(source: Path, base: Path) -> Job:
    return lambda _, given: adaptsurgery.convert(
        source, given.pop("out"), "kohya", base=base, **given
    )


def cases(room: Room) -> Iterator[tuple[str, Job, list[Path]]]:
    """A command, and what it reads."""
    first, second, base, index = room.first, room.second, room.base, room.index
    shards = [room.shard(index.parent), index]
    yield "convert file", convert(weights_of(first), base), [config_of(first), base]
    yield "convert index", convert(first, index), [*shards, weights_of(first), config_of(first)]
    yield "convert folder", convert(first, room.folder), [
        room.shard(room.folder), room.folder / "config.json",
    ]  # fmt: skip
    yield (
        "combine",
        lambda _, given: adaptsurgery.combine(
            [first, second], given.pop("out"), to="kohya", base=index, **given
        ),
        [*shards, config_of(second), weights_of(second)],
    )
    yield (
        "resize",
        lambda _, given: adaptsurgery.resize(
            weights_of(first), given.pop("out"), rank=1, to="kohya", base=index, **given
        ),
        [*shards, config_of(first)],
    )
    for model, reads in ((index, shards), (room.folder, [room.shard(room.folder)])):
        yield (
            "extract",
            lambda _, given, model=model: adaptsurgery.extract(
                model, room.tuned, given.pop("out"), rank=1, to="kohya", **given
            ),
            [*reads, room.tuned],
        )
    yield (
        "merge",
        lambda _, given: adaptsurgery.merge(base, weights_of(first), given.pop("out"), **given),
        [base, config_of(first), weights_of(first)],
    )
    yield (
        "unmerge",
        lambda _, given: adaptsurgery.unmerge(
            base, first, given.pop("out"), against=index, **given
        ),
        [*shards, base, weights_of(first)],
    )
    yield (
        "unmerge against a file",
        lambda _, given: adaptsurgery.unmerge(
            base, first, given.pop("out"), against=room.tuned, **given
        ),
        [room.tuned],
    )
    for what in ({"adapter": first, "base": index}, {"adapter": weights_of(first), "base": base}):
        for option in ("out", "onnx"):
            yield (
                f"rewrite {option}",
                lambda _, given, what=what, option=option: adaptsurgery.rewrite(
                    room.program, **{option: given.pop("out")}, **what, **given
                ),
                [config_of(first), room.program, *(shards if what["base"] == index else [base])],
            )
    yield (
        "rewrite --config",
        lambda _, given: adaptsurgery.rewrite(
            room.program, given.pop("out"), config=first, **given
        ),
        [config_of(first), room.program],
    )


def refused(room: Room, job: Job, out: Path, **given: Any) -> str:
    before = room.contents()
    with pytest.raises(SurgeryError) as caught:
        job(room, {"out": out, **given})
    assert room.contents() == before, f"{out} was touched"
    return caught.value.code


def test_no_command_writes_onto_what_it_reads(room: Room) -> None:
    for name, job, reads in cases(room):
        for path in reads:
            for given in ({"overwrite": True}, {"overwrite": True, "dry_run": True}, {}):
                assert refused(room, job, path, **given) in CODES, (name, path, given)


def test_no_spelling_of_a_path_hides_it(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link in the way, `..`, a relative path, a hard link, a target that a link of the input has."""
    job, file = convert(weights_of(room.first), room.base), config_of(room.first)
    (room.root / "link").symlink_to(room.first)
    os.link(file, room.root / "hard.json")
    monkeypatch.chdir(room.root)
    ways = [
        room.root / "link" / file.name, Path("first/../first") / file.name,
        Path("first/.") / file.name, room.root / "hard.json", Path("link/../first") / file.name,
    ]  # fmt: skip
    for way in ways:
        assert refused(room, job, way, overwrite=True) == "output-is-source", way
    blob = room.root / "blob"
    shard = room.shard(room.index.parent)
    shutil.move(shard, blob)
    shard.symlink_to("../blob")
    assert refused(room, convert(room.first, room.index), blob, overwrite=True) in CODES
    assert refused(room, convert(room.first, room.index.parent), shard, overwrite=True) in CODES


def test_a_report_replaces_nothing(room: Room) -> None:
    for model in (room.folder, room.index):
        for path in (model if model.is_file() else next(model.glob("*.index.json")),
                     model / "config.json"):  # fmt: skip
            if path.exists():
                job: Job = lambda _, given, model=model: adaptsurgery.extract(  # noqa: E731
                    model, room.tuned, room.root / "made", rank=1, report=given.pop("out"), **given
                )
                assert refused(room, job, path, overwrite=True) == "output-is-source", path


def test_two_outputs_are_two(room: Room) -> None:
    (room.root / "link").symlink_to(room.root)
    out, twin = room.root / "r.json", room.root / "link" / "r.json"
    with pytest.raises(SurgeryError) as caught:
        adaptsurgery.extract(room.base, room.tuned, out, rank=1, to="kohya", report=twin)
    assert caught.value.code == "output-exists"
    for other in (twin, room.root / "x.onnx.data"):
        onnx = room.root / "x.onnx" if other.suffix == ".data" else out
        with pytest.raises(SurgeryError) as caught:
            adaptsurgery.rewrite(room.program, other, adapter=room.first, onnx=onnx)
        assert caught.value.code == "output-exists"
    assert not out.exists()


def test_weights_beside_an_onnx_file_replace_nothing(room: Room) -> None:
    data = room.root / "x.onnx.data"
    shutil.move(weights_of(room.second), data)
    job: Job = lambda _, given: adaptsurgery.rewrite(  # noqa: E731
        room.program, adapter=data, onnx=given.pop("out"), **given
    )
    assert refused(room, job, room.root / "x.onnx", overwrite=True) == "output-is-input"


def test_a_manifest_replaces_nothing(room: Room) -> None:
    adapter = room.root / "o.safetensors.manifest.json"
    shutil.move(room.base, room.root / "b.safetensors")
    manifest = {"job": "merge", "weight_map": {}}
    adapter.write_text(json.dumps(manifest))
    with pytest.raises(SurgeryError) as caught:
        keep_apart([adapter], [room.root / "o.safetensors", adapter], code="output-is-input")
    assert caught.value.code == "output-is-input"


def test_what_is_not_read_may_be_replaced(room: Room) -> None:
    """An earlier output beside the inputs, and new names in a base's folder, as ever."""
    beside = room.index.parent / "model.safetensors"  # of the folder, not of the index
    adaptsurgery.convert(room.first, beside, "kohya", base=room.index, overwrite=True)
    adaptsurgery.convert(room.first, room.folder / "new.safetensors", "kohya", base=room.folder)
    out = room.first / "merged.safetensors"
    adaptsurgery.merge(room.base, weights_of(room.first), out)
    adaptsurgery.merge(room.base, weights_of(room.first), out, overwrite=True)


def test_what_is_read_of_a_folder_and_of_a_file(room: Room) -> None:
    assert set(files_read(weights_of(room.first))) == {
        weights_of(room.first), config_of(room.first),
    }  # fmt: skip
    (room.folder / "notes.html").write_text("")
    named = {path.name for path in files_read(room.folder)}
    assert named == {p.name for p in room.folder.iterdir()} - {"notes.html"}
    assert {p.name for p in files_read(room.index)} == {
        room.index.name, *(f"another-0000{i}-of-00002.safetensors" for i in (1, 2)),
    }  # fmt: skip


def test_file_systems_that_know_no_case(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they fold names, two spellings of a new one are one; elsewhere they are two."""
    names = [room.root / "Out.JSON", room.root / "out.json"]
    keep_apart([], names)
    accents = [room.root / "\u00e9", room.root / "e\u0301"]
    keep_apart([], accents)
    monkeypatch.setattr(apart, "_folds", lambda _: True)
    for pair in (names, accents, [room.root / "\u00e9", room.root / "\u00c9"]):
        with pytest.raises(SurgeryError) as caught:
            keep_apart([], pair)
        assert caught.value.code == "output-exists"
