"""From a path to a parsed adapter: the files, their layout, and the names of a base."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptsurgery.checkpoint import system
from adaptsurgery.checkpoint.safetensors import read_safetensors
from adaptsurgery.checkpoint.watched import Watched, watching
from adaptsurgery.core.strength import is_lost
from adaptsurgery_formats import FORMATS, AdapterFile, AdapterState, Format, ModuleState
from adaptsurgery_formats.detect import detect
from adaptsurgery_formats.errors import (
    FileError,
    LayoutError,
    NameLookupError,
    ShapeError,
    SurgeryError,
    ValueRefused,
    nearest,
)
from adaptsurgery_formats.files import META_OURS, META_PREFIX
from adaptsurgery_formats.names import TABLES, Names, names_of_base, names_of_modules, table
from adaptsurgery_formats.peft_config import MAX_CONFIG, parsed_config
from adaptsurgery_formats.resolve import (
    find_modules,
    refuse_twice,
    require_resolved,
    resolve_by_tables,
)
from adaptsurgery_formats.tensors import FLOAT_DTYPES, Tensor, is_packed

if TYPE_CHECKING:
    from adaptsurgery.checkpoint.base import Base

AnyPath = str | os.PathLike[str]
AnyBase = AnyPath | Mapping[str, tuple[int, ...]]
_COMPONENT = re.compile(r"unet|transformer|text_encoder(_[23])?")
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(eq=False, repr=False)
class Loaded:
    """An adapter as it was read: state and files, the names it was looked up in, its base if any."""

    state: AdapterState
    paths: list[Path]
    names: Names | None = None
    base: Base | None = None
    files: list[AdapterFile] = field(default_factory=list)
    watched: Watched = field(default_factory=dict)  # all that was opened for it

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that it was read from, its base's among them."""
        files = [Path(file.where) for file in self.files]
        configs = [config for file in files if (config := file.parent / CONFIG).is_file()]
        return [*self.paths, *files, *configs, *(self.base.inputs if self.base else ())]

    @property
    def base_place(self) -> str | None:
        """Where the base was read, if there is one."""
        return self.base.where if self.base is not None else None


def read_adapter(
    path: AnyPath | Sequence[AnyPath],
    *,
    base: AnyBase | None = None,
    layout: str | None = None,
    look_up: bool = True,
    names: Names | None = None,
) -> Loaded:
    """The adapter at a path or Hub name, with its modules found in ``base`` or a bundled table.

    Several paths are one adapter in parts: a UNet's and its text encoders', in one layout.
    ``base`` is a path, a Hub name, or one of the bundled tables' names; ``layout`` overrules
    detection; ``names`` is a list of modules that there is already. With ``look_up`` False flat names may stay flat, where no table knows them.
    Raises SurgeryError for whatever is wrong with the input.
    """
    with watching() as watched:
        loaded = _loaded(path, base, layout, look_up, names)
    return replace(loaded, watched=watched)


def _loaded(
    path: AnyPath | Sequence[AnyPath],
    base: AnyBase | None,
    layout: str | None,
    look_up: bool,
    names: Names | None,
) -> Loaded:
    given = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    places = [_local_path(os.fspath(p)) for p in given]
    groups = [read_files(place) for place in places]
    if len(groups) > 1:
        _name_components(groups)
    state = _joined([parse_files(files, layout) for files in groups])
    if len(groups) > 1:
        refuse_twice(state.modules, state.where)
    check_values(state)
    loaded = Loaded(state, places, files=[f for files in groups for f in files])
    if base is not None or names is not None:
        loaded.names, loaded.base = names_of(base) if base is not None else (names, None)
        assert loaded.names is not None
        loaded.state = find_modules(state, loaded.names)
    elif any(m.naming in ("flat", "dotted") for m in state.modules):
        _look_up_in_tables(loaded, must=look_up)
    elif state.model in TABLES:
        loaded.names = table(state.model)
        loaded.state = find_modules(state, loaded.names)
    elif state.layout == "diffusers":
        _look_up_in_tables(loaded, must=False)
    return loaded


def _name_components(groups: Sequence[Sequence[AdapterFile]]) -> None:
    """PEFT folders given one by one are parts of a pipeline by their folders' names."""
    for files in groups:
        for file in files:
            if file.config is not None and not file.component:
                folder = Path(file.where).parent.name
                file.component = folder if _COMPONENT.fullmatch(folder) else ""


