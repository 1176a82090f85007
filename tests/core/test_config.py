"""The configs: PEFT's fields, defaults and checks, and its file in both directions."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptsurgery.algorithms import AdapterConfig, HRAConfig, LoHaConfig, LoKrConfig, LoraConfig
from adaptsurgery_formats import peft_config
from adaptsurgery_formats.errors import FileError, LayoutError, SurgeryError, ValueRefused

CLASSES: dict[str, tuple[Any, Any]] = {
    "lora": (LoraConfig, peft.LoraConfig),
    "loha": (LoHaConfig, peft.LoHaConfig),
    "lokr": (LoKrConfig, peft.LoKrConfig),
    "hra": (HRAConfig, peft.HRAConfig),
}
EVERY = pytest.mark.parametrize("algorithm", CLASSES)


def said(config: Any, folder: Path) -> dict[str, Any]:
    """What PEFT's or our config writes, with sets in one order."""
    config.save_pretrained(str(folder))
    held = json.loads((folder / "adapter_config.json").read_text())
    for name in ("target_modules", "exclude_modules"):
        if isinstance(held.get(name), list):
            held[name] = sorted(held[name])
    return held


@EVERY
def test_the_fields_and_defaults_are_pefts(algorithm: str, tmp_path: Path) -> None:
    ours, theirs = (kind() for kind in CLASSES[algorithm])
    their_fields = {f.name for f in dataclasses.fields(theirs)} - peft_config.OTHERS
    assert {f.name for f in dataclasses.fields(ours)} - {"extra"} == their_fields
    assert their_fields == set(peft_config.FIELDS[algorithm])
    written = said(theirs, tmp_path) | {"peft_version": None}
    assert ours.to_dict() == {n: v for n, v in written.items() if n in their_fields}
    others = {n: v for n, v in written.items() if n in peft_config.IGNORED}
    assert others == {n: v for n, v in peft_config.IGNORED.items() if n in others}


names = st.lists(st.sampled_from(["q_proj", "fc1", "to_out.0", "layers.1.fc"]), min_size=1, unique=True)  # fmt: skip
shares = st.sampled_from([0.0, 0.1, 0.5, 1.0])
ANY: dict[str, st.SearchStrategy[Any]] = {
    "r": st.integers(1, 64), "alpha": st.integers(1, 64) | st.floats(0.5, 64), "lora_alpha": st.integers(1, 64),
    "target_modules": names | st.sampled_from([r".*\.fc\d", "all-linear", None]),
    "exclude_modules": st.none() | names | st.just("lm_head"),
    "modules_to_save": st.none() | names, "task_type": st.sampled_from([None, "SEQ_CLS", "CAUSAL_LM"]),
    "rank_pattern": st.dictionaries(st.sampled_from(["fc1", "^a.b"]), st.integers(1, 9)),
    "alpha_pattern": st.dictionaries(st.sampled_from(["fc1", "^a.b"]), st.floats(1, 9)),
    "rank_dropout": shares, "module_dropout": shares, "lora_dropout": shares,
    "init_weights": st.booleans(), "init_lora_weights": st.sampled_from([True, False, "gaussian", "orthogonal"]),
    "bias": st.sampled_from(["none", "all"]), "decompose_factor": st.sampled_from([-1, 2, 8]),
    "base_model_name_or_path": st.sampled_from([None, "base/model"]), "revision": st.sampled_from([None, "main"]),
    "inference_mode": st.booleans(), "use_dora": st.booleans(),
}  # fmt: skip
FLAGS = ("use_effective_conv2d", "decompose_both", "rank_dropout_scale", "apply_GS", "use_rslora", "fan_in_fan_out")  # fmt: skip


@st.composite
def options(draw: st.DrawFn, algorithm: str) -> dict[str, Any]:
    fields = peft_config.FIELDS[algorithm]
    given = {n: draw(s) for n, s in ANY.items() if n in fields and draw(st.booleans())}
    given |= {n: draw(st.booleans()) for n in FLAGS if n in fields}
    if not isinstance(given.get("target_modules"), str) and draw(st.booleans()):
        given["layers_to_transform"] = draw(st.sampled_from([[0, 1], 2]))
        given["layers_pattern"] = draw(st.sampled_from([None, "layers", ["h", "layers"]]))
    return given


