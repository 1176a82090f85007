"""The weighted sum, layer by layer, and how far what is written is off it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from adaptsurgery.adapters import lowrank
from adaptsurgery.adapters.comparing import EXACT, NO_NUMBER, identical
from adaptsurgery.adapters.comparing import distance as dense_distance
from adaptsurgery.adapters.loading import Loaded
from adaptsurgery.adapters.lowrank import hides_kernel, is_low_rank, lora_form, prefix_of
from adaptsurgery.adapters.report import Row, some
from adaptsurgery.adapters.rewritings import as_stored
from adaptsurgery.adapters.updates import is_nonfinite_allowed, nonfinite_of, update_of
from adaptsurgery.jobs.change import as_lora
from adaptsurgery.jobs.combining.carrying import check_saved, in_layout, shell_of
from adaptsurgery.jobs.combining.factors import (
    check_extent,
    coefficient_error,
    common_scale,
    distinct,
    kernel_shape,
    lora_module,
    rescaled,
    shortest,
)
from adaptsurgery.jobs.combining.rotations import CHAINS, chained, of_one_hra_form, rotated_apart
from adaptsurgery.jobs.combining.terms import (
    BIASES,
    SummedLayer,
    Term,
    WeightedAdapter,
    as_they_are,
    keys_of,
    moves_weight,
    ranks_of,
    without_bias,
)
from adaptsurgery.jobs.combining.vectors import (
    is_vector,
    sum_of_vectors,
    weighted_sum,
    zeroed,
)
from adaptsurgery_formats import Format, ModuleState, Note
from adaptsurgery_formats.errors import InexactError, ShapeError, ValueRefused
from adaptsurgery_formats.state import UNSCALED, is_rigid
from adaptsurgery_formats.traits import traits_of


class Sum:
    """The sum, layer by layer; ``context`` has the names and the base that all share."""

    def __init__(self, parts: Sequence[WeightedAdapter], first: Loaded, target: Format) -> None:
        self.parts, self.target = parts, target
        self._told: dict[tuple[str, str], list[str]] = {}
        for part in parts:
            part.check_weight()
        self.context = replace(first, state=shell_of(parts, first))
        self.layers: dict[tuple[str, str], SummedLayer] = {}
        for part in parts:
            for module in part.state.modules:
                place = (module.component, module.path)
                layer = self.layers.setdefault(place, SummedLayer([]))
                layer.terms.append(Term(module, part.weight))
        check_saved(parts, self.layers)

    def result(self, allow_zero: bool, first: WeightedAdapter) -> Loaded:
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
            modules = [zeroed(m) for m in first.state.modules if not is_rigid(m)]
            self.layers = {}
        elif gone:
            for label in gone:
                self._note("cancelled", label, "the terms cancel: left out")
        if self.target.name == "peft":
            modules = of_one_hra_form(modules)
            self._note_biases(modules)
        state = replace(self.context.state, modules=modules)
        return replace(self.context, state=in_layout(state, self.parts, self.target.name))

    @property
    def notes(self) -> list[Note]:
        """What there is to say, each once, with the modules that it is of."""
        return [Note(code, some(labels), text) for (code, text), labels in self._told.items()]

    def _note(self, code: str, label: str, text: str) -> None:
        self._told.setdefault((code, text), []).append(label)

    def _note_biases(self, modules: Sequence[ModuleState]) -> None:
        """PEFT's lora_bias is for every LoRA: it has zeros where there is none."""
        without = [m for m in modules if "up_bias" not in m.tensors]
        for module in without if len(without) < len(modules) else ():
            text = "lora_bias is for all modules: zeros here; PEFT merges none into a layer without bias"
            self._note("lora-bias", module.label, text)

    # One layer

    def _summed(self, layer: SummedLayer) -> list[ModuleState]:
        """The modules that do what the layer's terms do together."""
        terms = layer.terms
        if as_they_are(terms) and (self.target.name != "peft" or len(terms) == 1):
            return [t.module for t in terms]
        self._check_alone(terms)
        rotations = [t for t in terms if not traits_of(t.module.algorithm).adds]
        others = [t for t in terms if traits_of(t.module.algorithm).adds]
        if rotations and any(moves_weight(t.module) for t in others):
            lora = self._rotation_as_lora(chained(rotations))
            layer.terms = others = [Term(lora, 1.0), *others]
            rotations = []
        modules = [chained(rotations)] if rotations else self._weight_of(others)
        return self._with_bias(modules, others)

    def _check_alone(self, terms: Sequence[Term]) -> None:
        moving = [t.module for t in terms if moves_weight(t.module)]
        dora = next((m for m in moving if "magnitude" in m.tensors), None)
        if dora is not None and len(moving) > 1:
            raise InexactError(
                f"`{dora.label}`: a DoRA renormalises the weight, so nothing adds to it",
                where=self.context.state.where,
                seen="on this layer: " + ", ".join(m.algorithm for m in moving),
                next="change it first: convert --as lora --base BASE --rank N --allow-lossy",
                code="dora-sum",
            )
        for term in terms:
            row = traits_of(term.module.algorithm)
            if row.adds or term.module.algorithm in CHAINS:
                continue
            if len(moving) > 1 or term.weight != 1.0:
                raise InexactError(
                    f"`{term.module.label}`: a {row.title} is no sum, so it has no weight here and "
                    "nothing adds to it",
                    where=self.context.state.where,
                    seen=f"weight {term.weight:g}, on this layer: "
                    + ", ".join(m.algorithm for m in moving),
                    next="merge the adapters into the base instead",
                    code="no-sum",
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
        self._note("as-lora", rotation.label, "the HRA is a LoRA now, for this base alone")
        return as_lora(alone, rank=None, allow_lossy=False).modules[0]

    def _weight_of(self, terms: Sequence[Term]) -> list[ModuleState]:
        """The sum's change of the weight; [] where there is none, or the terms cancel."""
        terms = [t for t in terms if moves_weight(t.module)]
        if not terms:
            return []
        if len(terms) == 1 and "magnitude" in terms[0].module.tensors:
            return [terms[0].module]
        if any(is_vector(t.module) for t in terms):
            return [sum_of_vectors(terms)]
        if any(t.module.algorithm == "full" for t in terms):
            return self._dense(terms)
        groups = distinct(terms)
        if len(groups) == 1:
            return [rescaled(*groups[0])]
        return [self._side_by_side(groups)] if groups else []

    def _dense(self, terms: Sequence[Term]) -> list[ModuleState]:
        """Everything in one dense difference."""
        import torch

        first = next(t.module for t in terms if t.module.algorithm == "full")
        diff = first.tensors["diff"]
        total = torch.zeros(diff.shape, dtype=torch.float64)
        for t in terms:
            bare = t.module.with_tensors(diff_b=None, up_bias=None)
            delta: Any = update_of(bare, self.context.names, self.context.state.where)
            check_extent(
                first, t.module, (diff.shape[0], diff.numel // diff.shape[0]), delta.extent
            )
            total += t.coefficient * delta.dense(torch.float64).reshape(diff.shape)
        if not total.any():
            return []
        if any(t.module.algorithm != "full" for t in terms):
            self._note("dense", first.label, "the dense difference takes up the low-rank ones")
        like = [t.module.tensors["diff"] for t in terms if "diff" in t.module.tensors]
        return [replace(first, tensors={"diff": as_stored(total, like)}, keys=keys_of(terms))]

    def _side_by_side(self, groups: Sequence[tuple[ModuleState, float]]) -> ModuleState:
        """One LoRA: the ranks of all, the coefficients over the common scale on ``up``."""
        names, where = self.context.names, self.context.state.where
        modules = [module for module, _ in groups]
        forms = [lora_form(module, names, where) for module in modules]
        for module, form in zip(modules, forms):
            check_extent(modules[0], module, forms[0].extent, form.extent)
        if len({m.kind for m in modules}) > 1:
            raise ShapeError(
                f"`{modules[0].label}` is an embedding's in one adapter and not in another",
                where=where,
            )
        scale = common_scale([(abs(c), form.rank) for (_, c), form in zip(groups, forms)])
        pair = lowrank.stacked([(c / scale, form) for (_, c), form in zip(groups, forms)])
        up, down = shortest(*pair)
        shape = kernel_shape(modules, forms)
        if len(shape) == 2 and any(hides_kernel(m, names) for m in modules):
            self._note("kernel-unknown", modules[0].label, "taken for a Linear's: --base can tell")
        return lora_module(modules, up, down, shape, scale)

    def _with_bias(self, modules: list[ModuleState], terms: Sequence[Term]) -> list[ModuleState]:
        """The modules with the sum of the terms' bias differences, where the layout has a place."""
        modules = [m if "magnitude" in m.tensors else m.with_tensors(up_bias=None) for m in modules]
        held = [
            (t.coefficient, t.module.tensors[slot])
            for t in terms
            if "magnitude" not in t.module.tensors
            for slot in BIASES
            if slot in t.module.tensors
        ]
        if not held:
            return modules
        owner = modules[0] if modules else None
        if self.target.name == "peft" and owner is not None and owner.algorithm == "lora":
            inward = [(c / owner.scale, tensor) for c, tensor in held]
            return [owner.with_tensors(up_bias=weighted_sum(inward, owner.label))]
        bias = weighted_sum(held, terms[0].module.label)
        if owner is not None and owner.algorithm == "full":
            return [owner.with_tensors(diff_b=bias)]
        origin = next(t.module for t in terms if set(BIASES) & t.module.tensors.keys())
        dense = replace(
            origin,
            algorithm="full",
            tensors={"diff_b": bias},
            alpha=None,
            rule=UNSCALED,
            rank=None,
            options=prefix_of(origin),
        )
        return [*modules, dense]

    # How far the result is off

    def rows(self, modules: Sequence[ModuleState]) -> list[Row]:
        """A row per layer: what it became, and ‖Σ c·Δ − Δ'‖/‖Σ c·Δ‖ of what is written."""
        places: dict[tuple[str, str], list[ModuleState]] = {}
        for module in modules:
            places.setdefault((module.component, module.path), []).append(module)
        rows = []
        for place, written in places.items():
            layer = self.layers.get(place, SummedLayer([]))
            rows.append(self._row(layer, written))
        return rows

    def _row(self, layer: SummedLayer, written: list[ModuleState]) -> Row:
        shown = "+".join(dict.fromkeys(m.algorithm for m in written))
        same = as_they_are(layer.terms) and len(written) == len(layer.terms)
        if not layer.terms or (
            same and all(identical(t.module, m) for t, m in zip(layer.terms, written))
        ):
            return Row(written[0].label, shown, "identical", 0.0, ranks_of(layer.terms, written))
        if is_nonfinite_allowed() and any(map(nonfinite_of, written)):
            return Row(written[0].label, shown, NO_NUMBER, 0.0, ranks_of(layer.terms, written))
        error = self._error(layer.terms, written)
        change = "rounded" if error <= EXACT else "lossy"
        return Row(written[0].label, shown, change, error, ranks_of(layer.terms, written))

    def _error(self, terms: Sequence[Term], written: Sequence[ModuleState]) -> float:
        terms = [t for t in terms if moves_weight(t.module)]
        moving = [m for m in written if moves_weight(m)]
        if any("magnitude" in m.tensors for m in moving) or not terms or not moving:
            return 0.0  # taken as it is; biases are sums of float64, rounded once
        if all(m.algorithm == "hra" for m in moving):
            return rotated_apart([t.module for t in terms], moving[0])
        if all(t.module.algorithm == "hra" for t in terms):
            terms = [Term(chained(terms), 1.0)]
        if len(moving) == 1 and (share := coefficient_error(terms, moving[0])) is not None:
            return share
        if all(is_low_rank(m) for m in (*(t.module for t in terms), *moving)):
            names, where = self.context.names, self.context.state.where
            ours = [(t.coefficient, lora_form(t.module, names, where)) for t in terms]
            theirs = [(m.scale, lora_form(m, names, where)) for m in moving]
            return lowrank.relative(*lowrank.terms_apart(ours, theirs))
        return dense_distance(
            [without_bias(t.weighted()) for t in terms],
            [without_bias(m) for m in moving],
            self.context,
            self.context,
        )
