"""Seeded damage to small adapter files: bytes, headers, configs, numbers, and all at once."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from corpus import CONFIG, Raw, Sample, cut, joined, pack, samples, unpack

Files = dict[str, bytes]
_SUFFIXES = (
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "lora_A.weight", "lora_B.weight",
    "hada_w1_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2",
    "lokr_w2_a", "lokr_w2_b", "lokr_t2", "lokr_t1", "hra_u", "alpha", "dora_scale", "diff", "diff_b",
    "w_norm", "b_norm", "lora_magnitude_vector", "lora_B.bias", "lora_embedding_A", "scalar",
    "oft_blocks", "weight", "bias", "",
)  # fmt: skip
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "C64")
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "C64": 8}
_EXTREMES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, -1, 0.5, -0.0, 5e-324, 1e-46, 1e39, 1e308, 10**12, 2**63, 10**400,
    "", "x", "all-linear", "2", [], [1], ["fc_a"], [None], {}, {"fc_a": 2}, {"fc_a": None},
    {"fc_.": 3}, {"(": 1}, {"": 2}, {"x": 10**400}, [[]], "LORA", "lokr", "\u202e", "\ud800",
    ".*", r"blk_\d.fc_[ab]", "(a|aa)+$", "(?x)b", ["blk_0.fc_a", "blk_0.fc_b", "blk_1.fc_a"],
)  # fmt: skip
_NAMES = (
    "../x", "a\nb", "\x1b[31m", "blk_0", "é", "x" * 3000, ".", "", "\x00", "fc_a", "blk_0.fc_a.",
    "blk_0_fc_a", "blk_0.fc_a", "blk_1.fc_b",
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A damaged source, and the options to convert it with."""

    sample: Sample
    files: Files
    story: str
    options: dict[str, Any]


def mutant(seed: int) -> Mutant:
    """The one mutant of a seed: a sample, one to three kinds of damage, and options."""
    r = random.Random(seed)
    sample = r.choice(samples())
    files, story = dict(sample.files), []
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        damage = r.choice(_DAMAGE)
        try:
            changed = damage(r, files, sample)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
            continue  # an earlier damage left nothing that this one can be done to
        files = changed
        story.append(damage.__name__.lstrip("_"))
    return Mutant(
        sample, files, f"seed {seed}: {sample.name} {'+'.join(story)}", _options(r, sample)
    )


def _options(r: random.Random, sample: Sample) -> dict[str, Any]:
    options: dict[str, Any] = {"to": r.choice(("peft", "lycoris", "kohya"))}
    base = sample.base if r.random() < 0.85 else r.choice(("", "sd15", "flux", "base"))
    if base:
        options["base"] = base
    if r.random() < 0.3:
        options |= {"algorithm": "lora", "allow_lossy": r.random() < 0.7}
        options["rank"] = r.choice((None, 1, 2, 4, 100))
    if r.random() < 0.1:
        options["layout"] = r.choice(("peft", "lycoris", "kohya", "diffusers", "comfyui"))
    options["hashes"] = r.random() < 0.5
    return options


# --- bytes --------------------------------------------------------------------------------------


def _weights(sample: Sample) -> str:
    return sample.weights[0]


def _flip_header(r: random.Random, files: Files, sample: Sample) -> Files:
    name = _weights(sample)
    blob = bytearray(files[name])
    end = 8 + int.from_bytes(blob[:8], "little")
    for _ in range(r.choice((1, 1, 2, 8))):
        blob[r.randrange(8, min(end, len(blob)))] = r.choice((r.randrange(256), 0, 34, 44, 49, 93))
    return files | {name: bytes(blob)}


def _flip_length(r: random.Random, files: Files, sample: Sample) -> Files:
    name = _weights(sample)
    blob = bytearray(files[name])
    length = int.from_bytes(blob[:8], "little")
    wrong = r.choice((0, 1, 2, length - 1, length + 1, length * 2, 10**8, 10**9, 2**63, 2**64 - 1))
    blob[:8] = wrong.to_bytes(8, "little")
    return files | {name: bytes(blob)}


