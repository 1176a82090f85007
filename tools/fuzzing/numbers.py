"""Adapters that are right, of every algorithm, layer kind, dtype and layout: the numbers must be, too.

Shapes, ranks, alphas, scale rules and weights are drawn; the answer is the oracle's.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
from corpus import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Raw,
    bfloat16,
    loha,
    loha_core,
    lokr,
    lora,
    spelled,
    tucker,
)  # fmt: skip

from fuzzing.inputs import Content, Input
from fuzzing.oracle import Array, array, pack, unpack

_DTYPES = ("float32", "float32", "float32", "float16", "bfloat16", "float64")
_KINDS = ("lora", "lora", "tucker", "loha", "loha-core", "lokr-full", "lokr-low", "lokr-both", "lokr-core",
          "full", "hra", "dora", "norm")  # fmt: skip
_LAYOUTS = ("peft", "kohya", "lycoris", "comfyui")
_NAMES = ("enc.fc", "enc.proj", "dec.0.q", "dec.0.k", "dec.1.q", "mid.conv", "out")
_FLAT = {"kohya": "lora_unet_", "lycoris": "lycoris_"}
# What a layout does not hold, by README's table; the tool refuses these, and the fuzzer wastes no time.
_WITHOUT = {
    "peft": {"tucker", "lokr-core", "full", "norm"}, "kohya": {"hra"}, "lycoris": {"hra"},
    "comfyui": {"hra", "norm", "full"},
}  # fmt: skip


class _Draw:
    """Numbers of one seed, at one size, in one dtype."""

    def __init__(self, r: random.Random) -> None:
        self.random = np.random.default_rng(r.getrandbits(32))
        self.size = r.choice((0.5, 0.5, 1e-3, 30.0))
        self.dtype = r.choice(_DTYPES)

    def __call__(self, *shape: int) -> Array:
        return (self.random.standard_normal(shape) * self.size).astype("f4")

    def stored(self, values: Any) -> Raw | Array:
        if self.dtype == "bfloat16":
            return bfloat16(np.asarray(values))
        return np.asarray(values).astype(self.dtype)


def make(r: random.Random, seed: int) -> Input:
    """A base, an adapter for some of its modules, and a job whose result is known."""
    shapes = _shapes(r)
    base = _base(r, shapes)
    layout = r.choice(_LAYOUTS)
    kind = r.choice([k for k in _KINDS if k not in _WITHOUT[layout]])
    files: dict[str, Content] = {"base.safetensors": pack(base)}
    files |= _adapter(r, shapes, kind, layout, "a")
    source = "in/a" if layout == "peft" else "in/a/a.safetensors"
    job = r.choice(
        (
            "convert",
            "merge",
            "merge",
            "unmerge",
            "combine",
            "resize",
            "fold",
            "extract",
            "attach",
            "verify",
        )
    )
    options = _OPTIONS[job](r, source)
    if job == "combine" and r.random() < 0.6 and kind not in ("hra", "dora", "norm"):
        other = r.choice([k for k in ("lora", "loha", "lokr-low") if k not in _WITHOUT[layout]])
        files |= _adapter(r, shapes, other, layout, "b")
        options["sources"].append([source.replace("/a", "/b"), r.choice((1.0, -0.5, 3.0))])
    if job == "extract":
        files["tuned.safetensors"] = _tuned(r, base, shapes)
    return Input("numbers", seed, files, job, options, story=f"{kind} {layout} {job}")


def _shapes(r: random.Random) -> dict[str, tuple[int, ...]]:
    """Modules by name; a kernel behind some of them. Even sizes, so that a LoKr of 2 divides them."""
    shapes = {}
    for name in r.sample(_NAMES, r.choice((1, 2, 3, 4))):
        o, i = (2 * r.choice((1, 2, 3, 4, 8, 13)) for _ in "oi")
        kernel = r.choice(((), (), (), (1, 1), (3, 3), (3,), (2, 3), (1,), (2, 2, 2)))
        shapes[name] = (o, i, *kernel)
    return shapes


def _base(r: random.Random, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Raw | Array]:
    draw = _Draw(r)
    tensors: dict[str, Raw | Array] = {}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = draw.stored(draw(*shape))
        if r.random() < 0.5:
            tensors[f"{name}.bias"] = draw.stored(draw(shape[0]))
    tensors["norm.weight"], tensors["norm.bias"] = draw.stored(draw(8)), draw.stored(draw(8))
    return tensors


def _slots(
    r: random.Random, draw: _Draw, shape: tuple[int, ...], kind: str, rank: int
) -> dict[str, Any]:
    n: Any = draw
    kernel = len(shape) > 2
    if kind == "tucker" and kernel:
        return tucker(n, shape, rank)
    if kind == "loha-core" and kernel:
        return loha_core(n, shape, rank)
    if kind.startswith("loha"):
        return loha(n, shape, rank)
    if kind.startswith("lokr"):
        return lokr(n, shape, kind.partition("-")[2] if kernel or kind != "lokr-core" else "low")
    if kind == "full":
        return {"diff": n(*shape), **({"diff_b": n(shape[0])} if r.random() < 0.3 else {})}
    if kind == "hra":
        return {"u": n(int(np.prod(shape[1:])), 2 * rank)}
    slots = lora(n, shape, rank)
    if kind == "dora":
        size = np.abs(draw(shape[0])) + draw.size
        slots["magnitude"] = size
    return slots


def _algorithm(kind: str) -> str:
    return {"tucker": "lora", "dora": "lora", "norm": "lora"}.get(kind, kind.split("-")[0])


def _adapter(
    r: random.Random, shapes: Mapping[str, tuple[int, ...]], kind: str, layout: str, folder: str
) -> dict[str, Content]:
    draw, rank = _Draw(r), r.choice((1, 2, 3, 4))
    alpha = r.choice((1.0, 0.5, 8.0, 3.0, float(rank), 1e-2))
    algorithm, family = _algorithm(kind), "peft" if layout in ("peft", "comfyui") else "kohya"
    tensors: dict[str, Any] = {}
    paths = [p for p in shapes if r.random() < 0.8] or list(shapes)
    for path in paths:
        name = _key(path, layout)
        for slot, value in _slots(r, draw, shapes[path], kind, rank).items():
            if slot == "magnitude" and family == "kohya":
                value = value.reshape(-1, *(1,) * (len(shapes[path]) - 1))
            spelling = spelled(slot, algorithm, family)
            if layout == "comfyui" and slot == "magnitude":
                spelling = "dora_scale"
            tensors[f"{name}.{spelling}"] = draw.stored(value)
        if layout != "peft" and algorithm != "full" and r.random() < 0.8:
            tensors[f"{name}.alpha"] = draw.stored(np.float32(alpha))
    if kind == "norm":
        tensors[f"{_key('norm', layout)}.w_norm"] = draw.stored(draw(8))
    if layout != "peft":
        return {f"{folder}/{folder}.safetensors": pack(tensors)}
    config = _config(r, algorithm, kind, rank, alpha, paths)
    return {f"{folder}/{WEIGHTS}": pack(tensors), f"{folder}/{CONFIG}": json.dumps(config).encode()}


def _key(path: str, layout: str) -> str:
    prefix = {"peft": PREFIX, "comfyui": "diffusion_model."}.get(layout)
    return prefix + path if prefix else _FLAT[layout] + path.replace(".", "_")


def _config(
    r: random.Random, algorithm: str, kind: str, rank: int, alpha: float, paths: list[str]
) -> dict[str, Any]:
    """What PEFT would have written: its scale rule, and the flags that its shapes follow from."""
    config = {
        "peft_type": algorithm.upper(),
        "task_type": None,
        "r": rank,
        "target_modules": sorted(paths),
    }
    config["lora_alpha" if algorithm == "lora" else "alpha"] = alpha
    if algorithm == "lora":
        config |= {"use_dora": kind == "dora", "use_rslora": r.random() < 0.3}
    elif algorithm == "hra":
        config |= {"r": 2 * rank, "apply_GS": r.random() < 0.3}
        del config["alpha"]
    elif algorithm == "lokr":
        low = kind != "lokr-full"
        config |= {
            "decompose_factor": 2,
            "r": 1 if low else 64,
            "decompose_both": kind == "lokr-both",
        }
    elif kind == "loha-core":
        config["use_effective_conv2d"] = True
    if r.random() < 0.3 and algorithm != "hra":
        config["alpha_pattern"] = {r.choice(paths): r.choice((1, 2.5, 7))}
    return config


def _tuned(
    r: random.Random, base: Mapping[str, Raw | Array], shapes: Mapping[str, tuple[int, ...]]
) -> bytes:
    """The base with a change of low rank, and a little noise, in each of its weights."""
    n = np.random.default_rng(r.getrandbits(32))
    tensors, metadata = unpack(pack(base))
    out: dict[str, Any] = dict(tensors)
    for name, shape in shapes.items():
        weight = array(tensors[f"{name}.weight"])
        columns = weight.reshape(shape[0], -1).shape[1]
        change = n.standard_normal((shape[0], 2)) @ n.standard_normal((2, columns)) * 0.1
        change += n.standard_normal(change.shape) * r.choice((0.0, 0.02))
        out[f"{name}.weight"] = (weight + change.reshape(shape)).astype("f4")
    return pack(out, metadata)


# -- Jobs

_BASE = "in/base.safetensors"


def _to(r: random.Random) -> dict[str, Any]:
    to = r.choice(("peft", "kohya", "lycoris"))
    return {"to": to, "out": "out/result" + ("" if to == "peft" else ".safetensors")}


def _convert(r: random.Random, source: str) -> dict[str, Any]:
    options: dict[str, Any] = {"source": source, "base": _BASE, **_to(r), "check": True}
    if r.random() < 0.3:
        options["algorithm"] = "lora"
        if r.random() < 0.5:
            options |= {"rank": r.choice((1, 2, 64)), "allow_lossy": True}
    return options


def _merge(r: random.Random, source: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "base": _BASE,
        "adapters": [[source, r.choice((1.0, 1.0, 0.7, -2.0))]],
    }
    options |= {
        "dtype": r.choice(("auto", "auto", "fp32", "fp16", "bf16")),
        "compute": r.choice(("fp32", "fp32", "fp64")),
    }
    return {**options, "out": "out/merged.safetensors", "check": True}


def _combine(r: random.Random, source: str) -> dict[str, Any]:
    return {
        "sources": [[source, r.choice((1.0, 0.3, -1.0))]],
        "base": _BASE,
        **_to(r),
        "check": True,
    }


def _resize(r: random.Random, source: str) -> dict[str, Any]:
    goal = r.choice(({"rank": 1}, {"rank": 2}, {"rank": 64}, {"energy": 0.9}, {"energy": 1.0}))
    return {"source": source, "base": _BASE, **_to(r), **goal, "check": True}


def _fold(r: random.Random, source: str) -> dict[str, Any]:
    return {"base": _BASE, "adapter": source, "weight": r.choice((1.0, 1.0, 0.7, -2.0))}


def _extract(r: random.Random, source: str) -> dict[str, Any]:
    goal = r.choice(({"rank": 2}, {"rank": 1}, {"energy": 0.9}, {"max_error": 0.5}))
    algorithm = r.choice(("lora", "lora", "loha", "lokr", "hra", "auto"))
    to = {"to": "peft", "out": "out/x"} if algorithm == "hra" else _to(r)
    return {
        "base": _BASE,
        "tuned": "in/tuned.safetensors",
        "algorithm": algorithm,
        **goal,
        **to,
        "check": True,
    }


def _attach(r: random.Random, source: str) -> dict[str, Any]:
    save = {"save": True, "out": "out/saved"} if r.random() < 0.3 else {}
    return {"base": _BASE, "source": source, "name": "default", **save, "check": True}


def _verify(r: random.Random, source: str) -> dict[str, Any]:
    return {"source": source, "other": source, "base": _BASE, "check": True}


_OPTIONS = {
    "convert": _convert, "merge": _merge, "unmerge": _merge, "combine": _combine, "resize": _resize,
    "fold": _fold, "extract": _extract, "attach": _attach, "verify": _verify,
}  # fmt: skip