def _joined(states: Sequence[AdapterState]) -> AdapterState:
    """Several files' states as one; raises LayoutError where they do not go together."""
    first = states[0]
    for other in states[1:]:
        clash = {m.component for m in other.modules if m.component in other.config}
        clash &= first.config.keys()
        if other.layout != first.layout or clash:
            raise LayoutError(
                "these files are no parts of one adapter",
                where=other.where,
                seen=f"{first.layout} and {other.layout}"
                if other.layout != first.layout
                else f"two PEFT folders for the component `{clash.pop()}`",
                next="name PEFT folders unet, transformer, text_encoder, …; combine adds adapters",
                code="not-one-adapter",
            )
        model = first.model if first.model == other.model else ""
        first = replace(
            first,
            modules=[*first.modules, *other.modules],
            saved={**first.saved, **other.saved},
            metadata=_one_metadata(first, other),
            config={**first.config, **other.config},
            model=model,
            notes=[*first.notes, *other.notes],
        )
    return first


def _one_metadata(first: AdapterState, other: AdapterState) -> dict[str, str]:
    """Both files' metadata; where they differ the first one's, with a note."""
    both = first.metadata.keys() & other.metadata.keys()
    differ = sorted(k for k in both if first.metadata[k] != other.metadata[k])
    if differ:
        other.note("metadata-differs", other.where, f"the first file's kept: {', '.join(differ)}")
    return {**other.metadata, **first.metadata}


def _local_path(spec: str) -> Path:
    """A path that is there, or what the Hub has under the name; the Hub's room only then."""
    if (local := system.local_path(spec)) is not None:
        return Path(local)
    from adaptsurgery.checkpoint.hub import resolve

    return resolve(spec, kind="adapter")


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


def names_of(base: AnyBase) -> tuple[Names, Base | None]:
    """The module names of a base: a bundled table by its name, or a checkpoint's own list.

    A mapping is such a list itself, of one model: module path → its weight's shape.
    """
    if isinstance(base, Mapping):
        return names_of_modules(base, "the model"), None
    spec = os.fspath(base)
    if spec in TABLES and not os.path.lexists(spec):
        return table(spec), None
    if "/" not in spec and not os.path.lexists(spec) and (hint := nearest(spec, TABLES)):
        raise FileError("there is no such base", where=spec, next=hint, code="no-such-file")
    from adaptsurgery.checkpoint.hub import base_headers

    read = base_headers(spec)
    return names_of_base(read.components, read.where, read.parameters, read.configs), read


def read_files(path: Path) -> list[AdapterFile]:
    """The adapter files at a local path: one file, a PEFT folder, or a pipeline of PEFT folders."""
    if path.is_dir():
        return _read_folder(path)
    config = None
    if path.stem == "adapter_model" and system.is_there(path.parent / CONFIG):
        config = read_config(path.parent / CONFIG)
    return [_read_file(path, config)]


def _read_folder(folder: Path) -> list[AdapterFile]:
    if system.is_there(folder / CONFIG):
        return [_read_peft(folder, "")]
    parts = sorted(p.parent for p in folder.glob(f"*/{CONFIG}"))
    if any(not _COMPONENT.fullmatch(part.name) for part in parts):
        raise FileError(
            "this folder holds several adapters",
            where=str(folder),
            seen=", ".join(part.name for part in parts[:6]),
            next="name one; a pipeline's parts are called unet, transformer, text_encoder, …",
            code="several-adapters",
        )
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
    if not component.isprintable():  # it goes into names and metadata
        raise FileError("the folder's name is no plain text", where=str(folder), code="bad-name")
    config = read_config(folder / CONFIG)
    paths = [p for p in (folder / WEIGHTS, folder / "adapter_model.bin") if system.is_there(p)]
    if not paths:
        raise FileError(f"there is no {WEIGHTS} in it", where=str(folder), code="no-such-file")
    file = _read_file(paths[0], config)
    file.component = component
    return file


def _read_file(path: Path, config: dict[str, Any] | None) -> AdapterFile:
    if path.exists() and not path.is_file():  # a pipe would be waited for without end
        raise FileError("this is no regular file", where=str(path), code="not-a-file")
    if path.suffix in _PICKLES:
        from adaptsurgery.checkpoint.pickles import read_pickle

        return AdapterFile(read_pickle(path), {}, config, where=str(path))
    read = read_safetensors(path)
    return AdapterFile(read.tensors, read.metadata, config, where=str(path))


