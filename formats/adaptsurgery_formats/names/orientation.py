"""Which way round a stored weight lies: (o, i), or (i, o) as transformers' Conv1D and embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptsurgery_formats.names.families import family
from adaptsurgery_formats.names.rows import Parameters
from adaptsurgery_formats.state import ModuleState, delta_shape
from adaptsurgery_formats.traits import traits_of

# transformers' Conv1D layers (GPT-2 and its kin) go by these names; their weight is stored (i, o).
CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
_WIDENING = ("c_attn", "c_fc")  # those whose outputs are more than their inputs


def may_be_transposed(module: ModuleState) -> bool:
    """Whether there is a sign that the module's weight is stored (i, o), other than its shape."""
    if module.kind == "embedding" or module.options.get("fan_in_fan_out"):
        return True
    return module.path.rpartition(".")[2] in CONV1D_NAMES


def is_transposed(module: ModuleState, shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape is stored (i, o): an embedding's, or one that fits only so."""
    row = traits_of(module.algorithm)
    if len(shape) != 2 or row.vector or not may_be_transposed(module):
        return False
    outputs, columns = delta_shape(module)
    if not columns:  # of a bias alone, or of one side's factors
        return not row.dense and outputs not in (0, shape[0])
    if not outputs:
        return columns != shape[1]
    return module.kind == "embedding" or (outputs, columns) != shape


def turned_by(
    module: ModuleState,
    shape: tuple[int, ...],
    name: str,
    parameters: Parameters,
    config: Mapping[str, Any],
) -> bool:
    """Whether a weight of this stored shape is (i, o): by the shapes, and where it is square by
    the layers beside it, the model's class, or what the adapter says."""
    row = traits_of(module.algorithm)
    if len(shape) != 2 or row.vector or not may_be_transposed(module):
        return False
    if row.dense:
        outputs, columns = delta_shape(module)
        if not columns:  # of a bias alone
            return conv1d_turned(name, shape, parameters, config)
        return (outputs, columns) != shape
    if module.kind == "embedding" or shape[0] != shape[1]:
        return is_transposed(module, shape)
    is_conv1d = _square_conv1d(name, parameters, config)
    return bool(module.options.get("fan_in_fan_out")) if is_conv1d is None else is_conv1d


def conv1d_turned(
    name: str, shape: tuple[int, ...], parameters: Parameters, config: Mapping[str, Any]
) -> bool:
    """Whether a weight (a, b) is transformers' Conv1D's, stored (i, o), with no adapter to tell.

    By its name, and then by its bias (o,), by c_attn and c_fc, which widen, or as a square one is.
    """
    stem, _, last = name.removesuffix(".weight").rpartition(".")
    if len(shape) != 2 or last not in CONV1D_NAMES:
        return False
    if shape[0] != shape[1]:
        bias = parameters.get(f"{stem}.{last}.bias" if stem else f"{last}.bias")
        if bias is not None:
            return bias.shape[0] == shape[1]
        if last in _WIDENING:
            return shape[1] > shape[0]
    return bool(_square_conv1d(name, parameters, config))


def _square_conv1d(name: str, parameters: Parameters, config: Mapping[str, Any]) -> bool | None:
    """Whether a square weight is a Conv1D's, by what lies beside it or its model's class."""
    stem, _, last = name.removesuffix(".weight").rpartition(".")
    if last not in CONV1D_NAMES:
        return False
    beside = _wide_beside(stem, parameters)
    if beside is not None:
        return beside
    if kinds := _kinds(config):
        return any(family(kind).conv1d for kind in kinds)
    return None


def _kinds(config: Mapping[str, Any]) -> list[str]:
    """The model types that a config names, of its parts too (an encoder and a decoder)."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    return [str(part["model_type"]) for part in parts if part.get("model_type")]


def _wide_beside(stem: str, parameters: Parameters) -> bool | None:
    """Whether c_attn or c_fc near a square weight, which widen, are stored (i, o); None if unseen."""
    block = stem.rpartition(".")[0]
    for wide in (f"{stem}.c_attn", f"{stem}.c_fc", f"{block}.attn.c_attn", f"{block}.mlp.c_fc"):
        at = parameters.get(f"{wide}.weight")
        if at is not None and len(at.shape) == 2 and at.shape[0] != at.shape[1]:
            return at.shape[1] > at.shape[0]
    return None


def with_sign(module: ModuleState, turned: bool) -> ModuleState:
    """The module with the sign that its weight is stored (i, o), where the base's layout says so."""
    if not turned:
        return module
    return module.changed(options={**module.options, "fan_in_fan_out": True})
