"""One adapter equal to the weighted sum Σ w·s·Δ of several, of any algorithms, layouts and ranks.

- A layer that one adapter has, at weight 1, is taken as it is, byte for byte; at another weight
  only its alpha changes (and a factor's sign), and so do equal factors that come several times.
- Different low-rank Δ on a layer become one LoRA, exactly: ranks side by side,
  (c₁·up₁ c₂·up₂ …)·(down₁; down₂; …), LoHa and LoKr through their LoRA forms. No cross-terms.
- A dense difference takes up whatever else is added on its layer: readers expect one of the two.
- HRA turn one after the other, W·R₁·R₂; beside a Δ they need the base's weight to become a LoRA.
- A DoRA renormalises whatever it stands on, so it stays alone on its layer.

Numbers keep their dtype where the result is exact in it, and are float32 where it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from adaptsurgery.adapters import lowrank
from adaptsurgery.adapters.loading import Loaded
from adaptsurgery.adapters.lowrank import Spec, is_low_rank, lora_form
from adaptsurgery.adapters.report import Report, Row
from adaptsurgery.adapters.rows import in_one_form, in_one_naming
from adaptsurgery.adapters.updates import is_nonfinite_allowed, nonfinite_allowed, nonfinite_of
from adaptsurgery.adapters.writing import Progress, check_paths, writable, write_adapter
from adaptsurgery.jobs.change import as_lora
from adaptsurgery.jobs.combining.factors import lora_module
from adaptsurgery.jobs.combining.sums import Sum
from adaptsurgery.jobs.combining.terms import WeightedAdapter
from adaptsurgery.jobs.merging.adapters import Named, repeated, split_weight
from adaptsurgery.jobs.values import is_whole
from adaptsurgery_formats import Format, ModuleState, Note
from adaptsurgery_formats.errors import InexactError, ShapeError, ValueRefused
from adaptsurgery_formats.traits import traits_of


def combine(
    sources: Sequence[Named],
    out: Spec,
    *,
    to: str | None = None,
    base: Spec | None = None,
    rank: int | None = None,
    allow_lossy: bool = False,
    allow_zero: bool = False,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    hashes: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Write to ``out`` one adapter that does what ``sources``, each at its weight, do together.

    A source is a path or Hub name, "path=weight", or a pair (path, weight); a weight of 0 leaves
    it out. ``to`` is the layout, the first source's by default. ``rank`` truncates every LoRA of
    a higher one, optimally, and needs ``allow_lossy`` if a ΔW then moves by more than 1e-6 of its
    norm. ``allow_zero`` writes zeros where everything cancels, which is an error otherwise.
    ``base`` gives the module list, and the weights where an HRA must become a LoRA. ``allow_nonfinite`` writes sums that are NaN or infinite, and tells them.

    The report has a row per layer with its relative error. Raises SurgeryError for what does not
    add up: weights other than 1 on HRA and DoRA ("no-weight"), a DoRA beside another change
    ("dora-sum"), an HRA beside a Δ without a base ("hra-sum"), approximation without
    ``allow_lossy`` ("lossy").
    """
    _check_rank(rank)
    named = [split_weight(source) for source in sources]
    if not named:
        raise ValueRefused(
            "no adapter was named", next="A[=WEIGHT] B[=WEIGHT] …", code="no-adapter"
        )
    loaded = lowrank.load_together([name for name, _ in named], base=base, to=to)
    loaded = _in_one_form(loaded)
    target = writable(to or loaded[0].state.layout)
    read = [path for one in loaded for path in one.paths]
    check_paths(read, out, target, overwrite, loaded[0].base_place)
    notes: list[Note] = []
    with nonfinite_allowed(allow_nonfinite):
        parts = [WeightedAdapter(one, weight, target) for one, (_, weight) in zip(loaded, named)]
        sum_ = Sum([part for part in parts if part.weight], loaded[0], target)
        result = sum_.result(allow_zero, parts[0])
        result = _fitted(_cut(result, rank, notes), target, rank)
        rows = sum_.rows(result.state.modules)
    watched = {path: stamp for one in loaded for path, stamp in one.watched.items()}
    result = replace(result, watched=watched)
    _check_lossy(rows, allow_lossy, result.state.where)
    report = write_adapter(
        result,
        Path(out),
        target.name,
        allow_nonfinite=allow_nonfinite,
        overwrite=overwrite,
        dry_run=dry_run,
        hashes=hashes,
        progress=progress,
        others=[path for one in loaded for path in one.inputs],
    )
    notes = [*repeated(one.paths[0] for one in loaded), *sum_.notes, *notes]
    return _told(report, rows, parts, notes)


