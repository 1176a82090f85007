"""Conversion: file → adapter → the target's names and needs → file, with ΔW checked on the way."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from adaptsurgery.adapters.loading import AnyPath, Loaded, read_adapter
from adaptsurgery.adapters.report import Report
from adaptsurgery.adapters.writing import Progress, check_paths, writable, write_adapter
from adaptsurgery.jobs.change import as_lora
from adaptsurgery.jobs.values import check_whole
from adaptsurgery_formats import Format
from adaptsurgery_formats.errors import LayoutError


def convert(
    source: AnyPath | Sequence[AnyPath],
    out: str | os.PathLike[str],
    to: str,
    *,
    layout: str | None = None,
    base: str | os.PathLike[str] | None = None,
    algorithm: str | None = None,
    rank: int | None = None,
    allow_lossy: bool = False,
    allow_nonfinite: bool = False,
    prefix: str = "",
    overwrite: bool = False,
    dry_run: bool = False,
    hashes: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Write the adapter at ``source`` to ``out`` in another layout, with the same ΔW.

    Several sources are parts of one adapter, a UNet's and its text encoders'.
    ``to`` is "peft" (``out`` is a folder), "lycoris" or "kohya" (a file). ``layout`` overrules the
    source's detection; ``base`` gives the module list: a checkpoint, a folder, a Hub name, or
    sd15, sd2, sdxl, flux. ``algorithm`` "lora" changes LoHa, LoKr, HRA and DoRA into LoRA,
    truncated to ``rank`` if given; what cannot be exact needs ``allow_lossy``. ``prefix`` takes the
    place of lora_unet or lycoris for a model that no bundled table has. ``hashes`` False
    leaves kohya's sshs hashes out, which take a second reading of the data. NaN and infinity that are
    only copied are told; what is computed of them is refused unless ``allow_nonfinite``. Nothing is written in
    a dry run, and nothing is left behind by a failure.

    Raises SurgeryError for any input that cannot be converted exactly: what, where, seen, next.
    """
    target = writable(to)
    if algorithm not in (None, "lora"):
        raise LayoutError(f"--as {algorithm} is not offered", next="--as lora", code="no-such-form")
    if rank is not None:
        check_whole("rank", rank)
    if rank is not None and algorithm is None:
        raise LayoutError("--rank goes with --as lora", code="rank-without-as")
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    check_paths(sources, out, target, overwrite, base)
    loaded = read_adapter(sources, base=base, layout=layout)
    _set_prefix(loaded, prefix.rstrip("_"), target)
    return write_adapter(
        loaded,
        Path(out),
        to,
        change=partial(as_lora, rank=rank, allow_lossy=allow_lossy) if algorithm else None,
        allow_nonfinite=allow_nonfinite,
        overwrite=overwrite,
        dry_run=dry_run,
        hashes=hashes,
        progress=progress,
    )


def _set_prefix(loaded: Loaded, prefix: str, target: Format) -> None:
    """The prefix of flat names: the caller's, or the source's own within its layout."""
    if prefix and (target.name == "peft" or not prefix.isidentifier()):
        raise LayoutError(
            f"`{prefix}` cannot go before {target.title}'s names",
            next="letters, digits and underscores, for --to kohya or --to lycoris",
            code="bad-prefix",
        )
    if prefix and len(loaded.state.components) > 1:
        raise LayoutError(
            "one prefix cannot tell several components apart",
            where=loaded.state.where,
            seen=", ".join(loaded.state.components),
            next="leave --prefix out, or convert the components one by one",
            code="bad-prefix",
        )
    if prefix and loaded.names is not None and loaded.names.model:
        raise LayoutError(
            f"{loaded.names.model}'s prefixes are those that its readers know",
            where=loaded.state.where,
            next="leave --prefix out",
            code="bad-prefix",
        )
    kept = loaded.state.prefix if target.name == loaded.state.layout else ""
    loaded.state = replace(loaded.state, prefix=prefix or kept)
