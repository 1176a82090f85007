"""A student fine-tuned in full, what each kind of adapter makes of it, and checkpoints with adapters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptsurgery.jobs.extract.extract import extract
from adaptsurgery.jobs.merging.manifest import manifest_path
from adaptsurgery.jobs.merging.merge import merge, unmerge
from adaptsurgery.quickstart.making import Made
from adaptsurgery.quickstart.students import Student

TOLD = 1e-3  # relative, to which a merge has the error that an extraction tells


def merged(student: Student, made: Made, base: Path, adapter: Path) -> dict[str, float]:
    """One adapter merged into the checkpoint and out again: how far outputs and weights are off.

    ``output`` is how far the merged checkpoint's outputs are from those with the adapter in memory,
    as a share of its effect; ``back`` how far the restored weights are, as one of the base's norm.
    """
    inside, outside = (adapter.with_name(f"{adapter.name}-{w}.safetensors") for w in ("in", "out"))
    merge(base, adapter, inside)
    unmerge(inside, adapter, outside)
    wanted, plain = student.outputs(made.updates), student.outputs({})
    off = (student.read(inside).outputs({}) - wanted).abs().max() / (wanted - plain).abs().max()
    back = _apart(student.read(outside), student) / _norm(student.module.state_dict().values())
    _remove(outside)
    return {"output": float(off), "back": back}


def extracted(
    before: Student, after: Student, base: Path, fine: Path, out: Path, algorithm: str
) -> dict[str, Any]:
    """One adapter of a pair, merged back: errors of the weights, agreement of the outputs."""
    report = extract(base, fine, out, algorithm=algorithm, budget=before.budget)
    inside = out.with_name(f"{out.name}-merged.safetensors")
    merge(base, out, inside)
    back = before.read(inside)
    _remove(inside)
    return {
        "algorithm": algorithm,
        "parameters": report.facts["parameters"],
        "layers": report.facts["modules"],
        "layers_error": report.facts["layers_error"],
        "error": report.facts["error"],
        "error_merged": _apart(back, after) / _apart(before, after),
        "output_error": _outputs_apart(back, before, after),
        "loss": back.measured({}),
    }


def _remove(checkpoint: Path) -> None:
    """Remove a merged file and its manifest: several of a real model take much room."""
    checkpoint.unlink()
    manifest_path(checkpoint, folder=False).unlink()


def _apart(one: Student, other: Student) -> float:
    """‖W − W'‖ over all parameters of two models."""
    mine, theirs = one.module.state_dict(), other.module.state_dict()
    return _norm(mine[name].double() - theirs[name].double() for name in mine)


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def _outputs_apart(back: Student, before: Student, after: Student) -> float:
    """How far the outputs are from the fine-tune's, of how far those are from the base's."""
    got, plain, wanted = (student.outputs({}) for student in (back, before, after))
    return float(torch.linalg.vector_norm(got - wanted) / torch.linalg.vector_norm(plain - wanted))
