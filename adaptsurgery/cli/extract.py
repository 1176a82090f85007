"""``adaptsurgery extract``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptsurgery.cli import output
from adaptsurgery.cli.options import ALLOW_NONFINITE, TARGETS, Extractable

if TYPE_CHECKING:
    from adaptsurgery.adapters.report import Report

INTERRUPTED = 130


def _ranks(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str, int]:
    """NAME=N pairs."""
    found = {}
    for text in value:
        name, sign, number = text.rpartition("=")
        if not sign or not name or not number.isdecimal() or not int(number):
            raise click.BadParameter(f"{text!r} is not NAME=N", ctx, param)
        found[name] = int(number)
    return found


@click.command()
@click.argument("base", metavar="BASE")
@click.argument("tuned", metavar="TUNED")
@click.option(
    "-o", "--output", "out", required=True, metavar="OUT", help="A folder for peft, else a file."
)
@click.option(
    "--algorithm",
    default="lora",
    show_default=True,
    type=Extractable(),
    help="auto: each layer's best at one number of parameters; for peft the best over all.",
)
@click.option("--rank", type=click.IntRange(min=1), help="One goal: a rank,")
@click.option("--energy", type=float, metavar="E", help="the share of ‖D‖² each layer keeps, 0.9,")
@click.option("--max-error", type=float, metavar="E", help="each layer's ‖D − D̂‖/‖D‖ at most,")
@click.option("--budget", type=click.IntRange(min=1), metavar="N", help="or parameters in all.")
@click.option("--to", default="peft", show_default=True, type=click.Choice(TARGETS))
@click.option("--factor", type=int, help="LoKr's decompose_factor.")
@click.option("--decompose-both", is_flag=True, help="LoKr: w1 in two factors too.")
@click.option(
    "--conv-rank", type=click.IntRange(min=1), metavar="N", help="Of kernels other than 1."
)
@click.option(
    "--tucker",
    is_flag=True,
    help="A Tucker core on kernels other than 1: LoKr, and LoRA but in PEFT.",
)
@click.option("--include", multiple=True, metavar="P", help="Layers to adapt: PEFT's rules.")
@click.option("--exclude", multiple=True, metavar="P", help="Layers to leave out.")
@click.option(
    "--rank-pattern", multiple=True, callback=_ranks, metavar="NAME=N", help="A layer's own rank."
)
@click.option(
    "--dtype",
    default="fp32",
    show_default=True,
    type=click.Choice(["fp32", "bf16", "fp16"]),
    help="What factors are stored in; the errors told are of these.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of all that is random.")
@click.option(
    "--dense/--no-dense",
    default=True,
    help="Keep biases, norms, embeddings, heads as they are, as far as the layout can.",
)
@click.option("--compare", is_flag=True, help="Measure the other algorithms at the same size.")
@click.option("--report", metavar="FILE", help="A page to look at, .html, or all figures, .json.")
@click.option("--allow-empty", is_flag=True, help="Write zeros where nothing differs.")
@ALLOW_NONFINITE
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is there.")
@click.option("--dry-run", is_flag=True, help="Plan and tell, from headers alone.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--shard-index", type=click.IntRange(min=0), default=0, metavar="I")
@click.option(
    "--num-shards",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Cut the work into N parts; the last one done writes OUT.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
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
    """  # fmt: skip
    goals = ("rank", "energy", "max_error", "budget")
    if sum(given[name] is not None for name in goals) != 1:
        raise click.UsageError("one of --rank, --energy, --max-error and --budget")
    if given["shard_index"] >= given["num_shards"]:
        raise click.UsageError(
            f"--shard-index {given['shard_index']} with --num-shards {given['num_shards']}"
        )
    from adaptsurgery.jobs.extract.extract import extract

    with output.progress(quiet) as tell:
        try:
            report = extract(base, tuned, out, progress=tell, **given)
        except KeyboardInterrupt:
            output.interrupted("finished layers are kept: the same command goes on from them")
            raise SystemExit(INTERRUPTED) from None
    if as_json:
        output.print_json({"ok": True, **report.as_dict(), "peak_memory": output.peak_memory()})
    elif not quiet:
        _print(report, out)


def _print(report: Report, out: str) -> None:
    facts = report.facts
    output.line("base", facts["base"])
    output.line("fine-tuned", facts["tuned"])
    if facts.get("norm"):
        moved = facts["norm"] / facts["weight"] if facts["weight"] else 0.0
        output.line("change", f"‖D‖ is {moved:.2%} of ‖W‖")
    for name, told in facts.get("by_algorithm", {}).items():
        text = f"error {told['error']:.3g} with {told['parameters']:,} parameters"
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
    parts = [report.verdict, did, *output.peak()]
    click.echo(output.paint(" · ".join(parts), "green" if report.outputs else "yellow"))
