"""What --base may name, on tiny real models saved by transformers and diffusers, and on what is broken."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM

from adaptsurgery.checkpoint.base import Base, find_weights, read_base
from adaptsurgery.checkpoint.bridge import to_torch
from adaptsurgery_formats.errors import FileError, NameLookupError


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=16,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4,
    )  # fmt: skip


def clip() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=16,
        )
    )  # fmt: skip


def agrees(base: Base, component: str, model: torch.nn.Module) -> None:
    """Each module with a weight is listed with its shape, and its weight and bias are its own."""
    listed = base.components[component]
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or path == "lm_head":
            continue
        assert listed[path] == tuple(weight.shape), path
        assert torch.equal(to_torch(base.weight(component, path)), weight)
        bias = base.bias(component, path)
        if getattr(module, "bias", None) is None:
            assert bias is None
        else:
            assert bias is not None and torch.equal(to_torch(bias), module.bias)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.nn.Module]]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    models = {"llama": llama(), "unet": unet(), "text_encoder": clip()}
    models["llama"].save_pretrained(root / "llama")
    models["llama"].save_pretrained(root / "sharded", max_shard_size="20KB")
    models["unet"].save_pretrained(root / "unet")
    models["unet"].save_pretrained(root / "unet_sharded", max_shard_size="20KB")
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=models["text_encoder"], unet=models["unet"], tokenizer=None,
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(root / "pipeline")
    return root, {**models, "vae": vae}


@pytest.mark.parametrize(
    ("place", "model", "shards"),
    [
        ("llama", "llama", False),
        ("llama/model.safetensors", "llama", False),
        ("sharded", "llama", True),
        ("sharded/model.safetensors.index.json", "llama", True),
        ("unet", "unet", False),
        ("unet_sharded", "unet", True),
    ],
)
def test_models_as_their_libraries_save_them(
    saved: tuple[Path, dict[str, torch.nn.Module]], place: str, model: str, shards: bool
) -> None:
    root, models = saved
    base = read_base(root / place)
    assert list(base.components) == [""]
    assert (len(base.files) > 1) == shards == bool(base.indexes)
    agrees(base, "", models[model])


def test_a_pipeline_by_component(saved: tuple[Path, dict[str, torch.nn.Module]]) -> None:
    root, models = saved
    base = read_base(root / "pipeline")
    assert set(base.components) == {"unet", "text_encoder", "vae"}
    for component in base.components:
        agrees(base, component, models[component])
    assert base.kinds["unet"] == "UNet2DConditionModel"
    assert base.kinds["text_encoder"] == "CLIPTextModel"
    assert base.folder == root / "pipeline"
    assert {f.name for f in base.files} == {
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_a_torch_pickle_is_a_base_too(tmp_path: Path) -> None:
    model = llama()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    agrees(read_base(tmp_path), "", model)
    agrees(read_base(tmp_path / "pytorch_model.bin"), "", model)


def test_unknown_names_come_with_the_nearest(
    saved: tuple[Path, dict[str, torch.nn.Module]],
) -> None:
    base = read_base(saved[0] / "llama")
    with pytest.raises(NameLookupError) as e:
        base.weight("", "model.layers.0.self_attn.qproj")
    assert "model.layers.0.self_attn.q_proj" in e.value.next
    with pytest.raises(NameLookupError) as e:
        base.weight("unet", "model.layers.0.self_attn.q_proj")
    assert e.value.code == "unknown-component"


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["model.fp16.safetensors", "model.safetensors"], "model.safetensors"),
        (["model.fp16.safetensors", "pytorch_model.bin"], "model.fp16.safetensors"),
        (["model.non_ema.safetensors", "model.fp16.safetensors"], "model.fp16.safetensors"),
        (
            ["diffusion_pytorch_model.fp16.safetensors", "config.json"],
            "diffusion_pytorch_model.fp16.safetensors",
        ),
        (
            [
                "model.safetensors.index.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
            ],
            "model.safetensors.index.json",
        ),
        (
            [
                "model.safetensors.index.fp16.json",
                "model.fp16-00001-of-00002.safetensors",
                "model.fp16-00002-of-00002.safetensors",
            ],
            "model.safetensors.index.fp16.json",
        ),
        (["weights.safetensors", "readme.md"], "weights.safetensors"),
        (["pytorch_model.bin", "training_args.bin"], "pytorch_model.bin"),
        (["training_args.bin", "config.json"], ""),
        ([], ""),
    ],
)
def test_which_file_is_taken(names: list[str], wanted: str) -> None:
    assert find_weights(names) == wanted


def test_several_models_in_one_folder_are_not_guessed_at(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w.weight": torch.ones(2)}, tmp_path / name)
    with pytest.raises(FileError) as e:
        read_base(tmp_path)
    assert e.value.code == "ambiguous-weights" and "a.safetensors" in e.value.seen


@pytest.mark.parametrize("shards", [("1-of-00002", "2-of-00002"), ("1-of-00002",)])
def test_shards_without_an_index_are_no_models_of_their_own(
    tmp_path: Path, shards: tuple[str, ...]
) -> None:
    for shard in shards:
        save_file({"w.weight": torch.ones(2)}, tmp_path / f"model-0000{shard}.safetensors")
    with pytest.raises(FileError) as e:
        read_base(tmp_path)
    assert e.value.code == "missing-index" and "model.safetensors.index.json" in e.value.next


def test_one_shard_of_one_is_the_model() -> None:
    assert find_weights(["m-00001-of-00001.safetensors"]) == "m-00001-of-00001.safetensors"


# -- Single-file pipelines ----------------------------------------------------------------------


def components_of(tmp_path: Path, *keys: str) -> dict[str, dict[str, tuple[int, ...]]]:
    save_file({k: torch.ones(2, 2) for k in keys}, tmp_path / "a.safetensors")
    return read_base(tmp_path / "a.safetensors").components


def test_stable_diffusion_in_one_file(tmp_path: Path) -> None:
    got = components_of(
        tmp_path,
        "model.diffusion_model.input_blocks.1.1.proj_in.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
        "first_stage_model.encoder.conv_in.weight",
        "model_ema.decay",
        "betas",
    )
    assert got == {
        "unet": {"input_blocks.1.1.proj_in": (2, 2)},
        "text_encoder": {"text_model.encoder.layers.0.self_attn.q_proj": (2, 2)},
        "vae": {"encoder.conv_in": (2, 2)},
    }


def test_sdxl_in_one_file(tmp_path: Path) -> None:
    got = components_of(
        tmp_path,
        "model.diffusion_model.input_blocks.4.1.proj_in.weight",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight",
    )
    assert got["text_encoder"] == {"text_model.final_layer_norm": (2, 2)}
    assert got["text_encoder_2"] == {"transformer.resblocks.0.mlp.c_fc": (2, 2)}


def test_flux_and_sd3_in_one_file(tmp_path: Path) -> None:
    flux = components_of(
        tmp_path,
        "model.diffusion_model.double_blocks.0.img_attn.qkv.weight",
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight",
        "text_encoders.t5xxl.transformer.shared.weight",
        "vae.encoder.conv_in.weight",
    )
    assert set(flux) == {"transformer", "text_encoder", "text_encoder_2", "vae"}
    assert flux["transformer"] == {"double_blocks.0.img_attn.qkv": (2, 2)}
    assert flux["text_encoder_2"] == {"shared": (2, 2)}
    (tmp_path / "a.safetensors").unlink()
    sd3 = components_of(
        tmp_path,
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight",
        "text_encoders.clip_g.transformer.text_model.final_layer_norm.weight",
        "text_encoders.t5xxl.transformer.shared.weight",
    )
    assert sd3["text_encoder_3"] == {"shared": (2, 2)}
    assert list(sd3["text_encoder_2"]) == ["text_model.final_layer_norm"]


def test_a_bare_transformer_stays_one_plain_model(tmp_path: Path) -> None:
    assert list(components_of(tmp_path, "double_blocks.0.img_attn.qkv.weight")) == [""]
    assert list(components_of(tmp_path, "vae.encoder.conv_in.weight")) == [""]


# -- Broken, dangerous, and not a base at all -------------------------------------------------------


def sharded(folder: Path, weight_map: dict[str, object]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"a.weight": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b.weight": torch.ones(3)}, folder / "two.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


GOOD = {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"b.weight": "three.safetensors"}, "missing-shard"),
        ({"b.weight": "../two.safetensors"}, "path-escapes"),
        ({"b.weight": "/etc/passwd"}, "path-escapes"),
        ({"b.weight": "sub/two.safetensors"}, "path-escapes"),
        ({"b.weight": "sub\\two.safetensors"}, "path-escapes"),
        ({"b.weight": ".."}, "path-escapes"),
        ({"b.weight": ""}, "path-escapes"),
        ({"b.weight": "two\0"}, "path-escapes"),
        ({"b.weight": 3}, "bad-index"),
        ({"b.weight": "one.safetensors"}, "index-mismatch"),
        ({"c.weight": "two.safetensors"}, "index-mismatch"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, change: dict[str, object], code: str) -> None:
    assert len(read_base(sharded(tmp_path / "good", GOOD)).files) == 2
    with pytest.raises(FileError) as e:
        read_base(sharded(tmp_path / "bad", {**GOOD, **change}))
    assert e.value.code == code and e.value.where.endswith(".index.json")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FileError) as e:
        read_base(tmp_path)
    assert e.value.code in ("bad-json", "bad-index")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path, GOOD)
    save_file({"a.weight": torch.ones(2), "b.weight": torch.ones(3)}, folder / "two.safetensors")
    with pytest.raises(FileError) as e:
        read_base(folder)
    assert e.value.code == "index-mismatch" and "`a.weight`" in e.value.seen


def test_a_pipeline_may_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"../unet": ["diffusers", "X"]}))
    with pytest.raises(FileError) as e:
        read_base(tmp_path)
    assert e.value.code == "path-escapes"


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_mid_block.lora_down.weight",
        "base_model.model.a.lora_A.weight",
        "base_model.model.a.lora_embedding_A",
        "a.hada_w1_a",
        "a.lokr_w2",
        "a.lokr_w1_b",
        "a.hra_u",
    ],
)
def test_an_adapter_is_no_base(tmp_path: Path, key: str) -> None:
    save_file({key: torch.ones(2, 2)}, tmp_path / "x.safetensors")
    for place in (tmp_path, tmp_path / "x.safetensors"):
        with pytest.raises(FileError) as e:
            read_base(place)
        assert e.value.code == "adapter-as-base"
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileError) as e:
        read_base(tmp_path)
    assert e.value.code == "adapter-as-base"


def test_nothing_there(tmp_path: Path) -> None:
    for place, code in [(tmp_path, "no-weights"), (tmp_path / "x", "no-such-file")]:
        with pytest.raises(FileError) as e:
            read_base(place)
        assert e.value.code == code
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(FileError) as e:
        read_base(tmp_path)
    assert e.value.code == "no-weights"


def test_a_large_base_costs_its_headers_only(tmp_path: Path) -> None:
    """Ten shards of a gibibyte each, as sparse files: nothing but the headers is touched."""
    weight_map = {}
    for i in range(10):
        entries, at = {}, 0
        for j in range(32):
            key = f"model.layers.{i}.m{j}.weight"
            entries[key] = {
                "dtype": "F16",
                "shape": [4096, 4096],
                "data_offsets": [at, at + (1 << 25)],
            }
            weight_map[key] = f"s{i}.safetensors"
            at += 1 << 25
        raw = json.dumps(entries).encode()
        with (tmp_path / f"s{i}.safetensors").open("wb") as f:
            f.write(len(raw).to_bytes(8, "little") + raw)
            f.truncate(8 + len(raw) + at)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    start = time.process_time()
    base = read_base(tmp_path)
    assert time.process_time() - start < 0.1  # 0.008 s on a quiet core
    assert len(base.components[""]) == 320


def test_rewriting_every_file_of_a_base_gives_its_bytes(
    saved: tuple[Path, dict[str, torch.nn.Module]], tmp_path: Path
) -> None:
    from adaptsurgery.checkpoint.writer import write_safetensors

    base = read_base(saved[0] / "sharded")
    for file in base.files:
        write_safetensors(tmp_path / file.name, file.tensors, file.metadata)
        original = saved[0] / "sharded" / file.name
        assert (tmp_path / file.name).read_bytes() == original.read_bytes()
        assert load_file(tmp_path / file.name).keys() == file.tensors.keys()
