"""What an extraction tells: per layer and in all, what is kept, what is lost, and what is odd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from adaptsurgery.adapters.report import Report, Row
from adaptsurgery.jobs.extract.choose import Outcome
from adaptsurgery.jobs.extract.plan import ExtractPlan
from adaptsurgery.jobs.extract.run import Results
from adaptsurgery_formats import Note

ROUNDING = 1e-6  # up to which an error is float32's rounding
UNRELATED = 1.0  # ‖D‖/‖W‖; two models that know nothing of each other differ by √2
NOISY = 0.5  # share of ‖D‖² that storage's rounding may be before it is said


def dry_report(plan: ExtractPlan, workers: int) -> Report:
    """The report of a dry run: what would be done."""
    layers = len(plan.layers)
    left = [d for group in plan.dense for d in group if not d.slot]
    rows = [
        Row(layer.label, "/".join(dict.fromkeys(c.algorithm for c in layer.candidates)), "planned")
        for layer in plan.layers
    ]
    facts = _facts(plan, workers) | {
        "layers": [],
        "left_out": [_left(d.pair.label, d.reason) for d in left],
    }
    return Report("extract", f"{layers} layers", rows, _notes(plan), facts=facts)


def _left(label: str, reason: str) -> dict[str, Any]:
    return {"name": label, "reason": reason}


def _notes(plan: ExtractPlan) -> list[Note]:
    return [Note(*n) for n in plan.notes]


def _facts(plan: ExtractPlan, workers: int) -> dict[str, Any]:
    options = plan.options
    return {
        "base": plan.base,
        "tuned": plan.tuned,
        "to": options.to,
        "algorithm": options.algorithm,
        "goal": {options.goal: options.value},
        "dtype": options.dtype,
        "seed": options.seed,
        "bytes_read": plan.nbytes,
        "predicted_peak_memory": plan.peak_memory(workers),
        "digest": plan.digest,
    }


def report_of(plan: ExtractPlan, made: Sequence[Outcome], results: Results, workers: int) -> Report:
    """The report of an extraction that was carried out."""
    dense = _dense(plan, results)
    totals = _totals(made, dense)
    layers = [_layer(o) for o in made]
    for row in layers:
        row["share"] = _share(row["norm"], totals["norm"])
    left = [
        d | {"share": _share(max(d["norm"], 0.0), totals["norm"])}
        for d in dense
        if not d["slot"] and d["norm"]
    ]
    left += [
        _left(r["name"], r["left_out"]) | {"norm": r["norm"], "share": r["share"]}
        for r in layers
        if r["left_out"]
    ]
    facts = (
        _facts(plan, workers)
        | totals
        | {
            "layers": layers,
            "dense": [d for d in dense if d["slot"] and d["norm"]],
            "left_out": sorted(left, key=lambda d: -d["share"]),
        }
    )
    rows = [_row(r) for r in layers] + [_dense_row(d) for d in facts["dense"]]
    notes = _notes(plan) + _warnings(plan, made, facts)
    return Report("extract", _verdict(facts), rows, list(dict.fromkeys(notes)), facts=facts)


def _share(norm: float, total: float) -> float:
    """A norm's share of ‖D‖²."""
    return (norm / total) ** 2 if total else 0.0


def _dense(plan: ExtractPlan, results: Results) -> list[dict[str, Any]]:
    norms = {k: v for group in results[len(plan.layers) :] for k, v in group.items()}
    return [
        {
            "name": d.pair.label,
            "kind": d.kind,
            "slot": d.slot,
            "reason": d.reason,
            "new": d.pair.new,
        }
        | norms[d.pair.label]
        for group in plan.dense
        for d in group
    ]


