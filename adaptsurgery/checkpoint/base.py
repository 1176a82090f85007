"""The model that an adapter is for: its files, components and modules, from headers alone.

What may be named::

    model.safetensors                                  one plain file        → component ""
    sd_xl_base_1.0.safetensors                         a whole pipeline in LDM's prefixes
    folder/model.safetensors.index.json + shards       sharded (or the index itself)
    folder/config.json + model.safetensors             transformers
    folder/model_index.json + unet/, text_encoder/, …  a diffusers pipeline
    folder/diffusion_pytorch_model.safetensors         one diffusers model

Torch pickles are read where there is no safetensors file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptsurgery.checkpoint import system
from adaptsurgery.checkpoint.failures import as_file_error, missing_file
from adaptsurgery.checkpoint.safetensors import read_safetensors
from adaptsurgery_formats.errors import FileError, NameLookupError, nearest
from adaptsurgery_formats.paths import check_name
from adaptsurgery_formats.reading import MAX_JSON, JsonObject, json_object, typed
from adaptsurgery_formats.tensors import Tensor

UNTRUSTED = "do not trust this model; its index was tampered with"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# The weights' names within a folder, best first; each may have an .index.json instead.
STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# model.diffusion_model.input_blocks.0.0.weight, conditioner.embedders.0.transformer.text_model.…
_PREFIXES = (
    ("model.diffusion_model.", "denoiser"),
    ("diffusion_model.", "denoiser"),
    ("cond_stage_model.transformer.", "text_encoder"),
    ("cond_stage_model.model.", "text_encoder"),
    ("conditioner.embedders.0.transformer.", "text_encoder"),
    ("conditioner.embedders.0.model.", "text_encoder_2"),  # SDXL's refiner has only this one
    ("conditioner.embedders.1.model.", "text_encoder_2"),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("text_encoders.t5xxl.transformer.", "t5"),
    ("first_stage_model.", "vae"),
    ("vae.", "vae"),
)
# lora_unet_….lora_down.weight, base_model.model.….lora_A.weight, ….hada_w1_a, ….lokr_w2, ….hra_u
_ADAPTER_KEY = re.compile(
    r"(^|[._])(lora_(down|up|mid|A|B|embedding_A)|hada_w\d_[ab]|lokr_w\d(_[ab])?|hra_u)(\.|$)"
)


@dataclass(frozen=True)
class Located:
    """One parameter: the file it is in, its full key there, and the tensor (None: names only)."""

    file: int
    key: str
    shape: tuple[int, ...]
    dtype: str
    tensor: Tensor | None


@dataclass(frozen=True)
class BaseFile:
    """One weight file: its path below ``Base.where``, its tensors in order, its metadata."""

    name: str
    component: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Base:
    """A base model by its headers.

    ``parameters``: component → parameter name without the component's prefix → where it lies.
    ``files`` in a stable order, shards as their index names them; ``indexes`` the index files;
    ``configs`` each component's config.json. ``folder`` is None for a single file, and ``local`` is
    False where only names and shapes are known (see ``hub.base_headers``).
    """

    where: str
    files: tuple[BaseFile, ...]
    parameters: Mapping[str, Mapping[str, Located]]
    indexes: tuple[str, ...] = ()
    folder: Path | None = None
    local: bool = True
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def inputs(self) -> list[Path]:
        """Its files, and the folder that they lie in where that was named."""
        if self.folder is None:
            return [Path(self.where)]
        return [self.folder, *(self.folder / file.name for file in self.files)]

    @property
    def components(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Component → module path → the shape of its weight."""
        return {
            component: {
                name.removesuffix(".weight"): at.shape
                for name, at in parameters.items()
                if name.endswith(".weight")
            }
            for component, parameters in self.parameters.items()
        }

    @property
    def kinds(self) -> dict[str, str]:
        """Component → the model class its config names, where it names one."""
        classes = {c: _class_of(config) for c, config in self.configs.items()}
        return {c: kind for c, kind in classes.items() if kind}

    def find(self, component: str, name: str) -> Located:
        """Where a parameter lies; raises NameLookupError with the nearest names if nowhere."""
        parameters = self.parameters.get(component)
        if parameters is None:
            raise NameLookupError(
                f"the base has no component `{component}`",
                where=self.where,
                seen=", ".join(f"`{c}`" for c in self.parameters),
                code="unknown-component",
            )
        if name not in parameters:
            raise NameLookupError(
                f"the base has no `{name}`", where=self.where, next=nearest(name, parameters)
            )
        return parameters[name]

    def parameter(self, component: str, name: str) -> Tensor:
        """A parameter by its full name; raises NameLookupError, or FileError ``names-only``."""
        at = self.find(component, name)
        if at.tensor is None:
            raise FileError(
                "only the names of this base were read, not its weights",
                where=self.where,
                next="pass a local base, or download it first: hf download " + self.where,
                code="names-only",
            )
        return at.tensor

    def weight(self, component: str, module_path: str) -> Tensor:
        """A module's weight, lazily; raises as ``parameter`` does."""
        return self.parameter(component, f"{module_path}.weight" if module_path else "weight")

    def bias(self, component: str, module_path: str) -> Tensor | None:
        """A module's bias, or None where it has none."""
        name = f"{module_path}.bias" if module_path else "bias"
        return (
            self.parameter(component, name) if name in self.parameters.get(component, {}) else None
        )