def _truncate(r: random.Random, files: Files, sample: Sample) -> Files:
    name = r.choice(list(files))
    return files | {name: files[name][: r.randrange(len(files[name]))]}


def _append(r: random.Random, files: Files, sample: Sample) -> Files:
    name = r.choice(list(files))
    return files | {name: files[name] + r.randbytes(r.choice((1, 8, 100)))}


def _splice(r: random.Random, files: Files, sample: Sample) -> Files:
    name = _weights(sample)
    a, other = files[name], r.choice(samples())
    b = other.files[other.weights[0]]
    return files | {name: a[: r.randrange(len(a))] + b[r.randrange(len(b)) :]}


def _flip_data(r: random.Random, files: Files, sample: Sample) -> Files:
    name = _weights(sample)
    blob = bytearray(files[name])
    start = 8 + int.from_bytes(blob[:8], "little")
    for _ in range(r.choice((1, 4))):
        blob[r.randrange(start, len(blob))] ^= 1 << r.randrange(8)
    return files | {name: bytes(blob)}


def _flip_config(r: random.Random, files: Files, sample: Sample) -> Files:
    text = bytearray(files[CONFIG])
    for _ in range(r.choice((1, 2, 6))):
        text[r.randrange(len(text))] = r.choice((r.randrange(256), 34, 44, 49, 91, 125))
    return files | {CONFIG: bytes(text)}


def _drop_file(r: random.Random, files: Files, sample: Sample) -> Files:
    gone = r.choice(list(files))
    return {name: data for name, data in files.items() if name != gone}


# --- headers over the data as they are ----------------------------------------------------------


def _lie(r: random.Random, files: Files, sample: Sample) -> Files:
    """One field of one entry of the header says something else."""
    name = _weights(sample)
    header, data = cut(files[name])
    key = r.choice([k for k in header if k != "__metadata__"])
    entry = header[key]
    field = r.choice(("dtype", "shape", "shape", "data_offsets", "data_offsets", "drop", "extra"))
    if field == "dtype":
        entry["dtype"] = r.choice((*_DTYPES, "F4", None, 7, "f32", ["F32"]))
    elif field == "drop":
        del entry[r.choice(list(entry))]
    elif field == "extra":
        entry["strides"] = [1]
    else:
        entry[field] = _wrong_numbers(r, entry[field])
    return files | {name: joined(json.dumps(header), data)}


def _wrong_numbers(r: random.Random, given: list[int]) -> Any:
    numbers: list[Any] = list(given)
    odd = r.choice((0, 1, -1, 2**31, 2**63, 2**64, 10**30, 1.5, None, True, "4", [4], -0.0))
    choice = r.randrange(5)
    if choice == 0 and numbers:
        numbers[r.randrange(len(numbers))] = odd
    elif choice == 1:
        numbers.append(odd)
    elif choice == 2:
        r.shuffle(numbers)
    elif choice == 3 and numbers:
        numbers[r.randrange(len(numbers))] += r.choice((-4, 4, 1))
    else:
        return r.choice((None, {}, "x", numbers[:-1], [numbers]))
    return numbers


def _swap_offsets(r: random.Random, files: Files, sample: Sample) -> Files:
    name = _weights(sample)
    header, data = cut(files[name])
    a, b = r.sample([k for k in header if k != "__metadata__"], 2)
    field = r.choice(("data_offsets", "shape", "dtype"))
    header[a][field], header[b][field] = header[b][field], header[a][field]
    return files | {name: joined(json.dumps(header), data)}


def _duplicate_name(r: random.Random, files: Files, sample: Sample) -> Files:
    name = _weights(sample)
    header, data = cut(files[name])
    key = r.choice([k for k in header if k != "__metadata__"])
    again = f"{json.dumps(key)}: {json.dumps(header[key])}"
    return files | {name: joined("{" + again + ", " + json.dumps(header)[1:], data)}


# --- valid files with other content -------------------------------------------------------------


