"""One adapter equal to the weighted sum Σ w·s·Δ of several, of any algorithms, layouts and ranks.

- A layer that one adapter has, at weight 1, is taken as it is, byte for byte; at another weight
  only its alpha changes (and a factor's sign), and so do equal factors that come several times.
- Different low-rank Δ on a layer become one LoRA, exactly: ranks side by side,
  (c₁·up₁ c₂·up₂ …)·(down₁; down₂; …), LoHa and LoKr through their LoRA forms. No cross-terms.
- A dense difference takes up whatever else is added on its layer: readers expect one of the two.
- HRA turn one after the other, W·R₁·R₂; beside a Δ they need the base's weight to become a LoRA.
- A DoRA renormalises whatever it stands on, so it stays alone on its layer.

Numbers keep their dtype where the result is exact in it, and are float32 where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptsurgery.checkpoint.bridge import from_torch, to_torch, torch_dtype
from adaptsurgery.jobs import lowrank
from adaptsurgery.jobs.change import EXACT, as_lora
from adaptsurgery.jobs.convert import Progress, check_paths, writable, write_adapter
from adaptsurgery.jobs.loading import Loaded
from adaptsurgery.jobs.lowrank import Spec, in_naming, is_low_rank, lora_form, prefix_of
from adaptsurgery.jobs.merging.adapters import Named, split_weight
from adaptsurgery.jobs.report import Report, Row
from adaptsurgery.jobs.steps import stored
from adaptsurgery.jobs.updates import update_of
from adaptsurgery.jobs.verify import distance as dense_distance
from adaptsurgery.jobs.verify import identical
from adaptsurgery_formats import AdapterState, Format, ModuleState, Note, Tensor
from adaptsurgery_formats.errors import InexactError, ShapeError, ValueRefused
from adaptsurgery_formats.state import ALPHA_OVER_R, UNSCALED
from adaptsurgery_formats.tensors import same_bytes

if TYPE_CHECKING:
    import torch

    from adaptsurgery.algorithms import LoRA

_NOTHING = 1e-12  # coefficients that cancel to less than this share of themselves are 0
_BIASES = ("up_bias", "diff_b")


def combine(
    sources: Sequence[Named],
    out: Spec,
    *,
    to: str | None = None,
    base: Spec | None = None,
    rank: int | None = None,
    allow_lossy: bool = False,
    allow_zero: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    hashes: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Write to ``out`` one adapter that does what ``sources``, each at its weight, do together.

    A source is a path or Hub name, "path=weight", or a pair (path, weight); a weight of 0 leaves
    it out. ``to`` is the layout, the first source's by default. ``rank`` truncates every LoRA of
    a higher one, optimally, and needs ``allow_lossy`` if a ΔW then moves by more than 1e-6 of its
    norm. ``allow_zero`` writes zeros where everything cancels, which is an error otherwise.
    ``base`` gives the module list, and the weights where an HRA must become a LoRA.

    The report has a row per layer with its relative error. Raises SurgeryError for what does not
    add up: weights other than 1 on HRA and DoRA ("no-weight"), a DoRA beside another change
    ("dora-sum"), an HRA beside a Δ without a base ("hra-sum"), approximation without
    ``allow_lossy`` ("lossy").
    """
    _check_rank(rank)
    named = [split_weight(source) for source in sources]
    if not named:
        raise ValueRefused(
            "no adapter was named", next="A[=WEIGHT] B[=WEIGHT] …", code="no-adapter"
        )
    loaded = lowrank.load_together([name for name, _ in named], base=base, to=to)
    target = writable(to or loaded[0].state.layout)
    for one in loaded:
        check_paths(one.paths, out, target, overwrite)
    parts = [_Part(one, weight, target) for one, (_, weight) in zip(loaded, named)]
    sum_ = _Sum([part for part in parts if part.weight], loaded[0], target)
    result = sum_.result(allow_zero, parts[0])
    result = _fitted(_cut(result, rank, sum_.notes), target, rank)
    rows = sum_.rows(result.state.modules)
    _check_lossy(rows, allow_lossy, result.state.where)
    report = write_adapter(
        result, Path(out), target.name,
        overwrite=overwrite, dry_run=dry_run, hashes=hashes, progress=progress,
    )  # fmt: skip
    return _told(report, rows, parts, sum_.notes)


