"""``adaptsurgery convert``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adaptsurgery.cli import options, output

if TYPE_CHECKING:
    from adaptsurgery.adapters.report import Report


@click.command()
@click.argument("sources", metavar="SRC...", nargs=-1, required=True)
@options.OUT
@click.option(
    "--to", required=True, type=click.Choice(options.TARGETS), help="The layout to write."
)
@click.option(
    "--from",
    "layout",
    type=click.Choice(options.LAYOUTS),
    help="The source's layout, if detection errs.",
)
@options.BASE
@click.option(
    "--as", "algorithm", type=click.Choice(["lora"]), help="Change the algorithm; exact where it can be."
)  # fmt: skip
@click.option("--rank", type=click.IntRange(min=1), help="With --as lora: the highest rank.")
@click.option("--allow-lossy", is_flag=True, help="Accept approximations; their errors are told.")
@options.ALLOW_NONFINITE
@click.option(
    "--prefix",
    default="",
    help="Before kohya's or LyCORIS's names, for models of no bundled table.",
)
@options.OVERWRITE
@options.NO_HASHES
@options.DRY_RUN
@options.QUIET
@output.json_option
def command(
    sources: tuple[str, ...],
    out: str,
    to: str,
    layout: str | None,
    base: str | None,
    algorithm: str | None,
    rank: int | None,
    allow_lossy: bool,
    allow_nonfinite: bool,
    prefix: str,
    overwrite: bool,
    no_hashes: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
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
    if rank is not None and algorithm is None:
        raise click.UsageError("--rank goes with --as lora")
    from adaptsurgery.jobs.convert import convert

    with output.progress(quiet) as tell:
        report = convert(
            sources,
            out,
            to,
            layout=layout,
            base=base,
            algorithm=algorithm,
            rank=rank,
            allow_lossy=allow_lossy,
            allow_nonfinite=allow_nonfinite,
            prefix=prefix,
            overwrite=overwrite,
            dry_run=dry_run,
            hashes=not no_hashes,
            progress=tell,
        )
    if as_json:
        output.print_json({"ok": True, **report.as_dict(), "peak_memory": output.peak_memory()})
    elif not quiet:
        _print(report, out)


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
    click.echo(_verdict(report, out))


def _by_component(report: Report) -> list[tuple[str, int]]:
    """How many modules each named component has: a row's module begins with its component."""
    named = sorted(filter(None, report.facts["components"]), key=len, reverse=True)
    counts = dict.fromkeys(filter(None, report.facts["components"]), 0)
    for row in report.rows:
        owner = next((c for c in named if row.module.startswith(c + ".")), None)
        if owner is not None:
            counts[owner] += 1
    return [(component, count) for component, count in counts.items() if count]


def _verdict(report: Report, out: str) -> str:
    written = "wrote" if report.outputs else "dry run: would write"
    parts = [
        report.verdict,
        "0 unused keys",  # a key that no module takes is an error
        f"{written} {output.size(report.facts['bytes'])} to {output.printable(out)}",
        *output.peak(),
    ]
    return output.paint(" · ".join(parts), "green" if report.outputs else "yellow")
