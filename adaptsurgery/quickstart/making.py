"""The four adapters: trained on a student, or made for some weights of a model of the user's.

Each has an alpha other than its rank, where it has one: a scale lost on the way would show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adaptsurgery.algorithms import HRA, LoHa, LoKr, LoRA
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.update import Delta, Update
from adaptsurgery.quickstart.students import Student
from adaptsurgery_formats.lokr_cuts import peft_factorization

Shape = tuple[int, ...]
Updates = Mapping[str, Update]
FACTOR = 4  # LoKr's decompose_factor
STRENGTH = 0.03  # ‖ΔW‖/‖W‖ of an adapter that is made, not trained


@dataclass(frozen=True)
class Made:
    """An adapter in memory, and how to see what it does.

    ``probe`` gives outputs with any such updates in place: the student's, or each layer's.
    ``before`` and ``after`` are the student's losses; ``moved`` is ‖ΔW‖/‖W‖.
    """

    recipe: Recipe
    updates: Updates
    probe: Callable[[Updates], list[Tensor]]
    moved: float
    before: float | None = None
    after: float | None = None

    @property
    def name(self) -> str:
        return self.recipe.algorithm

    @property
    def numbers(self) -> int:
        return sum(t.numel() for update in self.updates.values() for t in factors(update).values())


@dataclass(frozen=True)
class Recipe:
    """An algorithm with its rank and alpha, and its initial value for a weight (o, i, *k).

    ``zero`` is the slot that is zero at first; ``dims`` the weights that it is put on.
    """

    algorithm: str
    rank: int
    alpha: float | None
    start: Callable[[Shape, int, float, torch.Generator], Update]
    zero: str = ""
    dims: tuple[int, ...] = (2, 3, 4)

    def fresh(self, shape: Shape, generator: torch.Generator) -> Update:
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        return self.start(shape, self.rank, scale, generator)


def _lora(shape: Shape, rank: int, scale: float, generator: torch.Generator) -> LoRA:
    down = torch.randn(rank, _columns(shape), generator=generator) / _columns(shape) ** 0.5
    return LoRA.of_factors(torch.zeros(shape[0], rank), down, shape, scale)


def _loha(shape: Shape, rank: int, scale: float, generator: torch.Generator) -> LoHa:
    a = torch.randn(shape[0], rank, generator=generator) / 10
    b, d = torch.randn(2, rank, _columns(shape), generator=generator)
    return LoHa(a, b, torch.zeros(shape[0], rank), d, scale=scale, weight_shape=shape)


def _lokr(shape: Shape, rank: int, scale: float, generator: torch.Generator) -> LoKr:
    (a, b), (c, d) = (peft_factorization(n, FACTOR) for n in shape[:2])
    columns = d * math.prod(shape[2:])
    w1 = torch.randn(a, c, generator=generator) / c**0.5
    w2_b = torch.randn(rank, columns, generator=generator) / columns**0.5
    w2_a = torch.zeros(b, rank)
    return LoKr(w1=w1, w2_a=w2_a, w2_b=w2_b, scale=scale, weight_shape=shape)


def _hra(shape: Shape, rank: int, scale: float, generator: torch.Generator) -> HRA:
    """Pairs of equal reflections, which undo each other."""
    half = torch.randn(_columns(shape), rank // 2, generator=generator)
    return HRA((half / half.norm(dim=0)).repeat_interleave(2, dim=1))


def _columns(shape: Shape) -> int:
    """i·∏k."""
    return math.prod(shape[1:])


RECIPES = (
    Recipe("lora", 8, 4.0, _lora, "up"),
    Recipe("loha", 4, 2.0, _loha, "w2_a"),
    Recipe("lokr", 4, 8.0, _lokr, "w2_a"),
    Recipe("hra", 8, None, _hra, dims=(2, 4)),  # PEFT has none on Conv1d
)


def factors(update: Update) -> dict[str, Tensor]:
    """The tensors of one of the updates above, by slot."""
    if isinstance(update, HRA):
        return {"u": update.u}
    assert isinstance(update, Delta)
    return update.tensors()


def train(student: Student, recipe: Recipe, seed: int) -> Made:
    """An adapter of a student that has learned its task by gradient, through ``Update.apply``."""
    generator = torch.Generator().manual_seed(seed)
    layers = student.layers()
    updates = {
        path: recipe.fresh(layer.shape, generator)
        for path, layer in layers.items()
        if len(layer.shape) in recipe.dims
    }
    trained = [t.requires_grad_() for u in updates.values() for t in factors(u).values()]
    before = student.measured(updates)
    student.teach(trained, updates, student.steps, seed, student.rate)
    for tensor in trained:
        tensor.requires_grad_(False)

    def probe(updates: Updates) -> list[Tensor]:
        return [student.outputs(updates)]

    weights = {path: layers[path].canonical() for path in updates}
    return Made(recipe, updates, probe, moved(updates, weights), before, student.measured(updates))


def make(recipe: Recipe, weights: Mapping[str, Tensor], seed: int) -> Made:
    """An adapter for canonical weights: seeded random directions, ‖ΔW‖ about 3 % of ‖W‖."""
    generator = torch.Generator().manual_seed(seed)
    updates = {
        path: _set_apart(recipe, recipe.fresh(tuple(w.shape), generator), w, generator)
        for path, w in weights.items()
    }
    inputs = {path: _input(w, generator) for path, w in weights.items()}

    def probe(updates: Updates) -> list[Tensor]:
        kinds = {2: "linear", 4: "conv2d"}
        layers = {path: Layer(kinds[w.dim()], w) for path, w in weights.items()}
        with torch.no_grad():
            return [updates[path].apply(inputs[path], layers[path]) for path in updates]

    return Made(recipe, updates, probe, moved(updates, weights))


def _input(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Random input of a linear or Conv2d layer."""
    places = tuple(2 * k for k in weight.shape[2:])
    shape = (2, weight.shape[1], *places) if places else (8, weight.shape[1])
    return torch.randn(shape, generator=generator)


