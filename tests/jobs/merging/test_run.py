"""How a merge is carried out: dry runs, parts, kills, what is refused, what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from unix import needs

from adaptsurgery.adapters.comparing import VerificationError
from adaptsurgery.jobs.merging import run
from adaptsurgery.jobs.merging.check import verify_merge
from adaptsurgery.jobs.merging.merge import merge, plan_merge, unmerge
from adaptsurgery.jobs.merging.plan import MergePlan
from adaptsurgery.jobs.merging.recipe import MergeRecipe
from adaptsurgery.jobs.merging.run import check_plan, run_plan
from adaptsurgery_formats.errors import SurgeryError

LAYERS, WIDTH = 6, 16


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def write_base(folder: Path, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> Path:
    """A folder of three shards, two layers each, with an index, a config and a tokenizer."""
    folder.mkdir()
    weights: dict[str, str] = {}
    for shard in range(3):
        name = f"model-{shard + 1:05}-of-00003.safetensors"
        tensors = {
            f"model.layers.{n}.{part}.weight": numbers(10 * n + k, width, width, dtype=dtype)
            for n in (2 * shard, 2 * shard + 1)
            for k, part in enumerate(("q_proj", "v_proj"))
        }
        save_file(tensors, folder / name, {"format": "pt"})
        weights |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama", "dtype": "float32"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("kept")
    return folder


def write_adapter(
    file: Path, layers: range = range(LAYERS), width: int = WIDTH, r: int = 2
) -> Path:
    tensors = {}
    for n in layers:
        stem = f"model.layers.{n}.q_proj."
        tensors[f"{stem}lora_up.weight"] = numbers(100 + n, width, r)
        tensors[f"{stem}lora_down.weight"] = numbers(200 + n, r, width)
        tensors[f"{stem}alpha"] = torch.tensor(1.0)
    save_file(
        {
            f"lycoris_{k.partition('.lora')[0].partition('.alpha')[0].replace('.', '_')}."
            + k.split("q_proj.")[1]: v
            for k, v in tensors.items()
        },
        file,
    )
    return file


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    return write_base(tmp_path / "base"), write_adapter(tmp_path / "a.safetensors")


def folded(base: Path, adapter: Path, weight: float = 1.0) -> dict[str, torch.Tensor]:
    """The plain mathematics in float64."""
    out = contents(base)
    held = load_file(adapter)
    for name in list(out):
        stem = "lycoris_" + name.removesuffix(".weight").replace(".", "_")
        if f"{stem}.lora_up.weight" in held:
            up, down = (held[f"{stem}.lora_{s}.weight"].double() for s in ("up", "down"))
            out[name] = out[name].double() + weight * 0.5 * (up @ down)
    return out


def contents(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def left_behind(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".adaptsurgery")]


def refusal(*arguments: Any, **options: Any) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        merge(*arguments, **options)
    return caught.value


def test_a_folder_becomes_a_folder(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    before = {p: p.read_bytes() for p in base.rglob("*") if p.is_file()}
    report = merge(base, f"{adapter}=0.5", tmp_path / "out")
    assert report.verdict.startswith("6/6 modules")
    for name, wanted in folded(base, adapter, 0.5).items():
        torch.testing.assert_close(contents(tmp_path / "out")[name].double(), wanted.double())
    assert (tmp_path / "out/extra/notes.txt").read_text() == "kept"
    assert {p: p.read_bytes() for p in before} == before
    assert not left_behind(tmp_path)
    manifest = json.loads((tmp_path / "out/adaptsurgery_manifest.json").read_text())
    assert manifest["adapters"][0]["weight"] == 0.5 and len(manifest["norms"]) == 6
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in contents(base).values())


def test_a_file_becomes_a_file(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    file = base / "model-00001-of-00003.safetensors"
    adapter = write_adapter(tmp_path / "two.safetensors", range(2))
    report = merge(file, adapter, tmp_path / "out.safetensors")
    assert report.outputs == [
        str(tmp_path / "out.safetensors"),
        str(tmp_path / "out.safetensors.manifest.json"),
    ]
    assert all(Path(p).is_file() for p in report.outputs)
    assert refusal(file, adapter, tmp_path / "out.safetensors").code == "output-exists"
    merge(file, f"{adapter}=2", tmp_path / "out.safetensors", overwrite=True)
    assert verify_merge(tmp_path / "out.safetensors", file, f"{adapter}=2").rows
    with pytest.raises(VerificationError):
        verify_merge(tmp_path / "out.safetensors", file, adapter)


def test_untouched_shards_are_the_same_bytes(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = inputs
    adapter = write_adapter(tmp_path / "one.safetensors", range(1))
    report = merge(base, adapter, tmp_path / "out")
    assert report.facts["untouched_shards"] == 2
    for name in ("model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp64_is_one_rounding_of_the_exact_result(dtype: torch.dtype, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", dtype)
    adapter = write_adapter(tmp_path / "a.safetensors")
    merge(base, adapter, tmp_path / "out", compute="fp64")
    got = contents(tmp_path / "out")
    for name, wanted in folded(base, adapter).items():
        assert torch.equal(got[name], wanted.to(dtype)), name


def test_another_dtype_and_other_shards(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    merge(base, adapter, tmp_path / "out", dtype="bf16", max_shard_size=2000)
    got = contents(tmp_path / "out")
    assert {t.dtype for t in got.values()} == {torch.bfloat16}
    shards = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == 4 and shards[0] == "model-00001-of-00004.safetensors"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    merge(base, adapter, tmp_path / "one", max_shard_size=1 << 20)
    assert [p.name for p in (tmp_path / "one").glob("model*")] == ["model.safetensors"]
    assert verify_merge(tmp_path / "one", base, adapter).rows


def test_a_dry_run_writes_nothing_and_needs_no_torch(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = inputs
    code = (
        "import sys; from adaptsurgery.jobs.merging.merge import merge\n"
        f"r = merge({str(base)!r}, [{str(adapter)!r}], {str(tmp_path / 'out')!r}, dry_run=True)\n"
        "assert r.facts['modules'] == 6 and r.facts['predicted_peak_memory'] < 1 << 30\n"
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert not (tmp_path / "out").exists() and not left_behind(tmp_path)


def test_a_plan_goes_through_json(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    plan = plan_merge(base, [adapter])
    again = MergePlan.from_json(plan.to_json())
    assert again == plan and again.digest == plan.digest
    assert plan_merge(base, [f"{adapter}=2"]).digest != plan.digest
    assert plan_merge(base, [adapter], MergeRecipe(dtype="bf16")).digest != plan.digest
    complete, norms = run_plan(again, tmp_path / "out")
    assert complete and len(norms) == 6
    assert verify_merge(tmp_path / "out", base, adapter).rows
    with pytest.raises(SurgeryError, match="bad-plan"):
        MergePlan.from_json("{}")


def test_parts_of_a_plan_in_any_order(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    for part in (2, 0):
        report = merge(base, adapter, tmp_path / "out", shard_index=part, num_shards=3)
        assert not report.facts["complete"] and not (tmp_path / "out").exists()
    report = merge(base, adapter, tmp_path / "out", shard_index=1, num_shards=3)
    assert report.facts["complete"] and not left_behind(tmp_path)
    assert verify_merge(tmp_path / "out", base, adapter).rows


def test_finished_shards_are_kept_by_the_next_run(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs
    merge(base, adapter, tmp_path / "out", shard_index=0, num_shards=3)
    (partial,) = left_behind(tmp_path)
    shard = tmp_path / partial / "files/model-00001-of-00003.safetensors"
    inode = shard.stat().st_ino
    merge(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / shard.name).stat().st_ino == inode


@pytest.mark.parametrize("after", [0.0, 0.02, 0.06, 0.15])
def test_a_kill_leaves_the_old_output_and_the_rerun_completes(after: float, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", width=768)
    adapter = write_adapter(tmp_path / "a.safetensors", width=768)
    out = tmp_path / "out"
    merge(base, f"{adapter}=3", out)
    old = contents(out)
    code = (
        "import torch, sys; import adaptsurgery.checkpoint.stream, adaptsurgery.algorithms\n"
        "from adaptsurgery.jobs.merging.merge import merge; print('ready', flush=True)\n"
        f"merge({str(base)!r}, [{str(adapter)!r}], {str(out)!r}, overwrite=True)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout and child.stdout.readline()
    time.sleep(after)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    now = contents(out)
    names = sorted(now)
    assert names == sorted(old)
    kept = all(torch.equal(now[n], old[n]) for n in names)
    if not kept:  # killed after the rename: then it is the new one, whole
        assert verify_merge(out, base, adapter).rows
    del now, old  # which have files mapped that are replaced next
    merge(base, adapter, out, overwrite=True)
    assert verify_merge(out, base, adapter).rows and not left_behind(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("folder", [False, True])
def test_a_kill_right_after_the_rename_is_mended(
    folder: bool, overwrite: bool, tmp_path: Path
) -> None:
    """The partial output then holds the old one, or nothing; it must not come back."""
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a.safetensors", range(LAYERS if folder else 2))
    base = base if folder else base / "model-00001-of-00003.safetensors"
    out = tmp_path / ("out" if folder else "out.safetensors")
    if overwrite:
        merge(base, f"{adapter}=3", out)
    code = (
        "import os; from adaptsurgery.jobs.merging import merge, run\n"
        "run._close = lambda *_: os._exit(9)\n"
        f"merge.merge({str(base)!r}, [{str(adapter)!r}], {str(out)!r}, overwrite={overwrite})"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert left_behind(tmp_path) and verify_merge(out, base, adapter).rows
    report = merge(base, adapter, out, overwrite=overwrite)
    assert report.facts["complete"] and not left_behind(tmp_path)
    told = verify_merge(out, base, adapter)
    assert told.rows and not told.notes and Path(report.outputs[1]).is_file()


def test_a_kill_while_the_rest_is_removed_keeps_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norms of the shards may be gone by then, and the manifest has them."""
    folder, adapter = (
        write_base(tmp_path / "base"),
        write_adapter(tmp_path / "a.safetensors", range(2)),
    )
    base, out = folder / "model-00001-of-00003.safetensors", tmp_path / "out.safetensors"

    def half(place: Any) -> None:
        for path in (place.root / "norms").iterdir():
            path.unlink()

    with monkeypatch.context() as patch:
        patch.setattr(run._Place, "remove", half)
        merge(base, adapter, out)
    wanted = Path(f"{out}.manifest.json").read_bytes()
    assert b"change" in wanted and left_behind(tmp_path)
    merge(base, adapter, out, overwrite=True)
    assert Path(f"{out}.manifest.json").read_bytes() == wanted and not left_behind(tmp_path)


