"""inspect: what it tells of files of each layout, from headers alone."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from adapter_files import lora_shapes, write_golden, write_kohya, write_peft, write_zeros

import adaptsurgery
from adaptsurgery_formats.errors import SurgeryError


@pytest.mark.parametrize(
    ("golden", "layout", "modules", "targets"),
    [
        ("flux-lora-kohya", "kohya", 304, {"qkv": 38, "linear1": 38}),
        ("flux-lora-aitoolkit-bfl-names", "comfyui", 228, {"qkv": 38, "linear1": 38}),
        ("flux-lora-diffusers", "diffusers", 494, {"to_out.0": 19, "proj_mlp": 38}),
    ],
)
def test_real_files_are_recognised(
    tmp_path: Path, golden: str, layout: str, modules: int, targets: dict[str, int]
) -> None:
    found = adaptsurgery.inspect(write_golden(tmp_path / "a.safetensors", golden))
    assert found.layout["name"] == layout
    assert found.model["name"] == "flux"
    assert len(found.modules) == modules == sum(found.algorithms.values())
    assert found.algorithms == {"lora": modules}
    assert found.targets.items() >= targets.items()
    assert {name: c["how"] for name, c in found.convertible.items()}["peft"] == "exact"


def test_kohya(tmp_path: Path) -> None:
    meta = {"ss_network_dim": "4", "note": "x" * 500}
    found = adaptsurgery.inspect(write_kohya(tmp_path / "a.safetensors", metadata=meta))
    assert found.model == {"name": "sd15", "source": "the bundled table `sd15`"}
    assert found.components == {"unet": 2, "text_encoder": 1}
    assert found.ranks == {"4": 3}
    assert found.alphas == {"2": 3}
    assert found.scales == [
        {"scale": 0.5, "rule": "alpha/r", "alpha": 2.0, "rank": 4, "modules": 3}
    ]
    assert found.dtypes == {"F16": 9}
    assert found.tensors == 9
    assert found.metadata == meta
    assert found.hashes == {"recorded": {}, "computed": {}, "sha256": {}, "stale": None}
    row = found.modules[0]
    assert row["shapes"] == {"down": [4, 320], "up": [320, 4]}
    assert row["dtypes"] == {"down": "F16", "up": "F16"}
    assert len(row["keys"]) == 3


def test_peft_folder(tmp_path: Path) -> None:
    found = adaptsurgery.inspect(write_peft(tmp_path / "adapter"))
    assert found.layout["known_by"] == "its keys and adapter_config.json"
    assert found.targets == {"q_proj": 2, "v_proj": 2}
    assert found.scales[0]["scale"] == 2.0
    assert found.model == {}


@pytest.mark.parametrize(
    ("rslora", "scale", "rule"), [(False, 2.0, "alpha/r"), (True, 4.0, "alpha/sqrt(r)")]
)
def test_the_scale_comes_with_its_rule(
    tmp_path: Path, rslora: bool, scale: float, rule: str
) -> None:
    folder = write_peft(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": rslora}))
    found = adaptsurgery.inspect(folder)
    assert (found.scales[0]["scale"], found.scales[0]["rule"]) == (scale, rule)


def test_flat_names_that_no_table_has_stay_flat(tmp_path: Path) -> None:
    names = [f"lycoris_layers_{i}_attn2_q_proj" for i in range(3)]
    found = adaptsurgery.inspect(write_zeros(tmp_path / "a.safetensors", lora_shapes(names)))
    assert found.model == {}
    assert found.targets == {"layers_*_attn2_q_proj": 3}
    assert found.modules[0]["naming"] == "flat"
    assert found.convertible["peft"]["code"] == "base-needed"
    assert found.convertible["lycoris"]["how"] == "exact"


def test_a_base_tells_flat_names_apart(tmp_path: Path) -> None:
    base = write_zeros(tmp_path / "base.safetensors", {"layers.0.q_proj.weight": [8, 6]})
    file = write_zeros(tmp_path / "a.safetensors", lora_shapes(["lycoris_layers_0_q_proj"]))
    found = adaptsurgery.inspect(file, base=base)
    assert [m["path"] for m in found.modules] == ["layers.0.q_proj"]
    assert found.convertible["peft"]["how"] == "exact"


def test_dora_lokr_and_replaced_parameters(tmp_path: Path) -> None:
    n = "lycoris_a"
    shapes = {
        f"{n}_x.lora_down.weight": [4, 6], f"{n}_x.lora_up.weight": [8, 4], f"{n}_x.dora_scale": [8, 1],
        f"{n}_y.lora_down.weight": [4, 6], f"{n}_y.lora_up.weight": [8, 4], f"{n}_y.dora_scale": [1, 6],
        f"{n}_z.lokr_w1": [2, 2], f"{n}_z.lokr_w2": [4, 3], f"{n}_z.alpha": [],
    }  # fmt: skip
    found = adaptsurgery.inspect(write_zeros(tmp_path / "a.safetensors", shapes))
    assert found.dora == {"out": 1, "in": 1}
    assert found.algorithms == {"lora": 2, "lokr": 1}
    assert {s["rule"] for s in found.scales} == {
        "1: no alpha, so alpha = r",
        "1: both Kronecker factors are stored full",
    }


def test_modules_to_save_are_told(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["head"]}))
    shapes = {
        "base_model.model.a.q_proj.lora_A.weight": [4, 6],
        "base_model.model.a.q_proj.lora_B.weight": [8, 4],
        "base_model.model.head.weight": [3, 8],
    }
    write_zeros(folder / "adapter_model.safetensors", shapes)
    found = adaptsurgery.inspect(folder)
    assert found.saved == [
        {"component": "", "name": "head.weight", "dtype": "F16", "shape": [3, 8]}
    ]
    assert found.convertible["kohya"]["code"] == "no-modules-to-save"


def test_hashes_computed_anew_tell_stale_ones(tmp_path: Path) -> None:
    meta = {"ss_network_dim": "4", "sshs_model_hash": "0" * 64, "sshs_legacy_hash": "e3b0c442"}
    file = write_kohya(tmp_path / "a.safetensors", metadata=meta)
    found = adaptsurgery.inspect(file, hashes=True)
    assert found.hashes["recorded"] == {k: v for k, v in meta.items() if k.startswith("sshs")}
    assert found.hashes["stale"] == ["sshs_model_hash"]
    assert found.hashes["sha256"] == {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}


def test_hashes_of_a_converted_file_hold(tmp_path: Path) -> None:
    source = write_kohya(tmp_path / "a.safetensors", metadata={"ss_network_dim": "9"})
    out = tmp_path / "b.safetensors"
    adaptsurgery.convert(source, out, "kohya")
    found = adaptsurgery.inspect(out, hashes=True)
    assert found.hashes["stale"] == []
    assert found.hashes["computed"] == found.hashes["recorded"]


def test_it_is_json(tmp_path: Path) -> None:
    found = adaptsurgery.inspect(write_peft(tmp_path / "adapter")).as_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["job"] == "inspect"


@pytest.mark.parametrize(
    ("shapes", "code"),
    [
        ({"lora_unet_a.lora_down.weight": [4, 6]}, "incomplete-module"),
        ({"model.layers.0.weight": [4, 6]}, "unknown-layout"),
        (lora_shapes(["lora_unet_a", "lycoris_b"]), "mixed-layouts"),
        ({}, "empty-adapter"),
    ],
)
def test_what_is_no_adapter_is_refused(
    tmp_path: Path, shapes: dict[str, list[int]], code: str
) -> None:
    with pytest.raises(SurgeryError) as caught:
        adaptsurgery.inspect(write_zeros(tmp_path / "a.safetensors", shapes))
    assert caught.value.code == code


def test_neither_torch_nor_numpy_nor_the_hub_is_imported(tmp_path: Path) -> None:
    file = write_kohya(tmp_path / "a.safetensors", metadata={"ss_network_dim": "4"})
    program = f"""
import sys, adaptsurgery
adaptsurgery.inspect({str(file)!r}, hashes=True)
print({{"torch", "numpy", "huggingface_hub", "tqdm", "click"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
