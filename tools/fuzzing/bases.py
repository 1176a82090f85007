"""Bases: a folder of shards, an index and configs, each of them damaged or in an odd form."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
from corpus import Raw, base_file, samples

from fuzzing.damage import NAMES, ODD, cut_or_grown, flipped, json_damaged, json_text, special
from fuzzing.inputs import Content, Input, Special
from fuzzing.oracle import pack, unpack

_INDEX = "m/model.safetensors.index.json"
_NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_BESIDE = (
    "config.json", "model_index.json", "tokenizer.json", "generation_config.json", "README.md", "vocab.txt",
    "x.txt", "assets", "LICENSE", "model.safetensors.index.json", "pytorch_model.bin", "unet", *_NAMES,
)  # fmt: skip
_CONFIG_FIELDS = (
    "architectures", "vocab_size", "tie_word_embeddings", "model_type", "quantization_config", "torch_dtype",
    "text_config", "num_attention_heads", "hidden_size", "auto_map", "_class_name", "dtype",
)  # fmt: skip


def make(r: random.Random, seed: int) -> Input:
    """A folder of two shards, damaged, and a command that reads it beside an adapter."""
    files = _whole(r)
    story = []
    for _ in range(r.choice((0, 1, 1, 1, 2, 3))):
        damage = r.choice(_DAMAGES)
        damage(r, files)
        story.append(damage.__name__.strip("_"))
    sample = r.choice([s for s in samples() if s.base == "base"])
    files |= {f"a/{name}": data for name, data in sample.files.items()}
    adapter = f"in/a/{sample.path}".rstrip("/")
    base = r.choice(("in/m", "in/m", "in/m", "in/" + _INDEX, f"in/m/{_NAMES[0]}"))
    job, options = _job(r, base, adapter)
    surroundings = {"fsize": r.choice((0, 100, 3000))} if r.random() < 0.03 else {}
    return Input(
        "bases", seed, files, job, options, surroundings, f"{sample.name} {' '.join(story)}"
    )


def _whole(r: random.Random) -> dict[str, Content]:
    tensors, _ = unpack(base_file())
    tensors["lm.weight"] = Raw("F32", (10, 8), tensors["embed.weight"].data)
    keys = sorted(tensors)
    shards = [{k: tensors[k] for k in keys[i::2]} for i in (0, 1)]
    index = {k: name for name, shard in zip(_NAMES, shards, strict=True) for k in shard}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 10}
    return {
        **{f"m/{name}": pack(shard) for name, shard in zip(_NAMES, shards, strict=True)},
        _INDEX: json.dumps({"metadata": {"total_size": 1}, "weight_map": index}).encode(),
        "m/config.json": json.dumps({**config, "tie_word_embeddings": False}).encode(),
        "m/tokenizer.json": b"{}",
    }


def _job(r: random.Random, base: str, adapter: str) -> tuple[str, dict[str, Any]]:
    job = r.choice(("merge", "merge", "merge", "unmerge", "extract", "inspect", "convert"))
    out = (
        {"out": "out/result"}
        if base == "in/m" or "index" in base
        else {"out": "out/result.safetensors"}
    )
    if job in ("merge", "unmerge"):
        more: dict[str, Any] = {"overwrite": r.random() < 0.2}
        if r.random() < 0.25:
            more["max_shard_size"] = r.choice((1, 300, 1000, 10**9))
        if r.random() < 0.25:
            more["dtype"] = r.choice(("fp16", "bf16", "fp32"))
        if r.random() < 0.3 and job == "merge":
            more["dequantize"] = True
        if r.random() < 0.2:
            more["allow_unmatched"] = True
        return job, {"base": base, "adapters": [[adapter, 1.0]], **out, **more}
    if job == "extract":
        return job, {"base": base, "tuned": base, "out": "out/x", "rank": 2, "allow_empty": True}
    if job == "inspect":
        return job, {"source": adapter, "base": base}
    return job, {"source": adapter, "base": base, "out": "out/x", "to": "peft", "check": False}


# -- Damage


def _json(files: dict[str, Content], name: str) -> Any:
    try:
        return json.loads(files[name])  # type: ignore[arg-type]
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}


def _config_field(r: random.Random, files: dict[str, Content]) -> None:
    read = _json(files, "m/config.json")
    if isinstance(read, dict):
        quantised = {
            "quant_method": "fp8",
            "weight_block_size": r.choice(ODD),
            "modules_to_not_convert": r.choice(ODD),
        }
        read[r.choice(_CONFIG_FIELDS)] = r.choice(
            (*ODD, quantised, {"quant_method": r.choice(ODD)})
        )
    files["m/config.json"] = json_text(r, read)


def _config(r: random.Random, files: dict[str, Content]) -> None:
    files["m/config.json"] = json_text(r, json_damaged(r, _json(files, "m/config.json"), 2))


def _index_values(r: random.Random, files: dict[str, Content]) -> None:
    read = _json(files, _INDEX)
    if r.random() < 0.4 and isinstance(read, dict):
        read[r.choice(("metadata", "weight_map", "x"))] = r.choice(ODD)
    files[_INDEX] = json_text(r, json_damaged(r, read, r.choice((0, 1, 1, 2))))


def _shard_name(r: random.Random, files: dict[str, Content]) -> None:
    """An index that names a shard elsewhere, of an odd name, or one that is not there."""
    read = _json(files, _INDEX)
    weights = read.get("weight_map") if isinstance(read, dict) else None
    if isinstance(weights, dict) and weights:
        name = r.choice(
            (*NAMES, "../a/adapter_model.safetensors", "{room}/in/m/" + _NAMES[0], "/etc/hostname")
        )
        for key in list(weights)[: r.choice((1, 100))]:
            weights[key] = name
    files[_INDEX] = json.dumps(read).encode()


def _entry(r: random.Random, files: dict[str, Content]) -> None:
    files[f"m/{r.choice(_BESIDE)}"] = special(r)


def _link(r: random.Random, files: dict[str, Content]) -> None:
    """Links to files that are no part of the model, and to folders of them."""
    target = r.choice(
        ("{room}/secret", "{room}", "../../secret", "{room}/in", "gone", "..", "/proc/self")
    )
    files[
        f"m/{r.choice(('vocab.txt', 'assets', 'README.md', 'LICENSE', 'x.txt', 'tokenizer_config.json'))}"
    ] = Special("link", target)


def _shard(r: random.Random, files: dict[str, Content]) -> None:
    name = f"m/{r.choice(_NAMES)}"
    content = files.get(name)
    if isinstance(content, bytes):
        files[name] = flipped(r, content) if r.random() < 0.7 else cut_or_grown(r, content)


def _numbers(r: random.Random, files: dict[str, Content]) -> None:
    """What is not finite, or too large for half precision, somewhere in a shard."""
    name = f"m/{r.choice(_NAMES)}"
    content = files.get(name)
    if not isinstance(content, bytes):
        return
    try:
        tensors, metadata = unpack(content)
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    key = r.choice(list(tensors))
    number = np.float32(
        r.choice((float("nan"), float("inf"), -float("inf"), 3e38, 1e5, 1e-45))
    ).tobytes()
    t = tensors[key]
    if t.dtype == "F32" and t.data:
        at = r.randrange(len(t.data) // 4) * 4
        tensors[key] = Raw(t.dtype, t.shape, t.data[:at] + number + t.data[at + 4 :])
        files[name] = pack(tensors, metadata)


def _tensor(r: random.Random, files: dict[str, Content]) -> None:
    """Another dtype, shape or name of one tensor, or a scale of a quantised one beside it."""
    name = f"m/{r.choice(_NAMES)}"
    content = files.get(name)
    if not isinstance(content, bytes):
        return
    try:
        tensors, metadata = unpack(content)
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    key = r.choice(list(tensors))
    t = tensors[key]
    choice = r.randrange(4)
    if choice == 0:
        tensors[r.choice(NAMES)] = tensors.pop(key)
    elif choice == 1:
        tensors[key] = Raw(
            r.choice(("I8", "U8", "F8_E4M3", "F8_E5M2", "BOOL")), (len(t.data),), t.data
        )
    elif choice == 2:
        tensors[f"{key}{r.choice(('_scale', '_scale_inv', '.absmax', '_scb', '.SCB'))}"] = Raw(
            "F32", (1,), b"\0\0\0\0"
        )
    else:
        tensors[key] = Raw(t.dtype, t.shape[::-1], t.data)
    tensors.pop("__metadata__", None)
    files[name] = pack(tensors, metadata)


_DAMAGES = (
    _config_field, _config_field, _config, _index_values, _index_values, _shard_name, _entry, _entry, _link,
    _shard, _numbers, _tensor,
)  # fmt: skip
