"""PEFT's layout: a folder with adapter_config.json and adapter_model.safetensors.

    base_model.model.encoder.layers.0.self_attn.q_proj.lora_A.weight     (r, i[, *k])
    base_model.model.encoder.layers.0.self_attn.q_proj.lora_B.weight     (o, r[, 1, …])
    base_model.model.embed_tokens.lora_embedding_A                       (r, vocab)
    base_model.model.mid.attn.to_q.lora_magnitude_vector                 (o,) or (1, o, 1, …)
    base_model.model.mid.conv.hada_t1                                    (r, r, kh, kw)
    base_model.model.mid.attn.to_q.lokr_w2_b                             (r, d·∏k)
    base_model.model.fc.hra_u                                            (i·∏k, r)
    base_model.model.fc.ia3_l                                            (o, 1), (1, i), (1, n, 1, …)
    base_model.model.classifier.weight                                   modules_to_save

- Scale: alpha/r from the config, alpha/√r with use_rslora, always, full/full LoKr included. There
  is no alpha tensor. HRA and (IA)³ have no scale.
- One algorithm a folder, and one value of use_dora, use_effective_conv2d, decompose_both,
  decompose_factor, apply_GS for all of its modules; rank and alpha vary by rank_pattern and
  alpha_pattern. LoKr's shapes are derived again from those on loading.
- Conv1d: tucker cores are (r, r, k, 1); a full w2 is scrambled and is no Kronecker product.
- Metadata: {"format": "pt"}; a pipeline is a folder with one such folder per component.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptsurgery_formats import lycoris_keys, peft_config
from adaptsurgery_formats.errors import (
    InexactError,
    KeyRefused,
    LayoutError,
    ShapeError,
    refuse_together,
)
from adaptsurgery_formats.files import (
    FLATTEN_TUCKER,
    FOLD_MID,
    JOIN_W1,
    JOIN_W2,
    META_ALPHA,
    META_COMPONENT,
    META_MODEL,
    AdapterFile,
    Format,
    Rewriting,
    Unheld,
    carried_component,
    no_such,
)
from adaptsurgery_formats.lokr_cuts import peft_decompose_factor, peft_factorization
from adaptsurgery_formats.metadata import HASH_KEYS
from adaptsurgery_formats.names import Component, Names
from adaptsurgery_formats.names.heads import SAVED_TABLES
from adaptsurgery_formats.patterns import Matcher
from adaptsurgery_formats.state import (
    AdapterState,
    ModuleState,
    check_complete,
    check_shapes,
    kernel_of,
    lokr_shapes,
    magnitude_axis,
    module_rank,
)
from adaptsurgery_formats.tensors import Literal, Tensor
from adaptsurgery_formats.traits import traits_of

PREFIX = "base_model.model."
# suffix → (algorithm, slot)
SUFFIXES: dict[str, tuple[str, str]] = {
    "lora_A.weight": ("lora", "down"),
    "lora_B.weight": ("lora", "up"),
    "lora_B.bias": ("lora", "up_bias"),
    "lora_embedding_A": ("lora", "down"),
    "lora_embedding_B": ("lora", "up"),
    "lora_magnitude_vector": ("lora", "magnitude"),
    "lora_magnitude_vector.weight": ("lora", "magnitude"),
    **{f"hada_{s}": ("loha", s) for s in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{s}": ("lokr", s) for s in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "hra_u": ("hra", "u"),
    "ia3_l": ("ia3", "l"),
}
_EMBEDDING = "lora_embedding_"
_OTHERS = ("lora_", "oft_", "boft_", "vera_", "ia3_", "vblora_", "randlora_", "token_adapter")


def claims(key: str) -> bool:
    return key.startswith(PREFIX)


def parse(files: Sequence[AdapterFile]) -> AdapterState:
    """The modules of one folder, or of a pipeline's folders, under the model's own names."""
    state = AdapterState("peft", [], where=files[0].where)
    for file in files:
        _parse_folder(file, state)
    return state


def _parse_folder(file: AdapterFile, state: AdapterState) -> None:
    if file.config is None:
        raise LayoutError(
            "there is no adapter_config.json beside these tensors",
            where=file.where,
            next="PEFT keeps rank and alpha there; pass the folder that holds both files",
            code="config-missing",
        )
    unknown = peft_config.check_config(file.config, file.where)
    if unknown:
        state.note("unknown-config-field", file.where, f"kept, not read: {', '.join(unknown)}")
    metadata = dict(file.metadata)
    component = file.component or carried_component(metadata, file.where)
    state.model = metadata.get(META_MODEL, state.model)
    for key in (META_COMPONENT, META_MODEL, META_ALPHA):
        metadata.pop(key, None)
    groups, saved = _grouped(file)
    matcher = Matcher(groups, file.where)
    settings = peft_config.settings(file.config, matcher, file.where)
    modules = [
        _module(path, slots, settings[path], component, file) for path, slots in groups.items()
    ]
    peft_config.check_targets(file.config, modules, matcher, file.where)
    state.modules += modules
    state.saved[component] = saved
    state.config[component] = dict(file.config)
    state.metadata |= {k: v for k, v in metadata.items() if (k, v) != ("format", "pt")}


def _grouped(file: AdapterFile) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Adapter tensors by module path and suffix, and replaced parameters by name."""
    assert file.config is not None
    groups: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in file.tensors.items():
        if not claims(key):
            raise KeyRefused(f"`{key}` does not begin with {PREFIX}", where=file.where)
        name = key.removeprefix(PREFIX)
        suffix = next((s for s in SUFFIXES if name.endswith("." + s)), None)
        if suffix is not None:
            groups.setdefault(name[: -len(suffix) - 1], {})[suffix] = tensor
        elif _is_saved(name, file.config):
            saved[name] = tensor
        else:
            raise _unknown(key, tensor, file)
    if not groups:
        raise LayoutError("no adapter tensors", where=file.where, code="empty-adapter")
    return groups, saved


