"""Small adapters in every layout and algorithm, as bytes, with the little base they belong to.

Written by plain code, without the package under test: what ``pack`` writes is right by the
safetensors format's own definition, and what a test damages starts from here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "int8": "I8", "bool": "BOOL"}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The base's modules: weight (o, i, *k).
SHAPES: dict[str, tuple[int, ...]] = {
    "blk_0.conv_in": (8, 4, 3, 3),
    "blk_0.pw": (6, 8, 1, 1),
    "blk_0.c1d": (6, 8, 3),
    "blk_0.fc_a": (12, 8),
    "blk_0.fc_b": (8, 12),
    "blk_1.fc_a": (12, 8),
    "head": (4, 12),
}
LINEAR = ("blk_0.fc_a", "blk_0.fc_b", "blk_1.fc_a")
CONV = ("blk_0.conv_in", "blk_0.pw")


@dataclass(frozen=True)
class Raw:
    """A tensor as a file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Sample:
    """A source: its files by relative name, the path to pass, and the base it needs, if any."""

    name: str
    layout: str
    files: dict[str, bytes]
    base: str = "base"
    path: str = ""
    weights: tuple[str, ...] = field(default=())

    def write(self, folder: Path) -> Path:
        return write(self.files, folder) / self.path


def write(files: Mapping[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        at = folder / name
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_bytes(data)
    return folder


def raw(array: np.ndarray[Any, Any]) -> Raw:
    array = np.asarray(array)
    return Raw(DTYPES[str(array.dtype)], array.shape, array.tobytes())


def bfloat16(array: np.ndarray[Any, Any]) -> Raw:
    """The numbers cut to BF16's upper half of a float32."""
    high = (array.astype("<f4").view("<u4") >> 16).astype("<u2")
    return Raw("BF16", array.shape, high.tobytes())


def pack(
    tensors: Mapping[str, Raw | np.ndarray[Any, Any]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """A valid safetensors file: length, JSON header, data in the order given."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for key, value in tensors.items():
        t = value if isinstance(value, Raw) else raw(value)
        at = [len(data), len(data) + len(t.data)]
        header[key] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": at}
        data += t.data
    return joined(json.dumps(header), data)


def joined(header: str | bytes, data: bytes) -> bytes:
    """A file with just this header text, honest about its length."""
    text = header.encode("utf-8") if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + data


def cut(blob: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a valid file."""
    end = 8 + int.from_bytes(blob[:8], "little")
    return json.loads(blob[8:end]), blob[end:]


def unpack(blob: bytes) -> tuple[dict[str, Raw], dict[str, str]]:
    """(tensors, metadata) of a valid file."""
    header, data = cut(blob)
    metadata = header.pop("__metadata__", {})
    tensors = {
        key: Raw(e["dtype"], tuple(e["shape"]), data[slice(*e["data_offsets"])])
        for key, e in header.items()
    }
    return tensors, metadata


# --- tensors ------------------------------------------------------------------------------------


class _Numbers:
    """Arrays of plain numbers of one seed, none near zero or large."""

    def __init__(self, seed: int, dtype: str = "float32") -> None:
        self.random, self.dtype = np.random.default_rng(seed), dtype

    def __call__(self, *shape: int) -> np.ndarray[Any, Any]:
        return (self.random.standard_normal(shape) * 0.5).astype(self.dtype)

    def magnitude(self, *shape: int) -> np.ndarray[Any, Any]:
        return (self.random.random(shape) + 1.0).astype(self.dtype)


def lora(n: _Numbers, shape: tuple[int, ...], r: int) -> dict[str, np.ndarray[Any, Any]]:
    ones = (1,) * (len(shape) - 2)
    return {"up": n(shape[0], r, *ones), "down": n(r, *shape[1:])}


def tucker(n: _Numbers, shape: tuple[int, ...], r: int) -> dict[str, np.ndarray[Any, Any]]:
    ones = (1,) * (len(shape) - 2)
    return {
        "up": n(shape[0], r, *ones), "down": n(r, shape[1], *ones), "mid": n(r, r, *shape[2:])
    }  # fmt: skip


def loha(n: _Numbers, shape: tuple[int, ...], r: int) -> dict[str, np.ndarray[Any, Any]]:
    columns = int(np.prod(shape[1:]))
    return {f"w{h}_{s}": n(shape[0], r) if s == "a" else n(r, columns) for h in "12" for s in "ab"}


def loha_core(n: _Numbers, shape: tuple[int, ...], r: int) -> dict[str, np.ndarray[Any, Any]]:
    return {
        **{f"t{h}": n(r, r, *shape[2:]) for h in "12"},
        **{f"w{h}_a": n(r, shape[0]) for h in "12"},
        **{f"w{h}_b": n(r, shape[1]) for h in "12"},
    }


def lokr(n: _Numbers, shape: tuple[int, ...], kind: str) -> dict[str, np.ndarray[Any, Any]]:
    """w1 (2, 2) or factored at rank 1; w2 full, factored or with a core, at rank 1."""
    b, d = shape[0] // 2, shape[1] // 2
    k = int(np.prod(shape[2:]))
    w1 = {"w1_a": n(2, 1), "w1_b": n(1, 2)} if "both" in kind else {"w1": n(2, 2)}
    if "full" in kind:
        return w1 | {"w2": n(b, d, *shape[2:])}
    if "core" in kind:
        return w1 | {"t2": n(1, 1, *shape[2:]), "w2_a": n(1, b), "w2_b": n(1, d)}
    return w1 | {"w2_a": n(b, 1), "w2_b": n(1, d * k)}


_KOHYA = {"up": "lora_up.weight", "down": "lora_down.weight", "mid": "lora_mid.weight"}
_PEFT = {"up": "lora_B.weight", "down": "lora_A.weight", "magnitude": "lora_magnitude_vector"}


def spelled(slot: str, algorithm: str, family: str) -> str:
    """A slot's suffix in the kohya or PEFT family of layouts."""
    if algorithm == "lora":
        own = _PEFT if family == "peft" else _KOHYA
        return own.get(slot, "dora_scale" if slot == "magnitude" else slot)
    return {"loha": "hada_", "lokr": "lokr_", "hra": "hra_", "full": ""}[algorithm] + slot


def keyed(
    prefix: str, path: str, algorithm: str, slots: Mapping[str, Any], family: str = "kohya"
) -> dict[str, Any]:
    return {f"{prefix}{path}.{spelled(s, algorithm, family)}": t for s, t in slots.items()}


# --- files --------------------------------------------------------------------------------------


@cache
def base_file() -> bytes:
    """The base's weights and biases."""
    n = _Numbers(1)
    weights = {f"{path}.weight": n(*shape) for path, shape in SHAPES.items()}
    return pack(weights | {"head.bias": n(4), "norm.weight": n(8), "embed.weight": n(10, 8)})


@cache
def base_arrays() -> dict[str, np.ndarray[Any, Any]]:
    tensors, _ = unpack(base_file())
    return {
        key.removesuffix(".weight"): np.frombuffer(t.data, "<f4").reshape(t.shape).astype("f8")
        for key, t in tensors.items()
    }


def peft_folder(
    tensors: Mapping[str, Any], config: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> dict[str, bytes]:
    return {
        CONFIG: json.dumps({"task_type": None, **config}, indent=2).encode(),
        WEIGHTS: pack(tensors, {"format": "pt", **(metadata or {})}),
    }


PREFIX = "base_model.model."


def _peft(name: str, algorithm: str, modules: Mapping[str, Any], extra: Any = None, **config: Any):
    tensors: dict[str, Any] = dict(extra or {})
    for path, slots in modules.items():
        tensors |= keyed(PREFIX, path, algorithm, slots, "peft")
    said = {"peft_type": algorithm.upper(), "target_modules": sorted(modules), "r": 2, **config}
    return Sample(name, "peft", peft_folder(tensors, said), weights=(WEIGHTS,))


def _single(
    name: str, layout: str, tensors: Mapping[str, Any], base: str = "base", **metadata: str
) -> Sample:
    files = {"adapter.safetensors": pack(tensors, metadata)}
    return Sample(name, layout, files, base, "adapter.safetensors", ("adapter.safetensors",))


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _flat_modules(
    prefix: str, algorithm: str, modules: Mapping[str, Any], alpha: float | None = 1.5, **more: Any
) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for path, slots in modules.items():
        tensors |= keyed(prefix, _flat(path), algorithm, {**slots, **more})
        if alpha is not None:
            tensors[f"{prefix}{_flat(path)}.alpha"] = np.float32(alpha)
    return tensors


def _peft_samples() -> list[Sample]:
    n = _Numbers(2)
    every = [p for p in SHAPES if p != "head"]
    ranked = {p: lora(n, SHAPES[p], 3 if p == "blk_0.fc_b" else 2) for p in every}
    head = {PREFIX + "head.weight": n(4, 12), PREFIX + "head.bias": n(4)}
    dora = {
        p: {**lora(n, SHAPES[p], 2), "magnitude": n.magnitude(SHAPES[p][0])} for p in LINEAR
    }  # fmt: skip
    pattern = {"rank_pattern": {r"^blk_0\.fc_b": 3}, "alpha_pattern": {"blk_1.fc_a": 7}}
    flags = {"use_effective_conv2d": True}
    conv = {"blk_0.conv_in": lokr(n, SHAPES["blk_0.conv_in"], "full")}
    return [
        _peft("peft-lora", "lora", ranked, head, lora_alpha=4, modules_to_save=["head"], **pattern),
        _peft("peft-rslora", "lora", {p: lora(n, SHAPES[p], 2) for p in LINEAR}, use_rslora=True,
              lora_alpha=3, target_modules=r".*fc_[ab]"),
        _peft("peft-dora", "lora", dora, use_dora=True, lora_alpha=2),
        _peft("peft-loha", "loha", {p: loha(n, SHAPES[p], 2) for p in LINEAR}, alpha=3),
        _peft("peft-loha-core", "loha",
              {"blk_0.conv_in": loha_core(n, SHAPES["blk_0.conv_in"], 2)}, alpha=3, **flags),
        _peft("peft-lokr", "lokr", conv | {p: lokr(n, SHAPES[p], "full") for p in LINEAR[:1]},
              alpha=5, r=8, decompose_factor=2),
        _peft("peft-hra", "hra", {p: {"u": n(SHAPES[p][1], 2)} for p in LINEAR}, apply_GS=False),
    ]  # fmt: skip


def _kohya_samples() -> list[Sample]:
    n, half = _Numbers(3), _Numbers(4, "float16")
    unet = "lora_unet_"
    plain = {p: lora(n, SHAPES[p], 2) for p in (*LINEAR, *CONV, "blk_0.c1d")}
    core = {"blk_0.conv_in": tucker(n, SHAPES["blk_0.conv_in"], 2)}
    sd = {
        f"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_{s}": lora(half, (320, 320), 1)
        for s in "qk"
    }
    encoder = {"text_model.encoder.layers.0.self_attn.q_proj": lora(half, (768, 768), 1)}
    meta = {
        "ss_network_dim": "2", "ss_network_alpha": "1.5", "ss_network_args": '{"conv_dim": "2"}',
        "ss_tag_frequency": "{}", "modelspec.title": "style",
    }  # fmt: skip
    bf16 = {k: bfloat16(v) if v.ndim else v for k, v in _flat_modules(unet, "lora", plain).items()}
    return [
        _single("kohya-lora", "kohya", _flat_modules(unet, "lora", plain), **meta),
        _single("kohya-bf16", "kohya", bf16, **meta),
        _single("kohya-core", "kohya", _flat_modules(unet, "lora", core, alpha=None)),
        _single("kohya-sd15", "kohya",
                _flat_modules(unet, "lora", sd, 0.5) | _flat_modules("lora_te_", "lora", encoder),
                base="sd15", **meta),
        _single("kohya-loha", "kohya",
                _flat_modules(unet, "loha", {p: loha(n, SHAPES[p], 2) for p in LINEAR})),
    ]  # fmt: skip


def _lycoris_samples() -> list[Sample]:
    n, prefix = _Numbers(5), "lycoris_"
    linear = {p: SHAPES[p] for p in LINEAR}
    conv = SHAPES["blk_0.conv_in"]
    dora = {p: {**lora(n, s, 2), "magnitude": n.magnitude(s[0], 1)} for p, s in linear.items()}
    dense = {p: {"diff": n(*s), "diff_b": n(s[0])} for p, s in linear.items()}
    lokrs = {
        LINEAR[0]: lokr(n, SHAPES[LINEAR[0]], "full"), LINEAR[1]: lokr(n, SHAPES[LINEAR[1]], "both"),
        LINEAR[2]: lokr(n, SHAPES[LINEAR[2]], "low"), "blk_0.conv_in": lokr(n, conv, "core"),
    }  # fmt: skip
    biased = {LINEAR[0]: {"diff_b": n(12)}}
    norm = {f"{prefix}norm.w_norm": n(8)}
    return [
        _single("lycoris-lora", "lycoris", _flat_modules(prefix, "lora", {
            p: lora(n, s, 2) for p, s in linear.items()})
            | _flat_modules(prefix, "full", biased, alpha=None)),
        _single("lycoris-dora", "lycoris", _flat_modules(prefix, "lora", dora)),
        _single("lycoris-loha", "lycoris", _flat_modules(prefix, "loha", {
            "blk_0.conv_in": loha_core(n, conv, 2)})),
        _single("lycoris-lokr", "lycoris", _flat_modules(prefix, "lokr", lokrs)),
        _single("lycoris-full", "lycoris", _flat_modules(prefix, "full", dense, alpha=None) | norm),
    ]  # fmt: skip


def _dotted_samples() -> list[Sample]:
    n = _Numbers(6)
    comfyui: dict[str, Any] = {}
    diffusers: dict[str, Any] = {}
    for path in LINEAR:
        comfyui |= keyed("diffusion_model.", path, "lora", lora(n, SHAPES[path], 2), "peft")
        comfyui[f"diffusion_model.{path}.alpha"] = np.float32(1.5)
        diffusers |= keyed("unet.", path, "lora", lora(n, SHAPES[path], 2), "peft")
    said = {"unet.r": 2, "unet.lora_alpha": 3, "unet.alpha_pattern": {"fc_b": 5}}
    return [
        _single("comfyui-lora", "comfyui", comfyui),
        _single("comfyui-lokr", "comfyui", keyed("diffusion_model.", LINEAR[0], "lokr",
                lokr(n, SHAPES[LINEAR[0]], "low"))),
        _single("diffusers-lora", "diffusers", diffusers,
                lora_adapter_metadata=json.dumps(said)),
        _single("diffusers-bare", "diffusers", diffusers),
    ]  # fmt: skip


@cache
def samples() -> tuple[Sample, ...]:
    """Every source of the corpus."""
    return (*_peft_samples(), *_kohya_samples(), *_lycoris_samples(), *_dotted_samples())


def sample(name: str) -> Sample:
    return next(s for s in samples() if s.name == name)
