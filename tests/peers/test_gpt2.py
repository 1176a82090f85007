"""transformers' Conv1D stores its weight (in, out); GPT-2's c_proj is square, so shapes say nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import adaptsurgery


@pytest.mark.slow
def test_dora_on_conv1d_as_lora(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"n_embd": 24, "n_head": 2, "n_layer": 2, "vocab_size": 50, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        target_modules=["c_proj", "c_attn"], r=3, lora_alpha=5, use_dora=True, fan_in_fan_out=True
    )
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
        elif "lora_" in name:
            parameter.data = torch.randn_like(parameter) / 10
    adapted.save_pretrained(tmp_path / "dora")
    tokens = torch.arange(8)[None]
    wanted, plain = adapted(tokens).logits, model(tokens).logits
    adaptsurgery.convert(
        tmp_path / "dora",
        tmp_path / "lora",
        "peft",
        base=tmp_path / "base",
        algorithm="lora",
        rank=24,
        allow_lossy=True,
    )
    found = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "lora").eval()(tokens).logits
    assert (wanted - plain).norm() > 0.05 * plain.norm()
    assert (found - wanted).norm() < 1e-5 * (wanted - plain).norm() + 1e-5


def test_flat_names_merge_into_conv1d_with_their_biases(tmp_path: Path) -> None:
    """kohya's names hide which layer they mean, and that its weight is stored (in, out)."""
    random = torch.Generator().manual_seed(0)
    shapes = {"c_attn": (16, 48), "c_proj": (16, 16)}
    base = {f"h.0.attn.{n}.weight": torch.randn(*s, generator=random) for n, s in shapes.items()}
    base |= {f"h.0.attn.{n}.bias": torch.randn(s[1], generator=random) for n, s in shapes.items()}
    adapter, wanted = {}, dict(base)
    for name, (i, o) in shapes.items():
        up, down, shift = (torch.randn(*s, generator=random) for s in ((o, 2), (2, i), (o,)))
        key = f"lora_unet_h_0_attn_{name}"
        adapter |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        adapter |= {f"{key}.alpha": torch.tensor(2.0), f"{key}.diff_b": shift}
        wanted[f"h.0.attn.{name}.weight"] = base[f"h.0.attn.{name}.weight"] + (up @ down).T
        wanted[f"h.0.attn.{name}.bias"] = base[f"h.0.attn.{name}.bias"] + shift
    save_file(base, tmp_path / "base.safetensors")
    save_file(adapter, tmp_path / "kohya.safetensors")
    out = tmp_path / "out.safetensors"
    adaptsurgery.merge(tmp_path / "base.safetensors", tmp_path / "kohya.safetensors", out)
    for key, tensor in load_file(out).items():
        torch.testing.assert_close(tensor, wanted[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["lora", "lokr"])
def test_lycoris_own_loader_refuses_conv1d_and_the_note_says_so(
    tmp_path: Path, algorithm: str
) -> None:
    """The file is right: what it merges to here is as near as the report says."""
    from lycoris import create_lycoris_from_weights

    torch.manual_seed(0)
    shape = {"n_embd": 24, "n_head": 2, "n_layer": 1, "vocab_size": 50, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**shape))
    model.save_pretrained(tmp_path / "base")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    names = [f"transformer.h.0.{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")]
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).add_(torch.randn(before[name].shape), alpha=0.1)
    model.save_pretrained(tmp_path / "tuned")
    tuned = {name: weight.clone() for name, weight in model.state_dict().items()}
    file = tmp_path / "out.safetensors"
    report = adaptsurgery.extract(
        tmp_path / "base", tmp_path / "tuned", file, algorithm=algorithm, rank=2, to="lycoris"
    )
    [note] = [n for n in report.notes if n.code == "lycoris-loader"]
    assert "3 modules are transformers' Conv1D" in note.text
    fresh = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="not supported"):
        create_lycoris_from_weights(1.0, str(file), fresh)
    adaptsurgery.merge(tmp_path / "base", file, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    apart = sum(float((merged[n] - tuned[n]).square().sum()) for n in names)
    total = sum(float((before[n] - tuned[n]).square().sum()) for n in names)
    assert (apart / total) ** 0.5 == pytest.approx(report.facts["layers_error"], rel=1e-4)


@pytest.mark.parametrize("said", [True, False])  # transformers before 5 leaves a default out
def test_peft_leaves_a_tied_head_behind_and_the_note_says_what_to_do(
    tmp_path: Path, said: bool
) -> None:
    torch.manual_seed(0)
    shape = {"n_embd": 24, "n_head": 2, "n_layer": 1, "vocab_size": 50, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.transformer.wte.weight.add_(torch.randn(50, 24), alpha=0.1)
        model.transformer.h[0].attn.c_attn.weight.add_(torch.randn(24, 72), alpha=0.1)
    model.save_pretrained(tmp_path / "tuned")
    file = tmp_path / "tuned" / "config.json"
    config = json.loads(file.read_text())
    assert config["tie_word_embeddings"] is True
    if not said:
        del config["tie_word_embeddings"]
        file.write_text(json.dumps(config))
    report = adaptsurgery.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=24)
    [note] = [n for n in report.notes if n.code == "tied-head"]
    assert note.where == "transformer.wte.weight"
    fresh = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "out").merge_and_unload().eval()
    tokens = torch.arange(8)[None]
    left = loaded(tokens).logits
    assert not torch.allclose(left, model(tokens).logits, atol=1e-2)
    loaded.lm_head.weight = loaded.transformer.wte.weight
    assert torch.allclose(loaded(tokens).logits, model(tokens).logits, atol=1e-4)
    adaptsurgery.merge(tmp_path / "base", tmp_path / "out", tmp_path / "merged")
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(merged(tokens).logits, left, atol=1e-4)