def read_base(path: str | os.PathLike[str]) -> Base:
    """The base model at a local path.

    Raises FileError: ``no-such-file``, ``no-weights``, ``adapter-as-base``, ``bad-index``,
    ``path-escapes``, ``missing-shard``, ``index-mismatch``, ``ambiguous-weights``,
    ``duplicate-key``, and what the safetensors reader raises.
    """
    where = Path(path)
    if where.is_dir():
        return _read_folder(where)
    if not where.exists():
        raise missing_file(where)
    if where.name.endswith(".index.json"):
        files = _read_index(where, where.parent, "")
        return assemble(str(where), files, indexes=(where.name,), folder=where.parent)
    return assemble(str(where), [_read_weights(where, where.parent, "")])


def assemble(
    where: str,
    files: list[BaseFile],
    *,
    indexes: tuple[str, ...] = (),
    folder: Path | None = None,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
    local: bool = True,
) -> Base:
    """A Base of files whose headers are read; refuses adapters and names that come twice."""
    parameters: dict[str, dict[str, Located]] = {}
    for number, file in enumerate(files):
        _refuse_adapter(file.tensors, f"{where}/{file.name}" if folder else where)
        for component, name, key in _named(file):
            t = file.tensors[key]
            known = parameters.setdefault(component, {})
            if name in known:
                raise FileError(
                    f"`{key}` is in two files",
                    where=where,
                    seen=f"{files[known[name].file].name} and {file.name}",
                    code="duplicate-key",
                )
            known[name] = Located(number, key, t.shape, t.dtype, t if local else None)
    if not any(parameters.values()):
        raise FileError("the base holds no weights", where=where, code="no-weights")
    return Base(where, tuple(files), parameters, indexes, folder, local, configs or {})


# -- Folders ---------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> Base:
    if (folder / "model_index.json").exists():
        return _read_pipeline(folder)
    for name in _ADAPTER_FILES:
        if (folder / name).exists():
            raise _adapter_error(str(folder), name)
    files, indexes = _read_model(folder, folder, "")
    configs = {"": config} if (config := _config(folder)) else {}
    return assemble(str(folder), files, indexes=indexes, folder=folder, configs=configs)


def _read_pipeline(folder: Path) -> Base:
    """A diffusers pipeline: the folders that model_index.json names and that hold weights."""
    index = read_json(folder / "model_index.json")
    files: list[BaseFile] = []
    indexes: list[str] = []
    configs: dict[str, Mapping[str, Any]] = {}
    for component, value in index.items():
        if component.startswith("_") or not isinstance(value, list):
            continue
        check_name(component, str(folder / "model_index.json"), UNTRUSTED)
        place = folder / component
        if not place.is_dir() or not find_weights(os.listdir(place)):
            continue
        weights, named = _read_model(place, folder, component)
        files += weights
        indexes += named
        if config := _config(place):
            configs[component] = config
    if not files:
        raise _no_weights(folder)
    return assemble(str(folder), files, indexes=tuple(indexes), folder=folder, configs=configs)


