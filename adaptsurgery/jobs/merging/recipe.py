"""What a plan of a merge depends on, beside its base and adapters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MergeRecipe:
    """How a plan is carried out; every field is a part of its digest."""

    dtype: str = "auto"
    compute: str = "fp32"
    device: str = "cpu"
    inverse: bool = False
    max_shard_size: int = 0
    dequantize: bool = False
    allow_nonfinite: bool = False
