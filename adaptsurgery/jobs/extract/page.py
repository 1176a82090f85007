"""The report as one file: a page that needs nothing but a browser, or all figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adaptsurgery.adapters.report import Report
from adaptsurgery_formats.errors import FileError, LayoutError
from adaptsurgery_formats.traits import title_of

Told = dict[str, Any]
HARDEST = 15
SPECTRA = 4


def check_form(path: Path) -> Path:
    """Refuse, before any work, a report that could not be made.

    Raises FileError, and LayoutError "report-extra" where matplotlib is missing.
    """
    if path.suffix not in (".html", ".json"):
        better = path.with_suffix(".html") if path.name else path / "report.html"
        raise FileError(
            "a report is an .html page or a .json file",
            where=str(path),
            code="bad-name",
            next=f"--report {better}",
        )
    if path.suffix == ".html" and find_spec("matplotlib") is None:
        raise LayoutError(
            "the page's plots need matplotlib",
            next='pip install "adaptsurgery[report]", or a report that ends in .json',
            code="report-extra",
        )
    return path


def text_of(report: Report, suffix: str) -> str:
    """The report as a page, or as JSON where that is what its file's name ends in."""
    if suffix == ".json":
        return json.dumps(report.as_dict(), indent=1, ensure_ascii=False)
    return page(report)


def page(report: Report) -> str:
    """The page, with its pictures in it."""
    facts = report.facts
    layers = [r for r in facts["layers"] if r["algorithm"] and r["norm"]]
    title = f"{Path(facts['tuned']).name} as an adapter of {Path(facts['base']).name}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p class=lead>{escape(report.verdict)}</p>",
        _cards(facts),
        _notes(report),
        _pictures(layers, facts),
        _hardest(layers, facts),
        _elsewhere(facts),
        _all_layers(layers),
        f"<footer>D = W₁ − W₀ is what fine-tuning changed, D̂ what the adapter makes of it; energy is "
        f"1 − (‖D − D̂‖/‖D‖)². Base {escape(facts['base'])}, fine-tuned {escape(facts['tuned'])}, "
        f"seed {facts['seed']}.</footer>",
    ]
    return _SHELL.format(title=escape(title), style=_STYLE, body="\n".join(filter(None, parts)))


