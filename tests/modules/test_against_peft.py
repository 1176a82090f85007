"""The same weights and configs here and in the real PEFT: forward, gradients, merged weights."""

from __future__ import annotations

import copy
import re
from typing import Any

import peft
import pytest
import torch
from live_nets import ALGORITHMS, both, configs, logits, once_each, tiny
from safetensors.torch import load_file

from adaptsurgery import PeftModel

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "vit": ["q_proj", "v_proj", "fc1"],
    "bert": ["query", "value", "dense"],
    "clip": ["q_proj", "out_proj", "fc2"],
    "unet": ["to_q", "to_out.0", "conv1", "conv_shortcut", "proj_in"],
    "t5": ["q", "v", "wi_0", "wo"],
}
LINEAR_ONLY = {("gpt2", a) for a in ("loha", "lokr", "hra")}  # PEFT has no Conv1D of transformers


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def gradients(model: Any, given: Any) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    out = logits(model(**given))
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", TARGETS)
def test_forward_gradients_and_merge_are_peft_s(name: str, algorithm: str) -> None:
    if (name, algorithm) in LINEAR_ONLY:
        pytest.skip("PEFT has none of it on transformers' Conv1D")
    model, given = tiny(name)
    ours, theirs = configs(algorithm, r=4, alpha=7, target_modules=TARGETS[name])
    mine, peer = both(model, ours, theirs)
    a, b = logits(mine(**given)), logits(peer(**given))
    close(a, b)
    a.square().mean().backward()
    b.square().mean().backward()
    held = {n: p.grad for n, p in peer.named_parameters() if p.requires_grad}
    assert held.keys() == {n for n, p in mine.named_parameters() if p.requires_grad}
    for key, parameter in mine.named_parameters():
        if parameter.requires_grad:
            close(parameter.grad, held[key])
    merged, told = mine.merge_and_unload(), peer.merge_and_unload()
    assert merged.state_dict().keys() == model.state_dict().keys()
    for key, tensor in told.state_dict().items():
        close(merged.state_dict()[key], tensor)
    close(logits(merged(**given)), b)


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "lora": [
        {"use_rslora": True, "alpha": 5},
        {"use_dora": True},
        {"use_dora": True, "modules_to_save": ["conv_out"], "bias": "all"},
        {"rank_pattern": {"conv1": 3, r"mid.*to_q": 5}, "alpha_pattern": {"to_q": 11}},
        {"bias": "all"},
        {"modules_to_save": ["conv_out"]},
    ],
    "loha": [
        {"use_effective_conv2d": True},
        {
            "rank_pattern": {"conv1": 3},
            "alpha_pattern": {"to_q": 11},
            "modules_to_save": ["conv_in"],
        },
    ],
    "lokr": [
        {"use_effective_conv2d": True, "decompose_both": True},
        {"decompose_factor": 4},
        {"decompose_factor": 2, "r": 1, "decompose_both": True},
        {"rank_pattern": {"conv1": 2}},
    ],
    "hra": [{"apply_GS": True}, {"bias": "all"}, {"r": 3}],
}


@pytest.mark.parametrize("algorithm, said", [(a, s) for a in OPTIONS for s in OPTIONS[a]], ids=str)
def test_options_are_peft_s_and_files_go_both_ways(
    algorithm: str, said: dict[str, Any], tmp_path: Any
) -> None:
    model, given = tiny("unet")
    targets = ["to_q", "to_out.0", "conv1", "conv_shortcut"]
    if said.get("apply_GS"):
        targets = [*targets[:2], "conv1"]
    ours, theirs = configs(algorithm, **{"r": 4, "alpha": 6, "target_modules": targets, **said})
    mine, peer = both(model, ours, theirs)
    b = logits(peer(**given))
    close(logits(mine(**given)), b)
    if (algorithm, "use_effective_conv2d" in said) != ("loha", True):  # PEFT's are wrong there
        close(gradients(mine, given), gradients(peer, given))
    assert mine.get_nb_trainable_parameters() == peer.get_nb_trainable_parameters()
    mine.save_pretrained(tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours"))
    close(logits(read(**given)), b)
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "theirs")
    close(logits(again(**given)), b)
    written = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert written.keys() == once_each(load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    result = peft.set_peft_model_state_dict(read, written)
    left = [
        k for k in result.missing_keys if re.search("lora_|hada_|lokr_|hra_|modules_to_save", k)
    ]
    assert not left and not result.unexpected_keys


@pytest.mark.parametrize("widened", [True, False])
def test_the_adapters_dtype_is_peft_s(widened: bool) -> None:
    model, _ = tiny("llama")
    for layer in model.model.layers[:1]:
        layer.to(torch.bfloat16)
    ours, theirs = configs("loha", r=2, target_modules=["q_proj"])
    mine, peer = both(model, ours, theirs, autocast_adapter_dtype=widened)
    said = {n: p.dtype for n, p in mine.named_parameters()}
    assert said == {n: p.dtype for n, p in peer.named_parameters()}
    assert (torch.bfloat16 in {said[n] for n in said if "hada" in n}) is not widened
