"""The work of a merge as plain data: one job an output file, built from headers alone.

A plan goes through JSON and back unchanged, and its digest names the work: the same inputs and
options give the same plan, which is how a killed run is taken up again, and how several machines
do parts of one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from adaptsurgery.adapters.loading import CONFIG, read_files
from adaptsurgery.checkpoint import system
from adaptsurgery.checkpoint.base import PICKLES, Base, BaseFile
from adaptsurgery.jobs.inputs import Input, base_input, beside_input, refuse_pickles
from adaptsurgery.jobs.merging.configs import config_changes
from adaptsurgery.jobs.merging.copies import Beside, look_beside, refused_links
from adaptsurgery.jobs.merging.matched import Change, Matched, Saved, TensorName
from adaptsurgery.jobs.merging.quantised import Quantised, Scale, quantised_of
from adaptsurgery.jobs.merging.recipe import MergeRecipe
from adaptsurgery_formats import AdapterState, Note
from adaptsurgery_formats.errors import FileError, ValueRefused, nearest, printable
from adaptsurgery_formats.paths import check_below, check_text
from adaptsurgery_formats.tensors import DTYPE_BITS, FLOAT_DTYPES, bytes_of

VERSION = 1
LINKS_LEFT_OUT = "links-left-out"
MANIFEST = "adaptsurgery_manifest.json"
_WEIGHTS = (".safetensors", *PICKLES, ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
_VARIANT_INDEX = re.compile(r"\.(?:safetensors|bin)\.index\..+\.json")
DTYPES = {"auto": "", "fp32": "F32", "bf16": "BF16", "fp16": "F16"}
DTYPE_NAMES = {long: short for short, long in DTYPES.items()} | {"F64": "fp64"}
COMPUTE = ("fp32", "fp64")
_TORCH = 220 << 20  # what torch itself holds
_SCRATCH = 12 << 20  # a worker's blocks


@dataclass(frozen=True)
class AdapterInput:
    """An adapter as it was named, its weight, and its files."""

    path: str
    weight: float
    layout: str
    files: tuple[Input, ...]


@dataclass(frozen=True)
class TensorEdit:
    """A tensor of the output: where its numbers come from, and what changes them.

    ``scale`` is what a quantised source is multiplied by first. ``file`` and ``source`` are a base file's number and the key in it; a ``saved`` parameter comes
    from an adapter instead. Without changes and in the source's dtype it is copied.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: int = -1
    source: str = ""
    stored: str = ""  # the source's dtype
    saved: Saved | None = None
    changes: tuple[Change, ...] = ()
    scale: Scale | None = None

    @property
    def nbytes(self) -> int:
        return bytes_of(self.dtype, self.shape)

    @property
    def copied(self) -> bool:
        plain = self.saved is None and self.scale is None
        return plain and not self.changes and self.dtype == self.stored


