"""An adapter's ΔW by plain numpy: the oracle for whatever a conversion accepts.

Reads files on its own terms and computes in float64 from the definitions in
``adaptsurgery_formats.state``'s docstring; shares no line with the package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from corpus import CONFIG, WEIGHTS, base_arrays, unpack

Array = np.ndarray[Any, Any]
Slots = dict[str, Array]
PREFIXES = (
    "base_model.model.", "lycoris_", "lora_unet_", "lora_te1_", "lora_te2_", "lora_te_",
    "diffusion_model.", "text_encoders.clip_l.transformer.",
    "unet.", "transformer.", "text_encoder.",
)  # fmt: skip
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_WHOLE = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}  # for alpha alone
# Endings of keys, longest first, and the slot each is.
_ENDINGS = {
    "lora_A.default.weight": "down", "lora_B.default.weight": "up",
    "lora_magnitude_vector.weight": "magnitude", "lora_magnitude_vector": "magnitude",
    "lora_embedding_A": "down", "lora_embedding_B": "up",
    "lora_A.weight": "down", "lora_B.weight": "up", "lora_B.bias": "up_bias",
    "lora.down.weight": "down", "lora.up.weight": "up",
    "lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid",
    "dora_scale": "magnitude", "alpha": "alpha", "hra_u": "u",
    **{s: s for s in ("diff", "diff_b", "w_norm", "b_norm")},
    **{f"{a}_{s}": f"{a}.{s}" for a in ("hada", "lokr")
       for s in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
}  # fmt: skip


def changes(
    path: Path,
    folded: bool = False,
    base: Mapping[str, Array] | None = None,
    finite: bool = True,
) -> dict[str, Array]:
    """What the adapter at a path adds, by flat module name: ΔW row by row, then the bias's change.

    ``folded`` works out DoRA and HRA on the base's weights (by module, the corpus's own if none are
    given); else magnitudes and rotations are entries of their own. Replaced parameters are under
    their own full key. AssertionError for a number that is not ``finite``, where that is asked.
    """
    weights_of = base_arrays() if base is None else base
    found: dict[str, Array] = {}
    for weights, config in _files(path):
        tensors, metadata = unpack(weights.read_bytes())
        groups, found_saved = _groups({k: numbers(t, k, finite) for k, t in tensors.items()})
        found |= found_saved
        for name, slots in groups.items():
            flat = _flat(name)
            scale = _scale(name, slots, config, metadata)
            parts = _parts(flat, slots, scale, config, folded, weights_of)
            found |= parts
    return found


def _files(path: Path) -> list[tuple[Path, dict[str, Any] | None]]:
    if path.is_file():
        return [(path, None)]
    configs = [path / CONFIG] if (path / CONFIG).exists() else sorted(path.glob(f"*/{CONFIG}"))
    return [(c.parent / WEIGHTS, json.loads(c.read_text("utf-8"))) for c in configs]


def numbers(tensor: Any, key: str, finite: bool = True) -> Array:
    """A tensor's numbers in float64; whole numbers are allowed in an alpha."""
    if tensor.dtype == "BF16":
        wide = np.frombuffer(tensor.data, "<u2").astype("<u4") << 16
        return _finite(wide.view("<f4").reshape(tensor.shape).astype("f8"), key, finite)
    known = _NUMPY | _WHOLE if key.endswith(".alpha") else _NUMPY
    assert tensor.dtype in known, f"`{key}` of {tensor.dtype} should have been refused"
    array = np.frombuffer(tensor.data, known[tensor.dtype])
    return _finite(array.reshape(tensor.shape).astype("f8"), key, finite)


def _finite(array: Array, key: str, wanted: bool) -> Array:
    assert not wanted or np.isfinite(array).all(), f"`{key}` is not finite, and yet accepted"
    return array


