"""One adapted layer for every algorithm and every kind of layer.

It holds the base layer and, per adapter, the tensors of an update under PEFT's names; its output is
the base layer's with W' for W, by the law of core/law.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from adaptsurgery import algorithms
from adaptsurgery.algorithms import made, with_norms
from adaptsurgery.core.config import AdapterConfig, tensors_of
from adaptsurgery.core.cost import ApplyForm
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.law import order_of, unknown_update
from adaptsurgery.core.update import (
    Delta,
    Update,
    compose,
    is_finite,
    is_reversible,
    only_whole,
    parts_of,
)
from adaptsurgery.modules import slots
from adaptsurgery.modules.tracing import Recording, unreadable
from adaptsurgery_formats.errors import ValueRefused
from adaptsurgery_formats.traits import traits_of

_PLAIN = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding}
MANY = 512  # positions, where a trace leaves their number open
_GEOMETRY = ("kind", "stride", "padding", "padding_mode", "dilation", "groups", "transposed", "padding_idx")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one adapter's tensors in one layer mean; its config says how they drop in training."""

    algorithm: str
    suffixes: Mapping[str, str]  # slot → PEFT's suffix
    scale: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)  # its own: hra's apply_gs
    config: AdapterConfig | None = None
    weight: float = 1.0  # of the whole adapter


@dataclass(frozen=True, eq=False)
class LiveLayer(Layer):
    """A Layer of a module that is asked itself for its own output, hooks and all."""

    module: nn.Module | None = None
    plain: bool = True

    def forward(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | EllipsisType | None = ...
    ) -> Tensor:
        own = isinstance(bias, EllipsisType) or bias is self.bias
        if weight is None and own and self.module is not None:
            out: Tensor = self.module(x)
            return out
        if self.plain or self.module is None:
            return super().forward(x, weight, bias)
        held = {"weight": self.weight if weight is None else self.stored(weight)}
        bias = self.bias if isinstance(bias, EllipsisType) else bias
        held |= {} if bias is None else {"bias": bias}
        given: Tensor = torch.func.functional_call(self.module, held, (x,))
        return given


@dataclass(frozen=True, eq=False)
class Built:
    """What a forward goes through, and the very settings and tensors that it was made of."""

    layer: LiveLayer
    update: Update
    order: tuple[str, ...]  # the adapters, as the update has its parts
    settings: Mapping[str, Setting]
    tensors: list[tuple[str, str, Tensor]]  # suffix, adapter, tensor
    lasting: bool  # whether they are all parameters: a view belongs to the call that made it

    def holds(self, now: AdaptedLayer, live: tuple[str, ...]) -> bool:
        """Whether all that it was made of is still there, each thing the very same."""
        settings, modules = self.settings, now._modules
        base = modules["base_layer"]
        if base is None or base is not self.layer.module or live != tuple(settings):
            return False
        held = base._parameters
        if held.get("weight") is not self.layer.weight or held.get("bias") is not self.layer.bias:
            return False
        for name in live:
            if now.settings[name] is not settings[name]:
                return False
        for suffix, adapter, tensor in self.tensors:
            if slots.take(now, suffix, adapter) is not tensor:
                return False
        return True


