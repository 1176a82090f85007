"""Where a fused weight is cut into q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptsurgery_formats.errors import ShapeError
from adaptsurgery_formats.names.families import CONV1D_FUSED
from adaptsurgery_formats.names.rows import Parameters, Rows, StoredWeight
from adaptsurgery_formats.reading import typed

Cut = tuple[int, int, int]  # rows of q, k and v
_THIRDS = "in_proj_weight"  # of torch's MultiheadAttention


def cut_of(
    name: str,
    parameters: Parameters,
    config: Mapping[str, Any],
    known: Mapping[int, int],
    where: str = "",
) -> Cut:
    """Rows of q, k and v in a fused weight, from those that adapters show, or heads in a config.

    ``known`` maps 0, 1, 2 to the rows that an adapter's q, k, v has. Raises ShapeError "fused-cuts"
    where nothing tells, or they disagree.
    """
    shape = parameters[name].shape
    # c_attn is a Conv1D (i, 3·o) in some models and a Linear (3·o, i) in others
    total = max(shape[:2]) if CONV1D_FUSED in name else shape[0]
    thirds = name.endswith(_THIRDS) or (CONV1D_FUSED in name and not known)
    if thirds:
        cut = (total // 3,) * 3
    else:
        cut = _three(total, known) or _heads(config) or (0, 0, 0)
    if sum(cut) != total or min(cut) <= 0 or any(cut[p] != n for p, n in known.items()):
        raise ShapeError(
            f"`{name}` cannot be cut into q, k and v",
            where=where,
            seen=f"{total} rows; the adapters have "
            + (", ".join(f"{'qkv'[p]} {n}" for p, n in sorted(known.items())) or "no widths"),
            next="is the adapter for this base? a config.json with head counts may tell",
            code="fused-cuts",
        )
    return cut


def part_of(weight: StoredWeight, cut: Cut) -> StoredWeight:
    """The q, k or v that a weight is, with the rows that the cut gives it."""
    start, fused = sum(cut[: weight.part]), weight.rows[0]
    rows = Rows(fused.name, start, start + cut[weight.part], turned=fused.turned)
    return StoredWeight((rows,), tied=weight.tied)


def _three(total: int, known: Mapping[int, int]) -> tuple[int, int, int] | None:
    """Rows of q, k, v that make ``total``, from those known; k and v are alike."""
    q, kv = known.get(0), known.get(1, known.get(2))
    if q is None and kv is None:
        return None
    if q is None:
        q = total - 2 * (kv or 0)
    if kv is None:
        kv = (total - q) // 2
    return q, kv, kv


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Rows of q, k, v from a config's head counts."""
    config = typed(config, "text_config", dict) or config
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads <= 0:
        return None
    width = typed(config, "head_dim", int) or hidden // heads
    kv = typed(config, "num_key_value_heads", int) or heads
    return heads * width, kv * width, kv * width
