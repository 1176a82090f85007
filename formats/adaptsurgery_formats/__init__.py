"""The formats that adapter files come in: how each is known, parsed and spelled.

A leaf package: names, shapes and scale rules, in the standard library alone. It knows no models
and none of the mathematics of updates.
"""

from __future__ import annotations

from adaptsurgery_formats import comfyui, diffusers, kohya, lycoris, peft
from adaptsurgery_formats.files import AdapterFile, Format, Rewriting
from adaptsurgery_formats.state import AdapterState, ModuleState, Note
from adaptsurgery_formats.tensors import Tensor

__all__ = [
    "FORMATS",
    "WRITABLE",
    "AdapterFile",
    "AdapterState",
    "Format",
    "ModuleState",
    "Note",
    "Rewriting",
    "Tensor",
]

FORMATS: dict[str, Format] = {
    f.name: f for f in (peft.FORMAT, lycoris.FORMAT, kohya.FORMAT, diffusers.FORMAT, comfyui.FORMAT)
}
WRITABLE = tuple(name for name, f in FORMATS.items() if f.spell is not None)
