"""Adapters folded into a live model's own weights, and taken out again, block by block.

No second copy of a weight is made: a float32 weight is changed where it lies, others go through a
block of float32 that stays in cache, and are rounded once. Everything that can be refused is, before
the first number changes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from adaptsurgery.adapters.adapter import Adapter, load, shapes_of
from adaptsurgery.adapters.report import Report, Row
from adaptsurgery.algorithms.full import Norm
from adaptsurgery.checkpoint.bridge import to_torch
from adaptsurgery.checkpoint.pool import about, run
from adaptsurgery.core.blocks import (
    BlockEdit,
    Placed,
    change_rows,
    check_places,
    check_rows,
    edit_for,
    edit_of,
    settle,
)
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.update import Update, parts_of
from adaptsurgery.jobs.values import check_whole
from adaptsurgery_formats import Note
from adaptsurgery_formats.errors import (
    InexactError,
    NameLookupError,
    ShapeError,
    ValueRefused,
    nearest,
)

Adapters = Adapter | Mapping[str, Update] | str | os.PathLike[str]
Weighted = Adapters | Sequence[Adapters | tuple[Adapters, float]]
Job = Callable[[object], None]
PIECE = 1 << 21  # numbers changed in one job
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def fold(
    model: nn.Module,
    adapter: Weighted,
    weight: float = 1.0,
    *,
    compute: torch.dtype = torch.float32,
    component: str | None = None,
    workers: int | None = None,
) -> Report:
    """Fold adapters into the weights of ``model``, in place, by the law of core/law.py.

    ``adapter`` is an Adapter, a path or Hub name, a mapping of module paths to updates, or a list of
    these, or of pairs with a weight each; ``weight`` multiplies them all. ``component`` chooses one
    where an adapter has several ("unet"). Computed in ``compute``, float32 at least, and rounded
    once. Parameters that the adapter saves whole (PEFT's modules_to_save) replace the model's.
    A weight that modules share is folded once where the same update is for all of them; where it is
    for some, those get a copy of their own, and a note says so.

    Raises, before anything is changed, NameLookupError ("unknown-module") for modules that the model
    does not have, ShapeError, ValueRefused ("quantised-weight", "no-weight", "two-renorms",
    "not-on-device"); and while it changes, ValueRefused "non-finite" where the result overflows.
    """
    return _run("fold", model, adapter, weight, compute, component, workers)


def unfold(
    model: nn.Module,
    adapter: Weighted,
    weight: float = 1.0,
    *,
    compute: torch.dtype = torch.float32,
    component: str | None = None,
    workers: int | None = None,
) -> Report:
    """Take adapters out of a model that they were folded into: the inverse of ``fold``.

    Called with the same list, in the same order. It gives W back but for the rounding of W' (and of
    W) to the stored dtype. Raises what ``fold`` raises, and InexactError ("no-inverse") for a DoRA
    and for saved parameters, whose old values are gone.
    """
    return _run("unfold", model, adapter, weight, compute, component, workers)


def _run(
    job: str,
    model: nn.Module,
    adapter: Weighted,
    weight: float,
    compute: torch.dtype,
    component: str | None,
    workers: int | None,
) -> Report:
    if workers is not None:
        check_whole("workers", workers)
    work = _Work(model, compute, inverse=job == "unfold")
    for one, strength in _pairs(adapter, weight):
        work.take(one, strength, component)
    with torch.no_grad():
        work.check()
        work.untie()
        work.replace_saved()
        run(work.jobs(), dict, torch.get_num_threads() if workers is None else workers)
    work.report.verdict = f"{len(work.report.rows)} modules {job}ed"
    return work.report


def _pairs(adapter: Weighted, weight: float) -> Iterator[tuple[Mapping[str, Update], float]]:
    several = not isinstance(adapter, (Mapping, str, os.PathLike))
    for one in cast("Iterable[Adapters]", adapter) if several else [adapter]:
        given, strength = one if isinstance(one, tuple) else (one, 1.0)
        loaded = given if isinstance(given, Mapping) else load(cast("str", given))
        yield loaded, strength * weight


@dataclass(eq=False)
class _Site:
    """A parameter to change, by the module that holds it, and the places on it."""

    name: str
    module: nn.Module
    slot: str
    shape: tuple[int, ...]
    places: list[Placed] = field(default_factory=list)

    @property
    def stored(self) -> Tensor:
        parameter = getattr(self.module, self.slot)
        assert isinstance(parameter, Tensor)
        return parameter.detach()

    @property
    def missing(self) -> bool:
        """Whether it is a bias that the module has not got yet."""
        return getattr(self.module, self.slot, None) is None


class _Work:
    """What is to change in a model: gathered and checked first, then done."""

    def __init__(self, model: nn.Module, compute: torch.dtype, inverse: bool) -> None:
        self.model, self.inverse = model, inverse
        self.compute = torch.promote_types(compute, torch.float32)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.sites: dict[tuple[int, str], _Site] = {}
        self.saved: list[tuple[str, Tensor]] = []
        self.report = Report("unfold" if inverse else "fold")

    def take(self, adapter: Mapping[str, Update], weight: float, component: str | None) -> None:
        """Every update of an adapter, to the tensors of its module."""
        adapter = self._on_own_modules(adapter)
        names = _named(adapter, component)
        saved = _saved(adapter, component)
        missing = [name for name in names if name not in self.modules]
        missing += [name for name in saved if name.rpartition(".")[0] not in self.modules]
        if not names:
            raise NameLookupError("the adapter changes nothing in this model")
        if missing:
            raise NameLookupError(
                f"the model has not {len(missing)} of the {len(names) + len(saved)} modules adapted",
                where=str(getattr(adapter, "path", "")),
                seen=", ".join(f"`{name}`" for name in missing[:5]),
                next=nearest(missing[0], self.modules)
                or "is it an adapter of this model, and of this component?",
            )
        for name, key in names.items():
            with about(name):
                self._place(name, adapter[key], weight)
        if saved:
            self._take_saved(saved, weight)

    def _on_own_modules(self, adapter: Mapping[str, Update]) -> Mapping[str, Update]:
        """A file's adapter on the model's modules, where its family has other names for them."""
        if not isinstance(adapter, Adapter) or len(adapter.components) > 1:
            return adapter
        if all(name in self.modules for name in adapter):
            return adapter
        try:
            return adapter.on(shapes_of(self.model))
        except NameLookupError:
            return adapter  # the names that are missing are told with the adapter's own

    def _place(self, name: str, update: Update, weight: float) -> None:
        module, scaled = self.modules[name], update.scaled(weight)
        parts = parts_of(scaled)
        for part in parts:
            _check_finite(part)
        if any(part.on_weight for part in parts):
            turned = not isinstance(parts[0], Norm) and Layer.from_module(module).transposed
            shape = tuple(module.weight.shape)
            self._site(name, "weight", shape).places.append(Placed(scaled, transposed=turned))
        if any(part.on_bias for part in parts):
            held = getattr(module, "bias", None)
            bias = scaled.fold_bias(None) if held is None else held
            if bias is not None:
                shape = tuple(bias.shape)
                self._site(name, "bias", shape).places.append(Placed(scaled, bias=True))
        algorithms = "+".join(part.name for part in parts)
        self.report.rows.append(Row(name, algorithms, self.report.job))

    def _site(self, name: str, slot: str, shape: tuple[int, ...]) -> _Site:
        module = self.modules[name]
        new = _Site(f"{name}.{slot}", module, slot, shape)
        return self.sites.setdefault((id(module), slot), new)

    def _take_saved(self, saved: Mapping[str, Tensor], weight: float) -> None:
        if self.inverse:
            raise InexactError(
                f"{len(saved)} parameters were replaced outright; what they were is gone",
                seen=", ".join(list(saved)[:5]),
                code="no-inverse",
            )
        if weight != 1.0:
            raise ValueRefused(
                f"parameters saved whole have no weight {weight:g}", next="use 1", code="no-weight"
            )
        for name, tensor in saved.items():
            path, _, slot = name.rpartition(".")
            held = getattr(self.modules[path], slot, None)
            if not isinstance(held, Tensor) or held.shape != tensor.shape:
                seen = None if held is None else list(held.shape)
                raise ShapeError(f"`{name}` is saved as {list(tensor.shape)}", seen=f"{seen}")
            self.saved.append((name, tensor))

    def check(self) -> None:
        """Refuse whatever can be refused, while the model is as it was."""
        for site in self.sites.values():
            with about(site.name):
                if not site.missing:
                    _check_stored(site.stored, site.shape)
                check_places(site.places, site.shape, inverse=self.inverse)

    def untie(self) -> None:
        """Give a tensor that modules share to those alone that change it, unless all do the same."""
        holders = _holders(self.modules)
        for key, site in list(self.sites.items()):
            if site.missing:
                weight = cast(Tensor, site.module.weight)
                setattr(site.module, site.slot, nn.Parameter(weight.new_zeros(site.shape)))
                self._note("new-bias", site.name, "the module had no bias; it has one now")
                continue
            shared = holders.get(_address(site.stored), [])
            if len(shared) < 2:
                continue
            same = [self.sites.get(holder) for holder, _ in shared]
            if all(other is not None and _alike(other, site) for other in same):
                if same[0] is not site:
                    del self.sites[key]
                    self._note("tied", site.name, f"shared with {shared[0][1]}: folded once")
            else:
                self._own(site, [name for holder, name in shared if holder != key])

    def _own(self, site: _Site, others: list[str]) -> None:
        held = getattr(site.module, site.slot)
        setattr(site.module, site.slot, nn.Parameter(site.stored.clone(), held.requires_grad))
        config = getattr(self.model, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # type: ignore[union-attr]
        self._note("untied", site.name, f"no longer shared with {', '.join(others)}")

    def _note(self, code: str, where: str, text: str) -> None:
        self.report.notes.append(Note(code, where, text))

    def jobs(self) -> Iterator[Job]:
        """One job a piece of a tensor."""
        for site in self.sites.values():
            stored = site.stored
            with about(site.name):
                edit = self._edit(site, stored)
            if not stored.is_contiguous():
                yield partial(_as_copy, site.name, edit, stored)
                continue
            matrix = stored.view(edit.rows, edit.columns)
            step = edit.unit if edit.whole else max(1, PIECE // max(edit.columns, 1))
            for start in range(0, edit.rows, step):
                yield partial(_in_place, site.name, edit, matrix[start : start + step], start)

    def _edit(self, site: _Site, stored: Tensor) -> BlockEdit:
        build = partial(
            edit_of, site.places, site.shape, device=stored.device, inverse=self.inverse
        )
        return edit_for(
            lambda wide: build(compute=wide),
            stored.dtype,
            stored.dtype,
            self.compute,
            stored.device,
        )

    def replace_saved(self) -> None:
        for name, tensor in self.saved:
            path, _, slot = name.rpartition(".")
            getattr(self.modules[path], slot).detach().copy_(tensor)
            self.report.rows.append(Row(name, "saved", "replaced"))


def _in_place(name: str, edit: BlockEdit, rows: Tensor, start: int, _: object) -> None:
    with about(name):
        if rows.dtype == edit.compute:
            edit.apply(rows, start)
            check_rows(rows, rows, start)
        elif edit.whole:
            changed = rows.to(edit.compute)
            edit.apply(changed, start)
            settle(changed, rows, start)
        else:
            stride = min(rows.shape[0], edit.stride)
            scratch = torch.empty((stride, edit.columns), dtype=edit.compute, device=rows.device)
            change_rows(edit, rows, rows, start, scratch)


def _as_copy(name: str, edit: BlockEdit, stored: Tensor, _: object) -> None:
    """A weight whose rows do not follow one another (channels last)."""
    with about(name):
        changed = stored.to(edit.compute).contiguous().view(edit.rows, edit.columns)
        edit.apply(changed)
        out = torch.empty(changed.shape, dtype=stored.dtype, device=stored.device)
        settle(changed, out)
        stored.copy_(out.view(stored.shape))


def _named(adapter: Mapping[str, Update], component: str | None) -> dict[str, str]:
    """Module path in the model → the adapter's key for it."""
    known = adapter.components if isinstance(adapter, Adapter) else []
    if component is None or len(known) < 2:
        return {name: name for name in adapter}
    return {n.removeprefix(f"{component}."): n for n in adapter if n.startswith(f"{component}.")}


