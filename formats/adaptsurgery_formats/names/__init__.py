"""Module names: flat ↔ dotted, diffusers ↔ original repository, and the tables that know them."""

from __future__ import annotations

from adaptsurgery_formats.names.renaming import to_diffusers, to_native
from adaptsurgery_formats.names.rows import Rows
from adaptsurgery_formats.names.tables import (
    TABLES,
    Component,
    Names,
    flatten,
    from_modules,
    names_of_base,
    names_of_modules,
    recognise,
    table,
    weights_of_base,
)

__all__ = [
    "TABLES",
    "Component",
    "Names",
    "Rows",
    "flatten",
    "from_modules",
    "names_of_base",
    "names_of_modules",
    "recognise",
    "table",
    "to_diffusers",
    "to_native",
    "weights_of_base",
]
