"""Adapter files of every layout and algorithm, damaged, through every command that reads one."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from corpus import Raw, Sample, base_file, samples
from mutations import mutant

from fuzzing.damage import NAMES
from fuzzing.inputs import Files, Input
from fuzzing.oracle import pack, unpack

BASE = "in/base.safetensors"
# Whole sources beside a damaged one, by the layout they are in.
JOBS = (
    "inspect", "convert", "convert", "verify", "merge", "merge", "unmerge", "combine", "resize", "attach",
)  # fmt: skip


def make(r: random.Random, seed: int) -> Input:
    """One of the tests' own mutants, or another damage, and a command."""
    if r.random() < 0.6:
        m = mutant(r.getrandbits(48))
        sample, files, story = m.sample, m.files, m.story.partition(": ")[2]
        more = {k: v for k, v in m.options.items() if k not in ("to", "base", "hashes")}
    else:
        sample = r.choice(samples())
        damage = r.choice(_DAMAGES)
        files, story, more = damage(r, sample), f"{sample.name} {damage.__name__.strip('_')}", {}
    base = sample.base if r.random() < 0.9 else r.choice(("", "sd15", "base"))
    job = r.choice(JOBS)
    laid: dict[str, Any] = {
        "base.safetensors": base_file(),
        **{f"a/{k}": v for k, v in files.items()},
    }
    surroundings = {"fsize": r.choice((0, 1, 500, 3000))} if r.random() < 0.02 else {}
    source = f"in/a/{sample.path}".rstrip("/")
    options = _OPTIONS[job](r, source, BASE if base == "base" else base, more)
    if job == "convert" and "layout" in more:
        options["layout"] = more["layout"]
    return Input("adapters", seed, laid, job, options, surroundings, story)


# -- What is done


def _to(r: random.Random) -> dict[str, str]:
    to = r.choice(("peft", "lycoris", "kohya"))
    return {"to": to, "out": "out/result" + ("" if to == "peft" else ".safetensors")}


def _based(base: str) -> dict[str, str]:
    return {"base": base} if base else {}


def _inspect(r: random.Random, source: str, base: str, more: Any) -> dict[str, Any]:
    return {"source": source, **_based(base)}


def _convert(r: random.Random, source: str, base: str, more: Any) -> dict[str, Any]:
    return {
        "source": source,
        **_to(r),
        **_based(base),
        **more,
        "hashes": r.random() < 0.5,
        "check": True,
    }


def _verify(r: random.Random, source: str, base: str, more: Any) -> dict[str, Any]:
    return {"source": source, "other": source, **_based(base), "check": True}


def _merge(r: random.Random, source: str, base: str, more: Any) -> dict[str, Any]:
    options = {
        "base": BASE,
        "adapters": [[source, r.choice((1.0, 1.0, 0.5, -2.0, 1e-3))]],
        "check": True,
    }
    if r.random() < 0.2:
        options["dtype"] = r.choice(("fp16", "bf16", "fp32"))
    if r.random() < 0.2:
        options["compute"] = "fp64"
    return {**options, "out": "out/merged.safetensors"}


def _combine(r: random.Random, source: str, base: str, more: Any) -> dict[str, Any]:
    weights = [r.choice((1.0, 0.5, -1.0, 0.0, 3)) for _ in range(2)]
    sources = [[source, w] for w in weights[: r.choice((1, 2))]]
    return {"sources": sources, **_to(r), **_based(base), "check": True}


def _resize(r: random.Random, source: str, base: str, more: Any) -> dict[str, Any]:
    goal = (
        {"rank": r.choice((1, 2, 4, 64))}
        if r.random() < 0.7
        else {"energy": r.choice((0.5, 1.0, 1e-9))}
    )
    return {"source": source, **_to(r), **_based(base), **goal, "check": True}


def _attach(r: random.Random, source: str, base: str, more: Any) -> dict[str, Any]:
    name = r.choice(NAME) if r.random() < 0.3 else "default"
    save = {"save": True, "out": "out/saved"} if r.random() < 0.4 else {}
    return {"base": BASE, "source": source, "name": name, **save, "check": True}


# Names of an adapter in a live model, and of kinds that are none.
NAME: tuple[Any, ...] = (
    "{room}/escaped", "/", "//x", "../x", "..", ".", "a.b", "a/b", "", " ", "x" * 300, "\x1b[31m", "é",
    "a\nb", "base_layer", "default", 5, None, ["x"], {"x": 1}, True, "weight", "0",
)  # fmt: skip
_OPTIONS = {
    "inspect": _inspect, "convert": _convert, "verify": _verify, "merge": _merge, "unmerge": _merge,
    "combine": _combine, "resize": _resize, "attach": _attach,
}  # fmt: skip

