"""What may be asked of an extraction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from adaptsurgery.jobs.options import (
    DTYPES,
    TARGETS,
    Named,
    allow_nonfinite_option,
    dry_run_option,
    num_shards_option,
    option,
    overwrite_option,
    shard_index_option,
    workers_option,
)

GOALS = ("rank", "energy", "max_error", "budget")  # exactly one is given


AUTO = "auto"


def extractable() -> tuple[str, ...]:
    """The algorithms that can be fitted to a difference, looked up when they are asked for."""
    from adaptsurgery_formats.traits import named

    return named(lambda row: row.extracts)


def offered() -> tuple[str, ...]:
    """What --algorithm takes."""
    return (*extractable(), AUTO)


@dataclass(frozen=True, eq=False, repr=False)
class ExtractOptions:
    """Of ``extract``, beside BASE, TUNED and OUT."""

    algorithm: str = option(
        "lora",
        "auto: each layer's best at one number of parameters; for peft the best over all.",
        choices=offered,
        shown=True,
    )
    rank: int | None = option(None, "One goal: a rank,", least=1)
    energy: float | None = option(None, "the share of ‖D‖² each layer keeps, 0.9,", metavar="E")
    max_error: float | None = option(None, "each layer's ‖D − D̂‖/‖D‖ at most,", metavar="E")
    budget: int | None = option(None, "or parameters in all.", least=1, metavar="N")
    to: str = option("peft", choices=TARGETS, shown=True)
    factor: int | None = option(None, "LoKr's decompose_factor.")
    decompose_both: bool = option(False, "LoKr: w1 in two factors too.")
    conv_rank: int | None = option(None, "Of kernels other than 1.", least=1, metavar="N")
    tucker: bool = option(
        False, "A Tucker core on kernels other than 1: LoKr, and LoRA but in PEFT."
    )
    include: Iterable[str] = option(
        (), "Layers to adapt: PEFT's rules.", metavar="P", form="several"
    )
    exclude: Iterable[str] = option((), "Layers to leave out.", metavar="P", form="several")
    rank_pattern: Mapping[str, int] | None = option(
        None, "A layer's own rank.", metavar="NAME=N", form="ranks"
    )
    dtype: str = option(
        "fp32",
        "What factors are stored in; the errors told are of these.",
        choices=DTYPES,
        shown=True,
    )
    seed: int = option(0, "Of all that is random.", least=0)
    dense: bool = option(
        True, "Keep biases, norms, embeddings, heads as they are, as far as the layout can."
    )
    compare: bool = option(False, "Measure the other algorithms at the same size.")
    report: Named | None = option(
        None, "A page to look at, .html, or all figures, .json.", metavar="FILE"
    )
    allow_empty: bool = option(False, "Write zeros where nothing differs.")
    allow_nonfinite: bool = allow_nonfinite_option()
    overwrite: bool = overwrite_option()
    dry_run: bool = dry_run_option("Plan and tell, from headers alone.")
    workers: int = workers_option()
    shard_index: int = shard_index_option()
    num_shards: int = num_shards_option("writes")