def _groups(tensors: Mapping[str, Array]) -> tuple[dict[str, Slots], dict[str, Array]]:
    groups: dict[str, Slots] = {}
    others: dict[str, Array] = {}
    for key, value in tensors.items():
        ending = next((e for e in _ENDINGS if key.endswith("." + e)), None)
        if ending is None:
            others[key] = value.reshape(-1, 1)
            continue
        slots = groups.setdefault(key[: -len(ending) - 1], {})
        assert _ENDINGS[ending] not in slots, f"two tensors for one slot: {key}"
        slots[_ENDINGS[ending]] = value
    return groups, others


def _bare(name: str) -> str:
    prefix = next((p for p in PREFIXES if name.startswith(p)), "")
    return name[len(prefix) :]


def _flat(name: str) -> str:
    return _bare(name).replace(".", "_")


# --- scale --------------------------------------------------------------------------------------


def _scale(
    name: str, slots: Slots, config: Mapping[str, Any] | None, metadata: Mapping[str, str]
) -> float:
    if config is not None:
        return _config_scale(_bare(name), config, "alpha_pattern")
    if "lokr.w1" in slots and "lokr.w2" in slots:
        return 1.0
    rank = _rank(slots)
    if "alpha" in slots and rank:
        alpha = float(slots["alpha"].reshape(()))
        return alpha / rank if alpha else 1.0
    component = next((p for p in ("unet", "transformer", "text_encoder") if name.startswith(p)), "")
    said = json.loads(metadata.get("lora_adapter_metadata", "{}")) if component else {}
    mine = {k.split(".", 1)[1]: v for k, v in said.items() if k.split(".", 1)[0] == component}
    if "lora_alpha" in mine and "down" in slots and rank:
        return _config_scale(
            _bare(name), {"r": rank, **mine, "rank_pattern": {}, "r_": 0}, "", rank
        )
    return 1.0


def _config_scale(
    name: str, config: Mapping[str, Any], patterns: str, rank: int | None = None
) -> float:
    """alpha/r, or alpha/√r with rslora; both by the first pattern that matches."""
    if config.get("peft_type", "").upper() == "HRA":
        return 1.0
    r = rank or _said(name, config, "rank_pattern", config.get("r", 8))
    plain = config.get("lora_alpha", config.get("alpha", 8))
    if config.get("peft_type", "").upper() in ("LOHA", "LOKR"):
        plain = config.get("alpha", 8)
    elif config.get("peft_type"):
        plain = config.get("lora_alpha", 8)
    alpha = _said(name, config, "alpha_pattern", plain)
    return float(alpha) / (float(r) ** 0.5 if config.get("use_rslora") else float(r))