def read_config(path: Path) -> dict[str, Any]:
    """An adapter_config.json as an object; raises FileError for anything else."""
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise FileError("it is too large for a config", where=str(path), code="bad-config")
        return parsed_config(system.read_file(path, MAX_CONFIG), str(path))
    except OSError as error:
        raise FileError(f"it cannot be read: {error.strerror}", where=str(path)) from None


def parse_files(files: list[AdapterFile], layout: str | None = None) -> AdapterState:
    """The state that an adapter's files hold, in ``layout`` or the one that they are in.

    Names stay as the files have them. Raises LayoutError where there is no such layout, or several.
    """
    formats = (
        {detect(f.tensors, f.where, f.metadata.get(META_PREFIX, "")).name for f in files}
        if layout is None
        else {layout}
    )
    if len(formats) > 1:
        raise LayoutError(
            f"the folder's files are in different layouts: {', '.join(sorted(formats))}",
            where=files[0].where,
            code="mixed-layouts",
        )
    chosen = format_named(formats.pop())
    for file in files if layout is not None else ():
        _refuse_other_layouts(file, chosen)
    if len(files) > 1 and chosen.name != "peft":
        raise LayoutError(f"{chosen.title} is one file, not {len(files)}", where=files[0].where)
    state = chosen.parse(files)
    if not state.modules:
        raise LayoutError("there are no tensors in it", where=state.where, code="empty-adapter")
    _drop_strays(state)
    return state


def _drop_strays(state: AdapterState) -> None:
    """Leave out our own metadata where the layout has no use for them: another would read them."""
    strays = sorted(key for key in state.metadata if key.startswith(META_OURS))
    if strays:
        state.metadata = {k: v for k, v in state.metadata.items() if k not in strays}
        state.note("stray-metadata", state.where, f"left out: {', '.join(strays)}")


def _refuse_other_layouts(file: AdapterFile, chosen: Format) -> None:
    """A chosen layout reads keys that none claims, but not another's: it would misread their scale."""
    for key in file.tensors:
        owner = next((f for f in FORMATS.values() if f.claims(key)), None)
        if owner is not None and not chosen.claims(key):
            raise LayoutError(
                f"`{key}` belongs to another layout than {chosen.name}",
                where=file.where,
                seen=owner.title,
                next=f"--from {owner.name}, or leave it out",
                code="layout-disagrees",
            )


def format_named(name: str) -> Format:
    """The format of a name; raises LayoutError with the nearest one."""
    if name not in FORMATS:
        raise LayoutError(
            f"there is no layout `{name}`",
            next=nearest(name, FORMATS) or "layouts: " + ", ".join(FORMATS),
            code="unknown-layout",
        )
    return FORMATS[name]


def check_values(state: AdapterState) -> None:
    """Refuse what no adapter may hold: other dtypes than floats, empty tensors, scales of no size."""
    for module in state.modules:
        if module.alpha and is_lost(module.scale):
            raise ValueRefused(
                f"`{module.label}`: alpha {module.alpha:g} over rank {module.rank} is no number",
                where=state.where,
                seen=f"a scale of {module.scale:g}",
                code="out-of-range",
            )
        for slot, tensor in module.tensors.items():
            if tensor.dtype not in FLOAT_DTYPES or 0 in tensor.shape:
                raise _refused(tensor, _key_of(module, slot), state.where)
    for tensors in state.saved.values():
        for key, tensor in tensors.items():
            if 0 in tensor.shape:  # of any dtype: a batch norm counts in integers
                raise _refused(tensor, key, state.where)


def _refused(tensor: Tensor, key: str, where: str) -> SurgeryError:
    if tensor.dtype in FLOAT_DTYPES:
        return ShapeError(f"`{key}` has no elements", where=where, seen=str(list(tensor.shape)))
    return ValueRefused(
        f"`{key}` is {tensor.dtype}" + (", packed numbers" if is_packed(tensor.dtype) else ""),
        where=where,
        next=f"adapters are {', '.join(FLOAT_DTYPES)}; dequantise it first",
        code="bad-dtype",
    )


def _key_of(module: ModuleState, slot: str) -> str:
    """The file's key of a slot, or the module's own name for it."""
    endings: Iterable[str] = (k for k in module.keys if slot in k.rpartition(".")[2] or slot in k)
    return next(iter(endings), f"{module.label}.{slot}")
