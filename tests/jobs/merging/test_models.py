"""Merged checkpoints of tiny real models, loaded by their frameworks, against base + adapter there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from lycoris import LycorisNetwork, create_lycoris
from safetensors.torch import load_file, save_file

from adaptsurgery.jobs.merging.check import verify_merge
from adaptsurgery.jobs.merging.merge import merge, unmerge
from adaptsurgery_formats.errors import SurgeryError

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
TOKENS = torch.arange(10)[None]
PIXELS = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)


def llama(**more: Any) -> torch.nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, **more))


def gpt2() -> torch.nn.Module:
    config = tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
    return tf.GPT2LMHeadModel(config)


def phi3() -> torch.nn.Module:
    return tf.Phi3ForCausalLM(tf.Phi3Config(**TEXT, pad_token_id=0))


def mixtral() -> torch.nn.Module:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**TEXT, num_local_experts=4))


def vit() -> torch.nn.Module:
    return tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            image_size=16, patch_size=8, num_labels=3,
        )
    )  # fmt: skip


def run(model: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        if inputs:
            return model(**inputs)[0]
        vision = "ViT" in type(getattr(model, "base_model", model)).__name__ or hasattr(
            model.config, "patch_size"
        )
        return model(PIXELS if vision else TOKENS).logits


def wake(model: torch.nn.Module) -> None:
    """Numbers everywhere, where initial values would make the adapter the identity."""
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in ("lora_", "hada_", "lokr_", "hra_")):
            torch.nn.init.normal_(parameter, std=0.2)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def saved(model: torch.nn.Module, where: Path, shard: str = "") -> Path:
    model.save_pretrained(where, **({"max_shard_size": shard} if shard else {}))
    return where


def wrapped(model: torch.nn.Module, config: peft.PeftConfig, where: Path) -> tuple[Path, Any]:
    adapted = peft.get_peft_model(model, config)
    wake(adapted)
    wanted = run(adapted)
    adapted.save_pretrained(where)
    return where, wanted


LINEAR = r".*(q_proj|v_proj|down_proj|c_attn|c_proj|c_fc|qkv_proj|gate_up_proj|o_proj|fc1)"
CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR),
    "rslora": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=LINEAR, modules_to_save=["lm_head", "classifier"]
    ),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=LINEAR),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=LINEAR),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=5, target_modules=LINEAR),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=LINEAR),
}  # fmt: skip
MODELS = {"llama": llama, "phi3": phi3, "mixtral": mixtral, "vit": vit, "gpt2": gpt2}
CASES = [
    *[("llama", name, "") for name in CONFIGS],
    *[(model, name, "20KB") for model in ("phi3", "vit") for name in ("lora", "loha", "hra")],
    ("mixtral", "lora", "20KB"), ("vit", "rslora", ""), ("gpt2", "lora", ""), ("gpt2", "dora", ""),
    ("vit", "lokr", ""), ("phi3", "lokr", ""),
]  # fmt: skip


@pytest.mark.parametrize(("model", "config", "shard"), CASES)
def test_merged_is_base_and_adapter_under_peft(
    model: str, config: str, shard: str, tmp_path: Path
) -> None:
    live = MODELS[model]()
    base = saved(live, tmp_path / "base", shard)
    adapter, wanted = wrapped(live, CONFIGS[config](), tmp_path / "adapter")
    report = merge(base, adapter, tmp_path / "out")
    assert not report.facts["unmatched"]
    got = type(MODELS[model]()).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(run(got), wanted, atol=1e-5, rtol=1e-5)
    assert verify_merge(tmp_path / "out", base, adapter).rows
    before = {p.name for p in base.iterdir()}
    after = {p.name for p in (tmp_path / "out").iterdir()}
    assert after - {"adaptsurgery_manifest.json"} == before


def llava() -> torch.nn.Module:
    sees = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
    sees |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sees |= {"num_attention_heads": 2}
    reads = {"model_type": "llama", **TEXT}
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(text_config=reads, vision_config=sees))


def qwen2_vl() -> torch.nn.Module:
    sees = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "patch_size": 4}
    reads = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    return tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(text_config=reads, vision_config=sees)
    )


@pytest.mark.parametrize("build", [llava, qwen2_vl])
def test_a_language_model_and_what_it_sees_with(
    build: Callable[[], torch.nn.Module], tmp_path: Path
) -> None:
    """The files have older names than the model that the adapter was trained in, of each part others."""
    live = build()
    base = saved(live, tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules="all-linear")
    adapted = peft.get_peft_model(live, config)
    wake(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = load_file(
        saved(adapted.merge_and_unload(), tmp_path / "by_peft") / "model.safetensors"
    )
    report = merge(base, tmp_path / "adapter", tmp_path / "out")
    assert report.facts["modules"] == len(report.rows) and not report.facts["unmatched"]
    assert {r.module.split(".")[0] for r in report.rows} >= {"vision_tower", "language_model"} or (
        {r.module.split(".")[0] for r in report.rows} == {"visual", "model"}
    )
    got = load_file(tmp_path / "out/model.safetensors")
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)])
@pytest.mark.parametrize("config", ["lora", "loha", "lokr", "hra"])
def test_pefts_merge_is_matched(
    config: str, dtype: torch.dtype, off: float, tmp_path: Path
) -> None:
    live = llama().to(dtype)
    base = saved(live, tmp_path / "base")
    wrapped(live, CONFIGS[config](), tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(
        tf.LlamaForCausalLM.from_pretrained(base, dtype=dtype), tmp_path / "adapter"
    )
    wanted = adapted.merge_and_unload().state_dict()
    merge(base, tmp_path / "adapter", tmp_path / "out")
    got = load_file(tmp_path / "out/model.safetensors")
    assert verify_merge(tmp_path / "out", base, tmp_path / "adapter").rows
    if config == "hra" and dtype == torch.bfloat16:
        return  # PEFT rounds the rotation itself to bf16: tens of roundings
    for name, tensor in got.items():
        assert tensor.dtype == dtype
        far = (tensor.double() - wanted[name].double()).abs()
        assert bool((far <= off * wanted[name].double().abs() + 1e-6).all()), name


def test_gpt2s_square_projection_is_stored_transposed(tmp_path: Path) -> None:
    """c_proj is 32×32 here and 768×768 in GPT-2: no shape tells that it is (in, out)."""
    live = gpt2()
    base = saved(live, tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["attn.c_proj"], fan_in_fan_out=True)
    adapter, wanted = wrapped(live, config, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "out")
    got = tf.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(run(got), wanted, atol=1e-5, rtol=1e-5)
    # The lone file says as much by the layers beside it.
    merge(base / "model.safetensors", adapter, tmp_path / "out.safetensors")
    one, two = (
        load_file(tmp_path / "out.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    assert all(torch.equal(one[k], two[k]) for k in two)


def test_several_adapters_with_weights(tmp_path: Path) -> None:
    """W' = W·R1·R2 + Σ w·s·Δ, whatever the order in which deltas and rotations are named."""
    live = llama()
    base = saved(live, tmp_path / "base", "20KB")
    names = {n: CONFIGS[n]() for n in ("lora", "hra", "lokr")}
    for name, config in names.items():
        wrapped(llama(), config, tmp_path / name)
    second, _ = wrapped(llama(), CONFIGS["hra"](), tmp_path / "hra2")
    given = [f"{tmp_path / 'lora'}=0.5", tmp_path / "hra", (tmp_path / "lokr", -1.5), second]
    merge(base, given, tmp_path / "out")
    adapted = peft.get_peft_model(live, CONFIGS["lora"]())
    state = adapted.base_model.model.model.layers[0].self_attn.q_proj
    import adaptsurgery

    weight = state.weight.detach().double()
    path = "model.layers.0.self_attn.q_proj"
    for name in ("hra", "hra2"):
        weight = adaptsurgery.load(tmp_path / name)[path].fold(weight)
    weight = adaptsurgery.load(tmp_path / "lora")[path].scaled(0.5).fold(weight)
    weight = adaptsurgery.load(tmp_path / "lokr")[path].scaled(-1.5).fold(weight)
    got = tf.LlamaForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].self_attn.q_proj
    torch.testing.assert_close(got.weight.double(), weight, atol=1e-5, rtol=1e-5)


