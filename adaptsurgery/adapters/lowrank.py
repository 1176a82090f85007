"""What ``combine`` and ``resize`` share: adapters of one model, LoRA forms, and errors from factors.

Everything is measured on factors, ‖up·down‖ by two QRs: no ΔW is built that has a low rank.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adaptsurgery.adapters.loading import Loaded, read_adapter
from adaptsurgery.adapters.report import some
from adaptsurgery.adapters.rewritings import as_stored
from adaptsurgery.adapters.updates import canonical_shape, update_of
from adaptsurgery_formats import AdapterState, Format, ModuleState, Tensor
from adaptsurgery_formats.errors import InexactError, LayoutError, NameLookupError, SurgeryError
from adaptsurgery_formats.names import Component, Names, to_diffusers, to_native
from adaptsurgery_formats.resolve import find_modules, kohya_component
from adaptsurgery_formats.state import ALPHA_OVER_R, delta_shape, kernel_of
from adaptsurgery_formats.traits import traits_of

if TYPE_CHECKING:
    import torch

    from adaptsurgery.algorithms import LoRA, LowRank

OWN = "the adapters' own names"
Spec = str | os.PathLike[str]


# Adapters of one model


def load_together(
    paths: Sequence[Spec], *, base: Spec | None, to: str | None, layout: str | None = None
) -> list[Loaded]:
    """The adapters at paths or Hub names, looked up in one and the same model.

    Files whose flat names no list has can stand for themselves where they are all of the layout
    ``to`` (None: the first one's). Raises what loading raises, NameLookupError where the adapters
    are of different models, LayoutError ("base-needed") where only a base can tell.
    """
    loaded = [read_adapter(path, base=base, layout=layout, look_up=False) for path in paths]
    candidates = [one for one in loaded if one.names is not None]
    if candidates:
        return _in_one_model(loaded, candidates)
    flat = [one for one in loaded if any(m.naming == "flat" for m in one.state.modules)]
    layouts = {one.state.layout for one in loaded}
    if flat and layouts == {to or loaded[0].state.layout}:
        names = own_names([one.state for one in loaded])
        return [_looked_up(one, names) for one in loaded]
    if flat:
        raise LayoutError(
            "flat names cannot be told apart without the base's module list",
            where=flat[0].state.where,
            next="--base MODEL (a safetensors file, a folder, or sd15, sd2, sdxl, flux)",
            code="base-needed",
        )
    found_names = kohya_component(loaded[0].state) if to == "kohya" else None
    if found_names is not None:
        return [_looked_up(one, found_names[0]) for one in loaded]
    _check_comparable(loaded)
    return loaded


def _in_one_model(loaded: list[Loaded], candidates: Sequence[Loaded]) -> list[Loaded]:
    """All of them in the first list of names that has every module."""
    trouble: SurgeryError | None = None
    for candidate in candidates:
        assert candidate.names is not None
        try:
            placed = [_looked_up(one, candidate.names) for one in loaded]
        except SurgeryError as error:
            trouble = trouble or error
            continue
        return [replace(one, base=candidate.base) for one in placed]
    assert trouble is not None
    if len({one.names.model for one in candidates if one.names}) < 2:
        raise trouble
    raise NameLookupError(
        "the adapters are for different models",
        where=loaded[0].state.where,
        seen=", ".join(
            f"{one.paths[0].name}: {one.names.model}" for one in candidates if one.names
        ),
        next="adapters of one model can be combined; --base MODEL if the guess is wrong",
        code="different-models",
    )


def _looked_up(loaded: Loaded, names: Names) -> Loaded:
    if loaded.names is names:
        return loaded
    return replace(loaded, names=names, state=find_modules(loaded.state, names))


def own_names(states: Iterable[AdapterState]) -> Names:
    """The flat names of adapters as a module list of their own: each name stands for itself."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    prefixes: dict[str, str] = {}
    for module in (m for state in states for m in state.modules):
        prefix = str(module.options.get("prefix", ""))
        home = module.component or prefix
        prefixes[home] = prefix
        known = shapes.setdefault(home, {})
        known[module.path] = max(known.get(module.path, ()), _shape(module), key=_detail)
    components = {
        name: Component(
            name, modules, kohya_prefixes=(prefixes[name],) if prefixes[name] else (), naming="base"
        )
        for name, modules in shapes.items()
    }
    return Names("", components, OWN)


def _shape(module: ModuleState) -> tuple[int, ...]:
    """(o, i, *k) as far as a module shows it, (n,) of a norm."""
    out, columns = delta_shape(module)
    if traits_of(module.algorithm).vector:
        return (out,)
    kernel = kernel_of(module) or ()
    return (out, columns // math.prod(kernel), *kernel)


def _detail(shape: tuple[int, ...]) -> tuple[int, int]:
    return len(shape), math.prod(shape)


def _check_comparable(loaded: Sequence[Loaded]) -> None:
    """Without a list of names, refuse what looks like one model's layers under two names."""
    places = [{(m.component, m.path) for m in one.state.modules} for one in loaded]
    for n, mine in enumerate(places):
        for theirs in places[n + 1 :]:
            if mine & theirs or not _one_within(mine, theirs):
                continue
            raise NameLookupError(
                "the adapters seem to name the same modules differently",
                where=loaded[0].state.where,
                seen=f"`{_told(min(mine))}` and `{_told(min(theirs))}`",
                next="--base MODEL tells which modules they are",
                code="names-differ",
            )


def _one_within(mine: set[tuple[str, str]], theirs: set[tuple[str, str]]) -> bool:
    """Whether some name of one adapter is the tail of another's."""
    for few, many in ((mine, theirs), (theirs, mine)):
        tails = {name[i + 1 :] for name in map(_told, many) for i, c in enumerate(name) if c == "."}
        if any(_told(place) in tails for place in few):
            return True
    return False


def _told(place: tuple[str, str]) -> str:
    return ".".join(filter(None, place))


# The names that a layout writes


def in_naming(state: AdapterState, names: Names | None, target: Format) -> AdapterState:
    """The state in the target's naming, like ``renamed``; what cannot be cut or fused as it is
    becomes a LoRA first, exactly.

    Raises InexactError for an HRA or a DoRA that cannot.
    """
    if state.layout != target.name:
        state = replace(state, modules=[_without_prefix(m) for m in state.modules])
    if names is None:
        return state
    groups: dict[tuple[str, str, bool], list[ModuleState]] = {}
    for module in state.modules:
        component = names.components.get(module.component)
        whole = _whole_path(module, component) if _is_native(component, target) else module.path
        low = not traits_of(module.algorithm).dense
        groups.setdefault((module.component, whole, low), []).append(module)
    modules: list[ModuleState] = []
    changed: list[str] = []
    for (name, _, _), group in groups.items():
        component = names.components.get(name)
        if component is None:
            modules += group
            continue
        try:
            modules += _renamed(group, component, target)
        except InexactError:
            if not all(is_low_rank(m) for m in group):
                raise
            plain = [plain_lora(m, names, state.where) for m in group]
            modules += _renamed(plain, component, target)
            changed.append(group[0].label)
    if changed:
        state.note("as-lora", some(changed), "written as LoRA, exactly, to be cut or fused")
    return replace(state, modules=modules)


def _without_prefix(module: ModuleState) -> ModuleState:
    """A prefix of one layout says nothing in another."""
    options = {k: v for k, v in module.options.items() if k != "prefix"}
    return replace(module, options=options) if "prefix" in module.options else module


def _is_native(component: Component | None, target: Format) -> bool:
    if component is None or not component.native:
        return False
    return (target.naming or component.kohya_naming) == "native"


def _whole_path(module: ModuleState, component: Component | None) -> str:
    if component is None or module.naming == "native":
        return module.path
    return component.native_of.get(module.path, module.path)


def _renamed(group: list[ModuleState], component: Component, target: Format) -> list[ModuleState]:
    if _is_native(component, target):
        return to_native(group, component)
    return [part for m in group for part in to_diffusers(m, component)]


def plain_lora(module: ModuleState, names: Names | None, where: str) -> ModuleState:
    """A low-rank module as a LoRA of scale 1 in float32, or float64 where a factor is."""
    form = lora_form(module, names, where)
    bias = None if form.up_bias is None else form.up_bias * form.scale
    plain = replace(form, up=form.up * form.scale, up_bias=bias, scale=1.0)
    return in_place_of(module, plain, [t for t in module.tensors.values() if t.dtype == "F64"])


def in_place_of(module: ModuleState, lora: LoRA, like: Sequence[Tensor]) -> ModuleState:
    """A float64 LoRA as a module in the place of another: its scale said by alpha, its factors
    ``stored`` as those they are ``like``."""
    flat = lora.flat()
    tensors = {"up": as_stored(flat.up.double(), like), "down": as_stored(flat.down.double(), like)}
    if flat.up_bias is not None:
        own = module.tensors.get("up_bias")
        tensors["up_bias"] = as_stored(flat.up_bias.double(), [own] if own else like)
    return with_factors(module, tensors, flat.scale)


def with_factors(module: ModuleState, tensors: dict[str, Tensor], scale: float) -> ModuleState:
    """A LoRA of these tensors in the place of a module; alpha says its scale."""
    rank = tensors["up"].shape[1]
    return replace(
        module,
        algorithm="lora",
        tensors=tensors,
        alpha=scale * rank,
        rank=rank,
        rule=ALPHA_OVER_R,
        options=prefix_of(module),
        kind=module.kind if module.algorithm == "lora" else "",
    )


def prefix_of(module: ModuleState) -> dict[str, object]:
    """The options of a module that outlive its factors: the kohya prefix that it was read under,
    how the file's alphas are stored, and which way round the weight is."""
    return {k: v for k, v in module.options.items() if k in _LASTING}


_LASTING = ("prefix", "alpha_kind", "fan_in_fan_out")


# LoRA forms, and what they are apart


def is_low_rank(module: ModuleState) -> bool:
    """Whether a module is exactly a LoRA in some form: not a DoRA, not a rotation, not dense."""
    return traits_of(module.algorithm).low_rank and "magnitude" not in module.tensors


def hides_kernel(module: ModuleState, names: Names | None) -> bool:
    """Whether nothing shows the kernel: flat factors, and no list of the model's own shapes."""
    if not traits_of(module.algorithm).low_rank or kernel_of(module) is not None:
        return False
    return names is None or names.where == OWN or canonical_shape(module, names) is None


def lora_form(module: ModuleState, names: Names | None, where: str) -> LoRA:
    """The flat LoRA in float64 that a low-rank module is exactly."""
    return low_rank_update(module, names, where).to_lora()


def low_rank_update(module: ModuleState, names: Names | None, where: str) -> LowRank:
    """A low-rank update in float64; of a DoRA, what it goes around.

    InexactError ("no-lora-form") for what is no LoRA in another form.
    """
    import torch

    from adaptsurgery.algorithms import LowRank

    update = update_of(module.with_tensors(magnitude=None), names, where)
    if not isinstance(update, LowRank):
        title = traits_of(module.algorithm).title
        raise InexactError(
            f"`{module.label}`: a {title} is no LoRA in another form",
            where=where,
            next="merge it into the base instead",
            code="no-lora-form",
        )
    return update.cast(torch.float64)


def product_norm(up: torch.Tensor, down: torch.Tensor) -> float:
    """‖up·down‖ of matrices (o, r), (r, n), from their triangles where r is the least of the three."""
    import torch

    if up.shape[1] < min(up.shape[0], down.shape[1]):
        up = torch.linalg.qr(up, mode="r").R
        down = torch.linalg.qr(down.t(), mode="r").R.t()
    return float(torch.linalg.vector_norm(up @ down))


Scaled = tuple[float, "LoRA"]  # a coefficient in place of the LoRA's own scale


def terms_apart(terms: Sequence[Scaled], others: Sequence[Scaled]) -> tuple[float, float]:
    """‖Σ cΔ − Σ c'Δ'‖ and ‖Σ cΔ‖, in float64."""
    apart = product_norm(*stacked([*terms, *((-c, lora) for c, lora in others)]))
    return apart, product_norm(*stacked(terms))


def stacked(terms: Sequence[Scaled]) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ cΔ as one product: (o, Σr) with the coefficients in it, (Σr, i·∏k)."""
    import torch

    factors = [(c, *lora.factors()) for c, lora in terms]
    return torch.cat([c * up for c, up, _ in factors], 1), torch.cat([d for _, _, d in factors])


def relative(apart: float, total: float) -> float:
    """apart / total; 0 where both are, infinity where only the total is."""
    return apart / total if total else (math.inf if apart else 0.0)
