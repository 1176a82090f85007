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


WIDE = "[\x01-\uffff]"
SLOW = {
    "classes": f"(?i:{WIDE * 4000})",
    "classes in a group": f"(?i:{WIDE * 4000})|fc",
    "classes spelled out": "(?i:" + r"[\x01-\uffff]" * 4000 + ")",
    "classes in octal": "(?i:" + r"[\1-\377]" * 40_000 + ")",
    "ascii classes": "(?i:" + "[!-~]" * 200_000 + ")",
    "many groups": "(?i:" + "|".join(f"[!-~]{i:x}" for i in range(40_000)) + ")",
}


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_pattern_that_compiles_without_end_is_stopped(
    name: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptsurgery_formats.patterns.TIMEOUT_SECONDS", 0.3)
    matcher, start = Matcher(NAMES, "here"), time.process_time()
    with pytest.raises(LayoutError) as refusal:
        if field == "rank_pattern":
            matcher.first_keys({SLOW[name]: 4})
        else:
            is_targeted("fc", {"target_modules": ["fc"], field: SLOW[name]}, matcher)
    assert refusal.value.code == "slow-pattern" and len(str(refusal.value)) < 1000
    assert time.process_time() - start < 1


@pytest.mark.parametrize("pattern", ["(" * 5000 + "é" + ")" * 5000, "é(", "[é", "(?P<é", "é\\"])
def test_a_pattern_that_is_none_is_told_from_a_slow_one(pattern: str) -> None:
    with pytest.raises(LayoutError) as refusal:
        Matcher(NAMES, "").first_keys({pattern: 1})
    assert refusal.value.code == "bad-pattern"


def test_patterns_that_end_are_matched_alike_here_and_apart() -> None:
    import re

    for pattern in (
        r".*é?fc",
        "(?i:LAYERS.*FC)",
        r"[\x41-\uffff]+",
        "|".join(map(re.escape, NAMES)),
    ):
        matcher = Matcher(NAMES, "")
        assert set(matcher.listed(pattern)) == {n for n in NAMES if re.fullmatch(pattern, n)}
        theirs = {n for n in NAMES if re.match(rf"(.*\.)?({pattern})$", n)}
        assert set(matcher.first_keys({pattern: 1})) == theirs


@given(st.lists(st.text(st.sampled_from("ab.|-\\_ "), max_size=6), max_size=4))
def test_names_alone_are_matched_as_re_matches_them(parts: list[str]) -> None:
    import re

    for pattern in ("|".join(parts), "|".join(map(re.escape, parts))):
        names = [*parts, "a", "b", "", "a.b", "axb", pattern]
        try:
            theirs = {n for n in names if re.fullmatch(pattern, n)}
        except re.error:
            continue
        if pattern:
            assert {n for n in names if Matcher(names, "").fullmatch(pattern, n)} == theirs


def test_a_hundred_thousand_names_as_one_regex_need_no_regex(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import re

    monkeypatch.setattr(Matcher, "_run_apart", None)
    names = [f"layers.{i}.fc" for i in range(40_000)]
    matcher = Matcher(names, "")
    assert len(matcher.listed("|".join(map(re.escape, names)))) == len(names)


def test_a_pattern_that_takes_memory_without_end_is_stopped() -> None:
    """Repeated groups take memory for each turn; a name of megabytes is matched in a child."""
    names = ["ab" * 4_000_000]
    with pytest.raises(LayoutError) as refusal:
        Matcher(names, "").first_keys({"(?:(a)|(b))*c": 1})
    assert refusal.value.code == "slow-pattern"
