"""From a path to a parsed adapter: the files, their layout, and the names of a base."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaptsurgery.checkpoint.base import Base
from adaptsurgery.checkpoint.hub import base_headers
from adaptsurgery.checkpoint.hub import resolve as resolve_path
from adaptsurgery.checkpoint.safetensors import read_safetensors
from adaptsurgery_formats import FORMATS, AdapterFile, AdapterState, Format, ModuleState
from adaptsurgery_formats.detect import detect
from adaptsurgery_formats.errors import (
    FileError,
    LayoutError,
    NameLookupError,
    ShapeError,
    ValueRefused,
    nearest,
)
from adaptsurgery_formats.names import TABLES, Names, names_of_base, table
from adaptsurgery_formats.resolve import require_resolved, resolve, resolve_by_tables
from adaptsurgery_formats.tensors import FLOAT_DTYPES, Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_CONFIG = 64 << 20


@dataclass
class Loaded:
    """An adapter as it was read: its state, the names it was looked up in, its base if any."""

    state: AdapterState
    path: Path
    names: Names | None = None
    base: Base | None = None


def load_state(
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    layout: str | None = None,
    look_up: bool = True,
) -> Loaded:
    """The adapter at a path or Hub name, with its modules found in ``base`` or a bundled table.

    ``base`` is a path, a Hub name, or one of the bundled tables' names; ``layout`` overrules
    detection. With ``look_up`` False flat names may stay flat, where no table knows them.
    Raises SurgeryError for whatever is wrong with the input.
    """
    where = resolve_path(os.fspath(path), kind="adapter")
    files = read_files(where)
    state = _parse(files, layout)
    _check_values(state)
    loaded = Loaded(state, where)
    if base is not None:
        loaded.names, loaded.base = names_of(base)
        loaded.state = resolve(state, loaded.names)
    elif any(m.naming in ("flat", "dotted") for m in state.modules):
        _look_up_in_tables(loaded, must=look_up)
    elif state.model in TABLES:
        loaded.names = table(state.model)
        loaded.state = resolve(state, loaded.names)
    elif state.layout == "diffusers":
        _look_up_in_tables(loaded, must=False)
    return loaded


def _look_up_in_tables(loaded: Loaded, must: bool) -> None:
    """Find the modules in a bundled table; dotted names can do without one, flat ones cannot."""
    flat = any(m.naming == "flat" for m in loaded.state.modules)
    try:
        loaded.names, loaded.state = resolve_by_tables(loaded.state)
    except NameLookupError:
        if must and flat:
            raise
        if not flat:
            modules = [replace(m, naming="base") for m in loaded.state.modules]
            loaded.state = replace(loaded.state, modules=modules)
    if must:
        require_resolved(loaded.state)


def names_of(base: str | os.PathLike[str]) -> tuple[Names, Base | None]:
    """The module names of a base: a bundled table by its name, or a checkpoint's own list."""
    spec = os.fspath(base)
    if spec in TABLES and not os.path.lexists(spec):
        return table(spec), None
    if "/" not in spec and not os.path.lexists(spec) and (hint := nearest(spec, TABLES)):
        raise FileError("there is no such base", where=spec, next=hint, code="no-such-file")
    found = base_headers(spec)
    return names_of_base(found.components, found.where), found


def read_files(path: Path) -> list[AdapterFile]:
    """The adapter files at a local path: one file, a PEFT folder, or a pipeline of PEFT folders."""
    if path.is_dir():
        return _read_folder(path)
    config = None
    if path.stem == "adapter_model" and (path.parent / CONFIG).is_file():
        config = read_config(path.parent / CONFIG)
    return [_read_file(path, config)]


def _read_folder(folder: Path) -> list[AdapterFile]:
    if (folder / CONFIG).is_file():
        return [_read_peft(folder, "")]
    parts = sorted(p.parent for p in folder.glob(f"*/{CONFIG}"))
    if parts:
        return [_read_peft(part, part.name) for part in parts]
    alone = sorted(folder.glob("*.safetensors"))
    if len(alone) == 1:
        return [_read_file(alone[0], None)]
    raise FileError(
        "this folder is no adapter",
        where=str(folder),
        seen=", ".join(p.name for p in alone[:5]) or "no safetensors files",
        next=f"a PEFT folder holds {CONFIG}; name the file if there are several",
        code="no-adapter",
    )


def _read_peft(folder: Path, component: str) -> AdapterFile:
    config = read_config(folder / CONFIG)
    found = [p for p in (folder / WEIGHTS, folder / "adapter_model.bin") if p.is_file()]
    if not found:
        raise FileError(f"there is no {WEIGHTS} in it", where=str(folder), code="no-such-file")
    file = _read_file(found[0], config)
    file.component = component
    return file


def _read_file(path: Path, config: dict[str, Any] | None) -> AdapterFile:
    if path.suffix in _PICKLES:
        from adaptsurgery.checkpoint.pickles import read_pickle

        return AdapterFile(read_pickle(path), {}, config, where=str(path))
    read = read_safetensors(path)
    return AdapterFile(read.tensors, read.metadata, config, where=str(path))


def read_config(path: Path) -> dict[str, Any]:
    """An adapter_config.json as an object; raises FileError for anything else."""
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise FileError("it is too large for a config", where=str(path), code="bad-config")
        found = json.loads(path.read_text("utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise FileError(f"it cannot be read: {error.strerror}", where=str(path)) from None
    except (ValueError, RecursionError) as error:
        raise FileError(f"it is not JSON: {error}", where=str(path), code="bad-config") from None
    if not isinstance(found, dict):
        raise FileError("it is not a JSON object", where=str(path), code="bad-config")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _parse(files: list[AdapterFile], layout: str | None) -> AdapterState:
    formats = {detect(f.tensors, f.where).name for f in files} if layout is None else {layout}
    if len(formats) > 1:
        raise LayoutError(
            f"the folder's files are in different layouts: {', '.join(sorted(formats))}",
            where=files[0].where,
            code="mixed-layouts",
        )
    chosen = format_named(formats.pop())
    if len(files) > 1 and chosen.name != "peft":
        raise LayoutError(f"{chosen.title} is one file, not {len(files)}", where=files[0].where)
    return chosen.parse(files)


def format_named(name: str) -> Format:
    """The format of a name; raises LayoutError with the nearest one."""
    if name not in FORMATS:
        raise LayoutError(
            f"there is no layout `{name}`",
            next=nearest(name, FORMATS) or "layouts: " + ", ".join(FORMATS),
            code="unknown-layout",
        )
    return FORMATS[name]


def _check_values(state: AdapterState) -> None:
    """Refuse what no adapter tensor may be: other dtypes than floats, and empty tensors."""
    for module in state.modules:
        for slot, tensor in module.tensors.items():
            _check_tensor(tensor, _key_of(module, slot), state.where)
    for tensors in state.saved.values():
        for key, tensor in tensors.items():
            _check_tensor(tensor, key, state.where)


def _check_tensor(tensor: Tensor, key: str, where: str) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueRefused(
            f"`{key}` is {tensor.dtype}",
            where=where,
            next=f"adapters are {', '.join(FLOAT_DTYPES)}; dequantise it first",
            code="bad-dtype",
        )
    if tensor.numel == 0:
        raise ShapeError(f"`{key}` has no elements", where=where, seen=str(list(tensor.shape)))


def _key_of(module: ModuleState, slot: str) -> str:
    """The file's key of a slot, or the module's own name for it."""
    endings: Iterable[str] = (k for k in module.keys if slot in k.rpartition(".")[2] or slot in k)
    return next(iter(endings), f"{module.label}.{slot}")
