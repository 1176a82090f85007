"""One layer's work: its two weights read, every candidate fitted, and each measured as it is stored."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptsurgery.adapters.updates import modules_of
from adaptsurgery.algorithms import HRA, fitter
from adaptsurgery.checkpoint.bridge import to_torch, torch_dtype
from adaptsurgery.core.law import unknown_update
from adaptsurgery.core.update import Delta, Update
from adaptsurgery.jobs.extract.candidates import SAME, Candidate
from adaptsurgery.jobs.extract.pairs import Pair
from adaptsurgery.jobs.extract.plan import LayerJob
from adaptsurgery.jobs.extract.recipe import DTYPES, ExtractRecipe
from adaptsurgery.jobs.options.extraction import extractable
from adaptsurgery.nearest.goal import SLACK, Fit, Goal, norm_of
from adaptsurgery_formats import ModuleState
from adaptsurgery_formats.errors import ValueRefused
from adaptsurgery_formats.tensors import Tensor as LazyTensor
from adaptsurgery_formats.traits import traits_of

BLOCK = 1 << 20  # numbers of D held in float64 at a time
SPECTRUM = 64  # singular values that are told
CURVE = (0.25, 0.5, 1.0, 2.0)  # of a candidate's parameters
# What only means that a candidate is no good for a layer.
_NO_GOOD = ("out-of-reach", "budget-too-small", "not-loadable")

Read = Callable[[str, Pair], LazyTensor]  # ("base" or "tuned", pair) → its tensor


@dataclass
class FittedLayer:
    """What one candidate came to. ``failed`` says why there is none."""

    algorithm: str
    factor: int | None = None
    compared: bool = False
    error: float = 1.0
    rank: int = 0
    parameters: int = 0
    nbytes: int = 0
    limit: float | None = None
    notes: tuple[str, ...] = ()
    failed: str = ""
    module: Mapping[str, Any] = field(default_factory=dict)

    @property
    def energy(self) -> float:
        """The share of ‖D‖² that is kept."""
        return max(0.0, 1 - self.error**2)


@dataclass
class Measured:
    """A layer's norms, its candidates in the plan's order, and what the report shows of it.

    ``norm`` is ‖D‖, ``weight`` ‖W0‖, ``noise`` what rounding to the coarser of the two stored
    dtypes leaves of a change, about; ``curve`` has an algorithm's (parameters, error) at several
    sizes, ``spectrum`` D's leading singular values.
    """

    norm: float
    weight: float
    noise: float
    found: list[FittedLayer] = field(default_factory=list)
    spectrum: list[float] = field(default_factory=list)
    curve: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measured:
        fits = [FittedLayer(**{**f, "notes": tuple(f["notes"])}) for f in data["found"]]
        return cls(**{**data, "found": fits})


@dataclass(frozen=True)
class Weights:
    """W0 and W1, canonical, in float32 or float64."""

    base: Tensor
    tuned: Tensor

    def blocks(self, change: Callable[[int, int], Tensor] | None = None) -> tuple[float, float]:
        """‖D − D̂‖ and ‖D‖ in float64, where ``change(start, stop)`` gives rows of D̂."""
        base, tuned = self.base.flatten(1), self.tuned.flatten(1)
        step = max(1, BLOCK // base.shape[1])
        missing = total = 0.0
        for start in range(0, len(base), step):
            stop = min(start + step, len(base))
            rows = tuned[start:stop].double() - base[start:stop].double()
            total += float(rows.square().sum())
            if change is not None:
                missing += float((rows - change(start, stop)).square().sum())
        return math.sqrt(missing), math.sqrt(total)


def read_weights(layer: LayerJob, read: Read) -> Weights:
    """Both weights; raises ValueRefused ("non-finite") for NaN and infinity."""
    base, tuned = (
        number_of(read(side, layer.pair), layer.pair, side) for side in ("base", "tuned")
    )
    if layer.turned:
        base, tuned = base.t().contiguous(), tuned.t().contiguous()
    return Weights(base, tuned)


def number_of(
    tensor: LazyTensor, pair: Pair, side: str, way: str = "--exclude leaves layers out"
) -> Tensor:
    """A stored float tensor in float32 at least, all of it finite; ``way`` is out where it is not."""
    values = to_torch(tensor)
    wide = values if values.dtype == torch.float64 else values.float()
    if not bool(wide.isfinite().all()):
        which = "base" if side == "base" else "fine-tuned model"
        raise ValueRefused(
            f"`{pair.label}` of the {which} holds numbers that are not finite",
            next="the checkpoint is damaged, or its training diverged; " + way,
            code="non-finite",
        )
    return wide


def fit_layer(
    layer: LayerJob, read: Read, options: ExtractRecipe
) -> tuple[Measured, dict[str, LazyTensor]]:
    """A layer's candidates, measured, and the tensors of those that may be taken, by "n.slot"."""
    weights = read_weights(layer, read)
    _, norm = weights.blocks()
    weight = float(torch.linalg.vector_norm(weights.base, dtype=torch.float64))
    measured = Measured(norm, weight, noise_of(layer.pair, weights.tuned))
    tensors: dict[str, LazyTensor] = {}
    if norm == 0 and not options.allow_empty:
        return measured, tensors
    work = _Work(layer, weights, norm, options)
    for number, candidate in enumerate(layer.candidates):
        one, module = work.candidate(candidate, measured.found)
        measured.found.append(one)
        if module is not None and not candidate.compared:
            tensors |= {f"{number}.{slot}": t for slot, t in module.tensors.items()}
    measured.spectrum = work.spectrum
    best = _best(measured.found)
    if layer.curve and norm and best is not None:
        measured.curve = work.curve(best.parameters)
        measured.spectrum = work.spectrum
    return measured, tensors