@dataclass(frozen=True)
class ShardJob:
    """One output file. ``clone`` is the base file that it is a copy of, or -1."""

    name: str
    component: str
    tensors: tuple[TensorEdit, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    clone: int = -1

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


@dataclass(frozen=True)
class MergePlan:
    """Everything that has to be done, and for what. ``folder``: the output is a directory.

    ``indexes`` are the index files to write: name → component. ``configs``: patches of a
    component's config.json. ``copies``: other files that come along. ``beside``: those and the
    base's indexes as inputs, told by size and time.
    """

    base: str
    folder: bool
    files: tuple[Input, ...]
    adapters: tuple[AdapterInput, ...]
    options: MergeRecipe
    jobs: tuple[ShardJob, ...]
    indexes: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    copies: tuple[str, ...] = ()
    modules: int = 0
    unmatched: tuple[str, ...] = ()
    notes: tuple[tuple[str, str, str], ...] = ()
    beside: tuple[Input, ...] = ()
    version: int = VERSION

    def __post_init__(self) -> None:
        """Refuse names that would be written, or copied from, outside (FileError ``path-escapes``)."""
        names = [job.name for job in self.jobs if self.folder or job.name]
        components = [name for name in self.configs if name]
        for name in (*names, *self.indexes, *self.copies, *components):
            check_below(name, "the plan")

    @property
    def home(self) -> Path:
        """The folder that the base is, or lies in."""
        base = Path(self.base)
        return base if os.path.isdir(base) else base.parent

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    @property
    def nbytes(self) -> int:
        return sum(job.nbytes for job in self.jobs)

    @property
    def edited(self) -> list[TensorEdit]:
        return [t for job in self.jobs for t in job.tensors if t.changes]

    def peak_memory(self, workers: int = 2) -> int:
        """Bytes that carrying it out should hold at most, torch included.

        A tensor whose rows have to come together is held in the compute dtype; others by blocks.
        """
        wide = 8 if self.options.compute == "fp64" else 4
        sizes = [math.prod(t.shape) * wide for t in self.edited if _needs_all_rows(t)]
        return _TORCH + workers * (_SCRATCH + max(sizes, default=0))

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> MergePlan:
        """The plan that ``to_json`` wrote; raises FileError ``bad-plan`` for anything else."""
        from adaptsurgery_formats.records import record

        try:
            plan: MergePlan = record(json.loads(text), cls, "plan")
        except (ValueError, RecursionError) as error:
            raise bad_plan(str(error)) from None
        if plan.version != VERSION:
            raise bad_plan(f"version {plan.version}")
        _check_numbers(plan)
        check_options(plan.options)
        return plan


def bad_plan(seen: str) -> FileError:
    """The error for a plan that says what no plan of ours says."""
    return FileError(
        "this is no merge plan", seen=printable(seen)[:200], next="plan again", code="bad-plan"
    )


def _check_numbers(plan: MergePlan) -> None:
    """Refuse jobs that write one file twice, and what counts beyond the plan's own lists."""
    inputs = [*plan.files, *plan.beside, *(file for a in plan.adapters for file in a.files)]
    for path in (plan.base, *(a.path for a in plan.adapters), *(given.path for given in inputs)):
        check_text(path)
    names = [job.name for job in plan.jobs]
    if len(set(names)) < len(names) or not (names if plan.folder else len(names) == 1):
        raise bad_plan(f"{len(names)} jobs for {len(set(names))} files")
    for job in plan.jobs:
        _check_count("clone", job.clone, len(plan.files), or_none=True)
        if len({t.key for t in job.tensors}) < len(job.tensors):
            raise bad_plan(f"`{job.name}` has a tensor twice")
        for edit in job.tensors:
            _check_edit(edit, plan)


def _check_edit(edit: TensorEdit, plan: MergePlan) -> None:
    if edit.dtype not in DTYPE_BITS or min(edit.shape, default=0) < 0:
        raise bad_plan(f"`{edit.key}`: {edit.dtype} {list(edit.shape)}")
    _check_count("file", edit.file, len(plan.files), or_none=edit.saved is not None)
    for number in [c.adapter for c in edit.changes] + ([edit.saved.adapter] if edit.saved else []):
        _check_count("adapter", number, len(plan.adapters))
    for change in edit.changes:
        counts = (change.module, change.at, change.rows, change.first, change.index or 0)
        if change.what not in ("weight", "bias") or min(counts) < 0:
            raise bad_plan(f"`{edit.key}`: {change}")
    if edit.scale is not None:
        _check_count("scale", edit.scale.file, len(plan.files), or_none=True)


def _check_count(what: str, number: int, count: int, or_none: bool = False) -> None:
    if not -int(or_none) <= number < count:
        raise bad_plan(f"{what} {number} of {count}")


def _needs_all_rows(edit: TensorEdit) -> bool:
    return any(c.turned for c in edit.changes)


def build_plan(
    base: Base,
    adapters: Sequence[tuple[AdapterState, AdapterInput]],
    matches: Matched,
    untied: set[str],
    options: MergeRecipe,
    skip_links: bool = False,
) -> MergePlan:
    """The plan of what was matched. Raises ValueRefused for options that cannot be, FileError
    ``pickle-base``, ``one-file`` where a file would have to become several, ``link-outside`` for
    links among the copies that lead out of the base, unless ``skip_links`` leaves them out."""
    check_options(options)
    refuse_pickles(base)
    beside = look_beside(base.folder) if base.folder is not None else Beside()
    strays = _strays(beside, base, skip_links)
    states = [state for state, _ in adapters]
    edits = _edits(base, states, matches, options)
    jobs = _jobs(base, edits, options)
    copies = tuple(_copied(beside, base))
    return MergePlan(
        base=base.where,
        folder=base.folder is not None,
        files=tuple(base_input(base, file) for file in base.files),
        adapters=tuple(given for _, given in adapters),
        options=options,
        jobs=jobs,
        indexes=_indexes(base, jobs),
        configs=_patched(config_changes(base, matches, states, untied, options), strays),
        copies=copies,
        modules=matches.modules,
        unmatched=tuple(matches.unmatched),
        notes=tuple((n.code, n.where, n.text) for n in _notes(base, matches, jobs, beside, strays)),
        beside=tuple(beside_input(base, name) for name in (*copies, *base.indexes)),
    )


def _patched(
    configs: Mapping[str, Mapping[str, Any]], strays: Collection[str]
) -> dict[str, Mapping[str, Any]]:
    """The patches of those configs that come along."""
    return {
        component: patch
        for component, patch in configs.items()
        if not {component, f"{component}/config.json".lstrip("/")} & set(strays)
    }


def _notes(
    base: Base,
    matches: Matched,
    jobs: Sequence[ShardJob],
    beside: Beside,
    strays: Mapping[str, str],
) -> list[Note]:
    notes = list(matches.notes)
    plain = [t for job in jobs for t in job.tensors if t.scale is not None]
    if plain:
        dtypes = ", ".join(sorted({DTYPE_NAMES[t.dtype] for t in plain}))
        text = f"{len(plain)} quantised weights are written in {dtypes}, their scales left out"
        notes.append(Note("dequantised", base.where, text))
    if other := _left_out(beside, base):
        text = "not part of the model, and not carried along: " + ", ".join(other[:5])
        notes.append(Note("weights-left-out", base.where, text))
    if strays:
        text = "links that lead elsewhere, and are not carried along: "
        text += ", ".join(f"{name} → {strays[name]}" for name in sorted(strays)[:5])
        notes.append(Note(LINKS_LEFT_OUT, base.where, text))
    if beside.closed:
        text = "folders that may not be read, and are not carried along: "
        notes.append(Note("not-readable", base.where, text + ", ".join(beside.closed[:5])))
    return notes


def check_options(options: MergeRecipe) -> None:
    """Refuse options that have no meaning."""
    _check_device(options.device)
    for name, known in (("dtype", tuple(DTYPES)), ("compute", COMPUTE)):
        value = getattr(options, name)
        if value not in known:
            raise ValueRefused(
                f"--{name} {value} is not offered",
                next=nearest(value, known) or f"one of {', '.join(known)}",
                code="no-such-option",
            )


def _check_device(device: str) -> None:
    """A name that torch could know; whether it is there shows when the work begins."""
    if not re.fullmatch(r"(cpu|cuda|mps|xpu|hpu|npu)(:\d+)?", device):
        raise ValueRefused(
            f"--device {device} is no device", next="cpu, cuda, cuda:1, mps", code="no-such-option"
        )


def adapter_input(path: Path, weight: float, layout: str) -> AdapterInput:
    """An adapter with the hashes of its own files: the weights and the config beside them.

    What else lies in its folder is no part of it: a training's checkpoints, or an output.
    """
    files = [Path(file.where) for file in read_files(path)]
    names = {*files, *(c for file in files if system.is_there(c := file.parent / CONFIG))}
    return AdapterInput(str(path.resolve()), weight, layout, tuple(map(_hashed, sorted(names))))


def _hashed(path: Path) -> Input:
    with system.open_file(path) as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        stat = os.fstat(stream.fileno())
    return Input(str(path.resolve()), stat.st_size, digest, stat.st_mtime_ns)


# -- Tensors


def _edits(
    base: Base, adapters: Sequence[AdapterState], matches: Matched, options: MergeRecipe
) -> dict[int, list[TensorEdit]]:
    """The output's tensors by the base file that they come from or lie beside."""
    quantised = quantised_of(base) if options.dequantize else Quantised()
    keys = {
        (at.file, at.key): (component, name)
        for component, parameters in base.parameters.items()
        for name, at in parameters.items()
    }
    edits: dict[int, list[TensorEdit]] = {n: [] for n in range(len(base.files))}
    for number, file in enumerate(base.files):
        for key, tensor in file.tensors.items():
            if (number, key) in quantised.gone:
                continue
            target = keys.get((number, key), ("", "\0"))
            edit = TensorEdit(key, tensor.dtype, tensor.shape, number, key, tensor.dtype)
            edit = _plain(edit, quantised, options)
            edits[number].append(_changed(edit, target, adapters, matches))
    for target in dict.fromkeys([*matches.heads, *matches.saved]):
        if target[1] not in base.parameters[target[0]]:
            number, edit = _added(base, target, adapters, matches)
            edit = _plain(edit, quantised, options)
            edits[number].append(_changed(edit, target, adapters, matches))
    return edits


def _output_dtype(dtype: str, options: MergeRecipe) -> str:
    wanted = DTYPES[options.dtype]
    return wanted if wanted and dtype in FLOAT_DTYPES else dtype


def _plain(edit: TensorEdit, quantised: Quantised, options: MergeRecipe) -> TensorEdit:
    """The tensor in the dtype that it is stored in, and what its numbers are multiplied by."""
    spot = (edit.file, edit.source)
    dtype = quantised.dtypes.get(spot, edit.dtype)
    return replace(edit, dtype=_output_dtype(dtype, options), scale=quantised.scales.get(spot))


def _changed(
    edit: TensorEdit, target: TensorName, adapters: Sequence[AdapterState], matches: Matched
) -> TensorEdit:
    """The tensor with what the adapters do to it."""
    changes = tuple(matches.changes.get(target, ()))
    saved = matches.saved.get(target)
    if not changes and saved is None:
        return edit
    shape = edit.shape
    if saved is not None:
        shape = adapters[saved.adapter].saved[saved.component][saved.name].shape
    scale = None if saved is not None else edit.scale
    return replace(edit, shape=shape, saved=saved, changes=changes, scale=scale)


def _added(
    base: Base,
    target: TensorName,
    adapters: Sequence[AdapterState],
    matches: Matched,
) -> tuple[int, TensorEdit]:
    """A tensor that the base lacks: a head written apart, or a parameter that an adapter brings."""
    component, name = target
    parameters = base.parameters[component]
    if target in matches.heads:
        at = parameters[matches.heads[target][1]]
        return at.file, TensorEdit(name, at.dtype, at.shape, at.file, at.key, at.dtype)
    saved = matches.saved[target]
    tensor = adapters[saved.adapter].saved[saved.component][saved.name]
    last = max(at.file for at in parameters.values())
    example = next(iter(parameters.items()))
    prefix = example[1].key.removesuffix(example[0])
    return last, TensorEdit(prefix + name, tensor.dtype, tensor.shape)


# -- Files


def _jobs(
    base: Base, edits: Mapping[int, list[TensorEdit]], options: MergeRecipe
) -> tuple[ShardJob, ...]:
    """One job a base file, or the tensors dealt out anew under ``max_shard_size``."""
    if options.max_shard_size:
        return tuple(_resharded(base, edits, options.max_shard_size))
    return tuple(
        _job_of(file.name if base.folder else "", file, edits[number], number)
        for number, file in enumerate(base.files)
    )


def _job_of(name: str, file: BaseFile, tensors: Sequence[TensorEdit], number: int) -> ShardJob:
    same = all(t.copied for t in tensors) and len(tensors) == len(file.tensors)
    return ShardJob(
        name, file.component, tuple(tensors), dict(file.metadata), number if same else -1
    )


def _resharded(base: Base, edits: Mapping[int, list[TensorEdit]], limit: int) -> Iterator[ShardJob]:
    groups: dict[str, list[int]] = {}
    for number, file in enumerate(base.files):
        groups.setdefault(file.component, []).append(number)
    for component, numbers in groups.items():
        shards = _dealt([t for n in numbers for t in edits[n]], limit)
        first = base.files[numbers[0]]
        if base.folder is None and len(shards) > 1:
            raise FileError(
                "the output of a single file is a single file",
                where=base.where,
                seen=f"{len(shards)} shards under --max-shard-size {limit}",
                next="name the model's folder as the base",
                code="one-file",
            )
        for i, tensors in enumerate(shards):
            name = _shard_name(first.name, i, len(shards)) if base.folder else ""
            yield ShardJob(name, component, tuple(tensors), dict(first.metadata))


def _dealt(tensors: Sequence[TensorEdit], limit: int) -> list[list[TensorEdit]]:
    shards: list[list[TensorEdit]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _shard_name(name: str, number: int, count: int) -> str:
    """unet/model-00001-of-00002.safetensors → unet/model-00002-of-00003.safetensors"""
    stem = stem_of(name)
    return (
        f"{stem}.safetensors" if count == 1 else f"{stem}-{number + 1:05}-of-{count:05}.safetensors"
    )


def stem_of(name: str) -> str:
    """unet/model-00001-of-00002.safetensors → unet/model"""
    stem = name.removesuffix(".safetensors")
    head, _, tail = stem.rpartition("-of-")
    return head.rpartition("-")[0] if head and tail.isdigit() else stem


def _indexes(base: Base, jobs: Sequence[ShardJob]) -> dict[str, str]:
    """Index file → component: those of the base, or new ones where a component has several files."""
    if base.folder is None:
        return {}
    counts: dict[str, list[str]] = {}
    for job in jobs:
        counts.setdefault(job.component, []).append(job.name)
    known = {_component_of(base, name): name for name in base.indexes}
    indexes = {}
    for component, names in counts.items():
        if len(names) > 1:
            indexes[known.get(component, f"{stem_of(names[0])}.safetensors.index.json")] = component
        elif component in known and names[0] in {f.name for f in base.files}:
            indexes[known[component]] = component
    return indexes


def _component_of(base: Base, index: str) -> str:
    folder = index.rpartition("/")[0]
    components = {f.component for f in base.files}
    return folder if folder in components else ""


def _copied(beside: Beside, base: Base) -> list[str]:
    """What comes along of the files beside the weights: configs, tokenizers, not other weights."""
    read = {*(f.name for f in base.files), *base.indexes}
    return [name for name in beside.files if name not in read and _comes_along(name)]


def _strays(beside: Beside, base: Base, skip_links: bool) -> dict[str, str]:
    """The links that would come along and lead out of the folder; FileError unless they are skipped."""
    read = {*(f.name for f in base.files), *base.indexes}
    strays = {n: to for n, to in beside.strays.items() if n not in read and _comes_along(n)}
    if strays and not skip_links and base.folder is not None:
        raise refused_links(base.folder, strays)
    return strays


def _comes_along(path: str) -> bool:
    name = path.rpartition("/")[2]
    if name.endswith(_WEIGHTS) or _VARIANT_INDEX.search(name):
        return False
    return not name.startswith(".") and name != MANIFEST


def _left_out(beside: Beside, base: Base) -> list[str]:
    """Weights in the base's folder that are not part of the model that was read: other variants."""
    known = {f.name for f in base.files}
    return [name for name in beside.files if name.endswith(_WEIGHTS[:-1]) and name not in known]
