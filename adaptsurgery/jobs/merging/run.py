"""A plan carried out: shard by shard into a partial output, which becomes the output at the end.

See ``jobs.partial``: ``files/`` is what OUT will be, a shard there in full or not at all, and
``norms/`` holds ‖W‖ and ‖W' − W‖ of each finished shard's tensors. A single file lands together with
its manifest; a folder holds its own.
"""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptsurgery.checkpoint import atomic, locks, privacy, system
from adaptsurgery.checkpoint.apart import is_within, keep_apart, overlap
from adaptsurgery.checkpoint.base import read_json
from adaptsurgery.checkpoint.finite import Nonfinite
from adaptsurgery.checkpoint.safetensors import read_safetensors
from adaptsurgery.checkpoint.watched import Watched, check_watched
from adaptsurgery.checkpoint.writer import file_size
from adaptsurgery.jobs.inputs import Input, check_inputs
from adaptsurgery.jobs.merging.adapters import parse_adapter
from adaptsurgery.jobs.merging.configs import patched
from adaptsurgery.jobs.merging.copies import check_copies
from adaptsurgery.jobs.merging.manifest import manifest_of, manifest_path
from adaptsurgery.jobs.merging.matched import Change
from adaptsurgery.jobs.merging.plan import (
    MANIFEST,
    MergePlan,
    ShardJob,
    TensorEdit,
    bad_plan,
    stem_of,
)
from adaptsurgery.jobs.merging.quantised import Scale
from adaptsurgery.jobs.partial import GoneError, Partial, replace_json, write_json
from adaptsurgery_formats import AdapterState
from adaptsurgery_formats.errors import FileError, SurgeryError
from adaptsurgery_formats.reading import typed
from adaptsurgery_formats.tensors import Tensor

if TYPE_CHECKING:
    import torch

    from adaptsurgery.checkpoint.stream import Entry
    from adaptsurgery.core.blocks import BlockEdit, Grid, Placed

Progress = Callable[[int, int], object]
Norms = dict[str, dict[str, float]]


def check_plan(
    plan: MergePlan, out: Path, *, overwrite: bool, needed: bool = False, parts: int = 1
) -> None:
    """All that can be refused before a byte is written: the output's place, changed inputs.

    With several ``parts`` an output of this very plan is no obstacle: the others have made it.

    Raises FileError: what ``atomic.check_output`` and ``check_copies`` raise, ``output-is-base``,
    ``output-is-input``.
    """
    _check_apart(plan, out)
    check_copies(plan.home, plan.copies)
    if not plan.folder:
        _check_manifest(manifest_path(out, False))
    if _Place(plan, out).landed(out) or (parts > 1 and _made(plan, out) is not None):
        return
    atomic.check_output(
        out,
        overwrite=overwrite,
        directory=plan.folder,
        replaceable=_replaceable(plan, out),
        needed=plan.nbytes - _finished(plan, out) if needed else 0,
        beside=() if plan.folder else (atomic.RECORD,),
        inner=[*(job.name for job in plan.jobs), *plan.copies] if plan.folder else (),
    )


def _copied(plan: MergePlan) -> list[Path]:
    base = plan.home
    return [base / name for name in plan.copies]