@needs("fcntl")
def test_what_other_merges_left_is_named(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    merge(base, f"{adapter}=2", tmp_path / "out", shard_index=0, num_shards=3)
    (partial,) = left_behind(tmp_path)
    report = merge(base, adapter, tmp_path / "out")
    assert [n.where for n in report.notes if n.code == "abandoned"] == [str(tmp_path / partial)]
    with open(tmp_path / partial / "locks" / "0", "rb") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)  # somebody works on it
        report = merge(base, adapter, tmp_path / "out", overwrite=True)
    assert not report.notes
    merge(base, f"{adapter}=2", tmp_path / "out", overwrite=True)
    assert not left_behind(tmp_path)


def test_what_is_left_of_an_output_that_went_elsewhere_is_not_used(tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "a.safetensors")
    merge(base, f"{adapter}=3", tmp_path / "out")
    code = (
        "import os; from adaptsurgery.jobs.merging import merge, run\n"
        "run._close = lambda *_: os._exit(9)\n"
        f"merge.merge({str(base)!r}, [{str(adapter)!r}], {str(tmp_path / 'out')!r}, overwrite=True)"
    )
    subprocess.run([sys.executable, "-c", code])
    (tmp_path / "out").rename(tmp_path / "mine")
    merge(base, adapter, tmp_path / "out")
    assert verify_merge(tmp_path / "out", base, adapter).rows and not left_behind(tmp_path)