@EVERY
@given(data=st.data())
def test_both_directions(
    algorithm: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("c")
    given = data.draw(options(algorithm))
    ours, theirs = (kind(**given) for kind in CLASSES[algorithm])
    mine, read = said(ours, folder), peft.PeftConfig.from_pretrained(str(folder))
    assert type(read) is type(theirs)
    assert said(read, folder) == said(theirs, folder)
    back = AdapterConfig.from_pretrained(folder)  # what PEFT wrote last
    assert type(back) is type(ours) and back.unknown == []
    assert {n: v for n, v in back.to_dict().items() if n in mine} == mine | {
        "peft_version": theirs.peft_version
    }


def test_unknown_fields_are_kept_and_named(tmp_path: Path) -> None:
    strange = {"peft_type": "LOHA", "r": 4, "use_khatri_rao": True, "zz": [1]}
    with pytest.warns(UserWarning, match="use_khatri_rao, zz"):
        config = AdapterConfig.from_dict(strange)
    assert isinstance(config, LoHaConfig) and config.unknown == ["use_khatri_rao", "zz"]
    assert said(config, tmp_path).items() >= strange.items()


def test_pefts_other_fields_at_their_neutral_values() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = LoraConfig(layer_replication=None, megatron_core="megatron.core", loftq_config={})
    assert config.unknown == [] and config.to_dict()["megatron_core"] == "megatron.core"
    with pytest.warns(UserWarning, match="without effect here: eva_config"):
        LoraConfig(eva_config={"rho": 2.0})
    with pytest.raises(LayoutError, match="layer_replication"):
        LoraConfig(layer_replication=[[0, 2]])


@pytest.mark.parametrize(
    ("kind", "wrong", "hint"),
    [
        (LoHaConfig, "lora_alpha", "`alpha`"),
        (LoKrConfig, "lora_alpha", "`alpha`"),
        (LoraConfig, "alpha", "`lora_alpha`"),
        (LoraConfig, "init_weights", "`init_lora_weights`"),
        (HRAConfig, "alpha", "hra has none"),
        (HRAConfig, "rank_pattern", "lora, loha, lokr have it"),
        (LoHaConfig, "rank_dropot", "rank_dropout"),
        (LoHaConfig, "rank", "`r`"),
        (LoHaConfig, "zzz", "its fields are"),
    ],
)
def test_a_wrong_name_is_told_the_right_one(kind: Any, wrong: str, hint: str) -> None:
    with pytest.raises(ValueRefused, match=f"{kind.__name__} has no field `{wrong}`") as refusal:
        kind(**{wrong: 32})
    assert hint in str(refusal.value) and refusal.value.code == "unknown-field"


BAD: list[tuple[Any, dict[str, Any]]] = [
    (LoHaConfig, {"r": 0}), (LoKrConfig, {"r": -1}), (HRAConfig, {"r": 2.0}), (LoraConfig, {"r": True}),
    (LoHaConfig, {"alpha": float("nan")}), (LoraConfig, {"lora_alpha": float("inf")}), (LoHaConfig, {"alpha": "8"}),
    (LoHaConfig, {"rank_pattern": {"fc": 0}}), (LoKrConfig, {"alpha_pattern": {"fc": float("inf")}}),
    (LoHaConfig, {"layers_pattern": "layers"}), (HRAConfig, {"layers_pattern": ["h"]}),
    *((kind, {"target_modules": "fc", "layers_to_transform": [1]}) for kind, _ in CLASSES.values()),
    (LoHaConfig, {"target_modules": "all-linear", "layers_to_transform": 0}),
    (LoKrConfig, {"target_modules": [1]}), (LoHaConfig, {"layers_to_transform": ["1"]}),
    (LoHaConfig, {"rank_dropout": 1.5}), (LoKrConfig, {"module_dropout": "0.1"}), (LoraConfig, {"lora_dropout": -0.1}),
    (LoraConfig, {"bias": "some"}), (HRAConfig, {"bias": "lora_only"}), (LoHaConfig, {"task_type": "CLS"}),
    (LoraConfig, {"init_lora_weights": "pissa"}), (LoraConfig, {"init_lora_weights": "lycoris"}),
    (HRAConfig, {"init_weights": "lycoris"}), (LoHaConfig, {"init_weights": 1}), (LoHaConfig, {"peft_type": "LORA"}),
    (LoraConfig, {"lora_bias": True, "use_dora": True}), (LoKrConfig, {"decompose_factor": 2.0}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given"), BAD, ids=str)
def test_bad_values_are_refused_by_name(kind: Any, given: dict[str, Any]) -> None:
    with pytest.raises(SurgeryError) as refusal:
        kind(**given)
    assert any(name in str(refusal.value) for name in given)


def test_a_config_is_a_plain_thing() -> None:
    config = LoKrConfig(r=4, target_modules=("a", "b"), rank_pattern=None, modules_to_save={"c"})
    assert config.target_modules == {"a", "b"} and config.rank_pattern == {}
    assert config.modules_to_save == ["c"] and config.peft_type == "LOKR"
    for twin in (
        copy.deepcopy(config), pickle.loads(pickle.dumps(config)),
        dataclasses.replace(config), LoKrConfig.from_dict(config.to_dict()),
    ):  # fmt: skip
        assert twin == config and twin is not config


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no config"):
        AdapterConfig.from_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text("{")
    with pytest.raises(FileError, match="not JSON"):
        AdapterConfig.from_pretrained(file)
    file.write_text("[]")
    with pytest.raises(FileError, match="bad-config"):
        AdapterConfig.from_pretrained(file)
    with pytest.raises(ValueRefused, match="LOKR is for LoKrConfig"):
        LoHaConfig.from_dict({"peft_type": "LOKR"})
    with pytest.raises(LayoutError, match="OFT"):
        AdapterConfig.from_dict({"peft_type": "OFT"})
    assert isinstance(LoHaConfig.from_dict({}), LoHaConfig)
