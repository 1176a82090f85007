"""``adaptsurgery rewrite``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adaptsurgery.cli import output

if TYPE_CHECKING:
    from adaptsurgery.adapters.report import Report


@click.command()
@click.argument("model", metavar="MODEL.pt2")
@click.option("-o", "--output", "out", metavar="OUT.pt2", help="The program to write.")
@click.option("--config", metavar="FILE", help="An adapter_config.json: a new adapter.")
@click.option("--adapter", metavar="FILE", help="An adapter in any layout: a file, a folder, a Hub name.")  # fmt: skip
@click.option("--merge", is_flag=True, help="Fold the adapter into the weights.")
@click.option(
    "--onnx", metavar="OUT.onnx", help="The ONNX to write, each adapter tensor by its name."
)
@click.option("--name", default="default", show_default=True, help="The adapter's name.")
@click.option(
    "--mode", type=click.Choice(["auto", "factored", "weight"]), default="auto",
    help="Beside the layer, or folded into its weight on every call.",
)  # fmt: skip
@click.option("--base", metavar="BASE", help="Where flat names are looked up, if not in the program.")  # fmt: skip
@click.option(
    "--seed",
    type=click.IntRange(-(1 << 63), (1 << 64) - 1),
    help="With --config: of the initial values.",
)
@click.option(
    "--table",
    is_flag=True,
    help="Print every layer; without an adapter, all there are. Needs no output.",
)
@click.option(
    "--trust",
    is_flag=True,
    help="The program is your own: load it though it runs code (pickles, formulas, imports).",
)
@click.option("--overwrite", is_flag=True, help="Replace the outputs if they are there.")
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@output.json_option
def command(
    model: str,
    out: str | None,
    config: str | None,
    adapter: str | None,
    merge: bool,
    onnx: str | None,
    name: str,
    mode: str,
    base: str | None,
    seed: int | None,
    table: bool,
    trust: bool,
    overwrite: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
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
    if seed is not None and config is None:
        raise click.UsageError("--seed goes with --config")
    from adaptsurgery.jobs.rewrite import rewrite

    report = rewrite(
        model,
        out,
        config=config,
        adapter=adapter,
        name=name,
        mode=mode,
        merge=merge,
        onnx=onnx,
        base=base,
        seed=seed,
        overwrite=overwrite,
        dry_run=dry_run or (table and out is None and onnx is None),
        trust=trust,
    )
    if as_json:
        output.print_json({"ok": True, **report.as_dict(), "peak_memory": output.peak_memory()})
    elif not quiet:
        _print(report, table, out, onnx, merge)


def _print(report: Report, table: bool, out: str | None, onnx: str | None, merge: bool) -> None:
    facts = report.facts
    if table or not report.rows:
        click.echo(output.printable_lines(facts["table"]))
    for note in report.notes:
        output.note(note.code, note.where, note.text)
    if not report.rows:
        click.echo(report.verdict)
        return
    numbers = facts["parameters"]["adapter"]
    parts = [report.verdict, "merged" if merge else f"{numbers:,} parameters added"]
    named = output.printable(" and ".join(report.outputs or [p for p in (out, onnx) if p]))
    if report.outputs:
        parts += [f"wrote {output.size(facts['bytes'])} to {named}"]
    else:
        parts += [f"dry run: would write {named}" if named else "nothing written: no -o, no --onnx"]
    parts += output.peak()
    click.echo(output.paint(" · ".join(parts), "green" if report.outputs else "yellow"))
