"""The tensor suffixes that LyCORIS, kohya's sd-scripts and ComfyUI share, and what they mean.

    <module>.lora_up.weight  .lora_down.weight  .lora_mid.weight      LoRA, LoCon
    <module>.hada_w1_a … .hada_t2                                     LoHa
    <module>.lokr_w1 … .lokr_t2                                       LoKr
    <module>.alpha                                                    0-d; absent or 0 means r
    <module>.dora_scale                                               DoRA around any of them
    <module>.diff  .diff_b   .w_norm  .b_norm                         dense and norm differences
    <module>.weight  .on_input                                        (IA)³; on_input is a 0-d flag

Scale: alpha/r, whatever rsLoRA did in training (LyCORIS folds it into the saved alpha); 1 where
both Kronecker factors are stored full, whatever alpha says. Source: lycoris-lora 4.1.3, read and
run; kohya reads LoRA the same.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

from adaptsurgery_formats.errors import (
    KeyRefused,
    ShapeError,
    ValueRefused,
    refuse_together,
)
from adaptsurgery_formats.files import FLATTEN_TUCKER, FOLD_SCALE, Rewriting, Unheld, no_such
from adaptsurgery_formats.state import (
    ALPHA_OVER_R,
    ALPHA_OVER_SQRT_R,
    BOTH_FULL,
    NO_ALPHA,
    UNSCALED,
    ZERO_ALPHA,
    AdapterState,
    ModuleState,
    check_complete,
    check_shapes,
    delta_shape,
    module_rank,
)
from adaptsurgery_formats.tensors import FLOAT_DTYPES, Tensor, scalar
from adaptsurgery_formats.traits import traits_of

# suffix → (algorithm, slot). alpha and dora_scale belong to whichever low-rank algorithm is there.
SUFFIXES: dict[str, tuple[str, str]] = {
    "lora_up.weight": ("lora", "up"),
    "lora_down.weight": ("lora", "down"),
    "lora_mid.weight": ("lora", "mid"),
    **{f"hada_{slot}": ("loha", slot) for slot in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{
        f"lokr_{slot}": ("lokr", slot)
        for slot in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    },
    "diff": ("full", "diff"),
    "diff_b": ("full", "diff_b"),
    "w_norm": ("norm", "w_norm"),
    "b_norm": ("norm", "b_norm"),
    "on_input": ("ia3", "on_input"),
    "alpha": ("", "alpha"),
    "dora_scale": ("", "magnitude"),
}
# What is (IA)³'s where an on_input stands beside it, and a checkpoint's own parameter elsewhere.
BESIDE_ON_INPUT = {"weight": ("ia3", "w")}
# Suffixes that are known and not carried: the reason is told.
_OFT = "Diag-OFT and BOFT rotate the output side; no layout here but LyCORIS's own holds that"
REFUSED: dict[str, str] = {
    "oft_blocks": _OFT,
    "oft_diag": _OFT,
    "rescale": _OFT,
    **dict.fromkeys(
        ("a1.weight", "a2.weight", "b1.weight", "b2.weight"), "GLoRA is not carried yet"
    ),
    **dict.fromkeys(
        ("q_layer.weight", "p_layer.weight", "lambda_layer"),
        "T-LoRA's base part is not saved, so its ΔW needs the weights it was trained on",
    ),
    **dict.fromkeys(
        ("bias_indices", "bias_values", "bias_size"), "sparse bias differences are not carried yet"
    ),
    "lokr_t1": "a tucker w1 is written by no known trainer",
    "scalar": "LyCORIS folds its scalar into a factor when it saves; this file kept it apart",
}


def split_key(key: str, suffixes: Container[str]) -> tuple[str, str] | None:
    """(module, suffix) of a key that ends in one of the suffixes or a refused one, else None."""
    parts = key.split(".")
    for count in range(min(3, len(parts) - 1), 0, -1):  # the longest suffix has three parts
        suffix = ".".join(parts[-count:])
        if suffix in suffixes or suffix in REFUSED:
            return key[: -len(suffix) - 1], suffix
    return None


def parse_group(
    name: str, tensors: dict[str, Tensor], where: str, suffixes: Mapping[str, tuple[str, str]]
) -> list[ModuleState]:
    """The modules that one name's tensors, by suffix, stand for.

    Usually one; a dense bias difference beside a LoRA makes two that act on the same layer.
    """
    by_algorithm: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    for suffix, tensor in tensors.items():
        algorithm, slot = suffixes.get(suffix) or BESIDE_ON_INPUT[suffix]
        slots = by_algorithm.setdefault(algorithm, {}) if algorithm else shared
        if slot in slots:
            raise KeyRefused(
                f"`{name}` has two tensors that stand for {slot}",
                where=where, seen=", ".join(f"{name}.{s}" for s in tensors), code="duplicate-key",
            )  # fmt: skip
        slots[slot] = tensor
    low_rank = [a for a in by_algorithm if traits_of(a).scaled]
    if len(low_rank) > 1:
        raise KeyRefused(
            f"`{name}` has the tensors of {' and '.join(low_rank)} at once",
            where=where, seen=", ".join(f"{name}.{s}" for s in tensors), code="mixed-algorithms",
        )  # fmt: skip
    if not by_algorithm or ("magnitude" in shared and not low_rank):
        raise KeyRefused(
            f"`{name}` has {' and '.join(t for t in tensors)} but no factors",
            where=where, seen=", ".join(f"{name}.{s}" for s in tensors), code="incomplete-module",
        )  # fmt: skip
    owner = low_rank[0] if low_rank else next(iter(by_algorithm))
    keys = tuple(f"{name}.{s}" for s in tensors)
    modules = [
        _module(name, algorithm, slots, shared if algorithm == owner else {}, keys, where)
        for algorithm, slots in by_algorithm.items()
    ]
    _check_together(modules, where)
    return modules


def _check_together(modules: list[ModuleState], where: str) -> None:
    """Raise ShapeError unless what stands for one layer is for a weight of one shape."""
    sizes = {delta_shape(m) for m in modules if m.tensors.keys() != {"diff_b"}}
    outputs = {delta_shape(m)[0] for m in modules}
    if len(sizes) > 1 or len(outputs) > 1:
        raise ShapeError(
            f"`{modules[0].path}` has parts for weights of different shapes",
            where=where,
            seen=", ".join(f"{m.algorithm} {delta_shape(m)}" for m in modules),
        )


def _module(
    name: str, algorithm: str, slots: dict[str, Tensor], shared: dict[str, Tensor],
    keys: tuple[str, ...], where: str,
) -> ModuleState:  # fmt: skip
    alpha_tensor = shared.get("alpha")
    alpha = read_alpha(alpha_tensor, f"{name}.alpha", where) if alpha_tensor else None
    if "magnitude" in shared:
        slots = {**slots, "magnitude": shared["magnitude"]}
    slots, options = _without_flags(slots, name, where)
    module = ModuleState(name, algorithm, slots, alpha, keys=keys, naming="flat", options=options)
    check_complete(module, where)
    check_shapes(module, where)
    rule = scale_rule(module)
    options |= {"alpha_tensor": alpha_tensor} if alpha_tensor else {}
    return module.changed(rank=module_rank(module), rule=rule, options=options)


def _without_flags(
    slots: dict[str, Tensor], name: str, where: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors without (IA)³'s flag, and what it says as an option, beside itself."""
    flag = slots.get("on_input")
    if flag is None:
        return slots, {}
    side = read_alpha(flag, f"{name}.on_input", where)
    if side not in (0, 1):
        raise ValueRefused(f"`{name}.on_input` is {side:g}, neither 0 nor 1", where=where)
    kept = {slot: tensor for slot, tensor in slots.items() if slot != "on_input"}
    return kept, {"on_input": bool(side), "on_input_tensor": flag}


