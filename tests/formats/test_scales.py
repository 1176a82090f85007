"""Every spelling of an alpha, what scale it means, and what is written for it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from adaptsurgery import SurgeryError, convert, load

Weights = dict[str, torch.Tensor]


def factors(alpha: torch.Tensor | None, rank: int = 4, name: str = "lycoris_fc") -> Weights:
    given = {
        f"{name}.lora_up.weight": torch.rand(6, rank),
        f"{name}.lora_down.weight": torch.rand(rank, 8),
    }
    return given if alpha is None else given | {f"{name}.alpha": alpha}


def base(folder: Path) -> Path:
    weights = {
        "fc.weight": torch.rand(6, 8),
        "conv.weight": torch.rand(8, 8, 3, 3),
        "odd.weight": torch.rand(6, 8),
    }
    save_file(weights, folder / "base.safetensors")
    return folder / "base.safetensors"


ALPHAS = {
    "float32": (torch.tensor(2.0), 0.5),
    "bfloat16": (torch.tensor(2.0).bfloat16(), 0.5),
    "float16": (torch.tensor(6.0).half(), 1.5),
    "float64": (torch.tensor(1.0).double(), 0.25),
    "int64": (torch.tensor(8), 2.0),
    "int32 (1,)": (torch.tensor([8], dtype=torch.int32), 2.0),
    "(1,)": (torch.tensor([2.0]), 0.5),
    "negative": (torch.tensor(-2.0), -0.5),
    "zero": (torch.tensor(0.0), 1.0),
    "absent": (None, 1.0),
}


@pytest.mark.parametrize("kind", ALPHAS)
def test_an_alpha_and_its_way_through_peft(kind: str, tmp_path: Path) -> None:
    alpha, scale = ALPHAS[kind]
    given, model = factors(alpha), base(tmp_path)
    save_file(given, tmp_path / "in.safetensors")
    assert load(tmp_path / "in.safetensors", base=model).provenance("fc")["scale"] == [scale]
    convert(tmp_path / "in.safetensors", tmp_path / "out", "peft", base=model)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text("utf-8"))
    assert config["lora_alpha"] / config["r"] == scale
    convert(tmp_path / "out", tmp_path / "back.safetensors", "lycoris", base=model)
    back = load_file(tmp_path / "back.safetensors")
    if kind in ("zero", "absent"):  # alpha = r is written out: some readers take these for 0
        given |= {"lycoris_fc.alpha": torch.tensor(4.0)}
    assert back.keys() == given.keys()
    for key, tensor in given.items():
        assert back[key].dtype == tensor.dtype and torch.equal(back[key], tensor), key
    convert(tmp_path / "in.safetensors", tmp_path / "same.safetensors", "lycoris", base=model)
    same = load_file(tmp_path / "same.safetensors")
    assert ("lycoris_fc.alpha" in same) == (alpha is not None)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number(alpha: float, tmp_path: Path) -> None:
    save_file(factors(torch.tensor(alpha)), tmp_path / "in.safetensors")
    with pytest.raises(SurgeryError) as refusal:
        load(tmp_path / "in.safetensors", base=base(tmp_path))
    assert refusal.value.code == "non-finite"


def test_ranks_and_alphas_per_module(tmp_path: Path) -> None:
    given = factors(torch.tensor(2.0)) | factors(torch.tensor(3.0), 2, "lycoris_odd")
    save_file(given, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out", "peft", base=base(tmp_path))
    again = load(tmp_path / "out")
    assert again.provenance("fc")["scale"] == [0.5]
    assert again.provenance("odd")["scale"] == [1.5]


def test_peft_alpha_zero_is_refused_by_lycoris(tmp_path: Path) -> None:
    save_file(factors(torch.tensor(2.0)), tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out", "peft", base=base(tmp_path))
    for rslora in (False, True):
        rewrite(tmp_path / "out", lora_alpha=0, use_rslora=rslora)
        with pytest.raises(SurgeryError) as refusal:
            convert(tmp_path / "out", tmp_path / "back.safetensors", "lycoris")
        assert refusal.value.code == "zero-alpha"


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def test_a_four_dimensional_w2_b(tmp_path: Path) -> None:
    """LyCORIS's functional API leaves (r, d, kh, kw); PEFT has (r, d·kh·kw): the same bytes."""
    w2_b = torch.rand(1, 4, 3, 3)
    given = {
        "lycoris_conv.lokr_w1": torch.rand(2, 2),
        "lycoris_conv.lokr_w2_a": torch.rand(4, 1),
        "lycoris_conv.lokr_w2_b": w2_b,
        "lycoris_conv.alpha": torch.tensor(1.0),
    }
    save_file(given, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out", "peft", base=base(tmp_path))
    got = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(got["base_model.model.conv.lokr_w2_b"], w2_b.reshape(1, 36))


# --- metadata ------------------------------------------------------------------------------------

SAID = {
    "ss_tag_frequency": '{"a": {"b": 1}}', "modelspec.title": "kept", "ss_network_dim": "99",
    "ss_network_module": "networks.lora", "ss_network_args": '{"conv_dim": "4"}',
    "ss_network_alpha": "99", "sshs_model_hash": "stale", "sshs_legacy_hash": "stale",
}  # fmt: skip


def test_metadata_through_every_hop(tmp_path: Path) -> None:
    """Kept, ss_network_* told anew, and both hashes those of sd-scripts' own algorithm."""
    import hashlib

    given = factors(torch.tensor(2.0), name="lora_unet_fc")
    save_file(given, tmp_path / "in.safetensors", SAID)
    model = base(tmp_path)
    hops = [
        tmp_path / "in.safetensors",
        tmp_path / "l.safetensors",
        tmp_path / "p",
        tmp_path / "k.safetensors",
    ]
    for source, out, to in zip(hops, hops[1:], ("lycoris", "peft", "kohya")):
        convert(source, out, to, base=model)
    with safe_open(hops[3], "pt") as file:
        got = file.metadata()
    assert got["ss_tag_frequency"] == SAID["ss_tag_frequency"]
    assert got["modelspec.title"] == "kept"
    assert (got["ss_network_dim"], got["ss_network_alpha"]) == ("4", "2")
    # sd-scripts: serialise with the ss_* metadata alone, hash what follows the header
    whole = save(load_file(hops[3]), {k: v for k, v in got.items() if k.startswith("ss_")})
    (header,) = struct.unpack("<Q", whole[:8])
    assert got["sshs_model_hash"] == hashlib.sha256(whole[8 + header :]).hexdigest()
    legacy = hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8]
    assert got["sshs_legacy_hash"] == legacy


def test_hashes_of_a_file_beyond_a_mebibyte(tmp_path: Path) -> None:
    import hashlib

    given = {
        "lora_unet_fc.lora_up.weight": torch.rand(6, 90000),
        "lora_unet_fc.lora_down.weight": torch.rand(90000, 8),
    }
    save_file(given, tmp_path / "in.safetensors", {"ss_x": "1"})
    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "kohya", base=base(tmp_path))
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        got = file.metadata()
    whole = save(
        load_file(tmp_path / "out.safetensors"),
        {k: v for k, v in got.items() if k.startswith("ss_")},
    )
    assert got["sshs_legacy_hash"] == hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8]
