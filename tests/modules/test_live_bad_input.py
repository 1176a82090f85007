"""What is refused, each by name, with the model as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from live_nets import Mixed, ids
from safetensors.torch import load_file, save_file
from torch import nn

from adaptsurgery import (
    HRAConfig,
    HRAModel,
    LoHaConfig,
    LoHaModel,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    SurgeryError,
    get_peft_model,
)
from adaptsurgery.modules.layer import AdaptedLayer


def lora(**said: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["fc", "out"], **said})


def refused(code: str, text: str = "") -> Any:
    """The error's code, and that it says what to do."""

    class Check:
        def __enter__(self) -> Check:
            self.context = pytest.raises(SurgeryError, match=text or None)
            self.error = self.context.__enter__()
            return self

        def __exit__(self, *raised: Any) -> bool:
            done = self.context.__exit__(*raised)
            assert self.error.value.code == code, self.error.value
            assert self.error.value.next, "it does not say what to do next"
            return bool(done)

    return Check()


@pytest.mark.parametrize("r", [0, -1, 2.5, True, "4"])
@pytest.mark.parametrize("config", [LoraConfig, LoHaConfig, LoKrConfig, HRAConfig])
def test_a_rank_that_is_none(config: Any, r: Any) -> None:
    with pytest.raises(SurgeryError, match="`r`"):
        config(r=r, target_modules=["fc"])


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), "8"])
def test_an_alpha_that_is_not_finite(alpha: Any) -> None:
    with pytest.raises(SurgeryError, match="alpha"):
        LoHaConfig(alpha=alpha, target_modules=["fc"])


def test_a_target_of_an_unsupported_type() -> None:
    model = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3))
    with pytest.raises(SurgeryError, match=r"`?0`?"):
        get_peft_model(model, LoraConfig(target_modules=["0", "1"]))
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert all(p.requires_grad for p in model.parameters())


def test_an_embedding_for_what_takes_none() -> None:
    with pytest.raises(SurgeryError, match="embed"):
        get_peft_model(Mixed(), LoKrConfig(target_modules=["embed", "fc"]))


def test_a_module_that_is_targeted_twice() -> None:
    model = nn.Module()
    model.a = model.b = nn.Linear(3, 3)
    with refused("targeted-twice", "`a` and as `b`"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["a", "b"], rank_pattern={"b": 1}))
    get_peft_model(model, LoraConfig(r=2, target_modules=["a", "b"]))


@pytest.mark.parametrize("name", ["a.b", "", " ", "weight.", "training", "forward"])
def test_a_name_that_no_adapter_can_have(name: str) -> None:
    model = Mixed()
    with refused("bad-name"):
        get_peft_model(model, lora(), name)
    assert list(model.state_dict()) == list(Mixed().state_dict())


def test_a_name_that_is_taken() -> None:
    model = get_peft_model(Mixed(), lora())
    with refused("name-taken"):
        model.add_adapter("default", lora())


def test_an_unknown_adapter() -> None:
    model = get_peft_model(Mixed(), lora()).eval()
    for call in (model.set_adapter, model.delete_adapter, model.merge_adapter):
        with refused("unknown-adapter", "defualt"):
            call("defualt")


def test_another_algorithm_without_mixed() -> None:
    model = get_peft_model(Mixed(), lora())
    with refused("mixed-algorithms", "LoHaConfig"):
        model.add_adapter("b", LoHaConfig(target_modules=["fc"]))
    with refused("mixed-algorithms"):
        LoHaModel(Mixed(), HRAConfig(target_modules=["fc"]), "default")


def test_a_model_that_is_adapted_already() -> None:
    model = get_peft_model(Mixed(), lora())
    with refused("adapted-already"):
        get_peft_model(model.get_base_model(), lora())


def test_a_config_that_is_none() -> None:
    import peft

    with refused("bad-config"):
        get_peft_model(Mixed(), peft.LoraConfig(target_modules=["fc"]))  # type: ignore[arg-type]


def test_merging_while_training() -> None:
    model = get_peft_model(Mixed(), lora()).train()
    with refused("training"):
        model.merge_adapter()
    model.eval().merge_adapter()
    with refused("merged"):
        model.train()
    model.unmerge_adapter()
    model.train()


def test_deleting_and_choosing_while_merged() -> None:
    model = get_peft_model(Mixed(), lora()).eval()
    model.merge_adapter()
    with refused("merged"):
        model.delete_adapter("default")
    with refused("merged"):
        model.set_adapter("default")


