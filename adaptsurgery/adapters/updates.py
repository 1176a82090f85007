"""From a parsed module to an Update of the algebra, and to the weight that it changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING

from adaptsurgery.adapters.loading import Loaded
from adaptsurgery.checkpoint.bridge import from_torch, to_torch
from adaptsurgery.checkpoint.finite import count_nonfinite, find_nonfinite
from adaptsurgery.checkpoint.writer import non_finite_error
from adaptsurgery_formats import ModuleState, Tensor
from adaptsurgery_formats.errors import InexactError, LayoutError, ValueRefused
from adaptsurgery_formats.names import Names
from adaptsurgery_formats.names.orientation import is_transposed, turned_by
from adaptsurgery_formats.names.rows import Rows
from adaptsurgery_formats.state import ALPHA_OVER_R, delta_shape, module_rank, options_of
from adaptsurgery_formats.traits import TRAITS, Traits

if TYPE_CHECKING:
    import torch

    from adaptsurgery.core.update import Update


_allowed: ContextVar[bool] = ContextVar("nonfinite allowed", default=False)


@contextmanager
def nonfinite_allowed(allowed: bool = True) -> Iterator[None]:
    """Within, updates may be built of tensors that hold NaN or infinity: --allow-nonfinite."""
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def is_nonfinite_allowed() -> bool:
    return _allowed.get()


def canonical_shape(module: ModuleState, names: Names | None) -> tuple[int, ...] | None:
    """The weight's shape (o, i, *k), turned round for weights stored (i, o); None if unknown."""
    component = names.components.get(module.component) if names else None
    shape = component.shape(module.path, module.naming) if component else None
    return shape[::-1] if shape is not None and is_transposed(module, shape) else shape


def update_of(module: ModuleState, names: Names | None, where: str = "") -> Update:
    """The module as an Update with torch tensors.

    Raises ValueRefused ("non-finite") for NaN or infinity but within ``nonfinite_allowed``,
    InexactError for what is no update of a weight at all.
    """
    from adaptsurgery.algorithms import build

    if module.options.get("not_kronecker"):
        raise InexactError(
            f"`{module.label}`: PEFT scrambles a Conv1d LoKr with a full w2; it has no ΔW of "
            "Kronecker form",
            where=where,
            code="peft-conv1d-lokr",
        )
    check_finite(module, where)
    slots = {slot: to_torch(tensor) for slot, tensor in module.tensors.items()}
    shape = canonical_shape(module, names)
    return build(module.algorithm, slots, module.scale, shape, **options_of(module))


def modules_of(path: str, update: Update, component: str = "") -> list[ModuleState]:
    """The inverse of ``update_of``: an Update as modules that a layout can spell.

    A composition gives one module for each of its parts. The scale is said by alpha = scale · rank
    (of rank 1 where the tensors show none), and multiplied into a dense difference, which has no
    alpha. Raises ValueRefused for a part that no file has a slot for.
    """
    from adaptsurgery.core.update import parts_of

    return [_module_of(path, part, component) for part in parts_of(update)]


def _module_of(path: str, update: Update, component: str) -> ModuleState:
    plain = update.plain
    row, held = TRAITS.get(plain.name), update.tensors()
    if row is None or not held.keys() <= row.dims.keys():
        raise ValueRefused(
            f"`{path}`: no file has a place for a {type(update).__name__}", code="unknown-algorithm"
        )
    scale: float = getattr(plain, "scale", 1.0)
    bare = ModuleState(
        path,
        row.name,
        {slot: from_torch(tensor) for slot, tensor in held.items()},
        component=component,
        options={name: getattr(plain, name) for name in row.options},
    )
    if row.scaled:
        rank = module_rank(bare) or 1
        return replace(bare, alpha=scale * rank, rule=ALPHA_OVER_R, rank=rank)
    if scale != 1.0:
        bare = replace(bare, tensors={s: from_torch(t) for s, t in _multiplied(plain, row).items()})
    return replace(bare, rank=module_rank(bare))


def _multiplied(update: Update, row: Traits) -> dict[str, torch.Tensor]:
    """An update's tensors with its scale in them, for what no alpha says it of."""
    held: dict[str, torch.Tensor] = update.tensors()
    scale: float = getattr(update, "scale", 1.0)
    slots = list(held) if row.dense else [row.factor_slot(held)]
    return held | {slot: held[slot] * scale for slot in slots}


def check_finite(module: ModuleState, where: str) -> None:
    """Raise ValueRefused ("non-finite") for NaN or infinity in any of a module's tensors.

    Nothing is refused within ``nonfinite_allowed``.
    """
    for slot, tensor in module.tensors.items() if not _allowed.get() else ():
        index = find_nonfinite(tensor)
        if index is not None:
            raise non_finite_error(f"{module.label}.{slot}", tensor, index, where)


def nonfinite_of(module: ModuleState) -> int:
    """How many of a module's numbers are NaN or infinite. Reads them."""
    return sum(map(count_nonfinite, module.tensors.values()))


def base_weight(loaded: Loaded, module: ModuleState) -> torch.Tensor:
    """The canonical weight (o, i, *k) that a module changes, from the base's checkpoint.

    Raises LayoutError ("base-needed") without a base that has weights.
    """
    if loaded.base is None or loaded.names is None:
        raise LayoutError(
            f"`{module.label}` needs the base's weights",
            where=loaded.state.where,
            next="--base MODEL with the weights (a safetensors file or a folder)",
            code="base-needed",
        )
    component = loaded.names.components[module.component]
    home = module.component if module.component in loaded.base.parameters else ""
    rows = component.rows(module.path, module.naming, delta_shape(module)[0])
    weight = _joined([_taken(loaded.base.parameter(home, r.name), r) for r in rows])
    if len(rows) > 1 or rows[0].turned is not None:
        return weight
    parameters, config = loaded.base.parameters[home], loaded.base.configs.get(home, {})
    turned = turned_by(module, tuple(weight.shape), rows[0].name, parameters, config)
    return weight.t() if turned else weight


def _taken(tensor: Tensor, rows: Rows) -> torch.Tensor:
    """Rows of a stored tensor's canonical form (o, i, *k)."""
    if rows.index is not None:
        tensor = tensor.rows(rows.index, rows.index + 1).reshape(*tensor.shape[1:])
    if not rows.turned:
        return to_torch(tensor.rows(rows.start, rows.stop) if rows.stop else tensor)
    turned = to_torch(tensor).t()
    return turned[rows.start : rows.stop] if rows.stop else turned


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(parts)