def _is_saved(name: str, config: dict[str, Any]) -> bool:
    """Whether a parameter is one that PEFT saves whole: modules_to_save, biases, embeddings."""
    path, _, parameter = name.rpartition(".")
    if any(mark in name for mark in _OTHERS):
        return False
    wanted = config.get("modules_to_save") or []
    if any(f".{path}.".find(f".{w}.") >= 0 for w in wanted):
        return True
    if parameter not in ("weight", "bias"):
        return False
    if path.endswith(".base_layer"):  # an adapted embedding whose table was resized
        return True
    if config.get("bias", "none") != "none" and parameter == "bias":
        return True
    return path.rpartition(".")[2] in SAVED_TABLES


def _unknown(key: str, tensor: Tensor, file: AdapterFile) -> KeyRefused:
    other = next((mark for mark in _OTHERS if f".{mark}" in key), None)
    return KeyRefused(
        f"`{key}` is no tensor that this config's adapter has",
        where=file.where,
        seen=f"{tensor.dtype} {list(tensor.shape)}",
        next="it is of another method, which is not carried"
        if other
        else "list its module in modules_to_save if it is meant to be replaced",
    )


def _module(
    path: str,
    tensors: dict[str, Tensor],
    setting: peft_config.ModuleScale,
    component: str,
    file: AdapterFile,
) -> ModuleState:
    assert file.config is not None
    algorithm = peft_config.algorithm_of(file.config, file.where)
    slots: dict[str, Tensor] = {}
    for suffix, tensor in tensors.items():
        owner, slot = SUFFIXES[suffix]
        if owner != algorithm or slot in slots:
            raise KeyRefused(
                f"`{PREFIX}{path}.{suffix}` does not belong to a {algorithm}",
                where=file.where,
                seen=f"peft_type {file.config['peft_type']}",
                code="config-disagrees",
            )
        slots[slot] = tensor
    embedding = any(s.startswith(_EMBEDDING) for s in tensors)
    if "magnitude" in slots:
        slots["magnitude"] = _canonical_magnitude(slots["magnitude"])
    module = ModuleState(
        path,
        algorithm,
        slots,
        setting.alpha,
        setting.rule,
        setting.rank,
        component,
        keys=tuple(f"{PREFIX}{path}.{s}" for s in tensors),
        kind="embedding" if embedding else "",
        options=_METHODS[algorithm].options(path, slots, file.config)
        | {"alpha_kind": file.metadata.get(META_ALPHA, "")},
    )
    _check_module(module, file)
    return module


def _canonical_magnitude(magnitude: Tensor) -> Tensor:
    """(o,) and (1, o, 1, …) as (o, 1, …): the same bytes."""
    return magnitude.reshape(magnitude.numel, *[1] * max(1, len(magnitude.shape) - 1))


