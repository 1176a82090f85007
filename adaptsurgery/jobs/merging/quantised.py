"""Quantised weights of a base, and the scales beside them, from headers alone.

    W = q · scale        q in float8 or int8

    fc.weight_scale        one number, or one an output          compressed-tensors, FBGEMM, TorchAO's exports
    fc.weight_scale_inv    one a block of 128 × 128              DeepSeek (block size in the config)
    fc.scale_weight        one number                            ComfyUI's scaled fp8
    fc.SCB                 one an output, W = q · SCB / 127      bitsandbytes' int8
    none                   float8 as it is                       a plain cast

What packs several numbers in one (GPTQ, AWQ, 4 bit) is not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from adaptsurgery.checkpoint.base import Base, Located
from adaptsurgery_formats.errors import ShapeError, ValueRefused
from adaptsurgery_formats.reading import typed
from adaptsurgery_formats.tensors import FLOAT_DTYPES, is_packed

READABLE = ("F8_E4M3", "F8_E5M2", "I8")
_PACKED = (".qweight", ".weight_packed", ".weight.absmax", ".weight.quant_map")
# What lies beside a scaled weight and says nothing about its numbers.
_IDLE = ("input_scale", "scale_input", "weight_format", "input_scale_ub")
_MARKER = "scaled_fp8"
_SCALES = (*FLOAT_DTYPES, "F8_E8M0")
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Scale:
    """What the numbers of a weight are multiplied by: a tensor of the base seen as ``grid`` (p, q),
    each number for a block of ``block`` rows and columns (0: as many as there are), × ``factor``.

    ``file`` is -1 where there is none.
    """

    file: int = -1
    key: str = ""
    grid: tuple[int, int] = (1, 1)
    block: tuple[int, int] = (0, 0)
    factor: float = 1.0


@dataclass
class Quantised:
    """By file and key: the scale of each quantised weight; the tensors that go with these; and what
    the weights become."""

    scales: dict[tuple[int, str], Scale] = field(default_factory=dict)
    dtypes: dict[tuple[int, str], str] = field(default_factory=dict)
    gone: set[tuple[int, str]] = field(default_factory=set)


def quantised_of(base: Base) -> Quantised:
    """The quantised weights of a base. Raises ValueRefused "packed-weight" for packed numbers,
    "no-scale" where int8 has no scale or something unknown looks like one, "nothing-quantised"."""
    out = Quantised()
    for component, parameters in base.parameters.items():
        config = base.configs.get(component, {})
        packed = next((n for n, at in parameters.items() if _is_packed(n, at)), "")
        if packed:
            raise _packed_error(packed, parameters[packed], base.where)
        for name, at in parameters.items():
            if _is_quantised(name, at, parameters):
                spot = (at.file, at.key)
                out.scales[spot] = _scale(name, at, parameters, config, base.where)
                out.dtypes[spot] = plain_dtype(config)
                out.gone |= {(p.file, p.key) for p in _beside(name, parameters)}
        if any((at.file, at.key) in out.scales for at in parameters.values()):
            out.gone |= {(a.file, a.key) for n, a in parameters.items() if _is_marker(n)}
    out.gone -= out.scales.keys()
    if not out.scales:
        raise ValueRefused(
            "nothing here is quantised in fp8 or int8",
            where=base.where,
            next="leave --dequantize out",
            code="nothing-quantised",
        )
    return out


def _is_quantised(name: str, at: Located, parameters: Mapping[str, Located]) -> bool:
    """Whether numbers stand for others; small integers that are no weight may be what they are."""
    if at.dtype == "I8":
        return name.endswith("weight") or any(n in parameters for n, _ in _names(name))
    return at.dtype in READABLE and not _is_marker(name)


def _is_packed(name: str, at: Located) -> bool:
    return name.endswith(_PACKED) or is_packed(at.dtype)


def _is_marker(name: str) -> bool:
    return name.rpartition(".")[2] == _MARKER


def plain_dtype(config: Mapping[str, Any]) -> str:
    """What a config says that the model computes in; bfloat16 where it says nothing."""
    named = typed(config, "dtype", str) or typed(config, "torch_dtype", str) or ""
    return _STORED.get(named, "BF16")


def quantised_error(name: str, at: Located, where: str) -> ValueRefused:
    """The refusal of a change of a quantised weight."""
    way = "dequantise it first: merge into the base in bf16 or fp16 and quantise the result again"
    return ValueRefused(
        f"`{name}` is {'packed' if is_packed(at.dtype) else 'quantised'} ({at.dtype})",
        where=where,
        seen=f"{at.dtype} {list(at.shape)}",
        next=f"--dequantize writes OUT in plain numbers; or {way}" if at.dtype in READABLE else way,
        code="quantised-weight",
    )


def _packed_error(name: str, at: Located, where: str) -> ValueRefused:
    return ValueRefused(
        f"`{name}` holds packed numbers (GPTQ, AWQ or 4 bit), which are not read",
        where=where,
        seen=f"{at.dtype} {list(at.shape)}",
        next="merge into the base in bf16 or fp16 and quantise the result again",
        code="packed-weight",
    )


def _names(name: str) -> Iterator[tuple[str, float]]:
    """The names that a weight's scale may have, and what goes with each."""
    stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
    yield from ((f"{name}_scale_inv", 1.0), (f"{name}_scale", 1.0))
    yield from ((f"{stem}scale_weight", 1.0), (f"{stem}SCB", 1 / 127))


