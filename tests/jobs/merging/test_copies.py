"""What of a base's folder comes along, and which links, files and folders are refused before the work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptsurgery import merge, plan_merge, unmerge, verify_merge
from adaptsurgery.jobs.merging import copies
from adaptsurgery.jobs.merging.plan import MergePlan
from adaptsurgery.jobs.merging.run import run_plan
from adaptsurgery_formats.errors import SurgeryError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def write_base(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({"a.weight": torch.ones(8, 8)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    stem = "base_model.model.a.lora"
    tensors = {f"{stem}_A.weight": torch.ones(2, 8), f"{stem}_B.weight": torch.ones(8, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "key.txt").write_text("private")
    return folder


def refused(call: Callable[[], object]) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        call()
    return caught.value


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


STRAYS: dict[str, Callable[[Path, Path], None]] = {
    "a file": lambda base, secret: (base / "vocab.txt").symlink_to(secret / "key.txt"),
    "a folder": lambda base, secret: (base / "assets").symlink_to(secret),
    "by a relative path": lambda base, _: (base / "vocab.txt").symlink_to("../secret/key.txt"),
    "by a link within": lambda base, secret: (
        (base / ".hidden").symlink_to(secret),
        (base / "vocab.txt").symlink_to(".hidden/key.txt"),
    )[0],
    "deeper": lambda base, secret: (
        (base / "tokenizer").mkdir(),
        (base / "tokenizer" / "merges.txt").symlink_to(secret / "key.txt"),
    )[0],
    "nowhere": lambda base, _: (base / "README.md").symlink_to("nowhere"),
    "itself": lambda base, _: (base / "README.md").symlink_to("README.md"),
    "a device": lambda base, _: (base / "tokenizer.json").symlink_to("/dev/zero"),
    "the base's own folder's neighbour": lambda base, _: (
        write_base(base.with_name("base2")),
        (base / "other.json").symlink_to("../base2/config.json"),
    )[1],
}


@pytest.mark.parametrize("kind", STRAYS)
def test_links_that_lead_out(
    kind: str, base: Path, adapter: Path, secret: Path, tmp_path: Path
) -> None:
    STRAYS[kind](base, secret)
    out = tmp_path / "out"
    for dry in (False, True):
        error = refused(lambda: merge(base, adapter, out, dry_run=dry))  # noqa: B023
        assert error.code == "link-outside" and len(error.items) == 1 and "→" in error.items[0]
    assert not out.exists() and not list(tmp_path.glob(".adaptsurgery*"))
    for job in (merge, unmerge):
        report = job(base, adapter, out, skip_links=True, overwrite=True)
        assert [n.where for n in report.notes if n.code == "links-left-out"] == [str(base)]
        wanted = {"model.safetensors", "config.json", "adaptsurgery_manifest.json"}
        assert names(out) == wanted and not any(p.is_symlink() for p in out.rglob("*"))
    merge(base, adapter, out, skip_links=True, overwrite=True)
    verify_merge(out, base, adapter)  # which copies nothing, and refuses nothing


def test_links_within_the_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / "text").mkdir()
    (base / "text" / "vocab.txt").write_text("words")
    (base / "vocab.txt").symlink_to("text/vocab.txt")
    (base / "again").symlink_to("text")
    (base / "text" / "loop").symlink_to(".")
    (base / "up").symlink_to(base)
    merge(base, adapter, tmp_path / "out")
    assert (tmp_path / "out/vocab.txt").read_text() == "words"
    assert (tmp_path / "out/again/vocab.txt").read_text() == "words"


def test_weights_are_read_wherever_they_lie(base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").rename(tmp_path / "weights")
    (base / "model.safetensors").symlink_to("../weights")
    merge(base, adapter, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["a.weight"],
                       torch.full((8, 8), 3.0))  # fmt: skip


def snapshot(cache: Path) -> Path:
    """A model as the Hub's cache has it: links into the repository's blobs."""
    made = write_base(cache / "made")
    repository = cache / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    place = repository / "snapshots" / ("c" * 40)
    place.mkdir(parents=True)
    for number, file in enumerate(sorted(made.iterdir())):
        file.rename(repository / "blobs" / f"{number:040}")
        (place / file.name).symlink_to(f"../../blobs/{number:040}")
    return place


def test_the_hubs_cache(adapter: Path, secret: Path, tmp_path: Path) -> None:
    place = snapshot(tmp_path / "hub")
    merge(place, adapter, tmp_path / "out")
    assert (tmp_path / "out/config.json").read_text() == "{}"
    (tmp_path / "link").symlink_to(place)
    merge(tmp_path / "link", adapter, tmp_path / "out2")
    other = tmp_path / "hub" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "x").write_text("of another repository")
    (place / "x.txt").symlink_to("../../../models--org--other/blobs/x")
    assert refused(lambda: plan_merge(place, adapter)).code == "link-outside"
    (place / "x.txt").unlink()
    blobs = place.parent.parent / "blobs"
    (blobs / "k").symlink_to(secret / "key.txt")
    (place / "k.txt").symlink_to("../../blobs/k")
    assert refused(lambda: plan_merge(place, adapter)).code == "link-outside"


def test_no_blobs_but_the_repositorys_own(adapter: Path, secret: Path, tmp_path: Path) -> None:
    """A folder that is laid out like a cache, whose blobs are a link to a stranger's folder."""
    place = write_base(tmp_path / "repo" / "snapshots" / "main")
    (tmp_path / "repo" / "blobs").symlink_to(secret)
    (place / "k.txt").symlink_to("../../blobs/key.txt")
    assert refused(lambda: plan_merge(place, adapter)).code == "link-outside"


