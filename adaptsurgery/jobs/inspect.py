"""What an adapter file is, from its header and its scalar alphas alone: no torch, no numpy."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from adaptsurgery.adapters.loading import Loaded, read_adapter
from adaptsurgery.adapters.renaming import Levelled, fold_step, names_for, renamed
from adaptsurgery.checkpoint.watched import unchanged
from adaptsurgery_formats import FORMATS, WRITABLE, AdapterFile, AdapterState, Format, ModuleState
from adaptsurgery_formats.errors import SurgeryError
from adaptsurgery_formats.metadata import HASH_KEYS, sshs_hashes
from adaptsurgery_formats.names import Names
from adaptsurgery_formats.readers import readers_of
from adaptsurgery_formats.state import magnitude_axis

Data = dict[str, Any]
_Named = tuple[Names | None, AdapterState, list[str]]


@dataclass
class Inspection:
    """What ``inspect`` tells, in JSON's own types; the command prints it, --json dumps it.

    Counts are of modules unless they say otherwise. ``scales`` has one entry for every alpha, rank
    and rule that occurs. ``convertible`` says for each layout that can be written whether this
    adapter can be put into it: "exact", "rewritten" (exact up to one rounding, ``steps`` says by
    what), or "refused" with the error's code and reason. ``readers`` says for each program that
    loads adapters what it makes of this file as it is: "whole", "part" or "nothing", how many of
    the modules it ``read``s rightly, and for what reasons it does not read the others.
    """

    path: str
    layout: Data  # name, title, known_by, example
    model: Data  # name, source: where the module names were found; empty where they were not
    components: dict[str, int]
    algorithms: dict[str, int]
    ranks: dict[str, int]
    alphas: dict[str, int]
    scales: list[Data]
    dora: dict[str, int]  # modules by the axis of the norm: "out" or "in"
    tucker: int
    targets: dict[str, int]
    dtypes: dict[str, int]  # tensors
    tensors: int
    parameters: int
    bytes: int
    saved: list[Data]  # parameters that are replaced outright
    metadata: dict[str, str]
    hashes: Data
    convertible: dict[str, Data]
    readers: dict[str, Data]
    notes: list[dict[str, str]]
    modules: list[Data] = field(default_factory=list)

    def as_dict(self) -> Data:
        """The inspection as JSON's own types; ``job`` first, as in every report."""
        return {"job": "inspect", **vars(self)}


def inspect(
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    layout: str | None = None,
    hashes: bool = False,
) -> Inspection:
    """What the adapter at a path or Hub name is: layout, algorithms, ranks, scales, targets, ….

    Without a ``base`` (a checkpoint, a folder, a Hub name, or sd15, sd2, sdxl, flux) flat names that
    no bundled table has stay flat. ``hashes`` reads the data too: the files' sha256, and kohya's
    hashes computed anew, to tell whether the recorded ones are stale. Raises SurgeryError for
    whatever is wrong with the file.
    """
    with unchanged():
        loaded = read_adapter(path, base=base, layout=layout, look_up=False)
        return _inspection(loaded, layout, hashes)


def _inspection(loaded: Loaded, layout: str | None, hashes: bool) -> Inspection:
    modules = loaded.state.modules
    tensors = [t for file in loaded.files for t in file.tensors.values()]
    adapted = [m for m in modules if m.rank is not None]
    return Inspection(
        path=str(loaded.paths[0]),
        layout=_layout(loaded, layout),
        model=_model(loaded),
        components=_count(m.component for m in modules),
        algorithms=_count(m.algorithm for m in modules),
        ranks=_count(str(m.rank) for m in sorted(adapted, key=lambda m: m.rank or 0)),
        alphas=_count(number(m.alpha) for m in modules if m.alpha is not None),
        scales=_scales(modules),
        dora=_count(magnitude_axis(m) for m in modules if "magnitude" in m.tensors),
        tucker=sum(m.tucker for m in modules),
        targets=_targets(modules),
        dtypes=_count(t.dtype for t in tensors),
        tensors=len(tensors),
        parameters=sum(t.numel for m in modules for t in m.tensors.values()),
        bytes=sum(t.nbytes for t in tensors),
        saved=_saved(loaded),
        metadata=_metadata(loaded.files),
        hashes=_hashes(loaded.files, hashes),
        convertible=_convertible(loaded),
        readers=_readers(loaded),
        notes=[vars(note) for note in loaded.state.notes],
        modules=[_row(m) for m in modules],
    )


def _layout(loaded: Loaded, layout: str | None) -> Data:
    form = FORMATS[loaded.state.layout]
    example = next((key for f in loaded.files for key in f.tensors if form.claims(key)), "")
    known_by = "as told" if layout else "its keys"
    if any(f.config is not None for f in loaded.files) and not layout:
        known_by = "its keys and adapter_config.json"
    return {"name": form.name, "title": form.title, "known_by": known_by, "example": example}


def _model(loaded: Loaded) -> Data:
    if loaded.names is None:
        return {}
    return {"name": loaded.names.model, "source": loaded.names.where}


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values))


def number(value: float) -> str:
    """A number as people write it: 16, 0.5, 1e-05."""
    return f"{value:.6g}"


def _scales(modules: list[ModuleState]) -> list[Data]:
    """Every scale with the alpha, rank and rule that it follows from, the commonest first."""
    counts = Counter((m.rule, m.alpha, m.rank, m.scale) for m in modules)
    return [
        {"scale": scale, "rule": rule, "alpha": alpha, "rank": rank, "modules": count}
        for (rule, alpha, rank, scale), count in counts.most_common()
    ]


