"""``adaptsurgery rewrite``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptsurgery.cli import options, output
from adaptsurgery.jobs.options.programs import RewriteOptions

if TYPE_CHECKING:
    from adaptsurgery.adapters.report import Report


@click.command()
@click.argument("model", metavar="MODEL.pt2")
@click.option("-o", "--output", "out", metavar="OUT.pt2", help="The program to write.")
@options.of(RewriteOptions)
@click.option(
    "--table",
    is_flag=True,
    help="Print every layer; without an adapter, all there are. Needs no output.",
)
@options.QUIET
@output.json_option
def command(
    model: str, out: str | None, table: bool, quiet: bool, as_json: bool, **given: Any
) -> None:
    """Put an adapter into the exported program MODEL.pt2.

    \b
    adaptsurgery rewrite model.pt2 --table
    adaptsurgery rewrite model.pt2 --config adapter_config.json -o adapted.pt2
    adaptsurgery rewrite model.pt2 --adapter style.safetensors -o merged.pt2 --merge
    adaptsurgery rewrite model.pt2 --adapter lora/ -o adapted.pt2 --onnx adapted.onnx
    adaptsurgery rewrite model.pt2 --adapter lora/ --onnx adapted.onnx

    The model's Python source is not needed. MODEL.pt2 is looked through before torch loads it, and
    refused where loading it would run code. Outputs are there in full or not at all.
    """
    if given["seed"] is not None and given["config"] is None:
        raise click.UsageError("--seed goes with --config")
    from adaptsurgery.jobs.rewrite import rewrite

    named = [path for path in (out, given["onnx"]) if path]
    given["dry_run"] = given["dry_run"] or (table and not named)
    report = rewrite(model, out, **given)
    output.finish(
        report, as_json, quiet, lambda: _print(report, table, named, merged=given["merge"])
    )


def _print(report: Report, table: bool, outputs: list[str], merged: bool) -> None:
    facts = report.facts
    if table or not report.rows:
        click.echo(output.printable_lines(facts["table"]))
    for note in report.notes:
        output.note(note.code, note.where, note.text)
    if not report.rows:
        click.echo(report.verdict)
        return
    numbers = facts["parameters"]["adapter"]
    added = "merged" if merged else f"{numbers:,} parameters added"
    named = output.printable(" and ".join(report.outputs or outputs))
    if report.outputs:
        did = f"wrote {output.size(facts['bytes'])} to {named}"
    else:
        did = f"dry run: would write {named}" if named else "nothing written: no -o, no --onnx"
    output.verdict(report, added, did)