def test_a_config_that_is_left_out_is_not_changed(adapter: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (tmp_path / "config").write_text('{"torch_dtype": "float32"}')
    (base / "config.json").unlink()
    (base / "config.json").symlink_to("../config")
    merge(base, adapter, tmp_path / "out", dtype="bf16", skip_links=True)
    assert names(tmp_path / "out") == {"model.safetensors", "adaptsurgery_manifest.json"}


@pytest.mark.parametrize("name", ["tokenizer.json", "x.txt", "text/x"])
def test_pipes(name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / name).parent.mkdir(exist_ok=True)
    os.mkfifo(base / name)
    error = refused(lambda: merge(base, adapter, tmp_path / "out"))
    assert error.code == "not-a-file" and name in error.where and not (tmp_path / "out").exists()


def test_folders_that_have_no_end(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "MOST_FILES", 20)
    for number in range(18):
        (base / f"{number}.txt").write_text("")
    merge(base, adapter, tmp_path / "out")
    (base / "more.txt").write_text("")
    assert refused(lambda: plan_merge(base, adapter)).code == "too-many-files"
    monkeypatch.undo()
    (base / "/".join("d" * 40)).mkdir(parents=True)
    assert refused(lambda: plan_merge(base, adapter)).code == "too-many-files"


def test_links_that_multiply(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that link to one another have as many paths as there are orders of them."""
    monkeypatch.setattr(copies, "MOST_FILES", 500)
    for here in "abcdefghi":
        (base / here).mkdir()
        for there in "abcdefghi":
            (base / here / there).symlink_to(f"../{there}")
    assert refused(lambda: plan_merge(base, adapter)).code == "too-many-files"


def test_more_bytes_than_a_model_has_beside_its_weights(base: Path, adapter: Path) -> None:
    with open(base / "big.bytes", "wb") as file:
        file.truncate(copies.MOST_BYTES + 1)
    error = refused(lambda: merge(base, adapter, base.with_name("out"), dry_run=True))
    assert error.code == "too-many-files"


ESCAPES = ["../x", "/x", "a/../../x", "", "a//x", "a/.", "x\0"]


@pytest.mark.parametrize("name", ESCAPES)
def test_plans_that_would_write_or_copy_outside(name: str, base: Path, adapter: Path) -> None:
    plan = plan_merge(base, adapter)
    data = json.loads(plan.to_json())
    for change in ({"copies": [name]}, {"indexes": {name: ""}},
                   {"jobs": [{**data["jobs"][0], "name": name}]}):  # fmt: skip
        with pytest.raises(SurgeryError) as caught:
            MergePlan.from_json(json.dumps(data | change))
        assert caught.value.code == "path-escapes"
    for built in (lambda: replace(plan, copies=(name,)),
                  lambda: replace(plan, jobs=(replace(plan.jobs[0], name=name),))):  # fmt: skip
        assert refused(built).code == "path-escapes"
    if name:
        lone = json.loads(plan_merge(base / "model.safetensors", adapter).to_json())
        lone["jobs"][0]["name"] = name
        assert refused(lambda: MergePlan.from_json(json.dumps(lone))).code == "path-escapes"


def test_a_link_that_came_after_the_plan(base: Path, adapter: Path, secret: Path) -> None:
    (base / "vocab.txt").write_text("words")
    plan, out = plan_merge(base, adapter), base.with_name("out")
    (base / "vocab.txt").unlink()
    (base / "vocab.txt").symlink_to(secret / "key.txt")
    assert refused(lambda: run_plan(plan, out)).code == "link-outside"
    assert not out.exists()
