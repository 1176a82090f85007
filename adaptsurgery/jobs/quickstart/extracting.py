"""The tiny model fine-tuned in full, and what each kind of adapter makes of it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptsurgery.checkpoint.bridge import from_torch, to_torch
from adaptsurgery.checkpoint.safetensors import read_safetensors
from adaptsurgery.checkpoint.writer import write_safetensors
from adaptsurgery.jobs.extract.extract import extract
from adaptsurgery.jobs.merging.merge import merge
from adaptsurgery.jobs.quickstart import tiny

BUDGET = 24_000  # parameters of each adapter, of the model's 137,000
TOLD = 1e-3  # relative, to which a merge has the error that an extraction tells


def save(model: tiny.TinyModel, path: Path) -> None:
    state = {name: from_torch(t) for name, t in model.state_dict().items()}
    write_safetensors(path, state, {"format": "pt"})


def tuned(model: tiny.TinyModel, steps: int, seed: int) -> tiny.TinyModel:
    """A copy that has learned code with all of its weights."""
    other = copy.deepcopy(model).requires_grad_(True)
    tiny.teach(other, list(other.parameters()), {}, tiny.code(), steps, seed, rate=2e-3)
    return other.requires_grad_(False)


def read(path: Path) -> tiny.TinyModel:
    model = tiny.TinyModel()
    tensors = read_safetensors(path).tensors
    model.load_state_dict({name: to_torch(tensor) for name, tensor in tensors.items()})
    return model.requires_grad_(False)


def extracted(base: Path, fine: Path, out: Path, algorithm: str) -> dict[str, Any]:
    """One adapter of a pair, merged back: errors of the weights, agreement of the outputs."""
    report = extract(base, fine, out, algorithm=algorithm, budget=BUDGET)
    merged = out.with_name(f"{out.name}-merged.safetensors")
    merge(base, out, merged)
    before, after, back = (read(path) for path in (base, fine, merged))
    sample = tiny.pieces(tiny.unseen_code(), 16, torch.Generator().manual_seed(0))
    return {
        "algorithm": algorithm,
        "parameters": report.facts["parameters"],
        "layers": report.facts["modules"],
        "layers_error": report.facts["layers_error"],
        "error": report.facts["error"],
        "error_merged": _weights_apart(back, before, after),
        "output_error": _outputs_apart(sample, back, before, after),
        "loss": tiny.measured(back, tiny.unseen_code(), {}),
    }


def _weights_apart(back: tiny.TinyModel, before: tiny.TinyModel, after: tiny.TinyModel) -> float:
    """‖W' − W1‖/‖W1 − W0‖ over all parameters."""
    states = [model.state_dict() for model in (back, before, after)]
    missing = _square(states[2][k].double() - states[0][k].double() for k in states[0])
    total = _square(states[2][k].double() - states[1][k].double() for k in states[0])
    return math.sqrt(missing / total) if total else 0.0


def _square(tensors: Any) -> float:
    return sum(float(t.square().sum()) for t in tensors)


@torch.no_grad()
def _outputs_apart(
    sample: Tensor, back: tiny.TinyModel, before: tiny.TinyModel, after: tiny.TinyModel
) -> float:
    """How far the logits are from the fine-tune's, of how far those are from the base's."""
    wanted = after(sample)
    return float((back(sample) - wanted).norm() / (before(sample) - wanted).norm())
