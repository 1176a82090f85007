"""Merging adapters into a checkpoint, and taking them out again, file to file."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from adaptsurgery.adapters.report import Report, Row
from adaptsurgery.checkpoint.apart import keep_apart
from adaptsurgery.checkpoint.finite import Nonfinite, count_nonfinite
from adaptsurgery.checkpoint.hub import resolve
from adaptsurgery.checkpoint.system import local_path
from adaptsurgery.checkpoint.watched import watching
from adaptsurgery.jobs.inputs import check_part, open_base
from adaptsurgery.jobs.merging.check import checkpoints_apart
from adaptsurgery.jobs.merging.manifest import manifest_path
from adaptsurgery.jobs.merging.plan import MergePlan, check_options
from adaptsurgery.jobs.merging.planning import Adapters, open_plan
from adaptsurgery.jobs.merging.recipe import MergeRecipe
from adaptsurgery.jobs.merging.run import (
    Norms,
    Progress,
    abandoned,
    check_plan,
    run_plan,
)
from adaptsurgery.jobs.options import carried, check_numbers, collected
from adaptsurgery.jobs.options.checkpoints import MergeOptions, UnmergeOptions
from adaptsurgery_formats import AdapterState, Note
from adaptsurgery_formats.errors import FileError
from adaptsurgery_formats.traits import traits_of

# The unit of rounding, 2^-(p-1), of what weights are stored in.
EPS = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}


def merge(
    base: str | os.PathLike[str],
    adapters: Adapters,
    out: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    compute: str = "fp32",
    device: str = "cpu",
    max_shard_size: int | None = None,
    dequantize: bool = False,
    allow_unmatched: bool = False,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    workers: int = 2,
    shard_index: int = 0,
    num_shards: int = 1,
    norms: bool = True,
    skip_links: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write ``base`` with the adapters in its weights: W' = W·R1·R2·… + Σ w·s·Δ, rounded once.

    ``base`` is a safetensors file, an index with its shards, a transformers or diffusers folder or
    a Hub name; ``out`` becomes the same. ``adapters`` are paths or Hub names in any layout, each
    ``"path=0.8"`` or ``(path, 0.8)`` where it has a weight. ``dtype`` ("auto", "fp32", "bf16",
    "fp16") is what float tensors are stored in, ``compute`` ("fp32", "fp64") what they are folded
    in, ``device`` where. ``allow_nonfinite`` writes NaN and infinity that come out of a sum or a
    cast, and says how many; what is only copied is not looked at. ``dequantize`` takes a base in fp8 or int8, and writes all of it in the
    dtype that its config names (bf16) or ``dtype``. ``shard_index`` of ``num_shards`` does a part of the shards; whoever is last completes the
    output. ``norms`` False leaves ‖W‖ and ‖W' − W‖ (measured on blocks of each tensor) out of the
    manifest. Files beside the weights come along; a link among them that leads out of the base's folder
    is refused, or left out with ``skip_links``. A run that was killed is taken up where it stopped.

    Raises SurgeryError for anything that cannot be done exactly: what, where, seen, next.
    """
    return _run(base, adapters, Path(out), collected(MergeOptions, locals()), progress)


