"""A live model as it was before a change that failed, whatever failed and wherever."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

# What a module holds, by name: replaced in place, since others may hold the very dict.
_HELD = ("_modules", "_parameters", "_buffers")


class Before:
    """What a model's modules hold, noted before a change that may fail or be interrupted.

    Nothing is copied but dicts of names. ``restore`` gives the modules the very same modules,
    parameters and buffers again, trainable where they were, and those of this room their settings;
    numbers that were changed in place stay. It undoes what another thread did meanwhile too, so what
    can be refused is refused before. Used by try and except, which an interrupt cannot slip out of.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(_below(model))
        self.held = [[dict(vars(m)[name]) for name in _HELD] for m in self.modules]
        self.own = [(m, _settings(m)) for m in self.modules if _is_ours(m)]
        self.training = [m.training for m in self.modules]
        self.trained = [(p, p.requires_grad) for p in model.parameters()]

    def restore(self) -> None:
        for module, held, training in zip(self.modules, self.held, self.training):
            for name, content in zip(_HELD, held):
                _refill(vars(module)[name], content)
            module.training = training
        for module, settings in self.own:
            for name, value in settings.items():
                if isinstance(value, dict):
                    _refill(vars(module)[name], value)
                else:
                    vars(module)[name] = value
        for parameter, trained in self.trained:
            parameter.requires_grad_(trained)


def _below(model: nn.Module) -> Iterator[nn.Module]:
    """Every module of a model, each once."""
    seen: set[int] = set()
    left: list[nn.Module | None] = [model]
    while left:
        module = left.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            yield module
            left += module._modules.values()


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith(__name__.rpartition(".")[0])


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a module of this room says beside what every module holds."""
    plain = {n: v for n, v in vars(module).items() if not n.startswith("_") or n == "_original"}
    return {n: dict(v) if isinstance(v, dict) else v for n, v in plain.items()}


def _refill(held: dict[str, Any], content: Mapping[str, Any]) -> None:
    """The same dict with its earlier content, in its earlier order."""
    if held.keys() != content.keys() or any(held[name] is not content[name] for name in content):
        held.clear()
        held.update(content)
