"""What real checkpoints hold that is not one weight a layer: shared tables, configs in configs,
fused rows under rotations, buffers of integers; and how far an unmerge may be off."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_match import base_from, hra, lora, only

from adaptsurgery.jobs.merging.configs import config_changes, patched
from adaptsurgery.jobs.merging.match import match
from adaptsurgery.jobs.merging.matched import Saved
from adaptsurgery.jobs.merging.merge import merge, unmerge
from adaptsurgery.jobs.merging.recipe import MergeRecipe
from adaptsurgery.jobs.merging.tying import settle_ties
from adaptsurgery_formats import AdapterState
from adaptsurgery_formats.errors import SurgeryError
from adaptsurgery_formats.tensors import Literal, Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNIT = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}


def peft_file(folder: Path, kind: str, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    named = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    marks = ("lora_", "hra_", "hada_", "lokr_")
    paths = {k.partition(f".{m}")[0] for k in tensors for m in marks if f".{m}" in k}
    held = {"peft_type": kind, "target_modules": sorted(paths), **config}
    (folder / "adapter_config.json").write_text(json.dumps(held))
    return folder


def base_file(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refused(code: str, work: Callable[[], object]) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        work()
    assert caught.value.code == code
    return caught.value


# DoRA


def dora(path: str, out: int, into: int) -> Any:
    module = lora(path, out, into)
    return replace(module, tensors={**module.tensors, "magnitude": Tensor("F32", (out, 1), ())})


def test_two_doras_on_one_weight_are_refused_by_the_plan() -> None:
    base = base_from({"fc.weight": (6, 4), "attn.qkv_proj.weight": (12, 4)})
    one, two = (AdapterState("peft", [dora("fc", 6, 4)], where=w) for w in "ab")
    error = refused("two-renorms", lambda: match(base, [one, two]))
    assert "`fc.weight`" in error.what and error.where == "b"
    split = [AdapterState("peft", [dora(f"attn.{n}_proj", 4, 4)]) for n in "qv"]
    assert match(base, split).modules == 2  # rows of their own
    whole = AdapterState("peft", [dora("attn.qkv_proj", 12, 4)])
    refused("two-renorms", lambda: match(base, [split[1], whole]))


# Configs


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


# T5


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


# Rotations of rows


def test_rotations_of_the_parts_of_gpt2s_c_attn(tmp_path: Path) -> None:
    """Each turns the inputs of its own rows, so that different R are exact on one fused weight."""
    weight = torch.randn(6, 18)  # a Conv1D: (i, 3·o)
    base = base_file(tmp_path / "base", {"h.0.attn.c_attn.weight": weight}, model_type="gpt2")
    us = {n: torch.randn(6, 4) for n in "qv"}
    slots = {f"h.0.attn.{n}_proj.hra_u": u for n, u in us.items()}
    merge(base, peft_file(tmp_path / "a", "HRA", slots, r=4), tmp_path / "out")
    wanted = weight.double()
    for n, u in us.items():
        rows = slice(6 * "qkv".index(n), 6 * "qkv".index(n) + 6)
        turn = torch.eye(6, dtype=torch.float64)
        for column in (u.double() / u.double().norm(dim=0)).t():
            turn @= torch.eye(6, dtype=torch.float64) - 2 * torch.outer(column, column)
        wanted[:, rows] = (wanted[:, rows].t() @ turn).t()
    found = load_file(tmp_path / "out/model.safetensors")["h.0.attn.c_attn.weight"]
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    assert torch.equal(found[:, 6:12], weight[:, 6:12])


def test_a_fused_rotation_on_split_weights() -> None:
    base = base_from({f"attn.{n}_proj.weight": (4, 6) for n in "qkv"})
    found = match(base, [AdapterState("peft", [hra("attn.qkv_proj", 6)])])
    assert len(found.changes) == 3
    config = {"num_attention_heads": 2, "hidden_size": 6, "num_key_value_heads": 1}
    fused = base_from({"attn.qkv_proj.weight": (12, 6)}, config)
    change = only(match(fused, [AdapterState("peft", [hra("attn.k_proj", 6)])]))
    assert (change.at, change.rows) == (6, 3)


# Saved parameters


def test_buffers_of_integers_are_replaced_as_they_are(tmp_path: Path) -> None:
    stored = {"bn.num_batches_tracked": torch.tensor(5), "bn.weight": torch.ones(3), "fc.weight": torch.ones(3, 4)}  # fmt: skip
    base = base_file(tmp_path / "base", stored)
    slots = {"fc.lora_A.weight": torch.ones(2, 4), "fc.lora_B.weight": torch.ones(3, 2)}
    more = {"bn.num_batches_tracked": torch.tensor(7), "bn.weight": torch.full((3,), 2.0)}
    given = {"r": 2, "lora_alpha": 2, "modules_to_save": ["bn"]}
    merge(base, peft_file(tmp_path / "a", "LORA", slots | more, **given), tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert int(found["bn.num_batches_tracked"]) == 7 and found["bn.weight"].tolist() == [2, 2, 2]
    wrong = more | {"bn.weight": torch.tensor([1, 2, 3])}
    other = peft_file(tmp_path / "b", "LORA", slots | wrong, **given)
    error = refused("dtype", lambda: merge(base, other, tmp_path / "never"))
    assert "`bn.weight`" in error.what and not (tmp_path / "never").exists()


# Devices


def plain(tmp_path: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    torch.manual_seed(1)
    base = base_file(tmp_path / "base", {"fc.weight": torch.randn(40, 30).to(dtype)})
    slots = {"fc.lora_A.weight": torch.randn(3, 30), "fc.lora_B.weight": torch.randn(40, 3)}
    return base, peft_file(tmp_path / "lora", "LORA", slots, r=3, lora_alpha=5)


def test_a_named_device_gives_the_same_bytes(tmp_path: Path) -> None:
    base, adapter = plain(tmp_path)
    merge(base, adapter, tmp_path / "a")
    merge(base, adapter, tmp_path / "b", device="cpu:0")
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in "ab")
    assert first == second


def test_a_device_that_is_none(tmp_path: Path) -> None:
    base, adapter = plain(tmp_path)
    refused("no-such-option", lambda: merge(base, adapter, tmp_path / "a", device="gpu"))
    if not torch.cuda.is_available():
        error = refused(
            "no-such-device", lambda: merge(base, adapter, tmp_path / "a", device="cuda")
        )
        assert "--device cpu" in error.next
    assert not (tmp_path / "a").exists() and not list(tmp_path.glob(".adapt*"))


# Rounding


@pytest.mark.parametrize("kind", ["lora", "hra"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_unmerge_says_of_rounding_holds(kind: str, dtype: str, tmp_path: Path) -> None:
    """|W − W₀| ≤ u·|W'| (under a rotation u·‖row of W'‖) + u·|W|, computed in float64."""
    base, adapter = plain(tmp_path, DTYPES[dtype])
    if kind == "hra":
        slots = {"fc.hra_u": torch.randn(30, 4)}
        adapter = peft_file(tmp_path / "hra", "HRA", slots, r=4)
    merge(base, adapter, tmp_path / "merged", compute="fp64")
    report = unmerge(tmp_path / "merged", adapter, tmp_path / "again", compute="fp64")
    told = report.facts["rounding"]
    assert told == {"merged": UNIT[dtype], "now": UNIT[dtype], "of": "row" if kind == "hra" else "element"}  # fmt: skip
    first, merged, again = (
        load_file(tmp_path / n / "model.safetensors")["fc.weight"].double()
        for n in ("base", "merged", "again")
    )
    size = merged.norm(dim=1, keepdim=True) if kind == "hra" else merged.abs()
    bound = told["merged"] * size + told["now"] * again.abs()
    assert ((again - first).abs() <= bound * (1 + 2**-7) + 1e-12).all()
    if kind == "hra" and dtype != "fp32":  # not so by the element's own size
        assert ((again - first).abs() > 2 * told["now"] * again.abs()).any()