def _best(fits: list[FittedLayer]) -> FittedLayer | None:
    kept = [f for f in fits if not f.failed and not f.compared]
    return min(kept, key=lambda f: f.error, default=None)


def noise_of(pair: Pair, weight: Tensor) -> float:
    """What rounding W to the coarser of the two stored dtypes leaves, about: 0.21·ε·‖W‖.

    A number between 2ᵉ and 2ᵉ⁺¹ is off by up to ε·2ᵉ/2, evenly: ε·2ᵉ/√12 in the mean square, of
    numbers that are spread evenly in their logarithm (E[4ᵉ/w²] = 3/(8·ln 2)).
    """
    coarsest = max(
        (torch.finfo(torch_dtype(s.dtype)).eps for s in (pair.base, pair.tuned)), default=0
    )
    norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    return math.sqrt(3 / (8 * math.log(2)) / 12) * coarsest * norm


class _Work:
    """The fits of one layer."""

    def __init__(
        self, layer: LayerJob, weights: Weights, norm: float, options: ExtractRecipe
    ) -> None:
        self.layer, self.weights, self.norm, self.options = layer, weights, norm, options
        text = f"{options.seed} {layer.label}"  # of neither the order nor the parts
        self.seed = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:4], "little")
        self.spectrum: list[float] = []

    def candidate(
        self, candidate: Candidate, before: list[FittedLayer]
    ) -> tuple[FittedLayer, ModuleState | None]:
        trial = FittedLayer(candidate.algorithm, candidate.factor, candidate.compared)
        goal = self._goal(candidate, before)
        if goal is None:
            trial.failed = "nothing to compare it with"
            return trial, None
        try:
            fit = self._fit(candidate.algorithm, goal, candidate.factor)
        except ValueRefused as error:
            if error.code not in _NO_GOOD:
                raise
            trial.failed = error.what + (f" ({error.seen})" if error.seen else "")
            return trial, None
        self._keep_spectrum(fit)
        update = self._stored(fit.update)
        trial.error = self._error(update)
        trial.rank, trial.parameters = fit.rank, fit.parameters
        trial.limit, trial.notes = fit.limit, fit.notes
        [module] = modules_of(self.layer.path, update, self.layer.component)
        trial.nbytes = sum(t.nbytes for t in module.tensors.values())
        trial.module = {
            "alpha": module.alpha,
            "rule": module.rule,
            "rank": module.rank,
            "options": module.options,
        }
        return trial, module

    def _goal(self, candidate: Candidate, before: list[FittedLayer]) -> Goal | None:
        if candidate.goal == SAME:
            best = _best(before)
            return None if best is None else Goal(budget=best.parameters)
        value = candidate.value
        whole = candidate.goal in ("rank", "budget")
        given: dict[str, Any] = {candidate.goal: int(value) if whole else value}
        return Goal(**given)

    def _fit(self, algorithm: str, goal: Goal, factor: int | None = None) -> Fit:
        own: dict[str, Any] = {}
        wide = any(k != 1 for k in self.layer.shape[2:])
        cored = algorithm == "lokr" or (algorithm == "lora" and self.options.to != "peft")
        if self.options.tucker and wide and cored:
            own["tucker"] = True
        if algorithm == "lokr":
            own["factor"], own["decompose_both"] = factor, self.options.decompose_both
            own["loader"] = "peft" if self.options.to == "peft" else "lycoris"
        if algorithm == "hra":
            own["whole"] = self.options.to == "peft"
        fit: Callable[..., Fit] = fitter(algorithm)
        return fit(self.weights.base, self.weights.tuned, goal, seed=self.seed, **own)

    def _stored(self, update: Update) -> Update:
        """The update in the dtype of the file; reflections lose their small angles below float32."""
        if isinstance(update, HRA):
            return HRA(update.u.float(), update.apply_gs)
        if not isinstance(update, Delta):
            raise unknown_update(update, "an extraction")
        dtype = torch_dtype(DTYPES[self.options.dtype])
        stored = update.cast(dtype)
        if not all(bool(t.isfinite().all()) for t in stored.tensors().values()):
            raise ValueRefused(
                f"`{self.layer.label}`: a factor does not fit in {self.options.dtype}",
                next="--dtype fp32 or bf16",
                code="out-of-range",
            )
        return stored

    def _error(self, update: Update) -> float:
        """‖D − D̂‖/‖D‖ of what is stored, in float64; 0 where D is 0, and D̂ but for rounding."""
        missing, total = self.weights.blocks(_change(update, self.weights.base))
        if total:
            return missing / total
        assert missing <= SLACK * norm_of(self.weights.base), "a change where there was none"
        return 0.0

    def _keep_spectrum(self, fit: Fit) -> None:
        if fit.spectrum is not None and len(fit.spectrum) > len(self.spectrum):
            self.spectrum = [float(s) for s in fit.spectrum[:SPECTRUM]]

    def curve(self, parameters: int) -> dict[str, list[tuple[int, float]]]:
        """Each algorithm's error at several numbers of parameters."""
        curves: dict[str, list[tuple[int, float]]] = {}
        for algorithm in extractable():
            if self.layer.kind == "embedding" and not traits_of(algorithm).adds:
                continue
            points = {
                p for share in CURVE if (p := self._point(algorithm, int(share * parameters)))
            }
            if points:
                curves[algorithm] = sorted(points)
        return curves

    def _point(self, algorithm: str, budget: int) -> tuple[int, float] | None:
        try:
            fit = self._fit(algorithm, Goal(budget=max(1, budget)))
        except ValueRefused:
            return None
        self._keep_spectrum(fit)
        return fit.parameters, fit.error


