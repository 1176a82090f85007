"""Adapters into an exported program: .pt2 in, .pt2 and ONNX out, without the model's Python source."""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptsurgery.checkpoint import atomic
from adaptsurgery.checkpoint.failures import as_file_error, missing_file
from adaptsurgery.jobs.adapter import Adapter
from adaptsurgery.jobs.loading import load_state
from adaptsurgery.jobs.report import Report, Row
from adaptsurgery_formats import Note
from adaptsurgery_formats.errors import FileError, LayoutError
from adaptsurgery_formats.names import names_of_base

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from adaptsurgery.core.update import Update
    from adaptsurgery.graph.plan import Plan
    from adaptsurgery.graph.sites import Site

AnyPath = str | os.PathLike[str]
_HEADER = 256 << 20  # bytes of a graph's description, more than any model's


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
) -> Report:
    """Write the program of ``source`` (torch.export.save's .pt2) to ``out`` with an adapter in it.

    ``config`` is an adapter_config.json, whose adapter is new (by ``seed``); ``adapter`` a file or
    folder in any layout, whose names are looked up in the program's own modules unless ``base``
    names another list. Exactly one of the two; with neither and no ``out`` the report has all layers
    of the program. ``mode`` is that of graph.attach; ``merge`` folds the adapter into the weights;
    ``onnx`` is an ONNX file to write as well. Outputs appear whole or not at all.

    ``facts["table"]`` is the plan as text, ``facts["sites"]`` as data. Raises LayoutError
    ("config-or-adapter", "nothing-to-write",
    "no-effect"), FileError for a .pt2 that is missing, truncated, or of
    a newer schema, and what graph.plan, graph.attach, loading and writing raise.
    """
    listing = config is None and adapter is None and out is None and onnx is None
    if (config is None) == (adapter is None) and not listing:
        raise LayoutError(
            "one of a config and an adapter is needed, and not both",
            next="--config adapter_config.json, or --adapter FILE; neither and no -o lists the layers",
            code="config-or-adapter",
        )
    if out is None and not listing and not dry_run:
        raise LayoutError("there is no output", next="-o OUT.pt2, or --dry-run", code="nothing-to-write")  # fmt: skip
    _check_effect(config, listing, {"merge": merge, "mode": mode != "auto", "base": base is not None,
                                    "name": name != "default", "seed": seed is not None})  # fmt: skip
    _check_outputs(source, out, onnx, overwrite)
    with _torch_to_itself():
        return _rewritten(
            source, out, listing, config, adapter, name, mode, merge, onnx, base, seed, overwrite, dry_run
        )  # fmt: skip


def _check_effect(config: AnyPath | None, listing: bool, said: Mapping[str, bool]) -> None:
    """No option is passed over: without an adapter none has an effect, some with one kind alone."""
    idle = set(said) if listing else {"base"} if config is not None else {"seed"}
    lost = [option for option in said if said[option] and option in idle]
    if lost:
        raise LayoutError(
            f"without effect: {', '.join(lost)}",
            next="base goes with an adapter's file, seed with a config, the others with either",
            code="no-effect",
        )


@contextmanager
def _torch_to_itself() -> Iterator[None]:
    """Without what torch's exporters say about their own insides; errors are errors still."""
    import torch.export  # noqa: F401 — it sets the levels of its loggers as it is imported

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export")]
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
    source: AnyPath,
    out: AnyPath | None,
    listing: bool,
    config: AnyPath | None,
    adapter: AnyPath | None,
    name: str,
    mode: str,
    merge: bool,
    onnx: AnyPath | None,
    base: AnyPath | None,
    seed: int | None,
    overwrite: bool,
    dry_run: bool,
) -> Report:
    program = read_program(source)
    chosen = _chosen(program, source, config, adapter, base)
    report = _report(source, chosen)
    if listing:
        return report
    changed = _changed(program, chosen, name, mode, merge, seed)
    report.facts["parameters"] = _parameters(program, changed, name, merge)
    if not dry_run:
        assert out is not None
        _write(changed, Path(out), onnx, overwrite)
        report.outputs = [os.fspath(path) for path in (out, onnx) if path is not None]
        report.facts["bytes"] = Path(out).stat().st_size
    return report


@dataclass
class _Chosen:
    """What goes where: sites, and a plan or updates for them."""

    sites: list[Site]
    plan: Plan | None = None
    updates: Mapping[str, Update] | None = None
    notes: tuple[Note, ...] = ()


def read_program(path: AnyPath) -> ExportedProgram:
    """The program of a .pt2 file.

    Raises FileError: ``no-such-file``, ``truncated`` (no whole zip archive), ``not-a-program``,
    ``newer-schema`` (of a torch that is newer than this one), ``unknown-class`` (it returns an object
    that torch rebuilds by its Python class alone).
    """
    import torch

    where = os.fspath(path)
    _check_archive(Path(path), where)
    try:
        return torch.export.load(where)
    except OSError as error:
        raise as_file_error(error, where, writing=False) from error
    except Exception as error:
        raise FileError(
            "torch cannot load this program",
            where=where,
            seen=str(error).strip().splitlines()[0],
            next=f"save it again by torch.export.save of torch {torch.__version__}",
            code="not-a-program",
        ) from error


