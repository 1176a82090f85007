"""Adapters in a live model: put in, chosen, switched off, taken out, merged."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

from torch import Tensor, nn

from adaptsurgery.core.config import AdapterConfig
from adaptsurgery.core.update import Update
from adaptsurgery.modules.alone import Turn, alone
from adaptsurgery.modules.injection import (
    attach,
    check_name,
    check_unadapted,
    located,
    new_updates,
    of_keys,
    save_whole,
    tied,
    train_biases,
    uncollected,
)
from adaptsurgery.modules.layer import AdaptedLayer
from adaptsurgery.modules.saved import SavedModule
from adaptsurgery.modules.undo import Before
from adaptsurgery.modules.walk import Walk, holders, model_type, outputs
from adaptsurgery.targeting import Targets, find_targets
from adaptsurgery_formats.errors import (
    InexactError,
    NameLookupError,
    SurgeryError,
    ValueRefused,
    nearest,
)
from adaptsurgery_formats.traits import TRAITS, traits_of

AdapterNames = str | Sequence[str]


class AdaptedModel(nn.Module):
    """A model whose layers hold adapters, changed in place: ``model`` is the model itself.

    Takes what PEFT's LoraModel and its like take. ``low_cpu_mem_usage`` leaves the adapter's tensors
    on the meta device, to be loaded; ``state_dict`` names, by its keys alone, the modules to adapt.
    Without ``autocast_adapter_dtype`` adapters have their layer's dtype, where it is narrower than
    float32 too.
    ``peft_config`` holds the configs by adapter. Raises what ``add_adapter`` raises.
    """

    algorithm: ClassVar[str] = ""  # the one that is taken; "" takes all, side by side
    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        config: AdapterConfig | Mapping[str, AdapterConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__()
        check_unadapted(model)
        self.turn = Turn()
        self.model = model
        self.training = model.training
        self.peft_config: dict[str, AdapterConfig] = {}
        self.active_adapters: list[str] = []
        self.enabled, self.inference = True, False  # adapters compute; the active ones do not train
        configs = list(config.items()) if isinstance(config, Mapping) else [(adapter_name, config)]
        given: dict[str, Any] = {"autocast_adapter_dtype": autocast_adapter_dtype}
        before = Before(model)
        try:
            model.requires_grad_(False)
            for name, one in configs:
                self.add_adapter(name, one, low_cpu_mem_usage, state_dict=state_dict, **given)
            self.set_adapter(configs[0][0], inference_mode=configs[0][1].inference_mode)
        except BaseException:
            before.restore()
            raise

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or "model" not in self.__dict__.get("_modules", {}):
                raise
        return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own; ValueRefused for PEFT's ``adapter_names``, which a model might swallow."""
        if (mixed := kwargs.pop("adapter_names", None)) is not None:
            raise ValueRefused(
                "one call goes through the same adapters for all of its batch",
                seen=f"adapter_names {mixed!r}"[:200],
                next="set_adapter(name), and a call for each adapter's part of the batch",
                code="no-mixed-batch",
            )
        return self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> AdaptedModel:
        """As of any module; ValueRefused to train while adapters are merged."""
        if mode and self.merged_adapters:
            raise ValueRefused(
                f"training would pass by the merged {', '.join(self.merged_adapters)}",
                next="unmerge_adapter() first",
                code="merged",
            )
        super().train(mode)
        return self

    # --- what there is ---------------------------------------------------------------------------

    def layers(self) -> Iterator[tuple[str, AdaptedLayer]]:
        """The adapted layers by the base's names for them."""
        for name, module in Walk.of(self.model).modules.items():
            if isinstance(module, AdaptedLayer):
                yield name, module

    def saved_modules(self) -> Iterator[tuple[str, SavedModule]]:
        """The modules with copies to save, by the base's names for them."""
        for name, module in Walk.of(self.model).modules.items():
            if isinstance(module, SavedModule):
                yield name, module

    def _holders(self) -> Iterator[AdaptedLayer | SavedModule]:
        return holders(self.model)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter, or all of them where there are several."""
        return self.active_adapters[0] if len(self.active_adapters) == 1 else self.active_adapters

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters that are merged in some layer."""
        if "model" not in self._modules:
            return []
        per_layer = (m.merged for m in self._holders() if isinstance(m, AdaptedLayer))
        return list(dict.fromkeys(name for merged in per_layer for name in merged))

    def update(self, path: str, adapter: str) -> Update:
        """An adapter's update of one layer, of its live tensors. NameLookupError for no such layer."""
        held = {name: layer for name, layer in self.layers() if adapter in layer.settings}
        if path not in held:
            raise NameLookupError(f"`{adapter}` has no `{path}`", next=nearest(path, held))
        return held[path].update(adapter)

    def scales(self, config: AdapterConfig) -> dict[str, float]:
        """The scale that a config gives each layer that it targets."""
        targets = self._targets(Walk.of(self.model), config)
        return {t.name: config.scale(t.rank, t.alpha) for t in targets.chosen}

    # --- putting in ------------------------------------------------------------------------------

    @alone
    def add_adapter(
        self,
        adapter_name: str,
        config: AdapterConfig,
        low_cpu_mem_usage: bool = False,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Put an adapter in, not active. The model is as it was if anything is refused.

        Raises ValueRefused for a name that is taken or has a dot, for a config of another algorithm,
        a quantised layer, a module that is targeted twice, and what ``find_targets`` and the config
        refuse.
        """
        check_name(adapter_name, self.peft_config)
        self._check_config(config)
        config = copy.deepcopy(config)
        walk = Walk.of(self.model)
        wanted = config if state_dict is None else of_keys(config, state_dict)
        targets = self._targets(walk, wanted)
        for note in targets.notes:
            warnings.warn(f"{note.where}: {note.text} [{note.code}]", stacklevel=4)
        with uncollected():
            layers = new_updates(
                walk, targets.chosen, config, low_cpu_mem_usage, autocast_adapter_dtype
            )
        before = Before(self)
        try:
            with uncollected():
                attach(walk, adapter_name, config, layers)
            save_whole(walk, adapter_name, targets.saved)
            self.peft_config[adapter_name] = config
            train_biases(self.model, config, [layer for layer, _ in layers])
            self._activate()
        except BaseException:
            before.restore()
            raise

    def _targets(self, walk: Walk, config: AdapterConfig) -> Targets:
        kind, heads = model_type(self.model), outputs(walk, self.model)
        return find_targets(walk.kinds(), config, model_type=kind, outputs=heads)

    def _check_config(self, config: AdapterConfig) -> None:
        if not isinstance(config, AdapterConfig):
            raise ValueRefused(
                f"a {type(config).__name__} is no config of this house",
                next="LoraConfig, LoHaConfig, LoKrConfig or HRAConfig of adaptsurgery",
                code="bad-config",
            )
        if self.algorithm not in ("", config.algorithm):
            raise ValueRefused(
                f"a {type(self).__name__} does not take a {type(config).__name__}",
                next="get_peft_model(…, mixed=True) takes all algorithms side by side",
                code="mixed-algorithms",
            )
        trained = [n for n, c in self.peft_config.items() if getattr(c, "bias", "none") != "none"]
        if trained and getattr(config, "bias", "none") != "none":
            raise ValueRefused(
                f"the base's biases are trained with `{trained[0]}` already: they are not kept apart",
                next='bias="none"',
                code="biases-shared",
            )

    # --- choosing --------------------------------------------------------------------------------

    @alone
    def set_adapter(
        self,
        adapter_name: AdapterNames,
        inference_mode: bool = False,
        weights: Sequence[float] | None = None,
    ) -> None:
        """Make one or several adapters active, in order; they alone are trainable.

        ``weights`` multiply what each adds; a rotation and a DoRA take 1. NameLookupError for an
        unknown name, ValueRefused while adapters are merged.
        """
        names = list(dict.fromkeys(self._each(adapter_name)))
        if self.merged_adapters:
            raise ValueRefused(
                f"{', '.join(self.merged_adapters)} is merged",
                next="unmerge_adapter() first",
                code="merged",
            )
        strengths = [1.0] * len(names) if weights is None else [float(w) for w in weights]
        if len(strengths) != len(names) or not all(map(math.isfinite, strengths)):
            raise ValueRefused(
                f"weights {strengths} for the adapters {', '.join(names)}",
                next="one finite number an adapter",
                code="bad-weights",
            )
        self._weigh(dict(zip(names, strengths)))
        self.active_adapters, self.inference = names, inference_mode
        self._activate()

    def _weigh(self, strengths: Mapping[str, float]) -> None:
        """Set what the adapters are multiplied by: in all layers, or in none where one refuses."""
        before = []
        layers = [m for m in self._holders() if isinstance(m, AdaptedLayer)]
        try:
            for layer in layers:
                for name in strengths.keys() & layer.settings.keys():
                    setting = layer.settings[name]
                    if setting.weight != strengths[name]:
                        before.append((layer, name, setting))
                        layer.settings[name] = replace(setting, weight=strengths[name])
                        layer.update(name)  # refused where a weight has no meaning
        except SurgeryError:
            for layer, name, setting in before:
                layer.settings[name] = setting
            raise

    def _activate(self) -> None:
        """Tell every layer what is active, and train that alone."""
        active = tuple(self.active_adapters)
        for module in self._holders():
            module.active, module.enabled = active, self.enabled
            held = module.settings if isinstance(module, AdaptedLayer) else module.modules_to_save
            for name in held:
                trained = name in active and not self.inference
                for tensor in parameters_of(module, name):
                    tensor.requires_grad_(trained)

    def _each(self, names: AdapterNames) -> list[str]:
        """The adapters of a name or several, each known."""
        several = isinstance(names, Iterable) and not isinstance(names, str)
        return [self._known(name) for name in (names if several else [names])]

    def _known(self, name: Any) -> str:
        if not isinstance(name, str) or name not in self.peft_config:
            hint = (
                nearest(str(name), self.peft_config)
                or f"there are {', '.join(self.peft_config) or 'none'}"
            )
            raise NameLookupError(
                f"there is no adapter `{name}`", next=hint, code="unknown-adapter"
            )
        return name

    @alone
    def disable_adapter_layers(self) -> None:
        """Let the base alone compute; what is merged is taken out."""
        self._check_out()
        merged = {id(m): m.merged for m in self._holders() if isinstance(m, AdaptedLayer)}
        for module in self._holders():
            module.enabled = False
            if isinstance(module, AdaptedLayer) and merged[id(module)]:
                module.unmerge()
        self.enabled = False

    @alone
    def enable_adapter_layers(self) -> None:
        """Let the active adapters compute again."""
        self.enabled = True
        for module in self._holders():
            module.enabled = True

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the base alone computes; what was merged is merged again after it."""
        was, merged = (
            self.enabled,
            [(m, m.merged) for m in self._holders() if isinstance(m, AdaptedLayer)],
        )
        self.disable_adapter_layers()
        try:
            yield
        finally:
            for layer, names in merged:
                layer.merge(names)
            if was:
                self.enable_adapter_layers()

    @alone
    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out. The first of the others becomes active where it was the only active one.

        NameLookupError for an unknown name, ValueRefused for one that is merged.
        """
        self._known(adapter_name)
        if adapter_name in self.merged_adapters:
            raise ValueRefused(
                f"`{adapter_name}` is merged into the base",
                next="unmerge_adapter() first, or merge_and_unload() to keep it there",
                code="merged",
            )
        for module in self._holders():
            held = module.settings if isinstance(module, AdaptedLayer) else module.modules_to_save
            if adapter_name in held:
                module.drop(adapter_name)
        del self.peft_config[adapter_name]
        left = [name for name in self.active_adapters if name != adapter_name]
        if self.active_adapters and not left and self.peft_config:
            left = [next(iter(self.peft_config))]
            warnings.warn(f"`{adapter_name}` was active; now `{left[0]}` is", stacklevel=2)
        self.active_adapters = left
        self._activate()

    # --- merging ---------------------------------------------------------------------------------

    @alone
    def merge_adapter(
        self,
        adapter_names: AdapterNames | None = None,
        safe_merge: bool = False,
        *,
        keep: bool = True,
    ) -> None:
        """Fold adapters (the active ones) into the base's weights; ``unmerge_adapter`` undoes it.

        Several merged one after the other are as if merged at once. With ``keep`` the original
        weights are held, and come back bit for bit; without, they are computed back, up to rounding,
        and a DoRA cannot be. ValueRefused for weights that come out NaN or infinite ("non-finite";
        ``safe_merge``, which asks PEFT for that, changes nothing), while the model trains, for merged
        adapters are not trained, and while the adapters are switched off.
        """
        if not self.enabled:
            raise ValueRefused(
                "the adapters are switched off, and a merge would let them compute",
                next="enable_adapter_layers() first",
                code="disabled",
            )
        if self.training:
            raise ValueRefused(
                "merged adapters are not trained, and the model is in training mode",
                next="eval() first; or merge_and_unload() for good",
                code="training",
            )
        names = self._chosen(adapter_names)
        if again := [name for name in names if name in self.merged_adapters]:
            warnings.warn(f"merged already: {', '.join(again)}", stacklevel=2)
        self._merge(names, keep)

    def _chosen(self, names: AdapterNames | None) -> list[str]:
        if names is None:
            if not self.active_adapters:
                raise ValueRefused(
                    "no adapter is active",
                    next="adapter_names=[…] names some; unload() takes all out",
                    code="none-active",
                )
            return list(self.active_adapters)
        return self._each(names)

    def _merge(self, names: Sequence[str], keep: bool) -> None:
        done = []
        try:
            for name, layer in self.layers():
                before = layer.merged
                with located(name):
                    layer.merge(names, keep=True)
                done.append((layer, before))
        except BaseException:
            for layer, before in done:
                layer.unmerge()
                layer.merge(before)
            raise
        for layer, _ in done if not keep else ():
            layer.forget()

    @alone
    def unmerge_adapter(self) -> None:
        """Take everything that is merged out of the base's weights again.

        InexactError for a DoRA that was merged without ``keep``; then nothing is changed.
        """
        if not self.merged_adapters:
            warnings.warn("nothing is merged", stacklevel=2)
        self._unmerge()

    def _unmerge(self) -> None:
        self._check_out()
        for _, layer in self.layers():
            layer.unmerge()

    def _check_out(self) -> None:
        """Raise InexactError where what is merged cannot be taken out."""
        for name, layer in self.layers():
            if layer.lasting:
                raise InexactError(
                    f"`{name}`: a DoRA cannot be taken out of a weight whose original was not kept",
                    next="merge_and_unload() leaves it there; merge_adapter(keep=True) keeps it",
                    code="no-inverse",
                )

    @alone
    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: AdapterNames | None = None,
    ) -> nn.Module:
        """Fold adapters (the active ones) into the base for good, and give it back as it was built.

        Dropouts are no part of it, in training mode either. A weight that other modules share is no
        longer shared afterwards, with a warning. ValueRefused "non-finite" where a weight would come
        out NaN or infinite, before any is changed, with ``safe_merge`` or without.
        """
        names = self._chosen(adapter_names)
        shared = tied(self.model)
        self._unload(names, progressbar)
        self._tell_untied(shared)
        return self.model

    @alone
    def unload(self) -> nn.Module:
        """Take all adapters out and give the base back, with its own keys and numbers."""
        self._unmerge()
        self._unload([], False)
        return self.model

    def _unload(self, names: Sequence[str], progressbar: bool) -> None:
        walk = Walk.of(self.model)
        holders: dict[int, AdaptedLayer | SavedModule] = {}
        for name, module in walk.modules.items():
            if isinstance(module, (AdaptedLayer, SavedModule)):
                holders[id(module)] = module
                if isinstance(module, AdaptedLayer):  # all before one is changed
                    with located(name):
                        module.check_merge(names)
        for holder in _progress(list(holders.values()), progressbar):
            if isinstance(holder, SavedModule):
                kept = [n for n in names if n in holder.modules_to_save]
                new = holder.modules_to_save[kept[0]] if kept else holder.original_module
            else:
                holder.merge(names, keep=False)
                new = holder.base_layer
            walk.put(holder, new)
        self.peft_config, self.active_adapters = {}, []

    def _tell_untied(self, shared: Mapping[int, list[str]]) -> None:
        after = dict(self.model.named_parameters(remove_duplicate=False))
        for names in shared.values():
            held = {id(after[name]) for name in names if name in after}
            if len(held) > 1:
                config = getattr(self.model, "config", None)
                if getattr(config, "tie_word_embeddings", False):
                    config.tie_word_embeddings = False  # type: ignore[union-attr]
                warnings.warn(f"no longer one tensor: {', '.join(names)}", stacklevel=4)


class LoraModel(AdaptedModel):
    """A model with LoRAs in it (arXiv 2106.09685); see AdaptedModel."""

    algorithm = "lora"


class LoHaModel(AdaptedModel):
    """A model with LoHas in it (arXiv 2108.06098); see AdaptedModel."""

    algorithm = "loha"


class LoKrModel(AdaptedModel):
    """A model with LoKrs in it (arXiv 2309.14859); see AdaptedModel."""

    algorithm = "lokr"


class HRAModel(AdaptedModel):
    """A model with Householder reflections in it (arXiv 2405.17484); see AdaptedModel."""

    algorithm = "hra"


@cache
def model_of(algorithm: str) -> type[AdaptedModel]:
    """The class of models with an algorithm in them: one of the above, or one made by its row."""
    for known in AdaptedModel.__subclasses__():
        if known.algorithm == algorithm:
            return known
    row = traits_of(algorithm)
    doc = f"A model with {row.title} in it; see AdaptedModel."
    named = {"algorithm": algorithm, "__doc__": doc, "__module__": __name__}
    return type(row.model, (AdaptedModel,), named)


def __getattr__(name: str) -> Any:
    for algorithm, row in TRAITS.items():
        if row.model == name:
            return model_of(algorithm)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def parameters_of(module: AdaptedLayer | SavedModule, adapter: str) -> Collection[Tensor]:
    """The parameters that an adapter has in a layer or a saved module."""
    if isinstance(module, AdaptedLayer):
        return module.tensors(adapter).values()
    return list(module.modules_to_save[adapter].parameters())


def _progress(items: list[Any], shown: bool) -> Iterable[Any]:
    if not shown:
        return items
    from tqdm import tqdm

    shown_items: Iterable[Any] = tqdm(items, desc="unloading", unit="layer")
    return shown_items
