"""The work of an extraction as plain data: one job a layer, built from headers alone.

A plan's digest names the work: the same inputs and options give the same plan, which is how a
killed run is taken up again, and how several machines do parts of one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from adaptsurgery.checkpoint.base import Base
from adaptsurgery.jobs.extract.candidates import Candidate, candidates_of
from adaptsurgery.jobs.extract.pairs import Pair, Paired
from adaptsurgery.jobs.extract.recipe import ExtractRecipe
from adaptsurgery.jobs.extract.selection import Chosen, Dense, Selection, select
from adaptsurgery.jobs.inputs import Input, base_input
from adaptsurgery_formats.errors import ShapeError, ValueRefused
from adaptsurgery_formats.tensors import FLOAT_DTYPES, bytes_of

VERSION = 1
CURVES = 3  # layers whose error is told for several numbers of parameters
_TORCH = 290 << 20  # what torch itself holds, and its scratch
_HELD = {"hra": 24}  # float32 layers at most, by algorithm; 10 for others (measured)


@dataclass(frozen=True)
class LayerJob:
    """A weight that becomes an adapter's module. ``shape`` is canonical, (o, i, *k).

    ``turned``: stored (i, o). ``candidates`` are the updates to fit, of which one is taken for it,
    or one for all layers; those that are only ``compared`` are measured and not kept. ``curve``:
    its error is measured at several sizes too.
    """

    path: str
    component: str
    kind: str
    shape: tuple[int, ...]
    turned: bool
    pair: Pair
    candidates: tuple[Candidate, ...]
    curve: bool = False

    @property
    def label(self) -> str:
        return f"{self.component}.{self.path}" if self.component else self.path

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


Job = LayerJob | tuple[Dense, ...]


@dataclass(frozen=True)
class ExtractPlan:
    """Everything that has to be done, and for what."""

    base: str
    tuned: str
    base_files: tuple[Input, ...]
    tuned_files: tuple[Input, ...]
    options: ExtractRecipe
    layers: tuple[LayerJob, ...]
    dense: tuple[tuple[Dense, ...], ...]
    notes: tuple[tuple[str, str, str], ...] = ()
    version: int = VERSION

    @property
    def jobs(self) -> list[Job]:
        """The layers in the model's order, then the rest in handfuls."""
        return [*self.layers, *self.dense]

    @property
    def digest(self) -> str:
        return _sha256(asdict(self))

    @property
    def identity(self) -> str:
        """The digest of what decides the numbers: not of paths or times of files."""
        held = {**asdict(self), "base": "", "tuned": "", "notes": ()}
        for side in ("base_files", "tuned_files"):
            held[side] = [(f["size"], f["sha256"]) for f in held[side]]
        return _sha256(held)

    @property
    def nbytes(self) -> int:
        """Bytes that are read, of both checkpoints."""
        pairs = [layer.pair for layer in self.layers] + [
            d.pair for group in self.dense for d in group
        ]
        sides = [side for pair in pairs for side in (pair.base, pair.tuned)]
        return sum(bytes_of(s.dtype, s.shape) for s in sides)

    def peak_memory(self, workers: int) -> int:
        """Bytes that carrying it out should hold at most, torch included: some ten largest layers.

        HRA, which works in float64 on a square of the inputs, holds some twenty.
        """
        held = [
            layer.numbers * max(_HELD.get(c.algorithm, 10) for c in layer.candidates)
            for layer in self.layers
        ]
        return _TORCH + workers * 4 * max(held, default=0)


def _sha256(data: object) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def plan_extraction(base: Base, tuned: Base, paired: Paired, options: ExtractRecipe) -> ExtractPlan:
    """The plan for paired checkpoints.

    Raises ShapeError ("shapes-differ") for layers of different shapes, ValueRefused for weights
    that are not floating ("bad-dtype"), and what ``select`` raises.
    """
    selection = select(base, tuned, paired, options)
    _refuse_shapes(selection, tuned)
    _refuse_dtypes(selection, tuned)
    layers = _layers(selection, options)
    return ExtractPlan(
        base.where,
        tuned.where,
        tuple(base_input(base, file) for file in base.files),
        tuple(base_input(tuned, file) for file in tuned.files),
        options,
        layers,
        tuple(_handfuls(selection.dense)),
        tuple((n.code, n.where, n.text) for n in [*paired.notes, *selection.notes]),
    )


def _refuse_shapes(selection: Selection, tuned: Base) -> None:
    wrong = [c for c in selection.chosen if c.pair.base.shape != c.pair.tuned.shape]
    if wrong:
        raise ShapeError(
            f"{len(wrong)} layers have another shape in the fine-tuned model",
            where=tuned.where,
            items=[
                f"`{c.pair.label}`: {_shown(c.pair.base.shape)} and {_shown(c.pair.tuned.shape)}"
                for c in wrong
            ],
            next="is it a fine-tune of this base? --exclude leaves layers out",
            code="shapes-differ",
        )


def _shown(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "one number"


def _refuse_dtypes(selection: Selection, tuned: Base) -> None:
    wrong = [
        f"`{c.pair.label}`: {c.pair.base.dtype} and {c.pair.tuned.dtype}"
        for c in selection.chosen
        if not {c.pair.base.dtype, c.pair.tuned.dtype} <= {*FLOAT_DTYPES}
    ]
    if wrong:
        raise ValueRefused(
            f"{len(wrong)} layers are not stored as floating-point weights",
            where=tuned.where,
            items=wrong,
            next="dequantise the model first, or --exclude them",
            code="bad-dtype",
        )


def _layers(selection: Selection, options: ExtractRecipe) -> tuple[LayerJob, ...]:
    chosen = selection.chosen
    given = candidates_of(chosen, options, selection.notes)
    curves = _curves(chosen) if options.curves else set()
    return tuple(
        LayerJob(
            c.path,
            c.pair.component,
            c.kind,
            c.shape,
            c.turned,
            c.pair,
            given[c.label],
            c.label in curves,
        )
        for c in chosen
    )


def _curves(chosen: list[Chosen]) -> set[str]:
    """A few layers of different sizes: the largest, and from along the model."""
    by_shape: dict[tuple[int, ...], list[Chosen]] = {}
    for c in chosen:
        by_shape.setdefault(c.shape, []).append(c)
    picked = [group[len(group) // 2] for group in by_shape.values()][:CURVES]
    rest = [c for c in chosen if c not in picked]
    picked += rest[: CURVES - len(picked)]
    return {c.label for c in picked}


def _handfuls(dense: Iterable[Dense]) -> list[tuple[Dense, ...]]:
    """Dense parameters in groups of at most 64, and of about 4 M numbers."""
    groups: list[tuple[Dense, ...]] = []
    held: list[Dense] = []
    size = 0
    for one in dense:
        held.append(one)
        size += math.prod(one.pair.base.shape)
        if len(held) == 64 or size > 1 << 22:
            groups.append(tuple(held))
            held, size = [], 0
    return [*groups, tuple(held)] if held else groups
