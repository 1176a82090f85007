"""How an adapter comes into a live model: planned first, so that a refusal leaves it as it was."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptsurgery.core.config import AdapterConfig
from adaptsurgery.core.update import Update
from adaptsurgery.modules import slots
from adaptsurgery.modules.layer import AdaptedLayer
from adaptsurgery.modules.saved import SavedModule
from adaptsurgery.modules.walk import Walk, holders
from adaptsurgery.targeting import Target
from adaptsurgery_formats.errors import SurgeryError, ValueRefused
from adaptsurgery_formats.paths import misnamed
from adaptsurgery_formats.peft import SUFFIXES


def _whole(name: str) -> bool:
    """Whether a parameter belongs to a module that is saved whole, or to the original of one."""
    return not {"modules_to_save", "original_module"}.isdisjoint(name.split("."))


@contextmanager
def uncollected() -> Iterator[None]:
    """Without searches for cyclic garbage: thousands of modules that stay would be gone through, again
    and again, while they are made.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def located(name: str) -> Iterator[None]:
    """An error within is of the module ``name``, where it says no other place."""
    try:
        yield
    except SurgeryError as error:
        error.where = error.where or name
        raise


def check_unadapted(model: nn.Module) -> None:
    """Raise ValueRefused for a model that another holds the adapters of."""
    if next(holders(model), None) is not None:
        raise ValueRefused(
            "the model has adapters in it already",
            next="add_adapter on what holds them, or unload() first",
            code="adapted-already",
        )


def check_name(name: str, taken: Collection[str]) -> None:
    """Raise ValueRefused for a name that no adapter can have: it is a part of keys and of a path."""
    if not isinstance(name, str):
        raise ValueRefused(
            f"{name!r} is no adapter's name", next="a string without dots", code="bad-name"
        )
    if name in taken:
        raise ValueRefused(
            f"there is an adapter `{name}` already",
            next="another name, or delete_adapter first",
            code="name-taken",
        )
    if "." in name or not name.strip() or (why := misnamed(name)):
        why = "it has a dot" if "." in name else "it is empty" if not name.strip() else why
        raise ValueRefused(
            f"{name!r} is no adapter's name: {why}",
            next="it is a part of its tensors' keys, and its folder's name: letters, digits, - and _",
            code="bad-name",
        )
    if hasattr(slots.Bank(), name) or hasattr(nn.ModuleDict(), name):
        raise ValueRefused(
            f"`{name}` is what torch calls something of every module",
            next="another name",
            code="bad-name",
        )


def new_updates(
    walk: Walk, chosen: Iterable[Target], config: AdapterConfig, empty: bool, wide: bool
) -> list[tuple[AdaptedLayer, Update]]:
    """The layers and their new updates, while nothing is changed; ``empty`` ones have no numbers.

    ``wide`` ones are in float32 beside a narrower weight, others in the weight's dtype.
    """
    layers: dict[int, tuple[AdaptedLayer, Update, Target]] = {}
    for target in chosen:
        module = walk.modules[target.name]
        if id(module) in layers:
            _check_same(layers[id(module)][2], target)
            continue
        with located(target.name):
            layer = module if isinstance(module, AdaptedLayer) else AdaptedLayer(module)
            update = _new_update(layer, target, config, empty, wide)
            layers[id(module)] = (layer, update, target)
    _tell_shared(walk, {target.name for target in chosen}, layers)
    return [(layer, update) for layer, update, _ in layers.values()]


def attach(
    walk: Walk,
    adapter: str,
    config: AdapterConfig,
    layers: Iterable[tuple[AdaptedLayer, Update]],
) -> None:
    """Give the layers their updates, and put those that are new into the model."""
    for layer, update in layers:
        layer.add(adapter, update, config)
        if id(layer.base_layer) in walk.places:
            walk.put(layer.base_layer, layer)


def save_whole(walk: Walk, adapter: str, names: Iterable[str]) -> None:
    """Wrap the modules that an adapter saves whole."""
    for name in names:
        module = walk.modules[name]
        if not isinstance(module, SavedModule):
            wrapper = SavedModule(module)
            walk.put(module, wrapper)
            module = wrapper
        if adapter not in module.modules_to_save:
            module.add(adapter)


def train_biases(model: nn.Module, config: AdapterConfig, layers: Iterable[AdaptedLayer]) -> None:
    """Make the base's biases trainable that the config says."""
    setting = getattr(config, "bias", "none")
    if setting == "all":
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "bias" and not _whole(name):
                parameter.requires_grad_(True)
    elif setting != "none":
        for layer in layers:
            if isinstance(bias := getattr(layer.base_layer, "bias", None), Tensor):
                bias.requires_grad_(True)


def _new_update(
    layer: AdaptedLayer, target: Target, config: AdapterConfig, empty: bool, wide: bool
) -> Update:
    """New tensors for a layer, beside its weight."""
    base, config = layer.layer(), config.for_module(target.name)
    if base.kind not in config.kinds:
        raise ValueRefused(
            f"{config.algorithm} is not for a {type(layer.base_layer).__name__}",
            next=f"it takes {', '.join(sorted(config.kinds))}",
            code="unsupported-layer",
        )
    device = torch.device("meta") if empty else base.weight.device
    dtype = torch.promote_types(base.weight.dtype, torch.float32) if wide else base.weight.dtype
    settings: dict[str, Any] = {"rank": target.rank, "alpha": target.alpha, "kind": base.kind}
    if device.type == "meta":
        return config.blank(base.shape, device=device, dtype=dtype, **settings)
    with torch.no_grad():
        weight = base.canonical().detach()
        return config.fresh(base.shape, device=device, dtype=dtype, weight=weight, **settings)


def _check_same(first: Target, second: Target) -> None:
    if (first.rank, first.alpha) != (second.rank, second.alpha):
        raise ValueRefused(
            f"one module is targeted twice, as `{first.name}` and as `{second.name}`",
            seen=f"rank {first.rank} and {second.rank}, alpha {first.alpha} and {second.alpha}",
            next="exclude one of the names, or give both the same rank and alpha",
            code="targeted-twice",
        )


def _tell_shared(walk: Walk, chosen: set[str], layers: Collection[int]) -> None:
    """Warn of names that are adapted only because they share a module with one that is targeted."""
    if sum(len(walk.places.get(id(m), ())) > 1 for m in walk.modules.values()) == 0:
        return
    others = [n for n, m in walk.modules.items() if id(m) in layers and n not in chosen]
    if others:
        warnings.warn(f"adapted too, being the same module: {', '.join(others[:6])}", stacklevel=5)


def of_keys(config: AdapterConfig, keys: Iterable[str]) -> AdapterConfig:
    """The config with the modules that a state dict's keys name for its targets, and no others."""
    marks = tuple(f".{suffix.partition('.')[0]}" for suffix in SUFFIXES)
    names: dict[str, None] = {}
    for key in keys:
        at = max((key.rfind(mark) for mark in marks), default=-1)
        if at > 0:
            names.setdefault(key[:at].removeprefix("base_model.").removeprefix("model."))
    if not names:
        raise ValueRefused("the state dict names no adapter's tensor", code="empty-adapter")
    pattern = "|".join(f"(?:model\\.)?{re.escape(name)}" for name in names)
    return replace(
        config,
        target_modules=pattern,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def tied(model: nn.Module) -> dict[int, list[str]]:
    """The names of every parameter that has several."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name.replace(".base_layer.", "."))
    return {key: names for key, names in groups.items() if len(names) > 1}
