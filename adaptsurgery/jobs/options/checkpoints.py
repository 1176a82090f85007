"""What may be asked of merging into a checkpoint, and of taking out of it again."""

from __future__ import annotations

from dataclasses import dataclass

from adaptsurgery.jobs.options import (
    DTYPES,
    Named,
    allow_nonfinite_option,
    dry_run_option,
    num_shards_option,
    option,
    overwrite_option,
    shard_index_option,
    workers_option,
)


@dataclass(frozen=True, eq=False, repr=False)
class CheckpointOptions:
    """What ``merge`` and ``unmerge`` have in common."""

    dtype: str = option(
        "auto", "What OUT stores; auto: as BASE.", choices=("auto", *DTYPES), shown=True
    )
    compute: str = option(
        "fp32",
        "What weights are folded in, before the one rounding.",
        choices=("fp32", "fp64"),
        shown=True,
    )
    device: str = option("cpu", "Where to fold.", shown=True)
    max_shard_size: int | None = option(
        None, "Deal the shards anew: 5GB.", least=1, metavar="SIZE", form="size"
    )
    allow_unmatched: bool = option(False, "Leave out modules that BASE lacks.")
    allow_nonfinite: bool = allow_nonfinite_option()
    skip_links: bool = option(
        False, "Leave out files of BASE that are links to places outside of it."
    )
    overwrite: bool = overwrite_option()
    dry_run: bool = dry_run_option("Plan and tell, from headers alone.")
    workers: int = workers_option("Threads that read, fold and write.")
    shard_index: int = shard_index_option("With --num-shards: do part I, from 0.")
    num_shards: int = num_shards_option("completes")
    norms: bool = option(True, "Record each layer's norms in the manifest.")


@dataclass(frozen=True, eq=False, repr=False)
class MergeOptions(CheckpointOptions):
    """Of ``merge``, beside BASE, its adapters and OUT."""

    dequantize: bool = option(False, "Take a BASE in fp8 or int8; OUT is in bf16, or --dtype.")
    inverse = False
    against = None


@dataclass(frozen=True, eq=False, repr=False)
class UnmergeOptions(CheckpointOptions):
    """Of ``unmerge``, beside BASE, its adapters and OUT."""

    against: Named | None = option(
        None, "Measure the distance from the original base.", metavar="ORIGINAL"
    )
    inverse = True
    dequantize = False
