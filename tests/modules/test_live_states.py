"""What a refused or repeated call leaves behind, and what is trainable when."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from live_nets import Mixed, ids
from safetensors.torch import load_file, save_file

from adaptsurgery import (
    AdaptedModel,
    HRAConfig,
    LoraConfig,
    PeftModel,
    SurgeryError,
    get_peft_model,
)

X = ids(2, 5)


def lora(**said: Any) -> LoraConfig:
    told = {"r": 2, "target_modules": ["fc", "out"], "init_lora_weights": False}
    return LoraConfig(**{**told, **said})


def hra(**said: Any) -> HRAConfig:
    return HRAConfig(**{"r": 2, "target_modules": ["fc"], "init_weights": False, **said})


def made(**said: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(Mixed(), lora(**said)).eval()


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_merge_while_the_adapters_are_off_is_refused() -> None:
    model = made()
    with model.disable_adapter():
        base = model(X)
        with pytest.raises(SurgeryError, match="switched off") as error:
            model.merge_adapter()
        assert error.value.code == "disabled" and torch.equal(model(X), base)


def test_an_adapter_that_was_loaded_to_be_used_stays_frozen(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(Mixed(), tmp_path)
    model.load_adapter(tmp_path, "b", is_trainable=True)
    assert not trainable(model)
    model.delete_adapter("b")
    assert not trainable(model)
    model.set_adapter("default")
    assert trainable(model)
    model.load_adapter(tmp_path, "b")
    assert trainable(model) == {n for n, _ in model.named_parameters() if ".default" in n}


def test_weights_that_one_adapter_refuses_change_none() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Mixed(), lora(), mixed=True).eval()
    model.add_adapter("turn", hra())
    model.set_adapter(["default", "turn"])
    before = model(X)
    for weights in ([0.5, 0.5], [float("nan"), 1.0], [1.0]):
        with pytest.raises(SurgeryError):
            model.set_adapter(["default", "turn"], weights=weights)
        assert torch.equal(model(X), before)


@pytest.mark.parametrize("safe", [False, True])
def test_a_refused_merge_and_unload_leaves_the_model_as_it_was(safe: bool) -> None:
    model = made(use_dora=not safe)
    if safe:
        with torch.no_grad():
            model.base_model.model.out.lora_A.default.weight.fill_(float("inf"))
    else:
        model.add_adapter("b", lora(use_dora=True, target_modules=["out"]))
        model.set_adapter(["default", "b"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(SurgeryError, match="out"):
        model.merge_and_unload(safe_merge=safe)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def test_of_several_configs_all_come_in_or_none() -> None:
    base = Mixed()
    with pytest.raises(SurgeryError):
        AdaptedModel(base, {"a": lora(modules_to_save=["head"]), "b": lora(target_modules=["no"])})
    assert list(base.state_dict()) == list(Mixed().state_dict())
    assert trainable(base) == {name for name, _ in base.named_parameters()}


def test_a_file_that_does_not_load_leaves_the_base_trainable(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    state.popitem()
    save_file(state, tmp_path / "adapter_model.safetensors")
    base = Mixed()
    with pytest.raises(SurgeryError):
        PeftModel.from_pretrained(base, tmp_path)
    assert trainable(base) == {name for name, _ in base.named_parameters()}


def test_what_cannot_be_taken_out_stays_whole() -> None:
    model = made(use_dora=True)
    model.merge_adapter(keep=False)
    merged = model(X)
    for call in (model.unmerge_adapter, model.unload, model.disable_adapter_layers):
        with pytest.raises(SurgeryError, match="cannot be taken out"):
            call()
        assert torch.equal(model(X), merged) and model.get_model_status().enabled is True


@pytest.mark.parametrize("keep", [False, True])
def test_a_bias_comes_out_of_a_merge_again(keep: bool) -> None:
    model = made(lora_bias=True)  # `fc` has a bias, `out` has none
    before, adapted = copy.deepcopy(model.base_model.model.fc.base_layer.bias), model(X)
    model.merge_adapter(keep=keep)
    torch.testing.assert_close(model(X), adapted)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), adapted)
    assert torch.equal(model.base_model.model.fc.base_layer.bias, before)
    assert model.base_model.model.out.base_layer.bias is None


def test_calls_that_do_nothing_say_so() -> None:
    model = made()
    with pytest.warns(UserWarning, match="nothing is merged"):
        model.unmerge_adapter()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merged already: default"):
        model.merge_adapter()
    model.unmerge_adapter()
    model.set_adapter([])
    assert not trainable(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(SurgeryError, match="no adapter is active"):
            call()


def test_hotswap_takes_the_file_s_meaning_of_its_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Mixed().eval()
    other = get_peft_model(copy.deepcopy(base), hra(apply_GS=True))
    other.save_pretrained(tmp_path / "gs")
    model = get_peft_model(base, hra())
    model.hotswap_adapter(tmp_path / "gs")
    torch.testing.assert_close(model(X), other(X))


def test_hotswap_of_a_file_whose_config_does_not_name_its_tensors(tmp_path: Path) -> None:
    other = made()
    other.peft_config["default"].target_modules = {"fc"}
    other.save_pretrained(tmp_path)
    model = made(lora_alpha=3)
    before = model(X)
    with pytest.raises(SurgeryError, match="does not target 1") as error:
        model.hotswap_adapter(tmp_path)
    assert error.value.code == "cannot-swap" and torch.equal(model(X), before)