def scale_rule(module: ModuleState) -> str:
    """LyCORIS's reading of alpha: see scale_of for the rules' meaning."""
    if not traits_of(module.algorithm).scaled:
        return UNSCALED
    if "w1" in module.tensors and "w2" in module.tensors:
        return BOTH_FULL
    if module.alpha is None:
        return NO_ALPHA
    return ALPHA_OVER_R if module.alpha else ZERO_ALPHA


def read_alpha(tensor: Tensor, key: str, where: str) -> float:
    """The number in an alpha tensor of shape () or (1,) and any number dtype."""
    try:
        alpha = tensor.item()
    except ShapeError:
        raise ShapeError(
            f"`{key}` should hold one number", where=where, seen=f"shape {list(tensor.shape)}"
        ) from None
    except ValueRefused as error:
        raise ValueRefused(f"`{key}`: {error.what}", where=where) from None
    if not math.isfinite(alpha):
        raise ValueRefused(f"`{key}` is {alpha}", where=where, code="non-finite")
    return alpha


def parse_names(
    tensors: Mapping[str, Tensor],
    where: str,
    suffixes: Mapping[str, tuple[str, str]] = SUFFIXES,
) -> list[ModuleState]:
    """All modules of a file in this family, in the file's order, names as they stand."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        split = split_key(key, suffixes) or _beside_on_input(key, tensors)
        if split is None:
            raise KeyRefused(
                f"`{key}` is no adapter tensor that is known",
                where=where,
                seen=f"{tensor.dtype} {list(tensor.shape)}",
                next="if another tool wrote it on purpose, remove it or ask for support by name",
            )
        name, suffix = split
        if suffix in REFUSED:
            raise KeyRefused(
                f"`{key}`: {REFUSED[suffix]}", where=where, code="unsupported-algorithm"
            )
        groups.setdefault(name, {})[suffix] = tensor
    return [m for name, group in groups.items() for m in parse_group(name, group, where, suffixes)]


def _beside_on_input(key: str, tensors: Container[str]) -> tuple[str, str] | None:
    name, _, last = key.rpartition(".")
    return (name, last) if last in BESIDE_ON_INPUT and f"{name}.on_input" in tensors else None


def add_notes(state: AdapterState) -> None:
    """Say where a scale does not follow from the alpha that the file shows."""
    for rule in (NO_ALPHA, ZERO_ALPHA, BOTH_FULL):
        modules = [m for m in state.modules if m.rule == rule]
        if rule == BOTH_FULL:
            modules = [m for m in modules if m.alpha is not None]
        if modules:
            more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
            state.note("scale-rule", f"{modules[0].label}{more}", f"scale {rule}")


def note_loader(state: AdapterState) -> None:
    """Say that LyCORIS's own loader makes no module of what its own (IA)³ writes."""
    scaled = [m.label for m in state.modules if "w" in m.tensors]
    if scaled:
        text = (
            f"right by its definition, but LyCORIS's own loader raises on (IA)³, {len(scaled)} here"
        )
        state.note("lycoris-loader", scaled[0], text)


