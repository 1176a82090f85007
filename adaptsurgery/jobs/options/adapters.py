"""What may be asked of the jobs that write an adapter from others."""

from __future__ import annotations

from dataclasses import dataclass, field

from adaptsurgery.jobs.options import (
    LAYOUTS,
    Named,
    allow_nonfinite_option,
    base_option,
    dry_run_option,
    hashes_option,
    option,
    overwrite_option,
    to_option,
)


@dataclass(frozen=True, eq=False, repr=False)
class ConvertOptions:
    """Of ``convert``, beside its sources, OUT and --to."""

    layout: str | None = option(
        None, "The source's layout, if detection errs.", "--from", choices=LAYOUTS
    )
    base: Named | None = base_option()
    algorithm: str | None = option(
        None, "Change the algorithm; exact where it can be.", "--as", choices=("lora",)
    )
    rank: int | None = option(None, "With --as lora: the highest rank.", least=1)
    allow_lossy: bool = option(False, "Accept approximations; their errors are told.")
    allow_nonfinite: bool = allow_nonfinite_option()
    prefix: str = option("", "Before kohya's or LyCORIS's names, for models of no bundled table.")
    overwrite: bool = overwrite_option()
    hashes: bool = hashes_option()
    dry_run: bool = dry_run_option()


@dataclass(frozen=True, eq=False, repr=False)
class CombineOptions:
    """Of ``combine``, beside its sources and OUT."""

    to: str | None = to_option()
    base: Named | None = base_option()
    rank: int | None = option(None, "Truncate to this rank, optimally.", least=1)
    allow_lossy: bool = option(False, "Accept what --rank loses; it is told.")
    allow_zero: bool = option(False, "Write zeros where everything cancels.")
    allow_nonfinite: bool = allow_nonfinite_option()
    overwrite: bool = overwrite_option()
    hashes: bool = hashes_option()
    dry_run: bool = dry_run_option()


@dataclass(frozen=True, eq=False, repr=False)
class ResizeOptions:
    """Of ``resize``, beside its source and OUT; ``layout`` is the call's alone."""

    rank: int | None = option(None, "The highest rank that a module keeps.", least=1)
    energy: float | None = option(None, "The share of Σσ² that each keeps, as 0.95.", metavar="E")
    to: str | None = to_option()
    base: Named | None = base_option()
    layout: str | None = field(default=None)
    allow_nonfinite: bool = allow_nonfinite_option()
    overwrite: bool = overwrite_option()
    hashes: bool = hashes_option()
    dry_run: bool = dry_run_option()