def _cards(facts: Told) -> str:
    algorithms = " + ".join(title_of(a) for a in facts["algorithms"]) or "–"
    ranks = facts["ranks"]
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}" if ranks else "–"
    shown = [
        ("algorithm", algorithms),
        ("rank", rank),
        ("relative error", f"{facts['layers_error']:.3g}"),
        ("energy kept", f"{1 - facts['layers_error'] ** 2:.1%}"),
        ("error, whole model", f"{facts['error']:.3g}"),
        ("layers", f"{facts['modules']}"),
        ("parameters", f"{facts['parameters']:,}"),
        ("file", _size(facts["bytes"])),
        ("‖D‖ / ‖W‖", f"{facts['norm'] / facts['weight']:.2%}" if facts["weight"] else "–"),
    ]
    cards = "".join(f"<div><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in shown)
    return f"<section class=cards>{cards}</section>"


def _notes(report: Report) -> str:
    if not report.notes:
        return ""
    items = "".join(
        f"<li><code>{escape(n.code)}</code> {escape(n.text)}</li>" for n in report.notes
    )
    return f"<section><h2>Warnings and notes</h2><ul class=notes>{items}</ul></section>"


def _pictures(layers: Sequence[Told], facts: Told) -> str:
    from adaptsurgery.jobs.extract import plots

    if not layers:
        return ""
    parts = [
        _figure(
            "Error and energy of each layer",
            plots.errors(layers, facts["norm"]),
            "Above, how much of each layer's change is lost. Below, how much of the whole change "
            "each layer holds, and how much of that the adapter keeps.",
        )
    ]
    curved = [r for r in layers if r["curve"]]
    if curved:
        parts.append(
            _figure(
                "Parameters against error",
                plots.curves(curved),
                "What each algorithm makes of the same change, on layers of different shapes. The "
                "ring is what was taken.",
            )
        )
    seen = _with_spectra(layers)
    if seen:
        parts.append(
            _figure(
                "Singular values of the change",
                plots.spectra(seen),
                "A steep fall means that a low rank says nearly all; a flat line that no low rank "
                "can. The dashed line is the rank taken: what is right of it is lost.",
            )
        )
    return "\n".join(parts)


def _with_spectra(layers: Sequence[Told]) -> list[Told]:
    """A few layers with spectra: those with curves first, then the ones that lose the most."""
    known = [r for r in layers if len(r["spectrum"]) > 1]
    known = [r for r in known if len(r["spectrum"]) > r.get("rank", 0)] or known  # that show a loss
    return sorted(known, key=lambda r: (not r["curve"], -r["error"] * r["norm"]))[:SPECTRA]


def _figure(title: str, svg: str, text: str) -> str:
    return f"<section><h2>{title}</h2><p>{text}</p><figure>{svg}</figure></section>"


_HEADS = ("layer", "shape", "algorithm", "rank", "parameters", "error", "energy", "of what is lost")


def _hardest(layers: Sequence[Told], facts: Told) -> str:
    lost = sum((r["error"] * r["norm"]) ** 2 for r in layers)
    worst = sorted(layers, key=lambda r: -r["error"] * r["norm"])[:HARDEST]
    if not lost:
        return ""
    rows = [[*_cells(r), f"{(r['error'] * r['norm']) ** 2 / lost:.1%}"] for r in worst]
    table = _table(_HEADS, rows)
    return f"<section><h2>The hardest layers</h2><p>Those that lose the most.</p>{table}</section>"


def _cells(row: Told) -> list[str]:
    algorithm = title_of(str(row["algorithm"])) if row["algorithm"] else ""
    algorithm += f" {row['factor']}" if row.get("factor") is not None else ""
    shape = "×".join(map(str, row["shape"]))
    return [
        row["name"],
        shape,
        algorithm,
        str(row["rank"]),
        f"{row['parameters']:,}",
        f"{row['error']:.3g}",
        f"{row['energy']:.1%}",
    ]


def _elsewhere(facts: Told) -> str:
    """What is beside the adapter's layers: other algorithms, dense parts, what is left out."""
    parts = []
    if len(facts["by_algorithm"]) > 1:
        rows = [
            [
                title_of(n),
                f"{int(t['parameters']):,}",
                f"{t['error']:.3g}",
                f"{1 - t['error'] ** 2:.1%}",
            ]
            for n, t in sorted(facts["by_algorithm"].items(), key=lambda item: item[1]["error"])
        ]
        table = _table(("algorithm", "parameters", "error", "energy"), rows)
        parts.append(f"<section><h2>The algorithms, over all layers</h2>{table}</section>")
    if facts["dense"]:
        rows = [
            [
                d["name"],
                d["kind"],
                "whole" if d["slot"] == "saved" else d["slot"],
                f"{max(d['norm'], 0):.3g}",
            ]
            for d in facts["dense"]
        ]
        parts.append(
            _folded("Kept dense", _table(("parameter", "kind", "as", "‖D‖"), rows), len(rows))
        )
    if facts["left_out"]:
        rows = [
            [d["name"], d["reason"], "–" if d["norm"] < 0 else f"{d['share']:.2%}"]
            for d in facts["left_out"]
        ]
        parts.append(_folded("Left out", _table(("parameter", "why", "of ‖D‖²"), rows), len(rows)))
    return "\n".join(parts)


def _all_layers(layers: Sequence[Told]) -> str:
    if len(layers) <= HARDEST:
        return ""
    rows = [_cells(r) for r in layers]
    return _folded("All layers", _table(_HEADS[:-1], rows), len(rows))


def _folded(title: str, table: str, count: int) -> str:
    return f"<details><summary>{title} ({count})</summary>{table}</details>"


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _size(count: int) -> str:
    value, units = float(count), ["B", "kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --line: #d8dde3; --paper: #fff;
  --card: #f5f7f9; --warn: #b45309; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa4b0; --line: #343b44; --paper: #14171b; --card: #1d2228;
    --warn: #fbbf24; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem }
p, footer { color: var(--soft); margin: .2rem 0 .8rem; max-width: 48rem }
.lead { color: var(--ink) }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .6rem;
  margin: 1.2rem 0 }
.cards div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .6rem .8rem }
.cards b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums }
.cards span { color: var(--soft); font-size: .85rem }
.notes { padding-left: 1.1rem; margin: .3rem 0 } .notes code { color: var(--warn) }
figure { margin: 0 } svg { width: 100%; height: auto; color: var(--ink) }
svg text { font-family: system-ui, sans-serif !important }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .9rem }
th { text-align: left; color: var(--soft); font-weight: 500 }
td, th { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap;
  font-variant-numeric: tabular-nums }
details { margin: 1.2rem 0 } summary { cursor: pointer; font-weight: 600 }
footer { margin-top: 3rem; font-size: .85rem; overflow-wrap: anywhere }
"""
_SHELL = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