def _in_one_form(loaded: list[Loaded]) -> list[Loaded]:
    """Adapters whose modules meet layer by layer, under the names of one model."""
    states = in_one_naming(in_one_form([one.state for one in loaded], loaded[0].names))
    return [replace(one, state=state) for one, state in zip(loaded, states)]


def _check_rank(rank: int | None) -> None:
    if rank is not None and not is_whole(rank):
        raise ShapeError(f"no LoRA has rank {rank}", next="a rank of at least 1")


def _cut(result: Loaded, rank: int | None, notes: list[Note]) -> Loaded:
    """Every LoRA of a higher rank truncated to ``rank``; others stay what they are."""
    from adaptsurgery.core.linalg import truncate_factors

    if rank is None:
        return result
    names, where = result.names, result.state.where
    modules, whole = [], set()
    for module in result.state.modules:
        if "magnitude" in module.tensors and (module.rank or 0) > rank:
            whole.add("dora")
        elif is_nonfinite_allowed() and nonfinite_of(module):
            notes.append(Note("not-cut", module.label, "it holds NaN or infinity: it has no rank"))
        elif module.algorithm == "lora" and (module.rank or 0) > rank:
            form = lora_form(module, names, where)
            factors = truncate_factors(*form.factors(), rank)
            low = lora_module([module], factors.up, factors.down, form.shape, module.scale)
            bias = module.tensors.get("up_bias")
            module = low.with_tensors(up_bias=bias) if bias else low
        elif module.algorithm != "lora" and not traits_of(module.algorithm).vector:
            whole.add(module.algorithm)
        modules.append(module)
    if whole:
        text = f"modules that are {', '.join(sorted(whole))} alone stay so, whatever the rank"
        notes.append(Note("not-cut", where, text))
    return replace(result, state=replace(result.state, modules=modules))


def _fitted(result: Loaded, target: Format, rank: int | None) -> Loaded:
    """The result with all of it as LoRA, exactly, where the target cannot hold it as it is."""
    try:
        target.plan(result.state, result.names)
        return result
    except InexactError as error:
        error.next = error.next.replace("--as lora", "convert --as lora")
        if not all(_may_be_lora(m, result, rank) for m in result.state.modules):
            raise
    state = as_lora(result, rank=rank, allow_lossy=True)  # weighed with all the rest
    state.note("as-lora", state.where, f"{target.name} cannot hold the algorithms side by side")
    return replace(result, state=state)


def _may_be_lora(module: ModuleState, result: Loaded, rank: int | None) -> bool:
    if module.algorithm == "hra":
        return result.base is not None
    return is_low_rank(module) or ("diff" in module.tensors and rank is not None)


def _check_lossy(rows: Sequence[Row], allowed: bool, where: str) -> None:
    lossy = [row for row in rows if row.change == "lossy"]
    if lossy and not allowed:
        worst = max(lossy, key=lambda row: row.error)
        raise InexactError(
            f"{len(lossy)} of {len(rows)} modules can only be approximated",
            where=where,
            seen=f"relative error up to {worst.error:.3g}, at `{worst.module}`",
            next="--allow-lossy if that is good enough, or a higher --rank",
            code="lossy",
        )


def _told(
    report: Report, rows: list[Row], parts: Sequence[WeightedAdapter], notes: Sequence[Note]
) -> Report:
    counts = {change: sum(r.change == change for r in rows) for change in ("identical", "rounded")}
    phrases = [f"{counts['identical']} as they were"] if counts["identical"] else []
    for change, word in (("rounded", "exact"), ("lossy", "approximated")):
        errors = [r.error for r in rows if r.change == change]
        if errors:
            phrases.append(f"{len(errors)} {word}, relative error up to {max(errors):.2g}")
    report.job, report.rows = "combine", rows
    report.verdict = f"{len(rows)} modules of {len(parts)} adapters: " + "; ".join(phrases)
    report.notes = list(dict.fromkeys([*report.notes, *notes]))
    report.facts |= {
        "sources": [
            {"path": p.state.where, "weight": p.weight, "layout": p.state.layout} for p in parts
        ],
        "source": " + ".join(f"{p.weight:g}·{p.state.where}" for p in parts),
    }
    return report
