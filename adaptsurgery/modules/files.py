"""Adapters of a live model in files: PEFT's folder directly, other layouts through the format layer.

base_model.model.<path>.lora_A.weight        a layer's tensors, without the adapter's name
base_model.model.<path>.weight               modules_to_save
base_model.model.<path>.base_layer.bias      biases that are trained beside it
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from adaptsurgery.adapters.adapter import load, parts, shapes_of
from adaptsurgery.adapters.report import Report
from adaptsurgery.checkpoint import system
from adaptsurgery.checkpoint.atomic import output
from adaptsurgery.checkpoint.bridge import from_torch, to_torch
from adaptsurgery.checkpoint.hub import resolve
from adaptsurgery.checkpoint.pickles import read_pickle
from adaptsurgery.checkpoint.safetensors import read_safetensors
from adaptsurgery.checkpoint.watched import unchanged
from adaptsurgery.checkpoint.writer import write_safetensors
from adaptsurgery.core.config import FILE, AdapterConfig
from adaptsurgery.core.update import is_finite
from adaptsurgery.modules import slots
from adaptsurgery.modules.layer import AdaptedLayer
from adaptsurgery.modules.model import AdaptedModel
from adaptsurgery_formats import Tensor as LazyTensor
from adaptsurgery_formats.errors import (
    FileError,
    InexactError,
    KeyRefused,
    ShapeError,
    SurgeryError,
    ValueRefused,
)
from adaptsurgery_formats.peft import PREFIX, SUFFIXES
from adaptsurgery_formats.tensors import Tensor as FileTensor

WEIGHTS = "adapter_model.safetensors"
_IN_FILES = {"lora_magnitude_vector.weight": "lora_magnitude_vector"}


def peft_tensors(model: AdaptedModel, adapter: str) -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's keys for files."""
    state: dict[str, Tensor] = {}
    layers = [(name, layer) for name, layer in model.layers() if adapter in layer.settings]
    for name, layer in layers:
        for suffix, tensor in layer.tensors(adapter).items():
            state.setdefault(f"{PREFIX}{name}.{_IN_FILES.get(suffix, suffix)}", tensor.detach())
    for name, module in model.saved_modules():
        if adapter in module.modules_to_save:
            held = module.tensors(adapter)
            state |= {f"{PREFIX}{name}.{key}": tensor for key, tensor in held.items()}
    for name, bias in _biases(model, adapter, layers):
        state.setdefault(f"{PREFIX}{name}", bias.detach())
    return _once(state)


def _biases(
    model: AdaptedModel, adapter: str, layers: Iterable[tuple[str, AdaptedLayer]]
) -> Iterator[tuple[str, Tensor]]:
    setting = getattr(model.peft_config[adapter], "bias", "none")
    if setting == "all":
        for name, parameter in model.model.named_parameters():
            if name.rpartition(".")[2] == "bias" and ".modules_to_save." not in f".{name}":
                yield name.replace(".original_module.", "."), parameter
    elif setting != "none":
        for name, layer in layers:
            if isinstance(bias := getattr(layer.base_layer, "bias", None), Tensor):
                yield f"{name}.base_layer.bias", bias


def _once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor once: a module under two names is saved under the first."""
    seen: dict[tuple[int, torch.Size], str] = {}
    kept = {}
    for key, tensor in state.items():
        mark = (tensor.data_ptr(), tensor.shape)
        if tensor.is_meta or not tensor.numel() or seen.setdefault(mark, key) == key:
            kept[key] = tensor
    return kept


def write_folder(model: AdaptedModel, adapter: str, folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json in a folder; other files there stay.

    Raises ValueRefused for numbers that are not finite or on the meta device, FileError.
    """
    tensors = {key: from_torch(t.contiguous()) for key, t in peft_tensors(model, adapter).items()}
    config = replace(model.peft_config[adapter], inference_mode=True).to_dict()
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _write_both(folder, tensors, json.dumps(config, indent=2, sort_keys=True))
    except BaseException:
        with suppress(OSError):  # another has put something there
            for path in new:
                path.rmdir()
        raise


def _write_both(folder: Path, tensors: Mapping[str, FileTensor], text: str) -> None:
    """Weights and config, both new or, after an error or an interrupt, both as they were."""
    weights, config = folder / WEIGHTS, folder / FILE
    old = system.read_file(config) if config.is_file() else None
    was = _file_number(weights)
    try:
        with output(weights, overwrite=True) as path:
            write_safetensors(path, tensors, {"format": "pt"})
            with output(config, overwrite=True) as beside:
                system.write_text(beside, text)
    except BaseException:
        if _file_number(weights) == was:
            _put_back(config, old)
        raise


def _put_back(config: Path, old: bytes | None) -> None:
    """A config as it was before another was put in its place."""
    if old is None:
        config.unlink(missing_ok=True)
    elif system.read_file(config) != old:
        with output(config, overwrite=True) as path, system.new_file(path) as file:
            file.write(old)