def test_one_plan_to_two_outputs(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    for name in ("one", "two"):
        merge(base, adapter, tmp_path / name, shard_index=0, num_shards=3)
    assert len(left_behind(tmp_path)) == 2
    for name in ("one", "two"):
        assert merge(base, adapter, tmp_path / name).facts["complete"]
        assert verify_merge(tmp_path / name, base, adapter).rows
    assert not left_behind(tmp_path)


def test_a_partial_that_vanished_is_not_taken_for_an_output(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs
    merge(base, f"{adapter}=2", tmp_path / "out")

    def gone(*_: Any) -> None:
        raise run.GoneError

    with monkeypatch.context() as patch:
        patch.setattr(run, "_finish", gone)
        error = refusal(base, adapter, tmp_path / "out", overwrite=True)
    assert error.code == "bad-partial" and error.next == "run again"


def test_more_parts_than_shards_and_late_parts(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    plan, out = plan_merge(base, [adapter]), tmp_path / "out"
    assert run_plan(plan, out, part=(4, 5)) == (False, {})
    assert not left_behind(tmp_path)
    told = [run_plan(plan, out, part=(n, 5)) for n in range(5)]
    assert [complete for complete, _ in told] == [False, False, True, True, True]
    for overwrite in (False, True):
        complete, norms = run_plan(plan, out, part=(1, 5), overwrite=overwrite)
        assert complete and len(norms) == 6
    assert not left_behind(tmp_path)
    with pytest.raises(SurgeryError, match="output-exists"):
        run_plan(plan, out)
    with pytest.raises(SurgeryError, match="output-exists"):
        run_plan(plan_merge(base, [f"{adapter}=2"]), out, part=(1, 5))


def test_a_part_that_starts_while_another_completes(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs
    plan, out, make = plan_merge(base, [adapter]), tmp_path / "out", run._Place.make

    def late(place: run._Place, to: Path) -> None:
        monkeypatch.setattr(run._Place, "make", make)
        assert run_plan(plan, out)[0]
        make(place, to)

    monkeypatch.setattr(run._Place, "make", late)
    assert run_plan(plan, out, part=(0, 3))[0] and not left_behind(tmp_path)


def test_what_comes_along(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    for name in ("model.safetensors.index.fp16.json", "pytorch_model.bin.index.fp16.json"):
        (base / name).write_text("{}")
    within = base / "files"
    within.mkdir()
    (within / "vocab.txt").write_text("a")
    (within / "back").symlink_to(within)
    (base / "tokenizer").symlink_to(within)
    (base / "again").symlink_to("files")
    (base / "extra" / "up").symlink_to("..")
    plan = plan_merge(base, [adapter])
    assert sorted(plan.copies) == [
        "again/vocab.txt",
        "config.json",
        "extra/notes.txt",
        "files/vocab.txt",
        "tokenizer.json",
        "tokenizer/vocab.txt",
    ]
    merge(base, adapter, tmp_path / "out")
    assert (tmp_path / "out/tokenizer/vocab.txt").read_text() == "a"


# Refusals


def test_foreign_weights_are_not_replaced(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    out = tmp_path / "out"
    for limit in (2000, 1 << 20, None):  # other shards of the same model are
        merge(base, adapter, out, max_shard_size=limit, overwrite=True)
    (out / "my_lora.safetensors").write_bytes(b"mine")
    error = refusal(base, adapter, out, overwrite=True)
    assert error.code == "output-not-ours" and "my_lora" in error.seen
    index = out / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "*"}}')  # a name, no pattern
    assert refusal(base, adapter, out, overwrite=True).code == "output-not-ours"
    index.write_text('{"weight_map": {"a": "my_lora.safetensors"}}')
    merge(base, adapter, out, overwrite=True)
    assert not (out / "my_lora.safetensors").exists()


def test_what_lies_where_the_manifest_goes(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = inputs
    adapter = write_adapter(tmp_path / "two.safetensors", range(2))
    plan = plan_merge(base / "model-00001-of-00003.safetensors", [adapter])
    out, manifest = tmp_path / "out.safetensors", tmp_path / "out.safetensors.manifest.json"
    for text in ('{"job": "mine"}', "[]", "no json"):
        manifest.write_text(text)
        with pytest.raises(SurgeryError, match="output-not-ours"):
            check_plan(plan, out, overwrite=True)
        assert manifest.read_text() == text
    manifest.unlink()
    manifest.mkdir()
    with pytest.raises(SurgeryError, match="output-not-ours"):
        run_plan(plan, out)
    assert not out.exists() and not left_behind(tmp_path)


def test_the_base_is_never_the_output(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    assert refusal(base, adapter, base, overwrite=True).code == "output-is-base"
    assert refusal(base, adapter, base / "merged").code == "output-is-base"
    file = base / "model-00001-of-00003.safetensors"
    two = write_adapter(tmp_path / "two.safetensors", range(2))
    assert refusal(file, two, file, overwrite=True).code == "output-is-base"
    assert refusal(base, adapter, tmp_path, overwrite=True).code == "output-is-input"
    assert refusal(file, two, two, overwrite=True).code == "output-is-input"


def test_outputs_that_cannot_be(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    (tmp_path / "taken").mkdir()
    assert refusal(base, adapter, tmp_path / "taken").code == "output-exists"
    (tmp_path / "taken" / "thesis.tex").write_text("")
    assert refusal(base, adapter, tmp_path / "taken", overwrite=True).code == "output-not-ours"
    assert refusal(base, adapter, tmp_path / "no" / "out").code == "no-such-folder"
    assert not left_behind(tmp_path)


def test_a_result_that_is_not_finite(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", torch.float16)
    adapter = write_adapter(tmp_path / "a.safetensors")
    error = refusal(base, f"{adapter}=1e6", tmp_path / "out")
    assert error.code == "non-finite" and "q_proj" in error.what
    assert not (tmp_path / "out").exists() and not left_behind(tmp_path)


@needs("resource")
def test_a_full_disk_leaves_nothing_half_done(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    code = (
        "import resource, adaptsurgery.checkpoint.stream, adaptsurgery.algorithms\n"
        "from adaptsurgery.jobs.merging.merge import merge\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "try:\n"
        f"    merge({str(base)!r}, [{str(adapter)!r}], {str(tmp_path / 'out')!r})\n"
        "except Exception as error: print(type(error).__name__, error.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["FileError", "no-space"]
    assert not (tmp_path / "out").exists() and not left_behind(tmp_path)


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", width=512)
    adapter = write_adapter(tmp_path / "a.safetensors", width=512)
    code = (
        "from adaptsurgery.jobs.merging.merge import merge\n"
        f"merge({str(base)!r}, [{str(adapter)!r}], {str(tmp_path / 'out')!r}, overwrite=True)"
    )
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [child.wait() for child in both] == [0, 0]
    assert verify_merge(tmp_path / "out", base, adapter).rows and not left_behind(tmp_path)


def test_weights_that_have_no_meaning(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    state = {"base_model.model.model.layers.0.q_proj.hra_u": numbers(1, WIDTH, 2)}
    folder = tmp_path / "hra"
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "HRA", "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert refusal(base, f"{folder}=0.5", tmp_path / "out").code == "no-weight"
    assert refusal(base, f"{folder}=much", tmp_path / "out").code == "bad-weight"
    merge(base, folder, tmp_path / "out")
    report = unmerge(tmp_path / "out", folder, tmp_path / "back", against=base)
    assert report.facts["against"]["relative"] < 1e-6


def test_an_input_that_changed_is_no_longer_the_plans(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = inputs
    plan = plan_merge(base, [adapter])
    write_adapter(adapter, range(3))
    with pytest.raises(SurgeryError, match="input-changed"):
        run_plan(plan, tmp_path / "out")


def test_options_that_are_none(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    assert refusal(base, adapter, tmp_path / "out", dtype="fp8").code == "no-such-option"
    assert (
        refusal(base, adapter, tmp_path / "out", shard_index=3, num_shards=3).code == "no-such-part"
    )
    assert refusal(base, [], tmp_path / "out").code == "no-adapter"
    file = base / "model-00001-of-00003.safetensors"
    assert (
        refusal(file, adapter, tmp_path / "o", allow_unmatched=True, max_shard_size=1500).code
        == "one-file"
    )
