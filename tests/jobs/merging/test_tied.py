"""Tied and shared tables: heads that are stored or not, T5's one table, configs that grow and untie."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_files import base_file, peft_file, refused
from safetensors.torch import load_file
from test_match import base_from, lora

from adaptsurgery.jobs.merging.configs import config_changes, patched
from adaptsurgery.jobs.merging.match import match
from adaptsurgery.jobs.merging.matched import Saved
from adaptsurgery.jobs.merging.merge import merge
from adaptsurgery.jobs.merging.recipe import MergeRecipe
from adaptsurgery.jobs.merging.tying import settle_ties
from adaptsurgery_formats import AdapterState
from adaptsurgery_formats.tensors import Literal, Tensor


def test_configs_in_configs_grow_and_untie() -> None:
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"vocab_size": 64, "tie_word_embeddings": True, "dtype": "bfloat16"},
        "vision_config": {"vocab_size": 10, "dtype": "bfloat16"},
        "dtype": "bfloat16",
    }
    name = "model.language_model.embed_tokens.weight"
    base = base_from({name: (64, 8), "fc.weight": (8, 8)}, config)
    state = AdapterState("peft", [lora("fc", 8, 8)], saved={"": {name: Tensor("F32", (70, 8), ())}})
    found = match(base, [state])
    found.saved["", name] = Saved(0, "", name)
    change = config_changes(base, found, [state], {""}, MergeRecipe(dtype="fp32"))[""]
    assert change == {
        "text_config": {"vocab_size": 70, "tie_word_embeddings": False, "dtype": "float32"},
        "vision_config": {"dtype": "float32"},
        "dtype": "float32",
        "tie_word_embeddings": False,
    }
    after = patched(config, change)
    assert after["vision_config"] == {"vocab_size": 10, "dtype": "float32"}
    assert patched({"a": 1, "b": {"c": 2, "d": 3}}, {"a": None, "b": {"c": None}}) == {
        "b": {"d": 3}
    }


@pytest.mark.parametrize(
    ("table", "head"),
    [
        ("model.embed_tokens.weight", "lm_head"),
        ("model.language_model.embed_tokens.weight", "lm_head"),
        ("language_model.model.embed_tokens.weight", "language_model.lm_head"),
        ("transformer.wte.weight", "lm_head"),
    ],
)
def test_the_head_of_a_language_model_in_a_model(table: str, head: str) -> None:
    config = {"architectures": ["XForConditionalGeneration"], "text_config": {"vocab_size": 64}}
    base = base_from({table: (64, 8), "fc.weight": (8, 8)}, config)
    states = [AdapterState("peft", [lora(head, 64, 8), lora("fc", 8, 8)])]
    found = match(base, states)
    assert settle_ties(base, states, found) == {""}
    assert found.heads == {("", f"{head}.weight"): ("", table)}
    config["text_config"] = {"tie_word_embeddings": False}
    states = [AdapterState("peft", [lora(table.removesuffix(".weight"), 8, 64, kind="embedding")])]
    found = match(base, states)
    assert settle_ties(base, states, found) == set()


def test_a_head_that_is_stored_although_it_is_tied(tmp_path: Path) -> None:
    table = torch.randn(8, 4)
    base = base_file(
        tmp_path / "base",
        {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()},
        architectures=["LlamaForCausalLM"], tie_word_embeddings=True,
    )  # fmt: skip
    up, down = torch.randn(8, 2), torch.randn(2, 4)
    slots = {"lm_head.lora_A.weight": down, "lm_head.lora_B.weight": up}
    adapter = peft_file(tmp_path / "a", "LORA", slots, r=2, lora_alpha=2)
    report = merge(base, adapter, tmp_path / "out")
    assert "untied" in [n.code for n in report.notes]
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    found = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(found["model.embed_tokens.weight"], table)
    assert torch.allclose(found["lm_head.weight"], table + up @ down, atol=1e-6)


def shared_base(**more: Tensor) -> Any:
    data = Tensor("F32", (2, 4), (Literal(bytes(range(32))),))
    base = base_from({"shared.weight": (2, 4)})
    tensors = {"shared.weight": data, **more}
    file = replace(base.files[0], tensors=tensors)
    from adaptsurgery.checkpoint.base import assemble

    return assemble("base", [file], configs={"": {"architectures": ["T5ForConditionalGeneration"]}})


@pytest.mark.parametrize("user", ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"])
def test_one_user_of_a_shared_table_has_no_place_of_its_own(user: str) -> None:
    state = AdapterState("peft", [lora(user, 2, 4)])
    error = refused("interleaved-weight", lambda: match(shared_base(), [state]))
    assert "`shared.weight` is it too" in error.what


def test_copies_of_a_shared_table_follow_it() -> None:
    same = Tensor("F32", (2, 4), (Literal(bytes(range(32))),))
    other = Tensor("F32", (2, 4), (Literal(bytes(32)),))
    base = shared_base(**{"encoder.embed_tokens.weight": same, "lm_head.weight": other})
    states = [AdapterState("peft", [lora("shared", 2, 4)])]
    found = match(base, states)
    assert settle_ties(base, states, found) == set()
    assert {name for _, name in found.changes} == {"shared.weight", "encoder.embed_tokens.weight"}
    assert [n.code for n in found.notes] == ["tied-table"]
    states = [AdapterState("peft", [lora("encoder.embed_tokens", 2, 4)])]
    found = match(base, states)
    refused("shared-table", lambda: settle_ties(base, states, found))
