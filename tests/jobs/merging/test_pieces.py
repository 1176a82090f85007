"""Fused, split and stacked weights by number: the merged file against the plain mathematics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptsurgery.jobs.merging.check import verify_merge
from adaptsurgery.jobs.merging.merge import merge, unmerge


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base_of(folder: Path, config: dict[str, Any] | None = None, **shapes: tuple[int, ...]) -> Path:
    folder.mkdir()
    tensors = {n.replace("__", "."): numbers(i, *s) for i, (n, s) in enumerate(shapes.items())}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def peft_of(folder: Path, kind: str, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    named = {f"base_model.model.{k}": v for k, v in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    said = {"peft_type": kind, "r": 2, "target_modules": ".*", **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def lora(path: str, out: int, into: int, seed: int) -> dict[str, torch.Tensor]:
    return {
        f"{path}.lora_A.weight": numbers(seed, 2, into),
        f"{path}.lora_B.weight": numbers(seed + 1, out, 2),
    }


def delta(tensors: dict[str, torch.Tensor], path: str) -> torch.Tensor:
    return tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]


def merged(base: Path, adapter: Path, out: Path) -> tuple[dict[str, torch.Tensor], ...]:
    """What was stored before and after; verified, and taken out again, on the way."""
    merge(base, adapter, out)
    assert verify_merge(out, base, adapter).rows
    unmerge(out, adapter, out.with_name("back"))
    before, after, back = (
        load_file(f / "model.safetensors") for f in (base, out, out.with_name("back"))
    )
    for name in before:
        torch.testing.assert_close(back[name], before[name], atol=1e-5, rtol=1e-5)
    return before, after


def test_split_adapter_on_fused_weights(tmp_path: Path) -> None:
    base = base_of(
        tmp_path / "base", self_attn__qkv_proj__weight=(16, 8), mlp__gate_up_proj__weight=(12, 8),
        attn__in_proj_weight=(24, 8),
    )  # fmt: skip
    given = {
        **lora("self_attn.q_proj", 8, 8, 10), **lora("self_attn.v_proj", 4, 8, 20),
        **lora("mlp.up_proj", 6, 8, 30), **lora("attn.k_proj", 8, 8, 40),
    }  # fmt: skip
    adapter = peft_of(tmp_path / "a", "LORA", given, lora_alpha=2)
    before, after = merged(base, adapter, tmp_path / "out")
    before["self_attn.qkv_proj.weight"][:8] += delta(given, "self_attn.q_proj")
    before["self_attn.qkv_proj.weight"][12:] += delta(given, "self_attn.v_proj")
    before["mlp.gate_up_proj.weight"][6:] += delta(given, "mlp.up_proj")
    before["attn.in_proj_weight"][8:16] += delta(given, "attn.k_proj")
    for name in before:
        torch.testing.assert_close(after[name], before[name])


def test_a_fused_lokr_on_split_weights_whose_cuts_it_does_not_know(tmp_path: Path) -> None:
    """b = 6 and the cuts at 8 and 10: no row of w1 ends there, and the merge is exact all the same."""
    base = base_of(
        tmp_path / "base",
        a__q_proj__weight=(8, 4),
        a__k_proj__weight=(2, 4),
        a__v_proj__weight=(2, 4),
    )
    w1, w2 = numbers(7, 2, 2), numbers(8, 6, 2)
    given = {"a.qkv_proj.lokr_w1": w1, "a.qkv_proj.lokr_w2": w2}
    adapter = peft_of(tmp_path / "a", "LOKR", given, alpha=4, r=4, decompose_factor=2)
    before, after = merged(base, adapter, tmp_path / "out")
    whole = torch.kron(w1, w2)
    for part, rows in (("q", slice(0, 8)), ("k", slice(8, 10)), ("v", slice(10, 12))):
        name = f"a.{part}_proj.weight"
        torch.testing.assert_close(after[name], before[name] + whole[rows])


@pytest.mark.parametrize("turned", [False, True])
def test_stacked_experts(turned: bool, tmp_path: Path) -> None:
    up_shape, down_shape = ((4, 8, 12), (4, 6, 8)) if turned else ((4, 12, 8), (4, 8, 6))
    base = base_of(
        tmp_path / "base", {"model_type": "llama4_text"} if turned else {},
        mlp__experts__gate_up_proj=up_shape, mlp__experts__down_proj=down_shape,
    )  # fmt: skip
    given = {
        **lora("mlp.experts.1.gate_proj", 6, 8, 10), **lora("mlp.experts.3.up_proj", 6, 8, 20),
        **lora("mlp.experts.3.down_proj", 8, 6, 30),
    }  # fmt: skip
    adapter = peft_of(tmp_path / "a", "LORA", given, lora_alpha=2)
    before, after = merged(base, adapter, tmp_path / "out")
    up, down = before["mlp.experts.gate_up_proj"], before["mlp.experts.down_proj"]
    up, down = (up.mT, down.mT) if turned else (up, down)
    up[1, :6] += delta(given, "mlp.experts.1.gate_proj")
    up[3, 6:] += delta(given, "mlp.experts.3.up_proj")
    down[3] += delta(given, "mlp.experts.3.down_proj")
    for name in before:
        torch.testing.assert_close(after[name], before[name])


def test_an_hra_on_one_part_of_a_fused_weight(tmp_path: Path) -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8}
    base = base_of(tmp_path / "base", config, self_attn__qkv_proj__weight=(16, 8))
    u = numbers(3, 8, 2)
    adapter = peft_of(tmp_path / "a", "HRA", {"self_attn.k_proj.hra_u": u}, apply_GS=False)
    before, after = merged(base, adapter, tmp_path / "out")
    rows = before["self_attn.qkv_proj.weight"][8:12]
    for column in (u / u.norm(dim=0)).T:
        rows -= 2 * torch.outer(rows @ column, column)
    torch.testing.assert_close(
        after["self_attn.qkv_proj.weight"], before["self_attn.qkv_proj.weight"]
    )


def test_a_pipeline_folder_by_component(tmp_path: Path) -> None:
    """kohya's prefixes find the parts; the vae and the scheduler come along untouched."""
    base = tmp_path / "base"
    unet = {"down_blocks.0.attn.to_q.weight": numbers(1, 8, 8)}
    text = {"text_model.encoder.layers.0.mlp.fc1.weight": numbers(2, 12, 8)}
    parts = {
        "unet": unet,
        "text_encoder": text,
        "vae": {"decoder.conv.weight": numbers(3, 4, 4, 3, 3)},
    }
    for name, tensors in parts.items():
        (base / name).mkdir(parents=True)
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        save_file(tensors, base / name / f"{stem}.safetensors")
        (base / name / "config.json").write_text("{}")
    (base / "scheduler").mkdir()
    (base / "scheduler/scheduler_config.json").write_text("{}")
    index = {"_class_name": "P", **{n: ["diffusers", "C"] for n in (*parts, "scheduler")}}
    (base / "model_index.json").write_text(json.dumps(index))
    given = {}
    for prefix, names in (("lora_unet", unet), ("lora_te", text)):
        for i, (name, weight) in enumerate(names.items()):
            stem = f"{prefix}_{name.removesuffix('.weight').replace('.', '_')}"
            given[f"{stem}.lora_up.weight"] = numbers(10 + i, weight.shape[0], 2)
            given[f"{stem}.lora_down.weight"] = numbers(20 + i, 2, weight.shape[1])
    save_file(given, tmp_path / "kohya.safetensors")
    report = merge(base, tmp_path / "kohya.safetensors", tmp_path / "out")
    assert report.facts["modules"] == 2 and report.facts["untouched_shards"] == 1
    assert verify_merge(tmp_path / "out", base, tmp_path / "kohya.safetensors").facts["edited"] == 2
    listed = {p.relative_to(base) for p in base.rglob("*") if p.is_file()}
    written = {
        p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert written - listed == {Path("adaptsurgery_manifest.json")} and listed <= written
    stem = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    up, down = given[f"{stem}.lora_up.weight"], given[f"{stem}.lora_down.weight"]
    got = load_file(tmp_path / "out/text_encoder/model.safetensors")
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    torch.testing.assert_close(got[name], text[name] + up @ down)