def _lora_options(path: str, slots: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    return {"fan_in_fan_out": True} if config.get("fan_in_fan_out") else {}


def _hra_options(path: str, slots: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    return {"apply_gs": bool(config.get("apply_GS"))}


def _ia3_options(path: str, slots: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    inward = is_feedforward(path, config.get("feedforward_modules"), "adapter_config.json")
    return {"on_input": inward, **_lora_options(path, slots, config)}


def is_feedforward(path: str, modules: Any, where: str) -> bool:
    """Whether (IA)³ scales a module's inputs: a regex of the whole name, or ends of names.

    LayoutError ("bad-config") for anything else.
    """
    if isinstance(modules, str):
        return bool(Matcher([path], where).listed(modules))
    if isinstance(modules, (list, tuple, set, frozenset)) and all(
        isinstance(m, str) for m in modules
    ):
        return any(path.endswith(end) for end in modules)
    raise LayoutError(
        f"`feedforward_modules` is {modules!r}",
        where=where,
        next="the names of the modules whose inputs are scaled, [] for none",
        code="bad-config",
    )


def _loha_options(path: str, slots: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    core = slots.get("t2")
    ambiguous = core is not None and len(core.shape) == 4 and core.shape[3] == 1
    return {"ambiguous_tucker": True} if ambiguous else {}


def _lokr_options(path: str, slots: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    options = _loha_options(path, slots, config)
    if len(slots["w2"].shape if "w2" in slots else ()) == 3:
        if "w1" not in slots or slots["w1"].shape != (1, 1):
            options["not_kronecker"] = True
    return options


def _check_module(module: ModuleState, file: AdapterFile) -> None:
    check_complete(module, file.where)
    up, down = module.tensors.get("up"), module.tensors.get("down")
    if up is not None and down is not None and up.numel and len(up.shape) == len(down.shape) > 2:
        r, columns = down.shape[0], up.shape[1]
        if columns < r and r % columns == 0:
            raise ShapeError(
                f"`{module.label}`: a LoRA of PEFT on a convolution with {r // columns} groups",
                where=file.where,
                seen=f"lora_A {list(down.shape)}, lora_B {list(up.shape)}",
                next="there every group sees all inputs, so no ΔW of the weight's shape equals it",
                code="peft-grouped-conv",
            )
    check_shapes(module, file.where)
    shown = module_rank(module)
    if shown is not None and shown != module.rank:
        raise ShapeError(
            f"`{module.label}`: the config says r = {module.rank}, the tensors r = {shown}",
            where=file.where,
            next="mend r or rank_pattern in adapter_config.json, or take the file it belongs to",
            code="config-disagrees",
        )
    for name in _disagreements(module, file.config or {}):
        raise LayoutError(
            f"`{module.label}`: {name} and the tensors disagree",
            where=file.where,
            seen=f"{name} = {(file.config or {}).get(name)!r}; {', '.join(module.keys)}",
            next="PEFT would not load these tensors; mend adapter_config.json",
            code="config-disagrees",
        )


def _disagreements(module: ModuleState, config: dict[str, Any]) -> list[str]:
    """The config's flags under which PEFT would not make the tensors that the module has."""
    return _METHODS[module.algorithm].disagreements(module, config)


def _lora_disagreements(module: ModuleState, config: dict[str, Any]) -> list[str]:
    shown = {"use_dora": "magnitude", "lora_bias": "up_bias"}
    return [
        name for name, slot in shown.items() if bool(config.get(name)) != (slot in module.tensors)
    ]


def _loha_disagreements(module: ModuleState, config: dict[str, Any]) -> list[str]:
    return (
        ["use_effective_conv2d"] if module.tucker and not config.get("use_effective_conv2d") else []
    )


def _lokr_disagreements(module: ModuleState, config: dict[str, Any]) -> list[str]:
    t, wrong = module.tensors, _loha_disagreements(module, config)
    if "w1_a" in t and not config.get("decompose_both"):
        wrong.append("decompose_both")
    factor = config.get("decompose_factor", -1)
    (a, b), (c, d), _ = lokr_shapes(module)
    cuts = [(a, b)] + ([(c, d)] if "w2" in t or "t2" in t else [])  # else d may hide a kernel
    if any(peft_factorization(m * n, factor) != (m, n) for m, n in cuts):
        wrong.append("decompose_factor")
    return wrong


def _ia3_disagreements(module: ModuleState, config: dict[str, Any]) -> list[str]:
    """A matrix shows its side: (1, i) or (o, 1)."""
    shape = module.tensors["l"].shape
    clear = len(shape) == 2 and shape != (1, 1)
    return (
        ["feedforward_modules"] if clear and module.options["on_input"] != (shape[0] == 1) else []
    )


def _no_disagreements(module: ModuleState, config: dict[str, Any]) -> list[str]:
    return []


# --- writing -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class _Lokr:
    """A LoKr module's cuts with the kernel told apart: o = a·b, i = c·d, kernel from the base."""

    module: ModuleState
    out: tuple[int, int]
    into: tuple[int, int]
    kernel: tuple[int, ...]

    @property
    def widest(self) -> tuple[int, int]:
        """Twice the ranks from which PEFT stores w1 and w2 in full."""
        return max(self.out[0], self.into[0]), max(self.out[1], self.into[1])

    def rank(self, decompose_both: bool) -> int:
        """The module's rank, or, where both factors are full, the least that PEFT stores so."""
        both_full = "w1" in self.module.tensors and "w2" in self.module.tensors
        if not both_full and self.module.rank is not None:
            return self.module.rank
        w1, w2 = self.widest
        least = math.ceil(max(w1, w2) / 2) if decompose_both else math.ceil(w2 / 2)
        rank = self.module.rank
        return rank if rank is not None and rank >= least else max(1, least)


def plan(state: AdapterState, names: Names | None) -> list[Rewriting]:
    """The rewritings that PEFT's one-value-for-all options ask for; raises where none help."""
    if state.layout == "peft" and names is None:
        return []  # what PEFT wrote it holds, and flat factors alone do not show the kernel
    unheld = [(m, holds(m, _shape(m, names))) for m in state.modules]
    refused = [why.error(m, state.where) for m, why in unheld if why is not None]
    refuse_together(refused, len(state.modules), state.where)
    steps: list[Rewriting] = []
    for component in state.components:
        modules = list(state.of(component))
        algorithm = _one_algorithm(modules, state.where)
        steps += _METHODS[algorithm].plan(modules, names, state.where)
    return steps


def _one_algorithm(modules: Sequence[ModuleState], where: str) -> str:
    algorithms = dict.fromkeys(m.algorithm for m in modules)
    if len(algorithms) > 1:
        raise InexactError(
            f"PEFT holds one algorithm an adapter, not {' and '.join(algorithms)}",
            where=where,
            items=[f"`{m.label}` is {m.algorithm}" for m in modules],
            next="--as lora turns LoHa and LoKr into LoRA exactly",
            code="mixed-algorithms",
        )
    return next(iter(algorithms))


def _shape(module: ModuleState, names: Names | None) -> tuple[int, ...] | None:
    """The shape of the weight that a module adapts, where the base is known."""
    component = names.components.get(module.component) if names else None
    return component.shape(module.path, module.naming) if component else None


_MERGE = "merge it into the base instead"
_EXACT = "--as lora is exact"
_NEAR = "--as lora --base BASE --rank N --allow-lossy"


def holds(module: ModuleState, shape: tuple[int, ...] | None) -> Unheld | None:
    """Why PEFT has no place for a module, whatever the others are; None where it has one."""
    method, row = _METHODS.get(module.algorithm), traits_of(module.algorithm)
    if method is None:
        if not row.dense:
            return no_such(module.algorithm, "PEFT has")
        what = f"PEFT has no {row.title}; merge it into the base, or keep --to lycoris"
        return Unheld(f"no-{module.algorithm}", what, _MERGE)
    if module.kind == "embedding" and "embedding" not in method.kinds:
        return Unheld("no-embedding", "an adapter of an embedding is PEFT's LoRA alone", _MERGE)
    if module.options.get("fan_in_fan_out") and "Conv1D" not in method.kinds:
        return Unheld("no-transposed", f"PEFT has no {row.title} on transformers' Conv1D", _EXACT)
    if "magnitude" in module.tensors:
        if not method.magnitudes:
            return Unheld("no-dora", "PEFT has DoRA around LoRA only", _NEAR)
        if magnitude_axis(module) == "in":
            what = "PEFT's DoRA takes norms per output, this one per input"
            return Unheld("dora-axis", what, _NEAR)
    return method.unheld(module, shape)


def _dims(module: ModuleState, shape: tuple[int, ...] | None) -> int:
    """How many dimensions the weight has, as far as it is known."""
    if shape is not None:
        return len(shape)
    return 2 + len((kernel_of(module) if module.tensors else None) or ())


def _all_held(module: ModuleState, shape: tuple[int, ...] | None) -> Unheld | None:
    return None


def _loha_unheld(module: ModuleState, shape: tuple[int, ...] | None) -> Unheld | None:
    if _dims(module, shape) > 4:
        return Unheld(
            "no-conv3d", f"PEFT has no {traits_of(module.algorithm).title} on Conv3d", _EXACT
        )
    return None


def _lokr_unheld(module: ModuleState, shape: tuple[int, ...] | None) -> Unheld | None:
    t = module.tensors
    if "w2" in t and _dims(module, shape) == 3:
        trivial = "w1" in t and t["w1"].shape == (1, 1)
        if not trivial and not module.options.get("not_kronecker"):
            what = "PEFT scrambles a Conv1d LoKr with a full w2"
            return Unheld("peft-conv1d-lokr", what, _EXACT)
    return _loha_unheld(module, shape)


def _hra_unheld(module: ModuleState, shape: tuple[int, ...] | None) -> Unheld | None:
    if shape is not None and len(shape) not in (2, 4):
        return Unheld("no-conv1d", "PEFT's HRA takes Linear and Conv2d only", _MERGE)
    if shape is not None and len(shape) == 4 and shape[2] != shape[3]:
        return Unheld("no-oblong", "PEFT's HRA takes square kernels only", _MERGE)
    return None


def _ia3_unheld(module: ModuleState, shape: tuple[int, ...] | None) -> Unheld | None:
    if "w" in module.tensors:
        what = "LyCORIS's (IA)³ is l − 1 and leaves the bias as it is, PEFT's is l and scales it"
        return Unheld("other-ia3", what, _MERGE)
    if shape is not None and len(shape) == 3:
        return Unheld("no-conv1d", "PEFT has no (IA)³ on Conv1d", _MERGE)
    if shape is not None and "l" in module.tensors and len(shape) > 3:
        if len(module.tensors["l"].shape) != len(shape):
            return Unheld("no-such-shape", "PEFT's (IA)³ of a convolution is (1, n, 1, …)", _MERGE)
    return None


def _plan_ia3(modules: Sequence[ModuleState], names: Names | None, where: str) -> list[Rewriting]:
    return []


def _plan_lora(modules: Sequence[ModuleState], names: Names | None, where: str) -> list[Rewriting]:
    dora = [m for m in modules if "magnitude" in m.tensors]
    if dora and len(dora) != len(modules):
        raise InexactError(
            f"{len(dora)} of {len(modules)} modules are DoRA; PEFT's use_dora is for all",
            where=where,
            items=[f"`{m.label}` is not" for m in modules if "magnitude" not in m.tensors],
            next="--as lora --base BASE --rank N --allow-lossy",
            code="mixed-dora",
        )
    biased = any("up_bias" in m.tensors for m in modules)
    if without := [m for m in modules if biased and _takes_no_bias(m)]:
        raise InexactError(
            "PEFT's lora_bias is for every LoRA, and neither an embedding's nor a DoRA takes one",
            where=where,
            items=[f"`{m.label}` takes none" for m in without],
            next="merge the adapter that has biases into the base instead",
            code="no-lora-bias",
        )
    return [Rewriting(m, FOLD_MID) for m in modules if "mid" in m.tensors]


def _takes_no_bias(module: ModuleState) -> bool:
    return module.kind == "embedding" or "magnitude" in module.tensors


def _plan_loha(modules: Sequence[ModuleState], names: Names | None, where: str) -> list[Rewriting]:
    tucker = [m for m in modules if "t1" in m.tensors]
    if not tucker:
        return []
    mixed = any("t1" not in m.tensors and _has_kernel(m, names, where) for m in modules)
    pointwise = [m for m in tucker if not any(k != 1 for k in kernel_of(m) or ())]
    return [Rewriting(m, FLATTEN_TUCKER) for m in (tucker if mixed else pointwise)]


def _has_kernel(module: ModuleState, names: Names | None, where: str) -> bool:
    """Whether a flat module sits on a convolution with a kernel other than 1."""
    shape = _shape(module, names)
    if shape is None:
        raise LayoutError(
            f"`{module.label}` may be a convolution's: flat factors do not show the kernel",
            where=where,
            next="--base MODEL",
            code="base-needed",
        )
    return any(k != 1 for k in shape[2:])


def _plan_lokr(modules: Sequence[ModuleState], names: Names | None, where: str) -> list[Rewriting]:
    cut = [_cut(m, names, where) for m in modules]
    steps = _tucker_steps(cut, names, where)
    steps += [
        Rewriting(c.module, JOIN_W2)
        for c in cut
        if "w2_a" in c.module.tensors and 2 * c.rank(False) >= c.widest[1]
    ]
    if not _decompose_both(cut):
        steps += [Rewriting(c.module, JOIN_W1) for c in cut if "w1_a" in c.module.tensors]
    _factor(cut, where)
    return steps


def _tucker_steps(cut: Sequence[_Lokr], names: Names | None, where: str) -> list[Rewriting]:
    """A core is stored on every kernel other than 1, or on none: use_effective_conv2d is for all."""
    tucker = [c.module for c in cut if "t2" in c.module.tensors]
    if not tucker:
        return []
    flat = [c.module for c in cut if "t2" not in c.module.tensors and "w2" not in c.module.tensors]
    pointwise = [m for m in tucker if all(k == 1 for k in kernel_of(m) or ())]
    none = any(_breaks_core(m) for m in tucker if m not in pointwise)
    none = none or any(_has_kernel(m, names, where) for m in flat)
    return [Rewriting(m, FLATTEN_TUCKER) for m in (tucker if none else pointwise)]


def _breaks_core(module: ModuleState) -> bool:
    """Whether PEFT raises on a core: it cannot view what einsum gives for r = 1 and (…, 1)."""
    kernel = kernel_of(module) or (1,)
    return module_rank(module) == 1 and (len(kernel) == 1 or kernel[-1] == 1)


def _cut(module: ModuleState, names: Names | None, where: str) -> _Lokr:
    out, (c, d), kernel = lokr_shapes(module)
    shape = _shape(module, names)
    if shape is not None:
        into = (c, shape[1] // c)
        if into[0] * into[1] != shape[1] or out[0] * out[1] != shape[0]:
            into = (c, d)  # a transposed weight: the cuts are the adapter's own
        return _Lokr(module, out, into, tuple(shape[2:]))
    return _Lokr(module, out, (c, d), kernel)


def _decompose_both(cut: Sequence[_Lokr]) -> bool:
    """Whether one decompose_both stores every w1 as it is here; False also where none is factored."""
    if not any("w1_a" in c.module.tensors for c in cut):
        return False
    return all(_w1_as_stored(c) for c in cut)


def _w1_as_stored(cut: _Lokr) -> bool:
    """Whether decompose_both stores a module's w1 as it is: in two factors of the module's rank."""
    t, rank = cut.module.tensors, cut.rank(True)
    if 2 * rank >= cut.widest[0]:
        return "w1" in t
    return "w1_b" in t and t["w1_b"].shape[0] == rank


def _factor(cut: Sequence[_Lokr], where: str) -> int:
    factor = peft_decompose_factor([pair for c in cut for pair in (c.out, c.into)])
    if factor is None:
        shown = dict.fromkeys(f"{m}·{n}" for c in cut for m, n in (c.out, c.into))
        raise InexactError(
            "no one decompose_factor makes PEFT cut these dimensions this way",
            where=where,
            seen=f"cuts {', '.join(list(shown)[:8])}",
            next="--as lora is exact",
            code="lokr-factor",
        )
    return factor


def _plan_hra(modules: Sequence[ModuleState], names: Names | None, where: str) -> list[Rewriting]:
    if len({m.rank for m in modules}) > 1 or len({m.options.get("apply_gs") for m in modules}) > 1:
        raise InexactError(
            "PEFT's HRA has one rank and one apply_GS for all modules",
            where=where,
            code="hra-ranks",
        )
    return []


def spell(state: AdapterState, names: Names | None) -> list[AdapterFile]:
    """One file with its config per component."""
    if len(state.components) > 1 and "" in state.components:
        raise LayoutError(
            "modules of an unnamed model beside those of named components",
            where=state.where,
            seen=", ".join(f"`{c}`" for c in state.components),
            next="--base MODEL, which names them all",
            code="base-needed",
        )
    _note_classic_names(state, names)
    return [_spell_component(c, state, names) for c in state.components]


def _note_classic_names(state: AdapterState, names: Names | None) -> None:
    """transformers 5's CLIPTextModel lacks the `text_model.` that these names begin with."""
    for name in state.components:
        component = names.components.get(name) if names else None
        if component and component.aliases and not component.own and not component.stored:
            state.note(
                "text-model-prefix",
                name,
                "under the names of transformers 4; for a CLIPTextModel of transformers 5, "
                "which drops `text_model.`, pass --base with that model",
            )


def _spell_component(name: str, state: AdapterState, names: Names | None) -> AdapterFile:
    modules = list(state.of(name))
    component = names.components.get(name) if names else None
    tensors: dict[str, Tensor] = {}
    biased = any("up_bias" in m.tensors for m in modules)
    for module in modules:
        path = _called(module, component)
        module = _with_bias(module) if biased else module
        for suffix, tensor in _spell_module(module):
            tensors[f"{PREFIX}{path}.{suffix}"] = tensor
    saved = state.saved.get(name, {})
    tensors |= {PREFIX + key: tensor for key, tensor in saved.items()}
    template = state.config.get(name) or (state.config.get("") if len(state.config) == 1 else None)
    config = _config(modules, component, names, template, state.where)
    kept = {k: v for k, v in state.metadata.items() if k not in HASH_KEYS}  # of another file
    metadata = {"format": "pt", **kept}
    known = {META_COMPONENT: name, META_MODEL: state.model}
    known[META_ALPHA] = lycoris_keys.alpha_kind(modules)
    metadata |= {k: v for k, v in known.items() if v}
    folder = name if len(state.components) > 1 else ""
    return AdapterFile(tensors, metadata, config, folder)


def _with_bias(module: ModuleState) -> ModuleState:
    """lora_bias holds for all modules: one without a bias on lora_B gets zeros."""
    up = module.tensors["up"]
    if "up_bias" in module.tensors:
        return module
    zeros = Literal(bytes(up.nbytes // up.numel * up.shape[0]))
    return module.with_tensors(up_bias=Tensor(up.dtype, (up.shape[0],), (zeros,)))


def _spell_module(module: ModuleState) -> list[tuple[str, Tensor]]:
    spelled = []
    for slot, tensor in module.tensors.items():
        if slot == "magnitude":
            tensor = _peft_magnitude(tensor)
        if slot == "l" and len(tensor.shape) == 1:
            inward = module.options.get("on_input", False)
            tensor = tensor.reshape(*((1, tensor.numel) if inward else (tensor.numel, 1)))
        if slot in ("t1", "t2") and len(tensor.shape) == 3:
            tensor = tensor.reshape(*tensor.shape, 1)
        if slot == "w2_b":  # (r, d, *k) from LyCORIS's functional API
            tensor = tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))
        spelled.append((suffix_of(module.algorithm, slot, module.kind == "embedding"), tensor))
    return spelled


def suffix_of(algorithm: str, slot: str, embedding: bool = False) -> str:
    """The suffix that PEFT saves a slot under, of the embedding's own where it has one.

    KeyRefused where PEFT has none.
    """
    every = [suffix for suffix, owned in SUFFIXES.items() if owned == (algorithm, slot)]
    own = [suffix for suffix in every if suffix.startswith(_EMBEDDING) == embedding]
    if not every:
        raise KeyRefused(f"PEFT has no tensor for the {slot} of a {algorithm}", code="unknown-slot")
    return (own or every)[0]


def _peft_magnitude(magnitude: Tensor) -> Tensor:
    if len(magnitude.shape) == 2:
        return magnitude.reshape(magnitude.numel)
    return magnitude.reshape(1, magnitude.numel, *[1] * (len(magnitude.shape) - 2))


def _config(
    modules: Sequence[ModuleState],
    component: Component | None,
    names: Names | None,
    template: dict[str, Any] | None,
    where: str,
) -> dict[str, Any]:
    algorithm = _one_algorithm(modules, where)
    called = {m.path: _called(m, component) for m in modules}
    spelled = {called[m.path]: m for m in modules}
    ranks, flags = _METHODS[algorithm].flags(spelled, names, template, where)
    scales = {called[m.path]: m.scale for m in modules}
    alphas = {called[m.path]: _alpha(m, ranks[called[m.path]] or 1) for m in modules}
    others = _others(modules, component) if component else frozenset()
    wanted = peft_config.Wanted(algorithm, ranks, scales, alphas, flags, others - set(ranks))
    return peft_config.write_config(wanted, template, where)


def _called(module: ModuleState, component: Component | None) -> str:
    """What the model calls a module that the adapter is for: the adapter's own name, or the base's."""
    return module.own or (component.called(module.path) if component else module.path)


def _others(modules: Sequence[ModuleState], component: Component) -> frozenset[str]:
    """The modules that are not adapted, by every name where the adapter's are not the base's."""
    if not any(m.own for m in modules):
        return _known_modules(component)
    adapted = {component.weights.get(m.path) for m in modules}
    return frozenset(path for path, weight in component.weights.items() if weight not in adapted)


def _known_modules(component: Component) -> frozenset[str]:
    """All modules of the model that the config is for, as it calls them."""
    if component.stored == "native":
        return frozenset(component.native)
    return frozenset(component.called(path) for path in component.modules)


_Derived = tuple[Mapping[str, int | None], dict[str, Any]]  # ranks by module, the flags for all
_Template = dict[str, Any] | None
_Spelled = Mapping[str, ModuleState]  # modules by the name that they are written under


def _ranks(modules: _Spelled) -> dict[str, int | None]:
    return {path: m.rank or module_rank(m) or 1 for path, m in modules.items()}


def _lora_flags(
    modules: _Spelled, names: Names | None, template: _Template, where: str
) -> _Derived:
    held = list(modules.values())
    flags: dict[str, Any] = {"use_dora": "magnitude" in held[0].tensors, "use_rslora": False}
    if any("up_bias" in m.tensors for m in held):
        flags["lora_bias"] = True
        if not isinstance((template or {}).get("init_lora_weights"), bool):
            flags["init_lora_weights"] = True  # PEFT loads a lora_bias with no other
    return _ranks(modules), flags


def _loha_flags(
    modules: _Spelled, names: Names | None, template: _Template, where: str
) -> _Derived:
    return _ranks(modules), {"use_effective_conv2d": any(m.tucker for m in modules.values())}


def _lokr_flags(
    modules: _Spelled, names: Names | None, template: _Template, where: str
) -> _Derived:
    cut = {path: _cut(m, names, where) for path, m in modules.items()}
    return _lokr_said(cut, template, names, where) or _lokr_found(cut, where)


def _hra_flags(modules: _Spelled, names: Names | None, template: _Template, where: str) -> _Derived:
    first = next(iter(modules.values()))
    return _ranks(modules), {"apply_GS": bool(first.options.get("apply_gs"))}


def _lokr_said(
    cut: dict[str, _Lokr], template: dict[str, Any] | None, names: Names | None, where: str
) -> _Derived | None:
    """The template's ranks and flags, if PEFT derives these very shapes from them."""
    if not template or template.get("peft_type", "").upper() != "LOKR":
        return None
    settings = peft_config.settings(template, Matcher(cut, where), where)
    ranks = {path: settings[path].rank or 1 for path in cut}
    flags = {name: template.get(name, peft_config.FIELDS["lokr"][name]) for name in _LOKR_FLAGS}
    if names is None or all(_derives(flags, ranks[path], c) for path, c in cut.items()):
        return ranks, flags
    return None


def _ia3_flags(modules: _Spelled, names: Names | None, template: _Template, where: str) -> _Derived:
    """The template's feedforward_modules where they say of each module what it is, else the names."""
    inward = {path: bool(m.options.get("on_input")) for path, m in modules.items()}
    ends = (template or {}).get("feedforward_modules")
    if ends is None or any(is_feedforward(p, ends, where) != side for p, side in inward.items()):
        ends = sorted(path for path, side in inward.items() if side)
        if strays := [
            p for p, side in inward.items() if not side and is_feedforward(p, ends, where)
        ]:
            raise InexactError(
                "PEFT tells the modules whose inputs are scaled by the ends of their names",
                where=where,
                items=[f"`{p}` has such an end, and its outputs are scaled" for p in strays],
                next="merge the adapter into the base instead",
                code="feedforward-names",
            )
    transposed = any(m.options.get("fan_in_fan_out") for m in modules.values())
    return dict.fromkeys(modules), {"feedforward_modules": ends, "fan_in_fan_out": transposed}


_LOKR_FLAGS = ("decompose_both", "decompose_factor", "use_effective_conv2d")


def _derives(flags: dict[str, Any], rank: int, cut: _Lokr) -> bool:
    """Whether PEFT makes a module's factors as they are from its flags and rank."""
    (a, b), (c, d) = cut.out, cut.into
    t, factor = cut.module.tensors, flags["decompose_factor"]
    if module_rank(cut.module) not in (None, rank):
        return False
    if peft_factorization(a * b, factor) != (a, b) or peft_factorization(c * d, factor) != (c, d):
        return False
    w1, w2 = cut.widest
    if ("w1_a" in t) != (bool(flags["decompose_both"]) and 2 * rank < w1):
        return False
    kernel = any(k != 1 for k in cut.kernel)
    core = "w2_a" in t and kernel and bool(flags["use_effective_conv2d"])
    return ("w2_a" in t) == (2 * rank < w2) and ("t2" in t) == core


def _lokr_found(cut: dict[str, _Lokr], where: str) -> _Derived:
    """Ranks and flags found from the shapes alone."""
    all_cut = list(cut.values())
    both = _decompose_both(all_cut)
    return {path: c.rank(both) for path, c in cut.items()}, {
        "decompose_both": both,
        "decompose_factor": _factor(all_cut, where),
        "use_effective_conv2d": any("t2" in c.module.tensors for c in all_cut),
    }


def _alpha(module: ModuleState, rank: int) -> float:
    """alpha with alpha/rank = the module's scale; the file's own where it says that."""
    if module.alpha is not None and module.alpha / rank == module.scale:
        return module.alpha
    return module.scale * rank


@dataclass(frozen=True, eq=False, repr=False)
class _Method:
    """How PEFT spells one algorithm, beside its tensors' suffixes and its config's fields.

    ``kinds`` are the layers other than Linear and convolutions that it takes, ``magnitudes`` says
    whether it has DoRA; ``options`` reads a module's out of the config, ``disagreements`` names the
    config's flags under which PEFT would make other tensors, ``unheld`` why a module has no place,
    ``plan`` the steps for all modules, ``flags`` the ranks and flags that the config has to say.
    """

    plan: Callable[[Sequence[ModuleState], Names | None, str], list[Rewriting]]
    flags: Callable[[_Spelled, Names | None, _Template, str], _Derived]
    options: Callable[[str, dict[str, Tensor], dict[str, Any]], dict[str, Any]]
    disagreements: Callable[[ModuleState, dict[str, Any]], list[str]] = _no_disagreements
    unheld: Callable[[ModuleState, tuple[int, ...] | None], Unheld | None] = _all_held
    kinds: tuple[str, ...] = ()
    magnitudes: bool = False


# A new algorithm that PEFT has: its line here, its suffixes in SUFFIXES.
_METHODS: dict[str, _Method] = {
    "lora": _Method(
        _plan_lora,
        _lora_flags,
        _lora_options,
        _lora_disagreements,
        kinds=("embedding", "Conv1D"),
        magnitudes=True,
    ),
    "loha": _Method(_plan_loha, _loha_flags, _loha_options, _loha_disagreements, _loha_unheld),
    "lokr": _Method(_plan_lokr, _lokr_flags, _lokr_options, _lokr_disagreements, _lokr_unheld),
    "hra": _Method(_plan_hra, _hra_flags, _hra_options, unheld=_hra_unheld),
    "ia3": _Method(
        _plan_ia3, _ia3_flags, _ia3_options, _ia3_disagreements, _ia3_unheld, kinds=("Conv1D",)
    ),
}


FORMAT = Format(
    name="peft",
    title="PEFT (adapter_config.json + adapter_model.safetensors)",
    claims=claims,
    parse=parse,
    plan=plan,
    spell=spell,
    holds=holds,
    naming="diffusers",
    examples=("base_model.model.encoder.layers.0.self_attn.q_proj.lora_A.weight",),
)
