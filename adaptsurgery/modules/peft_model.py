"""PeftModel and get_peft_model: an adapted model with its files, by the calls that PEFT's users know."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from adaptsurgery.adapters.report import Report
from adaptsurgery.core.config import AdapterConfig
from adaptsurgery.modules import files, status
from adaptsurgery.modules.alone import alone
from adaptsurgery.modules.injection import check_unadapted
from adaptsurgery.modules.layer import AdaptedLayer
from adaptsurgery.modules.model import AdaptedModel, model_of
from adaptsurgery.modules.undo import Before
from adaptsurgery.modules.walk import Walk
from adaptsurgery_formats.errors import ValueRefused
from adaptsurgery_formats.names.heads import ANSWER_HEADS, TASK_HEADS

AnyPath = str | os.PathLike[str]
# The heads that a task trains whole, as PEFT adds them to modules_to_save.
_HEADS = {
    "SEQ_CLS": TASK_HEADS,
    "TOKEN_CLS": TASK_HEADS,
    "QUESTION_ANS": ANSWER_HEADS,
}


class PeftModel(nn.Module):
    """A model with adapters, to train, save and load.

    ``base_model`` holds the adapters (LoraModel and its like), ``base_model.model`` is the model
    itself; attributes that are not found here are theirs. With ``mixed`` adapters of several
    algorithms stand side by side. Raises what ``AdaptedModel.add_adapter`` raises.
    """

    base_model: AdaptedModel

    def __init__(
        self,
        model: nn.Module,
        peft_config: AdapterConfig,
        adapter_name: str = "default",
        mixed: bool = False,
        low_cpu_mem_usage: bool = False,
        *,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__()
        algorithm = getattr(peft_config, "algorithm", "")
        kind = AdaptedModel if mixed or not algorithm else model_of(algorithm)
        config = _with_head(model, peft_config)
        self.base_model = kind(
            model, config, adapter_name, low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )  # fmt: skip
        self.training = model.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_model" not in self.__dict__.get("_modules", {}):
                raise
        return getattr(self.base_model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        """The model that the adapters are in."""
        return self.base_model.model

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: AdapterConfig,
        low_cpu_mem_usage: bool = False,
        *,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Put another adapter in, not active; see ``AdaptedModel.add_adapter``."""
        config = _with_head(self.get_base_model(), peft_config)
        self.base_model.add_adapter(
            adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype=autocast_adapter_dtype
        )

    # --- files -----------------------------------------------------------------------------------

    @alone
    def save_pretrained(
        self, save_directory: AnyPath, selected_adapters: Collection[str] | None = None
    ) -> None:
        """Write each adapter as PEFT does: "default" into the folder, others into one of their name."""
        chosen = (
            list(self.base_model.peft_config) if selected_adapters is None else selected_adapters
        )
        for name in chosen:
            self.base_model._known(name)
            folder = Path(save_directory)
            files.write_folder(
                self.base_model, name, folder if name == "default" else folder / name
            )

    @alone
    def save_adapter(
        self,
        path: AnyPath,
        layout: str,
        adapter_name: str | None = None,
        *,
        base: str | None = None,
        overwrite: bool = False,
    ) -> Report:
        """Write one adapter in any layout ("kohya", "lycoris", …), checked as a conversion is.

        ``base`` names what gives the layout its names ("sd15", a checkpoint); by default the model's
        own modules do. Raises what ``adaptsurgery.convert`` raises.
        """
        adapter = self.base_model._known(adapter_name or self.base_model.active_adapters[0])
        return files.write_layout(self.base_model, adapter, Path(path), layout, base, overwrite)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: AnyPath,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AdapterConfig | None = None,
        *,
        mixed: bool = False,
        base: str | None = None,
        ignore: Collection[str] = (),
        autocast_adapter_dtype: bool = True,
    ) -> PeftModel:
        """The model with an adapter from a folder of PEFT's, a file of any layout, or the Hub.

        A missing, unexpected or misshapen tensor is an error; ``ignore`` names keys, or patterns of
        keys, that may be missing (they get their initial values) or left over. Not trainable unless
        ``is_trainable``.
        """
        read, state = files.read_adapter(os.fspath(model_id), model, base)
        config = replace(config or read, inference_mode=not is_trainable)
        check_unadapted(model)
        before = Before(model)
        try:
            made = cls(
                model, config, adapter_name, mixed, low_cpu_mem_usage=not ignore,
                autocast_adapter_dtype=autocast_adapter_dtype,
            )  # fmt: skip
            files.set_tensors(
                made.base_model, adapter_name, state, ignore=ignore, where=os.fspath(model_id)
            )
            return made
        except BaseException:
            before.restore()
            raise

    @alone
    def load_adapter(
        self,
        model_id: AnyPath,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        base: str | None = None,
        ignore: Collection[str] = (),
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Put an adapter from a file beside the others, not active; see ``from_pretrained``."""
        config, state = files.read_adapter(os.fspath(model_id), self.get_base_model(), base)
        config = replace(config, inference_mode=not is_trainable)
        before = Before(self)
        try:
            self.add_adapter(
                adapter_name, config, low_cpu_mem_usage=not ignore,
                autocast_adapter_dtype=autocast_adapter_dtype,
            )  # fmt: skip
            files.set_tensors(
                self.base_model, adapter_name, state, ignore=ignore, where=os.fspath(model_id)
            )
        except BaseException:
            before.restore()
            raise

    @alone
    def hotswap_adapter(self, model_id: AnyPath, adapter_name: str = "default") -> None:
        """Put a file's numbers into an adapter's own tensors: nothing that holds them notices.

        A compiled model stays compiled unless the scales differ. The file's adapter has the same
        algorithm, modules and shapes; anything else is an error, and then nothing is changed.
        """
        adapter = self.base_model._known(adapter_name)
        config, state = files.read_adapter(os.fspath(model_id), self.get_base_model())
        held = self.base_model.peft_config[adapter]
        if config.algorithm != held.algorithm or adapter in self.base_model.merged_adapters:
            raise ValueRefused(
                f"a {config.algorithm} cannot take the place of `{adapter}`",
                where=os.fspath(model_id),
                seen=f"{held.algorithm}{', merged' if adapter in self.base_model.merged_adapters else ''}",
                next="load_adapter under another name; unmerge_adapter() what is merged",
                code="cannot-swap",
            )
        scales = self._new_scales(adapter, config, os.fspath(model_id))
        hint = (
            "load_adapter under another name, or bring it to the same rank by `adaptsurgery resize`"
        )
        taken = replace(config, inference_mode=held.inference_mode)
        before = Before(self)
        try:
            for layer, scale in scales:
                setting = layer.settings[adapter]
                layer.settings[adapter] = replace(
                    setting, scale=scale, options=config.options, config=config
                )
            self.base_model.peft_config[adapter] = taken
            files.set_tensors(self.base_model, adapter, state, where=os.fspath(model_id), hint=hint)
        except BaseException:
            before.restore()
            raise

    def _new_scales(
        self, adapter: str, config: AdapterConfig, where: str
    ) -> list[tuple[AdaptedLayer, float]]:
        """An adapter's layers, each with the scale that another config gives it."""
        scales = self.base_model.scales(config)
        held = [(n, x) for n, x in self.base_model.layers() if adapter in x.settings]
        layers = {id(layer): (layer, scales[name]) for name, layer in held if name in scales}
        if strange := [name for name, layer in held if id(layer) not in layers]:
            raise ValueRefused(
                f"the file's config does not target {len(strange)} of the modules of `{adapter}`",
                where=where,
                seen=", ".join(strange[:4]),
                next="load_adapter under another name",
                code="cannot-swap",
            )
        return list(layers.values())

    # --- what there is ---------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers are trainable, and how many there are."""
        return status.count(self)

    def print_trainable_parameters(self) -> None:
        """Print the two numbers and their ratio, in PEFT's words."""
        trained, total = self.get_nb_trainable_parameters()
        share = 100 * trained / total
        print(
            f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share:.4f}"
        )

    def get_layer_status(self) -> list[status.LayerStatus]:
        """The status of every adapted layer and saved module."""
        return status.layer_status(self.base_model)

    def get_model_status(self) -> status.ModelStatus:
        """The status of the whole model."""
        return status.model_status(self.base_model, type(self).__name__)

    @property
    def active_peft_config(self) -> AdapterConfig:
        """The first active adapter's config."""
        return self.base_model.peft_config[self.base_model.active_adapters[0]]


def get_peft_model(
    model: nn.Module,
    peft_config: AdapterConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    *,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """The model with a new adapter in it; the model itself is changed. See PeftModel."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if isinstance(peft_config, AdapterConfig) and peft_config.base_model_name_or_path is None:
        peft_config = replace(peft_config, base_model_name_or_path=name or None)
    check_unadapted(model)
    before = Before(model)
    try:
        return PeftModel(
            model, peft_config, adapter_name, mixed, low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )  # fmt: skip
    except BaseException:
        before.restore()
        raise


def _with_head(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """The config, with the model's head among its modules_to_save where its task trains one."""
    heads = _HEADS.get(getattr(config, "task_type", None) or "", ())
    if not heads:
        return config
    names = {name.rpartition(".")[2] for name in Walk.of(model).modules}
    saved = list(config.modules_to_save or [])
    more = [head for head in heads if head in names and head not in saved]
    return replace(config, modules_to_save=saved + more) if more else config
