"""``adaptsurgery combine`` and ``adaptsurgery resize``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptsurgery.cli import options, output
from adaptsurgery.jobs.options.adapters import CombineOptions, ResizeOptions

if TYPE_CHECKING:
    from adaptsurgery.adapters.report import Report


@click.command()
@click.argument("sources", metavar="A[=WEIGHT]...", nargs=-1, required=True)
@options.OUT
@options.of(CombineOptions)
@options.QUIET
@output.json_option
def command(sources: tuple[str, ...], out: str, quiet: bool, as_json: bool, **given: Any) -> None:
    """Write one adapter that is the weighted sum of several.

    \b
    adaptsurgery combine style.safetensors=0.7 face.safetensors=0.4 -o both.safetensors
    adaptsurgery combine lora/ loha.safetensors --to peft -o both/ --base model/
    adaptsurgery combine a.safetensors b.safetensors -o c.safetensors --rank 32 --allow-lossy

    Any algorithms, layouts and ranks. Exact without --rank: ranks stand side by side, and nothing
    is multiplied across adapters.
    """
    from adaptsurgery.jobs.combining.combine import combine

    with output.progress(quiet) as tell:
        report = combine(sources, out, progress=tell, **given)
    output.finish(report, as_json, quiet, lambda: _print(report, out))


@click.command()
@click.argument("source", metavar="ADAPTER")
@options.OUT
@options.of(ResizeOptions)
@options.QUIET
@output.json_option
def resize_command(source: str, out: str, quiet: bool, as_json: bool, **given: Any) -> None:
    """Write ADAPTER at a lower rank, the nearest to it there is.

    \b
    adaptsurgery resize style.safetensors -o small.safetensors --rank 8
    adaptsurgery resize style.safetensors -o small.safetensors --energy 0.95

    Each module's rank before and after and its relative error are told; LoHa and LoKr become LoRA.
    """
    if (given["rank"] is None) == (given["energy"] is None):
        raise click.UsageError("one of --rank and --energy, and not both")
    from adaptsurgery.jobs.resize import resize

    with output.progress(quiet) as tell:
        report = resize(source, out, progress=tell, **given)
    output.finish(report, as_json, quiet, lambda: _print(report, out))


def _print(report: Report, out: str) -> None:
    facts = report.facts
    for source in facts.get("sources", [{"path": facts["source"], "layout": facts["from"]}]):
        weight = f"  × {source['weight']:g}" if "weight" in source else ""
        output.line("adapter", f"{source['path']}{weight}  {source['layout']}")
    if facts["model"]:
        output.line("model", facts["model"])
    for note in report.notes:
        output.note(note.code, note.where, note.text)
    output.rows(report.rows)
    output.verdict(report, output.written(report, out))
