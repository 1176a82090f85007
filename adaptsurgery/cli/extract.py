"""``adaptsurgery extract``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptsurgery.cli import options, output
from adaptsurgery.jobs.options.extraction import GOALS, ExtractOptions

if TYPE_CHECKING:
    from adaptsurgery.adapters.report import Report


@click.command()
@click.argument("base", metavar="BASE")
@click.argument("tuned", metavar="TUNED")
@options.OUT
@options.of(ExtractOptions)
@options.QUIET
@output.json_option
def command(as_json: bool, quiet: bool, base: str, tuned: str, out: str, **given: Any) -> None:
    """Write the adapter nearest to what fine-tuning made of BASE.

    \b
    adaptsurgery extract base/ tuned/ -o lora/ --rank 16
    adaptsurgery extract base.safetensors tuned.safetensors -o x.safetensors --to kohya --energy 0.9
    adaptsurgery extract base/ tuned/ -o best/ --algorithm auto --budget 2000000 --report r.html

    Both models are read layer by layer: files, folders or Hub names, in shards and dtypes of their
    own. An extraction loses what the adapter cannot hold; each layer's error is told. One that was
    killed goes on where it stopped.
    """
    if sum(given[name] is not None for name in GOALS) != 1:
        raise click.UsageError("one of --rank, --energy, --max-error and --budget")
    options.check_part(given["shard_index"], given["num_shards"])
    from adaptsurgery.jobs.extract.extract import extract

    with output.resumable(quiet, "layers") as tell:
        report = extract(base, tuned, out, progress=tell, **given)
    output.finish(report, as_json, quiet, lambda: _print(report, out))


def _print(report: Report, out: str) -> None:
    facts = report.facts
    output.line("base", facts["base"])
    output.line("fine-tuned", facts["tuned"])
    if facts.get("norm"):
        moved = facts["norm"] / facts["weight"] if facts["weight"] else 0.0
        output.line("change", f"‖D‖ is {moved:.2%} of ‖W‖")
    for name, row in facts.get("by_algorithm", {}).items():
        text = f"error {row['error']:.3g} with {row['parameters']:,} parameters"
        output.line(name, text)
    for note in report.notes:
        output.note(note.code, note.where, note.text)
    output.rows(r for r in report.rows if r.change in ("lossy", "left out"))
    if report.outputs and "bytes" in facts:
        did = f"wrote {output.size(facts['bytes'])} to {output.printable(out)}"
    elif "complete" in facts:
        did = "done already" if facts["complete"] else "this part is done"
    else:
        did = f"dry run: would read {output.size(facts['bytes_read'])}"
    output.verdict(report, did)
