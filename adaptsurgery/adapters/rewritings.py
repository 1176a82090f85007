"""The exact rewritings that a layout asks for before it can spell a module.

Each is computed in float64 and stored in float32 at least, so that ΔW moves by float32's rounding
and no more; a result that the tensor's own dtype holds exactly keeps that dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adaptsurgery.adapters.updates import canonical_shape
from adaptsurgery.checkpoint.bridge import dtype_name, from_torch, to_torch
from adaptsurgery_formats import AdapterState, ModuleState, Rewriting, Tensor
from adaptsurgery_formats.errors import InexactError, ValueRefused
from adaptsurgery_formats.files import FLATTEN_TUCKER, FOLD_MID, FOLD_SCALE, JOIN_W1, JOIN_W2
from adaptsurgery_formats.names import Names
from adaptsurgery_formats.state import ALPHA_OVER_R, kernel_of

if TYPE_CHECKING:
    import torch

Kernel = tuple[int, ...]  # the weight's kernel dims, () of a Linear


def carry_out(
    state: AdapterState, steps: Sequence[Rewriting], names: Names | None = None
) -> AdapterState:
    """The state with each step done; a module may need several.

    ``names`` show the kernels that flat factors hide. Raises InexactError ("peft-conv1d-lokr").
    """
    todo: dict[tuple[str, str, str], list[str]] = {}
    for step in steps:
        m = step.module
        todo.setdefault((m.component, m.path, m.algorithm), []).append(step.step)
    modules = []
    for module in state.modules:
        kernel = _kernel(module, names)
        for step_name in todo.get((module.component, module.path, module.algorithm), ()):
            before, module = module, _STEPS[step_name](module, kernel)
            state.note("rewritten", module.label, step_name + wider_dtype(before, module))
        modules.append(module)
    return replace(state, modules=modules)


def _kernel(module: ModuleState, names: Names | None) -> tuple[int, ...]:
    shape = canonical_shape(module, names)
    return shape[2:] if shape is not None else kernel_of(module) or ()


def wider_dtype(before: ModuleState, after: ModuleState) -> str:
    """ " (F32)" where new tensors have a dtype that none of those they replace had, else ""."""
    old = {t.dtype for slot, t in before.tensors.items() if after.tensors.get(slot) is not t}
    new = {t.dtype for slot, t in after.tensors.items() if before.tensors.get(slot) is not t}
    grown = ", ".join(sorted(new - old))
    return f" ({grown})" if grown else ""


def as_stored(tensor: torch.Tensor, like: Sequence[Tensor]) -> Tensor:
    """A float64 result as a lazy tensor: in the sources' dtype if that is exact, else float32."""
    import torch

    names = {t.dtype for t in like}
    if len(names) == 1:
        own = tensor.to(_DTYPES()[names.pop()])
        if torch.equal(own.double(), tensor):
            return from_torch(own)
    numbers = tensor[tensor.isfinite()]
    wide = tensor.to(torch.float64 if "F64" in {t.dtype for t in like} else torch.float32)
    apart = (wide - tensor)[tensor.isfinite()].abs()
    if numbers.numel() and not apart.max() <= 1e-6 * numbers.abs().max():
        raise ValueRefused(
            "the rewritten factor has numbers too large or too small for float32",
            seen=f"the largest is {float(numbers.abs().max()):.3g}",
            code="out-of-range",
        )
    return from_torch(wide.contiguous())


def _DTYPES() -> dict[str, torch.dtype]:
    import torch

    known = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return {dtype_name(d): d for d in known}


def _wide(module: ModuleState) -> dict[str, torch.Tensor]:
    return {s: to_torch(t).double() for s, t in module.tensors.items() if s != "magnitude"}


def _fold_mid(module: ModuleState, kernel: Kernel) -> ModuleState:
    from adaptsurgery.algorithms import LoRA

    slots = _wide(module)
    flat = LoRA(**slots).flat()  # type: ignore[arg-type]
    sources = [module.tensors["mid"], module.tensors["down"]]
    return module.with_tensors(mid=None, down=as_stored(flat.down, sources))


def _flatten_tucker(module: ModuleState, kernel: Kernel) -> ModuleState:
    from adaptsurgery.algorithms import LoHa, LoKr

    slots = _wide(module)
    t = module.tensors
    if module.algorithm not in ("loha", "lokr"):
        raise InexactError(
            f"`{module.label}`: nothing here flattens the core of a {module.algorithm}",
            next="merge it into the base instead",
            code="no-such-step",
        )
    if module.algorithm == "loha":
        flat = LoHa(**slots).flat()  # type: ignore[arg-type]
        changes = {
            f"w{half}_{side}": as_stored(
                getattr(flat, f"w{half}_{side}").flatten(1),
                [t[f"w{half}_a"]] if side == "a" else [t[f"t{half}"], t[f"w{half}_b"]],
            )
            for half in "12"
            for side in "ab"
        }
        return _plain(module.with_tensors(t1=None, t2=None, **changes))
    bare = LoKr(**slots).without_core()  # type: ignore[arg-type]
    assert bare.w2_a is not None and bare.w2_b is not None
    return _plain(
        module.with_tensors(
            t2=None,
            w2_a=as_stored(bare.w2_a, [t["w2_a"]]),
            w2_b=as_stored(bare.w2_b.flatten(1), [t["t2"], t["w2_b"]]),
        )
    )


def _plain(module: ModuleState) -> ModuleState:
    options = {k: v for k, v in module.options.items() if k != "ambiguous_tucker"}
    return replace(module, options=options)


def _fold_scale(module: ModuleState, kernel: Kernel) -> ModuleState:
    w1 = module.tensors["w1"]
    scaled = as_stored(to_torch(w1).double() * module.scale, [w1])
    rank = module.rank or 1
    one = replace(module, alpha=float(rank), rank=rank, rule=ALPHA_OVER_R)
    return one.with_tensors(w1=scaled)


def _join_w1(module: ModuleState, kernel: Kernel) -> ModuleState:
    a, b = module.tensors["w1_a"], module.tensors["w1_b"]
    whole = as_stored(to_torch(a).double() @ to_torch(b).double(), [a, b])
    return module.with_tensors(w1_a=None, w1_b=None, w1=whole)


def _join_w2(module: ModuleState, kernel: Kernel) -> ModuleState:
    """w2 (b, d, *k) = w2_a (b, r) · w2_b (r, d·∏k), a core between them multiplied out, for PEFT.

    Which scrambles it in a Conv1d.
    """
    from adaptsurgery.algorithms import LoKr

    if len(kernel) == 1:
        raise InexactError(
            f"`{module.label}`: PEFT scrambles a Conv1d LoKr with a full w2",
            seen=f"kernel {list(kernel)}",
            next="--as lora is exact",
            code="peft-conv1d-lokr",
        )
    bare = LoKr(**_wide(module)).without_core()  # type: ignore[arg-type]
    assert bare.w2_a is not None and bare.w2_b is not None
    product = bare.w2_a @ bare.w2_b.flatten(1)
    sources = [module.tensors[s] for s in ("w2_a", "w2_b", "t2") if s in module.tensors]
    whole = as_stored(product.reshape(bare.w2_a.shape[0], -1, *kernel), sources)
    return _plain(module.with_tensors(w2_a=None, w2_b=None, t2=None, w2=whole))


_STEPS: dict[str, Callable[[ModuleState, Kernel], ModuleState]] = {
    FOLD_MID: _fold_mid,
    FLATTEN_TUCKER: _flatten_tucker,
    FOLD_SCALE: _fold_scale,
    JOIN_W1: _join_w1,
    JOIN_W2: _join_w2,
}