_FLOAT32_MIN, _FLOAT32_MAX = 2.0**-126, 2.0**127  # with all of its digits


def plan_modules(modules: Sequence[ModuleState], where: str) -> list[Rewriting]:
    """The rewritings that modules need before this family can hold them.

    Raises InexactError with all the modules that it cannot hold.
    """
    unheld = [(m, holds(m)) for m in modules]
    refused = [why.error(m, where) for m, why in unheld if why is not None]
    refuse_together(refused, len(modules), where)
    return [step for m in modules for step in _steps(m)]


def _steps(module: ModuleState) -> list[Rewriting]:
    if "w1" in module.tensors and "w2" in module.tensors and module.scale != 1.0:
        return [Rewriting(module, FOLD_SCALE)]
    if module.options.get("ambiguous_tucker"):
        return [Rewriting(module, FLATTEN_TUCKER)]
    return []


_FAMILY = "LyCORIS and kohya"
_HELD = f"{_FAMILY} have no such adapter"
_MERGE = "merge it into the base instead"


def holds(module: ModuleState, shape: tuple[int, ...] | None = None) -> Unheld | None:
    """Why the family has no place for a module, or None where it has one."""
    if not any(algorithm == module.algorithm for algorithm, _ in SUFFIXES.values()):
        return no_such(module.algorithm, f"{_FAMILY} have")
    if "l" in module.tensors:
        what = "PEFT's (IA)³ is l and scales the bias, LyCORIS's is l − 1 and leaves it as it is"
        return Unheld("other-ia3", what, _MERGE)
    if module.kind == "embedding":
        return Unheld("no-embedding", f"{_HELD} for an embedding", _MERGE)
    if "up_bias" in module.tensors:
        return Unheld("no-lora-bias", f"{_HELD} with a bias on lora_B", _MERGE)
    if module.options.get("not_kronecker"):
        why = "PEFT scrambles a Conv1d LoKr with a full w2: it is no Kronecker product"
        return Unheld("peft-conv1d-lokr", why, "merge it with PEFT, then extract")
    if module.rule in (ALPHA_OVER_R, ALPHA_OVER_SQRT_R) and module.alpha == 0:
        why = "alpha is 0, which this layout reads as alpha = r"
        return Unheld("zero-alpha", why, "leave the module out: it adds nothing")
    return None


