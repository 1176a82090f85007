"""The exact rewritings that a layout asks for before it can spell a module.

Each is computed in float64 and stored in float32 at least, so that ΔW moves by float32's rounding
and no more; a result that the tensor's own dtype holds exactly keeps that dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adaptsurgery.checkpoint.bridge import dtype_name, from_torch, to_torch
from adaptsurgery_formats import AdapterState, ModuleState, Step, Tensor
from adaptsurgery_formats.errors import ValueRefused
from adaptsurgery_formats.files import FLATTEN_TUCKER, FOLD_MID, FOLD_SCALE, JOIN_W1, JOIN_W2
from adaptsurgery_formats.state import ALPHA_OVER_R

if TYPE_CHECKING:
    import torch


def carry_out(state: AdapterState, steps: Sequence[Step]) -> AdapterState:
    """The state with each step done; a module may need several."""
    todo: dict[tuple[str, str, str], list[str]] = {}
    for step in steps:
        m = step.module
        todo.setdefault((m.component, m.path, m.algorithm), []).append(step.step)
    modules = []
    for module in state.modules:
        for step_name in todo.get((module.component, module.path, module.algorithm), ()):
            module = _STEPS[step_name](module)
            state.note("rewritten", module.label, step_name)
        modules.append(module)
    return replace(state, modules=modules)


def stored(tensor: torch.Tensor, like: Sequence[Tensor]) -> Tensor:
    """A float64 result as a lazy tensor: in the sources' dtype if that is exact, else float32."""
    import torch

    names = {t.dtype for t in like}
    if len(names) == 1:
        own = tensor.to(_DTYPES()[names.pop()])
        if torch.equal(own.double(), tensor):
            return from_torch(own)
    wide = tensor.to(torch.float64 if "F64" in {t.dtype for t in like} else torch.float32)
    if tensor.numel() and not (wide - tensor).abs().max() <= 1e-6 * tensor.abs().max():
        raise ValueRefused(
            "the rewritten factor has numbers too large or too small for float32",
            seen=f"the largest is {float(tensor.abs().max()):.3g}",
            code="out-of-range",
        )
    return from_torch(wide.contiguous())


def _DTYPES() -> dict[str, torch.dtype]:
    import torch

    known = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return {dtype_name(d): d for d in known}


def _wide(module: ModuleState) -> dict[str, torch.Tensor]:
    return {s: to_torch(t).double() for s, t in module.tensors.items() if s != "magnitude"}


def _fold_mid(module: ModuleState) -> ModuleState:
    from adaptsurgery.algorithms import LoRA

    slots = _wide(module)
    flat = LoRA(**slots).flat()  # type: ignore[arg-type]
    sources = [module.tensors["mid"], module.tensors["down"]]
    return module.with_tensors(mid=None, down=stored(flat.down, sources))


def _flatten_tucker(module: ModuleState) -> ModuleState:
    from adaptsurgery.algorithms import LoHa, LoKr

    slots = _wide(module)
    t = module.tensors
    if module.algorithm == "loha":
        flat = LoHa(**slots).flat()  # type: ignore[arg-type]
        changes = {
            f"w{half}_{side}": stored(
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
            w2_a=stored(bare.w2_a, [t["w2_a"]]),
            w2_b=stored(bare.w2_b.flatten(1), [t["t2"], t["w2_b"]]),
        )
    )


def _plain(module: ModuleState) -> ModuleState:
    options = {k: v for k, v in module.options.items() if k != "ambiguous_tucker"}
    return replace(module, options=options)


def _fold_scale(module: ModuleState) -> ModuleState:
    w1 = module.tensors["w1"]
    scaled = stored(to_torch(w1).double() * module.scale, [w1])
    rank = module.rank or 1
    one = replace(module, alpha=float(rank), rank=rank, rule=ALPHA_OVER_R)
    return one.with_tensors(w1=scaled)


def _join(factor: str) -> Callable[[ModuleState], ModuleState]:
    def join(module: ModuleState) -> ModuleState:
        a, b = module.tensors[f"{factor}_a"], module.tensors[f"{factor}_b"]
        left, right = to_torch(a).double(), to_torch(b).double()
        product = (left @ right.flatten(1)).reshape(left.shape[0], *right.shape[1:])
        whole = stored(product, [a, b])
        changes: dict[str, Tensor | None] = {f"{factor}_a": None, f"{factor}_b": None}
        return module.with_tensors(**changes, **{factor: whole})

    return join


_STEPS: dict[str, Callable[[ModuleState], ModuleState]] = {
    FOLD_MID: _fold_mid,
    FLATTEN_TUCKER: _flatten_tucker,
    FOLD_SCALE: _fold_scale,
    JOIN_W1: _join("w1"),
    JOIN_W2: _join("w2"),
}
