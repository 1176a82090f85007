"""The three commands: what they print, their JSON, and what they leave on disk."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import lora_shapes, write_golden, write_kohya, write_zeros
from safetensors.torch import save_file
from unix import there

from adaptsurgery.adapters.report import Row
from adaptsurgery.cli import output
from adaptsurgery.cli.app import COMMANDS
from adaptsurgery.jobs import options
from adaptsurgery_formats import FORMATS, WRITABLE

Command = Callable[..., Any]


def test_help_stands_where_it_is_looked_for(command: Command) -> None:
    bare, asked = command(), command("--help")
    assert bare.code == asked.code == 0
    assert bare.out == asked.out
    assert "Usage: adaptsurgery" in bare.out
    for name in COMMANDS:
        assert name in bare.out
        told = command(name, "--help")
        assert told.code == 0
        assert f"adaptsurgery {name} " in told.out.split("Options:")[0].split("\n", 1)[1]


def test_version(command: Command) -> None:
    import adaptsurgery

    assert command("--version").out == f"adaptsurgery {adaptsurgery.__version__}\n"


def test_the_layouts_offered_are_those_that_there_are() -> None:
    assert options.LAYOUTS == tuple(FORMATS)
    assert options.TARGETS == WRITABLE


def test_inspect_tells_in_plain_text(command: Command, tmp_path: Path) -> None:
    file = write_kohya(tmp_path / "a.safetensors", metadata={"long": "y" * 5000})
    done = command("inspect", file)
    assert done.code == 0
    assert done.err == ""
    assert "\x1b" not in done.out
    for told in ("kohya sd-scripts", "sd15", "0.5 = alpha/r = 2/4 (3)", "unet 2, text_encoder 1"):
        assert told in done.out
    assert "(5000 characters)" in done.out
    assert max(map(len, done.out.splitlines())) < 300


def test_inspect_json_has_everything(command: Command, tmp_path: Path) -> None:
    file = write_kohya(tmp_path / "a.safetensors", metadata={"long": "y" * 5000})
    found = command("inspect", file, "--json", "--hashes").json
    assert found["ok"] is True
    assert found["metadata"]["long"] == "y" * 5000
    assert len(found["modules"]) == 3
    assert len(found["hashes"]["sha256"]) == 1


@pytest.mark.parametrize(
    "golden", ["flux-lora-kohya", "flux-lora-aitoolkit-bfl-names", "flux-lora-diffusers"]
)
def test_inspect_reads_real_tables(command: Command, tmp_path: Path, golden: str) -> None:
    done = command("inspect", write_golden(tmp_path / "a.safetensors", golden))
    assert done.code == 0
    assert "flux, by the bundled table" in done.out


def test_names_from_files_do_not_steer_the_terminal(command: Command, tmp_path: Path) -> None:
    key = "lora_unet_a\x1b[2Jevil"
    done = command("inspect", write_zeros(tmp_path / "a.safetensors", lora_shapes([key])))
    assert done.code == 0
    assert "\x1b" not in done.out
    bad = write_zeros(tmp_path / "b.safetensors", {f"{key}.lora_down.weight": [4, 4]})
    assert "\x1b" not in command("inspect", bad).err


def test_convert_says_what_it_did(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = command("convert", write_kohya(tmp_path / "a.safetensors"), "--to", "peft", "-o", out)
    assert done.code == 0
    assert done.err == ""
    assert done.out.startswith("kohya → peft")
    last = done.out.splitlines()[-1]
    assert last.startswith("3/3 modules: 3 identical · 0 unused keys · wrote ")
    told = there("resource") or there("/proc/self/status")
    assert (" · peak RSS " in last) == told
    assert sorted(p.name for p in out.iterdir()) == ["text_encoder", "unet"]


def test_convert_json(command: Command, tmp_path: Path) -> None:
    source, out = write_kohya(tmp_path / "a.safetensors"), tmp_path / "out"
    found = command("convert", source, "--to", "peft", "-o", out, "--json").json
    assert found["ok"] is True
    assert found["job"] == "convert"
    assert [r["change"] for r in found["rows"]] == ["identical"] * 3
    assert len(found["outputs"]) == 4
    assert found["facts"]["components"] == ["unet", "text_encoder"]
    told = there("resource") or there("/proc/self/status")
    assert found["peak_memory"] > 1_000_000 if told else found["peak_memory"] == 0


def test_a_dry_run_writes_nothing(command: Command, tmp_path: Path) -> None:
    source = write_kohya(tmp_path / "a.safetensors")
    done = command("convert", source, "--to", "peft", "-o", tmp_path / "out", "--dry-run")
    assert done.code == 0
    assert "dry run: would write" in done.out
    assert list(tmp_path.iterdir()) == [source]


def test_quiet_is_quiet(command: Command, tmp_path: Path) -> None:
    source = write_kohya(tmp_path / "a.safetensors")
    done = command("convert", source, "--to", "peft", "-o", tmp_path / "out", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    again = command("convert", source, "--to", "peft", "-o", tmp_path / "out", "--quiet")
    assert again.code == 1
    assert "output-exists" in again.err


def test_overwrite_and_no_hashes(command: Command, tmp_path: Path) -> None:
    source = write_kohya(tmp_path / "a.safetensors", metadata={"ss_network_dim": "4"})
    out = tmp_path / "b.safetensors"
    args = ("convert", source, "--to", "kohya", "-o", out, "--overwrite")
    assert command(*args).code == 0
    assert "sshs_model_hash" in command("inspect", out).out
    assert command(*args, "--no-hashes").code == 0
    assert "sshs_model_hash" not in command("inspect", out).out


def test_verify(command: Command, tmp_path: Path) -> None:
    source, out = write_kohya(tmp_path / "a.safetensors"), tmp_path / "out"
    assert command("convert", source, "--to", "peft", "-o", out).code == 0
    done = command("verify", source, out)
    assert (done.code, done.out) == (0, "3/3 modules: 3 identical\n")
    assert command("verify", source, out, "--json").json["ok"] is True


def test_verify_tells_different_adapters(command: Command, tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    first, second, fewer = (_random(tmp_path / f"{n}.safetensors", name, n) for n in (1, 2, 3))
    assert command("verify", first, first).code == 0
    done = command("verify", first, second, "--json")
    assert (done.code, done.json["error"]["code"]) == (1, "not-equal")
    assert [row["change"] for row in done.json["rows"]] == ["lossy"]
    write_kohya(fewer)
    told = command("verify", first, fewer)
    assert told.code == 1
    assert "only in the first" in told.out and "modules differ" in told.out


def _random(path: Path, name: str, seed: int) -> Path:
    """A LoHa of rank 2 on a 320×320 layer, of exact rank 4 as a LoRA."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "hada_w1_a": (320, 2),
        "hada_w1_b": (2, 320),
        "hada_w2_a": (320, 2),
        "hada_w2_b": (2, 320),
    }
    tensors = {f"{name}.{k}": torch.randn(s, generator=generator) for k, s in shapes.items()}
    save_file(tensors | {f"{name}.alpha": torch.tensor(2.0)}, path)
    return path