# -- Damage beside the tests' own


def _edited(sample: Sample, tensors: Any, metadata: Any) -> Files:
    return {**sample.files, sample.weights[0]: pack(tensors, metadata)}


def _alpha(r: random.Random, sample: Sample) -> Files:
    """Alphas of every dtype and size."""
    tensors, metadata = unpack(sample.files[sample.weights[0]])
    kinds = ("<f8", "<f4", "<f2", "<i8", "<i4", "u1", "i1", "?")
    value = r.choice(
        (
            0,
            -0.0,
            -3,
            1e-45,
            1e-30,
            1e30,
            3e38,
            1e39,
            1e308,
            4,
            2**62,
            65504,
            float("nan"),
            float("inf"),
        )
    )
    with np.errstate(all="ignore"):
        number = np.array(value).astype(r.choice(kinds))
    number = number.reshape(r.choice(((), (1,), (1, 1))))
    names = {
        "<f8": "F64",
        "<f4": "F32",
        "<f2": "F16",
        "<i8": "I64",
        "<i4": "I32",
        "|u1": "U8",
        "|i1": "I8",
        "|b1": "BOOL",
    }
    raw = Raw(names[number.dtype.str], number.shape, number.tobytes())
    alphas = [k for k in tensors if k.endswith(".alpha")]
    modules = sorted({k.rpartition(".lora_")[0] for k in tensors if ".lora_" in k})
    for key in alphas or [f"{m}.alpha" for m in modules]:
        tensors[key] = raw
    return _edited(sample, tensors, metadata)


def _scaled(r: random.Random, sample: Sample) -> Files:
    """Numbers near the ends of their dtype, in one tensor or in all of a kind."""
    tensors, metadata = unpack(sample.files[sample.weights[0]])
    factor = r.choice((1e-40, 1e-30, 1e-20, 1e15, 1e20, 1e30, 3e38, 0.0))
    ending = r.choice(sorted({k.rpartition(".")[2] for k in tensors}))
    for key, t in tensors.items():
        if key.endswith(ending) and t.dtype in ("F32", "F16"):
            kind = "<f4" if t.dtype == "F32" else "<f2"
            with np.errstate(all="ignore"):
                data = (np.frombuffer(t.data, kind).astype("f8") * factor).astype(kind).tobytes()
            tensors[key] = Raw(t.dtype, t.shape, data)
    return _edited(sample, tensors, metadata)


def _renamed(r: random.Random, sample: Sample) -> Files:
    """Twins by letter case or by Unicode's forms, long names, control characters."""
    tensors, metadata = unpack(sample.files[sample.weights[0]])
    key = r.choice(list(tensors))
    others = (key.upper(), key.replace("lora", "Lora"), f"é.{key}", f"e\u0301.{key}", r.choice(NAMES) + key,
              key + r.choice(NAMES), key.replace("_", "."), key.replace(".", "_"), f"x{'.x' * 2000}.{key}")  # fmt: skip
    names = r.sample(others, r.choice((1, 2)))
    for name in names:
        tensors[name] = tensors[key]
    if r.random() < 0.5:
        del tensors[key]
    return _edited(sample, tensors, metadata)


def _widened(r: random.Random, sample: Sample) -> Files:
    """All float tensors in another dtype, the numbers as they were: nothing is damaged."""
    from corpus import bfloat16

    from fuzzing.oracle import array

    tensors, metadata = unpack(sample.files[sample.weights[0]])
    dtype = r.choice(("<f8", "<f4", "<f2", "bf16"))
    for key, t in tensors.items():
        wide = array(t)
        tensors[key] = bfloat16(wide) if dtype == "bf16" else wide.astype(dtype)  # type: ignore[assignment]
    return _edited(sample, tensors, metadata)


def _whole(r: random.Random, sample: Sample) -> Files:
    return dict(sample.files)


def _odd_file(r: random.Random, sample: Sample) -> Files:
    from fuzzing.damage import special

    return {**sample.files, r.choice(sorted(sample.files)): special(r)}


_DAMAGES = (_alpha, _alpha, _scaled, _renamed, _widened, _whole, _odd_file)