class AdaptedLayer(nn.Module):
    """A layer with adapters on it.

    ``base_layer`` is the layer itself, untouched; ``settings`` says by adapter what its tensors
    mean; ``active`` names the adapters that the forward goes through, in order. Attributes that are
    not found here are the base layer's.
    """

    base_layer: nn.Module
    settings: dict[str, Setting]
    active: tuple[str, ...]
    merged: tuple[str, ...]
    enabled: bool
    read_directly: bool  # whether its parent reads the weight past the forward
    kind: str
    geometry: dict[str, Any]
    dims: int
    shape: tuple[int, ...]
    plain: bool
    _original: tuple[Tensor | None, Tensor | None] | None
    _built: Built | None

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        layer = Layer.from_module(base_layer)
        if not layer.weight.is_floating_point():
            raise ValueRefused(
                f"a {type(base_layer).__name__} with a weight of {layer.weight.dtype} takes no update",
                next="load the base unquantised, or dequantise it",
                code="quantised-weight",
            )
        self.base_layer = base_layer
        # Not one by one: every nn.Module.__setattr__ looks for parameters and modules.
        self.__dict__ |= {
            "settings": {},
            "active": (),
            "merged": (),
            "enabled": True,
            "read_directly": False,
            "kind": layer.kind,
            "geometry": {name: getattr(layer, name) for name in _GEOMETRY},
            "dims": layer.dims,
            "shape": layer.shape,
            "plain": type(base_layer) in _PLAIN or (layer.transposed and layer.kind == "linear"),
            "_original": None,
            "_built": None,
            "training": base_layer.training,
        }

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        base = modules.get("base_layer")
        if base is None or name in self._parameters or name in self._buffers:
            return super().__getattr__(name)
        if name in ("weight", "bias") and self.read_directly and self.live():
            return self._seen(name)
        return getattr(base, name)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, whose parameters are others."""
        return self.__dict__ | {"_built": None}

    def _load_from_state_dict(self, *args: Any) -> None:
        self._built = None  # parameters that are replaced are let go
        super()._load_from_state_dict(*args)

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks first."""
        raise ValueRefused(
            "torch.jit.script reads no adapted layer: it takes its adapters' settings from Python",
            next="script torch.fx.symbolic_trace(model.get_base_model()), or torch.jit.trace it",
            code="no-script",
        )

    # --- adapters --------------------------------------------------------------------------------

    def add(self, adapter: str, update: Update, config: AdapterConfig | None = None) -> None:
        """Take the tensors of an update as an adapter's: they become parameters."""
        inner = update.plain
        if not any(type(inner) is known for known in algorithms.ALGORITHMS):
            raise unknown_update(inner, "a live layer")
        held = tensors_of(update)
        known = slots.suffixes(inner.name, self.kind == "embedding")
        if strange := sorted(held.keys() - known.keys()):
            raise ValueRefused(
                f"a live {inner.name} has no place for its {', '.join(strange)}",
                seen=", ".join(sorted(held)),
                next="fold it into the weights instead: adaptsurgery.fold",
                code="no-live-slot",
            )
        self.settings[adapter] = Setting(
            algorithm=inner.name,
            suffixes={slot: suffix for slot, suffix in known.items() if slot in held},
            scale=getattr(inner, "scale", 1.0),
            options={name: getattr(inner, name) for name in traits_of(inner.name).options},
            config=config,
        )
        for slot, suffix in self.settings[adapter].suffixes.items():
            slots.put(self, suffix, adapter, slots.as_peft(slot, held[slot], self.dims))

    def drop(self, adapter: str) -> None:
        """Take an adapter and its tensors away; first of all from what a forward goes through."""
        self.active = tuple(name for name in self.active if name != adapter)
        self._built = None
        for suffix in self.settings.pop(adapter).suffixes.values():
            slots.drop(self, suffix, adapter)

    def tensors(self, adapter: str) -> dict[str, Tensor]:
        """An adapter's parameters by PEFT's suffix."""
        held = self.settings[adapter].suffixes.values()
        return {suffix: slots.take(self, suffix, adapter) for suffix in held}

    def update(self, adapter: str) -> Update:
        """An adapter's update as it stands, of its live parameters, at the adapter's weight."""
        setting = self.settings[adapter]
        held: dict[str, Any] = {
            slot: slots.as_slot(slot, slots.take(self, suffix, adapter), self.dims)
            for slot, suffix in setting.suffixes.items()
        }
        magnitude = held.pop("magnitude", None)
        scale = setting.scale * (setting.weight if magnitude is None else 1.0)
        update = made(setting.algorithm, {**held, **setting.options}, scale, self.shape)
        return (
            update
            if magnitude is None
            else only_whole(with_norms(update, magnitude), setting.weight)
        )

    def live(self) -> tuple[str, ...]:
        """The adapters that the forward goes through, in order."""
        if not self.enabled:
            return ()
        return tuple([n for n in self.active if n in self.settings and n not in self.merged])

    # --- forward ---------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with W' for W; further arguments are the base layer's alone."""
        live = self.live()
        if not live:
            out: Tensor = self.base_layer(x, *args, **kwargs)
            return out
        if not isinstance(x, Proxy):
            return self._adapted(x, live)
        with Recording(x):
            return self._adapted(x, live)

    def _adapted(self, x: Tensor, live: tuple[str, ...]) -> Tensor:
        built = self.built(live)
        update, layer = built.update, built.layer
        form = self.form(x, update, layer)
        if not self.training:
            return update.apply(x, layer, form)
        configs = [built.settings[name].config for name in built.order]
        sample, kind = layer.sample(x), self.kind
        gates = [None if c is None else c.gate(self.shape[0], sample) for c in configs]
        seen = [None if c is None else c.seen(x, kind) for c in configs]
        return update.apply(x, layer, form, gates, seen)

    def built(self, live: tuple[str, ...]) -> Built:
        """What the forward goes through, kept while it holds; built anew under a compiler."""
        if torch.compiler.is_compiling():
            return self._build(live)
        while True:
            try:
                return self._kept(live)
            except KeyError:
                if live == (now := self.live()):
                    raise
                live = now  # another thread has just taken an adapter out

    def _kept(self, live: tuple[str, ...]) -> Built:
        built = self._built
        if built is None or not built.holds(self, live):
            built = self._build(live)
            self._built = built if built.lasting else None
        return built

    def _build(self, live: tuple[str, ...]) -> Built:
        layer = self.layer()
        named = [(name, self.update(name)) for name in live]
        parts = sorted(named, key=lambda part: order_of(part[1]))
        made = [layer.weight, layer.bias, *[t for _, p in parts for t in tensors_of(p).values()]]
        return Built(
            layer=layer,
            update=compose([part for _, part in parts]),
            order=tuple([name for name, _ in parts]),
            settings={name: self.settings[name] for name in live},
            tensors=[(s, name, t) for name in live for s, t in self.tensors(name).items()],
            lasting=all(t is None or type(t) is nn.Parameter for t in made),
        )

    def form(self, x: Tensor, update: Update, layer: Layer) -> ApplyForm:
        """By cost; a module with a forward of its own is given W', one with hooks is called.

        Where the sizes of ``x`` cannot be read the cost is that of many positions.
        """
        if not self.plain:
            return "folded"
        base = self._modules["base_layer"]
        assert base is not None
        if base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base):
            return "factored"
        if not unreadable(x):
            return "auto"
        trains = self.training and torch.is_grad_enabled()
        deltas = [part for part in parts_of(update) if isinstance(part, Delta)]
        prices = [delta.prices(MANY, layer, trains) for delta in deltas]
        dear = any(
            p["folded"] < p["factored"] for p in prices if {"folded", "factored"} <= p.keys()
        )
        return "folded" if dear else "factored"

    def layer(self) -> LiveLayer:
        """The base layer as the algebra sees it, with its parameters as they are now."""
        base = self.base_layer
        weight = slots.own_parameter(base, "weight")
        bias = None if getattr(base, "bias", None) is None else slots.own_parameter(base, "bias")
        return LiveLayer(weight=weight, bias=bias, module=base, plain=self.plain, **self.geometry)

    def _seen(self, name: str) -> Tensor | None:
        """W' or b', for a parent that reads the parameters themselves."""
        update, layer = compose([self.update(n) for n in self.live()]), self.layer()
        if name == "bias":
            return update.fold_bias(layer.bias, layer.weight.dtype)
        return layer.stored(update.folded(layer.canonical()))

    # --- merging ---------------------------------------------------------------------------------

    def merge(self, adapters: Iterable[str], *, keep: bool = True) -> None:
        """Fold adapters into the base layer; several at different times as if at once.

        With ``keep`` the original weight is held for ``unmerge``. Raises ValueRefused, before anything
        is changed: "non-finite" for numbers that are not.
        """
        wanted = self._wanted(adapters)
        if not wanted:
            return
        original = self._originals()
        weight, bias = self._merged((*self.merged, *wanted), original)
        self._set(weight, bias)
        self.merged = (*self.merged, *wanted)
        self._original = original if keep else (None, original[1])

    def check_merge(self, adapters: Iterable[str]) -> None:
        """Raise what ``merge`` would, changing nothing; computes the weight where it might overflow."""
        if wanted := self._wanted(adapters):
            names = (*self.merged, *wanted)
            self._check_stored()
            update = compose([self.update(name) for name in names])
            if self.merged or not _surely_finite(self.layer(), update):
                self._merged(names, self._originals())

    def _wanted(self, adapters: Iterable[str]) -> list[str]:
        return [n for n in adapters if n in self.settings and n not in self.merged]

    def _merged(
        self, names: Sequence[str], original: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """The base layer's parameters with adapters folded into the original ones."""
        layer = replace(self.layer(), weight=original[0], bias=original[1])
        update = compose([self.update(name) for name in names])
        weight = layer.stored(update.fold(layer.canonical())).contiguous()
        bias = update.fold_bias(layer.bias, layer.weight.dtype)
        if not all(is_finite(t) for t in (weight, bias) if t is not None):
            raise ValueRefused(
                f"merged with {', '.join(names)} the weight is not finite",
                next="look at the adapter's numbers; a base in float16 may overflow",
                code="non-finite",
            )
        return weight, bias

    def unmerge(self) -> None:
        """Put the base layer's parameters back as they were, bit for bit where they were kept."""
        if self.merged:
            self._set(*self._originals())
            self.merged, self._original = (), None

    @property
    def lasting(self) -> bool:
        """Whether what is merged cannot be taken out (a DoRA), and the weight was not kept."""
        if self._original is not None and self._original[0] is not None:
            return False
        return any(not is_reversible(self.update(name)) for name in self.merged)

    def _originals(self) -> tuple[Tensor, Tensor | None]:
        """The base layer's parameters without what is merged."""
        self._check_stored()
        layer = self.layer()
        if self._original is None:
            return layer.weight, layer.bias
        weight, bias = self._original
        if weight is None:
            update = compose([self.update(name) for name in self.merged])
            weight = layer.stored(update.unfold(layer.canonical())).contiguous()
        return weight, bias

    def _check_stored(self) -> None:
        """Raise ValueRefused where there is no parameter with numbers to fold into."""
        if "weight" not in self.base_layer._parameters:
            raise ValueRefused(
                f"the weight of a {type(self.base_layer).__name__} is computed, not stored",
                next="torch.nn.utils.parametrize.remove_parametrizations first",
                code="not-a-parameter",
            )
        if slots.own_parameter(self.base_layer, "weight").is_meta:
            raise ValueRefused(
                "the weight is on the meta device: it has no numbers",
                next="load the base's numbers first",
                code="no-numbers",
            )

    def _set(self, weight: Tensor, bias: Tensor | None) -> None:
        """New parameters for the base layer: those that other modules share stay as they are."""
        self._built = None
        for name, new in (("weight", weight), ("bias", bias)):
            old = getattr(self.base_layer, name, None)
            if new is old:
                continue
            if name == "bias" and self.kind == "embedding":
                raise ValueRefused("an embedding has no place for a bias", code="no-bias")
            trained = old is not None and old.requires_grad
            if new is not None and not isinstance(new, nn.Parameter):
                new = nn.Parameter(new.detach(), trained)
            setattr(self.base_layer, name, new)

    def forget(self) -> None:
        """Let the original weight of what is merged go; a bias stays, being small."""
        if self._original is not None:
            self._original = (None, self._original[1])

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {setting.algorithm}" for name, setting in self.settings.items())


def _surely_finite(layer: Layer, update: Update) -> bool:
    """Whether no number of W + Σ s·Δ can overflow: each is at most max|W| + Σ |s|·∏‖factor‖."""
    parts = parts_of(update)
    if not all(isinstance(part, Delta) for part in parts):
        return False
    with torch.no_grad():
        held = [t.detach() for t in (layer.weight, layer.bias) if t is not None and t.numel()]
        most = sum(abs(end) for t in held for end in _ends(t))
        for part in parts:
            norms = [float(torch.linalg.vector_norm(t.double())) for t in part.tensors().values()]
            most += abs(getattr(part, "scale", 1.0)) * math.prod(max(n, 1.0) for n in norms)
    return most < torch.finfo(layer.weight.dtype).max / 2


def _ends(tensor: Tensor) -> tuple[float, float]:
    """The least and the largest number; NaN where there is one."""
    least, largest = torch.aminmax(tensor)
    return float(least), float(largest)