def run_plan(
    plan: MergePlan,
    out: Path,
    *,
    overwrite: bool = False,
    workers: int = 2,
    part: tuple[int, int] = (0, 1),
    states: Sequence[AdapterState] | None = None,
    progress: Progress | None = None,
    norms: bool = True,
    watched: Watched | None = None,
) -> tuple[bool, Norms]:
    """Carry out every n-th job of a plan from the i-th on, (i, n) = ``part``.

    Whoever finishes the last of all jobs puts the output in its place. Returns whether that was
    done, and the norms of all finished tensors, unless ``norms`` is False. ``states`` are the
    adapters, if they are parsed, and ``watched`` is what was read for them and for the plan.
    """
    index, count = part
    check_plan(plan, out, overwrite=overwrite, needed=True, parts=count)
    place = _Place(plan, out)
    if count > 1 and not place.landed(out):
        made = _made(plan, out)
        if made is not None:
            return True, made
        if index >= len(plan.jobs):  # nothing to do: those who have jobs complete the output
            return False, {}
    check_inputs(_inputs(plan))
    runner = _Runner(plan, place, states, workers, progress, norms)
    runner.watched = watched or {}
    try:
        with place.entered(alone=count == 1):
            if place.landed(out):
                return True, _close(plan, place, out)
            if count > 1 and (made := _made(plan, out)) is not None:  # just now, by another
                if not place.busy():
                    place.remove()
                return True, made
            place.check_files(place.known())
            for number in range(index, len(plan.jobs), count):
                runner.job(number)
            complete, measured = _finish(runner, out, overwrite)
            if not complete and count == 1:  # all jobs were done: a twin has the output in place
                raise GoneError
            return complete, measured
    except GoneError:
        made = _made(plan, out)
        if made is not None:
            return True, made  # another process was faster
        raise place.vanished() from None
    except FileError as error:
        made = _made(plan, out) if error.code == "output-exists" else None
        if made is None:
            error.where = error.where.replace(str(place.root / "work"), str(out))
            raise
        return True, made
    except OSError as error:
        made = _made(plan, out) if isinstance(error, FileNotFoundError) else None
        if made is None:
            raise place.said(error, out) from error
        return True, made
    except SurgeryError as error:
        error.where = error.where.replace(str(place.root / "work"), str(out))
        raise


class _Place(Partial):
    """The partial output of a merge: its shards, and the norms of their tensors."""

    def __init__(self, plan: MergePlan, out: Path) -> None:
        super().__init__(plan.digest, out)
        self.plan = plan
        self.content = self.files if plan.folder else self.shard(0)
        self.manifest = self.root / "manifest.json"  # a single file's

    def shard(self, number: int) -> Path:
        return self.files / (self.plan.jobs[number].name or "output.safetensors")

    def done(self, number: int) -> bool:
        """Whether a shard is there: it comes under its name only when it is whole and on disk."""
        return self.result(number) is not None

    def result(self, number: int) -> Norms | None:
        """The norms of a finished shard's tensors; None where it is not there as it was finished."""
        return _as_norms(self.recorded(number, self.shard(number)))

    def known(self) -> set[str]:
        """Relative names of all that may lie in ``files``."""
        plan = self.plan
        shards = {self.shard(n).relative_to(self.files).as_posix() for n in range(len(plan.jobs))}
        return {*shards, *plan.copies, *plan.indexes, MANIFEST} if plan.folder else shards


def abandoned(plan: MergePlan, out: Path) -> list[Path]:
    """What killed runs of other plans have left beside the output, if nobody works on it now."""
    return _Place(plan, out).abandoned()


def _finished(plan: MergePlan, out: Path) -> int:
    """Bytes that an earlier run has written already."""
    place = _Place(plan, out)
    return sum(job.nbytes for n, job in enumerate(plan.jobs) if place.done(n))


