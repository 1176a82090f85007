"""Whether a module fits a weight, and its tensors viewed with the weight's dimensions."""

from __future__ import annotations

import math

from adaptsurgery_formats.errors import ShapeError
from adaptsurgery_formats.names.orientation import may_be_transposed
from adaptsurgery_formats.state import ModuleState, delta_shape, kernel_of, shapes_of
from adaptsurgery_formats.tensors import Tensor
from adaptsurgery_formats.traits import traits_of


def fit(module: ModuleState, shape: tuple[int, ...], where: str) -> ModuleState:
    """The module with its shapes as the weight (o, i, *k) has them.

    Accepts the transposed weights of transformers' Conv1D (i, o) and of embeddings (vocab, dim).
    A LoRA for a 1×1 convolution may be stored as a linear's and the reverse: viewed anew.
    Raises ShapeError where o or i·∏k do not agree.
    """
    row = traits_of(module.algorithm)
    if row.vector or len(shape) == 1:
        return _fit_norm(module, shape, where)
    if not shape:
        raise ShapeError(f"`{module.label}`: the base's weight is one number", where=where)
    out, columns = delta_shape(module)
    ways = [(shape[0], math.prod(shape[1:]))]
    if len(shape) == 2 and may_be_transposed(module):
        ways.append((shape[1], shape[0]))
    if not out:  # and where nothing shows the inputs either, the update itself is asked later
        fits = columns in (0, *(i for _, i in ways))
    elif not columns:  # of a bias alone
        fits = out in [o for o, _ in ways]
    else:
        fits = (out, columns) in ways
    if "magnitude" in module.tensors:  # transposed weights have their inputs first
        fits = fits and module.tensors["magnitude"].numel in (out, *shape[:2])
    if not fits or not _kernel_fits(module, shape):
        shapes = ", ".join(f"{s} {list(t.shape)}" for s, t in module.tensors.items())
        raise ShapeError(
            f"`{module.label}`: ΔW is ({out}, {columns}), the weight is {list(shape)}",
            where=where,
            seen=shapes,
            next="is the adapter for this base?",
        )
    return _reshaped(module, shape)


def _fit_norm(module: ModuleState, shape: tuple[int, ...], where: str) -> ModuleState:
    sizes = {t.shape for t in module.tensors.values()}
    if traits_of(module.algorithm).dense and sizes == {(shape[0],)}:
        return module
    raise ShapeError(
        f"`{module.label}`: {module.algorithm} of shape {sorted(map(list, sizes))} "
        f"on a weight of shape {list(shape)}",
        where=where,
        next="is the adapter for this base?",
    )


def _kernel_fits(module: ModuleState, shape: tuple[int, ...]) -> bool:
    kernel = kernel_of(module)
    if kernel is None:
        return True
    if len(kernel) == len(shape) - 2:
        return kernel == shape[2:]
    # a linear's factors for a 1×1 convolution, or PEFT's core (r, r, k, 1) for a Conv1d
    bare = tuple(k for k in kernel if k != 1)
    return bare == tuple(k for k in shape[2:] if k != 1)


def _reshaped(module: ModuleState, shape: tuple[int, ...]) -> ModuleState:
    """Views that the weight's number of dimensions asks for: nothing is computed."""
    row, t = traits_of(module.algorithm), module.tensors
    changes: dict[str, Tensor | None] = {}
    for slot, last in row.last_dims(shapes_of(module), shape[2:]).items():
        if len(t[slot].shape) != len(shape):
            first = t[slot].shape[:2] if len(t[slot].shape) > 1 else shape[:2]
            changes[slot] = t[slot].reshape(*first, *last)
    if "magnitude" in t and len(t["magnitude"].shape) != len(shape):
        ones = (1,) * (len(shape) - 2)
        changes["magnitude"] = t["magnitude"].reshape(*t["magnitude"].shape[:2], *ones)
    fitted = module.with_tensors(**changes) if changes else module
    if "ambiguous_tucker" not in module.options:
        return fitted
    options = {k: v for k, v in module.options.items() if k != "ambiguous_tucker"}
    return fitted.changed(options=options)