def _check_archive(path: Path, where: str) -> None:
    """What a .pt2 says of itself, before torch reads it."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            models = [n for n in names if "/models/" in f"/{n}" and n.endswith(".json")]
            if not models or archive.getinfo(models[0]).file_size > _HEADER:
                raise FileError(
                    "this is no exported program",
                    where=where,
                    seen=f"an archive of {len(names)} files, such as {names[:1]}",
                    next="a file that torch.export.save wrote",
                    code="not-a-program",
                )
            said = json.loads(archive.read(models[0]))
    except FileNotFoundError:
        raise missing_file(where) from None
    except OSError as error:
        raise as_file_error(error, where, writing=False) from error
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise FileError(
            "this is no whole .pt2 archive",
            where=where,
            seen=f"{path.stat().st_size} bytes: {error}",
            next="copy or export it again",
            code="truncated",
        ) from error
    _check_schema(said, where)
    _check_types(said, where)


def _check_types(said: Any, where: str) -> None:
    """Classes that the program takes or returns, which torch rebuilds only where they were imported."""
    from torch.utils._pytree import SERIALIZED_TYPE_TO_PYTHON_TYPE as KNOWN

    calls = said.get("graph_module", {}).get("module_call_graph", [])
    signatures = [call.get("signature") or {} for call in calls]
    specs = " ".join(str(s.get(name, "")) for s in signatures for name in ("in_spec", "out_spec"))
    strange = sorted(set(re.findall(r'"type": "([^"]+)"', specs)) - KNOWN.keys())
    if strange:
        raise FileError(
            "this program returns or takes an object of a class that is not imported",
            where=where,
            seen=", ".join(strange),
            next="export the model with plain tensors and tuples, by a subclass whose forward returns "
            f"them; or in Python: import {strange[0].rpartition('.')[0]}, then rewrite(…)",
            code="unknown-class",
        )


def _check_schema(said: Any, where: str) -> None:
    import torch
    from torch._export.serde.schema import SCHEMA_VERSION

    version = said.get("schema_version", {}) if isinstance(said, dict) else {}
    if version.get("major", SCHEMA_VERSION[0]) > SCHEMA_VERSION[0]:
        raise FileError(
            "this program is of a newer torch",
            where=where,
            seen=f"schema {version.get('major')}.{version.get('minor')} of torch "
            f"{said.get('torch_version', '?')}; this torch reads {SCHEMA_VERSION[0]}.{SCHEMA_VERSION[1]}",
            next=f"a torch newer than {torch.__version__}",
            code="newer-schema",
        )


def _check_outputs(
    source: AnyPath, out: AnyPath | None, onnx: AnyPath | None, overwrite: bool
) -> None:
    for path in (out, onnx):
        if path is not None:
            atomic.check_output(Path(path), overwrite=overwrite)
            if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
                raise FileError(
                    "the output is the program that is read",
                    where=os.fspath(path),
                    next="another path",
                    code="output-is-input",
                )
    if out is not None and onnx is not None and os.path.abspath(out) == os.path.abspath(onnx):
        raise FileError("both outputs have one path", where=os.fspath(out), code="output-exists")


def _chosen(
    program: ExportedProgram,
    source: AnyPath,
    config: AnyPath | None,
    adapter: AnyPath | None,
    base: AnyPath | None,
) -> _Chosen:
    from adaptsurgery.core.config import AdapterConfig
    from adaptsurgery.graph import find_sites, plan

    if config is not None:
        read = AdapterConfig.from_pretrained(os.fspath(config))
        made = plan(program, read)
        made.check(program)
        notes = [*made.notes, *(_left(name) for name in made.saved)]
        return _Chosen(list(made.sites), plan=made, notes=tuple(notes))
    sites = find_sites(program)
    if adapter is None:
        return _Chosen(sites)
    found = _adapter_for(sites, source, adapter, base)
    named = {path: site for site in sites for path in (*site.aliases, site.path)}
    on = [named[path] for path in found if path in named]
    notes = [*found.notes, *(_left(name) for held in found.saved.values() for name in held)]
    return _Chosen(on, updates=found, notes=tuple(notes))


def _left(name: str) -> Note:
    from adaptsurgery.graph.attach import LEFT

    return Note("not-adapted", name, LEFT)


def _adapter_for(
    sites: list[Site], source: AnyPath, adapter: AnyPath, base: AnyPath | None
) -> Adapter:
    """The adapter, its flat names looked up in the program's own modules."""
    if base is not None:
        return Adapter(load_state(adapter, base=base))
    shapes = {s.path: s.shape[::-1] if s.transposed else s.shape for s in sites if s.shape}
    names = names_of_base({"": shapes}, os.fspath(source))
    return Adapter(load_state(adapter, names=names))


def _changed(
    program: ExportedProgram, chosen: _Chosen, name: str, mode: str, fold: bool, seed: int | None
) -> ExportedProgram:
    import torch

    from adaptsurgery.graph import attach, merge

    generator = None if seed is None else torch.Generator().manual_seed(seed)
    what: Any = chosen.plan if chosen.plan is not None else dict(chosen.updates or {})
    changed = attach(program, what, name, mode, generator=generator)  # type: ignore[arg-type]
    return merge(changed, name) if fold else changed


def _parameters(
    before: ExportedProgram, after: ExportedProgram, name: str, fold: bool
) -> dict[str, int]:
    from adaptsurgery.graph import adapter_parameters

    added = {} if fold else adapter_parameters(after, name)
    return {
        "base": sum(t.numel() for t in before.state_dict.values()),
        "adapter": sum(t.numel() for t in added.values()),
    }


def _write(program: ExportedProgram, out: Path, onnx: AnyPath | None, overwrite: bool) -> None:
    import torch

    from adaptsurgery.graph import export_onnx

    with atomic.output(out, overwrite=overwrite) as temporary:
        with open(temporary, "wb") as file:
            torch.export.save(program, file)
        if onnx is not None:
            export_onnx(program, onnx, overwrite=overwrite)


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
