"""Writing: what goes along, what stays, and outputs that no reader would know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from odd_adapters import code, config_of, lora, peft, plain, write
from safetensors.torch import load_file

import adaptsurgery
from adaptsurgery_formats.errors import SurgeryError


def test_a_batch_norm_that_was_saved_goes_along(tmp_path: Path) -> None:
    norm = {"bn.weight": torch.ones(3), "bn.num_batches_tracked": torch.tensor(7)}
    source = peft(tmp_path / "p", plain("a") | norm, **config_of("a", modules_to_save=["bn"]))
    adaptsurgery.convert(source, tmp_path / "out", "peft")
    out = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert out["base_model.model.bn.num_batches_tracked"].item() == 7


def test_a_model_card_outlives_an_overwrite(tmp_path: Path) -> None:
    source = peft(tmp_path / "p", plain("a"), **config_of("a"))
    adaptsurgery.convert(source, tmp_path / "out", "peft")
    (tmp_path / "out" / "README.md").write_text("my card")
    with pytest.raises(SurgeryError) as error:
        adaptsurgery.convert(source, tmp_path / "out", "peft", dry_run=True)
    assert error.value.code == "output-exists"
    adaptsurgery.convert(source, tmp_path / "out", "peft", overwrite=True)
    assert (tmp_path / "out" / "README.md").read_text() == "my card"


def test_two_files_that_adapt_one_module(tmp_path: Path) -> None:
    sources = [write(tmp_path / f"{n}.safetensors", lora("unet.a.b", 6, 5)) for n in "xy"]
    assert code(sources, tmp_path / "out", "peft") == "duplicate-module"


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "folder/"])
def test_outputs_that_no_reader_would_know(tmp_path: Path, name: str) -> None:
    source = peft(tmp_path / "p", plain("a"), **config_of("a"))
    with pytest.raises(SurgeryError) as error:
        adaptsurgery.convert(source, f"{tmp_path}/{name}", "kohya")
    assert error.value.code == "bad-name"
