"""Real Flux files' keys and shapes, through PEFT with diffusers' names and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptsurgery import SurgeryError, convert, verify

GOLDEN = Path(__file__).parents[2] / "formats" / "golden"
FILES = ("flux-lora-kohya", "flux-lora-aitoolkit-bfl-names", "flux-lora-diffusers")
Weights = dict[str, torch.Tensor]


def weights(name: str, whole: bool, dtype: torch.dtype = torch.bfloat16) -> Weights:
    """Random tensors of a golden's shapes; of blocks 0 and 1 alone unless ``whole``."""
    table = json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))["tensors"]
    random = torch.Generator().manual_seed(0)
    kept = {k: s for k, s in table.items() if whole or any(f"blocks{b}" in k for b in _FIRST)}
    return {
        k: (torch.randn(s, generator=random) if s else torch.tensor(8.0)).to(dtype)
        for k, s in kept.items()
    }


_FIRST = ("_0_", "_1_", ".0.", ".1.")


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_to_peft_and_back_to_kohya(name: str, whole: bool, tmp_path: Path) -> None:
    given = weights(name, whole)
    source, out, back = tmp_path / "in.safetensors", tmp_path / "out", tmp_path / "k.safetensors"
    save_file(given, source, {"title": "kept", "ss_network_dim": "1", "sshs_model_hash": "stale"})
    report = convert(source, out, "peft")
    assert report.facts["model"] == "flux" and report.facts["components"] == ["transformer"]
    assert report.max_error == 0.0
    assert convert(out, back, "kohya").max_error == 0.0
    verify(source, back)
    if "kohya" in name:
        assert same(given, load_file(back))
    convert(back, tmp_path / "again", "peft")
    verify(out, tmp_path / "again")


