"""What the quickstart teaches: a model, its text, and how well it knows it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from adaptsurgery.checkpoint.bridge import from_torch
from adaptsurgery.checkpoint.writer import write_safetensors
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.update import Update
from adaptsurgery_formats import tensors
from adaptsurgery_formats.errors import FileError


class Student(ABC):
    """A model with a task. ``unit`` is what its loss is in; lower is better.

    ``steps`` and ``rate`` are an adapter's training, ``tuning_steps`` and ``tuning_rate`` that of
    the model's own weights; ``budget`` is the number of parameters of an extracted adapter.
    """

    unit: ClassVar[str]
    task: ClassVar[str]
    steps: ClassVar[int]
    rate: ClassVar[float]
    tuning_steps: ClassVar[int]
    tuning_rate: ClassVar[float]
    budget: ClassVar[int]

    def __init__(
        self, module: nn.Module, beside: Mapping[str, tensors.Tensor] | None = None
    ) -> None:
        self.module = module
        self.beside = dict(beside or {})  # of its checkpoint, what the module has no place for

    @classmethod
    @abstractmethod
    def read(cls, path: Path) -> Self:
        """The model with a checkpoint's weights."""

    @abstractmethod
    def layers(self) -> dict[str, Layer]:
        """The layers that adapters are put on, by path."""

    @abstractmethod
    def loss(self, generator: torch.Generator) -> Tensor:
        """The loss on text to learn from, drawn at random."""

    @abstractmethod
    def measured(self, updates: Mapping[str, Update]) -> float:
        """The loss on a fixed sample of text that is not learned from, with updates in place."""

    @abstractmethod
    def example(self, count: int) -> tuple[Tensor, ...]:
        """Inputs of the module: so many texts."""

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that a full fine-tune trains."""
        return list(self.module.parameters())

    def write(self, path: Path) -> None:
        state = {name: from_torch(t) for name, t in self.module.state_dict().items()}
        write_safetensors(path, self.beside | state, {"format": "pt"})

    @torch.no_grad()
    def outputs(self, updates: Mapping[str, Update]) -> Tensor:
        with adapted(self.module, updates):
            outputs: Tensor = self.module(*self.example(8))
        return outputs

    def teach(
        self,
        parameters: list[Tensor],
        updates: Mapping[str, Update],
        steps: int,
        seed: int,
        rate: float,
    ) -> None:
        """Train ``parameters``, the model's own or those of updates that are in place."""
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_pace, steps=steps))
        with adapted(self.module, updates):
            for _ in range(steps):
                optimizer.zero_grad()
                self.loss(generator).backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()

    def tuned(self, seed: int) -> Self:
        """A copy that has learned the task with its own weights."""
        other = copy.deepcopy(self)
        trained = [p.requires_grad_() for p in other.parameters()]
        other.teach([*trained], {}, self.tuning_steps, seed, self.tuning_rate)
        other.module.requires_grad_(False)
        return other


def _pace(step: int, steps: int) -> float:
    """The learning rate's course: up over ten steps, then down to nothing."""
    return min(1.0, (step + 1) / 10) * (1 - step / steps)


@contextmanager
def adapted(model: nn.Module, updates: Mapping[str, Update]) -> Iterator[None]:
    """The model with an update on each of some layers, as long as the block lasts."""
    modules: dict[str, Any] = {path: model.get_submodule(path) for path in updates}
    for path, module in modules.items():
        module.forward = partial(_apply, updates[path], Layer.from_module(module))
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def _apply(update: Update, layer: Layer, x: Tensor) -> Tensor:
    return update.apply(x, layer)


def source(name: str) -> str:
    """The source of a module of Python's library; "" where this Python has none."""
    spec = find_spec(name)
    read = getattr(spec.loader, "get_source", None) if spec else None
    return (read(name) if read else None) or ""


def no_text() -> FileError:
    """The error where there is nothing to learn from."""
    return FileError(
        "this Python has no sources of its standard library to learn from",
        next="--base MODEL takes a model of your own",
        code="no-text",
    )
