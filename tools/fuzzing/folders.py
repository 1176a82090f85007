"""PEFT folders: configs of every kind of JSON, hostile patterns, and odd entries beside them."""

from __future__ import annotations

import json
import random
from typing import Any

from corpus import CONFIG, SHAPES, WEIGHTS, base_file, samples

from fuzzing.adapters import _OPTIONS, BASE, NAME
from fuzzing.damage import NAMES, cut_or_grown, flipped, json_damaged, json_text, special
from fuzzing.inputs import Content, Input

_PATTERNS = (
    r"(a|aa)+$", r"(a+)+b", r"(.*)*x", r"(?i)" + "[\x01-\uffff]" * 2000, r"(?i)" + "[\x01-\uffff]" * 200,
    "(" * 90 + ")" * 90, "(" * 5000, "a{1,65535}{1,65535}", r"(?P<x>a)(?P=x)", r"\x00", r"[", r"(?<=a*)b",
    r".*\.fc_[ab]", "|".join(map(str, range(5000))), r"^blk_0\.fc_b", "", ".*", r"(?s:.)*", r"\Z", "a" * 20000,
    r"(x?){500}x{500}", r"((((a{9}){9}){9}){9}){9}", "(?:" * 500 + "a" + ")*" * 500,
)  # fmt: skip
_FIELDS = (
    "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "modules_to_save", "bias", "r",
    "lora_alpha", "alpha", "use_dora", "use_rslora", "peft_type", "layers_to_transform", "layers_pattern",
    "fan_in_fan_out", "decompose_factor", "decompose_both", "init_weights", "init_lora_weights", "apply_GS",
    "task_type", "trainable_token_indices", "target_parameters", "megatron_config", "lora_bias", "loftq_config",
    "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "lora_dropout",
    "module_dropout", "rank_dropout", "use_effective_conv2d", "layer_replication", "novel",
)  # fmt: skip
_BESIDE = (
    "README.md", "config.json", "x.json", "tokenizer.json", "adapter_model.bin", "unet", "text_encoder",
    "adapter_model.safetensors.index.json", "training_args.bin", "checkpoint-1", CONFIG, WEIGHTS,
)  # fmt: skip
_JOBS = (
    "inspect",
    "convert",
    "verify",
    "merge",
    "config",
    "config",
    "attach",
    "attach",
    "combine",
    "resize",
)


def make(r: random.Random, seed: int) -> Input:
    """A PEFT folder of the tests' corpus with another config or other entries, and a command."""
    sample = r.choice([s for s in samples() if s.layout == "peft"])
    files: dict[str, Content] = {f"a/{k}": v for k, v in sample.files.items()}
    story = [sample.name]
    for _ in range(r.choice((1, 1, 2, 3))):
        damage = r.choice(_DAMAGES)
        damage(r, files)
        story.append(damage.__name__.strip("_"))
    job = r.choice(_JOBS)
    options = _config(r) if job == "config" else _OPTIONS[job](r, "in/a", BASE, {})
    files = {"base.safetensors": base_file(), **files}
    return Input("folders", seed, files, job, options, story=" ".join(story))


def _config(r: random.Random) -> dict[str, Any]:
    return {"source": "in/a", "names": [*SHAPES, "a" * 40]}


def _read(files: dict[str, Content]) -> dict[str, Any]:
    try:
        read = json.loads(files[f"a/{CONFIG}"])  # type: ignore[arg-type]
    except (ValueError, TypeError, LookupError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def _values(r: random.Random, files: dict[str, Content]) -> None:
    files[f"a/{CONFIG}"] = json_text(r, json_damaged(r, _read(files), r.choice((1, 1, 2))))


def _field(r: random.Random, files: dict[str, Content]) -> None:
    read = _read(files)
    read[r.choice(_FIELDS)] = r.choice((*_odd(), *_odd(), r.choice(NAME), r.choice(_PATTERNS)))
    files[f"a/{CONFIG}"] = json_text(r, read)


def _odd() -> tuple[Any, ...]:
    from fuzzing.damage import ODD

    return ODD


def _pattern(r: random.Random, files: dict[str, Content]) -> None:
    """A regular expression that is slow to compile, slow to run, or none."""
    read, pattern = _read(files), r.choice(_PATTERNS)
    field = r.choice(("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"))
    read[field] = {pattern: 2} if field.endswith("pattern") else pattern
    files[f"a/{CONFIG}"] = json.dumps(read).encode()


def _text(r: random.Random, files: dict[str, Content]) -> None:
    name = r.choice((f"a/{CONFIG}", f"a/{WEIGHTS}"))
    content = files.get(name)
    if isinstance(content, bytes):
        files[name] = flipped(r, content) if r.random() < 0.6 else cut_or_grown(r, content)


def _entry(r: random.Random, files: dict[str, Content]) -> None:
    """Something odd in the place of a file, or beside the files."""
    name = r.choice((CONFIG, WEIGHTS)) if r.random() < 0.3 else r.choice(_BESIDE)
    files[f"a/{name}"] = special(r)


def _named(r: random.Random, files: dict[str, Content]) -> None:
    """A file or folder of an odd name beside the others."""
    name = r.choice(
        [n for n in NAMES if "\x00" not in n and "/" not in n and len(n) < 250 and n.strip(".")]
    )
    inner = files.get(f"a/{WEIGHTS}", b"")
    files[f"a/{name}"] = inner if isinstance(inner, bytes) else b""


def _moved(r: random.Random, files: dict[str, Content]) -> None:
    """The files in a part's folder, under other names, or gone."""
    name = r.choice((CONFIG, WEIGHTS))
    content = files.pop(f"a/{name}", b"{}")
    place = r.choice(
        (f"a/unet/{name}", f"a/{name.upper()}", f"a/default/{name}", "", f"a/x/y/{name}")
    )
    if place:
        files[place] = content


_DAMAGES = (_values, _values, _field, _field, _pattern, _text, _entry, _entry, _named, _moved)
