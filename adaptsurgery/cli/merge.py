"""``adaptsurgery merge`` and ``adaptsurgery unmerge``."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeVar

import click

from adaptsurgery.cli import options, output

if TYPE_CHECKING:
    from adaptsurgery.adapters.report import Report

INTERRUPTED = 130
_F = TypeVar("_F", bound=Callable[..., Any])


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """A number of bytes: 5GB, 500MB, 2GiB; a part of a byte is dropped, and less than one refused."""
    if value is None:
        return None
    parts = re.fullmatch(
        r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*(?:([KMGT])(i?))?B?", value.strip(), re.I
    )
    size = 0
    if parts:
        power = "KMGT".find(parts[2].upper()) + 1 if parts[2] else 0
        size = int(Fraction(parts[1]) * (1024 if parts[3] else 1000) ** power)
    if not size:
        raise click.BadParameter(f"{value!r} is no size; 5GB, 500MB, 2GiB", ctx, param)
    return size


def _options(command: _F) -> _F:
    """What merge and unmerge have in common."""
    for option in reversed(_COMMON):
        command = option(command)
    return output.json_option(command)


_COMMON = (
    click.argument("base", metavar="BASE"),
    click.argument("adapters", metavar="ADAPTER[=WEIGHT]...", nargs=-1, required=True),
    click.option(
        "-o", "--output", "out", required=True, metavar="OUT", help="What BASE is: a file or a folder."
    ),
    click.option(
        "--dtype", default="auto", show_default=True,
        type=click.Choice(["auto", "fp32", "bf16", "fp16"]), help="What OUT stores; auto: as BASE.",
    ),
    click.option(
        "--compute", default="fp32", show_default=True, type=click.Choice(["fp32", "fp64"]),
        help="What weights are folded in, before the one rounding.",
    ),
    click.option("--device", default="cpu", show_default=True, help="Where to fold."),
    click.option("--max-shard-size", callback=_size, metavar="SIZE", help="Deal the shards anew: 5GB."),
    click.option("--allow-unmatched", is_flag=True, help="Leave out modules that BASE lacks."),
    options.ALLOW_NONFINITE,
    click.option(
        "--skip-links", is_flag=True,
        help="Leave out files of BASE that are links to places outside of it.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace OUT if it is there."),
    click.option("--dry-run", is_flag=True, help="Plan and tell, from headers alone."),
    click.option(
        "--workers", type=click.IntRange(min=1), default=2, show_default=True,
        help="Threads that read, fold and write.",
    ),
    click.option(
        "--shard-index", type=click.IntRange(min=0), default=0, metavar="I",
        help="With --num-shards: do part I, from 0.",
    ),
    click.option(
        "--num-shards", type=click.IntRange(min=1), default=1, metavar="N",
        help="Cut the work into N parts; the last one done completes OUT.",
    ),
    click.option(
        "--norms/--no-norms", default=True, help="Record each layer's norms in the manifest."
    ),
    click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
)  # fmt: skip


@click.command()
@_options
@click.option(
    "--dequantize", is_flag=True, help="Take a BASE in fp8 or int8; OUT is in bf16, or --dtype."
)
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
@_options
@click.option("--against", metavar="ORIGINAL", help="Measure the distance from the original base.")
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
    index, count = given["shard_index"], given["num_shards"]
    if index >= count:
        raise click.UsageError(f"--shard-index {index} with --num-shards {count}")
    base, adapters, out = given.pop("base"), list(given.pop("adapters")), given.pop("out")
    with output.progress(quiet) as tell:
        try:
            report = job(base, adapters, out, progress=tell, **given)
        except KeyboardInterrupt:
            output.interrupted("finished shards are kept: the same command goes on from them")
            raise SystemExit(INTERRUPTED) from None
    if as_json:
        output.print_json({"ok": True, **report.as_dict(), "peak_memory": output.peak_memory()})
    elif not quiet:
        _print(report, out)


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
    click.echo(_verdict(report, out))


def _verdict(report: Report, out: str) -> str:
    if report.outputs:
        did = f"wrote {output.size(report.facts['bytes'])} to {output.printable(out)}"
    elif "complete" in report.facts:
        did = "this part is done"
    else:
        did = (
            f"dry run: would write {output.size(report.facts['bytes'])} to {output.printable(out)}"
        )
    parts = [report.verdict, did, *output.peak()]
    return output.paint(" · ".join(parts), "green" if report.outputs else "yellow")