def _targets(modules: list[ModuleState]) -> dict[str, int]:
    """The modules' last names; of flat names, which cannot be cut, the shape with * for numbers."""
    counts = Counter(
        _NUMBER.sub("*", m.path) if m.naming == "flat" else last_name(m.written) for m in modules
    )
    return dict(counts.most_common())


_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")


def last_name(path: str) -> str:
    """`to_q` of `blocks.0.attn.to_q`, and `to_out.0` where the last name is an index."""
    names = path.split(".")
    start = len(names) - 1
    while start > 0 and names[start].isdigit():
        start -= 1
    return ".".join(names[start:])


def _saved(loaded: Loaded) -> list[Data]:
    return [
        {"component": component, "name": name, "dtype": t.dtype, "shape": list(t.shape)}
        for component, tensors in loaded.state.saved.items()
        for name, t in tensors.items()
    ]


def _metadata(files: list[AdapterFile]) -> dict[str, str]:
    """The files' own metadata; of several files' different values, the first."""
    merged: dict[str, str] = {}
    for file in files:
        merged = {**file.metadata, **merged}
    return merged


def _row(module: ModuleState) -> Data:
    axis = magnitude_axis(module) if "magnitude" in module.tensors else None
    return {
        "path": module.written,
        "component": module.component,
        "naming": module.naming,
        "algorithm": module.algorithm,
        "rank": module.rank,
        "alpha": module.alpha,
        "scale": module.scale,
        "rule": module.rule,
        "dora": axis,
        "tucker": module.tucker,
        "shapes": {slot: list(t.shape) for slot, t in module.tensors.items()},
        "dtypes": {slot: t.dtype for slot, t in module.tensors.items()},
        "keys": list(module.keys),
    }


# --- hashes --------------------------------------------------------------------------------------


def _hashes(files: list[AdapterFile], compute: bool) -> Data:
    """The hashes that the metadata record; with ``compute`` also what they should be.

    ``stale`` lists the recorded ones that are wrong, and is None where nothing was computed.
    """
    recorded = {k: v for f in files for k, v in f.metadata.items() if k in HASH_KEYS}
    hashes: Data = {"recorded": recorded, "computed": {}, "sha256": {}, "stale": None}
    if compute:
        hashes["sha256"] = {file.where: sha256_of(file.where) for file in files}
        if len(files) == 1 and files[0].config is None:
            hashes["computed"] = _sshs(files[0])
            hashes["stale"] = [k for k, v in recorded.items() if hashes["computed"][k] != v]
    return hashes


def _sshs(file: AdapterFile) -> dict[str, str]:
    """sd-scripts' hashes of the file as the safetensors library would write it."""
    from adaptsurgery.checkpoint.writer import layout, order

    tensors = [file.tensors[key] for key in order(file.tensors)]
    return sshs_hashes(tensors, file.metadata, lambda kept: layout(file.tensors, kept))


def sha256_of(path: str) -> str:
    """The sha256 of a file's bytes; raises FileError if they cannot be read."""
    import hashlib

    from adaptsurgery.checkpoint import system
    from adaptsurgery.checkpoint.failures import as_file_error

    try:
        with system.open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise as_file_error(error, path, writing=False) from error


# --- where it could go ---------------------------------------------------------------------------


def _convertible(loaded: Loaded) -> dict[str, Data]:
    """Whether the adapter can be put into each layout, by names and shapes alone."""
    if any(m.naming == "flat" for m in loaded.state.modules):
        why = "its flat names need --base MODEL to be told apart"
        others = dict.fromkeys(WRITABLE, _refused("base-needed", why))
    else:
        named: dict[str | None, _Named] = {}  # two layouts may write the same names
        others = {name: _planned(loaded, FORMATS[name], named) for name in WRITABLE}
    own = {loaded.state.layout: _EXACT} if loaded.state.layout in WRITABLE else {}
    return others | own


def _planned(loaded: Loaded, target: Format, named: dict[str | None, _Named]) -> Data:
    try:
        if target.naming not in named:
            named[target.naming] = _renamed(loaded, target)
        names, state, folds = named[target.naming]
        plan = target.plan(state, names)
    except SurgeryError as error:
        return _refused(error.code, error.what)
    steps = list(dict.fromkeys([*folds, *(step.step for step in plan)]))
    return {"how": "rewritten", "steps": steps} if steps else _EXACT


def _renamed(loaded: Loaded, target: Format) -> _Named:
    """The names that convert would find, the state in them, and what is folded on the way."""
    folds: list[str] = []

    def noted(levelled: Levelled) -> list[ModuleState]:
        folds.append(fold_step(levelled[0][0]))
        return [module for module, _ in levelled]

    bare = replace(loaded.state, prefix="")  # a prefix stays behind with its layout
    names, state = names_for(bare, loaded.names, target)
    return names, renamed(state, names, target, noted), folds


_EXACT: Data = {"how": "exact", "steps": []}


def _refused(code: str, why: str) -> Data:
    return {"how": "refused", "steps": [], "code": code, "why": why}


# --- who reads it as it is -----------------------------------------------------------------------


def _readers(loaded: Loaded) -> dict[str, Data]:
    """What each reader makes of the file as it is."""
    return {
        name: {
            "title": verdict.reader.title,
            "checked": verdict.reader.checked,
            "how": verdict.how,
            "modules": verdict.modules,
            "read": verdict.read,
            "reasons": [vars(reason) for reason in verdict.reasons],
        }
        for name, verdict in readers_of(loaded.state, loaded.files, loaded.names).items()
    }
