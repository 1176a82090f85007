"""rank_pattern and target_modules as PEFT itself reads them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from adaptsurgery_formats.errors import LayoutError
from adaptsurgery_formats.patterns import Matcher, exact_pattern, is_targeted

NAMES = [
    "fc", "layers.0.fc", "layers.1.fc", "layers.10.attn.q_proj", "layers.1.attn.q_proj",
    "decoder.layers.1.fc", "a.b", "aXb", "x.a.b", "down_blocks.0.attn1.to_out.0", "q_proj",
]  # fmt: skip
KEYS = [
    "fc", "^fc", "layers.1.fc", r"layers\.1\.fc", "a.b", r"a\.b", r".*\.fc", "(fc|q_proj)", "1.fc",
    r"layers\.\d+\.attn\.q_proj", "to_out.0", "^layers.1.fc", "q_proj$", "proj", "",
]  # fmt: skip


@given(st.lists(st.sampled_from(KEYS), unique=True, max_size=6))
def test_the_first_key_is_pefts(keys: list[str]) -> None:
    found = Matcher(NAMES, "").first_keys(dict.fromkeys(keys, 1))
    for name in NAMES:
        theirs = get_pattern_key(keys, name)
        assert found.get(name, name) == theirs, name


@given(st.sampled_from(NAMES))
def test_an_exact_pattern_matches_one_module(name: str) -> None:
    assert list(Matcher(NAMES, "").first_keys({exact_pattern(name): 1})) == [name]


TARGETS = [["fc"], ["layers.1.fc", "q_proj"], r".*\.fc", "fc", r"layers\.\d\..*", ["attn"], []]
LAYERS = [{}, {"layers_to_transform": [1]}, {"layers_to_transform": 1, "layers_pattern": "layers"}]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize("excluded", [None, ["q_proj"], r"decoder\..*"], ids=str)
def test_targets_are_pefts(target: object, layers: dict[str, object], excluded: object) -> None:
    if isinstance(target, str) and layers:
        return  # refused by PEFT's LoRA
    config = {"target_modules": target, "exclude_modules": excluded, **layers}
    theirs = LoraConfig(**config)  # type: ignore[arg-type]
    matcher = Matcher(NAMES, "")
    for name in NAMES:
        assert bool(is_targeted(name, config, matcher)) == bool(
            check_target_module_exists(theirs, name)
        ), name


@pytest.mark.parametrize(("pattern", "code"), [("(", "bad-pattern"), (r"(a+)+\$", "slow-pattern")])
def test_a_pattern_that_would_hang_or_is_none(
    pattern: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptsurgery_formats.patterns.TIMEOUT_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(LayoutError) as refusal:
        Matcher(["a" * 60 + "b"], "").first_keys({pattern: 1})
    assert refusal.value.code == code and time.monotonic() - start < 5