class _Runner:
    """The jobs of a plan, one at a time, each with all the workers."""

    def __init__(
        self,
        plan: MergePlan,
        place: _Place,
        states: Sequence[AdapterState] | None,
        workers: int,
        progress: Progress | None,
        norms: bool,
    ) -> None:
        self.plan, self.place, self.workers, self.progress = plan, place, workers, progress
        self.norms = norms
        self.watched: Watched = {}
        self.parsed = list(states) if states is not None else None
        self.bases: dict[int, Mapping[str, Tensor]] = {}
        self.done = 0
        self.bits: int | None = None

    @property
    def states(self) -> list[AdapterState]:
        if self.parsed is None:
            self.parsed = [parse_adapter(Path(a.path)) for a in self.plan.adapters]
        return self.parsed

    def job(self, number: int) -> None:
        """Write one shard, unless it is there; under its final name only when it is on disk."""
        job = self.plan.jobs[number]
        with self.place.lock(str(number)):
            if self.place.done(number):
                self._tell(job.nbytes)
                return
            work = self.place.root / "work" / str(number)
            work.unlink(missing_ok=True)
            try:
                norms = self._write(job, work)
            except BaseException:
                work.unlink(missing_ok=True)
                raise
            target = self.place.shard(number)
            self._make_parents(target)
            self._narrow(work)
            os.replace(work, target)  # over one that is not what its record says
            self.place.record(number, norms, target)

    def _make_parents(self, target: Path) -> None:
        """The folders of a shard below ``files``, which is not made again where it has landed."""
        for folder in list(target.relative_to(self.place.files).parents)[-2::-1]:
            (self.place.files / folder).mkdir(exist_ok=True)

    def _narrow(self, work: Path) -> None:
        """Before it is recorded: a later change of its mode would make another file of it."""
        if self.bits is None:
            self.bits = privacy.shared_bits(_sources(self.plan, self.place.out), _group(work))
        privacy.narrow_to(work, self.bits)

    def _tell(self, count: int) -> None:
        self.done += count
        if self.progress:
            self.progress(self.done, self.plan.nbytes)

    def _write(self, job: ShardJob, work: Path) -> Norms:
        if job.clone >= 0:
            system.copy_file(self.plan.files[job.clone].path, work)
            self._tell(job.nbytes)
            return {}
        import torch  # noqa: F401  before the workers start, who would all import it at once

        from adaptsurgery.checkpoint.stream import write_stream

        nonfinite = Nonfinite(self.plan.options.allow_nonfinite)
        totals = write_stream(
            work,
            {t.key: self._entry(t) for t in job.tensors},
            job.metadata,
            workers=self.workers,
            compute="F64" if self.plan.options.compute == "fp64" else "F32",
            progress=self._tell,
            norms=self.norms,
            device=self.plan.options.device,
            nonfinite=nonfinite,
        )
        norms = {key: _norms(value) for key, value in totals.items()}
        return norms | {key: {"nonfinite": count} for key, count in nonfinite.computed.items()}

    def _entry(self, edit: TensorEdit) -> Entry:
        from adaptsurgery.checkpoint.stream import Entry

        tensor = self._source(edit)
        if tensor.shape != edit.shape:
            raise bad_plan(f"`{edit.key}` is {list(edit.shape)}, and {list(tensor.shape)} there")
        factory = partial(self._edit, edit) if edit.changes or edit.scale else None
        return Entry(tensor, factory, edit.dtype, quantised=edit.scale is not None)

    def _source(self, edit: TensorEdit) -> Tensor:
        if edit.saved is None:
            return _named(self._base(edit.file), edit.source)
        saved = self.states[edit.saved.adapter].saved
        return _named(saved.get(edit.saved.component, {}), edit.saved.name)

    def _base(self, number: int) -> Mapping[str, Tensor]:
        if number not in self.bases:
            self.bases[number] = read_safetensors(self.plan.files[number].path).tensors
        return self.bases[number]

    def _edit(self, edit: TensorEdit, compute: torch.dtype) -> BlockEdit:
        from adaptsurgery.checkpoint.bridge import torch_device
        from adaptsurgery.core.blocks import edit_of

        places = [self._place(change) for change in edit.changes]
        device = torch_device(self.plan.options.device)
        grid = self._grid(edit.scale, compute) if edit.scale else None
        inverse = self.plan.options.inverse
        return edit_of(places, edit.shape, compute, device, inverse=inverse, grid=grid)

    def _grid(self, scale: Scale, compute: torch.dtype) -> Grid:
        import torch

        from adaptsurgery.checkpoint.bridge import to_torch, torch_device
        from adaptsurgery.core.blocks import Grid

        values = torch.ones(1)
        if scale.file >= 0:
            values = to_torch(_named(self._base(scale.file), scale.key))
        if min(scale.grid) < 1 or values.numel() != math.prod(scale.grid):
            raise bad_plan(f"scale `{scale.key}` as {list(scale.grid)}")
        device = torch_device(self.plan.options.device)
        return Grid(values.to(device, compute).reshape(scale.grid) * scale.factor, scale.block)

    def _place(self, change: Change) -> Placed:
        from adaptsurgery.core.blocks import Placed
        from adaptsurgery.jobs.merging.updates import update_for

        if change.module >= len(self.states[change.adapter].modules):
            raise bad_plan(f"module {change.module} of {len(self.states[change.adapter].modules)}")
        if len(change.shape) <= int(change.turned):
            raise bad_plan(f"a change of {list(change.shape)}")
        outputs = change.shape[int(change.turned)]
        span = (change.first, change.first + change.rows)
        return Placed(
            update_for(change, self.states, self.plan.options.allow_nonfinite),
            self.plan.adapters[change.adapter].weight,
            rows=(change.at, change.at + change.rows),
            source=None if span == (0, outputs) else span,
            expert=change.index,
            transposed=change.turned and change.what != "bias",
            bias=change.what == "bias",
        )


