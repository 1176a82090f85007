"""``adaptsurgery verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adaptsurgery.cli import output

if TYPE_CHECKING:
    from adaptsurgery.jobs.report import Report
    from adaptsurgery_formats.errors import SurgeryError


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
    from adaptsurgery.jobs.verify import VerificationError, verify

    try:
        report = verify(first, second, base=base)
    except VerificationError as error:
        if error.report is None:
            raise
        _tell(error.report, error, as_json)
        raise click.exceptions.Exit(1) from None
    _tell(report, None, as_json)


def _tell(report: Report, error: SurgeryError | None, as_json: bool) -> None:
    if as_json:
        told = {} if error is None else {"error": error.as_dict()}
        output.print_json({"ok": error is None, **told, **report.as_dict()})
        return
    for note in report.notes:
        output.note(note.code, note.where, note.text)
    output.rows(report.rows)
    click.echo(output.paint(report.verdict, "red" if error else "green"))