def _read_model(place: Path, root: Path, component: str) -> tuple[list[BaseFile], tuple[str, ...]]:
    """The files of one model folder, and its index if it is sharded."""
    name = find_weights(os.listdir(place), str(place))
    if not name:
        raise _no_weights(place)
    if name.endswith(".index.json"):
        index = place / name
        return _read_index(index, root, component), (index.relative_to(root).as_posix(),)
    return [_read_weights(place / name, root, component)], ()


def find_weights(names: Iterable[str], where: str = "") -> str:
    """The weight file or the index to read among a folder's file names; "" where there is none.

    Safetensors before pickles, no variant before a variant (model.fp16.safetensors), a whole file
    before an index. Raises FileError ``ambiguous-weights`` where nothing tells, ``missing-index``
    for shards alone.
    """
    present = set(names)
    for ending in (".safetensors", ".bin"):
        for stem in STEMS:
            for name in (f"{stem}{ending}", f"{stem}{ending}.index.json"):
                if name in present:
                    return name
        variants = sorted(n for n in present if _is_variant(n, ending))
        for wanted in ([n for n in variants if ".fp16" in n], variants):
            if wanted:
                return wanted[0]
        if other := _any_other(present, ending, where):
            return other
    return ""


# diffusion_pytorch_model.fp16.safetensors, model.safetensors.index.fp16.json
_VARIANT = re.compile(rf"({'|'.join(STEMS)})(\.\w+)(\.safetensors|\.bin)")
_VARIANT_INDEX = re.compile(rf"({'|'.join(STEMS)})(\.safetensors|\.bin)\.index\.\w+\.json")


def _is_variant(name: str, ending: str) -> bool:
    return ending in name and bool(_VARIANT.fullmatch(name) or _VARIANT_INDEX.fullmatch(name))


# model-00001-of-00002.safetensors
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\.safetensors|\.bin)")


def _any_other(present: set[str], ending: str, where: str) -> str:
    """The one index, or the one weight file, of whatever name."""
    for group in (f"{ending}.index.json", ending):
        names = sorted(n for n in present if n.endswith(group) and not _is_training_state(n))
        shards = [s for s in map(_SHARD.fullmatch, names) if s and int(s[3]) > 1]
        if shards and len(shards) == len(names):
            raise FileError(
                "the folder holds shards, and no index that says what is in them",
                where=where,
                seen=", ".join(names[:5]),
                next=f"put `{shards[0][1]}{ending}.index.json` beside them: it comes from where they "
                "do, or save_pretrained writes shards and index anew",
                code="missing-index",
            )
        if len(names) > 1:
            raise FileError(
                "the folder holds several models",
                where=where,
                seen=", ".join(names[:5]),
                next="name the file itself",
                code="ambiguous-weights",
            )
        if names:
            return names[0]
    return ""


def _is_training_state(name: str) -> bool:
    """training_args.bin, optimizer.bin, scheduler.bin, random_states_0.bin: no model."""
    return name.startswith(
        ("training_args", "optimizer", "scheduler", "random_states", "rng_state")
    )


def _config(place: Path) -> Mapping[str, Any]:
    return read_json(place / "config.json") if system.is_there(place / "config.json") else {}


def _class_of(config: Mapping[str, Any]) -> str:
    """The model class that a config names; "" for whatever else it says."""
    classes = config.get("architectures")
    first = classes[0] if isinstance(classes, list) and classes else ""
    named = config.get("_class_name") or first
    return named if isinstance(named, str) else ""


# -- Files -----------------------------------------------------------------------------------------


def _read_weights(path: Path, root: Path, component: str) -> BaseFile:
    name = path.relative_to(root).as_posix()
    if path.suffix in PICKLES:
        from adaptsurgery.checkpoint.pickles import read_pickle

        return BaseFile(name, component, read_pickle(path), {})
    file = read_safetensors(path)
    return BaseFile(name, component, file.tensors, file.metadata)


