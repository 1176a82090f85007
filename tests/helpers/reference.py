"""The mathematics once more, in float64 and straight from the definitions: the tests' oracle.

Nothing here is fast, shared with the code under test, or clever: elements are written as the
papers write them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Slots = Mapping[str, Tensor]


def delta(algorithm: str, slots: Slots, shape: tuple[int, ...]) -> Tensor:
    """The unscaled Δ (o, i, *k)."""
    wide = {name: tensor.double() for name, tensor in slots.items()}
    return {"lora": lora, "loha": loha, "lokr": lokr, "full": full}[algorithm](wide, shape)


def lora(t: Slots, shape: tuple[int, ...]) -> Tensor:
    up = t["up"].reshape(shape[0], -1)
    if "mid" in t:
        down = t["down"].reshape(t["down"].shape[0], -1)
        out = torch.zeros(shape, dtype=torch.float64)
        for p in range(up.shape[1]):
            for q in range(down.shape[0]):
                out += outer(up[:, p], down[q], t["mid"][p, q])
        return out
    out = torch.zeros(shape, dtype=torch.float64)
    for r in range(up.shape[1]):
        out += up[:, r].reshape(-1, *(1,) * (len(shape) - 1)) * t["down"][r].reshape(shape[1:])
    return out


def loha(t: Slots, shape: tuple[int, ...]) -> Tensor:
    return loha_half(t, "1", shape) * loha_half(t, "2", shape)


def loha_half(t: Slots, half: str, shape: tuple[int, ...]) -> Tensor:
    a, b = t[f"w{half}_a"], t[f"w{half}_b"]
    if "t1" not in t:
        return (a @ b).reshape(shape)
    core = t[f"t{half}"]
    out = torch.zeros(shape, dtype=torch.float64)
    for p in range(core.shape[0]):
        for q in range(core.shape[1]):
            out += outer(a[p], b[q], core[p, q])
    return out


def lokr(t: Slots, shape: tuple[int, ...]) -> Tensor:
    """Element by element: Δ[a·B + b, c·D + d, k] = w1[a, c]·w2[b, d, k]."""
    w1 = t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]
    w2 = lokr_w2(t, (shape[0] // w1.shape[0], shape[1] // w1.shape[1], *shape[2:]))
    out = torch.zeros(shape, dtype=torch.float64)
    for o in range(shape[0]):
        for i in range(shape[1]):
            a, b = divmod(o, w2.shape[0])
            c, d = divmod(i, w2.shape[1])
            out[o, i] = w1[a, c] * w2[b, d]
    return out


def lokr_w2(t: Slots, shape: tuple[int, ...]) -> Tensor:
    if "w2" in t:
        return t["w2"].reshape(shape)
    if "t2" not in t:
        return (t["w2_a"] @ t["w2_b"].reshape(t["w2_b"].shape[0], -1)).reshape(shape)
    out = torch.zeros(shape, dtype=torch.float64)
    for p in range(t["t2"].shape[0]):
        for q in range(t["t2"].shape[1]):
            out += outer(t["w2_a"][p], t["w2_b"][q], t["t2"][p, q])
    return out


def full(t: Slots, shape: tuple[int, ...]) -> Tensor:
    return t["diff"] if "diff" in t else torch.zeros(shape, dtype=torch.float64)


def outer(left: Tensor, middle: Tensor, kernel: Tensor) -> Tensor:
    """left[o]·middle[i]·kernel[*k]."""
    return torch.tensordot(torch.outer(left, middle), kernel, dims=0)


def rotation(u: Tensor, apply_gs: bool = False) -> Tensor:
    """R = H0·H1···, or I − 2QQᵀ with Q by Gram–Schmidt, one column after the other."""
    columns = [c / c.norm() for c in u.double().t()]
    one = torch.eye(u.shape[0], dtype=torch.float64)
    if apply_gs:
        kept: list[Tensor] = []
        for c in columns:
            for _ in range(2):  # twice is enough
                for q in kept:
                    c = c - (q @ c) * q
            kept.append(c / c.norm())
        return one - 2 * sum(torch.outer(q, q) for q in kept)
    out = one
    for c in columns:
        out = out @ (one - 2 * torch.outer(c, c))
    return out


def rotated(weight: Tensor, r: Tensor) -> Tensor:
    return (weight.double().flatten(1) @ r).reshape(weight.shape)


def renormed(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Each row (magnitude (o, 1, …)) or input (magnitude (1, i, 1, …)) at its new norm."""
    out = weight.double().clone()
    m = magnitude.double().flatten()
    by_row = magnitude.shape[0] == weight.shape[0] and magnitude.numel() == weight.shape[0]
    for line in range(len(m)):
        part = out[line] if by_row else out[:, line]
        part *= m[line] / part.pow(2).sum().sqrt()
    return out


def bias_delta(algorithm: str, slots: Slots) -> Tensor | None:
    name = {"lora": "up_bias", "full": "diff_b"}.get(algorithm)
    return slots[name].double() if name in slots else None