def _said(name: str, config: Mapping[str, Any], field: str, default: Any) -> Any:
    for key, value in (config.get(field) or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _rank(slots: Slots) -> int:
    for slot in ("down", "hada.w1_b", "lokr.w2_b", "lokr.w1_b"):
        if slot in slots:
            return int(slots[slot].shape[0])
    return 0


# --- ΔW -----------------------------------------------------------------------------------------


def _parts(
    flat: str,
    slots: Slots,
    scale: float,
    config: Mapping[str, Any] | None,
    folded: bool,
    base: Mapping[str, Array],
) -> dict[str, Array]:
    parts: dict[str, Array] = {}
    total = sum(
        (1.0 if kind == "diff" else scale) * _DELTAS[kind](slots)
        for kind in _DELTAS
        if _has(slots, kind)
    )
    if "u" in slots:
        turned = _rotation(slots["u"], bool((config or {}).get("apply_GS")))
        weight = _base(base, flat, lambda w: w.shape[1] == len(turned))
        total = weight @ turned - weight if folded else turned
    if "magnitude" in slots and folded:
        total = _renormed(base, flat, total, slots["magnitude"], config is not None)
    elif "magnitude" in slots:
        parts[f"{flat}:magnitude"] = slots["magnitude"].reshape(-1, 1)
    bias = scale * slots["up_bias"] if "up_bias" in slots else slots.get("diff_b", np.zeros(0))
    if not np.any(bias):
        bias = np.zeros(0)  # a bias of zeros and none at all do the same
    parts[flat] = np.concatenate([np.ravel(total), bias]).reshape(-1, 1)
    for name in ("w_norm", "b_norm"):
        parts |= {f"{flat}:{name}": slots[name].reshape(-1, 1)} if name in slots else {}
    return parts


def _has(slots: Slots, kind: str) -> bool:
    return any(s == kind or s.startswith(kind + ".") for s in slots)


def _lora(t: Slots) -> Array:
    up, down = _matrix(t["up"]), t["down"]
    if "mid" not in t:
        return up @ _matrix(down)
    whole = np.einsum("op,pq...,qi->oi...", up, t["mid"], _matrix(down))
    return _matrix(whole)


def _loha(t: Slots) -> Array:
    return _half(t, "1") * _half(t, "2")


def _half(t: Slots, half: str) -> Array:
    a, b = t[f"hada.w{half}_a"], t[f"hada.w{half}_b"]
    if f"hada.t{half}" not in t:
        return a @ b
    return _matrix(np.einsum("po,pq...,qi->oi...", a, t[f"hada.t{half}"], b))


def _lokr(t: Slots) -> Array:
    w1 = t["lokr.w1"] if "lokr.w1" in t else t["lokr.w1_a"] @ t["lokr.w1_b"]
    if "lokr.w2" in t:
        w2 = t["lokr.w2"]
    elif "lokr.t2" in t:
        w2 = np.einsum("pb,pq...,qd->bd...", t["lokr.w2_a"], t["lokr.t2"], t["lokr.w2_b"])
    else:
        w2 = t["lokr.w2_a"] @ _matrix(t["lokr.w2_b"])
    whole = np.einsum("ac,bd...->abcd...", w1, w2)
    return whole.reshape(w1.shape[0] * w2.shape[0], -1)


_DELTAS = {
    "up": _lora,
    "hada.w1_a": _loha,
    "lokr": _lokr,
    "diff": lambda t: _matrix(t["diff"]),
}


def _matrix(a: Array) -> Array:
    return a.reshape(a.shape[0], -1)


def _base(base: Mapping[str, Array], flat: str, fits: Callable[[Array], bool]) -> Array:
    """The base's weight as a matrix; turned round where the adapter fits it only so."""
    weight = next(w for path, w in base.items() if path.replace(".", "_") == flat)
    return _matrix(weight) if fits(_matrix(weight)) else weight.T


def _rotation(u: Array, orthogonal: bool) -> Array:
    out = np.eye(u.shape[0])
    basis: list[Array] = []
    for column in u.T:
        v = column / np.linalg.norm(column)
        if orthogonal:
            for _ in range(2):
                v = v - sum(((q @ v) * q for q in basis), np.zeros_like(v))
            v = v / np.linalg.norm(v)
            basis.append(v)
        out = out @ (np.eye(len(v)) - 2 * np.outer(v, v))
    return out


def _renormed(
    base: Mapping[str, Array], flat: str, delta: Array, magnitude: Array, peft: bool
) -> Array:
    weight = _base(base, flat, lambda w: w.shape == delta.shape)
    changed = weight + delta
    if peft or magnitude.shape[0] == delta.shape[0] or magnitude.ndim == 1:
        norm = np.linalg.norm(changed, axis=1, keepdims=True)
        return changed * magnitude.reshape(-1, 1) / norm - weight
    per_input = changed.reshape(delta.shape[0], magnitude.size, -1)
    norm = np.sqrt((per_input**2).sum(axis=(0, 2), keepdims=True))
    return (per_input * magnitude.reshape(1, -1, 1) / norm).reshape(weight.shape) - weight


def apart(a: Array, b: Array) -> float:
    """‖a − b‖/‖a‖, safe from overflow and underflow; 0 where both are the same, NaN included."""
    if a.shape != b.shape:
        return float("inf")
    if np.array_equal(a, b, equal_nan=True):  # an HRA of a zero column is no rotation in any layout
        return 0.0
    largest = float(np.abs(a).max(initial=0.0))
    if largest == 0.0:
        return 0.0 if not np.any(b) else float("inf")
    return float(np.linalg.norm(a / largest - b / largest) / np.linalg.norm(a / largest))
