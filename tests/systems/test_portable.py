"""The commands on files, run as on other systems: without Unix' calls, and with Windows' renames.

What they write is, byte for byte, what they write here. ``portable.py`` runs the whole file part of
the suite so.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
import portable

NAMES = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(3) for p in "qv"]
COMMANDS = """
inspect IN/lora --hashes --json
convert IN/lora --to kohya --base IN/base -o OUT/kohya.safetensors
convert OUT/kohya.safetensors --to peft --base IN/base -o OUT/back
convert OUT/kohya.safetensors --to peft --base IN/base -o OUT/back --overwrite
convert IN/style.pt --to lycoris --base IN/base -o OUT/style.safetensors
verify IN/lora OUT/back --base IN/base
combine IN/lora=0.5 IN/lora -o OUT/sum
resize IN/lora -o OUT/small --rank 1
resize IN/lora -o OUT/small --rank 1 --overwrite
merge IN/base IN/lora=0.5 -o OUT/merged
merge IN/base IN/lora=0.5 -o OUT/merged --overwrite
merge IN/base/model-00001-of-00002.safetensors IN/half -o OUT/one.safetensors
merge IN/base/model-00001-of-00002.safetensors IN/half -o OUT/one.safetensors --overwrite
unmerge OUT/merged IN/lora=0.5 -o OUT/unmerged --against IN/base
verify OUT/merged --base IN/base --adapter IN/lora=0.5
extract IN/base IN/tuned -o OUT/extracted --rank 2
extract IN/base IN/tuned -o OUT/extracted --rank 2 --report OUT/figures.json --overwrite
extract IN/base IN/tuned -o OUT/extracted.safetensors --to kohya --rank 2
""".strip().splitlines()
RUNNER = """
import json, os, sys
from adaptsurgery.cli import run
from pathlib import Path
codes = [run(line.split()) for line in json.load(sys.stdin)]
Path(sys.argv[1]).write_text(json.dumps(codes))
"""


def _lora(names: list[str], random: torch.Generator) -> dict[str, torch.Tensor]:
    shapes = {"lora_A": (2, 12), "lora_B": (12, 2)}
    return {
        f"base_model.model.{name}.{part}.weight": torch.randn(shape, generator=random)
        for name in names
        for part, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in two shards, the same after some training, a PEFT LoRA of it, a part, a pickle."""
    folder, random = tmp_path_factory.mktemp("in"), torch.Generator().manual_seed(0)
    weights = {f"{name}.weight": torch.randn(12, 12, generator=random) for name in NAMES}
    moved = {k: w + 0.1 * torch.randn(12, 12, generator=random) for k, w in weights.items()}
    for name, tensors in (("base", weights), ("tuned", moved)):
        (folder / name).mkdir()
        index = {}
        for n, keys in enumerate((NAMES[:3], NAMES[3:]), 1):
            shard = f"model-0000{n}-of-00002.safetensors"
            save_file({f"{k}.weight": tensors[f"{k}.weight"] for k in keys}, folder / name / shard)
            index |= {f"{k}.weight": shard for k in keys}
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / name / "model.safetensors.index.json").write_bytes(text.encode())
        (folder / name / "config.json").write_bytes(b'{"architectures": ["LlamaForCausalLM"]}')
    for name, keys in (("lora", NAMES), ("half", NAMES[:3])):
        (folder / name).mkdir()
        save_file(_lora(keys, random), folder / name / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "v_proj"],
        }
        (folder / name / "adapter_config.json").write_bytes(json.dumps(config).encode())
    flat = {
        f"lycoris_{name.replace('.', '_')}.lora_{part}.weight": torch.ones(shape)
        for name in NAMES
        for part, shape in (("down", (2, 12)), ("up", (12, 2)))
    }
    torch.save(flat, folder / "style.pt")
    return folder


def _outputs(inputs: Path, out: Path, ways: str) -> dict[str, str]:
    """What the commands write, by path and digest, all of which have to end with 0."""
    out.mkdir()
    lines = [line.replace("IN/", f"{inputs}/").replace("OUT/", f"{out}/") for line in COMMANDS]
    environment = portable.environment(ways) if ways else dict(os.environ)
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(out / "codes.json")],
        input=json.dumps(lines), capture_output=True, text=True, env=environment, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads((out / "codes.json").read_text())
    assert dict(zip(COMMANDS, codes)) == dict.fromkeys(COMMANDS, 0), done.stderr[-3000:]
    files = sorted(p for p in out.rglob("*") if p.is_file())
    weights = [p for p in files if p.suffix == ".safetensors" or p.name == "adapter_config.json"]
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    names = {p.relative_to(out).as_posix(): "" for p in files}
    return names | {
        p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in weights
    }


@pytest.fixture(scope="module")
def usual(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return _outputs(inputs, tmp_path_factory.mktemp("usual") / "out", "")


@pytest.mark.parametrize("ways", ["remove", "hook", "remove,hook"])
def test_the_commands_write_the_same(
    inputs: Path, usual: dict[str, str], tmp_path: Path, ways: str
) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("what is open is found by /proc")
    assert _outputs(inputs, tmp_path / "out", ways) == usual


def test_a_process_of_its_own(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "kohya.safetensors"
    for line in (f"inspect {inputs}/lora", f"convert {inputs}/lora --to kohya -o {out} --json"):
        done = subprocess.run(
            [sys.executable, "-m", "adaptsurgery", *line.split()],
            capture_output=True, text=True, env=portable.environment("remove,hook"), timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), line
    assert json.loads(done.stdout)["peak_memory"] == 0  # which nothing tells there
    assert out.exists()


def test_the_ways_are_what_they_say(tmp_path: Path) -> None:
    """An open or mapped file keeps its name and stays; what Unix alone has is not there."""
    script = """
import mmap, os, sys
def refused(call, *args):
    try: call(*args)
    except PermissionError: return True
    return False
for name in ("pread", "pwrite", "copy_file_range", "O_NONBLOCK", "fork"): assert not hasattr(os, name)
for name in ("fcntl", "resource"):
    try: __import__(name)
    except ImportError: pass
    else: raise SystemExit(name)
os.mkdir("d")
for name in ("a", "d/b", "c", "e"):
    with open(name, "w") as f: f.write(name)
held, mapped = open("a"), open("d/b", "r+")
m = mmap.mmap(mapped.fileno(), 0); mapped.close()
assert refused(os.remove, "a") and refused(os.rename, "a", "z") and refused(os.replace, "c", "a")
assert refused(os.remove, "d/b") and refused(os.rename, "d", "f") and refused(os.open, "d", os.O_RDONLY)
held.close(); m.close()
os.replace("c", "a"); os.remove("d/b"); os.rename("d", "f"); os.replace("f", "g")
try: os.rename("a", "e")
except FileExistsError: print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path,
        env=portable.environment("remove,hook"), timeout=60,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("done\n", "")