def _check_rank(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise ShapeError(f"no LoRA has rank {rank}", next="a rank of at least 1")


# What is added


class _Part:
    """One adapter and its weight, in the target's naming."""

    def __init__(self, loaded: Loaded, weight: float, target: Format) -> None:
        self.loaded, self.weight = loaded, weight
        self.state = in_naming(loaded.state, loaded.names, target) if weight else loaded.state

    def check_weight(self) -> None:
        if self.weight == 1.0:
            return
        rigid = next((m for m in self.state.modules if _is_rigid(m)), None)
        saved = next((key for s in self.state.saved.values() for key in s), "")
        if rigid is not None or saved:
            kind = "it is replaced outright" if rigid is None else f"{_title(rigid)} does not add"
            raise ValueRefused(
                f"`{rigid.label if rigid else saved}` at weight {self.weight:g} has no meaning: {kind}",
                where=self.state.where,
                next="use weight 1, or 0 to leave the adapter out",
                code="no-weight",
            )


@dataclass(frozen=True)
class _Term:
    """A module with its adapter's weight: c·Δ with c = w·s."""

    module: ModuleState
    weight: float

    @property
    def coefficient(self) -> float:
        return self.weight * self.module.scale

    def weighted(self) -> ModuleState:
        """The module with its coefficient for a scale, only to be measured."""
        r = self.module.rank or 1
        return replace(self.module, alpha=self.coefficient * r, rank=r, rule=ALPHA_OVER_R)


@dataclass
class _Layer:
    """One layer's terms in the order of the adapters, and what they were summed to."""

    terms: list[_Term]
    summed: list[ModuleState] = field(default_factory=list)


def _is_rigid(module: ModuleState) -> bool:
    return module.algorithm == "hra" or "magnitude" in module.tensors


def _title(module: ModuleState) -> str:
    return "a rotation (HRA)" if module.algorithm == "hra" else "a DoRA"


def _moves_weight(module: ModuleState) -> bool:
    """Whether a module changes more than the bias."""
    return module.algorithm not in ("full",) or "diff" in module.tensors


class _Sum:
    """The sum, layer by layer; ``context`` has the names and the base that all share."""

    def __init__(self, parts: Sequence[_Part], first: Loaded, target: Format) -> None:
        self.parts, self.target = parts, target
        self.notes: list[Note] = []
        for part in parts:
            part.check_weight()
        self.context = replace(first, state=_shell(parts, first))
        self.layers: dict[tuple[str, str], _Layer] = {}
        for part in parts:
            for module in part.state.modules:
                place = (module.component, module.path)
                layer = self.layers.setdefault(place, _Layer([]))
                layer.terms.append(_Term(module, part.weight))
        _check_saved(parts, self.layers)

    def result(self, allow_zero: bool, first: _Part) -> Loaded:
        """The summed adapter, under the first source's metadata."""
        for layer in self.layers.values():
            layer.summed = self._summed(layer)
        modules = [m for layer in self.layers.values() for m in layer.summed]
        gone = [layer.terms[0].module.label for layer in self.layers.values() if not layer.summed]
        if not modules and not allow_zero:
            raise ValueRefused(
                "the sum is zero in every module",
                where=first.state.where,
                seen="weights " + ", ".join(f"{part.weight:g}" for part in self.parts or [first]),
                next="--allow-zero writes an adapter of zeros",
                code="zero-sum",
            )
        if not modules:
            modules = [_zeroed(m) for m in first.state.modules if not _is_rigid(m)]
            self.layers = {}
        elif gone:
            self._note("cancelled", gone, "the terms cancel: left out")
        if self.target.name == "peft":
            modules = _with_all_biases(_of_one_hra_form(modules))
        state = replace(self.context.state, modules=modules)
        return replace(self.context, state=_in_layout(state, self.parts))

    def _note(self, code: str, labels: Sequence[str], text: str) -> None:
        more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        self.notes.append(Note(code, labels[0] + more, text))

    # One layer

    def _summed(self, layer: _Layer) -> list[ModuleState]:
        """The modules that do what the layer's terms do together."""
        terms = layer.terms
        if _as_they_are(terms) and (self.target.name != "peft" or len(terms) == 1):
            return [t.module for t in terms]
        self._check_alone(terms)
        rotations = [t for t in terms if t.module.algorithm == "hra"]
        others = [t for t in terms if t.module.algorithm != "hra"]
        if rotations and any(_moves_weight(t.module) for t in others):
            lora = self._rotation_as_lora(_turned(rotations))
            layer.terms = others = [_Term(lora, 1.0), *others]
            rotations = []
        found = [_turned(rotations)] if rotations else self._weight_of(others)
        return self._with_bias(found, others)

    def _check_alone(self, terms: Sequence[_Term]) -> None:
        moving = [t.module for t in terms if _moves_weight(t.module)]
        dora = next((m for m in moving if "magnitude" in m.tensors), None)
        if dora is not None and len(moving) > 1:
            raise InexactError(
                f"`{dora.label}`: a DoRA renormalises the weight, so nothing adds to it",
                where=self.context.state.where,
                seen="on this layer: " + ", ".join(m.algorithm for m in moving),
                next="change it first: convert --as lora --base BASE --rank N --allow-lossy",
                code="dora-sum",
            )

    def _rotation_as_lora(self, rotation: ModuleState) -> ModuleState:
        if self.context.base is None:
            raise InexactError(
                f"`{rotation.label}`: a rotation (HRA) beside a difference is one adapter only for "
                "a known weight",
                where=self.context.state.where,
                next="--base MODEL with the weights: the HRA is then a LoRA, exactly",
                code="hra-sum",
            )
        alone = replace(self.context, state=replace(self.context.state, modules=[rotation]))
        self._note("as-lora", [rotation.label], "the HRA is a LoRA now, for this base alone")
        return as_lora(alone, rank=None, allow_lossy=False).modules[0]

    def _weight_of(self, terms: Sequence[_Term]) -> list[ModuleState]:
        """The sum's change of the weight; [] where there is none, or the terms cancel."""
        terms = [t for t in terms if _moves_weight(t.module)]
        if not terms:
            return []
        if len(terms) == 1 and "magnitude" in terms[0].module.tensors:
            return [terms[0].module]
        if any(_is_vector(t.module) for t in terms):
            return [_vectors(terms)]
        if any(t.module.algorithm == "full" for t in terms):
            return self._dense(terms)
        groups = _alike(terms)
        if len(groups) == 1:
            return [_rescaled(*groups[0])]
        return [self._side_by_side(groups)] if groups else []

    def _dense(self, terms: Sequence[_Term]) -> list[ModuleState]:
        """Everything in one dense difference."""
        import torch

        first = next(t.module for t in terms if t.module.algorithm == "full")
        diff = first.tensors["diff"]
        total = torch.zeros(diff.shape, dtype=torch.float64)
        for t in terms:
            bare = t.module.with_tensors(diff_b=None, up_bias=None)
            delta: Any = update_of(bare, self.context.names, self.context.state.where)
            _check_extent(
                first, t.module, (diff.shape[0], diff.numel // diff.shape[0]), delta.extent
            )
            total += t.coefficient * delta.dense(torch.float64).reshape(diff.shape)
        if not total.any():
            return []
        if any(t.module.algorithm != "full" for t in terms):
            self._note("dense", [first.label], "the dense difference takes up the low-rank ones")
        like = [t.module.tensors["diff"] for t in terms if "diff" in t.module.tensors]
        return [replace(first, tensors={"diff": stored(total, like)}, keys=_keys(terms))]

    def _side_by_side(self, groups: Sequence[tuple[ModuleState, float]]) -> ModuleState:
        """One LoRA: the ranks of all, the coefficients over the common scale on ``up``."""
        names, where = self.context.names, self.context.state.where
        modules = [module for module, _ in groups]
        forms = [lora_form(module, names, where) for module in modules]
        for module, form in zip(modules, forms):
            _check_extent(modules[0], module, forms[0].extent, form.extent)
        if len({m.kind for m in modules}) > 1:
            raise ShapeError(
                f"`{modules[0].label}` is an embedding's in one adapter and not in another",
                where=where,
            )
        scale = _common_scale([(abs(c), form.rank) for (_, c), form in zip(groups, forms)])
        pair = lowrank.stacked([(c / scale, form) for (_, c), form in zip(groups, forms)])
        up, down = _shortest(*pair)
        shape = _shape_of(modules, forms)
        if len(shape) == 2 and any(_hides_kernel(m) for m in modules) and not _is_listed(names):
            self._note(
                "kernel-unknown", [modules[0].label], "taken for a linear's: --base can tell"
            )
        return _lora_module(modules, up, down, shape, scale)

    def _with_bias(self, found: list[ModuleState], terms: Sequence[_Term]) -> list[ModuleState]:
        """The modules with the sum of the terms' bias differences, where the layout has a place."""
        found = [m if "magnitude" in m.tensors else m.with_tensors(up_bias=None) for m in found]
        held = [
            (t.coefficient, t.module.tensors[slot])
            for t in terms
            if "magnitude" not in t.module.tensors
            for slot in _BIASES
            if slot in t.module.tensors
        ]
        if not held:
            return found
        owner = found[0] if found else None
        if self.target.name == "peft" and owner is not None and owner.algorithm == "lora":
            inward = [(c / owner.scale, tensor) for c, tensor in held]
            return [owner.with_tensors(up_bias=_added(inward, owner.label))]
        bias = _added(held, terms[0].module.label)
        if owner is not None and owner.algorithm == "full":
            return [owner.with_tensors(diff_b=bias)]
        origin = next(t.module for t in terms if set(_BIASES) & t.module.tensors.keys())
        dense = replace(
            origin, algorithm="full", tensors={"diff_b": bias}, alpha=None, rule=UNSCALED,
            rank=None, options=prefix_of(origin),
        )  # fmt: skip
        return [*found, dense]

    # How far the result is off

    def rows(self, modules: Sequence[ModuleState]) -> list[Row]:
        """A row per layer: what it became, and ‖Σ c·Δ − Δ'‖/‖Σ c·Δ‖ of what is written."""
        places: dict[tuple[str, str], list[ModuleState]] = {}
        for module in modules:
            places.setdefault((module.component, module.path), []).append(module)
        rows = []
        for place, written in places.items():
            layer = self.layers.get(place, _Layer([]))
            rows.append(self._row(layer, written))
        return rows

    def _row(self, layer: _Layer, written: list[ModuleState]) -> Row:
        shown = "+".join(dict.fromkeys(m.algorithm for m in written))
        same = _as_they_are(layer.terms) and len(written) == len(layer.terms)
        if not layer.terms or (
            same and all(identical(t.module, m) for t, m in zip(layer.terms, written))
        ):
            return Row(written[0].label, shown, "identical", 0.0, _ranks(layer.terms, written))
        error = self._error(layer.terms, written)
        change = "rounded" if error <= EXACT else "lossy"
        return Row(written[0].label, shown, change, error, _ranks(layer.terms, written))

    def _error(self, terms: Sequence[_Term], written: Sequence[ModuleState]) -> float:
        terms = [t for t in terms if _moves_weight(t.module)]
        moving = [m for m in written if _moves_weight(m)]
        if any("magnitude" in m.tensors for m in moving) or not terms or not moving:
            return 0.0  # taken as it is; biases are sums of float64, rounded once
        if all(m.algorithm == "hra" for m in moving):
            return _rotated_apart([t.module for t in terms], moving[0])
        if all(t.module.algorithm == "hra" for t in terms):
            terms = [_Term(_turned(terms), 1.0)]
        if len(moving) == 1 and (share := _coefficient_error(terms, moving[0])) is not None:
            return share
        if all(is_low_rank(m) for m in (*(t.module for t in terms), *moving)):
            names, where = self.context.names, self.context.state.where
            ours = [(t.coefficient, lora_form(t.module, names, where)) for t in terms]
            theirs = [(m.scale, lora_form(m, names, where)) for m in moving]
            return lowrank.relative(*lowrank.distance(ours, theirs))
        return dense_distance(
            [_bare(t.weighted()) for t in terms],
            [_bare(m) for m in moving],
            self.context,
            self.context,
        )


def _bare(module: ModuleState) -> ModuleState:
    return module.with_tensors(up_bias=None, diff_b=None)


def _as_they_are(terms: Sequence[_Term]) -> bool:
    """Whether a layer's terms are one adapter's, at weight 1: each algorithm once."""
    algorithms = [t.module.algorithm for t in terms]
    moving = sum(_moves_weight(t.module) for t in terms)
    return (
        len(set(algorithms)) == len(terms) and moving <= 1 and all(t.weight == 1.0 for t in terms)
    )


def _keys(terms: Sequence[_Term]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key for t in terms for key in t.module.keys))


def _ranks(terms: Sequence[_Term], written: Sequence[ModuleState]) -> str:
    """ "rank 8 + 4 → 12", where that says something."""
    before = [str(t.module.rank) for t in terms if t.module.rank]
    after = [str(m.rank) for m in written if m.rank]
    if not before or before == after:
        return ""
    return f"rank {' + '.join(before)} → {' + '.join(after) or 'none'}"


def _shell(parts: Sequence[_Part], first: Loaded) -> AdapterState:
    """The result's state without modules: the first source's metadata and config, all notes."""
    notes = list(dict.fromkeys(note for part in parts for note in part.state.notes))
    saved: dict[str, dict[str, Tensor]] = {}
    for part in parts:
        for component, tensors in part.state.saved.items():
            saved.setdefault(component, {}).update(tensors)
    return replace(first.state, modules=[], saved=saved, config=_config(parts), notes=notes)


def _config(parts: Sequence[_Part]) -> dict[str, dict[str, Any]]:
    """The first PEFT config of each component, with the replaced modules of all."""
    merged: dict[str, dict[str, Any]] = {}
    for part in parts:
        for component, config in part.state.config.items():
            mine = merged.setdefault(component, dict(config))
            replaced = [
                *(mine.get("modules_to_save") or ()),
                *(config.get("modules_to_save") or ()),
            ]
            if replaced:
                mine["modules_to_save"] = list(dict.fromkeys(replaced))
            if mine.get("bias", "none") == "none" and "bias" in config:
                mine["bias"] = config["bias"]
    return merged


def _check_saved(parts: Sequence[_Part], layers: dict[tuple[str, str], _Layer]) -> None:
    """Refuse a parameter that two adapters replace by different numbers, or that one also adds to."""
    seen: dict[tuple[str, str], tuple[Tensor, str]] = {}
    for part in parts:
        for component, tensors in part.state.saved.items():
            for key, tensor in tensors.items():
                other, where = seen.setdefault((component, key), (tensor, part.state.where))
                if other.shape != tensor.shape or not same_bytes(other, tensor):
                    raise ValueRefused(
                        f"`{key}` is replaced by two adapters, each in its own way",
                        where=part.state.where, seen=f"also by {where}",
                        next="leave one of them out", code="replaced-twice",
                    )  # fmt: skip
                if (component, key.rpartition(".")[0]) in layers:
                    raise ValueRefused(
                        f"`{key}` is replaced by one adapter and changed by another",
                        where=part.state.where, next="merge one of them into the base first",
                        code="replaced-and-adapted",
                    )  # fmt: skip


# HRA


def _turned(terms: Sequence[_Term]) -> ModuleState:
    """One HRA that does what several do, one after the other."""
    import torch

    from adaptsurgery.algorithms import HRA

    modules = [t.module for t in terms]
    first = modules[0]
    if len(modules) == 1:
        return first
    sizes = {m.tensors["u"].shape[0] for m in modules}
    if len(sizes) > 1:
        raise ShapeError(f"`{first.label}`: rotations of {sorted(sizes)} inputs do not follow")
    columns = []
    for module in modules:
        gs = bool(module.options.get("apply_gs"))
        one = HRA(to_torch(module.tensors["u"]).double(), gs)
        one.check_values()
        columns.append(one.reflections() if gs else one.u)
    u = torch.cat(columns, dim=1)
    tensors = {"u": stored(u, [m.tensors["u"] for m in modules])}
    return replace(
        first, tensors=tensors, rank=u.shape[1], options={**first.options, "apply_gs": False},
        keys=_keys(terms),
    )  # fmt: skip


def _of_one_hra_form(modules: list[ModuleState]) -> list[ModuleState]:
    """PEFT's HRA has one rank and one apply_GS: equal pairs of columns, which undo each other, pad."""
    chains = [m for m in modules if m.algorithm == "hra"]
    plain = {bool(m.options.get("apply_gs")) for m in chains} == {False, True}
    most = max((m.rank or 0 for m in chains), default=0)
    if not plain and all(m.rank == most for m in chains):
        return modules
    if any((most - (m.rank or 0)) % 2 for m in chains):
        return modules  # the layout's own plan refuses: a reflection more or less is another R
    return [_padded(m, most) if m.algorithm == "hra" else m for m in modules]


def _padded(module: ModuleState, rank: int) -> ModuleState:
    import torch

    from adaptsurgery.algorithms import HRA

    u = to_torch(module.tensors["u"])
    if module.options.get("apply_gs"):
        u = HRA(u.double(), True).reflections()
    last = u[:, -1:].expand(-1, rank - u.shape[1])
    wide = stored(torch.cat([u, last], dim=1).double(), [module.tensors["u"]])
    return replace(
        module, tensors={"u": wide}, rank=rank, options={**module.options, "apply_gs": False}
    )


def _rotated_apart(chain: Sequence[ModuleState], result: ModuleState) -> float:
    """‖X·R' − X·R₁·R₂…‖/‖X·R₁·R₂… − X‖ for random rows X."""
    import torch

    from adaptsurgery.algorithms import HRA

    def turned(module: ModuleState, rows: torch.Tensor) -> torch.Tensor:
        u = to_torch(module.tensors["u"]).double()
        return HRA(u, bool(module.options.get("apply_gs"))).turning(rows)(rows)

    random = torch.Generator().manual_seed(0)
    rows = torch.randn(8, result.tensors["u"].shape[0], generator=random, dtype=torch.float64)
    wanted = rows
    for module in chain:
        wanted = turned(module, wanted)
    apart = float((turned(result, rows) - wanted).norm())
    moved = float((wanted - rows).norm())
    return lowrank.relative(apart, max(moved, 1e-9 * float(rows.norm())))


# Low-rank terms


def _alike(terms: Sequence[_Term]) -> list[tuple[ModuleState, float]]:
    """The different Δ among low-rank terms, each with its summed coefficient; none that cancel."""
    groups: list[list[_Term]] = []
    for term in terms:
        home = next((g for g in groups if _same_factors(g[0].module, term.module)), None)
        if home is None:
            groups.append([term])
        else:
            home.append(term)
    found = []
    for group in groups:
        coefficients = [t.coefficient for t in group]
        total = math.fsum(coefficients)
        if abs(total) > _NOTHING * math.fsum(map(abs, coefficients)):
            found.append((replace(group[0].module, keys=_keys(group)), total))
    return found


def _same_factors(a: ModuleState, b: ModuleState) -> bool:
    ours, theirs = (m.with_tensors(up_bias=None).tensors for m in (a, b))
    return (
        (a.algorithm, a.kind, ours.keys()) == (b.algorithm, b.kind, theirs.keys())
        and all(t.shape == theirs[slot].shape for slot, t in ours.items())
        and all(same_bytes(t, theirs[slot]) for slot, t in ours.items())
    )


def _coefficient_error(terms: Sequence[_Term], written: ModuleState) -> float | None:
    """|c' − c|/|c| where the terms' factors are those that were written; None where they differ."""
    if not all(_same_factors(t.module, written) for t in terms):
        return None
    wanted = math.fsum(t.coefficient for t in terms)
    return lowrank.relative(abs(written.scale - wanted), abs(wanted))


def _rescaled(module: ModuleState, coefficient: float) -> ModuleState:
    """The same factors at another scale: alpha says it, and a factor the sign."""
    if coefficient == module.scale:
        return module
    rank = module.rank or 1
    if coefficient < 0:  # some readers expect no negative alpha
        slot = next(s for s in ("up", "w1_a", "w1") if s in module.tensors)
        tensor = module.tensors[slot]
        module = module.with_tensors(**{slot: from_torch(-to_torch(tensor))})
    return replace(module, alpha=abs(coefficient) * rank, rank=rank, rule=ALPHA_OVER_R)


def _common_scale(found: Sequence[tuple[float, int]]) -> float:
    """The scale of a sum, of (|coefficient|, rank): one that leaves the most ranks exact.

    What is a power of two of it only moves exponents, in any dtype.
    """
    ranks: dict[float, int] = {}
    for coefficient, rank in found:
        mantissa = math.frexp(coefficient)[0]
        ranks[mantissa] = ranks.get(mantissa, 0) + rank
    best = max(ranks, key=lambda mantissa: ranks[mantissa])
    return max(c for c, _ in found if math.frexp(c)[0] == best)


def _shortest(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in factors of no more ranks than it has rows or columns: against the identity."""
    import torch

    rows, columns = up.shape[0], down.shape[1]
    if up.shape[1] <= min(rows, columns):
        return up, down
    whole, one = up @ down, torch.eye(min(rows, columns), dtype=up.dtype)
    return (one, whole) if rows <= columns else (whole, one)


def _shape_of(modules: Sequence[ModuleState], forms: Sequence[LoRA]) -> tuple[int, ...]:
    """(o, i, *k), of the form that shows the kernel; ShapeError where two show different ones."""
    shape = max((form.shape for form in forms), key=len)
    for module, form in zip(modules, forms):
        bare = [k for k in form.shape[2:] if k != 1]
        if bare and bare != [k for k in shape[2:] if k != 1]:
            raise ShapeError(
                f"`{module.label}` has kernels {list(shape[2:])} and {list(form.shape[2:])}",
                next="are the adapters for one model?",
            )
    return shape


def _hides_kernel(module: ModuleState) -> bool:
    return module.algorithm in ("loha", "lokr") and not {"t1", "t2", "w2"} & module.tensors.keys()


def _is_listed(names: Any) -> bool:
    """Whether the modules' shapes are a model's, and not only what the adapters show."""
    return names is not None and names.where != lowrank.OWN


def _check_extent(
    a: ModuleState, b: ModuleState, ours: tuple[int, int], theirs: tuple[int, int]
) -> None:
    if ours != theirs:
        raise ShapeError(
            f"`{a.label}`: ΔW is {ours} in one adapter and {theirs} in another",
            seen=", ".join([*a.keys[:1], *b.keys[:1]]),
            next="are the adapters for one model?",
        )


def _lora_module(
    modules: Sequence[ModuleState],
    up: torch.Tensor,
    down: torch.Tensor,
    shape: tuple[int, ...],
    scale: float,
) -> ModuleState:
    """Two float64 matrices as a LoRA in the place of others, both factors of one dtype."""
    from adaptsurgery.algorithms import LoRA

    lora = LoRA.of_factors(up, down, shape)
    like = [t for m in modules for slot, t in m.tensors.items() if slot not in _BIASES]
    tensors = {"up": stored(lora.up, like), "down": stored(lora.down, like)}
    if len({t.dtype for t in tensors.values()}) > 1:
        wide = torch_dtype(max(tensors.values(), key=lambda t: t.nbytes / t.numel).dtype)
        tensors = {slot: from_torch(to_torch(t).to(wide)) for slot, t in tensors.items()}
    first = modules[0]
    keys = tuple(dict.fromkeys(key for m in modules for key in m.keys))
    return replace(
        first, algorithm="lora", tensors=tensors, alpha=scale * lora.rank, rank=lora.rank,
        rule=ALPHA_OVER_R, options=prefix_of(first), keys=keys,
    )  # fmt: skip


# Vectors


def _is_vector(module: ModuleState) -> bool:
    """Whether a module changes a norm's weight (n,): as norm, or as a dense difference of it."""
    dense = module.algorithm == "full" and "diff" in module.tensors
    return module.algorithm == "norm" or (dense and len(module.tensors["diff"].shape) == 1)


def _vectors(terms: Sequence[_Term]) -> ModuleState:
    """The sum of changes of a norm, slot by slot."""
    first = terms[0].module
    if len({t.module.algorithm for t in terms}) > 1:
        raise ShapeError(
            f"`{first.label}` is a norm in one adapter and not in another",
            seen=", ".join(t.module.algorithm for t in terms),
        )
    slots = [s for s in ("diff", "w_norm", "b_norm") if any(s in t.module.tensors for t in terms)]
    held = {
        slot: [(t.weight, t.module.tensors[slot]) for t in terms if slot in t.module.tensors]
        for slot in slots
    }
    tensors = {slot: _added(each, first.label) for slot, each in held.items()}
    return replace(first, tensors=tensors, keys=_keys(terms))


def _added(held: Sequence[tuple[float, Tensor]], label: str) -> Tensor:
    """Σ c·t; the tensor itself where there is one, at 1."""
    if len(held) == 1 and held[0][0] == 1.0:
        return held[0][1]
    if len({t.shape for _, t in held}) > 1:
        shapes = " and ".join(str(list(t.shape)) for _, t in held)
        raise ShapeError(f"`{label}`: {shapes} do not add", next="are the adapters for one model?")
    terms: list[torch.Tensor] = [c * to_torch(t).double() for c, t in held]
    return stored(sum(terms[1:], terms[0]), [t for _, t in held])


def _zeros_like(tensor: Tensor) -> Tensor:
    return from_torch(to_torch(tensor) * 0)


def _zeroed(module: ModuleState) -> ModuleState:
    """The module with a Δ of 0: its first factor, or all that is added, is zeros."""
    factors = ("up", "w1_a", "w1")
    first = next((s for s in factors if s in module.tensors), None)
    slots = [first] if first else list(module.tensors)
    slots += ["up_bias"] if "up_bias" in module.tensors else []
    return module.with_tensors(**{slot: _zeros_like(module.tensors[slot]) for slot in slots})


def _with_all_biases(modules: list[ModuleState]) -> list[ModuleState]:
    """PEFT's lora_bias is for every LoRA or none: zeros where a LoRA has no bias."""
    import torch

    if not any("up_bias" in m.tensors for m in modules):
        return modules
    return [
        m.with_tensors(up_bias=from_torch(torch.zeros(m.tensors["up"].shape[0])))
        if m.algorithm == "lora" and "up_bias" not in m.tensors
        else m
        for m in modules
    ]


# The result in its layout


_SHAPING = (
    "peft_type", "r", "rank_pattern", "use_effective_conv2d", "decompose_both", "decompose_factor",
    "apply_GS",
)  # fmt: skip


def _in_layout(state: AdapterState, parts: Sequence[_Part]) -> AdapterState:
    """The state as one of PEFT's only where a source's config holds for all of its modules.

    PEFT's layout trusts what PEFT wrote; anything else it checks against its rules.
    """
    if any(part.state.layout != "peft" for part in parts):
        others = [p.state.layout for p in parts if p.state.layout != "peft"]
        return replace(state, layout=state.layout if state.layout != "peft" else others[0])
    algorithms = {m.algorithm for m in state.modules}
    if algorithms == {"lora"}:
        return replace(state, layout="combined")
    shaping = [
        {c: {k: config.get(k) for k in _SHAPING} for c, config in part.state.config.items()}
        for part in parts
    ]
    if all(each == shaping[0] for each in shaping):
        return state
    return replace(state, layout="combined", config={})


def _cut(result: Loaded, rank: int | None, notes: list[Note]) -> Loaded:
    """Every LoRA of a higher rank truncated to ``rank``; others stay what they are."""
    from adaptsurgery.core.linalg import truncate_factors

    if rank is None:
        return result
    names, where = result.names, result.state.where
    modules = []
    for module in result.state.modules:
        if module.algorithm == "lora" and is_low_rank(module) and (module.rank or 0) > rank:
            form = lora_form(module, names, where)
            found = truncate_factors(*form.factors(), rank)
            low = _lora_module([module], found.up, found.down, form.shape, module.scale)
            bias = module.tensors.get("up_bias")
            module = low.with_tensors(up_bias=bias) if bias else low
        modules.append(module)
    whole = {m.algorithm for m in modules if m.algorithm in ("loha", "lokr", "full", "hra")}
    if whole:
        text = f"modules that are {', '.join(sorted(whole))} alone stay so, whatever the rank"
        notes.append(Note("not-cut", where, text))
    return replace(result, state=replace(result.state, modules=modules))


def _fitted(result: Loaded, target: Format, rank: int | None) -> Loaded:
    """The result with all of it as LoRA, exactly, where the target cannot hold it as it is."""
    try:
        target.plan(result.state, result.names)
        return result
    except InexactError:
        if not all(_may_be_lora(m, result, rank) for m in result.state.modules):
            raise
    state = as_lora(result, rank=rank, allow_lossy=True)  # weighed with all the rest
    state.note("as-lora", state.where, f"{target.name} cannot hold the algorithms side by side")
    return replace(result, state=state)


def _may_be_lora(module: ModuleState, result: Loaded, rank: int | None) -> bool:
    if module.algorithm == "hra":
        return result.base is not None
    return is_low_rank(module) or ("diff" in module.tensors and rank is not None)


def _check_lossy(rows: Sequence[Row], allowed: bool, where: str) -> None:
    lossy = [row for row in rows if row.change == "lossy"]
    if lossy and not allowed:
        worst = max(lossy, key=lambda row: row.error)
        raise InexactError(
            f"{len(lossy)} of {len(rows)} modules can only be approximated",
            where=where,
            seen=f"relative error up to {worst.error:.3g}, at `{worst.module}`",
            next="--allow-lossy if that is good enough, or a higher --rank",
            code="lossy",
        )


def _told(report: Report, rows: list[Row], parts: Sequence[_Part], notes: Sequence[Note]) -> Report:
    counts = {change: sum(r.change == change for r in rows) for change in ("identical", "rounded")}
    said = [f"{counts['identical']} as they were"] if counts["identical"] else []
    for change, word in (("rounded", "exact"), ("lossy", "approximated")):
        errors = [r.error for r in rows if r.change == change]
        if errors:
            said.append(f"{len(errors)} {word}, relative error up to {max(errors):.2g}")
    report.job, report.rows = "combine", rows
    report.verdict = f"{len(rows)} modules of {len(parts)} adapters: " + "; ".join(said)
    report.notes = list(dict.fromkeys([*report.notes, *notes]))
    report.facts |= {
        "sources": [
            {"path": p.state.where, "weight": p.weight, "layout": p.state.layout} for p in parts
        ],
        "source": " + ".join(f"{p.weight:g}·{p.state.where}" for p in parts),
    }
    return report