def _edit(
    files: Files, sample: Sample, change: Callable[[dict[str, Raw], dict[str, str]], None]
) -> Files:
    name = _weights(sample)
    tensors, metadata = unpack(files[name])
    change(tensors, metadata)
    return files | {name: pack(tensors, metadata)}


def _drop_tensor(r: random.Random, files: Files, sample: Sample) -> Files:
    return _edit(files, sample, lambda tensors, _: tensors.pop(r.choice(list(tensors))) and None)


def _rename_tensor(r: random.Random, files: Files, sample: Sample) -> Files:
    def change(tensors: dict[str, Raw], _: dict[str, str]) -> None:
        key = r.choice(list(tensors))
        tensors[_other_name(r, key, list(tensors))] = tensors.pop(key)

    return _edit(files, sample, change)


def _other_name(r: random.Random, key: str, keys: list[str]) -> str:
    head, _, tail = key.rpartition(".")
    if tail in ("weight", "bias"):
        head, _, before = head.rpartition(".")
        tail = f"{before}.{tail}"
    choice = r.randrange(5)
    if choice == 0:
        return f"{head}.{r.choice(_SUFFIXES)}"
    if choice == 1:
        return f"{r.choice(keys).rpartition('.')[0]}.{tail}"
    if choice == 2:
        return f"{head}{r.choice(_NAMES)}.{tail}"
    if choice == 3:
        prefix = r.choice(("base_model.model.", "lycoris_", "lora_unet_", "diffusion_model.", ""))
        return prefix + key
    return r.choice(_NAMES) + key


def _rename_module(r: random.Random, files: Files, sample: Sample) -> Files:
    """All tensors of one module under another's name."""

    def change(tensors: dict[str, Raw], _: dict[str, str]) -> None:
        a, b = r.sample(("blk_0.fc_a", "blk_0.fc_b", "blk_1.fc_a", "blk_0.pw", "head", "norm"), 2)
        for old, new in ((a, b), (a.replace(".", "_"), b.replace(".", "_"))):
            for key in [k for k in tensors if old in k]:
                tensors[key.replace(old, new)] = tensors.pop(key)

    return _edit(files, sample, change)


def _duplicate_tensor(r: random.Random, files: Files, sample: Sample) -> Files:
    def change(tensors: dict[str, Raw], _: dict[str, str]) -> None:
        key = r.choice(list(tensors))
        tensors[_other_name(r, key, list(tensors))] = tensors[key]

    return _edit(files, sample, change)


def _reshape(r: random.Random, files: Files, sample: Sample) -> Files:
    def change(tensors: dict[str, Raw], _: dict[str, str]) -> None:
        key = r.choice(list(tensors))
        t = tensors[key]
        tensors[key] = Raw(t.dtype, _other_shape(r, t.shape), t.data)

    return _edit(files, sample, change)


