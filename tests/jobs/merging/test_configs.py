"""A base's JSON of every wrong kind: refused by field before any work, or not needed.

What is needed is decided by the merge at hand: a table that grows needs vocab_size, a tied one
the architectures, a block-quantised weight quantization_config.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adaptsurgery
from adaptsurgery_formats.errors import FileError, SurgeryError, ValueRefused
from adaptsurgery_formats.reading import JsonObject, json_object, texts, typed

WRONG: list[Any] = [[], {}, {"a": 1}, [1], [[]], [None], "yes", 5, 1.5, True, -1]
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 6,
    "hidden_size": 4, "num_attention_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
FIELDS = [
    "architectures", "model_type", "vocab_size", "hidden_size", "num_attention_heads", "head_dim",
    "num_key_value_heads", "tie_word_embeddings", "quantization_config", "torch_dtype", "dtype",
    "text_config", "_class_name", "rope_scaling", "compression_config",
]  # fmt: skip


def base_of(folder: Path, config: dict[str, Any], metadata: Any = None) -> Path:
    """A tied language model of one shard with its index, and a fused weight."""
    folder.mkdir()
    tensors = {
        "model.embed_tokens.weight": torch.randn(6, 4),
        "model.layers.0.self_attn.qkv_proj.weight": torch.randn(12, 4),
    }
    save_file(tensors, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    index["metadata"] = metadata if metadata is not None else {"total_size": 1}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter_of(folder: Path) -> Path:
    """A larger table, and a LoRA of the fused weight's q."""
    folder.mkdir()
    name = "base_model.model.model."
    save_file(
        {
            f"{name}embed_tokens.weight": torch.randn(8, 4),
            f"{name}layers.0.self_attn.q_proj.lora_A.weight": torch.randn(2, 4),
            f"{name}layers.0.self_attn.q_proj.lora_B.weight": torch.randn(4, 2),
        },
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    config["modules_to_save"] = ["embed_tokens"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("field", FIELDS)
def test_a_config_of_the_wrong_kind_is_refused_by_field_or_not_needed(
    tmp_path: Path, field: str
) -> None:
    adapter = adapter_of(tmp_path / "adapter")
    for number, value in enumerate(WRONG):
        base, out = base_of(tmp_path / f"{number}", {**CONFIG, field: value}), tmp_path / "out"
        try:
            adaptsurgery.merge(base, [adapter], out, overwrite=True)
        except FileError as error:
            assert error.code == "bad-config" and f"`{field}`" in error.what
            assert error.where == str(base / "config.json") and error.seen and error.next
        assert not [p.name for p in tmp_path.iterdir() if "partial" in p.name]


@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_size", []), ("vocab_size", {"a": 1}), ("architectures", 5), ("architectures", True),
     ("architectures", {"a": 1}), ("tie_word_embeddings", "yes"), ("text_config", 5)],
)  # fmt: skip
def test_what_the_merge_needs_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    base = base_of(tmp_path / "base", {**CONFIG, field: value})
    with pytest.raises(FileError) as error:
        adaptsurgery.merge(base, [adapter_of(tmp_path / "adapter")], tmp_path / "out")
    assert error.value.code == "bad-config"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("metadata", [5, "x", [1], True, [[]]])
