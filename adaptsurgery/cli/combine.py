"""``adaptsurgery combine`` and ``adaptsurgery resize``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adaptsurgery.cli import options, output

if TYPE_CHECKING:
    from adaptsurgery.adapters.report import Report


@click.command()
@click.argument("sources", metavar="A[=WEIGHT]...", nargs=-1, required=True)
@options.OUT
@options.TO
@options.BASE
@click.option("--rank", type=click.IntRange(min=1), help="Truncate to this rank, optimally.")
@click.option("--allow-lossy", is_flag=True, help="Accept what --rank loses; it is told.")
@click.option("--allow-zero", is_flag=True, help="Write zeros where everything cancels.")
@options.ALLOW_NONFINITE
@options.OVERWRITE
@options.NO_HASHES
@options.DRY_RUN
@options.QUIET
@output.json_option
def command(
    sources: tuple[str, ...],
    out: str,
    to: str | None,
    base: str | None,
    rank: int | None,
    allow_lossy: bool,
    allow_zero: bool,
    allow_nonfinite: bool,
    overwrite: bool,
    no_hashes: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
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
        report = combine(
            sources,
            out,
            to=to,
            base=base,
            rank=rank,
            allow_lossy=allow_lossy,
            allow_zero=allow_zero,
            allow_nonfinite=allow_nonfinite,
            overwrite=overwrite,
            dry_run=dry_run,
            hashes=not no_hashes,
            progress=tell,
        )
    _tell(report, out, as_json, quiet)


@click.command()
@click.argument("source", metavar="ADAPTER")
@options.OUT
@click.option("--rank", type=click.IntRange(min=1), help="The highest rank that a module keeps.")
@click.option(
    "--energy", type=float, metavar="E", help="The share of Σσ² that each keeps, as 0.95."
)
@options.TO
@options.BASE
@options.ALLOW_NONFINITE
@options.OVERWRITE
@options.NO_HASHES
@options.DRY_RUN
@options.QUIET
@output.json_option
def resize_command(
    source: str,
    out: str,
    rank: int | None,
    energy: float | None,
    to: str | None,
    base: str | None,
    allow_nonfinite: bool,
    overwrite: bool,
    no_hashes: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write ADAPTER at a lower rank, the nearest to it there is.

    \b
    adaptsurgery resize style.safetensors -o small.safetensors --rank 8
    adaptsurgery resize style.safetensors -o small.safetensors --energy 0.95

    Each module's rank before and after and its relative error are told; LoHa and LoKr become LoRA.
    """
    if (rank is None) == (energy is None):
        raise click.UsageError("one of --rank and --energy, and not both")
    from adaptsurgery.jobs.resize import resize

    with output.progress(quiet) as tell:
        report = resize(
            source,
            out,
            rank=rank,
            energy=energy,
            to=to,
            base=base,
            allow_nonfinite=allow_nonfinite,
            overwrite=overwrite,
            dry_run=dry_run,
            hashes=not no_hashes,
            progress=tell,
        )
    _tell(report, out, as_json, quiet)


def _tell(report: Report, out: str, as_json: bool, quiet: bool) -> None:
    if as_json:
        output.print_json({"ok": True, **report.as_dict(), "peak_memory": output.peak_memory()})
        return
    if quiet:
        return
    facts = report.facts
    for source in facts.get("sources", [{"path": facts["source"], "layout": facts["from"]}]):
        weight = f"  × {source['weight']:g}" if "weight" in source else ""
        output.line("adapter", f"{source['path']}{weight}  {source['layout']}")
    if facts["model"]:
        output.line("model", facts["model"])
    for note in report.notes:
        output.note(note.code, note.where, note.text)
    output.rows(report.rows)
    written = "wrote" if report.outputs else "dry run: would write"
    parts = [
        report.verdict,
        f"{written} {output.size(facts['bytes'])} to {output.printable(out)}",
        *output.peak(),
    ]
    click.echo(output.paint(" · ".join(parts), "green" if report.outputs else "yellow"))