def _named(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise bad_plan(f"there is no tensor `{key}`")
    return tensors[key]


def _norms(totals: Any) -> dict[str, float]:
    norms: dict[str, float] = totals.as_dict()
    return norms


# -- The end


def _finish(runner: _Runner, out: Path, overwrite: bool) -> tuple[bool, Norms]:
    """Indexes, configs, other files, the manifest, and the rename; if every shard is there."""
    plan, place = runner.plan, runner.place
    with ExitStack() as held:
        held.enter_context(place.lock("finish"))
        if place.landed(out):  # by a twin, who is about to remove the rest
            return True, _made(plan, out) or {}
        for number in range(len(plan.jobs)):
            if place.shard(number).exists() and not place.done(number):
                runner.job(number)
        norms = _all_norms(plan, place)
        if not all(map(place.done, range(len(plan.jobs)))):
            return False, norms
        check_inputs(_inputs(plan))
        _check_sizes(plan, place)
        _make_ready(plan, place, out, norms)
        check_inputs(_inputs(plan))  # again: configs, index and the rest were read just now
        check_watched(runner.watched)
        with locks.alone(out), locks.unbroken():
            place.land(out, overwrite, None if plan.folder else place.manifest)
            held.close()  # nothing that is open may lie in what is removed
            return True, _close(plan, place, out)


def _make_ready(plan: MergePlan, place: _Place, out: Path, norms: Norms) -> None:
    """All that lands besides the shards, on disk, and none of it open to more people than an input."""
    sources = list(_sources(plan, out))
    if plan.folder:
        _complete(plan, place.files)
        _write_new(place.files / MANIFEST, manifest_of(plan, norms))
        place.check_files(place.known())
    else:
        replace_json(place.manifest, manifest_of(plan, norms))
        privacy.narrow(place.manifest, sources)
        atomic.sync(place.manifest)
    privacy.narrow(place.content, sources)
    atomic.sync(place.content)


def _sources(plan: MergePlan, out: Path) -> Iterator[str]:
    """Whose privacy the output keeps: what it is made of, and the one that it replaces."""
    yield from _read(plan)
    if os.path.lexists(out):
        yield from privacy.below(out)


def _group(path: Path) -> int:
    return os.lstat(path).st_gid


def _read(plan: MergePlan) -> Iterator[str]:
    """All files that the output is made of, and the folders that were named."""
    yield from (given.path for given in _inputs(plan))
    yield from (path for path in (plan.base, *(a.path for a in plan.adapters)))
    yield from map(str, _copied(plan))


def _write_new(path: Path, data: Mapping[str, Any]) -> None:
    path.unlink(missing_ok=True)
    write_json(path, data)


def _close(plan: MergePlan, place: _Place, out: Path) -> Norms:
    """What comes after the rename: a file's manifest, if a kill came before it, and the rest removed.

    A run that was killed while it removed that has written the manifest, from norms that may be gone.
    """
    with locks.alone(out), locks.unbroken():
        norms = _made(plan, out)
        if norms is None:
            norms = _all_norms(plan, place)
            if not plan.folder and place.landed(out):
                if not place.manifest.exists():
                    replace_json(place.manifest, manifest_of(plan, norms))
                    privacy.narrow(place.manifest, [*_read(plan), out])
                atomic.put_record(place.manifest, out, atomic.identity(out))
        atomic.sync_folder(out.parent)
        place.remove()
    return norms


def _all_norms(plan: MergePlan, place: _Place) -> Norms:
    norms: Norms = {}
    for number in range(len(plan.jobs)):
        norms |= place.result(number) or {}
    return norms


def _check_sizes(plan: MergePlan, place: _Place) -> None:
    """Each shard as long as its tensors and its header are."""
    for number, job in enumerate(plan.jobs):
        wanted = (
            plan.files[job.clone].size
            if job.clone >= 0
            else file_size({t.key: Tensor(t.dtype, t.shape, ()) for t in job.tensors}, job.metadata)
        )
        size = place.shard(number).stat().st_size
        if size != wanted:
            raise FileError(
                "a finished shard is not as long as it should be",
                where=str(place.shard(number)),
                seen=f"{size} bytes of {wanted}",
                next=f"remove {place.root} and run again",
                code="bad-partial",
            )


def _complete(plan: MergePlan, content: Path) -> None:
    """What a folder holds besides its weights."""
    base = plan.home
    for name in plan.copies:
        target = content / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        system.copy_file(base / name, target)
    for component, changes in plan.configs.items():
        path = content / component / "config.json"
        _write_new(path, patched(_object(path, base / component / "config.json"), changes))
    for name, component in plan.indexes.items():
        _write_new(content / name, _index(plan, component, base / name))


def _object(path: Path, source: Path) -> dict[str, Any]:
    """A JSON object that was one when the plan was made."""
    try:
        data = json.loads(system.read_text(path))
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise FileError(
            "it is no longer a JSON object, as it was when the plan was made",
            where=str(source),
            next="plan again",
            code="input-changed",
        )
    return data


def _index(plan: MergePlan, component: str, old: Path) -> dict[str, Any]:
    """The index of a component's shards, with the old one's metadata brought up to date."""
    jobs = [j for j in plan.jobs if j.component == component]
    metadata: dict[str, Any] = {}
    if old.is_file():
        index = read_json(old)
        metadata = dict(typed(index, "metadata", dict) or {}) if index.get("metadata") else {}
    metadata["total_size"] = sum(job.nbytes for job in jobs)
    if "total_parameters" in metadata:
        tensors = [t for job in jobs for t in job.tensors]
        metadata["total_parameters"] = sum(Tensor(t.dtype, t.shape, ()).numel for t in tensors)
    weight_map = {t.key: job.name.rpartition("/")[2] for job in jobs for t in job.tensors}
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


# -- What is refused


def _inputs(plan: MergePlan) -> list[Input]:
    return [*plan.files, *plan.beside, *(f for a in plan.adapters for f in a.files)]


def _check_apart(plan: MergePlan, out: Path) -> None:
    """Refuse an output that is an input, holds one, or lies within the base's folder."""
    base = plan.home if plan.folder else Path(plan.base)
    if is_within(out, base):
        raise overlap(out, base, "output-is-base")
    along = [base / name for name in (*plan.copies, *plan.indexes)] if plan.folder else []
    inputs = [given.path for given in _inputs(plan)]
    writes = [out] if plan.folder else [out, manifest_path(out, False)]
    keep_apart([base, *along, *inputs], writes, code="output-is-input")


def _replaceable(plan: MergePlan, out: Path) -> list[str]:
    """What an existing output may hold: what this plan writes, other shards of the same model, and
    what their index lists."""
    stems = {stem_of(job.name) for job in plan.jobs}
    names = {*(job.name for job in plan.jobs), *plan.copies, MANIFEST}
    for index in {*plan.indexes, *(f"{stem}.safetensors.index.json" for stem in stems)}:
        names |= {index, *_listed(out, index)}
    if atomic.is_record(out / MANIFEST):
        names |= {f"{stem}.safetensors" for stem in stems}
    shards = [f"{glob.escape(stem)}-?????-of-?????.safetensors" for stem in stems]
    return [*map(glob.escape, names), *shards]


def _listed(out: Path, index: str) -> set[str]:
    """The shards that an index in a folder names, relative to the folder."""
    files = atomic.read_record(out / index).get("weight_map")
    if not isinstance(files, dict):
        return set()
    folder = index.rpartition("/")[0]
    return {f"{folder}/{name}" if folder else str(name) for name in files.values()}


def _made(plan: MergePlan, out: Path) -> Norms | None:
    """The norms of an output that says it is this plan's, else None."""
    path = manifest_path(out, plan.folder)
    if not out.exists() or not atomic.is_record(path):
        return None
    manifest = atomic.read_record(path)
    return (_as_norms(manifest.get("norms")) or {}) if manifest.get("plan") == plan.digest else None


def _as_norms(rows: Any) -> Norms | None:
    """Norms as a record or a manifest has them; None for anything else."""
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        return None
    numbers = [number for row in rows.values() for number in row.values()]
    return rows if all(isinstance(number, (int, float)) for number in numbers) else None


def _check_manifest(path: Path) -> None:
    """Refuse to replace what has the name of the output's manifest and is none."""
    if os.path.lexists(path) and not atomic.is_record(path):
        raise FileError(
            "the output's manifest would replace this, which is not a merge's manifest",
            where=str(path),
            next="name another output, or move it away",
            code="output-not-ours",
        )