def unmerge(
    base: str | os.PathLike[str],
    adapters: Adapters,
    out: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    dtype: str = "auto",
    compute: str = "fp32",
    device: str = "cpu",
    max_shard_size: int | None = None,
    allow_unmatched: bool = False,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    workers: int = 2,
    shard_index: int = 0,
    num_shards: int = 1,
    norms: bool = True,
    skip_links: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Take adapters out of a merged checkpoint: the inverse of ``merge``, up to storage rounding.

    The report says how far rounding keeps the result from the original: the bound that the stored
    dtype gives, and the measured distance where ``against`` names the original.
    """
    return _run(base, adapters, Path(out), collected(UnmergeOptions, locals()), progress)


def plan_merge(
    base: str | os.PathLike[str],
    adapters: Adapters,
    options: MergeRecipe | None = None,
    *,
    allow_unmatched: bool = False,
    skip_links: bool = False,
) -> MergePlan:
    """The plan of a merge as plain data; ``run.run_plan`` carries it out, now or elsewhere."""
    return open_plan(base, adapters, options or MergeRecipe(), allow_unmatched, False, skip_links)[
        0
    ]


def _run(
    base: str | os.PathLike[str],
    adapters: Adapters,
    out: Path,
    options: MergeOptions | UnmergeOptions,
    progress: Progress | None,
) -> Report:
    """Merging and its inverse, from the checks to the report."""
    check_numbers(options, "workers", "max_shard_size")
    part = check_part(options.shard_index, options.num_shards)
    recipe = carried(MergeRecipe, options, max_shard_size=options.max_shard_size or 0)
    check_options(recipe)
    overwrite, dry_run, workers = options.overwrite, options.dry_run, options.workers
    with watching() as watched:
        plan, states = open_plan(
            base, adapters, recipe, options.allow_unmatched, dry_run, options.skip_links
        )
    original = _original(options.against, out, plan, dry_run)
    check_plan(plan, out, overwrite=overwrite, needed=not dry_run, parts=part[1])
    report = _report(plan, states, workers)
    for root in abandoned(plan, out):
        text = "left by another merge that was killed; it goes on where it stopped, or remove this"
        report.notes.append(Note("abandoned", str(root), text))
    if dry_run:
        return report
    complete, norms = run_plan(
        plan,
        out,
        overwrite=overwrite,
        workers=workers,
        part=part,
        states=states,
        progress=progress,
        norms=options.norms,
        watched=watched,
    )
    _tell_result(report, plan, norms, out, complete)
    report.notes += Nonfinite(copied=_brought(plan, states)).notes(str(out))
    if options.inverse:
        _tell_rounding(report, plan, states, norms)
        if original is not None and complete:
            report.facts["against"] = checkpoints_apart(out, original)
    return report


def _tell_result(report: Report, plan: MergePlan, norms: Norms, out: Path, complete: bool) -> None:
    """What was written, or that others have parts to do still."""
    _tell_norms(report, plan, norms)
    report.facts["complete"] = complete
    report.notes += _nonfinite(norms).notes(str(out))
    if complete:
        report.outputs = [str(out), str(manifest_path(out, plan.folder))]
    else:
        text = "this part is done; the output appears when the others are"
        report.notes.append(Note("part-done", str(out), text))


def _original(
    against: str | os.PathLike[str] | None, out: Path, plan: MergePlan, dry_run: bool
) -> Path | None:
    """The model that the result is held against, which the output must not replace."""
    if against is None:
        return None
    spec = os.fspath(against)
    if dry_run and local_path(spec) is None:  # nothing is downloaded
        return None
    original = resolve(spec, kind="base")
    writes = [out] if plan.folder else [out, manifest_path(out, False)]
    keep_apart([original], writes, code="output-is-input")
    held = {(f.component, key) for f in open_base(str(original)).files for key in f.tensors}
    if held.isdisjoint((job.component, t.key) for job in plan.jobs for t in job.tensors):
        raise FileError(
            "it holds none of the output's tensors, and tells no distance",
            where=spec,
            next="--against the model that the merge was made of",
            code="other-model",
        )
    return original


# -- What is told


def _shown(plan: MergePlan) -> str:
    """The base's path as a person would type it from here; the plan holds it in full."""
    try:
        near = os.path.relpath(plan.base) if os.path.isabs(plan.base) else plan.base
    except (OSError, ValueError):  # the working directory was removed; it is on another drive
        return plan.base
    return plan.base if near.startswith("..") else near


def _report(plan: MergePlan, states: Sequence[AdapterState], workers: int) -> Report:
    rows = [
        Row(t.key, "+".join(_algorithms(plan, states, t.changes)), "edited")
        for job in plan.jobs
        for t in job.tensors
        if t.changes
    ]
    rows += [
        Row(t.key, "", "replaced")
        for job in plan.jobs
        for t in job.tensors
        if t.saved is not None and not t.changes
    ]
    edited = sum(t.nbytes for t in plan.edited)
    facts = {
        "base": _shown(plan),
        "adapters": [
            {"path": a.path, "weight": a.weight, "layout": a.layout} for a in plan.adapters
        ],
        "modules": plan.modules,
        "unmatched": list(plan.unmatched),
        "tensors": sum(len(job.tensors) for job in plan.jobs),
        "edited_tensors": len(plan.edited),
        "shards": len(plan.jobs),
        "untouched_shards": sum(job.clone >= 0 for job in plan.jobs),
        "bytes": plan.nbytes,
        "edited_bytes": edited,
        "predicted_peak_memory": plan.peak_memory(workers),
        "digest": plan.digest,
    }
    total = plan.modules + len(plan.unmatched)
    verdict = f"{plan.modules}/{total} modules · {len(plan.edited)} tensors"
    notes = [Note(*n) for n in plan.notes] + [n for s in states for n in s.notes]
    job = "unmerge" if plan.options.inverse else "merge"
    return Report(job, verdict, rows, list(dict.fromkeys(notes)), facts=facts)


def _algorithms(
    plan: MergePlan, states: Sequence[AdapterState], changes: Iterable[object]
) -> list[str]:
    names = []
    for change in changes:
        module = states[change.adapter].modules[change.module]  # type: ignore[attr-defined]
        names.append("dora" if "magnitude" in module.tensors else module.algorithm)
    return list(dict.fromkeys(names))


def _tell_norms(report: Report, plan: MergePlan, norms: Norms) -> None:
    """‖W' − W‖ / ‖W‖ of each edited tensor, and a note where a merge changed nothing."""
    for row in report.rows:
        figures = norms.get(row.module)
        if figures and figures.get("before"):
            row.detail = f"‖ΔW‖/‖W‖ {figures['change'] / figures['before']:.3g}"
    still = [t.key for t in plan.edited if t.key in norms and not norms[t.key].get("moved", 1)]
    if still:
        why = "an adapter of zeros?"
        if any(norms[key]["change"] for key in still):
            why = "their changes are smaller than what rounding them takes away"
        text = f"{len(still)} tensors keep every number they had, `{still[0]}` first: {why}"
        report.notes.append(Note("unchanged", _shown(plan), text))


def _nonfinite(norms: Norms) -> Nonfinite:
    """What --allow-nonfinite let through, as the finished shards have noted it."""
    counts = {key: int(each["nonfinite"]) for key, each in norms.items() if "nonfinite" in each}
    return Nonfinite(True, computed=Counter(counts))


def _brought(plan: MergePlan, states: Sequence[AdapterState]) -> Counter[str]:
    """How many numbers are NaN or infinite in parameters that adapters bring and nothing changes."""
    edits = (t for job in plan.jobs for t in job.tensors if t.saved is not None and not t.changes)
    counts: Counter[str] = Counter()
    for edit in edits:
        assert edit.saved is not None
        tensor = states[edit.saved.adapter].saved[edit.saved.component][edit.saved.name]
        counts[edit.key] = count_nonfinite(tensor) if tensor.dtype == edit.dtype else 0
    return +counts


def _tell_rounding(
    report: Report, plan: MergePlan, states: Sequence[AdapterState], norms: Norms
) -> None:
    """How far storage keeps each element from the original's: one rounding of W', and one of W.

    What was rounded away of W' stays in its element under a delta; a rotation back spreads it over
    the row, whose norm it keeps.
    """
    merged = max((EPS[t.stored] for t in plan.edited), default=0.0) / 2
    now = max((EPS[t.dtype] for t in plan.edited), default=0.0) / 2
    turned = any(
        traits_of(algorithm).turns
        for edit in plan.edited
        for algorithm in _algorithms(plan, states, edit.changes)
    )
    report.facts["rounding"] = {"merged": merged, "now": now, "of": "row" if turned else "element"}
    whole = "the norm of its row" if turned else "its size"
    text = (
        f"beside arithmetic, each element is off the original's by {merged:.1e} of {whole} in the "
        f"merged weight, and {now:.1e} of its own size, at most"
    )
    if total := math.sqrt(sum(n.get("before", 0.0) ** 2 for n in norms.values())):
        text += f" (‖W‖ in all {total:.4g})"
    report.notes.append(Note("storage-rounding", _shown(plan), text))