def _beside(name: str, parameters: Mapping[str, Located]) -> list[Located]:
    stem = name.removesuffix("weight")
    names = [n for n, _ in _names(name)] + [f"{stem}{idle}" for idle in _IDLE]
    return [parameters[n] for n in names if n in parameters]


def _scale(
    name: str,
    at: Located,
    parameters: Mapping[str, Located],
    config: Mapping[str, Any],
    where: str,
) -> Scale:
    scales = [(n, factor) for n, factor in _names(name) if n in parameters]
    if len(scales) > 1 or (not scales and (at.dtype == "I8" or _unknown(name, parameters))):
        near = [n for n, _ in scales] or _unknown(name, parameters)
        raise ValueRefused(
            f"`{name}` is {at.dtype}, and nothing says by which scale",
            where=where,
            seen=", ".join(near) or "no scale beside it",
            next="weight_scale, weight_scale_inv, scale_weight and SCB are known",
            code="no-scale",
        )
    if not scales:
        return Scale()
    (key, factor), scale = scales[0], parameters[scales[0][0]]
    grid, block = _grid(name, at.shape, scale, config, where)
    if scale.dtype not in _SCALES:
        raise ValueRefused(f"`{key}` is {scale.dtype}, no scale", where=where, code="no-scale")
    return Scale(scale.file, scale.key, grid, block, factor)


def _unknown(name: str, parameters: Mapping[str, Located]) -> list[str]:
    """Tensors beside a weight that look like something it is to be read with."""
    stem = name.removesuffix("weight")
    known = {f"{stem}{idle}" for idle in _IDLE}
    marks = ("scale", "zero_point", "scb")
    return [
        n
        for n in parameters
        if n.startswith(stem)
        and n not in known
        and "." not in n[len(stem) :]
        and any(mark in n[len(stem) :].lower() for mark in marks)
    ]


def _grid(
    name: str, shape: tuple[int, ...], scale: Located, config: Mapping[str, Any], where: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The scale as (p, q), and how many rows and columns each of its numbers is for."""
    count, grid = math.prod(scale.shape), scale.shape
    if count == 1:
        return (1, 1), (0, 0)
    if count == shape[0] and grid[0] == shape[0]:
        return (count, 1), (0, 0)
    if len(grid) == len(shape) == 2:
        block = _block(shape, grid, config)
        if block and grid == tuple(-(-n // b) for n, b in zip(shape, block)):
            return (grid[0], grid[1]), block
    raise ShapeError(
        f"`{name}` has a scale that fits neither its outputs nor its blocks",
        where=where,
        seen=f"{list(shape)} and {list(grid)}",
        next="config.json's quantization_config.weight_block_size tells the size of blocks",
    )


def _block(
    shape: tuple[int, ...], grid: tuple[int, ...], config: Mapping[str, Any]
) -> tuple[int, int] | None:
    """The size of blocks: as the config says, else 128 where that fits, else what divides evenly."""
    block = typed(typed(config, "quantization_config", dict) or {}, "weight_block_size", list) or []
    if len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block):
        return block[0], block[1]
    if grid == tuple(-(-n // 128) for n in shape):
        return 128, 128
    if all(p and n % p == 0 for n, p in zip(shape, grid)):
        return shape[0] // grid[0], shape[1] // grid[1]
    return None
