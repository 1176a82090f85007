"""``adaptsurgery convert``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptsurgery.cli import options, output
from adaptsurgery.jobs.options import TARGETS
from adaptsurgery.jobs.options.adapters import ConvertOptions

if TYPE_CHECKING:
    from adaptsurgery.adapters.report import Report


@click.command()
@click.argument("sources", metavar="SRC...", nargs=-1, required=True)
@options.OUT
@click.option("--to", required=True, type=click.Choice(TARGETS), help="The layout to write.")
@options.of(ConvertOptions)
@options.QUIET
@output.json_option
def command(
    sources: tuple[str, ...], out: str, to: str, quiet: bool, as_json: bool, **given: Any
) -> None:
    """Write the adapter SRC in another layout, with the same ΔW.

    Several SRC are parts of one adapter, a UNet's and its text encoders'.

    \b
    adaptsurgery convert style.safetensors --to peft -o style/
    adaptsurgery convert style/ --to kohya -o style.safetensors --base sdxl
    adaptsurgery convert loha.safetensors --to peft -o out/ --as lora --rank 32 --allow-lossy

    The source's layout is detected. What the target cannot hold exactly is refused; the output is
    there in full or not at all.
    """
    if given["rank"] is not None and given["algorithm"] is None:
        raise click.UsageError("--rank goes with --as lora")
    from adaptsurgery.jobs.convert import convert

    with output.progress(quiet) as tell:
        report = convert(sources, out, to, progress=tell, **given)
    output.finish(report, as_json, quiet, lambda: _print(report, out))


def _print(report: Report, out: str) -> None:
    facts = report.facts
    click.echo(f"{facts['from']} → {facts['to']}  {output.printable(facts['source'])}")
    if facts["model"]:
        output.line("model", facts["model"])
    for component, count in _by_component(report):
        output.line(component, f"{count} modules")
    for note in report.notes:
        output.note(note.code, note.where, note.text)
    output.rows(report.rows)
    unused = "0 unused keys"  # a key that no module takes is an error
    output.verdict(report, unused, output.written(report, out))


def _by_component(report: Report) -> list[tuple[str, int]]:
    """How many modules each named component has: a row's module begins with its component."""
    named = sorted(filter(None, report.facts["components"]), key=len, reverse=True)
    counts = dict.fromkeys(filter(None, report.facts["components"]), 0)
    for row in report.rows:
        owner = next((c for c in named if row.module.startswith(c + ".")), None)
        if owner is not None:
            counts[owner] += 1
    return [(component, count) for component, count in counts.items() if count]
