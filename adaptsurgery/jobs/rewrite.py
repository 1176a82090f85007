"""Adapters into an exported program: .pt2 in, .pt2 and ONNX out, without the model's Python source."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from adaptsurgery.adapters.adapter import Adapter
from adaptsurgery.adapters.loading import read_adapter
from adaptsurgery.adapters.report import Report, Row
from adaptsurgery.checkpoint import atomic, privacy, system
from adaptsurgery.checkpoint.apart import keep_apart
from adaptsurgery.checkpoint.failures import as_file_error
from adaptsurgery.checkpoint.programs import check_program
from adaptsurgery.checkpoint.watched import check_watched, current, watching
from adaptsurgery.jobs.options import SEEDS, collected, default_of
from adaptsurgery.jobs.options.programs import RewriteOptions
from adaptsurgery.jobs.values import is_whole
from adaptsurgery_formats import Note
from adaptsurgery_formats.errors import FileError, LayoutError, NameLookupError, nearest
from adaptsurgery_formats.names import names_of_modules

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from adaptsurgery.core.config import AdapterConfig
    from adaptsurgery.core.update import Update
    from adaptsurgery.graph.plan import Plan
    from adaptsurgery.graph.sites import Site

AnyPath = str | os.PathLike[str]
TRUSTED = (
    "it was not looked through: torch unpickles what the file holds, evaluates its formulas and imports "
    "what it names, all of which can run any code"
)


def rewrite(
    source: AnyPath,
    out: AnyPath | None = None,
    *,
    config: AnyPath | None = None,
    adapter: AnyPath | None = None,
    name: str = "default",
    mode: str = "auto",
    merge: bool = False,
    onnx: AnyPath | None = None,
    base: AnyPath | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    trust: bool = False,
) -> Report:
    """Write the program of ``source`` (torch.export.save's .pt2) with an adapter in it.

    ``out`` is a .pt2 to write, ``onnx`` an ONNX file: either or both, whole or not at all.
    ``config`` is an adapter_config.json, whose adapter is new (by ``seed``); ``adapter`` a file or
    folder in any layout, whose names are looked up in the program's own modules unless ``base``
    names another list. Exactly one of the two; with neither and no output the report has all layers
    of the program. ``mode`` is that of graph.attach; ``merge`` folds the adapter into the weights.
    A program is looked through before torch loads it, and refused where that would run code;
    ``trust`` loads one's own without that.

    ``facts["table"]`` is the plan as text, ``facts["sites"]`` as data, ``facts["bytes"]`` the size of
    all that was written; a note names a field of the config that is not known. Raises LayoutError
    ("config-or-adapter", "nothing-to-write", "no-effect", "bad-seed"), FileError for a program that ``read_program``
    refuses, and what graph.plan, graph.attach, loading and writing raise.
    """
    listing = config is None and adapter is None and out is None and onnx is None
    if (config is None) == (adapter is None) and not listing:
        raise LayoutError(
            "one of a config and an adapter is needed, and not both",
            next="--config adapter_config.json, or --adapter FILE; neither and no output lists the layers",
            code="config-or-adapter",
        )
    if out is None and onnx is None and not listing and not dry_run:
        raise LayoutError(
            "no output is named, and nothing was done",
            next="-o OUT.pt2, --onnx OUT.onnx, or both; --table to see the layers, --dry-run to try it",
            code="nothing-to-write",
        )
    options = collected(RewriteOptions, locals())
    _check_effect(options, listing)
    _check_seed(seed)
    _check_outputs((source, config, adapter, base), out, onnx, overwrite)
    with _torch_to_itself(), watching():
        return _rewritten(source, out, options, listing)


def _check_effect(options: RewriteOptions, listing: bool) -> None:
    """No option is passed over: without an adapter none has an effect, some with one kind alone."""
    names = ("merge", "mode", "base", "name", "seed")
    idle = names if listing else ("base",) if options.config is not None else ("seed",)
    lost = [name for name in idle if getattr(options, name) != default_of(options, name)]
    if lost:
        raise LayoutError(
            f"without effect: {', '.join(lost)}",
            next="base goes with an adapter's file, seed with a config, the others with either",
            code="no-effect",
        )


def _check_seed(seed: int | None) -> None:
    if seed is not None and not is_whole(seed, *SEEDS):
        raise LayoutError(
            "the seed is no number of 64 bits",
            seen=str(seed)[:60],
            next=f"a seed from 0 to {SEEDS[1]}",
            code="bad-seed",
        )


@contextmanager
def _torch_to_itself() -> Iterator[None]:
    """Without what torch's exporters say about their own insides; errors are errors still."""
    import torch.export  # noqa: F401 — it sets the levels of its loggers as it is imported

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch._export")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)


def _rewritten(
    source: AnyPath, out: AnyPath | None, options: RewriteOptions, listing: bool
) -> Report:
    program = read_program(source, trust=options.trust)
    chosen = _chosen(program, source, options)
    report = _report(source, chosen)
    if options.trust:
        report.notes.insert(0, Note("trusted", os.fspath(source), TRUSTED))
    if listing:
        return report
    changed = _changed(program, chosen, options)
    check_watched(current())  # all that is read has been
    report.facts["parameters"] = _parameters(program, changed, options.name, options.merge)
    if not options.dry_run:
        inputs = _inputs(source, options.config, options.adapter, options.base)
        report.outputs = _write(changed, out, options.onnx, options.overwrite, inputs)
        report.facts["bytes"] = sum(Path(path).stat().st_size for path in report.outputs)
    return report


@dataclass
class _Chosen:
    """What goes where: sites, and a plan or updates for them."""

    sites: list[Site]
    plan: Plan | None = None
    updates: Mapping[str, Update] | None = None
    notes: tuple[Note, ...] = ()


def read_program(path: AnyPath, *, trust: bool = False) -> ExportedProgram:
    """The program of a .pt2 file, which is looked through before torch loads it.

    ``trust`` leaves that out, for a file of one's own: torch then unpickles, imports and evaluates
    whatever is in it.

    Raises FileError: what ``check_program`` raises, and ``unknown-class`` where it takes or returns an
    object that torch rebuilds by a Python class which is not imported.
    """
    import torch
    from torch._export.serde.schema import SCHEMA_VERSION

    where = os.fspath(path)
    description = check_program(path, newest=SCHEMA_VERSION[0], trust=trust)
    _check_classes(description.classes, where)
    try:
        return torch.export.load(where)
    except OSError as error:
        raise as_file_error(error, where, writing=False) from error
    except Exception as error:
        reasons = str(error).strip().splitlines() or [type(error).__name__]
        raise FileError(
            "torch cannot load this program",
            where=where,
            seen=reasons[0],
            next=f"save it again by torch.export.save of torch {torch.__version__}",
            code="not-a-program",
        ) from error


def _check_classes(classes: Collection[str], where: str) -> None:
    """Classes that the program takes or returns, which torch rebuilds only where they were imported."""
    from torch.utils._pytree import SERIALIZED_TYPE_TO_PYTHON_TYPE as KNOWN

    strange = sorted(set(classes) - KNOWN.keys())
    if strange:
        raise FileError(
            "this program returns or takes an object of a class that is not imported",
            where=where,
            seen=", ".join(strange),
            next="export the model with plain tensors and tuples, by a subclass whose forward returns "
            f"them; or in Python: import {strange[0].rpartition('.')[0]}, then rewrite(…)",
            code="unknown-class",
        )


def _check_outputs(
    inputs: Iterable[AnyPath | None], out: AnyPath | None, onnx: AnyPath | None, overwrite: bool
) -> None:
    """Refuse outputs that are read, that are one another, or that cannot be written."""
    beside = None if onnx is None else f"{os.fspath(onnx)}.data"  # where its weights are many
    keep_apart(map(_here, inputs), (out, onnx, beside), code="output-is-input")
    swapped = ((out, ".onnx", "a .pt2", "--onnx"), (onnx, ".pt2", "ONNX", "-o"))
    for path, ending, meant, other in swapped:
        if path is None:
            continue
        atomic.check_output(Path(path), overwrite=overwrite)
        if os.fspath(path).endswith(ending):
            raise FileError(
                f"{meant} is to be written here, and the name ends in {ending}",
                where=os.fspath(path),
                next=f"{other} {os.fspath(path)}",
                code="other-ending",
            )


def _here(spec: AnyPath | None) -> AnyPath | None:
    """What an input is on this disk: a path, or what the Hub's cache has of a name."""
    if spec is None or (local := system.local_path(os.fspath(spec))) is not None:
        return spec if spec is None else local
    from adaptsurgery.checkpoint.hub import cached_path

    return cached_path(os.fspath(spec))


def _chosen(program: ExportedProgram, source: AnyPath, options: RewriteOptions) -> _Chosen:
    from adaptsurgery.core.config import AdapterConfig
    from adaptsurgery.graph import find_sites, plan

    if (config := options.config) is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the fields that the notes name
            read = AdapterConfig.from_pretrained(os.fspath(config))
        made = plan(program, read)
        made.check(program)
        notes = [*_strange(read, config), *made.notes, *(_left(name) for name in made.saved)]
        return _Chosen(list(made.sites), plan=made, notes=tuple(notes))
    sites = find_sites(program)
    if options.adapter is None:
        return _Chosen(sites)
    adapter = _adapter_for(sites, source, options.adapter, options.base)
    named = {path: site for site in sites for path in (*site.aliases, site.path)}
    on = [named[path] for path in adapter if path in named]
    notes = [*adapter.notes, *(_left(name) for held in adapter.saved.values() for name in held)]
    return _Chosen(on, updates=adapter, notes=tuple(notes))


def _strange(config: AdapterConfig, path: AnyPath) -> Iterator[Note]:
    """A note for every field of a config that says something in vain."""
    own = [f.name for f in fields(config)]
    for name in config.unknown:
        text = f"`{name}` is no field of {type(config).__name__}, and has no effect"
        hint = nearest(name, own)
        yield Note("unknown-field", os.fspath(path), f"{text}; {hint}" if hint else text)
    for name in config.idle:
        yield Note("unknown-field", os.fspath(path), f"`{name}` has no effect here")


def _left(name: str) -> Note:
    from adaptsurgery.graph.attach import LEFT

    return Note("not-adapted", name, LEFT)


def _adapter_for(
    sites: list[Site], source: AnyPath, adapter: AnyPath, base: AnyPath | None
) -> Adapter:
    """The adapter, its names looked up in the program's own modules."""
    shapes = {s.path: s.shape[::-1] if s.transposed else s.shape for s in sites if s.shape}
    if base is None:
        names = names_of_modules(shapes, os.fspath(source))
        read = Adapter(read_adapter(adapter, names=names))
    else:
        read = Adapter(read_adapter(adapter, base=base))
    known = {path for site in sites for path in (*site.aliases, site.path)}
    if len(read.components) > 1 or all(path in known for path in read):
        return read
    try:
        return read.on(shapes)
    except NameLookupError:
        return read  # what the program has of it is told where it is attached


def _changed(program: ExportedProgram, chosen: _Chosen, options: RewriteOptions) -> ExportedProgram:
    import torch

    from adaptsurgery.graph import attach, merge

    name, mode, seed = options.name, options.mode, options.seed
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    what: Any = chosen.plan if chosen.plan is not None else dict(chosen.updates or {})
    changed = attach(program, what, name, mode, generator=generator)  # type: ignore[arg-type]
    return merge(changed, name) if options.merge else changed


def _parameters(
    before: ExportedProgram, after: ExportedProgram, name: str, fold: bool
) -> dict[str, int]:
    from adaptsurgery.graph import adapter_parameters

    added = {} if fold else adapter_parameters(after, name)
    return {
        "base": sum(t.numel() for t in before.state_dict.values()),
        "adapter": sum(t.numel() for t in added.values()),
    }


def _inputs(*given: AnyPath | None) -> list[AnyPath]:
    """The files that were named, and of folders all files that may have been read."""
    named = [path for path in given if path is not None and os.path.exists(path)]
    return [each for path in named for each in privacy.below(Path(path))]


def _write(
    program: ExportedProgram,
    out: AnyPath | None,
    onnx: AnyPath | None,
    overwrite: bool,
    inputs: Sequence[AnyPath],
) -> list[str]:
    """The files that were written. ONNX comes first, since it may fail."""

    from adaptsurgery.graph.onnx import export_onnx, files_of

    with ExitStack() as stack:
        if out is not None:
            landing = atomic.output(out, overwrite=overwrite, inputs=inputs)
            _save(program, stack.enter_context(landing))
        if onnx is not None:
            try:
                with atomic.outputs(
                    onnx, overwrite=overwrite, beside=[".data"], inputs=inputs
                ) as folder:
                    export_onnx(program, folder / Path(onnx).name)
            except OSError as error:
                raise as_file_error(error, onnx, writing=True) from error
    more = files_of(program, onnx) if onnx is not None else []
    return [os.fspath(path) for path in (*([out] if out is not None else []), *more)]


def _save(program: ExportedProgram, path: Path) -> None:
    """Write a program; raises what went wrong, such as OSError where the disk is full."""
    import torch

    with system.new_file(path) as file:
        sink = _Sink(file)
        torch.export.save(program, sink)  # type: ignore[arg-type]
        if sink.error is not None:
            raise sink.error


class _Sink(io.RawIOBase):
    """A file for torch's writer, which ends the process where a write raises: the error is kept."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: BaseException | None = None

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return offset  # torch goes back to the start when it has written all

    def write(self, data: Any, /) -> int:
        if self.error is None:
            try:
                self.file.write(data)
                self.file.flush()
            except BaseException as error:
                self.error = error
        return len(data)


def _report(source: AnyPath, chosen: _Chosen) -> Report:
    from adaptsurgery.graph.plan import table

    ranks = {t.name: t for _, t in chosen.plan.placed} if chosen.plan is not None else {}
    rows, sites = [], []
    for site in chosen.sites:
        target = ranks.get(site.path)
        update = None if chosen.updates is None else chosen.updates[_key(site, chosen.updates)]
        algorithm = _algorithm(chosen, update)
        if algorithm:
            rows.append(Row(site.path, algorithm, "identical"))
        sites.append(
            {
                "path": site.path,
                "kind": site.kind,
                "shape": list(site.shape),
                "calls": len(site.calls),
                "shares": list(site.shares),
                "reason": site.reason,
                "algorithm": algorithm,
                "rank": target.rank if target else None,
                "alpha": target.alpha if target else None,
            }
        )
    text = str(chosen.plan) if chosen.plan is not None else table(chosen.sites)
    count = f"{len(sites)} layers" if not rows else f"{len(rows)} of the program's layers adapted"
    facts = {"source": os.fspath(source), "sites": sites, "table": text}
    return Report("rewrite", count, rows, list(chosen.notes), facts=facts)


def _algorithm(chosen: _Chosen, update: Update | None) -> str:
    if chosen.plan is not None:
        return str(chosen.plan.config.algorithm)
    return "" if update is None else update.name or type(update).__name__.lower()


def _key(site: Site, updates: Mapping[str, Update]) -> str:
    return next(path for path in (site.path, *site.aliases) if path in updates)