def test_unmerge_gives_the_base_back(tmp_path: Path) -> None:
    live = llama()
    base = saved(live, tmp_path / "base", "20KB")
    given = [wrapped(llama(), CONFIGS[n](), tmp_path / n)[0] for n in ("lora", "hra", "loha")]
    merge(base, given, tmp_path / "out")
    report = unmerge(tmp_path / "out", given, tmp_path / "back", against=base)
    assert report.facts["against"]["relative"] < 1e-5
    assert any(n.code == "storage-rounding" for n in report.notes)
    a = tf.LlamaForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    for name, tensor in llama_state(base).items():
        torch.testing.assert_close(a[name], tensor, atol=1e-5, rtol=1e-4)


def llama_state(folder: Path) -> dict[str, torch.Tensor]:
    return tf.LlamaForCausalLM.from_pretrained(folder).state_dict()


# Tied tables, vocabularies, heads


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_tied_table_is_untied_where_the_adapter_means_one_user(
    targets: list[str], tmp_path: Path
) -> None:
    live = llama(tie_word_embeddings=True)
    base = saved(live, tmp_path / "base", "20KB")
    config = peft.LoraConfig(r=4, target_modules=targets)
    adapter, wanted = wrapped(live, config, tmp_path / "adapter")
    report = merge(base, adapter, tmp_path / "out")
    assert [n.code for n in report.notes if n.code == "untied"]
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["tie_word_embeddings"] is False
    got = tf.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(run(got), wanted, atol=1e-5, rtol=1e-5)


