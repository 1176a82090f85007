"""``adaptsurgery merge`` and ``adaptsurgery unmerge``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from adaptsurgery.cli import options, output
from adaptsurgery.jobs.options.checkpoints import MergeOptions, UnmergeOptions

if TYPE_CHECKING:
    from adaptsurgery.adapters.report import Report

_F = TypeVar("_F", bound=Callable[..., Any])


def _takes(kind: type) -> Callable[[_F], _F]:
    """BASE, the adapters, OUT and a job's options."""
    decorators = (
        click.argument("base", metavar="BASE"),
        click.argument("adapters", metavar="ADAPTER[=WEIGHT]...", nargs=-1, required=True),
        options.out("What BASE is: a file or a folder."),
        options.of(kind),
        options.QUIET,
        output.json_option,
    )

    def decorate(command: _F) -> _F:
        for each in reversed(decorators):
            command = each(command)
        return command

    return decorate


@click.command()
@_takes(MergeOptions)
def command(as_json: bool, quiet: bool, **given: Any) -> None:
    """Write BASE with adapters merged into its weights.

    \b
    adaptsurgery merge model/ adapter/ -o merged/
    adaptsurgery merge model.safetensors style.safetensors=0.8 face.safetensors -o out.safetensors
    adaptsurgery merge org/model adapter/ -o merged/ --dry-run

    Adapters of any layout and algorithm together; a weight scales what adds. BASE is a safetensors
    file, an index with its shards, a transformers or diffusers folder, or a Hub name; it is never
    written. A merge that was killed goes on where it stopped.
    """
    from adaptsurgery.jobs.merging.merge import merge

    _run(merge, as_json, quiet, given)


@click.command()
@_takes(UnmergeOptions)
def unmerge_command(as_json: bool, quiet: bool, **given: Any) -> None:
    """Take adapters out of a merged checkpoint again.

    \b
    adaptsurgery unmerge merged/ adapter/ -o base/ --against original/

    The inverse of merge, with the same adapters, weights and order, up to the rounding of storage,
    which is told. What has no inverse (DoRA, replaced parameters) is refused.
    """
    from adaptsurgery.jobs.merging.merge import unmerge

    _run(unmerge, as_json, quiet, given)


def _run(job: Callable[..., Report], as_json: bool, quiet: bool, given: dict[str, Any]) -> None:
    options.check_part(given["shard_index"], given["num_shards"])
    base, adapters, out = given.pop("base"), list(given.pop("adapters")), given.pop("out")
    with output.resumable(quiet, "shards") as tell:
        report = job(base, adapters, out, progress=tell, **given)
    output.finish(report, as_json, quiet, lambda: _print(report, out))


def _print(report: Report, out: str) -> None:
    facts = report.facts
    output.line("base", facts["base"])
    for adapter in facts["adapters"]:
        output.line("adapter", f"{adapter['path']}  × {adapter['weight']:g}  {adapter['layout']}")
    output.line("tensors", f"{facts['edited_tensors']} of {facts['tensors']} edited")
    output.line("shards", f"{facts['shards']}, {facts['untouched_shards']} untouched")
    output.line("memory", f"at most about {output.size(facts['predicted_peak_memory'])}")
    if "against" in facts:
        output.line("distance", f"{facts['against']['relative']:.2g} of the original, in all")
    for note in report.notes:
        output.note(note.code, note.where, note.text)
    done = "complete" in facts and not report.outputs
    output.verdict(report, "this part is done" if done else output.written(report, out))
