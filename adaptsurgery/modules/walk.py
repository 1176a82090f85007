"""The modules of a live model as a config sees them: names, kinds, and the places that hold them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from adaptsurgery.core.geometry import kind_of
from adaptsurgery.modules.layer import AdaptedLayer
from adaptsurgery.modules.saved import SavedModule

# Of torch's own: these read their linears' weights past the forward, at least in their fast path.
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass
class Walk:
    """A model's modules by name, in its order; what adapters put there is not entered.

    A module that is known by two names is there twice; ``places`` has all (parent, attribute) that
    hold it, so that whatever takes its place is put into all of them.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    places: dict[int, list[tuple[nn.Module, str]]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Walk:
        walk = cls()
        parents: set[int] = set()
        for name, module in _named("", model):
            walk.modules[name] = module
            if id(module) in parents or isinstance(module, (AdaptedLayer, SavedModule)):
                continue
            parents.add(id(module))
            for attribute, child in module._modules.items():
                if child is not None:
                    walk.places.setdefault(id(child), []).append((module, attribute))
        return walk

    def kinds(self) -> dict[str, str]:
        """Name → kind of layer, "" for what is none; the model itself has no name and is left out."""
        return {
            name: m.kind if isinstance(m, AdaptedLayer) else kind_of(m)
            for name, m in self.modules.items()
            if name
        }

    def put(self, old: nn.Module, new: nn.Module) -> None:
        """Set ``new`` in every place that holds ``old``."""
        places = self.places.pop(id(old))
        for parent, attribute in places:
            setattr(parent, attribute, new)
            if isinstance(new, AdaptedLayer) and isinstance(parent, _READERS):
                new.read_directly = True
        self.places[id(new)] = places


def holders(model: nn.Module) -> Iterator[AdaptedLayer | SavedModule]:
    """The adapted layers and the modules that are saved whole, each once; they are not entered."""
    seen: set[int] = set()
    left = [model]
    while left:
        module = left.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, (AdaptedLayer, SavedModule)):
            yield module
        else:
            left += [child for child in reversed(module._modules.values()) if child is not None]


def _named(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    if isinstance(module, (AdaptedLayer, SavedModule)):
        return
    for attribute, child in module._modules.items():
        if child is not None:
            yield from _named(f"{name}.{attribute}" if name else attribute, child)


def model_type(model: nn.Module) -> str | None:
    """The architecture by its config, where the model has one."""
    config = getattr(model, "config", None)
    name = (
        config.get("model_type")
        if isinstance(config, dict)
        else getattr(config, "model_type", None)
    )
    return name if isinstance(name, str) else None


def outputs(walk: Walk, model: nn.Module) -> list[str]:
    """The names of the output embeddings, where the model tells them."""
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    return [n for n, m in walk.modules.items() if m is head] if head is not None else []
