"""Adapters → changes of the base's stored tensors, from headers alone.

Every module of every adapter has to be found (see ``weights`` and ``align``), has to fit, and says
then which rows of which stored tensors it changes. Nothing is left over silently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from adaptsurgery.checkpoint.base import Base, Located
from adaptsurgery.jobs.merging.matched import Change, Matched, Saved, TensorName
from adaptsurgery.jobs.merging.quantised import READABLE, quantised_error
from adaptsurgery_formats import AdapterState, ModuleState, Note
from adaptsurgery_formats.errors import (
    InexactError,
    LayoutError,
    NameLookupError,
    ShapeError,
    SurgeryError,
    ValueRefused,
    nearest,
)
from adaptsurgery_formats.fitting import fit
from adaptsurgery_formats.names import names_of_base, weights_of_base
from adaptsurgery_formats.names.aligning import SAME, Aligned, Alignment, Lookup, best_alignments
from adaptsurgery_formats.names.cuts import Cut, cut_of, part_of
from adaptsurgery_formats.names.families import bias_name
from adaptsurgery_formats.names.orientation import CONV1D_NAMES, turned_by, with_sign
from adaptsurgery_formats.names.rows import Rows, StoredWeight
from adaptsurgery_formats.other_names import ambiguous_alignment, one_weight
from adaptsurgery_formats.state import delta_shape, magnitude_axis, shapes_of
from adaptsurgery_formats.tensors import FLOAT_DTYPES, Tensor, same_bytes
from adaptsurgery_formats.traits import traits_of

_HINTS = 8  # unmatched names that get a look for the nearest one
_SHOWN = 40


@dataclass(frozen=True)
class _Hit:
    """A module with the one weight that it was found at."""

    adapter: int
    number: int
    module: ModuleState
    component: str
    weight: StoredWeight


def match(
    base: Base,
    adapters: list[AdapterState],
    *,
    allow_unmatched: bool = False,
    dequantize: bool = False,
) -> Matched:
    """Every module of the adapters on the base's tensors.

    Raises NameLookupError ("unmatched-modules", "ambiguous-alignment", "ambiguous-module",
    "duplicate-module", "nothing-matched"), ShapeError where a module does not fit, LayoutError
    ("interleaved-weight", "no-bias"), ValueRefused ("quantised-weight").
    """
    return _Matcher(base, adapters, dequantize).run(allow_unmatched)


class _Matcher:
    def __init__(self, base: Base, adapters: list[AdapterState], dequantize: bool) -> None:
        self.base, self.adapters = base, adapters
        self.readable = (*FLOAT_DTYPES, *READABLE) if dequantize else FLOAT_DTYPES
        self.names = names_of_base(base.components, base.where, base.parameters, base.configs)
        self.weights = weights_of_base(self.names, base.parameters, base.configs)
        self.lookups: dict[tuple[str, bool], Lookup] = {}
        self.alignments: dict[tuple[int, str], tuple[str, Alignment]] = {}
        self.hints: list[tuple[str, str, str]] = []
        self.allow_unmatched = False
        self.out = Matched()

    def run(self, allow_unmatched: bool) -> Matched:
        self.allow_unmatched = allow_unmatched
        hits = [hit for number in range(len(self.adapters)) for hit in self._hits(number)]
        if self.out.unmatched and not allow_unmatched:
            raise self._quantised() or self._unmatched_error()
        self._refuse_twice(hits)
        self._place_saved()
        cuts = self._cuts(hits)
        for hit in hits:
            self._place(hit, cuts)
        self._refuse_two_doras()
        self.out.modules = len(hits)
        if self.out.unmatched:
            text = f"{len(self.out.unmatched)} modules were left out: " + _listed(
                self.out.unmatched
            )
            self.out.notes.append(Note("unmatched-modules", self.base.where, text))
        elif allow_unmatched:
            text = "every module was found: --allow-unmatched has left out none"
            self.out.notes.append(Note("all-matched", self.base.where, text))
        return self.out

    # -- Names

    def _hits(self, number: int) -> Iterator[_Hit]:
        """The modules of one adapter where they are found; the others are put down as unmatched."""
        state = self.adapters[number]
        count = 0
        for (component, prefix), members in _groups(state).items():
            homes = self._homes(component, prefix)
            alignment = self._align(number, homes, component, members)
            home, aligned = alignment if alignment else ("", None)
            for position, module in members:
                weights = aligned.found.get(module.path, ()) if aligned else ()
                if not weights:
                    self._leave_out(number, module, home if alignment else next(iter(homes), ""))
                    continue
                count += 1
                yield _Hit(number, position, module, home, one_weight(weights, module, state.where))
        if not count and not any(state.saved.values()):
            raise self._nothing_error(number)

    def _homes(self, component: str, prefix: str) -> list[str]:
        """The base's components in which such modules may lie."""
        known = list(self.weights)
        if component in self.weights:
            return [component]
        if len(known) == 1:
            return known
        if prefix in self.names.by_prefix:
            home = self.names.by_prefix[prefix].name
            return [home] if home in self.weights else []
        return [] if component or prefix.startswith("lora_") else known

    def _align(
        self,
        number: int,
        homes: list[str],
        component: str,
        members: list[tuple[int, ModuleState]],
    ) -> tuple[str, Aligned] | None:
        """The component and the alignment that find the most modules; None where none finds any."""
        modules = [m for _, m in members]
        paths = list(dict.fromkeys(m.path for m in modules))
        flat = modules[0].naming == "flat"
        tried: list[tuple[str, Aligned]] = []
        for home in homes:
            key = (home, flat)
            if key not in self.lookups:
                self.lookups[key] = Lookup(self.weights[home], flat)

            def fits(aligned: Aligned, home: str = home) -> bool:
                return self._fits(home, modules, aligned)

            tried += [(home, a) for a in best_alignments(self.lookups[key], paths, fits)]
        most = max((len(a.found) for _, a in tried), default=0)
        best = [(home, a) for home, a in tried if len(a.found) == most]
        if len(best) > 1:
            best = [(home, a) for home, a in best if self._fits(home, modules, a)] or best
        if not most:
            return None
        if len(best) > 1 and (most == len(paths) or self.allow_unmatched):
            raise ambiguous_alignment(
                modules[0].path,
                [(home, a.alignment) for home, a in best],
                self.adapters[number].where,
            )
        if best[0][1].alignment != SAME and 2 * most <= len(paths):
            return None  # a few names alike are no alignment
        home, aligned = best[0]
        self.alignments[number, component] = (home, aligned.alignment)
        if aligned.alignment != SAME:
            text = f"names aligned with the base's: {aligned.alignment}"
            self.out.notes.append(Note("aligned-names", self.adapters[number].where, text))
        return home, aligned

    def _fits(self, home: str, modules: list[ModuleState], aligned: Aligned) -> bool:
        """Whether the shapes of all modules found go with an alignment."""
        for module in modules:
            for weight in aligned.found.get(module.path, ()):
                if weight.part >= 0 or weight.refused:
                    continue
                try:
                    turned = any(p.turned for p in weight.rows)
                    named = _named(module, weight.rows)
                    fit(with_sign(named, turned), self._shape(home, weight), "")
                except SurgeryError:
                    return False
        return True

    def _leave_out(self, number: int, module: ModuleState, home: str) -> None:
        label = module.keys[0] if module.keys else module.label
        self.out.unmatched.append(label)
        if len(self.hints) < _HINTS and home in self.weights:
            lookup = self.lookups.get((home, module.naming == "flat"))
            self.hints.append(
                (label, module.path, nearest(module.path, lookup.table if lookup else ()))
            )

    def _unmatched_error(self) -> NameLookupError:
        hints = [f"`{path}`: {hint or 'nothing like it'}" for _, path, hint in self.hints]
        return NameLookupError(
            f"{len(self.out.unmatched)} modules of the adapters are not in the base",
            where=self.base.where,
            seen=_listed(self.out.unmatched),
            next="; ".join(hints) + ". Leave them out with --allow-unmatched, or pass their base",
            code="unmatched-modules",
        )

    def _nothing_error(self, number: int) -> SurgeryError:
        state = self.adapters[number]
        if quantised := self._quantised():
            return quantised
        error = self._unmatched_error()
        return NameLookupError(
            "nothing of this adapter is in the base",
            where=state.where,
            seen=error.seen,
            next="; ".join(f"`{p}`: {h or 'nothing like it'}" for _, p, h in self.hints)
            or f"components of the base: {', '.join(self.weights)}",
            code="nothing-matched",
        )

    def _quantised(self) -> ValueRefused | None:
        """The error for a GPTQ or AWQ base, whose weights have other names."""
        for parameters in self.base.parameters.values():
            packed = next((n for n in parameters if n.endswith((".qweight", ".weight_packed"))), "")
            if packed:
                return quantised_error(packed, parameters[packed], self.base.where)
        return None

    def _refuse_twice(self, hits: list[_Hit]) -> None:
        seen: dict[tuple[int, str, StoredWeight, str], _Hit] = {}
        for hit in hits:
            spot = (hit.adapter, hit.component, hit.weight, hit.module.algorithm)
            if spot in seen:
                raise NameLookupError(
                    f"`{hit.module.label}` is adapted twice",
                    where=self.adapters[hit.adapter].where,
                    seen=", ".join([*seen[spot].module.keys[:1], *hit.module.keys[:1]]),
                    next="remove one of the two; readers would take the last or the sum",
                    code="duplicate-module",
                )
            seen[spot] = hit

    def _refuse_two_doras(self) -> None:
        """Two norms for one row: neither adapter would have its own."""
        for (_, name), changes in self.out.changes.items():
            doras = [
                c for c in changes if c.what == "weight" and "magnitude" in self._of(c).tensors
            ]
            for number, one in enumerate(doras):
                other = next((c for c in doras[:number] if one.meets(c)), None)
                if other is not None:
                    raise ValueRefused(
                        f"two DoRAs set the norms of `{name}`",
                        where=self.adapters[one.adapter].where,
                        seen=", ".join(k for c in (other, one) for k in self._of(c).keys[:1]),
                        next="merge one of them first, and the other into the result",
                        code="two-renorms",
                    )

    def _of(self, change: Change) -> ModuleState:
        return self.adapters[change.adapter].modules[change.module]

    # -- Rows

    def _cuts(self, hits: list[_Hit]) -> dict[TensorName, Cut]:
        """Rows of q, k and v in each fused weight that has an adapter on one of them."""
        widths: dict[TensorName, dict[int, int]] = {}
        for hit in hits:
            if hit.weight.part >= 0:
                known = widths.setdefault((hit.component, hit.weight.rows[0].name), {})
                if outputs := delta_shape(hit.module)[0]:
                    known[hit.weight.part] = outputs
        return {
            (component, name): self._cut(component, name, known)
            for (component, name), known in widths.items()
        }

    def _cut(self, component: str, name: str, known: Mapping[int, int]) -> Cut:
        parameters, config = self.base.parameters[component], self.base.configs.get(component, {})
        return cut_of(name, parameters, config, known, self.base.where)

    def _place(self, hit: _Hit, cuts: Mapping[TensorName, Cut]) -> None:
        """A module's changes, piece by piece."""
        state = self.adapters[hit.adapter]
        taken = hit.weight.rows
        if hit.weight.part >= 0:
            taken = part_of(hit.weight, cuts[hit.component, taken[0].name]).rows
        for piece in taken:
            self._check_float(hit.component, piece.name)
        weight = StoredWeight(taken, tied=hit.weight.tied)
        shape = self._shape(hit.component, weight)
        module = with_sign(_named(hit.module, taken), any(p.turned for p in taken))
        module = fit(module, shape, state.where)
        if len(taken) > 1 and "magnitude" in module.tensors and magnitude_axis(module) == "in":
            raise InexactError(
                f"`{module.label}` cannot be cut: its DoRA norm is taken per input, over all rows",
                where=state.where,
                seen=", ".join(f"`{p.name}`" for p in taken),
                code="fused-mixed",
            )
        first = 0
        for piece in taken:
            first += self._change(hit, module, piece, shape, first, weight.tied)

    def _change(
        self,
        hit: _Hit,
        module: ModuleState,
        piece: Rows,
        shape: tuple[int, ...],
        first: int,
        tied: str,
    ) -> int:
        """Put down one piece's change of its weight, and of its bias; returns its rows."""
        config = self.base.configs.get(hit.component, {})
        parameters = self.base.parameters[hit.component]
        turned = piece.turned
        if turned is None:
            turned = turned_by(module, shape, piece.name, parameters, config)
        whole = parameters[piece.name].shape
        whole = whole if piece.index is None else whole[1:]
        rows = piece.stop - piece.start or (self._grown(hit, piece) or whole)[int(turned)]
        target = (hit.component, tied or piece.name)
        if tied:
            self.out.heads[target] = (hit.component, piece.name)
        if changes_weight(module):
            self.out.changes.setdefault(target, []).append(
                Change(
                    hit.adapter, hit.number, "weight", shape, piece.start, rows, first,
                    piece.index, turned,
                )
            )  # fmt: skip
        if changes_bias(module):
            self._change_bias(hit, module, piece, shape, rows, first, turned)
        return rows

    def _change_bias(
        self,
        hit: _Hit,
        module: ModuleState,
        piece: Rows,
        shape: tuple[int, ...],
        rows: int,
        first: int,
        turned: bool,
    ) -> None:
        name = bias_name(piece.name)
        if name not in self.base.parameters[hit.component]:
            if not _shifts(module):
                return  # PEFT's lora_bias is for all layers: zeros where there is none
            raise LayoutError(
                f"`{module.label}` changes a bias, and the base has none there",
                where=self.adapters[hit.adapter].where,
                seen=f"no `{name}`",
                next="a bias that the model does not know would be dropped on loading",
                code="no-bias",
            )
        self._check_float(hit.component, name)
        self.out.changes.setdefault((hit.component, name), []).append(
            Change(
                hit.adapter, hit.number, "bias", shape, piece.start, rows, first, piece.index,
                turned,
            )
        )  # fmt: skip

    def _shape(self, component: str, weight: StoredWeight) -> tuple[int, ...]:
        """The stored shape of all rows, one below the other: (o, i, *k), or (i, o) if turned."""
        shapes = []
        for piece in weight.rows:
            saved = self.out.saved.get((component, weight.tied or piece.name))
            shape = self._saved_shape(saved) or self.base.parameters[component][piece.name].shape
            shape = shape if piece.index is None else shape[1:]
            if piece.stop:
                rows = piece.stop - piece.start
                shape = (shape[0], rows) if piece.turned else (rows, *shape[1:])
            shapes.append(shape)
        if len(shapes) == 1:
            return shapes[0]
        return (sum(s[0] for s in shapes), *shapes[0][1:])

    def _saved_shape(self, saved: Saved | None) -> tuple[int, ...] | None:
        if saved is None:
            return None
        return self.adapters[saved.adapter].saved[saved.component][saved.name].shape

    def _grown(self, hit: _Hit, piece: Rows) -> tuple[int, ...] | None:
        return self._saved_shape(self.out.saved.get((hit.component, hit.weight.tied or piece.name)))

    def _check_float(self, component: str, name: str) -> None:
        at = self.base.parameters[component][name]
        if at.dtype not in self.readable:
            raise quantised_error(name, at, self.base.where)

    # -- Replaced parameters

    def _place_saved(self) -> None:
        for number, state in enumerate(self.adapters):
            for component, tensors in state.saved.items():
                home, alignment = self.alignments.get(
                    (number, component), (component if component in self.weights else next(iter(self.weights)), SAME)
                )  # fmt: skip
                for name in tensors:
                    self._save(Saved(number, component, name), home, alignment)

    def _save(self, saved: Saved, home: str, alignment: Alignment) -> None:
        parameters = self.base.parameters[home]
        path, _, last = saved.name.replace(".base_layer.", ".").rpartition(".")
        aligned = alignment.of(path)
        name = self._saved_name(home, aligned, last)
        state = self.adapters[saved.adapter]
        tensor = state.saved[saved.component][saved.name]
        before = self.out.saved.get((home, name))
        if before is not None:
            raise NameLookupError(
                f"two adapters replace `{name}`",
                where=state.where,
                seen=self.adapters[before.adapter].where,
                next="keep the parameter in one of them",
                code="two-replacements",
            )
        weight = self.weights[home].get(aligned)
        stored = parameters.get(weight.rows[0].name if weight and weight.tied == name else name)
        if stored is not None and stored.tensor is not None and _same(tensor, stored.tensor):
            return  # PEFT saves the table beside an embedding's LoRA, changed or not
        self.out.saved[home, name] = saved
        if name not in parameters:
            if weight and weight.tied == name:
                self.out.heads[home, name] = (home, weight.rows[0].name)
                return
            text = f"`{name}` is not in the base and is added"
            self.out.notes.append(Note("added-parameter", state.where, text))
            return
        if tensor.dtype in FLOAT_DTYPES or tensor.dtype != parameters[name].dtype:
            self._check_floats(home, name, tensor, state.where)
        self._note_replaced(name, parameters[name], tensor.dtype, tensor.shape, state.where)

    def _check_floats(self, home: str, name: str, tensor: Tensor, where: str) -> None:
        """A parameter is rounded to the stored dtype, from floats to floats alone."""
        self._check_float(home, name)
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueRefused(
                f"`{name}` is {self.base.parameters[home][name].dtype}, and is replaced by {tensor.dtype}",
                where=where,
                code="dtype",
            )

    def _saved_name(self, home: str, path: str, last: str) -> str:
        """The stored name of a replaced parameter; its own, aligned, where the base has none."""
        plain = f"{path}.{last}"
        weight = self.weights[home].get(path)
        if plain in self.base.parameters[home] or weight is None:
            return plain
        if weight.tied:
            return weight.tied
        piece = weight.rows[0]
        if len(weight.rows) > 1 or piece.stop or piece.index is not None or weight.part >= 0:
            raise LayoutError(
                f"`{plain}` replaces a part of `{piece.name}`",
                where=self.base.where,
                next="only whole parameters can be replaced",
                code="replaced-part",
            )
        return piece.name if last == "weight" else bias_name(piece.name)

    def _note_replaced(
        self, name: str, at: Located, dtype: str, shape: tuple[int, ...], where: str
    ) -> None:
        note = self.out.notes.append
        if shape != at.shape:
            if shape[1:] != at.shape[1:] or len(shape) != 2:
                raise ShapeError(
                    f"`{name}` is replaced by one of another shape",
                    where=where,
                    seen=f"{list(shape)} for {list(at.shape)}",
                    next="only the rows of a table may grow",
                )
            note(Note("grown-table", where, f"`{name}`: {at.shape[0]} rows become {shape[0]}"))
        if dtype != at.dtype:
            note(Note("rounded-parameter", where, f"`{name}` is replaced, {dtype} as {at.dtype}"))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and same_bytes(a, b)