def spell_module(module: ModuleState, name: str, keep: bool) -> dict[str, Tensor]:
    """A module's keys under a name of this family. ``keep`` leaves an absent alpha absent."""
    spelled = {}
    for slot, tensor in module.tensors.items():
        owner = "" if slot == "magnitude" else module.algorithm
        spelled[f"{name}.{_suffix(owner, slot)}"] = tensor
    if "w" in module.tensors:
        flag = scalar(float(bool(module.options.get("on_input"))), "I64")
        spelled[f"{name}.on_input"] = module.options.get("on_input_tensor", flag)
    if (alpha := _spelled_alpha(module, keep)) is not None:
        spelled[f"{name}.alpha"] = alpha
    return spelled


def _suffix(algorithm: str, slot: str) -> str:
    """The suffix of an algorithm's slot. KeyRefused where the family has none."""
    for suffix, owned in (*SUFFIXES.items(), *BESIDE_ON_INPUT.items()):
        if owned == (algorithm, slot):
            return suffix
    raise KeyRefused(f"{_FAMILY} have no key for the {slot} of a {algorithm}", code="unknown-slot")


def _spelled_alpha(module: ModuleState, keep: bool) -> Tensor | None:
    """The alpha tensor that makes this family's readers see the module's scale.

    Some readers take an absent or zero alpha for scale 0 or fail on it, so on the way into another
    layout it is written out as r; a full/full LoKr has none that matters and gets 1.
    """
    original: Tensor | None = module.options.get("alpha_tensor")
    if module.rule == UNSCALED:
        return original
    if keep and module.rule in (NO_ALPHA, ZERO_ALPHA, BOTH_FULL):
        return original
    if module.rule == BOTH_FULL or module.rank is None:
        return original if original is not None else scalar(1.0)
    alpha = module.scale * module.rank
    if original is not None and original.item() == alpha:
        return original
    if not _FLOAT32_MIN <= abs(alpha) <= _FLOAT32_MAX:
        raise ValueRefused(f"`{module.label}`: alpha {alpha} does not fit in float32")
    return _alpha_of_kind(alpha, module.options.get("alpha_kind", ""))


def alpha_kind(modules: Sequence[ModuleState]) -> str:
    """Dtype and number of dimensions of a file's alphas, where they are alike and not F32 and ()."""
    kinds = {
        str(m.options.get("alpha_kind", "")) for m in modules if "alpha_tensor" not in m.options
    }
    alphas = [m.options["alpha_tensor"] for m in modules if "alpha_tensor" in m.options]
    kinds |= {f"{t.dtype} {len(t.shape)}" for t in alphas}
    return kinds.pop() if len(kinds) == 1 and kinds != {"F32 0"} else ""


def _alpha_of_kind(alpha: float, kind: str) -> Tensor:
    """An alpha as the file's first layout had it, if that holds the number; else F32 and ()."""
    dtype, _, dims = kind.partition(" ")
    if dtype in FLOAT_DTYPES or (dtype in ("I64", "I32") and alpha == int(alpha)):
        tensor = scalar(alpha, dtype)
        if tensor.item() == alpha:
            return tensor.reshape(1) if dims == "1" else tensor
    return scalar(alpha)
