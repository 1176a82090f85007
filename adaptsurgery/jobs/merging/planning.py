"""From paths to a plan: the base opened, the adapters read, matched, ties settled."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from adaptsurgery.jobs.inputs import open_base
from adaptsurgery.jobs.merging.adapters import Named, check_replaced, read_adapters, repeated
from adaptsurgery.jobs.merging.match import match
from adaptsurgery.jobs.merging.plan import MergePlan, build_plan
from adaptsurgery.jobs.merging.recipe import MergeRecipe
from adaptsurgery.jobs.merging.tying import settle_ties
from adaptsurgery_formats import AdapterState

Adapters = Named | Sequence[Named]


def open_plan(
    base: str | os.PathLike[str],
    adapters: Adapters,
    options: MergeRecipe,
    allow_unmatched: bool,
    dry_run: bool,
    skip_links: bool = False,
) -> tuple[MergePlan, list[AdapterState]]:
    """The plan, and the adapters that it is for; of a base on the Hub a ``dry_run`` reads headers.

    ``skip_links`` leaves out of what comes along the links that lead out of the base's folder.
    """
    found_base = open_base(os.fspath(base), headers=dry_run)
    read = read_adapters(_several(adapters), inverse=options.inverse)
    states = [state for state, _ in read]
    matches = match(
        found_base, states, allow_unmatched=allow_unmatched, dequantize=options.dequantize
    )
    matches.notes += repeated(given.path for _, given in read)
    check_replaced(read, matches, inverse=options.inverse)
    untied = settle_ties(found_base, states, matches)
    return build_plan(found_base, read, matches, untied, options, skip_links), states


def _several(adapters: Adapters) -> Iterable[Named]:
    """One adapter as a list of one; a tuple of a path and a number is one adapter too."""
    if isinstance(adapters, (str, os.PathLike)):
        return [adapters]
    if isinstance(adapters, tuple) and len(adapters) == 2 and isinstance(adapters[1], (int, float)):
        return [(adapters[0], adapters[1])]
    return adapters