def test_a_loss_is_refused_or_told_by_module(command: Command, tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    source, out = _random(tmp_path / "a.safetensors", name, 1), tmp_path / "b.safetensors"
    args = ("convert", source, "--to", "kohya", "-o", out, "--as", "lora")
    refused = command(*args, "--rank", 2)
    assert refused.code == 1
    assert "error[lossy]" in refused.err
    assert not out.exists()
    lossy = command(*args, "--rank", 2, "--allow-lossy")
    assert lossy.code == 0
    assert "\n  lossy  " in lossy.out
    assert "proj_in" in lossy.out
    exact = command(*args, "--overwrite")
    assert exact.code == 0
    assert "\n  rounded  " in exact.out
    assert command("verify", source, out).code == 0


def test_the_worst_rows_come_first_and_no_more_than_ten(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output.rows([Row(f"m{i}", "lora", "lossy", i / 100) for i in range(1, 13)])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 11
    assert "m12" in shown[0]
    assert shown[-1] == "  … and 2 more; --json lists all"


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (999, "999 B"), (45_100_000, "45.1 MB"), (3_200_000_000_000, "3.2 TB")],
)
def test_sizes(count: int, said: str) -> None:
    assert output.size(count) == said


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"rows": [{"error": float("inf"), "n": 1, "on": True}]})
    assert capsys.readouterr().out == '{"rows": [{"error": "inf", "n": 1, "on": true}]}\n'


def test_key_only_work_imports_no_torch(tmp_path: Path) -> None:
    source = write_kohya(tmp_path / "a.safetensors", metadata={"ss_network_dim": "4"})
    out = tmp_path / "out"
    program = f"""
import sys
from adaptsurgery.cli import run
for args in (["--help"], ["convert", "--help"], ["inspect", {str(source)!r}],
             ["convert", {str(source)!r}, "--to", "peft", "-o", {str(out)!r}],
             ["convert", {str(out)!r}, "--to", "kohya", "-o", {str(out) + ".st"!r}],
             ["verify", {str(source)!r}, {str(out)!r}]):
    assert run(args) == 0, args
print({{"torch", "numpy", "huggingface_hub", "tqdm"}} & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == "set()\n"


def test_help_loads_no_format(tmp_path: Path) -> None:
    program = """
import sys
from adaptsurgery.cli import run
run(["--help"])
plain = ("adaptsurgery.jobs.options", "adaptsurgery.jobs")  # what may be asked for, as data
held = [m for m in sys.modules if m.startswith(("adaptsurgery_formats", "adaptsurgery.jobs"))]
print([m for m in held if m != plain[1] and not m.startswith(plain[0])])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.endswith("[]\n")
