"""The report's pictures, as SVG that takes its ink from the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from adaptsurgery_formats.traits import TRAITS, title_of

Told = dict[str, Any]
INK = "#010203"  # becomes currentColor
# Told apart by lightness too, and readable on white and on near-black.
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#eab308", "#ef4444", "#14b8a6", "#ec4899")
_STYLE: Any = {
    "svg.fonttype": "none", "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "grid.color": INK, "grid.alpha": 0.12, "axes.grid": True,
    "axes.axisbelow": True, "font.family": "sans-serif", "legend.frameon": False,
    "axes.titlesize": 9.5,
}  # fmt: skip


def errors(layers: Sequence[Told], total: float) -> str:
    """Each layer's relative error, and its part of ‖D‖², of which the adapter keeps the filled part."""
    with _styled():
        figure = Figure(figsize=(9.6, 5.0), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        groups = _groups(layers)
        for number, (name, places) in enumerate(groups.items()):
            above.plot(
                places,
                [layers[i]["error"] for i in places],
                "o",
                markersize=_dot(layers),
                color=COLOURS[number % len(COLOURS)],
                label=name,
            )
        above.set(ylabel="relative error\n‖D − D̂‖ / ‖D‖", ylim=(0, _top(layers)))
        if 1 < len(groups) <= len(COLOURS):
            above.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.2)
        shares = [100 * (r["norm"] / total) ** 2 if total else 0.0 for r in layers]
        kept = [s * r["energy"] for s, r in zip(shares, layers)]
        places = list(range(len(layers)))
        lost = [s - k for s, k in zip(shares, kept)]
        below.bar(places, kept, width=0.8, color=COLOURS[2], label="kept")
        below.bar(places, lost, bottom=kept, width=0.8, color=INK, alpha=0.22, label="lost")
        below.set(
            ylabel="% of ‖D‖²",
            xlabel="layers, in the model's order",
            xlim=(-0.7, len(layers) - 0.3),
        )
        below.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _svg(figure, "errors")


def _top(layers: Sequence[Told]) -> float:
    most = max((r["error"] for r in layers), default=1.0)
    return 1.05 * most if most else 1.0


def _dot(layers: Sequence[Told]) -> float:
    return 5.0 if len(layers) < 80 else 3.0 if len(layers) < 400 else 1.8


def _groups(layers: Sequence[Told]) -> dict[str, list[int]]:
    """The layers by the last part of their name; all in one where there are too many of those."""
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(layers):
        named = [part for part in row["name"].split(".") if not part.isdigit()]
        groups.setdefault(named[-1] if named else row["name"], []).append(place)
    return groups if len(groups) <= len(COLOURS) else {"": list(range(len(layers)))}


def spectra(layers: Sequence[Told]) -> str:
    """The singular values of a few layers' D, and the rank that was taken."""
    with _styled():
        figure, axes = _row_of(len(layers), 2.6)
        for axis, row in zip(axes, layers):
            values = [s for s in row["spectrum"] if s > 0]
            first = values[0] if values else 1.0
            axis.semilogy(
                range(1, len(values) + 1),
                [s / first for s in values],
                ".-",
                color=COLOURS[0],
                markersize=3.5,
                linewidth=1,
            )
            if row["algorithm"] == "lora" and row["rank"] <= len(values):
                axis.axvline(row["rank"] + 0.5, color=COLOURS[1], linestyle="--", linewidth=1.2)
                axis.text(
                    row["rank"] + 0.5,
                    0.03,
                    f" rank {row['rank']}",
                    color=COLOURS[1],
                    transform=axis.get_xaxis_transform(),
                    fontsize=8.5,
                )
            axis.set(xlabel="i", title=_short(row["name"]))
        axes[0].set_ylabel("σᵢ / σ₁ of D")
        return _svg(figure, "spectra")


def curves(layers: Sequence[Told]) -> str:
    """Error against parameters, for each algorithm, on a few layers."""
    with _styled():
        figure, axes = _row_of(len(layers), 3.0)
        for axis, row in zip(axes, layers):
            for name, points in row["curve"].items():
                style: Told = {"color": _colour(name), "label": title_of(name), "markersize": 4.0}
                axis.plot(*zip(*points), "o-", linewidth=1.4, **style)
            axis.plot(
                [row["parameters"]],
                [row["error"]],
                "o",
                markersize=10,
                fillstyle="none",
                color=INK,
                label="taken",
            )
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda x, _: _count(x))
            axis.minorticks_off()
            axis.set(xlabel="parameters", title=_short(row["name"]))
        axes[0].set_ylabel("relative error")
        axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _svg(figure, "curves")


def _colour(algorithm: str) -> str:
    return COLOURS[list(TRAITS).index(algorithm) % len(COLOURS)]


def _count(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.{int(number < 10 * size)}f} {unit}"
    return f"{number:.0f}"


def _short(name: str) -> str:
    return name if len(name) <= 34 else "…" + name[-33:]


def _row_of(count: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.6, height), layout="constrained")
    axes = figure.subplots(1, max(count, 1), squeeze=False, sharey=True)
    return figure, list(axes[0])


def _styled() -> Any:
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def _svg(figure: Figure, salt: str) -> str:
    """The figure for a page: no background, the page's own ink and font, the same bytes each time."""
    import matplotlib

    figure.patch.set_alpha(0)
    for axis in figure.axes:
        axis.patch.set_alpha(0)
    held = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(held, metadata={"Date": None, "Creator": None})
    text = held.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{salt}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text)
    )