def _read_index(index: Path, root: Path, component: str) -> list[BaseFile]:
    """All shards of an index, checked against it key by key."""
    shards = parse_index(read_json(index), index)
    files: list[BaseFile] = []
    for name, keys in shards.items():
        shard = index.parent / name
        if not shard.exists():
            raise FileError(
                f"the shard `{name}` is missing",
                where=str(index),
                seen=f"{len(keys)} tensors should be in it",
                next="download the whole model again",
                code="missing-shard",
            )
        file = _read_weights(shard, root, component)
        _check_shard(file, keys, index)
        files.append(file)
    return files


def parse_index(index: Mapping[str, Any], where: Path) -> dict[str, set[str]]:
    """Shard name → the keys it should hold; raises FileError ``bad-index``, ``path-escapes``."""
    if index.get("metadata"):
        typed(index, "metadata", dict, str(where))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError("the index has no weight_map", where=str(where), code="bad-index")
    shards: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise FileError(
                f"the index names no file for `{key}`",
                where=str(where),
                seen=repr(name)[:80],
                code="bad-index",
            )
        if name not in shards:
            check_name(name, str(where), UNTRUSTED)
        shards.setdefault(name, set()).add(key)
    return dict(sorted(shards.items()))


def _check_shard(file: BaseFile, keys: set[str], index: Path) -> None:
    missing, extra = keys - file.tensors.keys(), file.tensors.keys() - keys
    if missing or extra:
        seen = [f"not in the shard: {_some(missing)}"] if missing else []
        seen += [f"not in the index: {_some(extra)}"] if extra else []
        raise FileError(
            f"the shard `{file.name}` does not hold what the index says",
            where=str(index),
            seen="; ".join(seen),
            next="shards and index come from different versions; download all of them again",
            code="index-mismatch",
        )


def _some(names: set[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(f"`{n}`" for n in sorted(names)[:count]) + more


def read_json(path: Path) -> JsonObject:
    """A JSON object from a file; raises FileError ``bad-json``, ``absurd-size``, ``not-a-file``."""
    try:
        return json_object(system.read_file(path, MAX_JSON), str(path))
    except OSError as error:
        raise as_file_error(error, path, writing=False) from error


# -- Names -----------------------------------------------------------------------------------------


def _named(file: BaseFile) -> Iterable[tuple[str, str, str]]:
    """(component, name, key) of each tensor; what a single-file pipeline keeps beside its models
    (model_ema.*, alphas_cumprod) belongs to none."""
    if file.component or not any(_prefix(k)[1] == "denoiser" for k in file.tensors):
        return [(file.component, key, key) for key in file.tensors]
    names = _single_file_names(file.tensors)
    return [
        (names[part], key[len(prefix) :], key)
        for key in file.tensors
        for prefix, part in [_prefix(key)]
        if prefix
    ]


def _prefix(key: str) -> tuple[str, str]:
    for prefix, part in _PREFIXES:
        if key.startswith(prefix):
            return prefix, part
    return "", ""


def _single_file_names(keys: Iterable[str]) -> dict[str, str]:
    """The component that each part of a single-file pipeline is: what its own blocks tell."""
    keys = list(keys)
    unet = any(".input_blocks." in k or ".down_blocks." in k for k in keys)
    clip_g = any(k.startswith("text_encoders.clip_g.") for k in keys)
    return {
        "denoiser": "unet" if unet else "transformer",
        "text_encoder": "text_encoder",
        "text_encoder_2": "text_encoder_2",
        "t5": "text_encoder_3" if clip_g else "text_encoder_2",
        "vae": "vae",
    }


def _refuse_adapter(tensors: Iterable[str], where: str) -> None:
    adapter_key = next((key for key in tensors if _ADAPTER_KEY.search(key)), None)
    if adapter_key:
        raise _adapter_error(where, adapter_key)


def _adapter_error(where: str, seen: str) -> FileError:
    return FileError(
        "this is an adapter, not a base model",
        where=where,
        seen=f"`{seen}`",
        next="pass the model that the adapter was trained on",
        code="adapter-as-base",
    )


def _no_weights(folder: Path) -> FileError:
    names = sorted(os.listdir(folder))
    return FileError(
        "the folder holds no model weights",
        where=str(folder),
        seen=", ".join(names[:8]) or "an empty folder",
        next="a .safetensors file, an index with its shards, or a diffusers pipeline is needed",
        code="no-weights",
    )