def _file_number(path: Path) -> int | None:
    """What tells a file from the one that had its name before."""
    return path.stat().st_ino if path.exists() else None


def write_layout(
    model: AdaptedModel, adapter: str, path: Path, layout: str, base: str | None, overwrite: bool
) -> Report:
    """The adapter in another layout, checked as every conversion is."""
    with tempfile.TemporaryDirectory() as folder:
        write_folder(model, adapter, Path(folder))
        held = load(folder, base=base or shapes_of(model.model))
        return held.save(path, layout, overwrite=overwrite)


def read_adapter(
    path: str | Path, model: nn.Module, base: str | None = None
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The config and the tensors of an adapter of any layout, under PEFT's keys.

    A flat name is looked up in ``base``, by default in the live model's own modules.
    """
    place = resolve(str(path), kind="adapter")
    if place.is_dir() and (place / FILE).is_file():
        return _read_folder(place, model)
    _check_one_model(place)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "peft"
        load(place, base=base or shapes_of(model)).save(made, "peft")
        return _read_folder(made, model)


def _read_folder(folder: Path, model: nn.Module) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """A PEFT folder, its modules those of the model where its family has other names for them."""
    config, tensors = AdapterConfig.from_pretrained(folder), _tensors(folder)
    known = {name for name, _ in model.named_modules()}
    if all(_module_of(key) in known for key in tensors if _suffix(key)):
        return config, tensors
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / "peft"
        try:
            load(folder).on(shapes_of(model)).save(made, "peft")
        except InexactError:
            raise  # parts of a fused layer that are no change of the whole
        except SurgeryError:
            return config, tensors  # of another model, in part: loading says which keys
        return AdapterConfig.from_pretrained(made), _tensors(made)


def _module_of(key: str) -> str:
    """The path of the module that a key of PEFT's is for."""
    return key.removeprefix(PREFIX).removesuffix(f".{_suffix(key)}")


def _suffix(key: str) -> str:
    """The end of an adapter's key that says which of its tensors it is; "" for any other key."""
    return next((s for s in SUFFIXES if key.endswith(f".{s}")), "")


def _check_one_model(place: Path) -> None:
    """Raise FileError for the adapters of a pipeline's several models."""
    counts = parts(place)
    if len(counts) < 2:
        return
    folders = f"adaptsurgery convert {place} -o PARTS --to peft"
    raise FileError(
        "this adapts several models, and a live model is one of them",
        where=str(place),
        seen=", ".join(f"{part}: {count} modules" for part, count in sorted(counts.items())),
        next="load the folder of the model's part"
        if place.is_dir()
        else f"`{folders}` makes a folder of each part (--base names a model of no bundled "
        "table): load the model's",
        code="several-components",
    )


def _tensors(folder: Path) -> dict[str, Tensor]:
    with unchanged():
        return {key: to_torch(tensor) for key, tensor in _read(folder).items()}


def _read(folder: Path) -> Mapping[str, LazyTensor]:
    if system.is_there(folder / WEIGHTS):
        return read_safetensors(folder / WEIGHTS).tensors
    if system.is_there(folder / "adapter_model.bin"):
        return read_pickle(folder / "adapter_model.bin")
    raise FileError(f"there is no {WEIGHTS} in it", where=str(folder), code="no-such-file")


def set_tensors(
    model: AdaptedModel,
    adapter: str,
    state: Mapping[str, Tensor],
    *,
    ignore: Collection[str] = (),
    where: str = "",
    hint: str = "take the adapter_config.json that the file was saved with",
) -> None:
    """Give an adapter the numbers of a file, keys by keys; all are checked before one is changed.

    ``ignore`` holds keys, or patterns of keys, that may be missing or left over; ``hint`` is said
    where shapes differ. Raises KeyRefused ("missing-keys", "unexpected-keys"), ShapeError,
    ValueRefused ("non-finite").
    """
    homes = _homes(model, adapter)
    given = {_in_model(key): tensor for key, tensor in state.items()}
    needed = {key for key, (_, must) in homes.items() if must}
    missing = _unexcused(needed - given.keys(), ignore)
    unexpected = _unexcused(given.keys() - homes.keys(), ignore)
    for keys, trouble, code in (
        (missing, "are missing", "missing-keys"),
        (unexpected, "belong to no tensor of the adapter", "unexpected-keys"),
    ):
        if keys:
            raise KeyRefused(
                f"{len(keys)} of {len(given)} keys {trouble}",
                where=where,
                items=keys[:20],
                next="ignore=[…] names keys, or patterns of them, that may be",
                code=code,
            )
    wrong = {
        key: f"{key}: {list(given[key].shape)}, in the model {list(homes[key][0].shape)}"
        for key in given.keys() & homes.keys()
        if given[key].shape != homes[key][0].shape
    }
    if wrong:
        raise ShapeError(
            f"{len(wrong)} tensors do not fit", where=where, items=sorted(wrong.values())[:20],
            next=_of_groups(model, adapter, wrong) or hint,
        )  # fmt: skip
    if bad := sorted(key for key in given.keys() & homes.keys() if not is_finite(given[key])):
        raise ValueRefused(
            f"{len(bad)} tensors hold numbers that are not finite",
            where=where,
            items=bad[:20],
            next="the file is damaged, or its training diverged: take an earlier one",
            code="non-finite",
        )
    _set_all([(homes[key][0], given[key]) for key in given.keys() & homes.keys()])


def _set_all(numbers: Sequence[tuple[_Home, Tensor]]) -> None:
    """Every tensor into its place; where that is cut short, none."""
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for home, tensor in numbers:
            if not home.held.is_meta:
                before.append((home.held, home.held.detach().clone()))
            home.set(tensor)
    except BaseException:
        with torch.no_grad():
            for held, old in before:
                held.copy_(old)
        raise


def _of_groups(model: AdaptedModel, adapter: str, keys: Iterable[str]) -> str:
    """Why PEFT's LoRA of a convolution in groups does not fit, where one is among the keys."""
    for name, layer in model.layers():
        if layer.geometry["groups"] > 1 and adapter in layer.settings:
            if any(key.startswith(f"{PREFIX}{name}.lora_") for key in keys):
                return (
                    f"`{name}` is in groups, and PEFT's LoRA lets each of them see all inputs there, "
                    "which no ΔW of its weight does: exclude it, or train it here"
                )
    return ""


class _Home:
    """Where a tensor lives in the model."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    @property
    def held(self) -> Tensor:
        held = self.module._parameters.get(self.name)
        tensor = self.module._buffers[self.name] if held is None else held
        assert tensor is not None
        return tensor

    @property
    def shape(self) -> torch.Size:
        return self.held.shape

    def set(self, tensor: Tensor) -> None:
        """Into the tensor itself; one without numbers is replaced."""
        held = self.held
        if not held.is_meta:
            with torch.no_grad():
                held.copy_(tensor)
        elif self.name in self.module._parameters:
            new = nn.Parameter(tensor.to(held.dtype), held.requires_grad)
            self.module._parameters[self.name] = new
        else:
            self.module._buffers[self.name] = tensor.to(held.dtype)


def _homes(model: AdaptedModel, adapter: str) -> dict[str, tuple[_Home, bool]]:
    """Every key that a file of the adapter may have → its tensor's place, and whether it must."""
    homes: dict[str, tuple[_Home, bool]] = {}
    seen: set[int] = set()
    biases = getattr(model.peft_config[adapter], "bias", "none")
    for name, layer in model.layers():
        if adapter in layer.settings:
            for suffix in layer.settings[adapter].suffixes.values():
                home = _Home(*slots.place(layer, suffix, adapter))
                homes[f"{PREFIX}{name}.{suffix}"] = (home, id(layer) not in seen)
            seen.add(id(layer))
    for name, wrapper in model.saved_modules():
        if adapter in wrapper.modules_to_save:
            copy = wrapper.modules_to_save[adapter]
            for inner, module in copy.named_modules():
                buffers = module._buffers.keys() - module._non_persistent_buffers_set
                for leaf in (*module._parameters, *buffers):
                    if getattr(module, leaf) is not None:
                        path = f"{inner}.{leaf}" if inner else leaf
                        homes[f"{PREFIX}{name}.{path}"] = (_Home(module, leaf), True)
                        if leaf == "bias" and biases == "all":  # which PEFT then writes again
                            twin = f"{PREFIX}{name}.modules_to_save.{path}"
                            homes[twin] = (_Home(module, leaf), False)
    for name, module, leaf in _beside(model, adapter):
        homes.setdefault(f"{PREFIX}{name}.{leaf}", (_Home(module, leaf), False))
    return homes


def _beside(model: AdaptedModel, adapter: str) -> Iterator[tuple[str, nn.Module, str]]:
    """What a file may have of the base: biases where they are trained, embeddings (PEFT's habit)."""
    biases = getattr(model.peft_config[adapter], "bias", "none") != "none"
    ask = getattr(model.model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    head = getattr(head, "base_layer", head)
    for full, module in model.model.named_modules():
        name = full.removesuffix(".original_module")
        if biases and module._parameters.get("bias") is not None:
            yield from ((n, module, "bias") for n in {full, name})
        if isinstance(module, nn.Embedding) or (head is not None and module is head):
            yield name, module, "weight"


def _in_model(key: str) -> str:
    suffix = "lora_magnitude_vector"
    return f"{key}.weight" if key.endswith(suffix) else key


def _unexcused(keys: Iterable[str], ignore: Collection[str]) -> list[str]:
    return sorted(key for key in keys if not any(fnmatchcase(key, mark) for mark in ignore))
