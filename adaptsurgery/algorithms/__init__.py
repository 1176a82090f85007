"""The algorithms, each whole in its own file, and the one door from slots to an Update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from torch import Tensor

from adaptsurgery.algorithms.dora import DoRA
from adaptsurgery.algorithms.full import Full, Norm
from adaptsurgery.algorithms.hra import HRA, HRAConfig
from adaptsurgery.algorithms.loha import LoHa, LoHaConfig
from adaptsurgery.algorithms.lokr import LoKr, LoKrConfig
from adaptsurgery.algorithms.lora import LoRA, LoraConfig, Truncation
from adaptsurgery.core.config import AdapterConfig
from adaptsurgery.core.update import Delta, Update, only_whole
from adaptsurgery_formats.errors import KeyRefused, ValueRefused, nearest

# A new algorithm: its file, and its line here.
ALGORITHMS: tuple[type[Delta] | type[HRA], ...] = (LoRA, LoHa, LoKr, HRA, Full, Norm)

__all__ = [
    "ALGORITHMS",
    "HRA",
    "AdapterConfig",
    "DoRA",
    "Full",
    "HRAConfig",
    "LoHa",
    "LoHaConfig",
    "LoKr",
    "LoKrConfig",
    "LoRA",
    "LoraConfig",
    "Norm",
    "Truncation",
    "build",
]


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
    chosen = _named(algorithm)
    slots = {name: tensor for name, tensor in tensors.items() if name != "magnitude"}
    magnitude = tensors.get("magnitude")
    arguments: dict[str, Any] = {**slots, **options}
    _check_slots(chosen, arguments, magnitude is not None)
    if issubclass(chosen, HRA):
        rotation = chosen(**arguments)
        rotation.check_values()
        if weight_shape is not None:
            rotation.check_fits(weight_shape)
        return only_whole(rotation, scale)
    delta = chosen(**arguments, scale=scale, weight_shape=weight_shape)
    return delta if magnitude is None else DoRA(delta, magnitude)


def _named(algorithm: str) -> type[Delta] | type[HRA]:
    for known in ALGORITHMS:
        if known.name == algorithm:
            return known
    names = [known.name for known in ALGORITHMS]
    raise ValueRefused(
        f"no algorithm is called `{algorithm}`",
        next=nearest(algorithm, names) or f"one of {', '.join(names)}",
        code="unknown-algorithm",
    )


def _check_slots(
    chosen: type[Delta] | type[HRA], given: Mapping[str, Any], magnitude: bool
) -> None:
    known = {f.name: f for f in fields(chosen) if f.name not in ("scale", "weight_shape")}
    strange = sorted(set(given) - set(known))
    if magnitude and chosen not in (LoRA, LoHa, LoKr, Full):
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