def test_a_quantised_base() -> None:
    model = Mixed()
    model.fc.weight = nn.Parameter(torch.zeros(15, 20, dtype=torch.int8), requires_grad=False)
    with refused("quantised-weight", "fc"):
        get_peft_model(model, lora())
    assert isinstance(model.out, nn.Linear)


def test_a_merge_that_is_not_finite_leaves_the_model_alone() -> None:
    model = get_peft_model(Mixed(), lora(init_lora_weights=False)).eval()
    with torch.no_grad():
        model.base_model.model.out.lora_A.default.weight.fill_(float("inf"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with refused("non-finite", "out"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.merged_adapters == []


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_a_file_with_what_is_no_number_leaves_the_model_alone(
    tmp_path: Path, number: float
) -> None:
    model = get_peft_model(Mixed(), lora(init_lora_weights=False))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    key = next(name for name in state if "out.lora_B" in name)
    state[key][0, 0] = number
    save_file(state, file)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for load in (
        lambda: model.load_adapter(tmp_path, "other"),
        lambda: model.hotswap_adapter(tmp_path),
    ):
        with refused("non-finite", "out.lora_B"):
            load()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in after.items())
    with refused("non-finite", "out.lora_B"):
        PeftModel.from_pretrained(Mixed(), tmp_path)


def test_a_dora_is_not_computed_back() -> None:
    model = get_peft_model(Mixed(), lora(use_dora=True, init_lora_weights=False)).eval()
    model.merge_adapter(keep=False)
    with pytest.raises(SurgeryError, match="cannot be taken out"):
        model.unmerge_adapter()


def test_two_doras_at_once() -> None:
    model = get_peft_model(Mixed(), lora(use_dora=True)).eval()
    model.add_adapter("b", lora(use_dora=True))
    model.set_adapter(["default", "b"])
    with refused("two-renorms"):
        model(ids(2, 5))


def test_biases_that_two_adapters_train() -> None:
    model = get_peft_model(Mixed(), lora(bias="all"))
    with refused("biases-shared"):
        model.add_adapter("b", lora(bias="lora_only"))


def test_no_initial_value_that_changes_nothing() -> None:
    for said in ({"r": 3}, {"r": 4, "apply_GS": True}):
        with pytest.raises(SurgeryError):
            HRAModel(Mixed(), HRAConfig(target_modules=["fc"], **said), "default")


# --- state dicts ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    get_peft_model(Mixed(), lora(init_lora_weights=False)).save_pretrained(tmp_path)
    return tmp_path


def changed(folder: Path, change: Any) -> None:
    state = load_file(folder / "adapter_model.safetensors")
    change(state)
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})


FC = "base_model.model.fc.lora_A.weight"


def test_missing_tensors(folder: Path) -> None:
    changed(folder, lambda state: state.pop(FC))
    model = Mixed()
    with refused("missing-keys", FC):
        PeftModel.from_pretrained(model, folder)
    assert list(model.state_dict()) == list(Mixed().state_dict())
    read = PeftModel.from_pretrained(model, folder, ignore=["*fc.lora_A*"])
    assert not any(p.is_meta for p in read.parameters())


def test_unexpected_tensors(folder: Path) -> None:
    def more(state: dict[str, torch.Tensor]) -> None:
        state["base_model.model.nowhere.lora_A.weight"] = torch.zeros(2, 2)

    changed(folder, more)
    with refused("unexpected-keys", "nowhere"):
        PeftModel.from_pretrained(Mixed(), folder)
    PeftModel.from_pretrained(Mixed(), folder, ignore=["*nowhere*"])


def test_tensors_of_the_base_are_not_taken(folder: Path) -> None:
    def more(state: dict[str, torch.Tensor]) -> None:
        state["base_model.model.out.base_layer.weight"] = torch.zeros(9, 15)

    changed(folder, more)
    with refused("unexpected-keys", "base_layer"):
        PeftModel.from_pretrained(Mixed(), folder)


def test_misshapen_tensors(folder: Path) -> None:
    changed(folder, lambda state: state.update({FC: torch.zeros(3, 20)}))
    with pytest.raises(SurgeryError, match=r"\[3, 20\], in the model \[2, 20\]") as error:
        PeftModel.from_pretrained(Mixed(), folder)
    assert error.value.next