def _layer(outcome: Outcome) -> dict[str, Any]:
    layer, measured, fit = outcome.layer, outcome.measured, outcome.found
    row: dict[str, Any] = {
        "name": layer.label,
        "kind": layer.kind,
        "shape": list(layer.shape),
        "algorithm": fit.algorithm if fit else "",
        "norm": measured.norm,
        "weight": measured.weight,
        "noise": measured.noise,
        "left_out": outcome.reason,
        "spectrum": measured.spectrum,
        "curve": measured.curve,
        "others": [_other(f) for n, f in enumerate(measured.found) if n != outcome.number],
    }
    if fit is not None:
        row |= {
            "error": fit.error,
            "energy": fit.energy,
            "rank": fit.rank,
            "factor": fit.factor,
            "parameters": fit.parameters,
            "bytes": fit.nbytes,
            "limit": fit.limit,
            "notes": list(fit.notes),
        }
    return row


def _other(fit: Any) -> dict[str, Any]:
    row = {"algorithm": fit.algorithm, "factor": fit.factor, "failed": fit.failed}
    if fit.failed:
        return row
    return row | {"error": fit.error, "rank": fit.rank, "parameters": fit.parameters}


def _totals(made: Sequence[Outcome], dense: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Norms and errors over everything that both models have."""
    kept = [o for o in made if o.found is not None]
    layers = sum(o.measured.norm**2 for o in made)
    missing = sum(o.missing**2 for o in made)
    norms = sum(max(d["norm"], 0.0) ** 2 for d in dense)
    gone = sum((max(d["norm"], 0.0) if not d["slot"] else d["lost"]) ** 2 for d in dense)
    whole = sum(o.measured.weight**2 for o in made) + sum(d["weight"] ** 2 for d in dense)
    adapted = sum(o.measured.norm**2 for o in kept)
    total = layers + norms
    return {
        "norm": math.sqrt(total),
        "weight": math.sqrt(whole),
        "noise": math.sqrt(sum(o.measured.noise**2 for o in made)),
        "error": _ratio(missing + gone, total),
        "energy": 1 - (missing + gone) / total if total else 1.0,
        "layers_error": _ratio(sum(o.missing**2 for o in kept), adapted),
        "layers_norm": math.sqrt(layers),
        "modules": len(kept),
        "unchanged": sum(o.measured.norm == 0 for o in made),
        "parameters": sum(o.found.parameters for o in kept if o.found),
        "adapter_bytes": sum(o.found.nbytes for o in kept if o.found),
        "ranks": sorted({o.found.rank for o in kept if o.found}),
        "algorithms": sorted({o.found.algorithm for o in kept if o.found}),
        "factors": sorted({o.found.factor for o in kept if o.found and o.found.factor is not None}),
        "by_algorithm": _by_algorithm(made),
    }


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0


def _by_algorithm(made: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """What each algorithm that was tried gives over the layers that are adapted."""
    kept = [o for o in made if o.found is not None]
    names = dict.fromkeys(f.algorithm for o in kept for f in o.measured.found)
    rows = {}
    for name in names:
        missing, parameters = 0.0, 0
        for outcome in kept:
            good = [f for f in outcome.measured.found if f.algorithm == name and not f.failed]
            best = min(good, key=lambda f: f.error, default=None)
            if outcome.found and outcome.found.algorithm == name:
                best = outcome.found
            missing += ((best.error if best else 1.0) * outcome.measured.norm) ** 2
            parameters += best.parameters if best else 0
        total = sum(o.measured.norm**2 for o in kept)
        rows[name] = {"error": _ratio(missing, total), "parameters": parameters}
    return rows


def _row(layer: dict[str, Any]) -> Row:
    if layer["left_out"]:
        return Row(layer["name"], "", "left out", 1.0, layer["left_out"])
    if not layer["norm"] and not layer["algorithm"]:
        return Row(layer["name"], "", "identical", detail="unchanged")
    change = "rounded" if layer["error"] <= ROUNDING else "lossy"
    detail = f"{layer['algorithm']} rank {layer['rank']}, {layer['parameters']:,} parameters"
    return Row(layer["name"], layer["algorithm"], change, layer["error"], detail)


def _dense_row(parameter: dict[str, Any]) -> Row:
    how = "kept whole" if parameter["slot"] == "saved" else parameter["slot"]
    error = parameter["lost"] / parameter["norm"] if parameter["norm"] > 0 else 0.0
    return Row(parameter["name"], "", "identical" if not error else "rounded", error, how)


def _verdict(facts: dict[str, Any]) -> str:
    modules, error = facts["modules"], facts["layers_error"]
    ranks = facts["ranks"]
    shown = (
        f", rank {ranks[0]}"
        if len(ranks) == 1
        else f", rank {ranks[0]}…{ranks[-1]}"
        if ranks
        else ""
    )
    kept = f"relative error {error:.2g} ({1 - error**2:.1%} of the energy kept)"
    text = f"{modules} modules{shown}, {facts['parameters']:,} parameters: {kept}"
    if abs(facts["error"] - error) > 0.005 * max(error, 1e-9) and facts["error"] > ROUNDING:
        text += f"; over the whole model {facts['error']:.2g}"
    return text


def _warnings(plan: ExtractPlan, made: Sequence[Outcome], facts: dict[str, Any]) -> list[Note]:
    where = plan.tuned
    notes = []
    apart = facts["norm"] / facts["weight"] if facts["weight"] else 0.0
    if apart > UNRELATED:
        text = f"‖D‖ is {apart:.2f}·‖W‖ (1.41 between models that have nothing in common): "
        notes.append(Note("not-a-fine-tune", where, text + "is this a fine-tune of this base?"))
    notes += _noise_notes(plan, made)
    if facts["left_out"]:
        notes.append(Note("left-out", where, _left_out(facts["left_out"])))
    limits = [o for o in made if o.found and o.found.limit is not None]
    if limits:
        total = sum(o.measured.norm**2 for o in limits)
        least = _ratio(
            sum(
                ((o.found.limit or 0.0) if o.found else 0.0) ** 2 * o.measured.norm**2
                for o in limits
            ),
            total,
        )
        what = (
            "orthogonal limit: no rotation of any rank"
            if limits[0].found and limits[0].found.algorithm == "hra"
            else "limit: no rank at these factors"
        )
        notes.append(Note("limit", where, f"{what} comes below an error of {least:.2g}"))
    seen = [t for o in made if o.found for t in o.found.notes]
    for text in dict.fromkeys(seen):
        count = seen.count(text)
        notes.append(Note("fit", where, text if count == 1 else f"{text} ({count} layers)"))
    return notes


def _left_out(left: Sequence[dict[str, Any]]) -> str:
    """The largest of what is left out; what has no D that could be measured has no share of ‖D‖²."""
    shares = {d["name"]: d["share"] for d in left if d["norm"] >= 0}
    named = [
        f"{d['name']} ({shares[d['name']]:.1%}, {d['reason']})"
        if d["name"] in shares
        else f"{d['name']} ({d['reason']}, not measured)"
        for d in left[:3]
    ]
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    part = f"{sum(shares.values()):.1%} of ‖D‖² is " if shares else ""
    return f"{part}not in the adapter: {', '.join(named)}{more}"


def _noise_notes(plan: ExtractPlan, made: Sequence[Outcome]) -> list[Note]:
    """Where the change is hardly more than the rounding of what it is stored in."""
    noisy = [
        o for o in made if o.measured.norm and o.measured.noise**2 > NOISY * o.measured.norm**2
    ]
    if not noisy:
        return []
    pairs = {s.dtype for o in noisy for s in (o.layer.pair.base, o.layer.pair.tuned)}
    text = (
        f"{len(noisy)} layers, `{noisy[0].layer.label}` first, changed by hardly more than "
        f"{'/'.join(sorted(pairs))} rounds away: what is extracted there is mostly rounding noise"
    )
    return [Note("rounding-noise", plan.tuned, text)]