def test_an_index_of_the_wrong_kind_is_refused_before_any_work(
    tmp_path: Path, metadata: Any
) -> None:
    base = base_of(tmp_path / "base", CONFIG, metadata)
    with pytest.raises(FileError) as error:
        adaptsurgery.merge(base, [adapter_of(tmp_path / "adapter")], tmp_path / "out")
    assert error.value.code == "bad-config" and "`metadata`" in error.value.what
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def quantised(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    tensors = {
        "a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "a.weight_scale_inv": torch.full((2, 2), 2.0),
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("field", "value"),
    [("quantization_config", [1]), ("quantization_config", "x"), ("quantization_config", 5),
     ("torch_dtype", 5), ("dtype", [1]),
     ("quantization_config", {"weight_block_size": 2})],
)  # fmt: skip
def test_dequantising_by_a_config_of_the_wrong_kind(tmp_path: Path, field: str, value: Any) -> None:
    save_file({"lycoris_a.diff": torch.ones(4, 4)}, tmp_path / "a.safetensors")
    base = quantised(tmp_path / "base", {field: value})
    with pytest.raises(FileError) as error:
        adaptsurgery.merge(base, [tmp_path / "a.safetensors"], tmp_path / "o", dequantize=True)
    assert error.value.code == "bad-config"


KINDS: list[tuple[Any, Any]] = [(str, "a"), (int, 3), (bool, False), (list, [1]), (dict, {"a": 1})]


@pytest.mark.parametrize(("kind", "right"), KINDS)
def test_a_field_is_of_its_kind_missing_or_refused(kind: Any, right: Any) -> None:
    config = JsonObject(a=right, none=None)
    config.where = "here"
    assert typed(config, "a", kind) == right
    assert typed(config, "none", kind) is None and typed(config, "b", kind) is None
    for other, value in KINDS:
        if other is not kind:
            with pytest.raises(FileError) as error:
                typed(JsonObject(a=value), "a", kind)
            assert error.value.code == "bad-config" and "`a`" in error.value.what
    for wrong in ("x", 5, {"a": 1}, [1], [[]], True):
        with pytest.raises(FileError):
            texts(JsonObject(a=wrong), "a")


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"[" * 100_000, "bad-json"), (b"[]", "bad-json"), (b"\xff", "bad-json"), (b"", "bad-json"),
     (b'{"a":' + b"9" * 5000 + b"}", "bad-json"), (b'{"a":[' + b"[]," * 4_000_001, "absurd-size")],
)  # fmt: skip
def test_json_that_is_no_object_is_refused(data: bytes, code: str) -> None:
    with pytest.raises(FileError) as error:
        json_object(data, "here")
    assert error.value.code == code and len(str(error.value)) < 1000


# -- Packed dtypes


def packed_base(path: Path) -> Path:
    from adaptsurgery.checkpoint.writer import write_safetensors
    from adaptsurgery_formats.tensors import Literal, Tensor

    tensors = {
        "a.weight": Tensor("F32", (4, 4), (Literal(bytes(64)),)),
        "b.weight": Tensor("F4", (4, 4), (Literal(bytes(range(8))),)),
        "c.weight": Tensor("F6_E2M3", (4, 4), (Literal(bytes(range(12))),)),
        "b.weight_scale": Tensor("F8_E8M0", (4, 1), (Literal(bytes(4)),)),
    }
    write_safetensors(path, tensors)
    return path


def test_packed_tensors_of_a_base_are_copied_and_take_no_change(tmp_path: Path) -> None:
    from adaptsurgery.checkpoint.safetensors import read_safetensors

    base, out = packed_base(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    save_file({"lycoris_a.diff": torch.ones(4, 4)}, tmp_path / "a.safetensors")
    adaptsurgery.merge(base, [tmp_path / "a.safetensors"], out)
    before, after = read_safetensors(base).tensors, read_safetensors(out).tensors
    assert before.keys() == after.keys()
    for name in before.keys() - {"a.weight"}:
        assert after[name].dtype == before[name].dtype
        assert after[name].read() == before[name].read()
    adaptsurgery.verify_merge(out, base, [tmp_path / "a.safetensors"])
    for name in ("b", "c"):
        save_file({f"lycoris_{name}.diff": torch.ones(4, 4)}, tmp_path / "x.safetensors")
        for options in ({}, {"dequantize": True}):
            with pytest.raises(ValueRefused) as error:
                adaptsurgery.merge(base, [tmp_path / "x.safetensors"], tmp_path / "o", **options)
            assert error.value.code in ("quantised-weight", "packed-weight")
            assert "packed" in error.value.what and ".weight" in error.value.what


def test_an_adapter_of_packed_numbers_is_refused_as_what_it_is(tmp_path: Path) -> None:
    from adaptsurgery.checkpoint.writer import write_safetensors
    from adaptsurgery_formats.tensors import Literal, Tensor

    write_safetensors(
        tmp_path / "a.safetensors", {"lycoris_a.diff": Tensor("F4", (4, 4), (Literal(bytes(8)),))}
    )
    with pytest.raises(SurgeryError) as error:
        adaptsurgery.convert(tmp_path / "a.safetensors", tmp_path / "b", to="peft")
    assert error.value.code == "bad-dtype" and "F4, packed" in error.value.what
    assert "dequantise" in error.value.next


def test_growing_tables_still_change_the_config(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", CONFIG)
    adaptsurgery.merge(base, [adapter_of(tmp_path / "adapter")], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 8
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert load_file(shards[0])["model.embed_tokens.weight"].shape == (8, 4)
