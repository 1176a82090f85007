"""SD1.5 and SDXL by their tables, text encoders alone, and the real diffusers and transformers."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptsurgery import SurgeryError, convert, verify
from adaptsurgery_formats.names import flatten, table

Weights = dict[str, torch.Tensor]
SPREAD = {
    "sd15": {"unet": "diffusers", "text_encoder": "diffusers"},
    "sdxl": {"unet": "native", "text_encoder": "diffusers", "text_encoder_2": "diffusers"},
}


def kohya_file(model: str, step: int = 37) -> Weights:
    """A LoRA on every ``step``-th module with a matrix, under kohya's own names."""
    names, given = table(model), {}
    for part, naming in SPREAD[model].items():
        component = names.components[part]
        paths = component.native if naming == "native" else component.modules
        matrices = {p: component.shape(p, naming) for p in paths}
        kept = [p for p, s in matrices.items() if s and len(s) > 1 and "embedding" not in p]
        for i, path in enumerate(kept[::step]):
            shape, rank = matrices[path] or (), 2 + i % 3
            key = f"{component.kohya_prefixes[0]}_{flatten(path)}"
            ones = [1] * (len(shape) - 2)
            given[f"{key}.lora_up.weight"] = torch.randn(shape[0], rank, *ones).half()
            given[f"{key}.lora_down.weight"] = torch.randn(rank, *shape[1:]).half()
            given[f"{key}.alpha"] = torch.tensor(1.0 + i % 2).half()
    return given


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


@pytest.mark.parametrize("model", SPREAD)
def test_kohya_to_a_pipeline_of_folders_and_back(model: str, tmp_path: Path) -> None:
    given = kohya_file(model)
    source, out, back = tmp_path / "in.safetensors", tmp_path / "out", tmp_path / "k.safetensors"
    save_file(given, source)
    report = convert(source, out, "peft")
    assert report.facts["model"] == model and report.max_error == 0.0
    assert sorted(p.name for p in out.iterdir()) == sorted(SPREAD[model])
    convert(out, back, "kohya")
    assert same(given, load_file(back))
    verify(source, out)


@pytest.mark.slow
@pytest.mark.parametrize("model", SPREAD)
def test_the_real_unet_takes_it(model: str, tmp_path: Path) -> None:
    """PEFT targets just the adapter's modules of diffusers' own UNet, on the meta device."""
    from diffusers import UNet2DConditionModel

    source, out = tmp_path / "in.safetensors", tmp_path / "out"
    save_file(kohya_file(model, 61), source)
    convert(source, out, "peft")
    xl = {
        "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    }  # fmt: skip
    with torch.device("meta"):
        unet = UNet2DConditionModel(**(xl if model == "sdxl" else {"cross_attention_dim": 768}))
        config = peft.PeftConfig.from_pretrained(str(out / "unet"))
        adapted = peft.get_peft_model(unet, config)
    made = {
        n.replace(".default", ""): p.shape for n, p in adapted.named_parameters() if "lora_" in n
    }
    written = load_file(out / "unet" / "adapter_model.safetensors")
    assert made == {k: v.shape for k, v in written.items()}


def test_sdxl_in_diffusers_names_gives_the_same(tmp_path: Path) -> None:
    """Both spellings of one module are found; kohya's own is written."""
    given = {k: v for k, v in kohya_file("sdxl").items() if k.startswith("lora_unet_")}
    save_file(given, tmp_path / "ldm.safetensors")
    convert(tmp_path / "ldm.safetensors", tmp_path / "out", "peft")
    convert(tmp_path / "ldm.safetensors", tmp_path / "l.safetensors", "lycoris")
    other = load_file(tmp_path / "l.safetensors")
    other = {k.replace("lycoris_", "lora_unet_", 1): v for k, v in other.items()}
    assert not same(given, other)
    save_file(other, tmp_path / "diffusers.safetensors")
    convert(tmp_path / "diffusers.safetensors", tmp_path / "k.safetensors", "kohya")
    assert same(given, load_file(tmp_path / "k.safetensors"))


def encoder_file(prefix: str, size: int) -> Weights:
    key = f"{prefix}_text_model_encoder_layers_0_self_attn_q_proj"
    return {
        f"{key}.lora_up.weight": torch.randn(size, 2),
        f"{key}.lora_down.weight": torch.randn(2, size),
        f"{key}.alpha": torch.tensor(1.0),
    }


def test_a_lone_text_encoder(tmp_path: Path) -> None:
    """lora_te1 keeps its prefix; a PEFT folder of it alone fits several models, and says so."""
    given = encoder_file("lora_te1", 768)
    save_file(given, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out", "peft")
    convert(tmp_path / "out", tmp_path / "k.safetensors", "kohya")
    assert same(given, load_file(tmp_path / "k.safetensors"))
    bare = load_file(tmp_path / "out" / "adapter_model.safetensors")
    save_file(bare, tmp_path / "out" / "adapter_model.safetensors")  # without our metadata
    with pytest.raises(SurgeryError) as refusal:
        convert(tmp_path / "out", tmp_path / "k2.safetensors", "kohya")
    assert refusal.value.code == "ambiguous-model"
    for base, prefix in (("sd15", "lora_te_"), ("sdxl", "lora_te1_"), ("flux", "lora_te1_")):
        convert(tmp_path / "out", tmp_path / f"{base}.safetensors", "kohya", base=base)
        assert all(k.startswith(prefix) for k in load_file(tmp_path / f"{base}.safetensors"))


@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_the_real_text_encoder_takes_it(kind: str, tmp_path: Path) -> None:
    """transformers 5 dropped ``text_model.`` from one of the two; the base at hand decides."""
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, bos_token_id=1,
        num_attention_heads=2, max_position_embeddings=8, projection_dim=8, eos_token_id=2,
    )  # fmt: skip
    model = getattr(transformers, kind)(config).eval()
    model.save_pretrained(tmp_path / "base")
    save_file(encoder_file("lora_te1", 16), tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out", "peft", base=tmp_path / "base")
    before = model(torch.tensor([[1, 5, 2]])).last_hidden_state.detach()
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "out"))
    result = adapted.load_adapter(str(tmp_path / "out"), "again")
    assert not result.unexpected_keys and not [k for k in result.missing_keys if ".again" in k]
    after = adapted(torch.tensor([[1, 5, 2]])).last_hidden_state.detach()
    assert float((after - before).norm()) > 1e-3
