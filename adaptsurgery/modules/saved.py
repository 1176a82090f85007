"""Modules that are trained whole beside an adapter and saved with it: PEFT's modules_to_save.

score.original_module.weight                the base's own
score.modules_to_save.default.weight        the adapter's copy, which is trained
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


class SavedModule(nn.Module):
    """A module of the base with a copy for each adapter; the first active adapter's is called."""

    original_module: nn.Module
    modules_to_save: nn.ModuleDict

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.training = module.training

    def add(self, adapter: str) -> None:
        """A copy of the original for an adapter."""
        self.modules_to_save[adapter] = copy.deepcopy(self.original_module)

    def drop(self, adapter: str) -> None:
        """Take an adapter's copy away."""
        del self.modules_to_save[adapter]
        self.active = tuple(name for name in self.active if name != adapter)

    def current(self) -> nn.Module:
        """The module that the forward goes through."""
        copies = self._modules["modules_to_save"]
        assert isinstance(copies, nn.ModuleDict)
        live = [name for name in self.active if name in copies._modules] if self.enabled else []
        module = copies._modules[live[0]] if live else self._modules["original_module"]
        assert module is not None
        return module

    def tensors(self, adapter: str) -> dict[str, Tensor]:
        """The parameters and buffers of an adapter's copy, by their names in the module."""
        return self.modules_to_save[adapter].state_dict()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_module" not in self.__dict__.get("_modules", {}):
                raise
        return getattr(self.current(), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current()(*args, **kwargs)