def _other_shape(r: random.Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    count = 1
    for s in shape:
        count *= s
    turned = list(shape)
    r.shuffle(turned)
    plain = [(count,), (1, count), (count, 1), (*shape, 1), (*shape, 1, 1), (1, *shape), turned]
    halves = [(2, count // 2), (count // 2, 2)] if count % 2 == 0 else []
    return tuple(r.choice([*plain, *halves, () if count == 1 else shape[::-1]]))


def _resize(r: random.Random, files: Files, sample: Sample) -> Files:
    """One dimension longer or shorter, the data to match."""

    def change(tensors: dict[str, Raw], _: dict[str, str]) -> None:
        key = r.choice(list(tensors))
        t = tensors[key]
        shape = list(t.shape) or [1]
        shape[r.randrange(len(shape))] = r.choice((0, 1, 2, 3, 5))
        count = _SIZES[t.dtype]
        for s in shape:
            count *= s
        tensors[key] = Raw(t.dtype, tuple(shape), (t.data * (count // len(t.data) + 1))[:count])

    return _edit(files, sample, change)


def _retype(r: random.Random, files: Files, sample: Sample) -> Files:
    """Another dtype over the same bytes; the last dimension makes up for its width."""

    def change(tensors: dict[str, Raw], _: dict[str, str]) -> None:
        key = r.choice(list(tensors))
        t, dtype = tensors[key], r.choice(_DTYPES)
        width, old = _SIZES.get(dtype, 1), _SIZES.get(t.dtype, 1)
        shape = (*t.shape[:-1], t.shape[-1] * old // width) if t.shape else t.shape
        data = t.data if t.shape else t.data[:width].ljust(width, b"\0")
        count = width
        for s in shape:
            count *= s
        tensors[key] = Raw(dtype, shape, data[:count])

    return _edit(files, sample, change)


def _poison(r: random.Random, files: Files, sample: Sample) -> Files:
    """A NaN, an infinity, or a number at the edge of its dtype."""
    bits = {
        "F32": (0x7FC00000, 0xFF800000, 0x7F800001, 0x7F7FFFFF, 1, 0x80000000),
        "F16": (0x7E00, 0xFC00, 0x7C01, 0x7BFF, 1, 0x8000),
        "BF16": (0x7FC0, 0xFF80, 0x7F81, 0x7F7F, 1, 0x8000),
        "F64": (0x7FF8000000000000, 0xFFF0000000000000, 0x7FEFFFFFFFFFFFFF, 1),
    }

    def change(tensors: dict[str, Raw], _: dict[str, str]) -> None:
        key = r.choice(list(tensors))
        t = tensors[key]
        width = _SIZES[t.dtype]
        pattern = r.choice(bits[t.dtype]).to_bytes(width, "little")
        at = r.randrange(len(t.data) // width) * width
        data = t.data[:at] + pattern + t.data[at + width :]
        if r.random() < 0.3:
            data = pattern * (len(t.data) // width)
        tensors[key] = Raw(t.dtype, t.shape, data)

    return _edit(files, sample, change)


def _odd_metadata(r: random.Random, files: Files, sample: Sample) -> Files:
    def change(_: dict[str, Raw], metadata: dict[str, str]) -> None:
        key = r.choice((
            "adaptsurgery.adapter_config", "adaptsurgery.component", "adaptsurgery.model",
            "ss_network_args", "ss_network_dim", "ss_network_alpha", "lora_adapter_metadata",
            "sshs_model_hash", "format", "", "\x1b",
        ))  # fmt: skip
        config = json.dumps({"": {"peft_type": "LORA", "r": r.choice(_EXTREMES)}})
        component = json.dumps({"unet.lora_alpha": r.choice(_EXTREMES)})
        metadata[key] = r.choice((
            "", "x", "{", "[]", "null", "{}", '{"": 1}', '{"": {}}', '{"": {"peft_type": 1}}',
            "1" * 5000, "[" * 3000, "NaN", "unet", "../..", "sd15", "flux", config, component,
            '{"unet": 5}', '{"unet.alpha_pattern": [1], "unet.lora_alpha": 1}', '{"a": NaN}',
        ))  # fmt: skip

    return _edit(files, sample, change)


def _edit_config(r: random.Random, files: Files, sample: Sample) -> Files:
    config = json.loads(files[CONFIG])
    extra = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "exclude_modules", "bias",
             "layers_to_transform", "layers_pattern", "fan_in_fan_out", "decompose_both",
             "apply_GS", "decompose_factor", "init_lora_weights", "lora_dropout", "novel")  # fmt: skip
    field = r.choice((*config, *config, *extra))
    if r.random() < 0.2:
        config.pop(field, None)
    else:
        config[field] = r.choice(_EXTREMES)
    return files | {CONFIG: json.dumps(config).encode()}


_DAMAGE: tuple[Callable[[random.Random, Files, Sample], Files], ...] = (
    _flip_header, _flip_length, _truncate, _append, _splice, _flip_data, _flip_data, _flip_config,
    _drop_file, _lie, _lie, _swap_offsets, _duplicate_name, _drop_tensor, _rename_tensor,
    _rename_tensor, _rename_module, _rename_module, _duplicate_tensor, _reshape, _reshape, _resize,
    _resize, _retype, _poison, _poison, _odd_metadata, _odd_metadata, _edit_config, _edit_config,
    _edit_config,
)  # fmt: skip
