"""What is where in an adapted model, layer by layer and in all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from adaptsurgery.modules.layer import AdaptedLayer
from adaptsurgery.modules.model import AdaptedModel, parameters_of
from adaptsurgery.modules.saved import SavedModule

T = TypeVar("T")
IRREGULAR = "irregular"  # where layers, or the tensors of one, differ


@dataclass(frozen=True)
class LayerStatus:
    """One layer or saved module: PEFT's TunerLayerStatus, field by field."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]


@dataclass(frozen=True)
class ModelStatus:
    """The whole model: PEFT's TunerModelStatus; "irregular" where layers differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | str
    active_adapters: list[str] | str
    merged_adapters: list[str] | str
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]


def layer_status(model: AdaptedModel) -> list[LayerStatus]:
    """The status of every adapted layer and saved module, in the model's order."""
    held: list[tuple[str, AdaptedLayer | SavedModule]] = [*model.layers(), *model.saved_modules()]
    return [_of(name, module) for name, module in held]


def _of(name: str, module: AdaptedLayer | SavedModule) -> LayerStatus:
    layer = isinstance(module, AdaptedLayer)
    names = sorted(module.settings if isinstance(module, AdaptedLayer) else module.modules_to_save)
    tensors = {adapter: parameters_of(module, adapter) for adapter in names}
    kinds = (
        {s.algorithm for s in module.settings.values()} if isinstance(module, AdaptedLayer) else ()
    )
    inner = module.base_layer if isinstance(module, AdaptedLayer) else module.original_module
    return LayerStatus(
        name=name,
        module_type=f"{'+'.join(sorted(kinds))}.{type(inner).__name__}"
        if layer
        else "ModulesToSave",
        enabled=module.enabled,
        active_adapters=list(module.active),
        merged_adapters=list(module.merged) if isinstance(module, AdaptedLayer) else [],
        requires_grad={n: _one(t.requires_grad for t in held) for n, held in tensors.items()},
        available_adapters=names,
        devices={n: sorted({t.device.type for t in held}) for n, held in tensors.items()},
    )


def model_status(model: AdaptedModel, kind: str) -> ModelStatus:
    """The status of the whole model."""
    layers = layer_status(model)
    adapters = sorted({name for layer in layers for name in layer.available_adapters})
    trainable, total = count(model)
    devices = {n: sorted({d for s in layers for d in s.devices.get(n, ())}) for n in adapters}
    return ModelStatus(
        base_model_type=type(model.model).__name__,
        adapter_model_type=kind,
        peft_types={name: str(config.peft_type) for name, config in model.peft_config.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_one(layer.enabled for layer in layers),
        active_adapters=_one(layer.active_adapters for layer in layers),
        merged_adapters=_one(
            layer.merged_adapters for layer in layers if layer.module_type != "ModulesToSave"
        ),
        requires_grad={
            n: _one(s.requires_grad[n] for s in layers if n in s.requires_grad) for n in adapters
        },
        available_adapters=adapters,
        devices=devices,
    )


def count(model: nn.Module) -> tuple[int, int]:
    """How many numbers are trainable, and how many there are; shared ones once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def _one(values: Iterable[T]) -> T | str:
    items = list(values)
    return items[0] if items and all(value == items[0] for value in items) else IRREGULAR