def test_an_embeddings_lora_has_a_weight_and_an_inverse(tmp_path: Path) -> None:
    """PEFT saves the unchanged table beside it, which is no replacement."""
    live = llama()
    base = saved(live, tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens"])
    adapter, _ = wrapped(live, config, tmp_path / "adapter")
    assert any("base_layer" in k for k in load_file(adapter / "adapter_model.safetensors"))
    merge(base, (adapter, 0.5), tmp_path / "out")
    report = unmerge(tmp_path / "out", (adapter, 0.5), tmp_path / "back", against=base)
    assert report.facts["against"]["relative"] < 1e-6


def test_replaced_parameters_take_no_weight_and_have_no_inverse(tmp_path: Path) -> None:
    live = vit()
    base = saved(live, tmp_path / "base")
    adapter, _ = wrapped(live, CONFIGS["rslora"](), tmp_path / "adapter")
    live_head = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.classifier.weight"
    live_head[key] += 1
    save_file(live_head, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(SurgeryError, match="no-weight"):
        merge(base, (adapter, 0.5), tmp_path / "out")
    with pytest.raises(SurgeryError, match="no-inverse"):
        unmerge(base, adapter, tmp_path / "out")
    merge(base, adapter, tmp_path / "out")
    got = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(got["classifier.weight"], live_head[key])


def test_a_tied_table_changed_alike_stays_tied(tmp_path: Path) -> None:
    live = llama(tie_word_embeddings=True)
    base = saved(live, tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"])
    adapter, _ = wrapped(live, config, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    stem = "base_model.model."
    a = tensors[f"{stem}model.embed_tokens.lora_embedding_A"]
    b = tensors[f"{stem}model.embed_tokens.lora_embedding_B"]
    tensors[f"{stem}lm_head.lora_A.weight"] = b.t().contiguous()
    tensors[f"{stem}lm_head.lora_B.weight"] = a.t().contiguous()
    save_file({k: v for k, v in tensors.items() if "base_layer" not in k}, file, {"format": "pt"})
    report = merge(base, adapter, tmp_path / "out")
    assert [n.code for n in report.notes if n.code.startswith("tied")] == ["tied-merged-once"]
    merged = load_file(tmp_path / "out/model.safetensors")
    assert "lm_head.weight" not in merged
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    scale = config.lora_alpha / config.r
    torch.testing.assert_close(merged["model.embed_tokens.weight"], table + scale * (b @ a).t())


def test_a_grown_vocabulary(tmp_path: Path) -> None:
    live = llama()
    base = saved(live, tmp_path / "base")
    live.resize_token_embeddings(70, mean_resizing=False)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    adapter, wanted = wrapped(live, config, tmp_path / "adapter")
    report = merge(base, adapter, tmp_path / "out")
    assert sum(n.code == "grown-table" for n in report.notes) == 2
    got = tf.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert got.config.vocab_size == 70
    torch.testing.assert_close(run(got), wanted, atol=1e-5, rtol=1e-5)


def test_a_classifier_that_the_base_lacks_is_added(tmp_path: Path) -> None:
    config = tf.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        vocab_size=64, num_labels=3,
    )  # fmt: skip
    live = tf.BertForSequenceClassification(config)
    base = saved(live.bert, tmp_path / "base")  # names without `bert.`
    adapter, _ = wrapped(
        live, peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"]), tmp_path / "a"
    )
    report = merge(base, adapter, tmp_path / "out")
    assert {n.code for n in report.notes} >= {"added-parameter", "aligned-names"}
    merged = load_file(tmp_path / "out/model.safetensors")
    assert merged["classifier.weight"].shape == (3, 32)


# LyCORIS


def lycoris_net(model: torch.nn.Module, preset: dict[str, Any], **more: Any) -> Any:
    LycorisNetwork.apply_preset(preset)
    net = create_lycoris(model, 1.0, **more)
    net.apply_to()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


@pytest.mark.parametrize("algo", ["locon", "loha", "lokr", "full"])
@pytest.mark.parametrize("tucker", [False, True])
def test_merged_unet_is_lycoris_forward(algo: str, tucker: bool, tmp_path: Path) -> None:
    """alpha ≠ rank: its forward scales once, its merge twice; the merged file has the forward's."""
    from diffusers import UNet2DConditionModel

    live = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=16,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    base = saved(live, tmp_path / "base", "20KB")
    preset = {"target_module": ["Linear", "Conv2d", "GroupNorm", "LayerNorm"], "enable_conv": True}
    net = lycoris_net(
        live, preset, linear_dim=4, linear_alpha=2, conv_dim=4, conv_alpha=1, algo=algo,
        use_tucker=tucker, factor=2, train_norm=tucker,
    )  # fmt: skip
    inputs = {
        "sample": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 5, 16),
    }  # fmt: skip
    wanted = run(live, **inputs)
    file = tmp_path / "lycoris.safetensors"
    state = {k: v.contiguous() for k, v in net.state_dict().items()}
    save_file(state, file)
    merge(base, file, tmp_path / "out")
    got = UNet2DConditionModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(run(got, **inputs), wanted, atol=2e-5, rtol=1e-4)


def test_flux_fused_and_split(tmp_path: Path) -> None:
    """diffusers names on diffusers' weights, by LyCORIS's forward."""
    from diffusers import FluxTransformer2DModel

    live = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    base = saved(live, tmp_path / "base")
    net = lycoris_net(
        live, {"target_module": ["Linear"]}, linear_dim=2, linear_alpha=1, algo="lokr"
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 4), "encoder_hidden_states": torch.randn(1, 3, 8),
        "pooled_projections": torch.randn(1, 8), "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3),
    }  # fmt: skip
    wanted = run(live, **inputs)
    file = tmp_path / "lycoris.safetensors"
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, file)
    merge(base, file, tmp_path / "out")
    got = FluxTransformer2DModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(run(got, **inputs), wanted, atol=1e-5, rtol=1e-4)