def _saved(adapter: Mapping[str, Update], component: str | None) -> dict[str, Tensor]:
    if not isinstance(adapter, Adapter):
        return {}
    several = len(adapter.components) > 1
    parameters = {}
    for name, tensors in adapter.saved.items():
        if component is None or not several or name == component:
            prefix = f"{name}." if several and component is None else ""
            parameters.update({prefix + key: to_torch(tensor) for key, tensor in tensors.items()})
    adapter.check_unchanged()
    return parameters


def _check_stored(stored: Tensor, shape: tuple[int, ...]) -> None:
    if stored.dtype not in _FLOATING:
        raise ValueRefused(
            f"a weight stored as {str(stored.dtype).removeprefix('torch.')} takes no update",
            next="load the model unquantised",
            code="quantised-weight",
        )
    if stored.device.type == "meta":
        raise ValueRefused("the weight is on the meta device: it has no numbers", code="no-numbers")
    if tuple(stored.shape) != shape:
        raise ShapeError(f"a change of {list(shape)} for a tensor {list(stored.shape)}")


def _check_finite(part: Update) -> None:
    for tensor in part.tensors().values():
        if not math.isfinite(float(tensor.sum())) and not bool(tensor.isfinite().all()):
            raise ValueRefused(f"its {part.plain.name} is not finite", code="non-finite")


def _address(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)


def _holders(
    modules: Mapping[str, nn.Module],
) -> dict[tuple[object, ...], list[tuple[tuple[int, str], str]]]:
    """Every parameter's memory → (module, slot) and name of all that hold it."""
    holders: dict[tuple[object, ...], dict[tuple[int, str], str]] = {}
    for name, module in modules.items():
        for slot, parameter in module.named_parameters(recurse=False):
            held = holders.setdefault(_address(parameter.detach()), {})
            held.setdefault((id(module), slot), f"{name}.{slot}")
    return {address: list(held.items()) for address, held in holders.items()}


def _alike(a: _Site, b: _Site) -> bool:
    """Whether two sites change their tensor in the same way, by the same numbers."""
    if a is b:
        return True
    ours = [(p.transposed, p.bias, part) for p in a.places for part in parts_of(p.update)]
    theirs = [(p.transposed, p.bias, part) for p in b.places for part in parts_of(p.update)]
    return len(ours) == len(theirs) and all(
        x[:2] == y[:2] and _same_update(x[2], y[2]) for x, y in zip(ours, theirs)
    )


def _same_update(a: object, b: object) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if is_dataclass(a):
        return all(_same_update(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool(a == b)
