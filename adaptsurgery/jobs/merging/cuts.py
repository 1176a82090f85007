"""Where a fused weight is cut into q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptsurgery.checkpoint.base import Base
from adaptsurgery.jobs.merging.configs import text_config
from adaptsurgery_formats.errors import ShapeError
from adaptsurgery_formats.reading import typed


def cut_of(base: Base, component: str, name: str, known: Mapping[int, int]) -> tuple[int, int, int]:
    """Rows of q, k and v in a fused weight, from those that adapters show, or heads in a config.

    Raises ShapeError "fused-cuts" where nothing tells, or they disagree.
    """
    shape = base.parameters[component][name].shape
    # c_attn is a Conv1D (i, 3·o) in some models and a Linear (3·o, i) in others
    total = max(shape[:2]) if "c_attn" in name else shape[0]
    thirds = name.endswith("in_proj_weight") or ("c_attn" in name and not known)
    if thirds:
        cut = (total // 3,) * 3
    else:
        cut = _three(total, known) or _heads(base.configs.get(component, {})) or (0, 0, 0)
    if sum(cut) != total or min(cut) <= 0 or any(cut[p] != n for p, n in known.items()):
        raise ShapeError(
            f"`{name}` cannot be cut into q, k and v",
            where=base.where,
            seen=f"{total} rows; the adapters have "
            + (", ".join(f"{'qkv'[p]} {n}" for p, n in sorted(known.items())) or "no widths"),
            next="is the adapter for this base? a config.json with head counts may tell",
            code="fused-cuts",
        )
    return cut


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
    config = text_config(config) or config
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads <= 0:
        return None
    width = typed(config, "head_dim", int) or hidden // heads
    kv = typed(config, "num_key_value_heads", int) or heads
    return heads * width, kv * width, kv * width
