"""Surgery on model adapters and checkpoints.

    import adaptsurgery
    adapter = adaptsurgery.load("style.safetensors")          # any layout, found by look-up
    adaptsurgery.convert("style.safetensors", "out", "peft")  # the same ΔW in another layout

Importing this package is cheap: torch comes in with the first call that needs numbers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptsurgery.jobs.adapter import Adapter, load
    from adaptsurgery.jobs.convert import convert
    from adaptsurgery.jobs.inspect import inspect
    from adaptsurgery.jobs.report import Report
    from adaptsurgery.jobs.verify import verify
    from adaptsurgery_formats.errors import SurgeryError

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "Report",
    "SurgeryError",
    "convert",
    "inspect",
    "load",
    "verify",
]

# Public name → where it lives; submodules are attributes too.
_HOMES = {
    "Adapter": "adaptsurgery.jobs.adapter",
    "load": "adaptsurgery.jobs.adapter",
    "convert": "adaptsurgery.jobs.convert",
    "inspect": "adaptsurgery.jobs.inspect",
    "verify": "adaptsurgery.jobs.verify",
    "Report": "adaptsurgery.jobs.report",
    "SurgeryError": "adaptsurgery_formats.errors",
}
_ROOMS = ("algorithms", "checkpoint", "cli", "core", "jobs")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_ROOMS])