def _change(update: Update, base: Tensor) -> Callable[[int, int], Tensor]:
    """Rows of D̂ in float64."""
    if isinstance(update, Delta):
        ready = update.prepared(torch.float64)
        return lambda start, stop: update.scale * ready.rows(start, stop, torch.float64)
    matrix = base.flatten(1)

    def turned(start: int, stop: int) -> Tensor:
        rows = matrix[start:stop].double()
        return update.fold(rows) - rows

    return turned


def dense_norms(
    pair: Pair, slot: str, read: Read, dtype: str, allowed: bool = False
) -> dict[str, float]:
    """‖D‖, ‖W0‖, and what storing D in ``dtype`` loses, of a parameter that is no adapted weight.

    Of a grown table the rows that both have; a parameter of another shape, of another kind of
    numbers, or that is new has no D that could be measured: NaN is told as -1, and so is the D of
    what is left out anyway and not finite, as a mask's infinities are.
    """
    if pair.new or pair.base.dtype[0] not in "FB" or pair.tuned.dtype[0] not in "FB":
        return _unmeasured(pair, read)
    way = "--no-dense leaves out all that is no layer"
    try:
        base, tuned = (
            number_of(read(side, pair), pair, side, way).double() for side in ("base", "tuned")
        )
    except ValueRefused:
        if slot and not allowed:
            raise
        return _unmeasured(pair, read)
    if base.shape != tuned.shape:
        if base.shape[1:] != tuned.shape[1:]:
            return {"norm": -1.0, "weight": 0.0, "lost": 0.0}
        rows = min(len(base), len(tuned))
        base, tuned = base[:rows], tuned[:rows]
    change = tuned - base
    lost = 0.0
    if slot not in ("", "saved"):
        lost = float((change.to(torch_dtype(DTYPES[dtype])).double() - change).norm())
    return {"norm": float(change.norm()), "weight": float(base.norm()), "lost": lost}


def _unmeasured(pair: Pair, read: Read) -> dict[str, float]:
    same = not pair.new and read("base", pair).read() == read("tuned", pair).read()
    return {"norm": 0.0 if same else -1.0, "weight": 0.0, "lost": 0.0}