def test_fused_qkv_is_cut_by_rows(tmp_path: Path) -> None:
    given = weights("flux-lora-kohya", whole=False)
    save_file(given, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out", "peft")
    got = load_file(tmp_path / "out" / "adapter_model.safetensors")
    start = "base_model.model.transformer_blocks.0.attn."
    for i, part in enumerate(("to_q", "to_k", "to_v")):
        fused = "lora_unet_double_blocks_0_img_attn_qkv"
        rows = given[f"{fused}.lora_up.weight"][i * 3072 : (i + 1) * 3072]
        assert torch.equal(got[f"{start}{part}.lora_B.weight"], rows)
        assert torch.equal(got[f"{start}{part}.lora_A.weight"], given[f"{fused}.lora_down.weight"])
    single = "lora_unet_single_blocks_1_linear1"
    if f"{single}.lora_up.weight" in given:
        mlp = got["base_model.model.single_transformer_blocks.1.proj_mlp.lora_B.weight"]
        assert torch.equal(mlp, given[f"{single}.lora_up.weight"][9216:])


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda given: {k: v for k, v in given.items() if part not in k}


def with_alphas(given: Weights) -> Weights:
    alphas = {k.replace("lora_A.weight", "alpha"): torch.tensor(16.0) for k in given}
    return given | {k: v for k, v in alphas.items() if k.endswith(".alpha")}


def with_encoders(given: Weights) -> Weights:
    """CLIP-L under lora_te1 and T5 under lora_te3, in another dtype."""
    more: Weights = {}
    clip = "lora_te1_text_model_encoder_layers_{}_self_attn_q_proj"
    t5 = "lora_te3_encoder_block_{}_layer_0_SelfAttention_q"
    for name, size in ((clip, 768), (t5, 4096)):
        for i in range(2):
            key = name.format(i)
            more[f"{key}.lora_up.weight"] = torch.randn(size, 2)
            more[f"{key}.lora_down.weight"] = torch.randn(2, size)
            more[f"{key}.alpha"] = torch.tensor(1.5)
    return given | more


def onetrainer(given: Weights) -> Weights:
    def key(k: str) -> str:
        path, _, half = k.removesuffix(".weight").rpartition(".")
        flat = path.replace("transformer.", "lora_transformer_", 1).replace(".", "_")
        return f"{flat}.lora_{'down' if half == 'lora_A' else 'up'}.weight"

    return {key(k): v for k, v in given.items()}


VARIANTS: dict[str, tuple[str, Callable[[Weights], Weights]]] = {
    "diffusers without proj_mlp": ("flux-lora-diffusers", without("proj_mlp")),
    "diffusers without to_k": ("flux-lora-diffusers", without("to_k")),
    "diffusers with alphas": ("flux-lora-diffusers", with_alphas),
    "bfl with alphas": ("flux-lora-aitoolkit-bfl-names", with_alphas),
    "kohya without alphas": ("flux-lora-kohya", without("alpha")),
    "kohya with text encoders": ("flux-lora-kohya", with_encoders),
    "OneTrainer": ("flux-lora-diffusers", onetrainer),
}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variants(variant: str, tmp_path: Path) -> None:
    name, change = VARIANTS[variant]
    given = change(weights(name, whole=False))
    source, out, back = tmp_path / "in.safetensors", tmp_path / "out", tmp_path / "k.safetensors"
    save_file(given, source)
    assert convert(source, out, "peft").max_error == 0.0
    convert(out, back, "kohya")
    verify(source, back)
    convert(source, tmp_path / "direct.safetensors", "kohya")
    verify(source, tmp_path / "direct.safetensors")
    written = load_file(tmp_path / "direct.safetensors")
    assert all(k.startswith(("lora_unet_double", "lora_unet_single", "lora_te")) for k in written)
    if variant == "kohya with text encoders":
        assert same(given, load_file(back))
        assert sorted(p.name for p in out.iterdir()) == [
            "text_encoder", "text_encoder_2", "transformer",
        ]  # fmt: skip


def test_peft_keys_without_their_config_are_refused(tmp_path: Path) -> None:
    given = weights("flux-lora-diffusers", whole=False)
    save_file({f"base_model.model.{k}": v for k, v in given.items()}, tmp_path / "a.safetensors")
    with pytest.raises(SurgeryError) as refusal:
        convert(tmp_path / "a.safetensors", tmp_path / "out", "peft")
    assert refusal.value.code == "config-missing"


def test_a_tiny_flux_of_diffusers_loads_it(tmp_path: Path) -> None:
    """The real FluxTransformer2DModel: every tensor lands on it, and moves its output."""
    import peft
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4), guidance_embeds=False,
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "base")
    given: Weights = {}
    for path, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and ("attn.to_" in path or "mlp" in path):
            key = "lora_unet_" + path.replace(".", "_")
            given[f"{key}.lora_up.weight"] = torch.randn(layer.out_features, 2)
            given[f"{key}.lora_down.weight"] = torch.randn(2, layer.in_features)
            given[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(given, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out", "peft", base=tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "out"))
    result = adapted.load_adapter(str(tmp_path / "out"), "again")
    assert not result.unexpected_keys and not [k for k in result.missing_keys if ".again" in k]
    landed = {n for n, _ in adapted.named_parameters() if ".again." in n}
    assert len(landed) == 2 * len(given) // 3
    convert(tmp_path / "out", tmp_path / "k.safetensors", "kohya", base=tmp_path / "base")
    assert same(given, load_file(tmp_path / "k.safetensors"))


@pytest.mark.parametrize("to", ["peft", "kohya", "lycoris"])
def test_a_fused_lokr_that_cannot_be_cut(to: str, tmp_path: Path) -> None:
    """b = 2304 rows do not divide q, k, v: refused by name, exact as LoRA, and verified so."""
    fused, out = "lora_unet_double_blocks_0_img_attn_qkv", tmp_path / "out"
    given = {
        f"{fused}.lokr_w1": torch.rand(4, 4),
        f"{fused}.lokr_w2_a": torch.rand(2304, 4),
        f"{fused}.lokr_w2_b": torch.rand(4, 768),
        f"{fused}.alpha": torch.tensor(1.0),
    }
    save_file(given, tmp_path / "in.safetensors")
    if to == "peft":
        with pytest.raises(SurgeryError) as refusal:
            convert(tmp_path / "in.safetensors", out, to)
        assert refusal.value.code == "fused-lokr"
    else:
        out = tmp_path / "out.safetensors"
    report = convert(tmp_path / "in.safetensors", out, to, algorithm="lora")
    assert report.max_error < 1e-6 and {r.change for r in report.rows} == {"rounded"}
    verify(tmp_path / "in.safetensors", out)
    verify(out, tmp_path / "in.safetensors")
