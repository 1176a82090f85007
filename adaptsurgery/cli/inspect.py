"""``adaptsurgery inspect``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import click

from adaptsurgery.cli import output

if TYPE_CHECKING:
    from adaptsurgery.jobs.inspect import Inspection

_VALUE = 100  # characters of a metadata value that the text shows
_MANY = 12  # entries of a distribution that the text shows


@click.command()
@click.argument("path", metavar="PATH")
@click.option(
    "--base",
    metavar="BASE",
    help="The model that it is for: a safetensors file, a folder, a Hub name, or sd15, sd2, sdxl, "
    "flux. Without one, names that no bundled list has are shown as they stand.",
)
@click.option("--hashes", is_flag=True, help="Read the data too: sha256, and whether kohya's hold.")
@output.json_option
def command(path: str, base: str | None, hashes: bool, as_json: bool) -> None:
    """Tell what the adapter PATH is, from its header alone.

    \b
    adaptsurgery inspect style.safetensors
    adaptsurgery inspect adapter/ --base model/ --json

    Layout, algorithms, ranks, alphas and the scales that follow from them, targets, dtypes,
    metadata, hashes, where it can be converted to, and who reads it as it is.
    """
    from adaptsurgery.jobs.inspect import inspect

    inspection = inspect(path, base=base, hashes=hashes)
    if as_json:
        output.print_json({"ok": True, **inspection.as_dict()})
    else:
        _print(inspection)


def _print(inspection: Inspection) -> None:
    click.echo(output.paint(output.printable(inspection.path), "white", bold=True))
    output.line("layout", f"{inspection.layout['title']}, by {inspection.layout['known_by']}")
    output.line("", f"such as `{inspection.layout['example']}`")
    output.line("model", _model(inspection))
    output.line("modules", _modules(inspection))
    output.line("algorithm", _algorithms(inspection))
    if inspection.ranks:
        output.line("rank", _counts(inspection.ranks))
    if inspection.alphas:
        output.line("alpha", _counts(inspection.alphas))
    for entry in inspection.scales[:_MANY]:
        output.line("scale", _scale(entry))
    if len(inspection.scales) > _MANY:
        output.line("", f"… and {len(inspection.scales) - _MANY} more; --json lists all")
    output.line("targets", _counts(inspection.targets))
    if inspection.saved:
        output.line("replaced", ", ".join(s["name"] for s in inspection.saved[:_MANY]))
    output.line("dtypes", _counts(inspection.dtypes))
    output.line("size", _size(inspection))
    _print_hashes(inspection.hashes)
    for target, answer in inspection.convertible.items():
        output.line(f"to {target}", _convertible(answer))
    for label, verdict in zip(_labels("read by"), inspection.readers.values()):
        output.line(label, _reader(verdict))
    for key, value in inspection.metadata.items():
        output.line("metadata", f"{key} = {_shortened(value)}")
    for note in inspection.notes:
        output.note(note["code"], note["where"], note["text"])


def _model(inspection: Inspection) -> str:
    if inspection.model:
        return f"{inspection.model['name'] or 'its own'}, by {inspection.model['source']}"
    if any(m["naming"] == "flat" for m in inspection.modules):
        return "in no bundled list; --base MODEL tells the flat names apart"
    return "names as they stand in the file"


def _modules(inspection: Inspection) -> str:
    if len(inspection.components) == 1:
        (name,) = inspection.components
        return f"{len(inspection.modules)} of {name}" if name else str(len(inspection.modules))
    parts = ", ".join(f"{name or '?'} {count}" for name, count in inspection.components.items())
    return f"{len(inspection.modules)}: {parts}"


def _algorithms(inspection: Inspection) -> str:
    parts = [_counts(inspection.algorithms)]
    parts += [f"DoRA by {axis}put ({count})" for axis, count in inspection.dora.items()]
    parts += [f"tucker ({inspection.tucker})"] if inspection.tucker else []
    return ", ".join(parts)


def _counts(counts: Mapping[str, int]) -> str:
    """``to_q (12), to_k (12)``; a lone entry needs no count."""
    if len(counts) == 1:
        return next(iter(counts))
    shown = [f"{name} ({count})" for name, count in list(counts.items())[:_MANY]]
    more = [f"… {len(counts) - _MANY} more"] if len(counts) > _MANY else []
    return ", ".join(shown + more)


def _scale(entry: Mapping[str, Any]) -> str:
    """``0.5 = alpha/r = 8/16 (264)``."""
    scale, rule, count = entry["scale"], entry["rule"], entry["modules"]
    if rule == "none":
        return f"{scale:g}, the algorithm has none ({count})"
    if not rule.startswith("alpha/"):
        return f"{rule} ({count})"
    alpha, rank = f"{entry['alpha']:g}", entry["rank"]
    numbers = f"{alpha}/sqrt({rank})" if "sqrt" in rule else f"{alpha}/{rank}"
    return f"{scale:g} = {rule} = {numbers} ({count})"


def _size(inspection: Inspection) -> str:
    count = f"{inspection.parameters:,} parameters"
    return f"{output.size(inspection.bytes)} in {inspection.tensors} tensors, {count}"


def _print_hashes(hashes: Mapping[str, Any]) -> None:
    for key, value in hashes["recorded"].items():
        stale = hashes["stale"]
        verdict = "" if stale is None else ", stale" if key in stale else ", right"
        output.line("recorded", f"{key} {value}{verdict}")
    for key, value in hashes["computed"].items():
        output.line("computed", f"{key} {value}")
    for where, value in hashes["sha256"].items():
        name = f" {where}" if len(hashes["sha256"]) > 1 else ""
        output.line("sha256", value + name)


def _convertible(answer: Mapping[str, Any]) -> str:
    if answer["how"] == "refused":
        return f"no [{answer['code']}]: {answer['why']}"
    if answer["how"] == "rewritten":
        return f"exact up to one rounding: {', '.join(answer['steps'])}"
    return "exact"


def _labels(first: str) -> Iterator[str]:
    """The label of the first of several lines, and none for the others."""
    return chain((first,), repeat(""))


def _reader(verdict: Mapping[str, Any]) -> str:
    """``LyCORIS, 3 of 4 modules: leaves out a bias difference beside another adapter (1)``."""
    if verdict["how"] == "whole":
        return f"{verdict['title']}, whole"
    reasons = "; ".join(_reason(reason, verdict["modules"]) for reason in verdict["reasons"])
    if verdict["how"] == "nothing":
        return f"{verdict['title']}: no, {reasons}"
    return f"{verdict['title']}, {verdict['read']} of {verdict['modules']} modules: {reasons}"


_FATES = {"fails": "fails at ", "drops": "leaves out ", "misreads": "reads without ", "refuses": ""}


def _reason(reason: Mapping[str, Any], modules: int) -> str:
    count = f" ({reason['modules']})" if reason["modules"] < modules else ""
    return f"{_FATES[reason['fate']]}{reason['what']}{count}"


def _shortened(value: str) -> str:
    if len(value) <= _VALUE:
        return value
    return f"{value[:_VALUE]}… ({len(value)} characters)"