def changes_weight(module: ModuleState) -> bool:
    """Whether a module changes its layer's weight, not the bias alone."""
    row = traits_of(module.algorithm)
    return not row.dense or not module.tensors.keys() <= {*row.shifts}


def changes_bias(module: ModuleState) -> bool:
    row = traits_of(module.algorithm)
    shifts = any(slot in module.tensors for slot in row.shifts)
    return shifts or row.scales_bias(shapes_of(module), module.options)


def _shifts(module: ModuleState) -> bool:
    """Whether more than zeros is added to a bias."""
    shifts = traits_of(module.algorithm).shifts
    return any(any(module.tensors[s].read()) for s in shifts if s in module.tensors)


def _groups(state: AdapterState) -> dict[tuple[str, str], list[tuple[int, ModuleState]]]:
    """The modules of an adapter, numbered, by component and prefix."""
    groups: dict[tuple[str, str], list[tuple[int, ModuleState]]] = {}
    for number, module in enumerate(state.modules):
        prefix = str(module.options.get("prefix", ""))
        groups.setdefault((module.component, prefix), []).append((number, module))
    return groups


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"`{n}`" for n in names[:_SHOWN]) + more


def _named(module: ModuleState, taken: Sequence[Rows]) -> ModuleState:
    """A module of a flat name under its weight's own, which alone can tell transformers' Conv1D."""
    path = taken[0].name.removesuffix(".weight")
    if module.naming != "flat" or len(taken) > 1 or path.rpartition(".")[2] not in CONV1D_NAMES:
        return module
    return module.changed(path=path)