def test_a_second_adapter_that_does_not_load_is_gone(folder: Path) -> None:
    model = get_peft_model(Mixed(), lora())
    before = list(copy.deepcopy(model).state_dict())
    changed(folder, lambda state: state.pop(FC))
    with refused("missing-keys"):
        model.load_adapter(folder, "b")
    assert list(model.state_dict()) == before and list(model.peft_config) == ["default"]


def test_a_folder_that_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError):
        PeftModel.from_pretrained(Mixed(), tmp_path)


def test_adapters_by_the_sample() -> None:
    model = get_peft_model(Mixed(), lora())
    model.base_model.model.forward = lambda x, **swallowed: x
    with refused("no-mixed-batch", "adapter_names"):
        model(ids(2, 5), adapter_names=["default", "nobody"])
    x = ids(2, 5)
    assert model(x, adapter_names=None) is x  # as if it were not there, which is PEFT's


def test_scripting_an_adapted_layer() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), lora(target_modules=["0"]))
    with refused("no-script", "torch.jit.script"):
        torch.jit.script(model.get_base_model())
    assert type(model.base_model.model[0]).__name__ == "AdaptedLayer"


def test_peft_s_lora_of_a_convolution_in_groups(tmp_path: Path) -> None:
    """Its lora_A sees the inputs of all groups; the error says so, and of ours alone."""
    import peft

    def net() -> nn.Module:
        return nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Conv1d(6, 4, 3))

    theirs = peft.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="groups > 1"):
        peer = peft.get_peft_model(net(), theirs)
    peer.save_pretrained(str(tmp_path))
    with pytest.raises(SurgeryError, match="2 tensors do not fit") as error:
        PeftModel.from_pretrained(net(), tmp_path)
    assert error.value.next.startswith("`0` is in groups")


@pytest.mark.parametrize("folders", [True, False])
def test_the_adapters_of_a_pipeline(folders: bool, tmp_path: Path) -> None:
    parts = {"unet": ("fc", "lora_unet_"), "text_encoder": ("out", "lora_te_")}
    state = {}
    for part, (target, prefix) in parts.items():
        model = get_peft_model(Mixed(), lora(target_modules=[target]))
        model.save_pretrained(tmp_path / "all" / part)
        model.save_adapter(tmp_path / f"{part}.safetensors", "kohya")
        for key, tensor in load_file(tmp_path / f"{part}.safetensors").items():
            state[prefix + key.removeprefix("lora_unet_")] = tensor
    save_file(state, tmp_path / "all.safetensors")
    with refused("several-components", "several models") as error:
        PeftModel.from_pretrained(Mixed(), tmp_path / ("all" if folders else "all.safetensors"))
    said = error.error.value
    assert "1 modules" in said.seen and ("folder" in said.next)
    assert folders or "convert" in said.next


@pytest.mark.parametrize("fold", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("what", ["weight", "bias", "by a turn"])
def test_an_overflow_is_refused_and_leaves_the_model_alone(fold: str, what: str) -> None:
    """Whoever asks for PEFT's safe_merge or does not: infinity is not written."""
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    with torch.no_grad():
        base[1].weight.fill_(6e4)
    if what == "by a turn":
        config: Any = HRAConfig(r=2, target_modules=["0", "1"], init_weights=False)
    else:
        config = lora(
            r=2, target_modules=["0", "1"], init_lora_weights=False, lora_bias=what == "bias"
        )
    model = get_peft_model(base, config).eval()
    layer: Any = model.base_model.model[1]
    with torch.no_grad():
        if what == "by a turn":
            layer.hra_u.default.copy_(torch.tensor([[1.0, 1, -1, 1], [0, 1, 1, 0]]).t())
        elif what == "bias":
            layer.lora_A.default.weight.zero_()
            layer.lora_B.default.bias.fill_(1e5)
        else:
            layer.lora_A.default.weight.fill_(200.0)
            layer.lora_B.default.weight.fill_(200.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with refused("non-finite", "1"):
        getattr(model.base_model, fold)()
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in before)


def test_an_ordinary_fold_computes_each_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(Mixed().half(), lora(init_lora_weights=False)).eval()
    folds: list[Any] = []
    merged = AdaptedLayer._merged
    monkeypatch.setattr(AdaptedLayer, "_merged", lambda *a: folds.append(a) or merged(*a))
    count = len(list(model.base_model.layers()))
    model.merge_and_unload()
    assert count and len(folds) == count