def _set_apart(
    recipe: Recipe, update: Update, weight: Tensor, generator: torch.Generator
) -> Update:
    """An update that does something, from its initial value, which does nothing."""
    if isinstance(update, HRA):
        return HRA(_turned(update.u, generator))
    assert isinstance(update, Delta)
    slots: dict[str, Any] = {
        recipe.zero: torch.randn(factors(update)[recipe.zero].shape, generator=generator)
    }
    size = float(update.scale * replace(update, **slots).dense().norm())
    slots[recipe.zero] *= STRENGTH * float(weight.norm()) / size
    return replace(update, **slots)


def _turned(u: Tensor, generator: torch.Generator) -> Tensor:
    """The second of every pair of reflections turned from the first, so that each pair rotates.

    A turn by θ rotates a plane by 2θ, and so moves W by about 2·sin θ·√(r/n)·‖W‖ in all.
    """
    n, r = u.shape
    sine = min(0.9, STRENGTH / 2 * math.sqrt(n / r))
    away = torch.randn(n, r // 2, generator=generator)
    first = u[:, ::2]
    away -= first * (first * away).sum(0)
    second = (1 - sine**2) ** 0.5 * first + sine * away / away.norm(dim=0)
    return torch.stack([first, second], dim=2).flatten(1)


def moved(updates: Updates, weights: Mapping[str, Tensor]) -> float:
    """‖ΔW‖/‖W‖ over all of the weights."""
    change = sum(
        float((u.fold(weights[p]) - weights[p]).square().sum()) for p, u in updates.items()
    )
    whole = sum(float(weights[p].square().sum()) for p in updates)
    return math.sqrt(change / whole) if whole else 0.0


def chosen(shapes: Mapping[str, Shape], count: int = 6) -> list[str]:
    """Some of the layers that all four can go on, from all over a model.

    Spread by the golden ratio, which falls in step with no pattern of repeated blocks.
    """
    fit = [path for path, shape in shapes.items() if _fits(shape)]
    if len(fit) <= count:
        return fit
    places = {int(i * 0.6180339887 % 1 * len(fit)) for i in range(count)}
    return [fit[place] for place in sorted(places)]


def _fits(shape: Shape) -> bool:
    """Whether a shape is a Linear's or Conv2d's that LoKr can cut, and that takes little memory."""
    square = len(shape) == 2 or (len(shape) == 4 and shape[2] == shape[3])
    sides = all(n >= 16 * FACTOR and n % FACTOR == 0 for n in shape[:2])
    return square and sides and math.prod(shape) <= 1 << 24


def nothing(update: Update) -> Update:
    """An update of the same layer that does nothing."""
    if isinstance(update, HRA):
        return HRA(update.u[:, :1].repeat(1, 2))
    return update.scaled(0.0)
