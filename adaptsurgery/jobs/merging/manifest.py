"""What a merge records of itself: ``adaptsurgery_manifest.json``, or ``<file>.manifest.json``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adaptsurgery.checkpoint.atomic import record_path
from adaptsurgery.jobs.merging.plan import MANIFEST, MergePlan


def manifest_path(out: Path, folder: bool) -> Path:
    """Where the manifest of an output lies."""
    return out / MANIFEST if folder else record_path(out)


def manifest_of(plan: MergePlan, norms: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Inputs with their hashes, weights, options, versions, and each tensor's norms.

    A base file is told by its header's sha256 and its size; an adapter's files by their own.
    """
    from adaptsurgery import __version__

    torch = sys.modules.get("torch")
    return {
        "job": "unmerge" if plan.options.inverse else "merge",
        "plan": plan.digest,
        "versions": {"adaptsurgery": __version__, "torch": getattr(torch, "__version__", "")},
        "base": {
            "name": Path(plan.base).name,
            "files": [
                {"name": Path(f.path).name, "size": f.size, "header_sha256": f.sha256}
                for f in plan.files
            ],
        },
        "adapters": [
            {
                "name": Path(a.path).name,
                "weight": a.weight,
                "layout": a.layout,
                "files": [
                    {"name": Path(f.path).name, "size": f.size, "sha256": f.sha256} for f in a.files
                ],
            }
            for a in plan.adapters
        ],
        "options": asdict(plan.options),
        "modules": plan.modules,
        "unmatched": list(plan.unmatched),
        "notes": [{"code": c, "text": t} for c, _, t in plan.notes],
        "norms": dict(norms),
    }
