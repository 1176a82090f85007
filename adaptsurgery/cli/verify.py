"""``adaptsurgery verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adaptsurgery.cli import output

if TYPE_CHECKING:
    from adaptsurgery.adapters.report import Report
    from adaptsurgery_formats.errors import SurgeryError


@click.command()
@click.argument("first", metavar="A")
@click.argument("others", metavar="[B]", nargs=-1)
@click.option(
    "--base",
    metavar="BASE",
    help="The model that both are for: a safetensors file, a folder, a Hub name, or sd15, sd2, "
    "sdxl, flux. With weights, it also lets HRA and DoRA be held against other algorithms.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ADAPTER[=WEIGHT]",
    help="A is a checkpoint, merged from --base and this; once for each adapter, in merge's order.",
)
@click.option("--inverse", is_flag=True, help="With --adapter: A was unmerged from --base.")
@click.option("--dequantize", is_flag=True, help="With --adapter: as merge was given it.")
@click.option("--allow-unmatched", is_flag=True, help="With --adapter: as merge was given it.")
@output.json_option
def command(
    first: str,
    others: tuple[str, ...],
    base: str | None,
    adapters: tuple[str, ...],
    inverse: bool,
    dequantize: bool,
    allow_unmatched: bool,
    as_json: bool,
) -> None:
    """Tell whether adapters A and B are the same update, or what a checkpoint A was merged from.

    \b
    adaptsurgery verify style.safetensors style/
    adaptsurgery verify loha.safetensors lora/ --base sdxl --json
    adaptsurgery verify merged/ --base model/ --adapter style.safetensors=0.8

    Adapters may be in different layouts; every module's ΔW is compared. Of a merged checkpoint every
    tensor is, with what base and adapters give in float64. Exit code 1 where anything differs by more
    than rounding.
    """
    second = _second(first, others)
    _check_usage(second, base, adapters, inverse or allow_unmatched or dequantize)
    from adaptsurgery.adapters.comparing import VerificationError
    from adaptsurgery.jobs.verify import verify

    try:
        if second is not None:
            report = verify(first, second, base=base)
        else:
            from adaptsurgery.jobs.merging.check import verify_merge

            report = verify_merge(
                first,
                base or "",
                adapters,
                allow_unmatched=allow_unmatched,
                inverse=inverse,
                dequantize=dequantize,
            )
    except VerificationError as error:
        if error.report is None:
            raise
        _tell(error.report, error, as_json)
        raise click.exceptions.Exit(1) from None
    _tell(report, None, as_json)


def _second(first: str, others: tuple[str, ...]) -> str | None:
    """B, where there is one; a merge's arguments are told as options."""
    if len(others) > 1:
        merged = " ".join([first, "--base", others[0], *(f"--adapter {a}" for a in others[1:])])
        raise click.UsageError(f"A and B are two adapters; a merged checkpoint: verify {merged}")
    return others[0] if others else None


def _check_usage(
    second: str | None, base: str | None, adapters: tuple[str, ...], of_merge: bool
) -> None:
    """Two adapters, or a checkpoint with its base and adapters."""
    if second is None and not adapters:
        raise click.UsageError("B is missing: another adapter, or --base and --adapter for a merge")
    if second is not None and (adapters or of_merge):
        raise click.UsageError("B is for adapters; a merged checkpoint has --base and --adapter")
    if adapters and base is None:
        raise click.UsageError("--adapter needs --base, the checkpoint that A was merged from")


def _tell(report: Report, error: SurgeryError | None, as_json: bool) -> None:
    if as_json:
        failure = {} if error is None else {"error": error.as_dict()}
        output.print_json({"ok": error is None, **failure, **report.as_dict()})
        return
    for note in report.notes:
        output.note(note.code, note.where, note.text)
    output.rows(report.rows)
    click.echo(output.paint(report.verdict, "red" if error else "green"))
