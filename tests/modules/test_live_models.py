"""The calls on an adapted model: putting in, choosing, merging, taking out, saving, loading."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from live_nets import ALGORITHMS, Mixed, configs, ids, logits, tiny
from torch import nn

import adaptsurgery
from adaptsurgery import (
    AdaptedModel,
    HRAConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    SurgeryError,
    get_peft_model,
    orthogonality,
)
from adaptsurgery.modules.files import peft_tensors

TARGETS = ["fc", "out", "conv", "seq"]


def made(algorithm: str = "lora", **said: Any) -> PeftModel:
    torch.manual_seed(0)
    ours, _ = configs(algorithm, **{"r": 2, "alpha": 3, "target_modules": TARGETS, **said})
    return get_peft_model(Mixed(), ours).eval()


X = ids(2, 5)


def close(a: Any, b: Any, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_fresh_adapter_changes_nothing_and_unload_gives_the_base_back(algorithm: str) -> None:
    torch.manual_seed(0)
    base = Mixed().eval()
    keys, before = list(base.state_dict()), base(X)
    ours, _ = configs(algorithm, r=2, target_modules=TARGETS, init=True)
    model = get_peft_model(base, ours)
    close(model(X), before)
    assert model.unload() is base
    assert list(base.state_dict()) == keys and torch.equal(base(X), before)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_merging_and_unmerging(algorithm: str) -> None:
    model = made(algorithm)
    keys, adapted = list(Mixed().state_dict()), model(X)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter()
    close(model(X), adapted)
    assert model.merged_adapters == ["default"]
    model.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.merge_adapter(keep=False)
    model.unmerge_adapter()
    close(model(X), adapted, 1e-5)
    plain = model.merge_and_unload(progressbar=True, safe_merge=True)
    assert list(plain.state_dict()) == keys
    close(plain(X), adapted)


def test_bfloat16_comes_out_of_a_merge_bit_for_bit() -> None:
    model = made().to(torch.bfloat16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_several_algorithms_at_once() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        Mixed(), LoraConfig(r=2, target_modules=["fc", "out"], init_lora_weights=False), mixed=True
    )
    model.add_adapter("b", LoHaConfig(r=2, target_modules=["fc", "conv"], init_weights=False))
    model.add_adapter("c", LoKrConfig(r=2, target_modules=TARGETS, init_weights=False))
    model.add_adapter("d", HRAConfig(r=2, target_modules=["fc", "seq"], init_weights=False))
    model.eval()
    names = ["default", "b", "c", "d"]
    alone = {}
    for name in names:
        model.set_adapter(name)
        alone[name] = model(X)
    model.set_adapter(names)
    together = model(X)
    assert model.active_adapter == names
    model.set_adapter(names[::-1])
    close(model(X), together)
    for n, name in enumerate(names):  # one by one, in any order: the law is the whole's
        model.merge_adapter(name)
        assert (
            model.merged_adapters == [*dict.fromkeys(model.merged_adapters)]
            and len(model.merged_adapters) == n + 1
        )
    close(model(X), together)
    model.unmerge_adapter()
    model.set_adapter("b")
    assert torch.equal(model(X), alone["b"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".b" in n for n in trained)
    model.set_adapter(["default", "c"], weights=[0.5, 0.25])
    weighed = model(X)
    model.set_adapter(["default", "c"])
    assert not torch.allclose(model(X), weighed)
    with pytest.raises(SurgeryError, match=r"weight 0\.5"):
        model.set_adapter("d", weights=[0.5])
    plain = model.merge_and_unload(adapter_names=["default", "b", "c", "d"])
    close(plain(X), together)


def test_disabling_and_deleting() -> None:
    model = made(modules_to_save=["head"])
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1)
    adapted = model(X)
    with model.disable_adapter():
        base = model(X)
        assert model.get_model_status().enabled is False
    assert not torch.allclose(adapted, base)
    assert torch.equal(model(X), adapted)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(X), base)
    close(model(X), adapted)
    assert model.merged_adapters == ["default"]
    model.unmerge_adapter()
    model.disable_adapter_layers()
    assert torch.equal(model(X), base)
    model.enable_adapter_layers()
    model.add_adapter("b", LoraConfig(r=1, target_modules=["fc"]))
    with pytest.warns(UserWarning, match="now `b` is"):
        model.delete_adapter("default")
    close(model(X), base)  # `b` is fresh, and has no head of its own
    assert not [k for k in model.state_dict() if "default" in k]
    plain = model.unload()
    assert list(plain.state_dict()) == list(Mixed().state_dict())


def test_status() -> None:
    model = made(modules_to_save=["head"])
    model.add_adapter("b", LoraConfig(r=1, target_modules=["fc"]))
    layers = {layer.name: layer for layer in model.get_layer_status()}
    assert set(layers) == {*TARGETS, "head"}
    fc = layers["fc"]
    assert (fc.module_type, fc.available_adapters) == ("lora.Linear", ["b", "default"])
    assert fc.requires_grad == {"default": True, "b": False} and fc.devices["b"] == ["cpu"]
    whole = model.get_model_status()
    assert (whole.base_model_type, whole.adapter_model_type) == ("Mixed", "PeftModel")
    assert whole.num_adapter_layers == 5 and whole.active_adapters == ["default"]
    assert whole.peft_types == {"default": "LORA", "b": "LORA"} and whole.merged_adapters == []
    assert (whole.trainable_params, whole.total_params) == model.get_nb_trainable_parameters()
    model.base_model.model.fc.lora_A.default.weight.requires_grad_(False)
    assert model.get_model_status().requires_grad["default"] == "irregular"


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_save_and_load(algorithm: str, tmp_path: Path) -> None:
    model = made(algorithm, modules_to_save=["head"])
    torch.nn.init.normal_(model.base_model.model.head.modules_to_save["default"].weight)
    wanted = model(X)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = Mixed().eval()
    again = PeftModel.from_pretrained(base, tmp_path)
    close(again(X), wanted)  # the form of a frozen adapter is another
    assert not any(p.requires_grad for p in again.parameters())
    again.load_adapter(tmp_path, "second", is_trainable=True)
    assert again.active_adapters == ["default"]
    again.set_adapter("second")
    close(again(X), wanted)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n in again.state_dict() if ".second" in n
    }
    again.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / "second" / "adapter_config.json").is_file()


@pytest.mark.parametrize("layout", ["kohya", "lycoris"])
@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
def test_other_layouts_in_and_out(algorithm: str, layout: str, tmp_path: Path) -> None:
    model = made(algorithm, target_modules=["fc", "out", "conv"])
    wanted = model(X)
    report = model.save_adapter(tmp_path / "a.safetensors", layout)
    assert str(report.verdict).startswith("3/3 modules")
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Mixed().eval(), tmp_path / "a.safetensors")
    close(again(X), wanted)


def test_an_adapter_file_of_ours_is_read_by_the_library(tmp_path: Path) -> None:
    model = made("lokr")
    model.save_pretrained(tmp_path)
    read = adaptsurgery.load(tmp_path)
    folded = model.base_model.model.fc.base_layer.weight
    wanted = model.base_model.update("fc", "default").fold(folded)
    assert torch.equal(read["fc"].fold(folded.detach()), wanted)


def test_hotswap_keeps_the_tensors(tmp_path: Path) -> None:
    first, other = made(), made(alpha=9)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    other.save_pretrained(tmp_path)
    held = {n: id(p) for n, p in first.named_parameters()}
    first.hotswap_adapter(tmp_path)
    assert {n: id(p) for n, p in first.named_parameters()} == held
    close(first(X), other(X))
    made(r=3).save_pretrained(tmp_path / "rank")
    before = first(X)
    with pytest.raises(SurgeryError, match="do not fit") as error:
        first.hotswap_adapter(tmp_path / "rank")
    assert "resize" in error.value.next
    assert torch.equal(first(X), before)
    made("hra").save_pretrained(tmp_path / "hra")
    with pytest.raises(SurgeryError, match="cannot take the place"):
        first.hotswap_adapter(tmp_path / "hra")


def test_low_cpu_mem_usage_and_whole_models_on_meta(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path)
    ours, _ = configs("lora", r=2, target_modules=TARGETS)
    empty = get_peft_model(Mixed(), ours, low_cpu_mem_usage=True)
    assert all(p.is_meta for n, p in empty.named_parameters() if "lora" in n)
    with torch.device("meta"):
        base = Mixed()
    empty = PeftModel.from_pretrained(base, tmp_path)
    assert not any(p.is_meta for n, p in empty.named_parameters() if "lora" in n)
    with pytest.raises(SurgeryError, match="meta"):
        empty.merge_and_unload()


def test_state_dict_names_the_targets() -> None:
    model = made("loha", target_modules=["fc", "conv"])
    config = LoHaConfig(r=2, target_modules="all-linear")
    again = AdaptedModel(Mixed(), config, state_dict=peft_tensors(model.base_model, "default"))
    assert [name for name, _ in again.layers()] == ["conv", "fc"]
    third = AdaptedModel(Mixed(), config, state_dict=model.base_model.state_dict())
    assert [name for name, _ in third.layers()] == ["conv", "fc"]


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_trains(algorithm: str) -> None:
    torch.manual_seed(0)
    ours, _ = configs(algorithm, r=4, alpha=8, target_modules=TARGETS, init=True)
    model = get_peft_model(Mixed(), ours).train()
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    wanted = torch.randn(2, 3)
    losses = []
    for _ in range(60):
        loss = (model(X) - wanted).square().mean()
        loss = loss + 1e-3 * orthogonality(model) if algorithm == "hra" else loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


def test_orthogonality_is_the_paper_s_term() -> None:
    model = made("hra", init=True)
    assert float(orthogonality(model)) == pytest.approx(2 * 4, rel=1e-5)  # pairs: 2 a layer
    u = model.base_model.model.fc.hra_u
    with torch.no_grad():
        for layer in TARGETS:
            held = getattr(model.base_model.model, layer).hra_u.default
            held.copy_(torch.linalg.qr(torch.randn_like(held)).Q)
    assert float(orthogonality(model)) < 1e-9 and u.default.requires_grad
    with pytest.raises(SurgeryError, match="no layer has an active HRA"):
        orthogonality(made("lora"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradient_checkpointing_autocast_and_a_narrow_base(algorithm: str) -> None:
    model, given = tiny("llama")
    ours, _ = configs(algorithm, r=2, alpha=4, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(model, ours).train()
    wanted = torch.autograd.grad(logits(model(**given)).square().mean(), trainable(model))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = torch.autograd.grad(logits(model(**given)).square().mean(), trainable(model))
    torch.testing.assert_close(got, wanted)
    exact = logits(model(**given))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = logits(model(**given))
    assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()
    out.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
        else:
            assert parameter.dtype == torch.float32, name
    out = logits(model(**given))
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()
    torch.autograd.grad(out.float().square().mean(), trainable(model))


def trainable(model: nn.Module) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_deepcopy_pickle_and_state_dict(algorithm: str) -> None:
    model = made(algorithm, modules_to_save=["head"])
    wanted = model(X)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(X), wanted)
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.zero_()
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(X), wanted)
        again.merge_and_unload()
    assert torch.equal(model(X), wanted)
    replica = copy.copy(
        model.base_model.model.fc
    )  # as DataParallel's: plain tensors for parameters
    assert all("." not in name for module in replica.modules() for name in module._parameters)


def test_tied_weights_and_shared_modules() -> None:
    model, given = tiny("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    before = model.transformer.wte.weight.clone()
    mine = get_peft_model(
        model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    ).eval()
    wanted = logits(mine(**given))
    with pytest.warns(UserWarning, match="no longer one tensor"):
        plain = mine.merge_and_unload()
    close(logits(plain(**given)), wanted, 1e-5)
    assert (
        torch.equal(plain.transformer.wte.weight, before) and not plain.config.tie_word_embeddings
    )

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.tanh(self.a(x)))

    twice, x = Twice(), torch.randn(2, 3)
    with pytest.warns(UserWarning, match="adapted too"):
        shared = get_peft_model(
            twice, LoraConfig(r=1, target_modules=["a"], init_lora_weights=False)
        )
    assert twice.a is twice.b
    wanted = shared(x)
    assert set(peft_tensors(shared.base_model, "default")) == {
        f"base_model.model.a.lora_{side}.weight" for side in "AB"
    }
    close(shared.merge_and_unload()(x), wanted)
    assert twice.a is twice.b and isinstance(twice.a, nn.Linear)


def test_generate_and_other_attributes_are_the_model_s() -> None:
    model, given = tiny("llama")
    mine = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM"))
    assert mine.generate(**given, max_new_tokens=3, do_sample=False).shape == (2, 10)
    assert mine.config is model.config and mine.get_base_model() is model
    assert mine.base_model.model is model and mine.peft_config["default"].peft_type == "LORA"
    assert mine.active_peft_config.target_modules is None or mine.active_peft_config.target_modules
