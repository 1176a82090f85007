"""A model of the user's: some of its layers, chosen by their names and shapes, and their weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from adaptsurgery.adapters.loading import Loaded, names_of
from adaptsurgery.adapters.updates import base_weight, modules_of
from adaptsurgery.checkpoint.base import Base
from adaptsurgery.jobs.inspect import last_name
from adaptsurgery.quickstart.making import Shape, chosen
from adaptsurgery_formats import AdapterState, ModuleState
from adaptsurgery_formats.errors import LayoutError
from adaptsurgery_formats.names import Component

# embed_tokens, word_embeddings, wte, wpe, shared: a matrix each, and no Linear's
_EMBEDDING = re.compile(r"emb|^wte$|^wpe$|^shared$|^tok")


@dataclass(frozen=True)
class Given:
    """The chosen canonical weights in float32, by module path with its component."""

    where: str
    layers: int  # that could be chosen
    weights: Mapping[str, Tensor]


def look_at(base: str) -> Given:
    """A model by its path or Hub name; nothing is read but headers and the chosen weights.

    Raises LayoutError: "base-needed" for a mere list of names, "no-layers" where nothing fits.
    """
    names, read = names_of(base)
    if read is None:
        raise LayoutError(
            f"`{base}` is a list of names; the quickstart needs a model's weights",
            next="--base MODEL: a safetensors file, a folder, or a Hub name",
            code="base-needed",
        )
    parts = {name: _linear_layers(part, read) for name, part in names.components.items()}
    component = max(parts, key=lambda name: len(chosen(parts[name], 1 << 30)))
    shapes = parts[component]
    loaded = Loaded(AdapterState("memory", [], where=names.where), [], names, read)
    naming = names.components[component].naming
    weights = {}
    for path in chosen(shapes):
        weight = base_weight(loaded, _stand_in(path, shapes[path], component, naming))
        if weight.is_floating_point() and weight.element_size() > 1:
            weights[f"{component}.{path}" if component else path] = weight.float()
    if not weights:
        raise LayoutError(
            "no layer of it can take all four kinds of adapter",
            where=read.where,
            next="a model with Linear or Conv2d layers of 64 or more inputs and outputs",
            code="no-layers",
        )
    return Given(read.where, len(chosen(shapes, 1 << 30)), weights)


def _stand_in(path: str, shape: Shape, component: str, naming: str) -> ModuleState:
    """A module of a canonical shape, to ask for the base's weight in that shape."""
    import torch

    from adaptsurgery.algorithms import LoRA

    lora = LoRA.of_factors(torch.empty(shape[0], 1), torch.empty(1, *shape[1:]).flatten(1), shape)
    [module] = modules_of(path, lora, component)
    return ModuleState(**{**vars(module), "naming": naming})


def _linear_layers(component: Component, base: Base) -> dict[str, Shape]:
    """The canonical shapes of what may be a Linear or a Conv2d.

    transformers' Conv1D stores (i, o): its bias tells. In a model that has those, a square weight
    tells nothing and is left out, and so is one without a bias.
    """
    matrices = {
        path: shape
        for path, shape in component.modules.items()
        if len(shape) in (2, 4) and not _EMBEDDING.search(last_name(path))
    }
    home = component.name if component.name in base.parameters else ""
    biases = {path: base.bias(home, component.called(path)) for path in matrices}
    lengths = {path: bias.numel for path, bias in biases.items() if bias is not None}
    turned = [p for p, n in lengths.items() if len(matrices[p]) == 2 and n != matrices[p][0]]
    if not turned:
        return matrices
    return {path: matrices[path][::-1] for path in turned if lengths[path] == matrices[path][1]}
