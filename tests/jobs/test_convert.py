"""Conversion through the library: prefixes, several sources, refusals that list every module."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adaptsurgery
from adaptsurgery_formats.errors import InexactError, LayoutError
from adaptsurgery_formats.names import table

RANK = 2


def _lora(name: str, out: int, into: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.lora_up.weight": torch.randn(out, RANK, generator=generator),
        f"{name}.lora_down.weight": torch.randn(RANK, into, generator=generator),
        f"{name}.alpha": torch.tensor(3.0),
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    weights = {f"blocks.{i}.fc_{n}.weight": torch.zeros(6, 5) for i in range(2) for n in "ab"}
    save_file(weights, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.fixture
def folder(tmp_path: Path, base: Path) -> Path:
    """A PEFT folder over two layers of the base."""
    source = {}
    for i in range(2):
        source |= _lora(f"lycoris_blocks_{i}_fc_a", 6, 5, seed=i)
    save_file(source, tmp_path / "a.safetensors")
    adaptsurgery.convert(tmp_path / "a.safetensors", tmp_path / "peft", "peft", base=base)
    return tmp_path / "peft"


@pytest.mark.parametrize("layout", ["kohya", "lycoris"])
def test_a_prefix_of_its_own_goes_out_and_comes_back(
    folder: Path, base: Path, tmp_path: Path, layout: str
) -> None:
    out = tmp_path / "own.safetensors"
    adaptsurgery.convert(folder, out, layout, base=base, prefix="my_net_")
    assert all(key.startswith("my_net_blocks_") for key in load_file(out))
    back = adaptsurgery.convert(out, tmp_path / "back", "peft", base=base)
    assert back.verdict == "2/2 modules: 2 identical"
    first = load_file(folder / "adapter_model.safetensors")
    again = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert {k: v.tolist() for k, v in first.items()} == {k: v.tolist() for k, v in again.items()}


def test_a_foreign_prefix_is_found_by_look_up(base: Path, tmp_path: Path) -> None:
    save_file(_lora("some_net_blocks_1_fc_b", 6, 5), tmp_path / "x.safetensors")
    with pytest.raises(LayoutError) as error:
        adaptsurgery.load(tmp_path / "x.safetensors", base=base)
    assert error.value.code == "unknown-layout" and "--from lycoris" in error.value.next
    adapter = adaptsurgery.load(tmp_path / "x.safetensors", base=base, layout="lycoris")
    assert list(adapter) == ["blocks.1.fc_b"]


@pytest.mark.parametrize(("to", "prefix"), [("peft", "x"), ("kohya", "a b"), ("kohya", "a.b")])
def test_a_prefix_that_cannot_be(folder: Path, tmp_path: Path, to: str, prefix: str) -> None:
    with pytest.raises(LayoutError) as error:
        adaptsurgery.convert(folder, tmp_path / "out", to, prefix=prefix)
    assert error.value.code == "bad-prefix"


def test_the_prefixes_of_a_known_model_are_fixed(tmp_path: Path) -> None:
    name, shape = "mid_block.attentions.0.proj_in", (1280, 1280)
    assert table("sdxl").components["unet"].modules[name] == shape
    save_file(_lora("lora_unet_middle_block_1_proj_in", *shape), tmp_path / "x.safetensors")
    with pytest.raises(LayoutError) as error:
        adaptsurgery.convert(
            tmp_path / "x.safetensors", tmp_path / "y.safetensors", "kohya", base="sdxl", prefix="q"
        )
    assert error.value.code == "bad-prefix"


def test_every_refused_module_is_listed(base: Path, tmp_path: Path) -> None:
    source = {}
    for i in range(2):
        source |= {f"lycoris_blocks_{i}_fc_a.diff": torch.ones(6, 5)}
    source |= _lora("lycoris_blocks_0_fc_b", 6, 5)
    save_file(source, tmp_path / "x.safetensors")
    with pytest.raises(InexactError) as error:
        adaptsurgery.convert(tmp_path / "x.safetensors", tmp_path / "out", "peft", base=base)
    assert error.value.code == "no-full"
    assert [item.split("`")[1] for item in error.value.items] == ["blocks.0.fc_a", "blocks.1.fc_a"]
    assert not (tmp_path / "out").exists()


def _pipeline(tmp_path: Path) -> tuple[Path, Path]:
    """A UNet's and a text encoder's LoRA of SDXL, in a kohya file each."""
    unet, encoder = tmp_path / "unet.safetensors", tmp_path / "encoder.safetensors"
    save_file(_lora("lora_unet_middle_block_1_proj_in", 1280, 1280), unet)
    save_file(_lora("lora_te1_text_model_encoder_layers_0_mlp_fc1", 3072, 768), encoder)
    return unet, encoder


def test_several_sources_are_one_adapter(tmp_path: Path) -> None:
    sources = _pipeline(tmp_path)
    adaptsurgery.convert(sources, tmp_path / "out", "peft", base="sdxl")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["text_encoder", "unet"]
    folders = [tmp_path / "out" / name for name in ("unet", "text_encoder")]
    report = adaptsurgery.convert(folders, tmp_path / "both.safetensors", "kohya", base="sdxl")
    assert report.facts["components"] == ["unet", "text_encoder"]
    both = load_file(tmp_path / "both.safetensors")
    apart = {k: v for source in sources for k, v in load_file(source).items()}
    assert both.keys() == apart.keys()
    assert all(torch.equal(both[k], apart[k]) for k in both)


def test_sources_that_are_no_parts_of_one_adapter(folder: Path, tmp_path: Path) -> None:
    unet, _ = _pipeline(tmp_path)
    with pytest.raises(LayoutError) as error:
        adaptsurgery.convert([unet, folder], tmp_path / "out", "peft", base="sdxl")
    assert error.value.code == "not-one-adapter"


def test_a_native_base_keeps_native_names(tmp_path: Path) -> None:
    """With a base stored under the original names, PEFT's output is for a model of those names."""
    flux = table("flux").components["transformer"]
    prefix = "model.diffusion_model."
    weights = {prefix + n + ".weight": flux.shape(n, "native") for n in flux.native}
    _write_sparse(tmp_path / "flux.safetensors", weights)
    name, shape = "double_blocks.0.img_attn.qkv", (9216, 3072)
    save_file(_lora("lora_unet_" + name.replace(".", "_"), *shape), tmp_path / "x.safetensors")
    for place, base in (("own", str(tmp_path / "flux.safetensors")), ("split", "flux")):
        adaptsurgery.convert(tmp_path / "x.safetensors", tmp_path / place, "peft", base=base)
    config = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    assert config["target_modules"] == [name]
    split = json.loads((tmp_path / "split" / "adapter_config.json").read_text())
    assert split["target_modules"] == [f"transformer_blocks.0.attn.to_{x}" for x in "kqv"]


def _write_sparse(path: Path, shapes: dict[str, tuple[int, ...] | None]) -> None:
    """A safetensors file of zeros that takes no room on the disk."""
    header, at = {}, 0
    for key, shape in shapes.items():
        assert shape is not None
        size = 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
