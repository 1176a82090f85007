"""Loading: which component, prefix and shape an adapter's names and config mean, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from odd_adapters import Tensors, code, config_of, lora, peft, plain, write
from safetensors.torch import load_file

import adaptsurgery
from adaptsurgery_formats.errors import SurgeryError


@pytest.mark.parametrize("component", ["../evil", "/etc/evil", "a/b", ".."])
def test_a_component_in_the_metadata_is_no_path(tmp_path: Path, component: str) -> None:
    metadata = {"adaptsurgery.component": component}
    first = peft(tmp_path / "p1", plain("a"), metadata, **config_of("a"))
    second = peft(tmp_path / "p2", plain("b"), **config_of("b"))
    assert code([first, second], tmp_path / "out", "peft") == "bad-name"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p1", "p2"]


def test_a_linear_takes_no_adapter_of_its_transposed_shape(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"fc.weight": torch.randn(8, 16)})
    source = write(tmp_path / "x.safetensors", lora("lycoris_fc", 16, 8))
    assert code(source, tmp_path / "out", "peft", base=base) == "bad-shape"
    source = write(
        tmp_path / "te.safetensors", lora("lora_te_text_model_encoder_layers_0_mlp_fc1", 768, 3072)
    )
    assert code(source, tmp_path / "out", "peft", base="sd15") == "bad-shape"
    turned = peft(
        tmp_path / "hra",
        {"fc.hra_u": torch.randn(8, 2)},
        peft_type="HRA",
        r=2,
        target_modules=["fc"],
    )
    assert code(turned, tmp_path / "out", "peft", base=base, algorithm="lora") == "bad-shape"


def test_a_linear_takes_no_merge_of_its_transpose(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"fc.weight": torch.randn(8, 16)})
    source = write(tmp_path / "x.safetensors", lora("lycoris_fc", 16, 8))
    with pytest.raises(SurgeryError):
        adaptsurgery.merge(base, [source], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_components_of_an_unknown_model_get_their_own_prefixes(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    peft(pipe / "transformer", plain("blocks.0.q"), **config_of("blocks.0.q"))
    peft(pipe / "text_encoder", plain("layers.0.q"), **config_of("layers.0.q"))
    adaptsurgery.convert(pipe, tmp_path / "x.safetensors", "kohya")
    names = {key.partition(".")[0] for key in load_file(tmp_path / "x.safetensors")}
    assert names == {"lora_unet_blocks_0_q", "lora_te_layers_0_q"}
    assert code(pipe, tmp_path / "y.safetensors", "kohya", prefix="lora_te") == "bad-prefix"


def test_our_own_metadata_in_a_layout_that_does_not_use_them(tmp_path: Path) -> None:
    tensors = lora("diffusion_model.a.b", 6, 5)
    source = write(tmp_path / "x.safetensors", tensors, {"adaptsurgery.component": "unet"})
    report = adaptsurgery.convert(source, tmp_path / "out", "peft")
    assert "stray-metadata" in [note.code for note in report.notes]
    assert adaptsurgery.load(tmp_path / "out").components == [""]


def test_encoders_of_sd3_stay_apart(tmp_path: Path) -> None:
    part = "transformer.text_model.encoder.layers.0.mlp.fc1"
    tensors = lora("diffusion_model.joint_blocks.0.x_block.attn.proj", 6, 5)
    tensors |= lora(f"text_encoders.clip_g.{part}", 6, 5)
    tensors |= lora("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", 6, 5)
    source = write(tmp_path / "x.safetensors", tensors)
    assert code(source, tmp_path / "out", "peft") == "base-needed"


def test_a_kernel_is_compared_in_its_own_order(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"c.weight": torch.randn(8, 8, 1, 3)})
    source = write(tmp_path / "x.safetensors", lora("lycoris_c", 8, 8, 3, 1))
    assert code(source, tmp_path / "out", "peft", base=base) == "bad-shape"


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        ({**plain("a"), "a.lora_B.bias": torch.ones(6)}, config_of("a")),
        ({"a.lokr_w1_a": torch.ones(2, 1), "a.lokr_w1_b": torch.ones(1, 2), "a.lokr_w2": torch.ones(3, 3)},
         {"peft_type": "LOKR", "r": 1, "target_modules": ["a"]}),
        ({"a.lokr_w1": torch.ones(2, 8), "a.lokr_w2": torch.ones(4, 2)},
         {"peft_type": "LOKR", "r": 4, "decompose_factor": 4, "target_modules": ["a"]}),
    ],
)  # fmt: skip
def test_a_config_that_disagrees(tmp_path: Path, tensors: Tensors, config: dict[str, Any]) -> None:
    source = peft(tmp_path / "p", tensors, **config)
    assert code(source, tmp_path / "out", "peft") == "config-disagrees"


def test_checkpoints_of_a_training_are_no_pipeline(tmp_path: Path) -> None:
    for step in (1, 2):
        peft(tmp_path / "run" / f"checkpoint-{step}", plain("a"), **config_of("a"))
    assert code(tmp_path / "run", tmp_path / "out", "peft") == "several-adapters"
