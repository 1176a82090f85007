"""The algorithms, each whole in its own file, and the one door from slots to an Update."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from adaptsurgery.algorithms.dora import DoRA
from adaptsurgery.algorithms.full import Full, Norm
from adaptsurgery.algorithms.hra import HRA, HRAConfig
from adaptsurgery.algorithms.ia3 import IA3, IA3Config
from adaptsurgery.algorithms.loha import LoHa, LoHaConfig
from adaptsurgery.algorithms.lokr import LoKr, LoKrConfig
from adaptsurgery.algorithms.lora import LoRA, Truncation
from adaptsurgery.algorithms.lora_config import LoraConfig
from adaptsurgery.core.config import AdapterConfig
from adaptsurgery.core.update import Delta, Update, only_whole
from adaptsurgery.nearest.goal import Fit, Goal
from adaptsurgery_formats.errors import KeyRefused, ValueRefused, nearest
from adaptsurgery_formats.traits import named as table
from adaptsurgery_formats.traits import traits_of

# A new algorithm: its file, and its line here.
ALGORITHMS: tuple[type[Update], ...] = (LoRA, LoHa, LoKr, HRA, IA3, Full, Norm)

__all__ = [
    "ALGORITHMS",
    "HRA",
    "IA3",
    "AdapterConfig",
    "DoRA",
    "Full",
    "HRAConfig",
    "IA3Config",
    "LoHa",
    "LoHaConfig",
    "LoKr",
    "LoKrConfig",
    "LoRA",
    "LoraConfig",
    "LowRank",
    "Norm",
    "Truncation",
    "build",
    "extract",
    "fitter",
    "made",
    "named",
    "with_norms",
]


@runtime_checkable
class LowRank(Protocol):
    """A Delta that is exactly a LoRA in another form."""

    def to_lora(self) -> LoRA: ...

    def cast(self, dtype: torch.dtype, device: torch.device | None = None) -> Self: ...


def build(
    algorithm: str,
    tensors: Mapping[str, Tensor],
    scale: float = 1.0,
    weight_shape: tuple[int, ...] | None = None,
    **options: Any,
) -> Update:
    """The Update of an algorithm's tensors by slot (adaptsurgery_formats.state names the slots).

    A ``magnitude`` makes it a DoRA. ``weight_shape`` is canonical, (o, i, *k): checked where given.
    ``options`` are the algorithm's own (hra: apply_gs). Raises ValueRefused for an unknown
    algorithm or numbers that define no rotation, KeyRefused for a slot or option the algorithm does
    not have, ShapeError where shapes misfit.
    """
    chosen = named(algorithm)
    slots = {name: tensor for name, tensor in tensors.items() if name != "magnitude"}
    magnitude = tensors.get("magnitude")
    _check_slots(chosen, {**slots, **options}, magnitude is not None)
    update = made(algorithm, {**slots, **options}, scale, weight_shape)
    update.check_values()
    if weight_shape is not None:
        update.check_fits(weight_shape)
    return update if magnitude is None else with_norms(update, magnitude)


def made(
    algorithm: str, arguments: Mapping[str, Any], scale: float, shape: tuple[int, ...] | None
) -> Update:
    """The Update of slots and options that are known to be the algorithm's, checked no further."""
    chosen = named(algorithm)
    held = dict(arguments)
    if "weight_shape" in chosen.takes:
        held["weight_shape"] = shape
    if "scale" in chosen.takes:
        held["scale"] = scale
        return chosen(**held)  # type: ignore[no-any-return]
    return only_whole(chosen(**held), scale)  # type: ignore[no-any-return]


def with_norms(update: Update, magnitude: Tensor) -> DoRA:
    """A DoRA around an update that adds."""
    assert isinstance(update, Delta)  # what has a slot for a magnitude adds
    return DoRA(update, magnitude)


def named(algorithm: str) -> Any:
    """The class of an algorithm. ValueRefused ("unknown-algorithm") for a name that has none."""
    for known in ALGORITHMS:
        if known.name == algorithm:
            return known
    names = [known.name for known in ALGORITHMS]
    raise ValueRefused(
        f"no algorithm is called `{algorithm}`",
        next=nearest(algorithm, names) or f"one of {', '.join(names)}",
        code="unknown-algorithm",
    )


def extract(
    algorithm: str,
    base: Tensor,
    tuned: Tensor,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    budget: int | None = None,
    seed: int = 0,
    **own: Any,
) -> Update:
    """The update of an algorithm that makes ``tuned`` of ``base`` as nearly as it can.

    Weights are canonical, (o, i, *k). The goal is one of ``rank``, ``energy``, ``max_error`` and
    ``budget``, as in ``nearest.goal.Goal``; ``own`` options are those of the algorithm's ``fit``.
    Raises what these do.
    """
    goal = Goal(rank=rank, energy=energy, max_error=max_error, budget=budget)
    return fitter(algorithm)(base, tuned, goal, seed=seed, **own).update


def fitter(algorithm: str) -> Callable[..., Fit]:
    """The function that fits an algorithm to the difference of two weights, ``fit`` of its file.

    ValueRefused ("unknown-algorithm", "no-fit") where there is none.
    """
    home = importlib.import_module(named(algorithm).__module__)
    if not traits_of(algorithm).extracts or not hasattr(home, "fit"):
        raise ValueRefused(
            f"no {algorithm} can be fitted to a difference",
            next="one of " + ", ".join(table(lambda row: row.extracts)),
            code="no-fit",
        )
    fit: Callable[..., Fit] = home.fit
    return fit


def _check_slots(chosen: Any, given: Mapping[str, Any], magnitude: bool) -> None:
    known = {f.name: f for f in fields(chosen) if f.name not in ("scale", "weight_shape")}
    strange = sorted(set(given) - set(known))
    if magnitude and (not issubclass(chosen, Delta) or traits_of(chosen.name).vector):
        strange.append("magnitude")
    missing = [n for n, f in known.items() if f.default is MISSING and n not in given]
    if strange or missing:
        trouble = f"no slot `{strange[0]}`" if strange else f"not its {', '.join(missing)}"
        raise KeyRefused(
            f"{chosen.name} has {trouble}",
            seen=", ".join(sorted(given)),
            next=f"its slots are {', '.join(known)}",
            code="unknown-slot" if strange else "incomplete-module",
        )
