"""``adaptsurgery verify``."""

from __future__ import annotations

import click

from adaptsurgery.cli import output


@click.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option(
    "--base",
    metavar="BASE",
    help="The model that both are for: a safetensors file, a folder, a Hub name, or sd15, sd2, "
    "sdxl, flux. With weights, it also lets HRA and DoRA be held against other algorithms.",
)
@output.json_option
def command(first: str, second: str, base: str | None, as_json: bool) -> None:
    """Tell whether adapters A and B are the same update.

    \b
    adaptsurgery verify style.safetensors style/
    adaptsurgery verify loha.safetensors lora/ --base sdxl --json

    They may be in different layouts. Every module's ΔW is compared; exit code 1 where they differ by more than rounding.
    """
    from adaptsurgery.jobs.verify import verify

    report = verify(first, second, base=base)
    if as_json:
        output.print_json({"ok": True, **report.as_dict()})
        return
    for note in report.notes:
        output.note(note.code, note.where, note.text)
    output.rows(report.rows)
    click.echo(output.paint(report.verdict, "green"))
